package fwdplan

import (
	"fmt"
	"math"
	"slices"

	"github.com/forwardctx/fwd"
)

// Config says what graphs cost and which may be captured. Either MaxGraphs or GraphPrice must be set.
type Config struct {
	// MaxGraphs is the most graphs that may be captured in all. 0: as many as GraphPrice makes worth it.
	MaxGraphs int

	// GraphPrice is what a graph costs, its memory or its time at start, in the unit of Plan.Cost:
	// how many padded tokens, or with Measured how many seconds, it must save to be worth it.
	GraphPrice float64

	// Must are capture sizes that have to be there, such as that of the largest batch.
	Must []int

	// Max is the largest size worth a graph. Larger passes run eagerly. 0: the largest of Must or, if
	// there is none, the largest size in the snapshot.
	Max int

	// Multiple is what capture sizes must be multiples of, as ParallelConfig.TokenMultiple. Sizes are
	// rounded up to it. It must be a multiple of the dispatcher's UniformDecodeQueryLen, which is what 0
	// stands for.
	Multiple int

	// Measured takes as cost of a pass the seconds that passes took in the snapshot, with a graph by
	// capture size and kind of batch, and without a graph by size. Between measured sizes it is
	// interpolated. Otherwise a pass costs its tokens, padding included.
	Measured bool

	// EagerPrice is what a token costs in a pass without a graph, if it costs 1 in one with a graph. If it
	// is 0, eager passes have no price, so the largest capture size is at least Max, or the largest size
	// that was seen up to it. With Measured, eager passes cost what was measured; it must be 0 then.
	EagerPrice float64

	// Unseen allows for sizes that were not seen. It adds one pass of each kind of batch before it
	// chooses, spread over the sizes up to Max that were not seen, in inverse proportion to their squares.
	// So graphs that would save little or nothing otherwise serve sizes that may come. Only Plan.Curve
	// counts that pass.
	Unseen bool

	// Separate chooses one list of sizes for uniform decode batches and one for mixed batches, for
	// dispatchers that have both. Dispatcher.Mode must be FULL_AND_PIECEWISE.
	Separate bool

	// Dispatcher says which batches have graphs and how many each size needs: two if its mode is
	// composite and has graphs for both kinds of batch, times the cases of adapters. Its CaptureSizes
	// are not read. If its Mode is NONE, one graph serves every batch of a size. If its MaxNumSeqs is 0,
	// requests have no limit.
	Dispatcher fwd.DispatcherConfig
}

// Ladder is a list of capture sizes, ascending and unique.
type Ladder struct {
	Sizes []int `json:"sizes"` // with Config.Separate only those for uniform decode batches

	// MixedSizes are those for mixed batches, with Config.Separate.
	MixedSizes []int `json:"mixed_sizes,omitempty"`
}

// Share is what became of one kind of batch.
type Share struct {
	Passes  uint64 `json:"passes"`
	Eager   uint64 `json:"eager_passes"` // of these, ran without a graph
	Tokens  uint64 `json:"tokens"`       // of the passes with a graph, without padding
	Padding uint64 `json:"padding"`      // of the passes with a graph
}

// PaddingRatio returns the padding for each token; 0 if there are none.
func (s Share) PaddingRatio() float64 { return float64(s.Padding) / float64(max(s.Tokens, 1)) }

// EagerRatio returns the share of the passes that run without a graph; 0 if there are none.
func (s Share) EagerRatio() float64 { return float64(s.Eager) / float64(max(s.Passes, 1)) }

func (s Share) plus(o Share) Share {
	return Share{s.Passes + o.Passes, s.Eager + o.Eager, s.Tokens + o.Tokens, s.Padding + o.Padding}
}

// Outcome is how a ladder does on a snapshot. A dummy pass counts as any other: it runs the same graph.
type Outcome struct {
	Graphs int   `json:"graphs"`
	Decode Share `json:"decode"` // uniform decode batches
	Mixed  Share `json:"mixed"`

	// Cost is in tokens, or with Config.Measured in seconds. Eager passes without a price are not in it.
	Cost float64 `json:"cost"`
}

// All returns what became of both kinds of batch.
func (o Outcome) All() Share { return o.Decode.plus(o.Mixed) }

// Plan is what [Choose] found.
type Plan struct {
	Ladder
	Outcome

	// Curve says what the best ladders with at most so many graphs cost, from the smallest that is
	// possible to one size more than the plan may have. It ends where more graphs save nothing.
	Curve []Point `json:"curve"`

	// Steps says what each size of the ladder is for.
	Steps []Step `json:"steps"`

	Confidence Confidence `json:"confidence"`

	// Adjusted is the number of measured sizes, with Config.Measured, that had another time than the
	// plan goes by. Times that fall with size are noise: they are made equal to those of their neighbours,
	// weighted by passes.
	Adjusted int `json:"adjusted"`
}

// Step is one size of a ladder, and the passes that pad to it.
type Step struct {
	Size    int    `json:"size"`
	Mixed   bool   `json:"mixed,omitempty"` // in MixedSizes
	Passes  uint64 `json:"passes"`
	Padding uint64 `json:"padding"` // tokens
}

// Point is the best ladder with at most that many graphs.
type Point struct {
	Graphs int     `json:"graphs"`
	Cost   float64 `json:"cost"`

	// Excess is how much more that is than with a graph for every size, as a share. If passes cost
	// their tokens and eager passes nothing, it is the padding for each token.
	Excess float64 `json:"excess"`
}

// Confidence says how much traffic a plan is made from, among the sizes for which graphs are possible.
type Confidence struct {
	Passes   uint64     `json:"passes"`
	Sizes    int        `json:"sizes"`
	SeenOnce int        `json:"seen_once"` // sizes with a single pass
	Evidence []Evidence `json:"evidence"`
}

// Evidence is the share of the passes whose sizes were seen in at least that many passes.
type Evidence struct {
	AtLeast uint64  `json:"at_least"`
	Share   float64 `json:"share"`
}

// Choose returns the capture sizes that cost least for the passes of a snapshot. No list of sizes that
// the configuration allows costs less. Of lists that cost the same it takes one with fewest graphs. For
// n sizes and g graphs it takes time in the order of n·g·log n, and memory in the order of n.
//
// Its errors wrap [fwd.ErrInvalid] and name the values in conflict: a snapshot without passes that a graph
// could serve, sizes that are no multiples, a size in Must that is above Max, or MaxGraphs below what
// Must needs.
func Choose(s Snapshot, cfg Config) (Plan, error) {
	t, err := newTask(s, cfg)
	if err != nil {
		return Plan{}, err
	}
	plan := Plan{Adjusted: t.adjusted, Confidence: t.confidence()}
	best, err := t.choose(&plan)
	if err != nil {
		return Plan{}, err
	}
	plan.Ladder = best
	plan.Outcome = t.evaluate(best)
	plan.Steps = t.steps(best)
	return plan, nil
}

// Evaluate returns how any other ladder does on a snapshot, or a plan's ladder on another snapshot. Of cfg
// it reads neither MaxGraphs, GraphPrice, Must nor Max. Its errors wrap [fwd.ErrInvalid].
func Evaluate(s Snapshot, cfg Config, l Ladder) (Outcome, error) {
	cfg.MaxGraphs, cfg.Must, cfg.Max = 1, nil, 0
	t, err := newTask(s, cfg)
	if err != nil {
		return Outcome{}, err
	}
	for _, sizes := range [][]int{l.Sizes, l.MixedSizes} {
		for i, size := range sizes {
			if size < 1 || size > maxTokens || size%t.multiple != 0 || i > 0 && size <= sizes[i-1] {
				return Outcome{}, invalidf("capture sizes %v: %d at index %d is not above the one before, "+
					"or no multiple of %d from 1 to %d", sizes, size, i, t.multiple, maxTokens)
			}
		}
	}
	if len(l.MixedSizes) > 0 && !cfg.Separate {
		return Outcome{}, invalidf("a ladder with capture sizes %v for mixed batches alone without Separate", l.MixedSizes)
	}
	return t.evaluate(l), nil
}

// The kinds of batches.
const (
	decode = iota
	mixed
	kinds
)

// task is a snapshot seen through a configuration.
type task struct {
	Config
	mode      fwd.GraphMode
	multiple  int
	cases     int // of adapters
	maxDecode int // the largest uniform decode batch with a full graph, if the mode is composite
	prices
	sizes  []int           // that were seen, rounded up; ascending
	passes [kinds][]uint64 // by size
	tokens [kinds][]uint64 // without padding, by size
}

func newTask(s Snapshot, cfg Config) (*task, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("the snapshot: %w", err)
	}
	t := &task{Config: cfg, mode: cfg.Dispatcher.Mode}
	if t.mode == fwd.GraphNone {
		t.mode = fwd.GraphPiecewise
	}
	if err := t.configure(); err != nil {
		return nil, err
	}
	t.fill(s)
	if len(t.sizes) == 0 {
		return nil, invalidf("the snapshot has no passes (left out: %+v)", s.LeftOut)
	}
	if t.Max == 0 && len(t.Must) == 0 {
		t.Max = t.sizes[len(t.sizes)-1]
	} else if t.Max == 0 {
		t.Max = slices.Max(t.Must)
	}
	var err error
	t.prices, err = newPrices(s, cfg)
	return t, err
}

// configure fills in what follows from the configuration alone.
func (t *task) configure() error {
	d := t.Dispatcher
	q := max(d.UniformDecodeQueryLen, 1)
	t.multiple, t.maxDecode = t.Multiple, maxTokens
	if t.multiple == 0 {
		t.multiple = q
	}
	if int64(d.MaxNumSeqs)*int64(q) < maxTokens && d.MaxNumSeqs > 0 {
		t.maxDecode = d.MaxNumSeqs * q
	}
	// A dispatcher with one size says whether the configuration is right and how many cases it has.
	d.Mode, d.CaptureSizes, d.MaxNumSeqs = fwd.GraphPiecewise, []int{q}, max(d.MaxNumSeqs, 1)
	dispatcher, err := fwd.NewDispatcher(d)
	if err != nil {
		return err
	}
	t.cases = len(dispatcher.Captures())
	switch {
	case !t.mode.ValidRuntime() && !t.mode.SeparateRoutine():
		return invalidf("%v is not a graph mode", t.mode)
	case t.MaxGraphs < 0 || t.MaxGraphs == 0 && t.GraphPrice == 0:
		return invalidf("MaxGraphs is %d and GraphPrice %v, want one of them above 0", t.MaxGraphs, t.GraphPrice)
	case !(t.GraphPrice >= 0 && t.EagerPrice >= 0) || max(t.GraphPrice, t.EagerPrice) > maxNumber:
		return invalidf("GraphPrice is %v and EagerPrice %v, want 0 to %d",
			t.GraphPrice, t.EagerPrice, uint64(maxNumber))
	case t.EagerPrice > 0 && t.Measured:
		return invalidf("EagerPrice is %v with Measured, which takes the measured price of eager passes", t.EagerPrice)
	case t.Separate && t.mode != fwd.GraphFullAndPiecewise:
		return invalidf("Separate with graph mode %v, want %v", t.mode, fwd.GraphFullAndPiecewise)
	case t.multiple < 1 || t.multiple > maxTokens || t.multiple%q != 0:
		return invalidf("Multiple is %d, want a multiple of the query length %d, up to %d", t.Multiple, q, maxTokens)
	case t.Max < 0 || t.Max > maxTokens || t.Max%t.multiple != 0:
		return invalidf("Max is %d, want a multiple of %d, up to %d", t.Max, t.multiple, maxTokens)
	}
	for _, size := range t.Must {
		if size < 1 || size > maxTokens || size%t.multiple != 0 {
			return invalidf("%d in Must is no multiple of %d from 1 to %d", size, t.multiple, maxTokens)
		}
		if t.Max > 0 && size > t.Max {
			return invalidf("%d in Must is above Max, %d", size, t.Max)
		}
	}
	return nil
}

// fill adds up the rows by size and kind.
func (t *task) fill(s Snapshot) {
	at := map[int]int{}
	for _, r := range s.Rows {
		at[t.roundUp(r.Tokens)] = 0
	}
	for size := range at {
		t.sizes = append(t.sizes, size)
	}
	slices.Sort(t.sizes)
	for i, size := range t.sizes {
		at[size] = i
	}
	for kind := range kinds {
		t.passes[kind] = make([]uint64, len(t.sizes))
		t.tokens[kind] = make([]uint64, len(t.sizes))
	}
	for _, r := range s.Rows {
		size, passes := t.roundUp(r.Tokens), r.Passes+r.Dummies
		kind := mixed
		if r.Uniform && (!t.mode.SeparateRoutine() || size <= t.maxDecode) {
			kind = decode
		}
		t.passes[kind][at[size]] += passes
		t.tokens[kind][at[size]] += passes * uint64(r.Tokens)
	}
}

func (t *task) roundUp(tokens int) int { return (tokens + t.multiple - 1) / t.multiple * t.multiple }

// serves reports whether a graph of that size serves batches of that kind.
func (t *task) serves(kind, size int) bool {
	if t.mode.MixedMode() != fwd.GraphNone && !(t.Separate && kind == decode) {
		return true
	}
	return kind == decode && size <= t.maxDecode
}

// graphs returns the number of graphs that a size of a ladder for these kinds needs, without adapters.
func (t *task) graphs(kinds []int, size int) int {
	switch {
	case t.Separate && len(kinds) == 1:
		return 1
	case t.mode == fwd.GraphFullAndPiecewise && size <= t.maxDecode:
		return 2
	case t.mode == fwd.GraphFullDecodeOnly && size > t.maxDecode:
		return 0
	}
	return 1
}

// ladders returns which kinds of batches each list of a ladder is for.
func (t *task) ladders() [][]int {
	if t.Separate {
		return [][]int{{decode}, {mixed}}
	}
	return [][]int{{decode, mixed}}
}

// evaluate returns how a ladder does. It has been checked.
func (t *task) evaluate(l Ladder) Outcome {
	var o Outcome
	for i, kinds := range t.ladders() {
		sizes := [][]int{l.Sizes, l.MixedSizes}[i]
		for _, size := range sizes {
			o.Graphs += t.cases * t.graphs(kinds, size)
		}
		for _, kind := range kinds {
			share := t.share(kind, sizes, &o.Cost)
			if kind == decode {
				o.Decode = share
			} else {
				o.Mixed = share
			}
		}
	}
	return o
}

// share returns what becomes of one kind of batch with these capture sizes, and adds what that costs.
func (t *task) share(kind int, sizes []int, cost *float64) (s Share) {
	for i, size := range t.sizes {
		passes := t.passes[kind][i]
		s.Passes += passes
		next, _ := slices.BinarySearch(sizes, size)
		if next == len(sizes) || !t.serves(kind, sizes[next]) {
			s.Eager += passes
			if price, ok := t.eagerPrice(kind, size); ok {
				*cost += price * float64(passes)
			}
			continue
		}
		s.Tokens += t.tokens[kind][i]
		s.Padding += passes*uint64(sizes[next]) - t.tokens[kind][i]
		*cost += t.graphPrice(kind, sizes[next]) * float64(passes)
	}
	return s
}

func (t *task) steps(l Ladder) (steps []Step) {
	for i, kinds := range t.ladders() {
		sizes := [][]int{l.Sizes, l.MixedSizes}[i]
		first := len(steps)
		for _, size := range sizes {
			steps = append(steps, Step{Size: size, Mixed: i > 0})
		}
		for _, kind := range kinds {
			for k, size := range t.sizes {
				next, _ := slices.BinarySearch(sizes, size)
				if next < len(sizes) && t.serves(kind, sizes[next]) {
					step := &steps[first+next]
					step.Passes += t.passes[kind][k]
					step.Padding += t.passes[kind][k]*uint64(step.Size) - t.tokens[kind][k]
				}
			}
		}
	}
	return steps
}

// plannable reports whether some graph could serve the batches of that kind and size.
func (t *task) plannable(kind, size int) bool { return size <= t.Max && t.serves(kind, size) }

func (t *task) confidence() Confidence {
	c := Confidence{Evidence: []Evidence{{AtLeast: 10}, {AtLeast: 100}, {AtLeast: 1000}}}
	for i, size := range t.sizes {
		passes := uint64(0)
		for kind := range kinds {
			if t.plannable(kind, size) {
				passes += t.passes[kind][i]
			}
		}
		if passes == 0 {
			continue
		}
		c.Passes += passes
		c.Sizes++
		if passes == 1 {
			c.SeenOnce++
		}
		for k := range c.Evidence {
			if passes >= c.Evidence[k].AtLeast {
				c.Evidence[k].Share += float64(passes)
			}
		}
	}
	for k := range c.Evidence {
		c.Evidence[k].Share /= float64(max(c.Passes, 1))
	}
	return c
}

// choose returns the best ladder, and adds the curve to the plan.
func (t *task) choose(plan *Plan) (Ladder, error) {
	if plan.Confidence.Passes == 0 {
		return Ladder{}, invalidf("none of the snapshot's passes, of %d to %d tokens, could use a graph of at most %d "+
			"tokens in mode %v", t.sizes[0], t.sizes[len(t.sizes)-1], t.Max, t.mode)
	}
	var lists []*list
	for _, kinds := range t.ladders() {
		lists = append(lists, t.newList(kinds))
	}
	most := math.MaxInt
	if t.MaxGraphs > 0 {
		most = t.MaxGraphs / t.cases
	}
	for _, l := range lists {
		l.choose(most, t.GraphPrice*float64(t.cases))
	}
	costs, first := lists[0].best.costs, []int(nil) // by graphs; how many of them are of the first list
	ideal := lists[0].ideal
	for _, l := range lists[1:] {
		costs, first = convolve(costs, l.best.costs)
		ideal += l.ideal
	}
	at := -1
	least := math.Inf(1)
	for v, cost := range costs {
		if total := cost + t.GraphPrice*float64(t.cases*v); total < least && v <= most {
			at, least = v, total
		}
	}
	if at < 0 {
		return Ladder{}, invalidf("MaxGraphs is %d, but Must %v, the largest size %d and %d cases of adapters "+
			"need at least %d graphs", t.MaxGraphs, t.Must, t.Max, t.cases, t.cases*t.needs(lists))
	}
	if most < len(costs)-onceMore {
		costs = costs[:most+onceMore+1]
	}
	plan.Curve = t.curve(costs, ideal)
	shares := []int{at}
	if first != nil {
		shares = []int{first[at], at - first[at]}
	}
	var ladder Ladder
	for i, l := range lists {
		if l.kinds[0] == decode {
			ladder.Sizes = l.ladder(shares[i])
		} else {
			ladder.MixedSizes = l.ladder(shares[i])
		}
	}
	return ladder, nil
}

func (t *task) needs(lists []*list) (sum int) {
	for _, l := range lists {
		sum += l.needs
	}
	return sum
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

// convolve returns the least costs of two lists together, by graphs, and how many are of the first.
func convolve(a, b []float64) (costs []float64, first []int) {
	costs, first = make([]float64, len(a)+len(b)-1), make([]int, len(a)+len(b)-1)
	for v := range costs {
		costs[v] = math.Inf(1)
		for i := max(0, v-len(b)+1); i <= min(v, len(a)-1); i++ {
			if c := a[i] + b[v-i]; c < costs[v] {
				costs[v], first[v] = c, i
			}
		}
	}
	return costs, first
}

// list is one list of capture sizes to choose.
type list struct {
	problem
	kinds []int
	sizes []int // the candidates, from index 1 of the problem
	needs int   // graphs at least
	ideal float64
	best  *solution
}

// newList returns the problem of choosing the sizes for some kinds of batches. Candidates are sizes that
// were seen, and those of Must: a size in between costs more and serves nothing more. But above the
// largest decode batch with a full graph sizes need one graph less, so the first of them is one too.
func (t *task) newList(kinds []int) *list {
	l := &list{kinds: kinds}
	musts := slices.DeleteFunc(slices.Clone(t.Must), func(size int) bool { return !t.serves(kinds[0], size) })
	l.sizes = slices.Clone(musts)
	for i, size := range t.sizes {
		for _, kind := range kinds {
			if t.passes[kind][i] > 0 && t.plannable(kind, size) {
				l.sizes = append(l.sizes, size)
			}
		}
	}
	for _, kind := range kinds {
		for _, u := range t.unseen(kind) {
			l.sizes = append(l.sizes, u.size)
		}
	}
	if above := t.roundUp(t.maxDecode + 1); above <= t.Max &&
		t.graphs(kinds, above) != t.graphs(kinds, t.multiple) && t.serves(kinds[0], above) {
		l.sizes = append(l.sizes, above)
	}
	slices.Sort(l.sizes)
	l.sizes = slices.Compact(l.sizes)
	n := len(l.sizes) + 1
	l.graphs, l.must, l.eager = make([]int, n), make([]bool, n), make([]float64, n)
	for kind := range l.price {
		l.price[kind], l.passes[kind] = make([]float64, n), make([]float64, n)
	}
	for i, size := range l.sizes {
		l.graphs[i+1] = t.graphs(kinds, size)
		l.must[i+1] = slices.Contains(musts, size)
		if l.must[i+1] {
			l.needs += l.graphs[i+1]
		}
		for _, kind := range kinds {
			l.price[kind][i+1] = t.graphPrice(kind, size)
		}
	}
	for _, kind := range kinds {
		t.add(l, kind)
	}
	if l.needs == 0 && len(l.sizes) > 0 && math.IsInf(l.eager[0], 1) {
		l.needs = 1
	}
	l.ideal = math.Inf(1)
	sum := 0.0
	for i := range n {
		for kind := range l.price {
			if i > 0 {
				sum += l.price[kind][i] * (l.passes[kind][i] - l.passes[kind][i-1])
			}
		}
		l.ideal = min(l.ideal, sum+l.eager[i])
	}
	return l
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
