package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Config configures an engine. The zero value is one rank with the defaults.
type Config struct {
	DataParallelSize    int // ranks; 0: 1
	SequenceParallel    int // expert-parallel workers of a rank, among which its rows are split; 0: 1
	MaxChunk            int // rows that a worker sends to the experts in one exchange; 0: 32
	MaxNumBatchedTokens int // of a rank in a step; 0: 128
	MaxNumSeqs          int // requests of a rank in a step; 0: 16
	BlockSize           int // tokens in a block of the KV cache; 0: 16
	NumBlocks           int // blocks of a rank's KV cache; 0: 512, or what the longest request needs

	// GraphMode says which passes run by graphs; the zero value means none.
	GraphMode fwd.GraphMode

	// CaptureSizes are the sizes of graphs in tokens. nil means the usual ones up to 64, or up to the
	// largest decode batch if that is larger.
	CaptureSizes []int

	// Replan is after how many steps that ran by graphs the ranks choose the capture sizes anew, from
	// the sizes of all steps so far, again and again: at most as many graphs as the configuration has.
	// 0: never.
	Replan int

	// NumUBatches is the number of microbatches of a split pass; with 0 or 1, passes are not split. A
	// rank wants its pass split if it has at least so many tokens: DecodeUBatchThreshold if all
	// requests decode, else PrefillUBatchThreshold. 0 means 4 and 32, so that even small batches are
	// split.
	NumUBatches                                   int
	DecodeUBatchThreshold, PrefillUBatchThreshold int

	// NumSpeculativeTokens is the number of guesses of a draft model that a decoding request brings to
	// each step; 0 means that there is no draft model.
	NumSpeculativeTokens int

	// Overlap makes the ranks exchange the votes of the next step while a pass runs. It excludes
	// speculative decoding; a rank that is alone has nothing to exchange.
	Overlap bool

	Speed           float64       // how many times faster than they say requests arrive; 0: immediately
	ExchangeTimeout time.Duration // of a step's votes; 0: 30 s
	StopGrace       time.Duration // how long an interrupted run may take to end its step; 0: 2 s

	// Process places some ranks in this process and the others elsewhere; nil: all ranks are in this
	// process.
	Process *Process

	// Coordinators connects the ranks; nil: in this process. One for each rank, in rank order.
	Coordinators []fwd.Coordinator

	// DraftCoordinators connects the ranks' draft models, as Coordinators does the ranks.
	DraftCoordinators []fwd.Coordinator

	// Middleware returns what wraps the passes of a rank, warm-up and draft model included; nil:
	// nothing.
	Middleware func(rank int) []fwd.Middleware

	// Finished is given each result as it is finished, on the goroutine of its rank: the run goes on
	// when it returns, and ends with its error. nil: nothing is called.
	Finished func(Result) error

	TracerProvider trace.TracerProvider // nil: the global one
	MeterProvider  metric.MeterProvider // nil: the global one
	StepTrace      bool                 // one trace for a step across all ranks

	// Providers returns where a rank's spans and metrics go, if each rank is a service of its own; nil:
	// they go to TracerProvider and MeterProvider.
	Providers func(rank int) (trace.TracerProvider, metric.MeterProvider)

	// PeerName returns the service.name of a rank, for the spans that wait for it; nil: "rank N".
	PeerName func(rank int) string

	// Observe is told of each pass and each failed exchange, of all ranks and models, as
	// [fwd.WithObserver] says; nil: nobody is.
	Observe func(context.Context, *fwd.Record)

	// Started is called by Run once its ranks are there, before they warm up; nil: nothing is called.
	Started func(*Engine)

	// Logger gets what is worth a warning, such as gaps between graphs and failed exchanges; nil means
	// none.
	Logger *slog.Logger
}

// MaxRanks is the most ranks of an engine: each has a KV cache of its own in the same process.
const MaxRanks = 64

// MaxSequenceParallel is the most workers of a rank.
const MaxSequenceParallel = 16

// MaxSpeculativeTokens is the most guesses of a request in a step.
const MaxSpeculativeTokens = 31

// MaxUBatches is the most microbatches of a pass.
const MaxUBatches = 16

// maxCapture is the largest of the default capture sizes. It is below the default budget of a step,
// so that all the ways a batch can go are seen: full graphs for decode batches, piecewise ones for
// mixed batches, none for the largest prefills.
const maxCapture = 64

func (c Config) withDefaults() (Config, error) {
	var errs []error
	count := func(name string, v *int, zero int) {
		if *v < 0 {
			errs = append(errs,
				fmt.Errorf("engine: %s is %d, want at least 1, or 0 for the default of %d", name, *v, zero))
		}
		if *v == 0 {
			*v = zero
		}
	}
	count("DataParallelSize", &c.DataParallelSize, 1)
	count("SequenceParallel", &c.SequenceParallel, 1)
	count("MaxChunk", &c.MaxChunk, 32)
	count("MaxNumBatchedTokens", &c.MaxNumBatchedTokens, 128)
	count("MaxNumSeqs", &c.MaxNumSeqs, 16)
	count("BlockSize", &c.BlockSize, 16)
	count("NumUBatches", &c.NumUBatches, 1)
	count("DecodeUBatchThreshold", &c.DecodeUBatchThreshold, 4)
	count("PrefillUBatchThreshold", &c.PrefillUBatchThreshold, 32)
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("engine: "+format, args...)) }
	most := func(name string, v, most int) {
		if v > most {
			bad("%s is %d, want at most %d", name, v, most)
		}
	}
	most("NumUBatches", c.NumUBatches, MaxUBatches)
	most("DataParallelSize", c.DataParallelSize, MaxRanks)
	most("SequenceParallel", c.SequenceParallel, MaxSequenceParallel)
	if c.NumSpeculativeTokens < 0 || c.NumSpeculativeTokens > MaxSpeculativeTokens {
		bad("NumSpeculativeTokens is %d, want 0 to %d", c.NumSpeculativeTokens, MaxSpeculativeTokens)
	}
	if c.Replan < 0 || c.Replan > 0 && c.GraphMode == fwd.GraphNone {
		bad("Replan is %d with graph mode %v, want at least 0, and 0 without graphs", c.Replan, c.GraphMode)
	}
	if c.Overlap && c.NumSpeculativeTokens > 0 {
		bad("Overlap with NumSpeculativeTokens %d: a step can't be scheduled before it is known how many guesses "+
			"of the last one are right", c.NumSpeculativeTokens)
	}
	if c.NumBlocks < 0 {
		bad("NumBlocks is %d, want at least 0", c.NumBlocks)
	}
	if c.Speed < 0 || math.IsNaN(c.Speed) || math.IsInf(c.Speed, 0) {
		bad("Speed is %v, want a finite number of at least 0", c.Speed)
	}
	group := func(what string, group []fwd.Coordinator) {
		if group != nil && len(group) != c.DataParallelSize {
			bad("%d %s for %d ranks", len(group), what, c.DataParallelSize)
		}
	}
	group("coordinators", c.Coordinators)
	group("draft coordinators", c.DraftCoordinators)
	if p := c.Process; p != nil {
		errs = append(errs, p.check(&c))
		own := *p
		c.Process = &own
		c.Coordinators, c.DraftCoordinators = p.Target, p.Draft
	}
	c.CaptureSizes = slices.Clone(c.CaptureSizes)
	c.ExchangeTimeout = cmp.Or(c.ExchangeTimeout, 30*time.Second)
	c.StopGrace = cmp.Or(c.StopGrace, 2*time.Second)
	return c, errors.Join(errs...)
}

// providers returns where the spans and metrics of a rank go.
func (c *Config) providers(rank int) (trace.TracerProvider, metric.MeterProvider) {
	tracers, meters := c.TracerProvider, c.MeterProvider
	if c.Providers != nil {
		tracers, meters = c.Providers(rank)
	}
	if tracers == nil {
		tracers = otel.GetTracerProvider()
	}
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	return tracers, meters
}

// here returns the ranks that are in this process.
func (c *Config) here() []int {
	if c.Process != nil {
		return c.Process.Ranks
	}
	all := make([]int, c.DataParallelSize)
	for rank := range all {
		all[rank] = rank
	}
	return all
}

// longestSleep bounds how long the ranks sleep: an answer to an interrupt may come so late, and a
// rank that was restarted waits so long for the others to wake up. It is less than an exchange may
// take.
func (c *Config) longestSleep() time.Duration { return min(time.Second, c.ExchangeTimeout/2) }
