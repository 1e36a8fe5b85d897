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

// problem says what a ladder is made of. Indices are of candidate sizes, in ascending order. Index 0 is
// below all of them, the empty ladder.
type problem struct {
	price  [2][]float64 // of one pass in a graph of that size, for each kind of batch; never falling
	passes [2][]float64 // that have at most that size, for each kind of batch
	eager  []float64    // what the passes above that size cost if the ladder ends there; +Inf: it can't
	graphs []int        // that the size needs, 1 or 2
	must   []bool       // the size must be there
}

// state is a ladder that ends at a size and has that many graphs.
type state struct{ size, graphs int }

// run is a range of sizes that need equally many graphs, and before which no step may begin below from.
type run struct{ first, last, from, graphs int }

// runs returns the runs of the sizes above lo up to hi.
func (p *problem) runs(lo, hi int) (runs []run) {
	from := lo
	for i := lo + 1; i <= hi; i++ {
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

// marks is how many states a ladder is cut at while its cost is computed. The pieces between them are
// found afterwards, each by itself, so that no table of sizes times graphs is needed.
const marks = 16

// layers computes, for v = 0, 1, ... most graphs, the costs of the cheapest ladders that begin after size
// lo and end at each size up to hi. It calls each with v, these costs, and for each size the last state
// on its ladder that has at most as many graphs as the last mark before v. each returns false to end it.
type layers struct {
	*problem
	lo, hi, most, step int
	runs               []run
	cost               [3][]float64 // of v, v-1 and v-2 graphs
	origin             [][]state    // by v: nil if it is not needed any more
}

func (p *problem) newLayers(lo, hi, most int) *layers {
	l := &layers{problem: p, lo: lo, hi: hi, most: most, step: (most + marks - 1) / marks, runs: p.runs(lo, hi)}
	for i := range l.cost {
		l.cost[i] = make([]float64, hi+1)
	}
	return l
}

// lastMark returns the number of graphs at the last mark before v.
func (l *layers) lastMark(v int) int { return (v - 1) / l.step * l.step }

func (l *layers) compute(each func(v int, cost []float64) bool) {
	for v := 0; v <= l.most; v++ {
		cost := l.cost[v%3]
		for i := range cost {
			cost[i] = math.Inf(1)
		}
		var origin []state
		if old := v - 3; old >= 0 && l.step > 1 && old%l.step != 0 && (old+1)%l.step != 0 {
			origin, l.origin[old] = l.origin[old], nil
		} else {
			origin = make([]state, l.hi+1)
		}
		l.origin = append(l.origin, origin)
		if v == 0 {
			cost[l.lo] = 0
		}
		for _, r := range l.runs {
			if before := v - r.graphs; before >= 0 {
				f := fill{layers: l, v: v, before: before, cost: cost, last: l.cost[before%3], origin: origin}
				f.rows(r.first, r.last, r.from, r.last-1)
			}
		}
		if !each(v, cost) {
			return
		}
	}
}

// fill computes one layer.
type fill struct {
	*layers
	v, before  int // graphs of the layer, and of the one on which it builds
	cost, last []float64
	origin     []state
}

// rows computes the sizes from first to last. The sizes before them on their ladders are among lo to hi.
func (f *fill) rows(first, last, lo, hi int) {
	if first > last {
		return
	}
	i := (first + last) / 2
	best, at := f.cheapest(i, lo, min(hi, i-1))
	if at < 0 { // then the smaller sizes, which may follow fewer sizes, have no ladder either
		f.rows(i+1, last, lo, hi)
		return
	}
	f.cost[i] = best + f.price[0][i]*f.passes[0][i] + f.price[1][i]*f.passes[1][i]
	if f.before <= f.lastMark(f.v) {
		f.origin[i] = state{at, f.before}
	} else {
		f.origin[i] = f.layers.origin[f.before][at]
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

// curve returns, for v = 0, 1, ... most, what the cheapest ladder of exactly v graphs costs, with what
// runs eagerly above it, and where it ends. It ends early if enough says so.
func (p *problem) curve(most int, enough func(v int, best float64) bool) (costs []float64, ends []int) {
	n := len(p.eager) - 1
	lastMust := 0
	for i, must := range p.must {
		if must {
			lastMust = i
		}
	}
	p.newLayers(0, n, most).compute(func(v int, cost []float64) bool {
		best, end := math.Inf(1), lastMust
		for i := lastMust; i <= n; i++ {
			if c := cost[i] + p.eager[i]; c < best {
				best, end = c, i
			}
		}
		costs, ends = append(costs, best), append(ends, end)
		return !enough(v, best)
	})
	return costs, ends
}

// ladder returns the sizes of the cheapest ladder that begins after size lo, ends at size hi, and has
// exactly that many graphs. There must be one.
func (p *problem) ladder(lo, hi, graphs int) []int {
	if lo == hi {
		return nil
	}
	if p.graphs[hi] == graphs {
		return []int{hi}
	}
	l := p.newLayers(lo, hi, graphs)
	l.compute(func(int, []float64) bool { return true })
	states := []state{{hi, graphs}}
	for s := states[0]; s.graphs > 0; states = append(states, s) {
		s = l.origin[s.graphs][s.size]
	}
	slices.Reverse(states)
	var sizes []int
	for i := 1; i < len(states); i++ {
		sizes = append(sizes, p.ladder(states[i-1].size, states[i].size, states[i].graphs-states[i-1].graphs)...)
	}
	return sizes
}
