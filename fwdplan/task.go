package fwdplan

import (
	"fmt"
	"slices"

	"github.com/forwardctx/fwd"
)

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
		return invalidf("EagerPrice is %v with Measured, which takes the measured price of eager passes",
			t.EagerPrice)
	case t.Separate && t.mode != fwd.GraphFullAndPiecewise:
		return invalidf("Separate with graph mode %v, want %v", t.mode, fwd.GraphFullAndPiecewise)
	case t.multiple < 1 || t.multiple > maxTokens || t.multiple%q != 0:
		return invalidf("Multiple is %d, want a multiple of the query length %d, up to %d",
			t.Multiple, q, maxTokens)
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
