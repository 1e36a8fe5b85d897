package fwdplan

import (
	"math"
	"slices"
)

// This file finds the cheapest ladder of capture sizes, by dynamic programming over sizes and graphs.
// The cheapest ladder that ends at size i and has v graphs is one that ends at some smaller size j and has
// fewer graphs, and then i, in which all passes above size j up to size i run.
//
// The cost of that last step is price(i) · passes between j and i. Prices don't fall with size, so it
// satisfies the quadrangle inequality: for a ≤ b ≤ c ≤ d, cost(a,c) + cost(b,d) ≤ cost(a,d) + cost(b,c).
// Therefore the best j does not fall when i grows (Yao 1980), and divide and conquer finds the best j of
// all i in n·log n steps. The inequality also holds with forbidden steps, as long as a forbidden step
// stays forbidden when it becomes longer: those over a size that must be there.
//
// If all sizes need equally many graphs, the best j does not fall either when v grows. Then the last
// layer's is where the search begins, which leaves few sizes to look at.

// problem says what a ladder is made of. Indices are of candidate sizes, in ascending order. Index 0 is
// below all of them, the empty ladder.
type problem struct {
	price  [2][]float64 // of one pass in a graph of that size, for each kind of batch; never falling
	passes [2][]float64 // that have at most that size, for each kind of batch
	eager  []float64    // what the passes above that size cost if the ladder ends there; +Inf: it can't
	graphs []int        // that the size needs, 1 or 2
	must   []bool       // the size must be there
}

// between returns the problem of the sizes above lo up to hi, for ladders that go on after lo.
func (p *problem) between(lo, hi int) *problem {
	part := &problem{eager: p.eager[lo : hi+1], graphs: p.graphs[lo : hi+1], must: p.must[lo : hi+1]}
	for kind := range p.price {
		part.price[kind], part.passes[kind] = p.price[kind][lo:hi+1], p.passes[kind][lo:hi+1]
	}
	return part
}

// state is a ladder that ends at a size and has that many graphs.
type state struct{ size, graphs int32 }

// run is a range of sizes that need equally many graphs, and before which no step may begin below from.
type run struct{ first, last, from, graphs int }

func (p *problem) runs() (runs []run) {
	from := 0
	for i := 1; i < len(p.graphs); i++ {
		if n := len(runs) - 1; n >= 0 && runs[n].from == from && runs[n].graphs == p.graphs[i] {
			runs[n].last = i
		} else {
			runs = append(runs, run{i, i, from, p.graphs[i]})
		}
		if p.must[i] {
			from = i
		}
	}
	return runs
}

// marks is how many pieces a ladder is cut into while its cost is computed. The sizes within a piece are
// found afterwards, each piece by itself, so that no table of sizes times graphs is needed.
const marks = 16

// layers computes the costs of the cheapest ladders with 0, 1, ... graphs, by the size at which they end.
type layers struct {
	*problem
	step   int // graphs between two marks
	runs   []run
	cost   [3][]float64 // with v, v-1 and v-2 graphs
	floor  []int        // by size: the best size before it is not below; nil: not known
	origin [][]state    // with v graphs: see originOf; nil if it is not needed any more
}

func (p *problem) newLayers(most int) *layers {
	l := &layers{problem: p, step: max((most+marks-1)/marks, 1), runs: p.runs()}
	for i := range l.cost {
		l.cost[i] = make([]float64, len(p.graphs))
	}
	if !slices.ContainsFunc(l.runs, func(r run) bool { return r.graphs != l.runs[0].graphs }) {
		l.floor = make([]int, len(p.graphs))
	}
	return l
}

// next computes the costs with one graph more than before, v, and returns them.
func (l *layers) next() []float64 {
	v := len(l.origin)
	cost := l.cost[v%3]
	for i := range cost {
		cost[i] = math.Inf(1)
	}
	var origin []state
	if old := v - 3; old >= 0 && old%l.step != 0 && (old+1)%l.step != 0 {
		origin, l.origin[old] = l.origin[old], nil
	} else {
		origin = make([]state, len(cost))
	}
	l.origin = append(l.origin, origin)
	if v == 0 {
		cost[0] = 0
	}
	for _, r := range l.runs {
		if before := v - r.graphs; before >= 0 {
			f := fill{layers: l, before: before, cost: cost, last: l.cost[before%3], origin: origin}
			if before > (v-1)/l.step*l.step { // there is no mark between the two layers
				f.originOfLast = l.origin[before]
			}
			f.rows(r.first, r.last, r.from, r.last-1)
		}
	}
	return cost
}

// originOf returns the last state on the ladder of s that has at most as many graphs as the last mark
// before s. s is in one of the last three layers, or is itself such an origin: those are kept.
func (l *layers) originOf(s state) state { return l.origin[s.graphs][s.size] }

// fill computes one layer.
type fill struct {
	*layers
	before       int // graphs of the layer on which it builds
	cost, last   []float64
	origin       []state
	originOfLast []state // nil: the layer on which it builds is a mark, or before one
}

// rows computes the sizes from first to last. The sizes before them on their ladders are among lo to hi.
func (f *fill) rows(first, last, lo, hi int) {
	if first > last {
		return
	}
	i := (first + last) / 2
	floor := lo
	if f.floor != nil {
		floor = max(lo, f.floor[i])
	}
	best, at := f.cheapest(i, floor, min(hi, i-1))
	if at < 0 { // then the smaller sizes, which may follow fewer sizes, have no ladder either
		f.rows(i+1, last, lo, hi)
		return
	}
	f.cost[i] = best + f.price[0][i]*f.passes[0][i] + f.price[1][i]*f.passes[1][i]
	if f.originOfLast != nil {
		f.origin[i] = f.originOfLast[at]
	} else {
		f.origin[i] = state{int32(at), int32(f.before)}
	}
	if f.floor != nil {
		f.floor[i] = at
	}
	f.rows(first, i-1, lo, at)
	f.rows(i+1, last, at, hi)
}

// cheapest returns the size among lo to hi that best precedes size i, and the part of the cost that
// depends on it, or -1 if none does.
func (f *fill) cheapest(i, lo, hi int) (best float64, at int) {
	best, at = math.Inf(1), -1
	if lo > hi {
		return best, at
	}
	price0, price1 := f.price[0][i], f.price[1][i]
	last := f.last[lo : hi+1]
	passes0, passes1 := f.passes[0][lo:hi+1], f.passes[1][lo:hi+1]
	for j, cost := range last {
		if c := cost - price0*passes0[j] - price1*passes1[j]; c < best {
			best, at = c, lo+j
		}
	}
	return best, at
}

// solution has, by graphs, the best ladders with exactly so many.
type solution struct {
	*layers
	costs   []float64 // with what runs eagerly above the ladder; +Inf: there is none
	ends    []state
	origins []state // of the ends
}

// solve finds the best ladders with 0, 1, ... most graphs. It ends early if enough says so.
func (p *problem) solve(most int, enough func(graphs int, cost float64) bool) *solution {
	s := &solution{layers: p.newLayers(most)}
	lastMust := 0
	for i, must := range p.must {
		if must {
			lastMust = i
		}
	}
	for v := range most + 1 {
		cost := s.next()
		best, end := math.Inf(1), lastMust
		for i := lastMust; i < len(cost); i++ {
			if c := cost[i] + p.eager[i]; c < best {
				best, end = c, i
			}
		}
		at := state{int32(end), int32(v)}
		s.costs, s.ends, s.origins = append(s.costs, best), append(s.ends, at), append(s.origins, s.originOf(at))
		if enough(v, best) {
			break
		}
	}
	return s
}

// ladder returns the sizes of the best ladder with exactly so many graphs. There must be one.
func (s *solution) ladder(graphs int) []int { return s.trace(s.ends[graphs], s.origins[graphs]) }

// trace returns the sizes of the ladder that ends in a state with that origin.
func (l *layers) trace(end, origin state) []int {
	if end.graphs == 0 {
		return nil
	}
	states := []state{end, origin}
	for origin.graphs > 0 {
		origin = l.originOf(origin)
		states = append(states, origin)
	}
	slices.Reverse(states)
	var sizes []int
	for i := 1; i < len(states); i++ {
		a, b := states[i-1], states[i]
		part := l.between(int(a.size), int(b.size))
		for _, size := range part.ladder(int(b.graphs - a.graphs)) {
			sizes = append(sizes, int(a.size)+size)
		}
	}
	return sizes
}

// ladder returns the sizes of the cheapest ladder with exactly so many graphs that ends at the last size.
func (p *problem) ladder(graphs int) []int {
	last := len(p.graphs) - 1
	if p.graphs[last] == graphs {
		return []int{last}
	}
	l := p.newLayers(graphs)
	for range graphs + 1 {
		l.next()
	}
	end := state{int32(last), int32(graphs)}
	return l.trace(end, l.originOf(end))
}
