// This file tests what the package does with bad input: the error or panic and its words, and that nothing
// is left half done. Odd input that is fine is here too.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// badMany is one more than any count may be. If an int has 32 bits, it wraps to a negative number, which is
// as bad.
var badMany = func() int {
	n := math.MaxInt32
	n++
	return n
}()

// badTokens returns a vector as a caller may fill it.
func badTokens(counts ...float64) *mat.VecDense { return mat.NewVecDense(len(counts), counts) }

// badUBatches returns slices with these requests and tokens: start and stop of each in turn.
func badUBatches(bounds ...[4]int) (u []fwd.UBatchSlice) {
	for _, b := range bounds {
		u = append(u, planSlices(b)...)
	}
	return u
}

// badRefused returns err, unless the call has returned more than its error.
func badRefused(err error, results ...any) error {
	for _, r := range results {
		if v := reflect.ValueOf(r); err != nil && v.IsValid() && !v.IsZero() {
			return fmt.Errorf("the call returned %v beside its error %v", r, err)
		}
	}
	return err
}

func badCapture(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return nothing, nil }

// badCoordinator is rank 0 of 2, and returns what change makes of the right votes.
type badCoordinator struct{ change func([]fwd.Vote) []fwd.Vote }

func (badCoordinator) Rank() int { return 0 }
func (badCoordinator) Size() int { return 2 }
func (c badCoordinator) Exchange(_ context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return c.change([]fwd.Vote{v, v}), nil
}

// badFixture is what the cases use, and must not spoil.
type badFixture struct {
	dispatcher *fwd.Dispatcher // sizes 1, 2, 4, 8; FULL_AND_PIECEWISE
	alone      *fwd.Runner
	pair       [2]*fwd.Runner // both ranks of a group
	step       uint64         // of the group
	group      []fwd.Coordinator
	groupStep  uint64
	dp         *fwd.DPMetadata // rank 0 of 2 with 6 and 8 tokens
	cache      *fwd.GraphCache // FULL
	closed     *fwd.GraphCache // FULL, no captures any more
	noGraph    *fwd.GraphCache // FULL, whose capture returns no replay function
	ctx        context.Context // in a pass of 8 tokens with metadata for layer "attn"
	dpCtx      context.Context // in a pass with dp
	split      context.Context // in a pass of two microbatches
}

func newBadFixture(t *testing.T) *badFixture {
	t.Helper()
	x := &badFixture{}
	var errs []error
	note := func(err error) { errs = append(errs, err) }
	var err error
	x.dispatcher, err = fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4, 8}, MaxNumSeqs: 8,
	})
	note(err)
	x.alone, err = fwd.New(fwd.Config{}, fwd.WithDispatcher(x.dispatcher))
	note(err)
	coordinators, err := fwd.NewLocalGroup(2)
	note(err)
	for rank := range x.pair {
		parallel := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank, NumUBatches: 2}
		x.pair[rank], err = fwd.New(fwd.Config{Parallel: parallel},
			fwd.WithDispatcher(x.dispatcher), fwd.WithCoordinator(coordinators[rank]))
		note(err)
	}
	x.group, err = fwd.NewLocalGroup(2)
	note(err)
	x.dp, err = fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: 2}, 6, badTokens(6, 8))
	note(err)
	x.cache, err = fwd.NewGraphCache(fwd.GraphFull, nothing, badCapture)
	note(err)
	x.closed, err = fwd.NewGraphCache(fwd.GraphFull, nothing, badCapture)
	note(err)
	x.closed.CloseCapture()
	x.noGraph, err = fwd.NewGraphCache(fwd.GraphFull, nothing,
		func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return nil, nil })
	note(err)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	metadata := []map[string]any{{"attn": "metadata"}}
	x.ctx = fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 8, Layers: map[string]any{"mlp": "layer"}, AttnMetadata: metadata, SlotMapping: metadata,
		GraphMode: fwd.GraphFull,
	})
	x.dpCtx = fwd.NewContext(t.Context(), &fwd.ForwardContext{NumTokens: 6, DP: x.dp})
	x.split = fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 8, UBatches: badHalves,
		AttnMetadata: slices.Repeat(metadata, 2), SlotMapping: slices.Repeat(metadata, 2),
	})
	return x
}

// check checks that everything in the fixture still works: the groups are in step, and no pass or key was
// left behind.
func (x *badFixture) check(t *testing.T) {
	t.Helper()
	mode, batch, reason := x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: 3})
	if mode != fwd.GraphPiecewise || batch.NumTokens != 4 || reason != fwd.ReasonRelaxed {
		t.Errorf("afterwards the dispatcher says %v, %+v, %v", mode, batch, reason)
	}
	ran := false
	forward := func(context.Context) error { ran = true; return nil }
	if err := x.alone.Run(t.Context(), fwd.Pass{NumTokens: 1}, forward); err != nil || !ran {
		t.Errorf("afterwards a Runner runs a pass: %t, %v", ran, err)
	}
	x.checkGroups(t)
	if x.dp.Size() != 2 || x.dp.NumTokens(0) != 6 || x.dp.NumTokens(1) != 8 {
		t.Error("afterwards the DP metadata has other counts")
	}
	if got, err := fwd.AttnMetadata[string](x.ctx, "attn"); got != "metadata" || err != nil {
		t.Errorf("afterwards a layer finds %q, %v", got, err)
	}
	if x.closed.Len() != 0 || x.noGraph.Len() != 0 {
		t.Errorf("afterwards the caches have %d and %d graphs, want none", x.closed.Len(), x.noGraph.Len())
	}
}

// checkGroups checks that both groups take their next step, and that no pass is left running.
func (x *badFixture) checkGroups(t *testing.T) {
	t.Helper()
	for _, r := range append(x.pair[:], x.alone) {
		if s := r.Status(); s.Exchanging || s.Active != 0 {
			t.Errorf("afterwards the status of %v is %+v", r, s)
		}
	}
	x.step++
	x.groupStep++
	var wg sync.WaitGroup
	for rank := range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		wg.Go(func() {
			pass, err := x.pair[rank].Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{3, 2}})
			if err != nil {
				t.Errorf("afterwards rank %d plans: %v", rank, err)
			} else if pass.Agreement.Step != x.step || pass.NumTokens != 8 {
				t.Errorf("afterwards rank %d plans %d tokens in step %d, want 8 in step %d",
					rank, pass.NumTokens, pass.Agreement.Step, x.step)
			}
			vote := fwd.Vote{Step: x.groupStep, NumTokens: rank, NumTokensPadded: rank}
			votes, err := x.group[rank].Exchange(ctx, vote)
			if err != nil || len(votes) != 2 || votes[0].Step != x.groupStep || votes[1].NumTokens != 1 {
				t.Errorf("afterwards rank %d exchanges: %+v, %v; want step %d", rank, votes, err, x.groupStep)
			}
		})
	}
	wg.Wait()
}

// badCase is a call that must be refused: with an error that is want and names what is in conflict, or with a
// panic.
type badCase struct {
	name   string
	want   error // of the panic too, if its value is an error; nil: it panics with text
	panics bool
	call   func(x *badFixture) error
	text   []string
}

// badWant is a call that returns want, badInvalid one that returns ErrInvalid, badPanicWith one that panics
// with want, and badPanic one that panics with text.
func badWant(name string, want error, call func(*badFixture) error, text ...string) badCase {
	return badCase{name, want, false, call, text}
}

func badInvalid(name string, call func(*badFixture) error, text ...string) badCase {
	return badCase{name, fwd.ErrInvalid, false, call, text}
}

func badPanicWith(name string, want error, call func(*badFixture) error, text ...string) badCase {
	return badCase{name, want, true, call, text}
}

func badPanic(name string, call func(*badFixture) error, text ...string) badCase {
	return badCase{name, nil, true, call, text}
}

// badCoordinated runs a pass on rank 0 of 2, over a coordinator that answers what change makes of the votes.
func badCoordinated(change func([]fwd.Vote) []fwd.Vote) func(*badFixture) error {
	return func(*badFixture) error {
		r, err := fwd.New(fwd.Config{}, fwd.WithCoordinator(badCoordinator{change}))
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{5}})
		return badRefused(err, pass)
	}
}

// badRun runs a pass of rank 0 of the pair or, if it is not data parallel, of the Runner alone. Run, Start
// and Report must refuse it alike.
func badRun(p fwd.Pass) func(*badFixture) error {
	return func(x *badFixture) error {
		r := x.alone
		if p.NumTokensAcrossDP != nil || p.Agreement != nil {
			r = x.pair[0]
		}
		ran := false
		err := r.Run(context.Background(), p, func(context.Context) error { ran = true; return nil })
		if ran {
			return fmt.Errorf("the pass ran: %v", err)
		}
		given := context.Background()
		ctx, end, startErr := r.Start(given, p)
		if end(nil); ctx != given {
			return fmt.Errorf("Start returns another context beside its error %v", startErr)
		}
		reportErr := r.Report(given, p, time.Time{}, time.Time{}, errGone)
		if fmt.Sprint(err) != fmt.Sprint(startErr) || fmt.Sprint(err) != fmt.Sprint(reportErr) {
			return fmt.Errorf("Run says %v, Start %v, Report %v", err, startErr, reportErr)
		}
		return err
	}
}

func badNew(c fwd.ParallelConfig, opts ...fwd.Option) func(*badFixture) error {
	return func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: c}, opts...)
		return badRefused(err, r)
	}
}

func badPlan(s fwd.Schedule) func(*badFixture) error {
	return func(x *badFixture) error {
		pass, err := x.alone.Plan(context.Background(), s)
		_, pairErr := x.pair[0].Plan(context.Background(), s) // refused before its peer has to come
		if fmt.Sprint(err) != fmt.Sprint(pairErr) {
			return fmt.Errorf("a Runner alone says %v, one of two ranks %v", err, pairErr)
		}
		return badRefused(err, pass)
	}
}

func badDP(c fwd.ParallelConfig, numTokens int, across *mat.VecDense) func(*badFixture) error {
	return func(*badFixture) error {
		m, err := fwd.NewDPMetadata(c, numTokens, across)
		return badRefused(err, m)
	}
}

func badArithmetic(call func(m *fwd.DPMetadata)) func(*badFixture) error {
	return func(x *badFixture) error { call(x.dp); return nil }
}

func badAgree(numUBatches int, votes ...fwd.Vote) func(*badFixture) error {
	return func(*badFixture) error {
		a, err := fwd.Agree(votes, numUBatches)
		return badRefused(err, a.NumTokensAcrossDP, a.Step)
	}
}

func badExchange(v fwd.Vote) func(*badFixture) error {
	return func(x *badFixture) error {
		v.Step = x.groupStep + 1
		votes, err := x.group[0].Exchange(context.Background(), v)
		return badRefused(err, votes)
	}
}

func badGroup(size int) func(*badFixture) error {
	return func(*badFixture) error {
		g, err := fwd.NewLocalGroup(size)
		return badRefused(err, g)
	}
}

func badSplit(scheduled []int, padded, reqs, n, split int) func(*badFixture) error {
	return func(*badFixture) error {
		s, p, err := fwd.SplitUBatches(scheduled, padded, reqs, n, split)
		return badRefused(err, s, p)
	}
}

// badUBatch is a microbatch that must not run.
func badUBatch(context.Context, int) error { return errors.New("a microbatch ran") }

func badUBatchRun(fc fwd.ForwardContext) func(*badFixture) error {
	return func(*badFixture) error {
		return fwd.RunUBatches(fwd.NewContext(context.Background(), &fc), badUBatch)
	}
}

func badDispatcher(cfg fwd.DispatcherConfig) func(*badFixture) error {
	return func(*badFixture) error {
		d, err := fwd.NewDispatcher(cfg)
		return badRefused(err, d)
	}
}

// badGraphs is a good configuration but for one thing.
func badGraphs(change func(*fwd.DispatcherConfig)) func(*badFixture) error {
	cfg := fwd.DispatcherConfig{Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{2, 4}, MaxNumSeqs: 8}
	change(&cfg)
	return badDispatcher(cfg)
}

func badRound(multiple int, sizes ...int) func(*badFixture) error {
	return func(*badFixture) error {
		rounded, err := fwd.RoundCaptureSizes(sizes, multiple)
		return badRefused(err, rounded)
	}
}

func badCache(mode fwd.GraphMode, forward fwd.ForwardFunc, capture captureFunc) func(*badFixture) error {
	return func(*badFixture) error {
		c, err := fwd.NewGraphCache(mode, forward, capture)
		return badRefused(err, c)
	}
}

// badFull is the context of a pass that a full graph could run.
func badFull(batch fwd.BatchDescriptor) context.Context {
	fc := &fwd.ForwardContext{NumTokens: 8, GraphMode: fwd.GraphFull, Batch: batch}
	return fwd.NewContext(context.Background(), fc)
}

// badCtx is a call that derives a context.
func badCtx(call func(x *badFixture) (context.Context, error)) func(*badFixture) error {
	return func(x *badFixture) error {
		ctx, err := call(x)
		return badRefused(err, ctx)
	}
}

func badChunks(ctx func(*badFixture) context.Context, sp, maxChunk int) func(*badFixture) error {
	return func(x *badFixture) error {
		rounds, err := fwd.Chunks(ctx(x), sp, maxChunk)
		return badRefused(err, rounds)
	}
}

func inPass(x *badFixture) context.Context      { return x.ctx }
func inDPPass(x *badFixture) context.Context    { return x.dpCtx }
func inSplitPass(x *badFixture) context.Context { return x.split }
func outside(*badFixture) context.Context       { return context.Background() }

func badHidden(x *badFixture) context.Context { return fwd.NewContext(x.ctx, nil) }

// badMiss is a lookup as T that finds nothing.
func badMiss[T any](
	lookup func(context.Context, string) (T, error), ctx func(*badFixture) context.Context, layer string,
) func(*badFixture) error {
	return func(x *badFixture) error {
		got, err := lookup(ctx(x), layer)
		return badRefused(err, got)
	}
}

// badOverranks is a number of ranks that no group can have.
const badOverranks = 1<<20 + 1

// What several cases use.
var (
	badNaN, badInf = math.NaN(), math.Inf(1)
	twoRanks       = fwd.ParallelConfig{DataParallelSize: 2}
	unknownMode    = fwd.GraphMode(9)
	goodVote       = fwd.Vote{Step: 1, NumTokens: 4, NumTokensPadded: 8}
	negativeVote   = fwd.Vote{Step: 1, NumTokens: -3, NumTokensPadded: 8}
	shrinkingVote  = fwd.Vote{Step: 1, NumTokens: 8, NumTokensPadded: 4}
	compositeVote  = fwd.Vote{Step: 1, NumTokens: 4, NumTokensPadded: 8, GraphMode: fwd.GraphFullAndPiecewise}
	tooMany        = fmt.Sprint(badMany)
	badHalves      = badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8})
	badAdapters    = fwd.BatchDescriptor{NumTokens: 8, HasLoRA: true}
	badPlain       = fwd.BatchDescriptor{NumTokens: 8}
)

func badMaps(n int) []map[string]any { return make([]map[string]any, n) }

// New, its options, middleware.
var badNewCases = []badCase{
	badInvalid("New/size/negative", badNew(fwd.ParallelConfig{DataParallelSize: -1}), "DataParallelSize", "-1"),
	badInvalid("New/size/huge", badNew(fwd.ParallelConfig{DataParallelSize: badOverranks}),
		"DataParallelSize", "1048577", "1048576"),
	badInvalid("New/size/max int", badNew(fwd.ParallelConfig{DataParallelSize: math.MaxInt}),
		"DataParallelSize", fmt.Sprint(math.MaxInt)),
	badInvalid("New/rank/negative", badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: -1}),
		"DataParallelRank", "-1", "2"),
	badInvalid("New/rank/size", badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 2}),
		"DataParallelRank is 2", "0 to 1"),
	badInvalid("New/rank/no size", badNew(fwd.ParallelConfig{DataParallelRank: 1}),
		"DataParallelRank is 1", "DataParallelSize 1"),
	badInvalid("New/microbatches/negative", badNew(fwd.ParallelConfig{NumUBatches: -2}), "NumUBatches", "-2"),
	badInvalid("New/microbatches/huge",
		badNew(fwd.ParallelConfig{NumUBatches: badMany}), "NumUBatches", tooMany),
	badInvalid("New/decode threshold/negative", badNew(fwd.ParallelConfig{DecodeUBatchThreshold: -32}),
		"DecodeUBatchThreshold", "-32"),
	badInvalid("New/prefill threshold/negative", badNew(fwd.ParallelConfig{PrefillUBatchThreshold: -512}),
		"PrefillUBatchThreshold", "-512"),
	badInvalid("New/prefill threshold/huge", badNew(fwd.ParallelConfig{PrefillUBatchThreshold: badMany}),
		"PrefillUBatchThreshold", tooMany),
	badInvalid("New/option/nil", badNew(fwd.ParallelConfig{}, fwd.WithStepTrace(), nil), "option 1 of 2"),
	badInvalid("New/coordinator/rank",
		badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, fwd.WithCoordinator(badCoordinator{})),
		"rank 0 of 2", "rank 1 of 2"),
	badInvalid("New/coordinator/size",
		badNew(fwd.ParallelConfig{DataParallelSize: 3}, fwd.WithCoordinator(badCoordinator{})),
		"rank 0 of 2", "rank 0 of 3"),
	badInvalid("New/coordinator/size of one",
		badNew(fwd.ParallelConfig{DataParallelSize: 1}, fwd.WithCoordinator(badCoordinator{})),
		"rank 0 of 2", "rank 0 of 1"),
	badInvalid("New/several",
		badNew(fwd.ParallelConfig{DataParallelSize: -3, NumUBatches: -4, DecodeUBatchThreshold: -5}, nil),
		"-3", "-4", "-5", "option 0 of 1"),
	badPanic("WithMiddleware/nil", func(*badFixture) error {
		fwd.WithMiddleware(fwd.ProfileLabels(), nil)
		return nil
	},
		"middleware 1 of 2", "nil"),
	badPanic("Chain/nil", func(*badFixture) error { fwd.Chain(nil); return nil }, "middleware 0 of 1", "nil"),
	badInvalid("New/token multiple/negative",
		badNew(fwd.ParallelConfig{TokenMultiple: -4}), "TokenMultiple is -4"),
	badInvalid("New/token multiple/huge",
		badNew(fwd.ParallelConfig{TokenMultiple: badMany}), "TokenMultiple is "+tooMany),
	badInvalid("New/token multiple/capture sizes", func(x *badFixture) error {
		return badNew(fwd.ParallelConfig{TokenMultiple: 4}, fwd.WithDispatcher(x.dispatcher))(x)
	}, "[1 2]", "TokenMultiple 4", "RoundCaptureSizes"),
	badInvalid("New/rank/no size, dense", badNew(fwd.ParallelConfig{DataParallelRank: -1, Dense: true}), "-1"),
	badInvalid("New/rank/huge, dense",
		badNew(fwd.ParallelConfig{DataParallelRank: badOverranks, Dense: true}), "1048577"),
	badInvalid("New/queue/other clock", func(x *badFixture) error {
		q := new(fwd.Queue)
		if _, err := fwd.New(fwd.Config{}, fwd.WithQueue(q)); err != nil {
			return fmt.Errorf("New: %v", err)
		}
		return badNew(fwd.ParallelConfig{}, fwd.WithQueue(q), fwd.WithClock(time.Now))(x)
	}, "Queue", "WithClock"),
	badInvalid("New/queue/no clock", func(x *badFixture) error {
		q := new(fwd.Queue)
		if _, err := fwd.New(fwd.Config{}, fwd.WithQueue(q), fwd.WithClock(time.Now)); err != nil {
			return fmt.Errorf("New: %v", err)
		}
		return badNew(fwd.ParallelConfig{}, fwd.WithQueue(q))(x)
	}, "Queue", "WithClock"),
	badInvalid("WithGraphs/capture sizes", func(x *badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{TokenMultiple: 8}})
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		next, err := r.WithGraphs(x.dispatcher)
		return badRefused(err, next)
	}, "[1 2 4]", "TokenMultiple 8"),
}

// Contexts and what is in them.
var badContextCases = []badCase{
	badPanic("NewContext/parent/nil", func(*badFixture) error {
		var parent context.Context
		fwd.NewContext(parent, nil)
		return nil
	}, "NewContext", "nil"),
	badPanic("NewContext/mode/composite", func(*badFixture) error {
		fwd.NewContext(context.Background(), &fwd.ForwardContext{GraphMode: fwd.GraphFullDecodeOnly})
		return nil
	}, "FULL_DECODE_ONLY"),
	badPanic("NewContext/mode/unknown", func(*badFixture) error {
		fwd.NewContext(context.Background(), &fwd.ForwardContext{GraphMode: unknownMode})
		return nil
	}, "GraphMode(9)"),
	badPanicWith("MustFromContext/outside", fwd.ErrNoForwardContext, func(*badFixture) error {
		fwd.MustFromContext(context.Background())
		return nil
	}),
	badPanicWith("MustFromContext/hidden", fwd.ErrNoForwardContext, func(x *badFixture) error {
		fwd.MustFromContext(badHidden(x))
		return nil
	}),
	badWant("AttnMetadata/outside", fwd.ErrNoForwardContext, badMiss(fwd.AttnMetadata[string], outside, "attn"),
		"attention metadata", `"attn"`),
	badWant("AttnMetadata/hidden", fwd.ErrNoForwardContext, badMiss(fwd.AttnMetadata[string], badHidden, "attn"),
		`"attn"`),
	badWant("AttnMetadata/none", fwd.ErrNoMetadata, badMiss(fwd.AttnMetadata[string], inDPPass, "attn"),
		"attention metadata", `"attn"`),
	badWant("AttnMetadata/unknown layer", fwd.ErrLayer, badMiss(fwd.AttnMetadata[string], inPass, "mamba"),
		`"mamba"`, `have "attn"`),
	badWant("AttnMetadata/no name", fwd.ErrLayer, badMiss(fwd.AttnMetadata[string], inPass, ""),
		`""`, `have "attn"`),
	badWant("AttnMetadata/type", fwd.ErrLayer, badMiss(fwd.AttnMetadata[[]int], inPass, "attn"),
		`"attn"`, "string", "[]int"),
	badWant("AttnMetadata/interface", fwd.ErrLayer, badMiss(fwd.AttnMetadata[fmt.Stringer], inPass, "attn"),
		`"attn"`, "string", "fmt.Stringer"),
	badInvalid("AttnMetadata/split pass", badMiss(fwd.AttnMetadata[string], inSplitPass, "attn"),
		`"attn"`, "microbatch"),
	badWant("SlotMapping/outside", fwd.ErrNoForwardContext, badMiss(fwd.SlotMapping[string], outside, "attn"),
		"slot mapping", `"attn"`),
	badWant("SlotMapping/none", fwd.ErrNoMetadata, badMiss(fwd.SlotMapping[string], inDPPass, "attn"),
		"slot mapping", `"attn"`),
	badWant("SlotMapping/unknown layer", fwd.ErrLayer, badMiss(fwd.SlotMapping[string], inPass, "mamba"),
		`"mamba"`, `have "attn"`),
	badWant("SlotMapping/type", fwd.ErrLayer, badMiss(fwd.SlotMapping[int], inPass, "attn"), "string", "int"),
	badInvalid("SlotMapping/split pass", badMiss(fwd.SlotMapping[string], inSplitPass, "attn"),
		"slot mapping", "microbatch"),
	badWant("Layer/outside", fwd.ErrNoForwardContext, badMiss(fwd.Layer[string], outside, "mlp"), `"mlp"`),
	badWant("Layer/none", fwd.ErrLayer, badMiss(fwd.Layer[string], inDPPass, "mlp"), `"mlp"`, "have none"),
	badWant("Layer/unknown", fwd.ErrLayer, badMiss(fwd.Layer[string], inPass, "attn"), `"attn"`, `have "mlp"`),
	badWant("Layer/type", fwd.ErrLayer, badMiss(fwd.Layer[*fwd.Runner], inPass, "mlp"), "string", "*fwd.Runner"),
	badPanicWith("MustAttnMetadata/outside", fwd.ErrNoForwardContext, func(*badFixture) error {
		fwd.MustAttnMetadata[string](context.Background(), "attn")
		return nil
	}, `"attn"`),
	badPanicWith("MustAttnMetadata/type", fwd.ErrLayer, func(x *badFixture) error {
		fwd.MustAttnMetadata[int](x.ctx, "attn")
		return nil
	}, `"attn"`, "string", "int"),
	badWant("WithMetadata/outside", fwd.ErrNoForwardContext, badCtx(func(*badFixture) (context.Context, error) {
		return fwd.WithMetadata(context.Background(), fwd.AllLayers(1), nil)
	})),
	badWant("WithMetadata/hidden", fwd.ErrNoForwardContext, badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithMetadata(badHidden(x), fwd.AllLayers(1), nil)
	})),
	badInvalid("WithMetadata/split pass", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithMetadata(x.split, fwd.AllLayers(1), nil)
	}), "2 microbatches"),
}

// A pass, to Run and Start.
var badPassCases = []badCase{
	badInvalid("Run/forward/nil", func(x *badFixture) error {
		return x.alone.Run(context.Background(), fwd.Pass{NumTokens: 5}, nil)
	}, "forward function", "5"),
	badInvalid("Run/nil Runner, forward/nil", func(*badFixture) error {
		return (*fwd.Runner)(nil).Run(context.Background(), fwd.Pass{}, nil)
	}, "forward function"),
	badInvalid("Run/nil Runner, mode", func(*badFixture) error {
		return (*fwd.Runner)(nil).Run(context.Background(), fwd.Pass{GraphMode: unknownMode}, nothing)
	}, "GraphMode(9)"),
	badInvalid("Run/tokens/negative", badRun(fwd.Pass{NumTokens: -7}), "NumTokens", "-7"),
	badInvalid("Run/tokens/huge", badRun(fwd.Pass{NumTokens: badMany}), "NumTokens", tooMany),
	badInvalid("Run/unpadded/negative", badRun(fwd.Pass{NumTokens: 5, NumTokensUnpadded: -6}), "-6", "5"),
	badInvalid("Run/unpadded/above padded", badRun(fwd.Pass{NumTokens: 5, NumTokensUnpadded: 6}),
		"6 unpadded", "5 in the pass"),
	badInvalid("Run/graph/below unpadded",
		badRun(fwd.Pass{NumTokens: 9, NumTokensUnpadded: 8, NumTokensGraph: 7}),
		"8", "7", "9"),
	badInvalid("Run/graph/above padded",
		badRun(fwd.Pass{NumTokens: 9, NumTokensUnpadded: 8, NumTokensGraph: 10}),
		"8", "10", "9"),
	badInvalid("Run/graph/negative", badRun(fwd.Pass{NumTokens: 9, NumTokensGraph: -1}), "-1", "9"),
	badInvalid("Run/requests/negative", badRun(fwd.Pass{NumReqs: -2}), "NumReqs", "-2"),
	badInvalid("Run/engine/negative", badRun(fwd.Pass{VirtualEngine: -1}), "VirtualEngine", "-1"),
	badInvalid("Run/mode/composite", badRun(fwd.Pass{GraphMode: fwd.GraphFullAndPiecewise}),
		"FULL_AND_PIECEWISE"),
	badInvalid("Run/mode/unknown", badRun(fwd.Pass{GraphMode: unknownMode}), "GraphMode(9)"),
	badInvalid("Run/reason/unknown", badRun(fwd.Pass{Reason: 99}), "Reason(99)"),
	badInvalid("Run/batch/tokens", badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumTokens: -1}}),
		"NumTokens", "-1"),
	badInvalid("Run/batch/requests", badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumReqs: badMany}}),
		"NumReqs", tooMany),
	badInvalid("Run/batch/adapters", badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumActiveLoRAs: -4}}),
		"NumActiveLoRAs", "-4"),
	badInvalid("Run/several",
		badRun(fwd.Pass{NumTokens: -7, NumReqs: -8, VirtualEngine: -9, GraphMode: unknownMode}),
		"-7", "-8", "-9", "GraphMode(9)"),
	badInvalid("Run/batch/HasLoRA without adapters", badRun(fwd.Pass{Batch: badAdapters}), "HasLoRA true", "0"),
	badInvalid("Run/batch/adapters without HasLoRA",
		badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumActiveLoRAs: 3}}), "HasLoRA false", "3"),
	badInvalid("Call/forward/nil", func(x *badFixture) error {
		got, err := fwd.Call[int](context.Background(), x.alone, fwd.Pass{NumTokens: 5}, nil)
		return badRefused(err, got)
	}, "forward function", "5"),
	badInvalid("Report/nil Runner, mode", func(*badFixture) error {
		pass := fwd.Pass{GraphMode: unknownMode}
		return (*fwd.Runner)(nil).Report(context.Background(), pass, time.Time{}, time.Time{}, nil)
	}, "GraphMode(9)"),
}

// Slices and metadata of a pass.
var badSliceCases = []badCase{
	badInvalid("Run/slices/gap",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 3}, [4]int{1, 2, 4, 8})}),
		"microbatch 1", "token 4", "3"),
	badInvalid("Run/slices/overlap",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 5}, [4]int{1, 2, 4, 8})}),
		"microbatch 1", "token 4", "5"),
	badInvalid("Run/slices/late start",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 1, 4}, [4]int{1, 2, 4, 8})}),
		"microbatch 0", "token 1"),
	badInvalid("Run/slices/short", badRun(fwd.Pass{NumTokens: 9, UBatches: badHalves}), "token 8", "9"),
	badInvalid("Run/slices/long", badRun(fwd.Pass{NumTokens: 7, UBatches: badHalves}), "token 8", "7"),
	badInvalid("Run/slices/no tokens",
		badRun(fwd.Pass{NumTokens: 4, UBatches: badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 4})}),
		"microbatch 1", "tokens [4, 4)"),
	badInvalid("Run/slices/no requests",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 1, 4, 8})}),
		"microbatch 1", "requests [1, 1)"),
	badInvalid("Run/slices/zero", badRun(fwd.Pass{UBatches: make([]fwd.UBatchSlice, 1)}),
		"microbatch 0", "[0, 0)"),
	badInvalid("Run/slices/backwards",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 4, 0}, [4]int{1, 2, 4, 8})}),
		"microbatch 0", "tokens [4, 0)"),
	badInvalid("Run/slices/swapped",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{1, 2, 4, 8}, [4]int{0, 1, 0, 4})}),
		"microbatch 0", "token 4"),
	badInvalid("Run/slices/requests go back",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{1, 3, 0, 4}, [4]int{0, 2, 4, 8})}),
		"microbatch 1", "[0, 2)", "[1, 3)"),
	badInvalid("Run/slices/requests end earlier",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 3, 0, 4}, [4]int{1, 2, 4, 8})}),
		"microbatch 1", "[1, 2)", "[0, 3)"),
	badInvalid("Run/slices/negative request",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{-1, 1, 0, 8})}),
		"microbatch 0", "[-1, 1)"),
	badInvalid("Run/slices/extremes",
		badRun(fwd.Pass{
			NumTokens: 8, UBatches: badUBatches([4]int{math.MinInt, math.MaxInt, math.MinInt, math.MaxInt}),
		}),
		"microbatch 0", fmt.Sprint(math.MinInt), fmt.Sprint(math.MaxInt)),
	badInvalid("Run/metadata/two maps, no slices", badRun(fwd.Pass{AttnMetadata: badMaps(2)}),
		"AttnMetadata has 2", "0 microbatches"),
	badInvalid("Run/metadata/one map, two slices",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badHalves, AttnMetadata: badMaps(1)}),
		"AttnMetadata has 1", "2 microbatches"),
	badInvalid("Run/metadata/three maps, two slices",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badHalves, AttnMetadata: badMaps(3)}),
		"AttnMetadata has 3", "2 microbatches"),
	badInvalid("Run/slots/two maps, no slices", badRun(fwd.Pass{SlotMapping: badMaps(2)}),
		"SlotMapping has 2", "0 microbatches"),
	badInvalid("Run/slots/one map, two slices",
		badRun(fwd.Pass{NumTokens: 8, UBatches: badHalves, SlotMapping: badMaps(1)}),
		"SlotMapping has 1", "2 microbatches"),
}

// A data-parallel pass.
var badDPPassCases = []badCase{
	badInvalid("Run/dp/no tokens", badRun(fwd.Pass{NumTokensAcrossDP: badTokens(0, 8)}),
		"rank 0 of 2", "plan a dummy pass"),
	badWant("Run/dp/mismatch", fwd.ErrTokenMismatch,
		badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(8, 8)}),
		"rank 0", "6 tokens", "8"),
	badInvalid("Run/dp/length", badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(6, 8, 8)}), "3", "2"),
	badInvalid("Run/dp/empty", badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: &mat.VecDense{}}),
		"no token counts", "2"),
	badInvalid("Run/dp/fraction", badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(6, 8.5)}),
		"rank 1", "8.5"),
	badInvalid("Run/dp/agreement without counts", badRun(fwd.Pass{NumTokens: 6, Agreement: &fwd.Agreement{}}),
		"no token counts", "2"),
	badWant("Run/dp/agreement of others", fwd.ErrTokenMismatch,
		badRun(fwd.Pass{NumTokens: 6, Agreement: &fwd.Agreement{NumTokensAcrossDP: badTokens(7, 6)}}),
		"rank 0", "6", "7"),
	badInvalid("Run/dp/unequal slices",
		badRun(fwd.Pass{NumTokens: 8, NumTokensAcrossDP: badTokens(8, 9), UBatches: badHalves}),
		"rank 0 has 8", "9"),
	badInvalid("Run/dp/slices without counts", func(x *badFixture) error {
		pass := fwd.Pass{NumTokens: 8, UBatches: badHalves}
		reported := x.pair[0].Report(context.Background(), pass, time.Time{}, time.Time{}, nil)
		if err := x.pair[0].Run(context.Background(), pass, nothing); fmt.Sprint(err) != fmt.Sprint(reported) {
			return fmt.Errorf("Run says %v, Report %v", err, reported)
		}
		return reported
	}, "2 microbatches"),
	badInvalid("Run/dp/no coordinator", func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: twoRanks}, fwd.WithCoordinator(nil))
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		return r.Run(context.Background(), fwd.Pass{NumTokens: 8}, nothing)
	}, "rank 0 of 2", "coordinator"),
}

// NewDPMetadata and its arithmetic.
var badCountCases = []badCase{
	badInvalid("NewDPMetadata/config",
		badDP(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 2}, 6, badTokens(6, 8)),
		"DataParallelRank is 2"),
	badInvalid("NewDPMetadata/size/negative",
		badDP(fwd.ParallelConfig{DataParallelSize: -2}, 6, badTokens(6, 8)),
		"DataParallelSize is -2"),
	badInvalid("NewDPMetadata/counts/nil", badDP(twoRanks, 6, nil), "no token counts", "2"),
	badInvalid("NewDPMetadata/counts/few", badDP(twoRanks, 6, badTokens(6)), "1 token counts", "2"),
	badInvalid("NewDPMetadata/counts/not of the default size", badDP(fwd.ParallelConfig{}, 6, badTokens(6, 8)),
		"2 token counts", "1"),
	badWant("NewDPMetadata/own/other", fwd.ErrTokenMismatch,
		badDP(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 6, badTokens(6, 8)),
		"rank 1", "6", "8"),
	badWant("NewDPMetadata/own/NaN", fwd.ErrTokenMismatch, badDP(twoRanks, 6, badTokens(badNaN, 8)),
		"rank 0", "6", "NaN"),
	badInvalid("NewDPMetadata/own/negative", badDP(twoRanks, -6, badTokens(-6, 8)), "rank 0", "-6"),
	badWant("NewDPMetadata/own/before the others", fwd.ErrTokenMismatch,
		badDP(twoRanks, 6, badTokens(7, badNaN)),
		"rank 0", "6", "7"),
	badInvalid("NewDPMetadata/other/NaN", badDP(twoRanks, 6, badTokens(6, badNaN)), "rank 1", "NaN"),
	badInvalid("NewDPMetadata/other/infinite", badDP(twoRanks, 6, badTokens(6, badInf)), "rank 1", "+Inf"),
	badInvalid("NewDPMetadata/other/minus infinite",
		badDP(twoRanks, 6, badTokens(6, -badInf)), "rank 1", "-Inf"),
	badInvalid("NewDPMetadata/other/fraction", badDP(twoRanks, 6, badTokens(6, 0.5)), "rank 1", "0.5"),
	badInvalid("NewDPMetadata/other/tiny", badDP(twoRanks, 6, badTokens(6, math.SmallestNonzeroFloat64)),
		"rank 1", "5e-324"),
	badInvalid("NewDPMetadata/other/negative", badDP(twoRanks, 6, badTokens(6, -1)), "rank 1", "-1"),
	badInvalid("NewDPMetadata/other/huge", badDP(twoRanks, 6, badTokens(6, 1<<31)),
		"rank 1", "2.147483648e+09", "2147483647"),
	badInvalid("NewDPMetadata/other/beyond int", badDP(twoRanks, 6, badTokens(6, 1e300)), "rank 1", "1e+300"),
	badPanic("NumTokens/rank/negative", badArithmetic(func(m *fwd.DPMetadata) { m.NumTokens(-1) }),
		"rank -1", "1"),
	badPanic("NumTokens/rank/size", badArithmetic(func(m *fwd.DPMetadata) { m.NumTokens(2) }),
		"rank 2", "0 to 1"),
	badPanic("AppendSPLocalSizes/sp/zero", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendSPLocalSizes(nil, 0)
	}), "SP size 0"),
	badPanic("AppendSPLocalSizes/sp/negative", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendSPLocalSizes(nil, -8)
	}), "SP size -8"),
	badPanic("AppendSPLocalSizes/sp/huge", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendSPLocalSizes(nil, 1<<23+1)
	}), "SP size 8388609", "8388608", "2 data-parallel ranks"),
	badPanic("AppendSPLocalSizes/sp/max int", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendSPLocalSizes(nil, math.MaxInt)
	}), fmt.Sprint(math.MaxInt)),
	badPanic("AppendChunkedSizes/sp/zero", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendChunkedSizes(nil, 0, 1, 0)
	}), "SP size 0"),
	badPanic("AppendChunkedSizes/sp/huge", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendChunkedSizes(nil, math.MaxInt32, 1, 0)
	}), "SP size 2147483647"),
	badPanic("AppendChunkedSizes/chunk/zero", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendChunkedSizes(nil, 1, 0, 3)
	}), "chunk 3", "0 tokens"),
	badPanic("AppendChunkedSizes/index/negative", badArithmetic(func(m *fwd.DPMetadata) {
		m.AppendChunkedSizes(nil, 1, 4, -1)
	}), "chunk -1", "4 tokens"),
	badPanic("NumChunks/sp/zero", badArithmetic(func(m *fwd.DPMetadata) { m.NumChunks(0, 4) }), "SP size 0"),
	badPanic("NumChunks/chunk/negative", badArithmetic(func(m *fwd.DPMetadata) { m.NumChunks(1, -4) }),
		"-4 tokens"),
	badPanic("CuTokensAcrossSPTo/sp/zero", badArithmetic(func(m *fwd.DPMetadata) {
		m.CuTokensAcrossSPTo(nil, 0)
	}), "SP size 0"),
	badPanic("CuTokensAcrossSPTo/sp/huge", badArithmetic(func(m *fwd.DPMetadata) {
		m.CuTokensAcrossSPTo(nil, 1<<30)
	}), "SP size 1073741824"),
	badPanic("CuTokensAcrossSPTo/dst/length", badArithmetic(func(m *fwd.DPMetadata) {
		m.CuTokensAcrossSPTo(mat.NewVecDense(2, nil), 2)
	}), "length 2", "4"),
	badPanic("NumTokensAcrossDPTo/dst/length", badArithmetic(func(m *fwd.DPMetadata) {
		m.NumTokensAcrossDPTo(mat.NewVecDense(3, nil))
	}), "length 3", "2"),
}

// Derived contexts and chunks.
var badChunkCases = []badCase{
	badWant("WithSPLocalSizes/outside", fwd.ErrNoForwardContext,
		badCtx(func(*badFixture) (context.Context, error) {
			return fwd.WithSPLocalSizes(context.Background(), 1)
		})),
	badWant("WithSPLocalSizes/hidden", fwd.ErrNoForwardContext,
		badCtx(func(x *badFixture) (context.Context, error) {
			return fwd.WithSPLocalSizes(badHidden(x), 1)
		})),
	badInvalid("WithSPLocalSizes/sp/zero", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithSPLocalSizes(x.dpCtx, 0)
	}), "SP size 0", "2 data-parallel ranks"),
	badInvalid("WithSPLocalSizes/sp/huge", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithSPLocalSizes(x.dpCtx, 1<<24)
	}), "SP size 16777216", "8388608"),
	badInvalid("WithSPLocalSizes/sp/huge, alone", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithSPLocalSizes(x.ctx, 1<<24+1)
	}), "SP size 16777217", "1 data-parallel ranks"),
	badInvalid("WithSPLocalSizes/tokens/negative", badCtx(func(*badFixture) (context.Context, error) {
		return fwd.WithSPLocalSizes(fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: -5}), 1)
	}), "-5 tokens"),
	badWant("WithChunkedSizes/outside", fwd.ErrNoForwardContext,
		badCtx(func(*badFixture) (context.Context, error) {
			return fwd.WithChunkedSizes(context.Background(), 1, 0, 0)
		})),
	badInvalid("WithChunkedSizes/sp/negative", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithChunkedSizes(x.ctx, -1, 4, 0)
	}), "SP size -1"),
	badInvalid("WithChunkedSizes/chunk/zero", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithChunkedSizes(x.dpCtx, 1, 0, 5)
	}), "chunk 5", "0 tokens"),
	badInvalid("WithChunkedSizes/index/negative", badCtx(func(x *badFixture) (context.Context, error) {
		return fwd.WithChunkedSizes(x.dpCtx, 1, 4, -2)
	}), "chunk -2", "4 tokens"),
	badWant("Chunks/outside", fwd.ErrNoForwardContext, badChunks(outside, 1, 4)),
	badInvalid("Chunks/sp/zero", badChunks(inDPPass, 0, 4), "SP size 0"),
	badInvalid("Chunks/sp/huge", badChunks(inDPPass, math.MaxInt, 4), fmt.Sprint(math.MaxInt)),
	badInvalid("Chunks/chunk/zero", badChunks(inPass, 1, 0), "0 tokens"),
	badInvalid("Chunks/chunk/negative", badChunks(inDPPass, 1, math.MinInt), fmt.Sprint(math.MinInt)),
}

// Votes.
var badVoteCases = []badCase{
	badInvalid("Agree/none", badAgree(2), "0 votes"),
	badInvalid("Agree/many", func(*badFixture) error {
		_, err := fwd.Agree(make([]fwd.Vote, badOverranks), 2)
		return err
	}, "1048577 votes"),
	badInvalid("Agree/microbatches/negative", badAgree(-1, goodVote), "-1 microbatches"),
	badInvalid("Agree/microbatches/huge", badAgree(badMany, goodVote), tooMany),
	badInvalid("Agree/tokens/negative", badAgree(2, goodVote, negativeVote), "rank 1", "-3"),
	badInvalid("Agree/tokens/huge", badAgree(2, goodVote, fwd.Vote{Step: 1, NumTokensPadded: badMany}),
		"with padding", tooMany),
	badInvalid("Agree/padded below unpadded", badAgree(2, goodVote, shrinkingVote), "rank 1", "4", "8"),
	badInvalid("Agree/mode/composite", badAgree(2, compositeVote, goodVote), "rank 0", "FULL_AND_PIECEWISE"),
	badWant("Agree/steps", fwd.ErrLockstep, badAgree(2, goodVote, fwd.Vote{Step: 7}, goodVote),
		"[1 7 1]", "step 7", "[0 2]"),
	badInvalid("Exchange/tokens/negative", badExchange(negativeVote), "rank 0", "-3"),
	badInvalid("Exchange/tokens/huge", badExchange(fwd.Vote{NumTokens: badMany, NumTokensPadded: badMany}),
		tooMany),
	badInvalid("Exchange/padded below unpadded", badExchange(shrinkingVote), "rank 0", "4", "8"),
	badInvalid("Exchange/mode/composite", badExchange(compositeVote), "rank 0", "FULL_AND_PIECEWISE"),
	badInvalid("Exchange/mode/unknown", badExchange(fwd.Vote{GraphMode: unknownMode}), "GraphMode(9)"),
	badWant("Exchange/step/the last one", fwd.ErrLockstep, func(x *badFixture) error {
		votes, err := x.group[1].Exchange(context.Background(), fwd.Vote{Step: x.groupStep})
		return badRefused(err, votes)
	}, "rank 1", "twice"),
	badInvalid("NewLocalGroup/zero", badGroup(0), "0 ranks", "65536"),
	badInvalid("NewLocalGroup/negative", badGroup(-4), "-4 ranks"),
	badInvalid("NewLocalGroup/huge", badGroup(badOverranks), "1048577 ranks", "65536"),
	badInvalid("NewLocalGroup/max int", badGroup(math.MaxInt), fmt.Sprint(math.MaxInt)),
	badInvalid("coordinator/no votes", badCoordinated(func([]fwd.Vote) []fwd.Vote { return nil }),
		"0 votes", "2 ranks"),
	badInvalid("coordinator/few votes", badCoordinated(func(v []fwd.Vote) []fwd.Vote { return v[:1] }),
		"1 votes", "2 ranks"),
	badInvalid("coordinator/many votes",
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { return append(v, v...) }),
		"4 votes", "2 ranks"),
	badWant("coordinator/own vote changed", fwd.ErrLockstep,
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[0].NumTokens = 4; return v }),
		"rank 0", "NumTokens:4", "NumTokens:5"),
	badWant("coordinator/own vote of another step", fwd.ErrLockstep,
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[0].Step, v[1].Step = 0, 0; return v }),
		"Step:0", "Step:1"),
	badWant("coordinator/steps", fwd.ErrLockstep,
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].Step = 6; return v }),
		"[1 6]"),
	badInvalid("coordinator/peer/negative",
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].NumTokens = -9; return v }),
		"-9"),
	badInvalid("coordinator/peer/mode",
		badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].GraphMode = fwd.GraphFullDecodeOnly; return v }),
		"rank 1", "FULL_DECODE_ONLY"),
	badInvalid("Agree/requests/negative",
		badAgree(2, goodVote, fwd.Vote{Step: 1, NumReqs: -2}), "rank 1", "NumReqs", "-2"),
	badInvalid("Agree/requests/huge",
		badAgree(2, fwd.Vote{Step: 1, NumReqs: badMany}), "rank 0", "NumReqs", tooMany),
	badInvalid("Agree/adapters/negative",
		badAgree(2, goodVote, fwd.Vote{Step: 1, NumActiveLoRAs: -2}), "rank 1", "NumActiveLoRAs", "-2"),
	badInvalid("Agree/adapters/huge",
		badAgree(2, fwd.Vote{Step: 1, NumActiveLoRAs: badMany}), "rank 0", "NumActiveLoRAs", tooMany),
	badInvalid("Agree/configurations",
		badAgree(2, fwd.Vote{Step: 4, Config: 1}, fwd.Vote{Step: 4, Config: 2}, fwd.Vote{Step: 4, Config: 2}),
		"configured differently", "step 4", "[0]"),
	badWant("Agree/warm-up", fwd.ErrLockstep,
		badAgree(2, fwd.Vote{Step: 4, WarmUp: true}, fwd.Vote{Step: 4}, fwd.Vote{Step: 4}),
		"warm up", "step 4", "[0]"),
	badInvalid("Exchange/requests/negative", badExchange(fwd.Vote{NumReqs: -1}), "rank 0", "NumReqs", "-1"),
	badInvalid("Exchange/adapters/huge",
		badExchange(fwd.Vote{NumActiveLoRAs: badMany}), "NumActiveLoRAs", tooMany),
	badInvalid("coordinator/peer/configured differently", badCoordinated(func(v []fwd.Vote) []fwd.Vote {
		v[1].Config++
		return v
	}), "configured differently", "[1]"),
	badWant("coordinator/peer/warms up", fwd.ErrLockstep, badCoordinated(func(v []fwd.Vote) []fwd.Vote {
		v[1].WarmUp = true
		return v
	}), "warm up", "[1]"),
}

// Plan.
var badPlanCases = []badCase{
	badInvalid("Plan/nothing", func(x *badFixture) error {
		pass, err := x.alone.Plan(context.Background(), fwd.Schedule{})
		return badRefused(err, pass)
	}, "nothing is scheduled"),
	badInvalid("Plan/nil Runner, nothing", func(*badFixture) error {
		pass, err := (*fwd.Runner)(nil).Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{}})
		return badRefused(err, pass)
	}, "nothing is scheduled"),
	badInvalid("Plan/tokens/negative", badPlan(fwd.Schedule{NumScheduledTokens: []int{4, -1}}),
		"request 1", "-1"),
	badInvalid("Plan/tokens/huge",
		badPlan(fwd.Schedule{NumScheduledTokens: []int{badMany}}), "request 0", tooMany),
	badInvalid("Plan/tokens/sum", badPlan(fwd.Schedule{NumScheduledTokens: []int{math.MaxInt32, 3, 1}}),
		"2147483650", "2147483647"),
	badInvalid("Plan/tokens/zero", func(x *badFixture) error {
		pass, err := x.alone.Plan(context.Background(), planBatch(0, 0, 0))
		return badRefused(err, pass)
	}, "nothing is scheduled"),
	badInvalid("Plan/adapters/negative", badPlan(fwd.Schedule{NumScheduledTokens: []int{1}, NumActiveLoRAs: -2}),
		"NumActiveLoRAs", "-2"),
	badInvalid("Plan/several", badPlan(fwd.Schedule{NumScheduledTokens: []int{-5}, NumActiveLoRAs: -2}),
		"request 0", "-5", "NumActiveLoRAs", "-2"),
	badInvalid("Plan/no coordinator", func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 3, DataParallelRank: 2}})
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), fwd.Schedule{})
		return badRefused(err, pass)
	}, "rank 2 of 3", "coordinator"),
	badInvalid("Plan/ranks with other sizes", func(x *badFixture) error {
		peer := badCoordinator{func(v []fwd.Vote) []fwd.Vote {
			v[1].NumTokens, v[1].NumTokensPadded, v[1].Config = 5, 6, 0 // not a capture size here
			return v
		}}
		r, err := fwd.New(fwd.Config{}, fwd.WithDispatcher(x.dispatcher), fwd.WithCoordinator(peer))
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{3}})
		return badRefused(err, pass)
	}, "PIECEWISE with 6 tokens", "PIECEWISE with 8 tokens", "rank 0", "configure all ranks the same"),
	badInvalid("Plan/tokens/rounded up", func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{TokenMultiple: 4}})
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), planBatch(math.MaxInt32))
		return badRefused(err, pass)
	}, "2147483647 tokens", "multiple of 4"),
	badInvalid("Plan/reuse/no votes", badReuse(&fwd.Agreement{}), "0 votes", "2 ranks"),
	badInvalid("Plan/reuse/of three ranks",
		badReuse(&fwd.Agreement{Votes: make([]fwd.Vote, 3)}), "3 votes", "2 ranks"),
	badInvalid("Plan/reuse/vote",
		badReuse(&fwd.Agreement{Votes: []fwd.Vote{goodVote, shrinkingVote}}), "rank 1", "8", "4"),
	badInvalid("Plan/reuse/no batch",
		badReuse(&fwd.Agreement{Votes: []fwd.Vote{goodVote, {Step: 1, NumTokensPadded: 3}}}), "rank 1", "0 tokens"),
	badWant("Plan/reuse/other batch", fwd.ErrTokenMismatch,
		badReuse(&fwd.Agreement{Votes: []fwd.Vote{goodVote, goodVote}}),
		"rank 0", "5 tokens of 2 requests", "4 tokens"),
	badInvalid("Begin/tokens/negative", func(x *badFixture) error {
		wait, err := x.pair[0].Begin(context.Background(), planBatch(-1))
		return badRefused(err, wait)
	}, "request 0", "-1"),
	badWant("Begin/twice", fwd.ErrLockstep, func(x *badFixture) error {
		first, err := x.pair[0].Begin(context.Background(), planBatch(1))
		if err != nil {
			return fmt.Errorf("Begin: %v", err)
		}
		second, err := x.pair[0].Begin(context.Background(), planBatch(1))
		if _, err := x.pair[1].Plan(context.Background(), planBatch(1)); err != nil {
			return fmt.Errorf("the peer: %v", err)
		}
		if _, err := first(); err != nil {
			return fmt.Errorf("the first: %v", err)
		}
		x.step++
		return badRefused(err, second)
	}, "rank 0", "another is open"),
	badInvalid("WarmUp/no coordinator", func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: twoRanks})
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		for pass, err := range r.WarmUp(context.Background()) {
			return badRefused(err, pass.NumTokens)
		}
		return nil
	}, "rank 0 of 2", "coordinator"),
}

// Microbatches.
var badUBatchCases = []badCase{
	badInvalid("SplitUBatches/request/negative", badSplit([]int{5, -2}, 8, 2, 2, 0), "request 1", "-2"),
	badInvalid("SplitUBatches/request/huge", badSplit([]int{badMany}, 8, 2, 2, 0), "request 0", tooMany),
	badInvalid("SplitUBatches/sum", badSplit([]int{math.MaxInt32, math.MaxInt32}, math.MaxInt32, 2, 2, 0),
		"4294967294", "2147483647"),
	badInvalid("SplitUBatches/tokens/below", badSplit([]int{5, 5}, 9, 2, 2, 0), "9", "10"),
	badInvalid("SplitUBatches/tokens/negative", badSplit([]int{5, 5}, -1, 2, 2, 0), "-1", "10"),
	badInvalid("SplitUBatches/tokens/huge", badSplit([]int{5, 5}, badMany, 2, 2, 5), tooMany),
	badInvalid("SplitUBatches/requests/below", badSplit([]int{5, 5}, 10, 1, 2, 0), "1", "2"),
	badInvalid("SplitUBatches/requests/negative", badSplit([]int{5, 5}, 10, -3, 2, 0), "-3"),
	badInvalid("SplitUBatches/n/zero", badSplit([]int{5, 5}, 10, 2, 0, 0), "0 microbatches"),
	badInvalid("SplitUBatches/n/one", badSplit([]int{5, 5}, 10, 2, 1, 0), "1 microbatches"),
	badInvalid("SplitUBatches/n/negative", badSplit([]int{5, 5}, 10, 2, -1, 0), "-1 microbatches"),
	badInvalid("SplitUBatches/n/above tokens", badSplit([]int{5, 5}, 10, 2, 11, 0), "11 microbatches", "10"),
	badInvalid("SplitUBatches/n/huge", badSplit([]int{5, 5}, 10, 2, math.MaxInt, 1), fmt.Sprint(math.MaxInt)),
	badInvalid("SplitUBatches/n/huge count", badSplit([]int{5, 5}, 10, 2, math.MaxInt32, math.MaxInt32),
		"2147483647"),
	badInvalid("SplitUBatches/split/negative", badSplit([]int{5, 5}, 10, 2, 2, -5), "-5"),
	badInvalid("SplitUBatches/split/all", badSplit([]int{5, 5}, 10, 2, 2, 10), "10", "2 microbatches"),
	badInvalid("SplitUBatches/split/huge", badSplit([]int{5, 5}, 10, 2, 3, math.MaxInt32),
		"2147483647", "4294967294"),
	badInvalid("SplitUBatches/padding only", badSplit([]int{5, 5}, 20, 2, 2, 0),
		"token 10", "10 scheduled", "20 padded"),
	badInvalid("SplitUBatches/nothing", badSplit(nil, 8, 0, 2, 4), "0 scheduled"),
	badInvalid("RunUBatches/function/nil", func(x *badFixture) error { return fwd.RunUBatches(x.split, nil) },
		"function"),
	badWant("RunUBatches/outside", fwd.ErrNoForwardContext, func(*badFixture) error {
		return fwd.RunUBatches(context.Background(), badUBatch)
	}),
	badInvalid("RunUBatches/slices/short", badUBatchRun(fwd.ForwardContext{NumTokens: 9, UBatches: badHalves}),
		"token 8", "9"),
	badInvalid("RunUBatches/slices/empty",
		badUBatchRun(fwd.ForwardContext{UBatches: make([]fwd.UBatchSlice, 2)}),
		"microbatch 0", "microbatch 1"),
	badInvalid("RunUBatches/metadata",
		badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: badHalves, AttnMetadata: badMaps(1)}),
		"AttnMetadata has 1", "2"),
	badInvalid("RunUBatches/slots",
		badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: badHalves, SlotMapping: badMaps(3)}),
		"SlotMapping has 3", "2"),
	badInvalid("RunUBatches/dp", func(x *badFixture) error {
		return badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: badHalves, DP: x.dp})(x)
	}, "rank 0 has 6", "8"),
}

// Graph modes.
var badModeCases = []badCase{
	badInvalid("ParseGraphMode/empty", func(*badFixture) error {
		m, err := fwd.ParseGraphMode("")
		return badRefused(err, m)
	}, `""`, "FULL_AND_PIECEWISE"),
	badInvalid("ParseGraphMode/unknown", func(*badFixture) error {
		m, err := fwd.ParseGraphMode("FULL-ISH")
		return badRefused(err, m)
	}, `"FULL-ISH"`, "PIECEWISE"),
	badInvalid("ParseGraphMode/space", func(*badFixture) error {
		m, err := fwd.ParseGraphMode(" NONE")
		return badRefused(err, m)
	}, `" NONE"`),
	badInvalid("ParseGraphMode/long", func(*badFixture) error {
		_, err := fwd.ParseGraphMode(strings.Repeat("x", 1<<20))
		if len(err.Error()) > 400 {
			return fmt.Errorf("a message of %d bytes", len(err.Error()))
		}
		return err
	}, `"xxxx`),
	badInvalid("UnmarshalText/unknown", func(*badFixture) error {
		m := fwd.GraphFull
		err := m.UnmarshalText([]byte("EAGER"))
		return badRefused(err, m-fwd.GraphFull)
	}, `"EAGER"`),
	badInvalid("MarshalText/unknown", func(*badFixture) error {
		text, err := unknownMode.MarshalText()
		return badRefused(err, text)
	}, "GraphMode(9)"),
	badPanic("HasMode/composite", func(*badFixture) error {
		fwd.GraphFull.HasMode(fwd.GraphFullDecodeOnly)
		return nil
	}, "FULL_DECODE_ONLY"),
	badPanic("HasMode/unknown", func(*badFixture) error { fwd.GraphFull.HasMode(unknownMode); return nil },
		"GraphMode(9)"),
	badInvalid("Reason/UnmarshalText/unknown", func(*badFixture) error {
		r := fwd.ReasonLoRA
		err := r.UnmarshalText([]byte("LORA"))
		return badRefused(err, r-fwd.ReasonLoRA)
	}, `"LORA"`, "too_large"),
	badInvalid("Reason/MarshalText/unknown", func(*badFixture) error {
		text, err := fwd.Reason(99).MarshalText()
		return badRefused(err, text)
	}, "Reason(99)"),
}

// Dispatcher.
var badDispatcherCases = []badCase{
	badInvalid("NewDispatcher/mode/unknown", badGraphs(func(c *fwd.DispatcherConfig) { c.Mode = unknownMode }),
		"GraphMode(9)"),
	badInvalid("NewDispatcher/sizes/none", badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = nil }),
		"FULL_AND_PIECEWISE", "capture sizes"),
	badInvalid("NewDispatcher/sizes/zero", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes = []int{0, 4}
	}), "capture size 0", "index 0"),
	badInvalid("NewDispatcher/sizes/negative", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes = []int{-8, 4}
	}), "capture size -8", "index 0"),
	badInvalid("NewDispatcher/sizes/huge", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes = []int{4, badMany}
	}), "capture size "+tooMany, "index 1"),
	badInvalid("NewDispatcher/sizes/unsorted", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes = []int{2, 8, 4}
	}), "4 follows 8", "index 2"),
	badInvalid("NewDispatcher/sizes/duplicate", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes = []int{2, 4, 4}
	}), "4 follows 4", "index 2"),
	badInvalid("NewDispatcher/sizes/multiples", badGraphs(func(c *fwd.DispatcherConfig) {
		c.CaptureSizes, c.UniformDecodeQueryLen = []int{3, 4, 6, 8}, 3
	}), "[4 8]", "3"),
	badInvalid("NewDispatcher/sizes/multiples, FULL", badGraphs(func(c *fwd.DispatcherConfig) {
		c.Mode, c.UniformDecodeQueryLen = fwd.GraphFull, 4
	}), "[2]", "4"),
	badInvalid("NewDispatcher/sizes/of an unused mode",
		badDispatcher(fwd.DispatcherConfig{CaptureSizes: []int{4, 2}}),
		"2 follows 4"),
	badInvalid("NewDispatcher/sequences/zero", badGraphs(func(c *fwd.DispatcherConfig) { c.MaxNumSeqs = 0 }),
		"MaxNumSeqs 0", "FULL_AND_PIECEWISE"),
	badInvalid("NewDispatcher/sequences/negative", badGraphs(func(c *fwd.DispatcherConfig) {
		c.MaxNumSeqs = -6
	}), "MaxNumSeqs is -6"),
	badInvalid("NewDispatcher/sequences/huge", badGraphs(func(c *fwd.DispatcherConfig) {
		c.MaxNumSeqs = badMany
	}), "MaxNumSeqs is "+tooMany),
	badInvalid("NewDispatcher/query/negative", badGraphs(func(c *fwd.DispatcherConfig) {
		c.UniformDecodeQueryLen = -1
	}), "UniformDecodeQueryLen is -1"),
	badInvalid("NewDispatcher/query/huge", badGraphs(func(c *fwd.DispatcherConfig) {
		c.UniformDecodeQueryLen = badMany
	}), "UniformDecodeQueryLen is "+tooMany),
	badInvalid("NewDispatcher/adapters/zero", badGraphs(func(c *fwd.DispatcherConfig) {
		c.LoRA = &fwd.LoRAConfig{}
	}), "MaxLoRAs is 0"),
	badInvalid("NewDispatcher/adapters/negative", badGraphs(func(c *fwd.DispatcherConfig) {
		c.LoRA = &fwd.LoRAConfig{MaxLoRAs: -1}
	}), "MaxLoRAs is -1"),
	badInvalid("NewDispatcher/adapters/huge", badGraphs(func(c *fwd.DispatcherConfig) {
		c.LoRA = &fwd.LoRAConfig{MaxLoRAs: math.MaxInt32, SpecializeCount: true}
	}), "MaxLoRAs is 2147483647"),
	badInvalid("NewDispatcher/several",
		badDispatcher(fwd.DispatcherConfig{
			Mode: fwd.GraphFull, CaptureSizes: []int{9, -7}, MaxNumSeqs: -6, UniformDecodeQueryLen: -5,
			LoRA: &fwd.LoRAConfig{MaxLoRAs: -4},
		}),
		"-7", "-6", "-5", "-4"),
	badPanic("Dispatch/tokens/negative", func(x *badFixture) error {
		x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: -1})
		return nil
	}, "-1 tokens"),
	badPanic("Dispatch/adapters/negative", func(x *badFixture) error {
		x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: 3, NumActiveLoRAs: -2})
		return nil
	}, "3 tokens", "-2 adapters"),
	badPanic("DefaultCaptureSizes/huge", func(*badFixture) error {
		fwd.DefaultCaptureSizes(1<<24 + 1)
		return nil
	}, "16777217", "16777216"),
	badPanic("DefaultCaptureSizes/max int", func(*badFixture) error {
		fwd.DefaultCaptureSizes(math.MaxInt)
		return nil
	}, fmt.Sprint(math.MaxInt)),
	badInvalid("RoundCaptureSizes/multiple/zero", badRound(0, 1, 2), "multiple is 0"),
	badInvalid("RoundCaptureSizes/multiple/negative", badRound(-3), "multiple is -3"),
	badInvalid("RoundCaptureSizes/size/zero", badRound(2, 4, 0), "capture size 0", "index 1"),
	badInvalid("RoundCaptureSizes/size/negative", badRound(2, -4), "capture size -4", "index 0"),
	badInvalid("RoundCaptureSizes/none left", badRound(8, 3, 7), "8", "7"),
	badInvalid("RoundCaptureSizes/overflow", badRound(math.MaxInt-1, math.MaxInt),
		fmt.Sprint(math.MaxInt), fmt.Sprint(math.MaxInt-1)),
	badPanic("Dispatch/requests/negative", func(x *badFixture) error {
		x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: 3, NumReqs: -2})
		return nil
	}, "3 tokens", "-2 requests"),
}

// Graph caches.
var badCacheCases = []badCase{
	badInvalid("NewGraphCache/mode/none", badCache(fwd.GraphNone, nothing, badCapture), "NONE"),
	badInvalid("SplitUBatches/n/memory", badSplit([]int{math.MaxInt32}, math.MaxInt32, 1, math.MaxInt32, 1),
		"2147483647 microbatches"),
	badPanic("Exchange/ctx/nil", func(x *badFixture) error {
		var ctx context.Context
		_, err := x.group[0].Exchange(ctx, fwd.Vote{Step: x.groupStep + 1})
		return err
	}, "Exchange", "nil"),
	badInvalid("NewGraphCache/mode/composite", badCache(fwd.GraphFullAndPiecewise, nothing, badCapture),
		"FULL_AND_PIECEWISE"),
	badInvalid("NewGraphCache/mode/unknown", badCache(unknownMode, nothing, badCapture), "GraphMode(9)"),
	badInvalid("NewGraphCache/forward/nil", badCache(fwd.GraphFull, nil, badCapture),
		"forward function (nil: true)"),
	badInvalid("NewGraphCache/capture/nil", badCache(fwd.GraphFull, nothing, nil),
		"capture function (nil: true)"),
	badInvalid("NewGraphCache/several", badCache(fwd.GraphNone, nil, nil), "NONE", "forward", "capture"),
	badWant("Forward/no descriptor", fwd.ErrNoDescriptor, func(x *badFixture) error {
		return x.cache.Forward(x.ctx)
	}, "8 tokens", "FULL"),
	badWant("Forward/closed", fwd.ErrCaptureClosed, func(x *badFixture) error {
		return x.closed.Forward(badFull(badPlain))
	}, "FULL", "NumTokens:8"),
	badInvalid("Forward/capture without graph", func(x *badFixture) error {
		return x.noGraph.Forward(badFull(badPlain))
	}, "no replay function", "NumTokens:8"),
	badInvalid("Forward/HasLoRA without adapters", func(x *badFixture) error {
		return x.cache.Forward(badFull(badAdapters))
	}, "HasLoRA true", "0"),
	badInvalid("Forward/adapters without HasLoRA", func(x *badFixture) error {
		return x.cache.Forward(badFull(fwd.BatchDescriptor{NumTokens: 8, NumActiveLoRAs: 2}))
	}, "HasLoRA false", "2"),
}

// Passes that were planned.
var badPlannedCases = []badCase{
	badInvalid("planned/twice", badPlanned(func(r *fwd.Runner, p fwd.Pass) error {
		if err := r.Run(context.Background(), p, nothing); err != nil {
			return fmt.Errorf("Run: %v", err)
		}
		return r.Run(context.Background(), p, nothing)
	}), "5 tokens", "second time"),
	badInvalid("planned/started and reported", badPlanned(func(r *fwd.Runner, p fwd.Pass) error {
		_, end, err := r.Start(context.Background(), p)
		if end(nil); err != nil {
			return fmt.Errorf("Start: %v", err)
		}
		return r.Report(context.Background(), p, time.Time{}, time.Time{}, nil)
	}), "second time"),
	badInvalid("planned/on another Runner", badPlanned(func(_ *fwd.Runner, p fwd.Pass) error {
		return (*fwd.Runner)(nil).Run(context.Background(), p, nothing)
	}), "another Runner", `"own"`, "rank 0 of 1"),
	badInvalid("planned/reported by another Runner", badPlanned(func(_ *fwd.Runner, p fwd.Pass) error {
		return (*fwd.Runner)(nil).Report(context.Background(), p, time.Time{}, time.Time{}, nil)
	}), "another Runner", `"own"`),
	badInvalid("planned/bad, reported", badPlanned(func(r *fwd.Runner, p fwd.Pass) error {
		p.NumTokensUnpadded = -3
		return r.Report(context.Background(), p, time.Time{}, time.Time{}, nil)
	}), "-3"),
	badInvalid("planned/idle, started", func(x *badFixture) error {
		waits := [2]func() (fwd.Pass, error){}
		for rank, r := range x.pair {
			var err error
			if waits[rank], err = r.Begin(context.Background(), fwd.Schedule{}); err != nil {
				return fmt.Errorf("Begin: %v", err)
			}
		}
		x.step++
		pass, err := waits[0]()
		if err != nil {
			return fmt.Errorf("wait: %v", err)
		}
		_, end, err := x.pair[0].Start(context.Background(), pass)
		end(nil)
		return err
	}, "every rank is idle", "Agreement.Idle"),
}

// badPlanned does something with a plan of a Runner.
func badPlanned(do func(r *fwd.Runner, p fwd.Pass) error) func(*badFixture) error {
	return func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Name: "own"})
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), planBatch(3, 2))
		if err != nil {
			return fmt.Errorf("Plan: %v", err)
		}
		return do(r, pass)
	}
}

// badReuse plans 5 tokens of 2 requests over the batch of an agreement, on rank 0 of the pair.
func badReuse(a *fwd.Agreement) func(*badFixture) error {
	return func(x *badFixture) error {
		s := planBatch(3, 2)
		s.Reuse = a
		pass, err := x.pair[0].Plan(context.Background(), s)
		return badRefused(err, pass)
	}
}

// Telemetry.
var badTelemetryCases = []badCase{
	badPanic("NewRecorder/zero", func(*badFixture) error {
		fwd.NewRecorder(0)
		return nil
	}, "NewRecorder(0)", "1"),
	badPanic("NewRecorder/negative", func(*badFixture) error {
		fwd.NewRecorder(-7)
		return nil
	}, "NewRecorder(-7)"),
}

// refuse makes the call and returns its error, or what it panicked with.
func (c *badCase) refuse(x *badFixture) (panicked any, err error) {
	defer func() { panicked = recover() }()
	return nil, c.call(x)
}

// TestBadInput makes every call that must be refused, and checks after each that nothing has been left half
// done.
func TestBadInput(t *testing.T) {
	cases := slices.Concat(badNewCases, badContextCases, badPassCases, badSliceCases, badDPPassCases,
		badPlannedCases, badCountCases, badChunkCases, badVoteCases, badPlanCases, badUBatchCases, badModeCases,
		badDispatcherCases, badCacheCases, badTelemetryCases)
	if len(cases) < 250 {
		t.Fatalf("%d cases", len(cases))
	}
	x := newBadFixture(t)
	names := make(map[string]bool)
	for _, c := range cases {
		if names[c.name] {
			t.Errorf("two cases are called %q", c.name)
		}
		names[c.name] = true
		t.Run(c.name, func(t *testing.T) {
			panicked, err := c.refuse(x)
			if c.panics != (panicked != nil) {
				t.Fatalf("returned %v, panicked with %v; want a panic: %t", err, panicked, c.panics)
			}
			text := fmt.Sprint(panicked)
			if err != nil {
				text = err.Error()
			} else if panicErr, ok := panicked.(error); ok {
				err = panicErr
			}
			if c.want != nil {
				if !errors.Is(err, c.want) {
					t.Fatalf("got %v, want %v", err, c.want)
				}
				var typed interface{ ErrorType() string }
				if !errors.As(err, &typed) || typed.ErrorType() == "" {
					t.Errorf("%v has no word for telemetry", err)
				}
			}
			for line := range strings.Lines(text) {
				if !strings.HasPrefix(line, "fwd: ") || strings.Count(line, "fwd: ") > 1 {
					t.Errorf("a line does not start with the package's name, or has it twice: %q", line)
				}
			}
			for _, want := range c.text {
				if !strings.Contains(text, want) {
					t.Errorf("the message does not say %q: %s", want, text)
				}
			}
			x.check(t)
		})
	}
}

// Odd input that is fine.
func TestOddInput(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{}, fwd.WithObserver(nil), fwd.WithLogger(nil), fwd.WithPeerName(nil),
		fwd.WithTracerProvider(nil), fwd.WithMeterProvider(nil), fwd.WithClock(nil), fwd.WithQueue(nil),
		fwd.WithSynchronize(nil), fwd.WithCoordinator(nil), fwd.WithDispatcher(nil), fwd.WithAttributes(),
		fwd.WithMiddleware())
	if err != nil {
		t.Fatal(err)
	}
	pass, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}, Note: math.MaxUint64})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), pass, nothing); err != nil {
		t.Error(err)
	}
	// A pass that ends before it begins.
	if err := r.Report(t.Context(), fwd.Pass{}, time.Now(), time.Time{}, nil); err != nil {
		t.Error(err)
	}
	fwd.Waited(t.Context(), -5, time.Now().Add(time.Hour))
	for range r.WarmUp(t.Context()) {
		t.Error("there are graphs to warm up")
	}
}

// A warm-up that is abandoned half-way leaves nothing behind: the Runner plans, and warms up again.
func TestAbandonedWarmUp(t *testing.T) {
	t.Parallel()
	d := planDispatcher(t, planMixed(1))
	r, err := fwd.New(fwd.Config{}, fwd.WithDispatcher(d))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		passes := 0
		for _, err := range r.WarmUp(t.Context()) { // which nobody runs, either
			if err != nil {
				t.Error(err)
			}
			if passes++; passes == 2 {
				break
			}
		}
		pass, err := r.Plan(t.Context(), planDecode(3))
		if err != nil || pass.GraphMode != fwd.GraphFull {
			t.Errorf("%+v, %v", pass, err)
		}
	}
	if passes, err := warmUp(t.Context(), r, 0, nothing); err != nil || len(passes) != len(d.Captures()) {
		t.Errorf("%d passes, %v", len(passes), err)
	}
}

// A forward function that returns a nil pointer in its error fails the pass, with telemetry and without.
func TestTypedNilError(t *testing.T) {
	t.Parallel()
	recorder := fwd.NewRecorder(9)
	log := slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for name, opts := range map[string][]fwd.Option{
		"none": nil, "observer": {fwd.WithObserver(recorder.Observe)}, "logger": {fwd.WithLogger(log)},
	} {
		r, err := fwd.New(fwd.Config{}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		for _, typed := range []error{(*fwd.RankError)(nil), (*fwd.UBatchError)(nil), (*os.PathError)(nil)} {
			err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return typed })
			if err != typed {
				t.Errorf("%s: Run returns a %T for a nil %T", name, err, typed)
			}
			_, end, err := r.Start(t.Context(), fwd.Pass{NumTokens: 1})
			if end(typed); err != nil {
				t.Error(err)
			}
			if err := r.Report(t.Context(), fwd.Pass{}, time.Now(), time.Now(), typed); err != nil {
				t.Error(err)
			}
		}
	}
	records := recorder.Recent()
	for _, rec := range records {
		if rec.Err == nil || rec.LogValue().String() == "" {
			t.Errorf("the record %+v has no error", rec)
		}
	}
	if len(records) != 9 {
		t.Errorf("%d records, want 9", len(records))
	}
}
