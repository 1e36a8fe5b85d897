// This file tests what the package does with bad input: the error or panic, and its words.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// badMany is one more than any count may be. Where an int has 32 bits it wraps to a negative number, which is as bad.
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
		u = append(u, fwd.UBatchSlice{Requests: fwd.Range{Start: b[0], Stop: b[1]}, Tokens: fwd.Range{Start: b[2], Stop: b[3]}})
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

func badCapture(context.Context, fwd.BatchDescriptor, fwd.ForwardFunc) (fwd.Graph, error) {
	return badGraph{}, nil
}

type badGraph struct{}

func (badGraph) Replay(context.Context) error { return nil }

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
	noGraph    *fwd.GraphCache // FULL, whose capture returns no graph
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
	x.dispatcher, err = fwd.NewDispatcher(fwd.DispatcherConfig{Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4, 8}, MaxNumSeqs: 8})
	note(err)
	x.alone, err = fwd.New(fwd.Config{}, fwd.WithDispatcher(x.dispatcher))
	note(err)
	coordinators, err := fwd.NewLocalGroup(2)
	note(err)
	for rank := range x.pair {
		parallel := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank, NumUBatches: 2}
		x.pair[rank], err = fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(x.dispatcher), fwd.WithCoordinator(coordinators[rank]))
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
	x.noGraph, err = fwd.NewGraphCache(fwd.GraphFull, nothing, func(context.Context, fwd.BatchDescriptor, fwd.ForwardFunc) (fwd.Graph, error) {
		return nil, nil
	})
	note(err)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	metadata := []map[string]any{{"attn": "metadata"}}
	x.ctx = fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 8, Layers: map[string]any{"mlp": "layer"}, AttnMetadata: metadata, SlotMapping: metadata, GraphMode: fwd.GraphFull,
	})
	x.dpCtx = fwd.NewContext(t.Context(), &fwd.ForwardContext{NumTokens: 6, DP: x.dp})
	x.split = fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8}), AttnMetadata: slices.Repeat(metadata, 2), SlotMapping: slices.Repeat(metadata, 2),
	})
	return x
}

// check checks that everything in the fixture still works: the groups are in step, and no pass or key was left behind.
func (x *badFixture) check(t *testing.T) {
	t.Helper()
	if mode, batch, reason := x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: 3}); mode != fwd.GraphPiecewise || batch.NumTokens != 4 || reason != fwd.ReasonRelaxed {
		t.Errorf("afterwards the dispatcher says %v, %+v, %v", mode, batch, reason)
	}
	ran := false
	if err := x.alone.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("afterwards a Runner runs a pass: %t, %v", ran, err)
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
				t.Errorf("afterwards rank %d plans %d tokens in step %d, want 8 in step %d", rank, pass.NumTokens, pass.Agreement.Step, x.step)
			}
			votes, err := x.group[rank].Exchange(ctx, fwd.Vote{Step: x.groupStep, NumTokens: rank, NumTokensPadded: rank})
			if err != nil || len(votes) != 2 || votes[0].Step != x.groupStep || votes[1].NumTokens != 1 {
				t.Errorf("afterwards rank %d exchanges: %+v, %v; want step %d", rank, votes, err, x.groupStep)
			}
		})
	}
	wg.Wait()
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

// badCase is a call that must be refused: with an error that is want and names what is in conflict, or with a panic.
type badCase struct {
	name   string
	want   error // of the panic too, where its value is an error; nil: it panics with text
	panics bool
	call   func(x *badFixture) error
	text   []string
}

// badCoordinated runs a pass on rank 0 of 2, over a coordinator that answers what change makes of the votes.
func badCoordinated(change func([]fwd.Vote) []fwd.Vote) func(*badFixture) error {
	return func(*badFixture) error {
		r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}, fwd.WithCoordinator(badCoordinator{change}))
		if err != nil {
			return fmt.Errorf("New: %v", err)
		}
		pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{5}})
		return badRefused(err, pass)
	}
}

// badRun runs a pass of rank 0 of the pair or, where that is not data parallel, of the Runner alone. It must not start.
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
		ctx, end, startErr := r.Start(context.Background(), p)
		if fmt.Sprint(err) != fmt.Sprint(startErr) {
			return fmt.Errorf("Run says %v, Start %v", err, startErr)
		}
		return badRefused(err, ctx, end)
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

func badUBatchRun(fc fwd.ForwardContext) func(*badFixture) error {
	return func(*badFixture) error {
		return fwd.RunUBatches(fwd.NewContext(context.Background(), &fc), func(context.Context, int) error { return errors.New("a microbatch ran") })
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

func badCache(mode fwd.GraphMode, forward fwd.ForwardFunc, capture fwd.CaptureFunc) func(*badFixture) error {
	return func(*badFixture) error {
		c, err := fwd.NewGraphCache(mode, forward, capture)
		return badRefused(err, c)
	}
}

// badFull is the context of a pass that a full graph could run.
func badFull() context.Context {
	return fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: 8, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 8}})
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
func badMiss[T any](lookup func(context.Context, string) (T, error), ctx func(*badFixture) context.Context, layer string) func(*badFixture) error {
	return func(x *badFixture) error {
		got, err := lookup(ctx(x), layer)
		return badRefused(err, got)
	}
}

// badOverranks is a number of ranks that no group can have.
const badOverranks = 1<<20 + 1

func badCases() []badCase {
	nan, inf := math.NaN(), math.Inf(1)
	two := fwd.ParallelConfig{DataParallelSize: 2}
	middleware := func(next fwd.ForwardFunc) fwd.ForwardFunc { return next }
	unknown := fwd.GraphMode(9)
	good := fwd.Vote{Step: 1, NumTokens: 4, NumTokensPadded: 8}
	negative := fwd.Vote{Step: 1, NumTokens: -3, NumTokensPadded: 8}
	shrinking := fwd.Vote{Step: 1, NumTokens: 8, NumTokensPadded: 4}
	composite := fwd.Vote{Step: 1, NumTokens: 4, NumTokensPadded: 8, GraphMode: fwd.GraphFullAndPiecewise}
	many := fmt.Sprint(badMany)
	halves := badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8})
	metadata := func(n int) []map[string]any { return make([]map[string]any, n) }
	invalid := fwd.ErrInvalid

	return []badCase{
		// New, its options, middleware.
		{"New/size/negative", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: -1}), []string{"DataParallelSize", "-1"}},
		{"New/size/huge", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: badOverranks}), []string{"DataParallelSize", "1048577", "1048576"}},
		{"New/size/max int", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: math.MaxInt}), []string{"DataParallelSize", fmt.Sprint(math.MaxInt)}},
		{"New/rank/negative", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: -1}), []string{"DataParallelRank", "-1", "2"}},
		{"New/rank/size", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 2}), []string{"DataParallelRank is 2", "0 to 1"}},
		{"New/rank/no size", invalid, false, badNew(fwd.ParallelConfig{DataParallelRank: 1}), []string{"DataParallelRank is 1", "DataParallelSize 1"}},
		{"New/microbatches/negative", invalid, false, badNew(fwd.ParallelConfig{NumUBatches: -2}), []string{"NumUBatches", "-2"}},
		{"New/microbatches/huge", invalid, false, badNew(fwd.ParallelConfig{NumUBatches: badMany}), []string{"NumUBatches", many}},
		{"New/decode threshold/negative", invalid, false, badNew(fwd.ParallelConfig{DecodeUBatchThreshold: -32}), []string{"DecodeUBatchThreshold", "-32"}},
		{"New/prefill threshold/negative", invalid, false, badNew(fwd.ParallelConfig{PrefillUBatchThreshold: -512}), []string{"PrefillUBatchThreshold", "-512"}},
		{"New/prefill threshold/huge", invalid, false, badNew(fwd.ParallelConfig{PrefillUBatchThreshold: badMany}), []string{"PrefillUBatchThreshold", many}},
		{"New/option/nil", invalid, false, badNew(fwd.ParallelConfig{}, fwd.WithStepTrace(), nil), []string{"option 1 of 2"}},
		{"New/coordinator/rank", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, fwd.WithCoordinator(badCoordinator{})), []string{"rank 0 of 2", "rank 1 of 2"}},
		{"New/coordinator/size", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: 3}, fwd.WithCoordinator(badCoordinator{})), []string{"rank 0 of 2", "rank 0 of 3"}},
		{"New/coordinator/no size", invalid, false, badNew(fwd.ParallelConfig{}, fwd.WithCoordinator(badCoordinator{})), []string{"rank 0 of 2", "rank 0 of 1"}},
		{"New/several", invalid, false, badNew(fwd.ParallelConfig{DataParallelSize: -3, NumUBatches: -4, DecodeUBatchThreshold: -5}, nil), []string{"-3", "-4", "-5", "option 0 of 1"}},
		{"WithMiddleware/nil", nil, true, func(*badFixture) error { fwd.WithMiddleware(middleware, nil); return nil }, []string{"middleware 1 of 2", "nil"}},
		{"Chain/nil", nil, true, func(*badFixture) error { fwd.Chain(nil); return nil }, []string{"middleware 0 of 1", "nil"}},

		// Contexts and what is in them.
		{"NewContext/parent/nil", nil, true, func(*badFixture) error {
			var parent context.Context
			fwd.NewContext(parent, nil)
			return nil
		}, []string{"NewContext", "nil"}},
		{"NewContext/mode/composite", nil, true, func(*badFixture) error {
			fwd.NewContext(context.Background(), &fwd.ForwardContext{GraphMode: fwd.GraphFullDecodeOnly})
			return nil
		}, []string{"FULL_DECODE_ONLY"}},
		{"NewContext/mode/unknown", nil, true, func(*badFixture) error {
			fwd.NewContext(context.Background(), &fwd.ForwardContext{GraphMode: unknown})
			return nil
		}, []string{"GraphMode(9)"}},
		{"MustFromContext/outside", fwd.ErrNoForwardContext, true, func(*badFixture) error { fwd.MustFromContext(context.Background()); return nil }, nil},
		{"MustFromContext/hidden", fwd.ErrNoForwardContext, true, func(x *badFixture) error { fwd.MustFromContext(badHidden(x)); return nil }, nil},
		{"AttnMetadata/outside", fwd.ErrNoForwardContext, false, badMiss(fwd.AttnMetadata[string], outside, "attn"), []string{"attention metadata", `"attn"`}},
		{"AttnMetadata/hidden", fwd.ErrNoForwardContext, false, badMiss(fwd.AttnMetadata[string], badHidden, "attn"), []string{`"attn"`}},
		{"AttnMetadata/none", fwd.ErrNoMetadata, false, badMiss(fwd.AttnMetadata[string], inDPPass, "attn"), []string{"attention metadata", `"attn"`}},
		{"AttnMetadata/unknown layer", fwd.ErrLayer, false, badMiss(fwd.AttnMetadata[string], inPass, "mamba"), []string{`"mamba"`, "[attn]"}},
		{"AttnMetadata/no name", fwd.ErrLayer, false, badMiss(fwd.AttnMetadata[string], inPass, ""), []string{`""`, "[attn]"}},
		{"AttnMetadata/type", fwd.ErrLayer, false, badMiss(fwd.AttnMetadata[[]int], inPass, "attn"), []string{`"attn"`, "string", "[]int"}},
		{"AttnMetadata/interface", fwd.ErrLayer, false, badMiss(fwd.AttnMetadata[fmt.Stringer], inPass, "attn"), []string{`"attn"`, "string", "fmt.Stringer"}},
		{"AttnMetadata/split pass", invalid, false, badMiss(fwd.AttnMetadata[string], inSplitPass, "attn"), []string{`"attn"`, "microbatch"}},
		{"SlotMapping/outside", fwd.ErrNoForwardContext, false, badMiss(fwd.SlotMapping[string], outside, "attn"), []string{"slot mapping", `"attn"`}},
		{"SlotMapping/none", fwd.ErrNoMetadata, false, badMiss(fwd.SlotMapping[string], inDPPass, "attn"), []string{"slot mapping", `"attn"`}},
		{"SlotMapping/unknown layer", fwd.ErrLayer, false, badMiss(fwd.SlotMapping[string], inPass, "mamba"), []string{`"mamba"`, "[attn]"}},
		{"SlotMapping/type", fwd.ErrLayer, false, badMiss(fwd.SlotMapping[int], inPass, "attn"), []string{"string", "int"}},
		{"SlotMapping/split pass", invalid, false, badMiss(fwd.SlotMapping[string], inSplitPass, "attn"), []string{"slot mapping", "microbatch"}},
		{"Layer/outside", fwd.ErrNoForwardContext, false, badMiss(fwd.Layer[string], outside, "mlp"), []string{`"mlp"`}},
		{"Layer/none", fwd.ErrLayer, false, badMiss(fwd.Layer[string], inDPPass, "mlp"), []string{`"mlp"`, "[]"}},
		{"Layer/unknown", fwd.ErrLayer, false, badMiss(fwd.Layer[string], inPass, "attn"), []string{`"attn"`, "[mlp]"}},
		{"Layer/type", fwd.ErrLayer, false, badMiss(fwd.Layer[*fwd.Runner], inPass, "mlp"), []string{"string", "*fwd.Runner"}},

		// A pass, to Run and Start.
		{"Run/forward/nil", invalid, false, func(x *badFixture) error { return x.alone.Run(context.Background(), fwd.Pass{NumTokens: 5}, nil) }, []string{"forward function", "5"}},
		{"Run/nil Runner, forward/nil", invalid, false, func(*badFixture) error {
			return (*fwd.Runner)(nil).Run(context.Background(), fwd.Pass{}, nil)
		}, []string{"forward function"}},
		{"Run/nil Runner, mode", invalid, false, func(*badFixture) error {
			return (*fwd.Runner)(nil).Run(context.Background(), fwd.Pass{GraphMode: unknown}, nothing)
		}, []string{"GraphMode(9)"}},
		{"Run/tokens/negative", invalid, false, badRun(fwd.Pass{NumTokens: -7}), []string{"NumTokens", "-7"}},
		{"Run/tokens/huge", invalid, false, badRun(fwd.Pass{NumTokens: badMany}), []string{"NumTokens", many}},
		{"Run/unpadded/negative", invalid, false, badRun(fwd.Pass{NumTokens: 5, NumTokensUnpadded: -6}), []string{"-6", "5"}},
		{"Run/unpadded/above padded", invalid, false, badRun(fwd.Pass{NumTokens: 5, NumTokensUnpadded: 6}), []string{"6 unpadded", "5 in the pass"}},
		{"Run/graph/below unpadded", invalid, false, badRun(fwd.Pass{NumTokens: 9, NumTokensUnpadded: 8, NumTokensGraph: 7}), []string{"8", "7", "9"}},
		{"Run/graph/above padded", invalid, false, badRun(fwd.Pass{NumTokens: 9, NumTokensUnpadded: 8, NumTokensGraph: 10}), []string{"8", "10", "9"}},
		{"Run/graph/negative", invalid, false, badRun(fwd.Pass{NumTokens: 9, NumTokensGraph: -1}), []string{"-1", "9"}},
		{"Run/requests/negative", invalid, false, badRun(fwd.Pass{NumReqs: -2}), []string{"NumReqs", "-2"}},
		{"Run/engine/negative", invalid, false, badRun(fwd.Pass{VirtualEngine: -1}), []string{"VirtualEngine", "-1"}},
		{"Run/mode/composite", invalid, false, badRun(fwd.Pass{GraphMode: fwd.GraphFullAndPiecewise}), []string{"FULL_AND_PIECEWISE"}},
		{"Run/mode/unknown", invalid, false, badRun(fwd.Pass{GraphMode: unknown}), []string{"GraphMode(9)"}},
		{"Run/reason/unknown", invalid, false, badRun(fwd.Pass{Reason: 99}), []string{"Reason(99)"}},
		{"Run/batch/tokens", invalid, false, badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumTokens: -1}}), []string{"NumTokens", "-1"}},
		{"Run/batch/requests", invalid, false, badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumReqs: badMany}}), []string{"NumReqs", many}},
		{"Run/batch/adapters", invalid, false, badRun(fwd.Pass{Batch: fwd.BatchDescriptor{NumActiveLoRAs: -4}}), []string{"NumActiveLoRAs", "-4"}},
		{"Run/several", invalid, false, badRun(fwd.Pass{NumTokens: -7, NumReqs: -8, VirtualEngine: -9, GraphMode: unknown}), []string{"-7", "-8", "-9", "GraphMode(9)"}},

		// Slices and metadata of a pass.
		{"Run/slices/gap", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 3}, [4]int{1, 2, 4, 8})}), []string{"microbatch 1", "token 4", "3"}},
		{"Run/slices/overlap", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 5}, [4]int{1, 2, 4, 8})}), []string{"microbatch 1", "token 4", "5"}},
		{"Run/slices/late start", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 1, 4}, [4]int{1, 2, 4, 8})}), []string{"microbatch 0", "token 1"}},
		{"Run/slices/short", invalid, false, badRun(fwd.Pass{NumTokens: 9, UBatches: halves}), []string{"token 8", "9"}},
		{"Run/slices/long", invalid, false, badRun(fwd.Pass{NumTokens: 7, UBatches: halves}), []string{"token 8", "7"}},
		{"Run/slices/no tokens", invalid, false, badRun(fwd.Pass{NumTokens: 4, UBatches: badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 4})}), []string{"microbatch 1", "tokens [4, 4)"}},
		{"Run/slices/no requests", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 0, 4}, [4]int{1, 1, 4, 8})}), []string{"microbatch 1", "requests [1, 1)"}},
		{"Run/slices/zero", invalid, false, badRun(fwd.Pass{UBatches: make([]fwd.UBatchSlice, 1)}), []string{"microbatch 0", "[0, 0)"}},
		{"Run/slices/backwards", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 1, 4, 0}, [4]int{1, 2, 4, 8})}), []string{"microbatch 0", "tokens [4, 0)"}},
		{"Run/slices/swapped", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{1, 2, 4, 8}, [4]int{0, 1, 0, 4})}), []string{"microbatch 0", "token 4"}},
		{"Run/slices/requests go back", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{1, 3, 0, 4}, [4]int{0, 2, 4, 8})}), []string{"microbatch 1", "[0, 2)", "[1, 3)"}},
		{"Run/slices/requests end earlier", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{0, 3, 0, 4}, [4]int{1, 2, 4, 8})}), []string{"microbatch 1", "[1, 2)", "[0, 3)"}},
		{"Run/slices/negative request", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{-1, 1, 0, 8})}), []string{"microbatch 0", "[-1, 1)"}},
		{"Run/slices/extremes", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: badUBatches([4]int{math.MinInt, math.MaxInt, math.MinInt, math.MaxInt})}), []string{"microbatch 0", fmt.Sprint(math.MinInt), fmt.Sprint(math.MaxInt)}},
		{"Run/metadata/two maps, no slices", invalid, false, badRun(fwd.Pass{AttnMetadata: metadata(2)}), []string{"AttnMetadata has 2", "0 microbatches"}},
		{"Run/metadata/one map, two slices", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: halves, AttnMetadata: metadata(1)}), []string{"AttnMetadata has 1", "2 microbatches"}},
		{"Run/metadata/three maps, two slices", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: halves, AttnMetadata: metadata(3)}), []string{"AttnMetadata has 3", "2 microbatches"}},
		{"Run/slots/two maps, no slices", invalid, false, badRun(fwd.Pass{SlotMapping: metadata(2)}), []string{"SlotMapping has 2", "0 microbatches"}},
		{"Run/slots/one map, two slices", invalid, false, badRun(fwd.Pass{NumTokens: 8, UBatches: halves, SlotMapping: metadata(1)}), []string{"SlotMapping has 1", "2 microbatches"}},

		// A data-parallel pass.
		{"Run/dp/no tokens", invalid, false, badRun(fwd.Pass{NumTokensAcrossDP: badTokens(0, 8)}), []string{"rank 0", "1 peers"}},
		{"Run/dp/mismatch", fwd.ErrTokenMismatch, false, badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(8, 8)}), []string{"rank 0", "6 tokens", "8"}},
		{"Run/dp/length", invalid, false, badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(6, 8, 8)}), []string{"3", "2"}},
		{"Run/dp/empty", invalid, false, badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: &mat.VecDense{}}), []string{"no token counts", "2"}},
		{"Run/dp/fraction", invalid, false, badRun(fwd.Pass{NumTokens: 6, NumTokensAcrossDP: badTokens(6, 8.5)}), []string{"rank 1", "8.5"}},
		{"Run/dp/agreement without counts", invalid, false, badRun(fwd.Pass{NumTokens: 6, Agreement: &fwd.Agreement{}}), []string{"no token counts", "2"}},
		{"Run/dp/agreement of others", fwd.ErrTokenMismatch, false, badRun(fwd.Pass{NumTokens: 6, Agreement: &fwd.Agreement{NumTokensAcrossDP: badTokens(7, 6)}}), []string{"rank 0", "6", "7"}},
		{"Run/dp/unequal slices", invalid, false, badRun(fwd.Pass{NumTokens: 8, NumTokensAcrossDP: badTokens(8, 9), UBatches: halves}), []string{"rank 0 has 8", "9"}},
		{"Run/dp/slices without counts", invalid, false, func(x *badFixture) error {
			return x.pair[0].Run(context.Background(), fwd.Pass{NumTokens: 8, UBatches: halves}, nothing)
		}, []string{"2 microbatches"}},
		{"Run/dp/no coordinator", invalid, false, func(*badFixture) error {
			r, err := fwd.New(fwd.Config{Parallel: two}, fwd.WithCoordinator(nil))
			if err != nil {
				return fmt.Errorf("New: %v", err)
			}
			return r.Run(context.Background(), fwd.Pass{NumTokens: 8}, nothing)
		}, []string{"rank 0 of 2", "coordinator"}},

		// NewDPMetadata and its arithmetic.
		{"NewDPMetadata/config", invalid, false, badDP(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 2}, 6, badTokens(6, 8)), []string{"DataParallelRank is 2"}},
		{"NewDPMetadata/size/negative", invalid, false, badDP(fwd.ParallelConfig{DataParallelSize: -2}, 6, badTokens(6, 8)), []string{"DataParallelSize is -2"}},
		{"NewDPMetadata/counts/nil", invalid, false, badDP(two, 6, nil), []string{"no token counts", "2"}},
		{"NewDPMetadata/counts/few", invalid, false, badDP(two, 6, badTokens(6)), []string{"1 token counts", "2"}},
		{"NewDPMetadata/counts/not of the default size", invalid, false, badDP(fwd.ParallelConfig{}, 6, badTokens(6, 8)), []string{"2 token counts", "1"}},
		{"NewDPMetadata/own/other", fwd.ErrTokenMismatch, false, badDP(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 6, badTokens(6, 8)), []string{"rank 1", "6", "8"}},
		{"NewDPMetadata/own/NaN", fwd.ErrTokenMismatch, false, badDP(two, 6, badTokens(nan, 8)), []string{"rank 0", "6", "NaN"}},
		{"NewDPMetadata/own/negative", invalid, false, badDP(two, -6, badTokens(-6, 8)), []string{"rank 0", "-6"}},
		{"NewDPMetadata/own/before the others", fwd.ErrTokenMismatch, false, badDP(two, 6, badTokens(7, nan)), []string{"rank 0", "6", "7"}},
		{"NewDPMetadata/other/NaN", invalid, false, badDP(two, 6, badTokens(6, nan)), []string{"rank 1", "NaN"}},
		{"NewDPMetadata/other/infinite", invalid, false, badDP(two, 6, badTokens(6, inf)), []string{"rank 1", "+Inf"}},
		{"NewDPMetadata/other/minus infinite", invalid, false, badDP(two, 6, badTokens(6, -inf)), []string{"rank 1", "-Inf"}},
		{"NewDPMetadata/other/fraction", invalid, false, badDP(two, 6, badTokens(6, 0.5)), []string{"rank 1", "0.5"}},
		{"NewDPMetadata/other/tiny", invalid, false, badDP(two, 6, badTokens(6, math.SmallestNonzeroFloat64)), []string{"rank 1", "5e-324"}},
		{"NewDPMetadata/other/negative", invalid, false, badDP(two, 6, badTokens(6, -1)), []string{"rank 1", "-1"}},
		{"NewDPMetadata/other/huge", invalid, false, badDP(two, 6, badTokens(6, 1<<31)), []string{"rank 1", "2.147483648e+09", "2147483647"}},
		{"NewDPMetadata/other/beyond int", invalid, false, badDP(two, 6, badTokens(6, 1e300)), []string{"rank 1", "1e+300"}},
		{"NumTokens/rank/negative", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.NumTokens(-1) }), []string{"rank -1", "1"}},
		{"NumTokens/rank/size", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.NumTokens(2) }), []string{"rank 2", "0 to 1"}},
		{"AppendSPLocalSizes/sp/zero", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendSPLocalSizes(nil, 0) }), []string{"SP size 0"}},
		{"AppendSPLocalSizes/sp/negative", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendSPLocalSizes(nil, -8) }), []string{"SP size -8"}},
		{"AppendSPLocalSizes/sp/huge", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendSPLocalSizes(nil, 1<<23+1) }), []string{"SP size 8388609", "8388608", "2 data-parallel ranks"}},
		{"AppendSPLocalSizes/sp/max int", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendSPLocalSizes(nil, math.MaxInt) }), []string{fmt.Sprint(math.MaxInt)}},
		{"AppendChunkedSizes/sp/zero", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendChunkedSizes(nil, 0, 1, 0) }), []string{"SP size 0"}},
		{"AppendChunkedSizes/sp/huge", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendChunkedSizes(nil, math.MaxInt32, 1, 0) }), []string{"SP size 2147483647"}},
		{"AppendChunkedSizes/chunk/zero", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendChunkedSizes(nil, 1, 0, 3) }), []string{"chunk 3", "0 tokens"}},
		{"AppendChunkedSizes/index/negative", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.AppendChunkedSizes(nil, 1, 4, -1) }), []string{"chunk -1", "4 tokens"}},
		{"NumChunks/sp/zero", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.NumChunks(0, 4) }), []string{"SP size 0"}},
		{"NumChunks/chunk/negative", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.NumChunks(1, -4) }), []string{"-4 tokens"}},
		{"CuTokensAcrossSPTo/sp/zero", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.CuTokensAcrossSPTo(nil, 0) }), []string{"SP size 0"}},
		{"CuTokensAcrossSPTo/sp/huge", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.CuTokensAcrossSPTo(nil, 1<<30) }), []string{"SP size 1073741824"}},
		{"CuTokensAcrossSPTo/dst/length", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.CuTokensAcrossSPTo(mat.NewVecDense(2, nil), 2) }), []string{"length 2", "4"}},
		{"NumTokensAcrossDPTo/dst/length", nil, true, badArithmetic(func(m *fwd.DPMetadata) { m.NumTokensAcrossDPTo(mat.NewVecDense(3, nil)) }), []string{"length 3", "2"}},

		// Derived contexts and chunks.
		{"WithSPLocalSizes/outside", fwd.ErrNoForwardContext, false, badCtx(func(*badFixture) (context.Context, error) { return fwd.WithSPLocalSizes(context.Background(), 1) }), nil},
		{"WithSPLocalSizes/hidden", fwd.ErrNoForwardContext, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithSPLocalSizes(badHidden(x), 1) }), nil},
		{"WithSPLocalSizes/sp/zero", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithSPLocalSizes(x.dpCtx, 0) }), []string{"SP size 0", "2 data-parallel ranks"}},
		{"WithSPLocalSizes/sp/huge", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithSPLocalSizes(x.dpCtx, 1<<24) }), []string{"SP size 16777216", "8388608"}},
		{"WithSPLocalSizes/sp/huge, alone", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithSPLocalSizes(x.ctx, 1<<24+1) }), []string{"SP size 16777217", "1 data-parallel ranks"}},
		{"WithSPLocalSizes/tokens/negative", invalid, false, badCtx(func(*badFixture) (context.Context, error) {
			return fwd.WithSPLocalSizes(fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: -5}), 1)
		}), []string{"-5 tokens"}},
		{"WithChunkedSizes/outside", fwd.ErrNoForwardContext, false, badCtx(func(*badFixture) (context.Context, error) { return fwd.WithChunkedSizes(context.Background(), 1, 0, 0) }), nil},
		{"WithChunkedSizes/sp/negative", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithChunkedSizes(x.ctx, -1, 4, 0) }), []string{"SP size -1"}},
		{"WithChunkedSizes/chunk/zero", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithChunkedSizes(x.dpCtx, 1, 0, 5) }), []string{"chunk 5", "0 tokens"}},
		{"WithChunkedSizes/index/negative", invalid, false, badCtx(func(x *badFixture) (context.Context, error) { return fwd.WithChunkedSizes(x.dpCtx, 1, 4, -2) }), []string{"chunk -2", "4 tokens"}},
		{"Chunks/outside", fwd.ErrNoForwardContext, false, badChunks(outside, 1, 4), nil},
		{"Chunks/sp/zero", invalid, false, badChunks(inDPPass, 0, 4), []string{"SP size 0"}},
		{"Chunks/sp/huge", invalid, false, badChunks(inDPPass, math.MaxInt, 4), []string{fmt.Sprint(math.MaxInt)}},
		{"Chunks/chunk/zero", invalid, false, badChunks(inPass, 1, 0), []string{"0 tokens"}},
		{"Chunks/chunk/negative", invalid, false, badChunks(inDPPass, 1, math.MinInt), []string{fmt.Sprint(math.MinInt)}},

		// Votes.
		{"Agree/none", invalid, false, badAgree(2), []string{"0 votes"}},
		{"Agree/many", invalid, false, func(*badFixture) error {
			_, err := fwd.Agree(make([]fwd.Vote, badOverranks), 2)
			return err
		}, []string{"1048577 votes"}},
		{"Agree/microbatches/negative", invalid, false, badAgree(-1, good), []string{"-1 microbatches"}},
		{"Agree/microbatches/huge", invalid, false, badAgree(badMany, good), []string{many}},
		{"Agree/tokens/negative", invalid, false, badAgree(2, good, negative), []string{"rank 1", "-3"}},
		{"Agree/tokens/huge", invalid, false, badAgree(2, good, fwd.Vote{Step: 1, NumTokensPadded: badMany}), []string{"with padding", many}},
		{"Agree/padded below unpadded", invalid, false, badAgree(2, good, shrinking), []string{"rank 1", "4", "8"}},
		{"Agree/mode/composite", invalid, false, badAgree(2, composite, good), []string{"rank 0", "FULL_AND_PIECEWISE"}},
		{"Agree/steps", fwd.ErrLockstep, false, badAgree(2, good, fwd.Vote{Step: 7}, good), []string{"[1 7 1]", "step 7", "[0 2]"}},
		{"Exchange/tokens/negative", invalid, false, badExchange(negative), []string{"rank 0", "-3"}},
		{"Exchange/tokens/huge", invalid, false, badExchange(fwd.Vote{NumTokens: badMany, NumTokensPadded: badMany}), []string{many}},
		{"Exchange/padded below unpadded", invalid, false, badExchange(shrinking), []string{"rank 0", "4", "8"}},
		{"Exchange/mode/composite", invalid, false, badExchange(composite), []string{"rank 0", "FULL_AND_PIECEWISE"}},
		{"Exchange/mode/unknown", invalid, false, badExchange(fwd.Vote{GraphMode: unknown}), []string{"GraphMode(9)"}},
		{"Exchange/step/the last one", fwd.ErrLockstep, false, func(x *badFixture) error {
			votes, err := x.group[1].Exchange(context.Background(), fwd.Vote{Step: x.groupStep})
			return badRefused(err, votes)
		}, []string{"rank 1", "twice"}},
		{"NewLocalGroup/zero", invalid, false, badGroup(0), []string{"0 ranks", "1048576"}},
		{"NewLocalGroup/negative", invalid, false, badGroup(-4), []string{"-4 ranks"}},
		{"NewLocalGroup/huge", invalid, false, badGroup(badOverranks), []string{"1048577 ranks", "1048576"}},
		{"NewLocalGroup/max int", invalid, false, badGroup(math.MaxInt), []string{fmt.Sprint(math.MaxInt)}},
		{"coordinator/no votes", invalid, false, badCoordinated(func([]fwd.Vote) []fwd.Vote { return nil }), []string{"0 votes", "2 ranks"}},
		{"coordinator/few votes", invalid, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { return v[:1] }), []string{"1 votes", "2 ranks"}},
		{"coordinator/many votes", invalid, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { return append(v, v...) }), []string{"4 votes", "2 ranks"}},
		{"coordinator/own vote changed", fwd.ErrLockstep, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[0].NumTokens = 4; return v }), []string{"rank 0", "NumTokens:4", "NumTokens:5"}},
		{"coordinator/own vote of another step", fwd.ErrLockstep, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[0].Step, v[1].Step = 0, 0; return v }), []string{"Step:0", "Step:1"}},
		{"coordinator/steps", fwd.ErrLockstep, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].Step = 6; return v }), []string{"[1 6]"}},
		{"coordinator/peer/negative", invalid, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].NumTokens = -9; return v }), []string{"-9"}},
		{"coordinator/peer/mode", invalid, false, badCoordinated(func(v []fwd.Vote) []fwd.Vote { v[1].GraphMode = fwd.GraphFullDecodeOnly; return v }), []string{"rank 1", "FULL_DECODE_ONLY"}},

		// Plan.
		{"Plan/nothing", invalid, false, func(x *badFixture) error {
			pass, err := x.alone.Plan(context.Background(), fwd.Schedule{})
			return badRefused(err, pass)
		}, []string{"nothing is scheduled"}},
		{"Plan/nil Runner, nothing", invalid, false, func(*badFixture) error {
			pass, err := (*fwd.Runner)(nil).Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{}})
			return badRefused(err, pass)
		}, []string{"nothing is scheduled"}},
		{"Plan/tokens/negative", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{4, -1}}), []string{"request 1", "-1"}},
		{"Plan/tokens/huge", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{badMany}}), []string{"request 0", many}},
		{"Plan/tokens/sum", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{math.MaxInt32, 3, 1}}), []string{"2147483650", "2147483647"}},
		{"Plan/tokens/zero", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{0, 0, 0}}), []string{"3 requests"}},
		{"Plan/adapters/negative", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{1}, NumActiveLoRAs: -2}), []string{"NumActiveLoRAs", "-2"}},
		{"Plan/several", invalid, false, badPlan(fwd.Schedule{NumScheduledTokens: []int{-5}, NumActiveLoRAs: -2}), []string{"request 0", "-5", "NumActiveLoRAs", "-2"}},
		{"Plan/no coordinator", invalid, false, func(*badFixture) error {
			r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 3, DataParallelRank: 2}})
			if err != nil {
				return fmt.Errorf("New: %v", err)
			}
			pass, err := r.Plan(context.Background(), fwd.Schedule{})
			return badRefused(err, pass)
		}, []string{"rank 2 of 3", "coordinator"}},
		{"Plan/ranks with other sizes", invalid, false, func(x *badFixture) error {
			peer := badCoordinator{func(v []fwd.Vote) []fwd.Vote {
				v[1].NumTokens, v[1].NumTokensPadded = 5, 6 // not a capture size here
				return v
			}}
			r, err := fwd.New(fwd.Config{Parallel: two}, fwd.WithDispatcher(x.dispatcher), fwd.WithCoordinator(peer))
			if err != nil {
				return fmt.Errorf("New: %v", err)
			}
			pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{3}})
			return badRefused(err, pass)
		}, []string{"PIECEWISE with 6 tokens", "PIECEWISE with 8 tokens", "rank 0", "configured differently"}},

		// Microbatches.
		{"SplitUBatches/request/negative", invalid, false, badSplit([]int{5, -2}, 8, 2, 2, 0), []string{"request 1", "-2"}},
		{"SplitUBatches/request/huge", invalid, false, badSplit([]int{badMany}, 8, 2, 2, 0), []string{"request 0", many}},
		{"SplitUBatches/sum", invalid, false, badSplit([]int{math.MaxInt32, math.MaxInt32}, math.MaxInt32, 2, 2, 0), []string{"4294967294", "2147483647"}},
		{"SplitUBatches/tokens/below", invalid, false, badSplit([]int{5, 5}, 9, 2, 2, 0), []string{"9", "10"}},
		{"SplitUBatches/tokens/negative", invalid, false, badSplit([]int{5, 5}, -1, 2, 2, 0), []string{"-1", "10"}},
		{"SplitUBatches/tokens/huge", invalid, false, badSplit([]int{5, 5}, badMany, 2, 2, 5), []string{many}},
		{"SplitUBatches/requests/below", invalid, false, badSplit([]int{5, 5}, 10, 1, 2, 0), []string{"1", "2"}},
		{"SplitUBatches/requests/negative", invalid, false, badSplit([]int{5, 5}, 10, -3, 2, 0), []string{"-3"}},
		{"SplitUBatches/n/zero", invalid, false, badSplit([]int{5, 5}, 10, 2, 0, 0), []string{"0 microbatches"}},
		{"SplitUBatches/n/one", invalid, false, badSplit([]int{5, 5}, 10, 2, 1, 0), []string{"1 microbatches"}},
		{"SplitUBatches/n/negative", invalid, false, badSplit([]int{5, 5}, 10, 2, -1, 0), []string{"-1 microbatches"}},
		{"SplitUBatches/n/above tokens", invalid, false, badSplit([]int{5, 5}, 10, 2, 11, 0), []string{"11 microbatches", "10"}},
		{"SplitUBatches/n/huge", invalid, false, badSplit([]int{5, 5}, 10, 2, math.MaxInt, 1), []string{fmt.Sprint(math.MaxInt)}},
		{"SplitUBatches/n/huge count", invalid, false, badSplit([]int{5, 5}, 10, 2, math.MaxInt32, math.MaxInt32), []string{"2147483647"}},
		{"SplitUBatches/split/negative", invalid, false, badSplit([]int{5, 5}, 10, 2, 2, -5), []string{"-5"}},
		{"SplitUBatches/split/all", invalid, false, badSplit([]int{5, 5}, 10, 2, 2, 10), []string{"10", "2 microbatches"}},
		{"SplitUBatches/split/huge", invalid, false, badSplit([]int{5, 5}, 10, 2, 3, math.MaxInt32), []string{"2147483647", "4294967294"}},
		{"SplitUBatches/padding only", invalid, false, badSplit([]int{5, 5}, 20, 2, 2, 0), []string{"token 10", "10 scheduled", "20 padded"}},
		{"SplitUBatches/nothing", invalid, false, badSplit(nil, 8, 0, 2, 4), []string{"0 scheduled"}},
		{"RunUBatches/function/nil", invalid, false, func(x *badFixture) error { return fwd.RunUBatches(x.split, nil) }, []string{"function"}},
		{"RunUBatches/outside", fwd.ErrNoForwardContext, false, func(*badFixture) error {
			return fwd.RunUBatches(context.Background(), func(context.Context, int) error { return errors.New("a microbatch ran") })
		}, nil},
		{"RunUBatches/slices/short", invalid, false, badUBatchRun(fwd.ForwardContext{NumTokens: 9, UBatches: halves}), []string{"token 8", "9"}},
		{"RunUBatches/slices/empty", invalid, false, badUBatchRun(fwd.ForwardContext{UBatches: make([]fwd.UBatchSlice, 2)}), []string{"microbatch 0", "microbatch 1"}},
		{"RunUBatches/metadata", invalid, false, badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: halves, AttnMetadata: metadata(1)}), []string{"AttnMetadata has 1", "2"}},
		{"RunUBatches/slots", invalid, false, badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: halves, SlotMapping: metadata(3)}), []string{"SlotMapping has 3", "2"}},
		{"RunUBatches/dp", invalid, false, func(x *badFixture) error {
			return badUBatchRun(fwd.ForwardContext{NumTokens: 8, UBatches: halves, DP: x.dp})(x)
		}, []string{"rank 0 has 6", "8"}},

		// Graph modes.
		{"ParseGraphMode/empty", invalid, false, func(*badFixture) error { m, err := fwd.ParseGraphMode(""); return badRefused(err, m) }, []string{`""`, "FULL_AND_PIECEWISE"}},
		{"ParseGraphMode/unknown", invalid, false, func(*badFixture) error { m, err := fwd.ParseGraphMode("FULL-ISH"); return badRefused(err, m) }, []string{`"FULL-ISH"`, "PIECEWISE"}},
		{"ParseGraphMode/space", invalid, false, func(*badFixture) error { m, err := fwd.ParseGraphMode(" NONE"); return badRefused(err, m) }, []string{`" NONE"`}},
		{"ParseGraphMode/long", invalid, false, func(*badFixture) error {
			_, err := fwd.ParseGraphMode(strings.Repeat("x", 1<<20))
			if len(err.Error()) > 400 {
				return fmt.Errorf("a message of %d bytes", len(err.Error()))
			}
			return err
		}, []string{`"xxxx`}},
		{"UnmarshalText/unknown", invalid, false, func(*badFixture) error {
			m := fwd.GraphFull
			err := m.UnmarshalText([]byte("EAGER"))
			return badRefused(err, m-fwd.GraphFull)
		}, []string{`"EAGER"`}},
		{"MarshalText/unknown", invalid, false, func(*badFixture) error { text, err := unknown.MarshalText(); return badRefused(err, text) }, []string{"GraphMode(9)"}},
		{"HasMode/composite", nil, true, func(*badFixture) error { fwd.GraphFull.HasMode(fwd.GraphFullDecodeOnly); return nil }, []string{"FULL_DECODE_ONLY"}},
		{"HasMode/unknown", nil, true, func(*badFixture) error { fwd.GraphFull.HasMode(unknown); return nil }, []string{"GraphMode(9)"}},

		// Dispatcher.
		{"NewDispatcher/mode/unknown", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.Mode = unknown }), []string{"GraphMode(9)"}},
		{"NewDispatcher/sizes/none", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = nil }), []string{"FULL_AND_PIECEWISE", "capture sizes"}},
		{"NewDispatcher/sizes/zero", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{0, 4} }), []string{"capture size 0", "index 0"}},
		{"NewDispatcher/sizes/negative", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{-8, 4} }), []string{"capture size -8", "index 0"}},
		{"NewDispatcher/sizes/huge", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{4, badMany} }), []string{"capture size " + many, "index 1"}},
		{"NewDispatcher/sizes/unsorted", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{2, 8, 4} }), []string{"4 follows 8", "index 2"}},
		{"NewDispatcher/sizes/duplicate", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{2, 4, 4} }), []string{"4 follows 4", "index 2"}},
		{"NewDispatcher/sizes/multiples", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes, c.UniformDecodeQueryLen = []int{3, 4, 6, 8}, 3 }), []string{"[4 8]", "3"}},
		{"NewDispatcher/sizes/multiples, FULL", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.Mode, c.UniformDecodeQueryLen = fwd.GraphFull, 4 }), []string{"[2]", "4"}},
		{"NewDispatcher/sizes/of an unused mode", invalid, false, badDispatcher(fwd.DispatcherConfig{CaptureSizes: []int{4, 2}}), []string{"2 follows 4"}},
		{"NewDispatcher/sequences/zero", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.MaxNumSeqs = 0 }), []string{"MaxNumSeqs 0", "FULL_AND_PIECEWISE"}},
		{"NewDispatcher/sequences/negative", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.MaxNumSeqs = -6 }), []string{"MaxNumSeqs is -6"}},
		{"NewDispatcher/sequences/huge", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.MaxNumSeqs = badMany }), []string{"MaxNumSeqs is " + many}},
		{"NewDispatcher/query/negative", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.UniformDecodeQueryLen = -1 }), []string{"UniformDecodeQueryLen is -1"}},
		{"NewDispatcher/query/huge", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.UniformDecodeQueryLen = badMany }), []string{"UniformDecodeQueryLen is " + many}},
		{"NewDispatcher/adapters/zero", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.LoRA = &fwd.LoRAConfig{} }), []string{"MaxLoRAs is 0"}},
		{"NewDispatcher/adapters/negative", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) { c.LoRA = &fwd.LoRAConfig{MaxLoRAs: -1} }), []string{"MaxLoRAs is -1"}},
		{"NewDispatcher/adapters/huge", invalid, false, badGraphs(func(c *fwd.DispatcherConfig) {
			c.LoRA = &fwd.LoRAConfig{MaxLoRAs: math.MaxInt32, SpecializeCount: true}
		}), []string{"MaxLoRAs is 2147483647"}},
		{"NewDispatcher/several", invalid, false, badDispatcher(fwd.DispatcherConfig{Mode: fwd.GraphFull, CaptureSizes: []int{9, -7}, MaxNumSeqs: -6, UniformDecodeQueryLen: -5, LoRA: &fwd.LoRAConfig{MaxLoRAs: -4}}), []string{"-7", "-6", "-5", "-4"}},
		{"Dispatch/tokens/negative", nil, true, func(x *badFixture) error { x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: -1}); return nil }, []string{"-1 tokens"}},
		{"Dispatch/adapters/negative", nil, true, func(x *badFixture) error {
			x.dispatcher.Dispatch(fwd.DispatchQuery{NumTokens: 3, NumActiveLoRAs: -2})
			return nil
		}, []string{"3 tokens", "-2 adapters"}},
		{"DefaultCaptureSizes/huge", nil, true, func(*badFixture) error { fwd.DefaultCaptureSizes(1<<24 + 1); return nil }, []string{"16777217", "16777216"}},
		{"DefaultCaptureSizes/max int", nil, true, func(*badFixture) error { fwd.DefaultCaptureSizes(math.MaxInt); return nil }, []string{fmt.Sprint(math.MaxInt)}},
		{"RoundCaptureSizes/multiple/zero", invalid, false, badRound(0, 1, 2), []string{"multiple is 0"}},
		{"RoundCaptureSizes/multiple/negative", invalid, false, badRound(-3), []string{"multiple is -3"}},
		{"RoundCaptureSizes/size/zero", invalid, false, badRound(2, 4, 0), []string{"capture size 0", "index 1"}},
		{"RoundCaptureSizes/size/negative", invalid, false, badRound(2, -4), []string{"capture size -4", "index 0"}},
		{"RoundCaptureSizes/none left", invalid, false, badRound(8, 3, 7), []string{"8", "7"}},
		{"RoundCaptureSizes/overflow", invalid, false, badRound(math.MaxInt-1, math.MaxInt), []string{fmt.Sprint(math.MaxInt), fmt.Sprint(math.MaxInt - 1)}},

		// Graph caches.
		{"NewGraphCache/mode/none", invalid, false, badCache(fwd.GraphNone, nothing, badCapture), []string{"NONE"}},
		{"SplitUBatches/n/memory", invalid, false, badSplit([]int{math.MaxInt32}, math.MaxInt32, 1, math.MaxInt32, 1), []string{"2147483647 microbatches"}},
		{"Exchange/ctx/nil", nil, true, func(x *badFixture) error {
			var ctx context.Context
			_, err := x.group[0].Exchange(ctx, fwd.Vote{Step: x.groupStep + 1})
			return err
		}, []string{"Exchange", "nil"}},
		{"NewGraphCache/mode/composite", invalid, false, badCache(fwd.GraphFullAndPiecewise, nothing, badCapture), []string{"FULL_AND_PIECEWISE"}},
		{"NewGraphCache/mode/unknown", invalid, false, badCache(unknown, nothing, badCapture), []string{"GraphMode(9)"}},
		{"NewGraphCache/forward/nil", invalid, false, badCache(fwd.GraphFull, nil, badCapture), []string{"forward function (nil: true)"}},
		{"NewGraphCache/capture/nil", invalid, false, badCache(fwd.GraphFull, nothing, nil), []string{"capture function (nil: true)"}},
		{"NewGraphCache/several", invalid, false, badCache(fwd.GraphNone, nil, nil), []string{"NONE", "forward", "capture"}},
		{"Forward/no descriptor", fwd.ErrNoDescriptor, false, func(x *badFixture) error { return x.cache.Forward(x.ctx) }, []string{"8 tokens", "FULL"}},
		{"Forward/closed", fwd.ErrCaptureClosed, false, func(x *badFixture) error { return x.closed.Forward(badFull()) }, []string{"FULL", "NumTokens:8"}},
		{"Forward/capture without graph", invalid, false, func(x *badFixture) error { return x.noGraph.Forward(badFull()) }, []string{"no graph", "NumTokens:8"}},
	}
}

// refuse makes the call and returns its error, or what it panicked with.
func (c *badCase) refuse(x *badFixture) (panicked any, err error) {
	defer func() { panicked = recover() }()
	return nil, c.call(x)
}

// TestBadInput makes every call that must be refused, and checks after each that nothing has been left half done.
func TestBadInput(t *testing.T) {
	cases := badCases()
	if len(cases) < 90 {
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
