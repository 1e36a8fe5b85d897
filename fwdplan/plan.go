package fwdplan

import "github.com/forwardctx/fwd"

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
	cfg.MaxGraphs, cfg.GraphPrice, cfg.Must, cfg.Max = 1, 0, nil, 0
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
		return Outcome{}, invalidf("a ladder with capture sizes %v for mixed batches alone without Separate",
			l.MixedSizes)
	}
	return t.evaluate(l), nil
}
