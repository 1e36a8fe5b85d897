package fwdplan

import (
	"math"
	"slices"
)

// choose returns the best ladder, and adds the curve to the plan.
func (t *task) choose(plan *Plan) (Ladder, error) {
	if plan.Confidence.Passes == 0 {
		return Ladder{}, invalidf("none of the snapshot's passes, of %d to %d tokens, could use a graph "+
			"of at most %d tokens in mode %v", t.sizes[0], t.sizes[len(t.sizes)-1], t.Max, t.mode)
	}
	most := math.MaxInt // graphs for each case of adapters
	if t.MaxGraphs > 0 {
		most = t.MaxGraphs / t.cases
	}
	price := t.GraphPrice * float64(t.cases)
	costs, ideal, needs := []float64{0}, 0.0, 0 // of all lists together; costs by graphs
	var lists []*list
	var before [][]int // by list and graphs, how many of these are for the lists before it
	for _, kinds := range t.ladders() {
		l := t.newList(kinds)
		l.choose(most, price)
		var others []int
		costs, others = together(costs, l.best.costs)
		ideal, needs = ideal+l.ideal, needs+l.needs
		lists, before = append(lists, l), append(before, others)
	}
	best := cheapest(costs, price, most)
	if best < 0 {
		return Ladder{}, invalidf("MaxGraphs is %d, but Must %v, the largest size %d and %d cases of adapters "+
			"need at least %d graphs", t.MaxGraphs, t.Must, t.Max, t.cases, t.cases*needs)
	}
	if most < len(costs)-onceMore {
		costs = costs[:most+onceMore+1]
	}
	plan.Curve = t.curve(costs, ideal)
	var ladder Ladder
	for i := len(lists) - 1; i >= 0; i-- {
		others := before[i][best]
		sizes := lists[i].ladder(best - others)
		if i == 0 {
			ladder.Sizes = sizes
		} else {
			ladder.MixedSizes = sizes
		}
		best = others
	}
	return ladder, nil
}

// together returns the least costs of two lists together, by graphs, and how many of them are for a.
func together(a, b []float64) (costs []float64, inA []int) {
	costs, inA = make([]float64, len(a)+len(b)-1), make([]int, len(a)+len(b)-1)
	for v := range costs {
		costs[v] = math.Inf(1)
		for i := max(0, v-len(b)+1); i <= min(v, len(a)-1); i++ {
			if c := a[i] + b[v-i]; c < costs[v] {
				costs[v], inA[v] = c, i
			}
		}
	}
	return costs, inA
}

// cheapest returns the number of graphs, at most most, that is cheapest with the price of the graphs, or
// -1 if none is possible.
func cheapest(costs []float64, price float64, most int) int {
	best, least := -1, math.Inf(1)
	for v, cost := range costs {
		if total := cost + price*float64(v); total < least && v <= most {
			best, least = v, total
		}
	}
	return best
}

// curve returns the best costs with at most so many graphs.
func (t *task) curve(costs []float64, ideal float64) (curve []Point) {
	least := math.Inf(1)
	for v, cost := range costs {
		if cost < least {
			least = cost
			excess := 0.0
			if ideal > 0 {
				excess = max(cost/ideal-1, 0)
			}
			curve = append(curve, Point{t.cases * v, cost, excess})
		}
	}
	return curve
}

// list is one list of capture sizes to choose.
type list struct {
	problem
	kinds []int
	sizes []int // the candidates, from index 1 of the problem
	needs int   // graphs that there must be
	ideal float64
	best  *solution
}

// newList returns the problem of choosing the sizes for some kinds of batches.
func (t *task) newList(kinds []int) *list {
	musts := slices.DeleteFunc(slices.Clone(t.Must), func(size int) bool { return !t.serves(kinds[0], size) })
	l := &list{kinds: kinds, sizes: t.candidates(kinds, musts)}
	n := len(l.sizes) + 1
	l.graphs, l.must, l.eager = make([]int, n), make([]bool, n), make([]float64, n)
	for kind := range l.price {
		l.price[kind], l.passes[kind] = make([]float64, n), make([]float64, n)
	}
	for i, size := range l.sizes {
		l.graphs[i+1] = t.graphs(kinds, size)
		l.must[i+1] = slices.Contains(musts, size)
		for _, kind := range kinds {
			l.price[kind][i+1] = t.graphPrice(kind, size)
		}
	}
	for _, kind := range kinds {
		t.add(l, kind)
	}
	l.bound()
	return l
}

// candidates returns the sizes that the best list consists of: sizes that were seen, and those of Must. A
// size in between costs more and serves nothing more. But above the largest decode batch with a full graph
// sizes need one graph less, so the first of them is a candidate too.
func (t *task) candidates(kinds, musts []int) []int {
	sizes := slices.Clone(musts)
	for _, kind := range kinds {
		for i, size := range t.sizes {
			if t.passes[kind][i] > 0 && t.plannable(kind, size) {
				sizes = append(sizes, size)
			}
		}
		for _, u := range t.unseen(kind) {
			sizes = append(sizes, u.size)
		}
	}
	above := t.roundUp(t.maxDecode + 1)
	if above <= t.Max && t.serves(kinds[0], above) && t.graphs(kinds, above) != t.graphs(kinds, t.multiple) {
		sizes = append(sizes, above)
	}
	slices.Sort(sizes)
	return slices.Compact(sizes)
}

// bound computes how many graphs there must be, and what the list costs at least, however many there are.
func (l *list) bound() {
	l.ideal = math.Inf(1)
	served, lastMust := 0.0, 0
	for i := range l.graphs {
		for kind := range l.price {
			served += l.price[kind][i] * (l.passes[kind][i] - l.passes[kind][max(i-1, 0)])
		}
		l.ideal = min(l.ideal, served+l.eager[i])
		if l.must[i] {
			l.needs += l.graphs[i]
			lastMust = i
		}
	}
	if math.IsInf(l.eager[lastMust], 1) { // the largest size must be served
		l.needs += l.graphs[len(l.graphs)-1]
	}
}

// add adds the passes of one kind to a list: those that graphs can serve by size, and what they cost
// eagerly above each size. What no graph can serve costs the same whatever is chosen.
func (t *task) add(l *list, kind int) {
	always := 0.0
	eager := make([]float64, len(l.sizes)+1) // by the smallest candidate that would serve it
	add := func(size int, passes float64) {
		price, ok := t.eagerPrice(kind, size)
		if !t.plannable(kind, size) {
			always += price * passes
			return
		}
		if !ok {
			price = math.Inf(1)
		}
		at, _ := slices.BinarySearch(l.sizes, size)
		l.passes[kind][at+1] += passes
		eager[at+1] += price * passes
	}
	for i, size := range t.sizes {
		if passes := t.passes[kind][i]; passes > 0 {
			add(size, float64(passes))
		}
	}
	for _, u := range t.unseen(kind) {
		add(u.size, u.passes)
	}
	above := always
	for i := len(l.sizes); i >= 0; i-- {
		l.eager[i] += above
		above += eager[i]
	}
	for i := 1; i < len(l.passes[kind]); i++ {
		l.passes[kind][i] += l.passes[kind][i-1]
	}
}

// onceMore is how many graphs one size more may need.
const onceMore = 2

// choose finds the best ladders by graphs, up to one size more than most, and as long as a graph can be
// worth its price.
func (l *list) choose(most int, price float64) {
	all := 0
	for _, graphs := range l.graphs {
		all += graphs
	}
	if most < all {
		all = min(all, most+onceMore)
	}
	least := math.Inf(1)
	l.best = l.solve(all, func(v int, cost float64) bool {
		least = min(least, cost+price*float64(v))
		return l.ideal+price*float64(v) >= least
	})
}

// ladder returns the sizes of the best ladder with exactly so many graphs.
func (l *list) ladder(graphs int) []int {
	var sizes []int
	for _, i := range l.best.ladder(graphs) {
		sizes = append(sizes, l.sizes[i-1])
	}
	return sizes
}

// expected is how many passes of a size are expected that was not seen.
type expected struct {
	size   int
	passes float64
}

// unseen returns what Config.Unseen adds for one kind of batch. Large sizes are taken in steps of about
// a hundredth, so that they are not too many.
func (t *task) unseen(kind int) (list []expected) {
	seen := map[int]bool{}
	for i, size := range t.sizes {
		if t.passes[kind][i] > 0 && t.plannable(kind, size) {
			seen[size] = true
		}
	}
	if !t.Unseen || len(seen) == 0 {
		return nil
	}
	sum := 0.0
	for size := t.multiple; t.plannable(kind, size); size += t.roundUp(max(size/128, 1)) {
		if !seen[size] {
			list = append(list, expected{size, math.Pow(float64(size), -2)})
			sum += math.Pow(float64(size), -2)
		}
	}
	for i := range list {
		list[i].passes /= sum
	}
	return list
}
