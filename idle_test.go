// This file tests ranks that have nothing scheduled: they take whatever shape the others agree on, and if all
// are idle, nobody runs.

package fwd_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// An idle rank votes for the dummy batch, whatever else its schedule says.
func TestIdleVote(t *testing.T) {
	const none, full = fwd.GraphNone, fwd.GraphFull
	one, three, lora, onlyLoRA := planMixed(1), planMixed(3), planMixed(1), planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	onlyLoRA.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, Unspecialized: true}
	ubatch := fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 1, PrefillUBatchThreshold: 1}
	idle := func(v fwd.Vote) fwd.Vote { v.Idle, v.Uniform = true, true; return v }
	first := idle(planVote(1, 1, 0, full))
	adapters, note := first, first
	adapters.NumActiveLoRAs, note.Note = 1, 99
	checkVotes(t, []voteCase{
		{"no requests", ubatch, &one, fwd.Schedule{}, first},
		{"requests without tokens", ubatch, &one, planBatch(0, 0, 0), first},
		{"what it says of a batch", ubatch, &one, fwd.Schedule{
			AllowUBatches: true, ExcludeFull: true, Eager: true, Prefill: true, NumActiveLoRAs: 3, Note: 99,
		}, note},
		{"q=3", ubatch, &three, fwd.Schedule{}, idle(planVote(3, 3, 0, full))},
		{"graphs with and without adapters", ubatch, &lora, planLoRAs(3, planBatch(0)), first},
		{"graphs only with adapters", ubatch, &onlyLoRA, fwd.Schedule{}, adapters},
		{"no dispatcher", ubatch, nil, fwd.Schedule{}, idle(planVote(1, 1, 0, none))},
	})
}

// What an idle rank runs beside busy ones, which it neither lowers nor pads nor keeps from splitting.
func TestIdlePlan(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	const exact, relaxed, lowered = fwd.ReasonExact, fwd.ReasonRelaxed, fwd.ReasonDPRank
	const disabled = fwd.ReasonDisabled
	var ranks fwd.ParallelConfig
	one, three, onlyLoRA := planMixed(1), planMixed(3), planMixed(1)
	onlyLoRA.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, Unspecialized: true}
	small := fwd.DispatcherConfig{
		Mode: piecewise, CaptureSizes: []int{2, 4}, MaxNumSeqs: 8, UniformDecodeQueryLen: 5,
	}
	decode4 := planDecoding(planTokens{3, 4, 4, 3}, full, exact, planUniform(4, 4))
	fives := withLoRAs(5, planUniform(4, 4))
	checkPlans(t, []planCase{
		{"beside decode", ranks, &one, []planRank{
			{planDecode(3), decode4},
			{planBatch(0), planDummy(planTokens{1, 1, 4, 1}, full, exact, planUniform(4, 4))},
		}},
		{"beside prefill", ranks, &one, []planRank{
			{planBatch(11), planPass(planTokens{11, 16, 16, 1}, piecewise, relaxed, planKey(16))},
			{fwd.Schedule{}, planDummy(planTokens{1, 1, 16, 1}, piecewise, relaxed, planKey(16))},
		}},
		{"beside prefill of a size with full graphs", ranks, &one, []planRank{
			{planBatch(5), planPass(planTokens{5, 8, 8, 1}, piecewise, relaxed, planKey(8))},
			{fwd.Schedule{}, planDummy(planTokens{1, 1, 8, 1}, piecewise, fwd.ReasonFullExcluded, planKey(8))},
		}},
		{"q=3", ranks, &three, []planRank{
			{fwd.Schedule{}, planDummy(planTokens{3, 3, 6, 1}, full, exact, planUniform(6, 2))},
			{planBatch(3, 3), planDecoding(planTokens{6, 6, 6, 2}, full, exact, planUniform(6, 2))},
		}},
		{"beside a batch without graph: nobody pads", ranks, &three, []planRank{
			{fwd.Schedule{}, planDummy(planTokens{3, 3, 3, 1}, none, lowered, planKey(3))},
			{planBatch(49), planPass(planTokens{49, 49, 49, 1}, none, fwd.ReasonTooLarge, planKey(49))},
		}},
		{"q above every capture size", ranks, &small, []planRank{
			{planBatch(2), planPass(planTokens{2, 2, 4, 1}, piecewise, relaxed, planKey(4))},
			{fwd.Schedule{}, planDummy(planTokens{4, 4, 4, 1}, piecewise, relaxed, planKey(4))},
			{planBatch(3), planPass(planTokens{3, 4, 4, 1}, piecewise, relaxed, planKey(4))},
		}},
		{"q above every capture size, without graph", ranks, &small, []planRank{
			{planBatch(6), planPass(planTokens{6, 6, 6, 1}, none, fwd.ReasonTooLarge, planKey(6))},
			{fwd.Schedule{}, planDummy(planTokens{5, 5, 5, 1}, none, fwd.ReasonTooLarge, planKey(5))},
		}},
		{"graphs only with adapters", ranks, &onlyLoRA, []planRank{
			{planLoRAs(2, planDecode(3)), planDecoding(planTokens{3, 4, 4, 3}, full, exact, fives)},
			{fwd.Schedule{}, planDummy(planTokens{1, 1, 4, 1}, full, exact, fives)},
		}},
		{"without dispatcher", ranks, nil, []planRank{
			{fwd.Schedule{}, planDummy(planTokens{1, 1, 1, 1}, none, disabled, planKey(1))},
			{planBatch(5, 6), planPass(planTokens{11, 11, 11, 2}, none, disabled, planKey(11))},
		}},
	})
}

// An idle rank splits with the others, as one request of all its padded tokens.
func TestIdleSplit(t *testing.T) {
	const none, disabled, split = fwd.GraphNone, fwd.ReasonDisabled, fwd.ReasonUBatch
	one := planMixed(1)
	ubatch := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8, DecodeUBatchThreshold: 4}
	low := fwd.ParallelConfig{NumUBatches: 4, PrefillUBatchThreshold: 1, DecodeUBatchThreshold: 1}
	halves := [][4]int{{0, 1, 0, 6}, {0, 1, 6, 12}}
	busy := func(tokens int) fwd.Pass {
		return planPass(planTokens{tokens, tokens, 12, 1}, none, disabled, planKey(12))
	}
	checkPlans(t, []planCase{
		{"prefill", ubatch, nil, []planRank{
			{planSplit(planBatch(12)), planCut(busy(12), halves...)},
			{planBatch(0), planCut(planDummy(planTokens{1, 1, 12, 1}, none, disabled, planKey(12)), halves...)},
			{planSplit(planBatch(10)), planCut(busy(10), halves...)},
		}},
		{"decode with a graph's padding", ubatch, &one, []planRank{
			{planSplit(planDecode(7)), planCut(
				planDecoding(planTokens{7, 8, 8, 7}, none, split, planUniform(8, 8)),
				[4]int{0, 4, 0, 4}, [4]int{4, 8, 4, 8})},
			{fwd.Schedule{}, planCut(
				planDummy(planTokens{1, 1, 8, 1}, none, split, planUniform(8, 8)),
				[4]int{0, 1, 0, 4}, [4]int{0, 8, 4, 8})},
		}},
		{"fewer tokens than microbatches: nobody splits, all pad", low, nil, []planRank{
			{planSplit(planBatch(3)), planPass(planTokens{3, 3, 3, 1}, none, disabled, planKey(3))},
			{fwd.Schedule{}, planDummy(planTokens{1, 1, 3, 1}, none, disabled, planKey(3))},
		}},
	})
}

// An idle rank's pass runs as what the others agreed on: graph, microbatches, counts.
func TestIdleRuns(t *testing.T) {
	t.Parallel()
	one := planMixed(1)
	ubatch := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}
	runners, _ := planGroup(t, ubatch, &one, 2)
	for _, busy := range []fwd.Schedule{planDecode(3), planSplit(planBatch(12))} {
		passes := planOf(t, runners, busy, fwd.Schedule{})
		seen := make([]fwd.ForwardContext, 2)
		for rank, r := range runners {
			err := r.Run(t.Context(), passes[rank], func(ctx context.Context) error {
				seen[rank] = *fwd.MustFromContext(ctx)
				return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
			})
			if err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
		}
		if !seen[1].Dummy || seen[0].Dummy {
			t.Errorf("the busy rank's pass is dummy: %t, the idle one's: %t", seen[0].Dummy, seen[1].Dummy)
		}
		a, b := seen[0], seen[1]
		if a.GraphMode != b.GraphMode || a.Batch != b.Batch || a.NumTokens != b.NumTokens ||
			len(a.UBatches) != len(b.UBatches) || b.DP.MaxTokensAcrossDP() != a.NumTokens {
			t.Errorf("the busy rank runs %+v, the idle one %+v", a, b)
		}
	}
}

// If every rank is idle, Run returns without calling anything, Start refuses and Report tells nothing. Run
// and Report use the pass up.
func TestAllIdle(t *testing.T) {
	t.Parallel()
	calls := 0
	count := fwd.WithMiddleware(func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { calls++; return next(ctx) }
	})
	recorder := fwd.NewRecorder(4)
	sync1 := fwd.WithSynchronize(func(context.Context) error { calls++; return nil })
	group := localGroup(t, 2)
	r := groupRunner(t, group[0], count, sync1, fwd.WithObserver(recorder.Observe))
	peer := groupRunner(t, group[1], count)
	runners := []*fwd.Runner{r, peer}
	forward := func(context.Context) error { calls++; return nil }
	for step := range 3 {
		pass := planOf(t, runners, fwd.Schedule{}, planBatch(0, 0))[0]
		if !pass.Agreement.Idle || !pass.Dummy || pass.GraphMode != fwd.GraphNone || len(pass.UBatches) > 0 {
			t.Errorf("all ranks are idle, and the plan is %+v of %+v", pass, pass.Agreement)
		}
		var err error
		switch step {
		case 0:
			err = r.Run(t.Context(), pass, forward)
		case 1:
			var got int
			got, err = fwd.Call(t.Context(), r, pass, func(context.Context) (int, error) { calls++; return 7, nil })
			if got != 0 {
				t.Errorf("Call returned %d", got)
			}
		case 2:
			ctx, end, startErr := r.Start(t.Context(), pass)
			if end(nil); !errors.Is(startErr, fwd.ErrInvalid) || ctx != t.Context() {
				t.Errorf("Start: %v, want %v and the ctx as it was", startErr, fwd.ErrInvalid)
			}
			err = r.Report(t.Context(), pass, time.Time{}, time.Time{}.Add(1), nil)
		}
		if err != nil {
			t.Errorf("way %d: %v", step, err)
		}
		if err := r.Run(t.Context(), pass, forward); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("way %d, again: %v, want %v", step, err, fwd.ErrInvalid)
		}
	}
	if records := recorder.Recent(); calls > 0 || len(records) > 0 {
		t.Errorf("%d calls and the records %+v of passes that nobody runs", calls, records)
	}
	// Nothing is left behind: the next step is an ordinary one.
	passes := planOf(t, runners, planBatch(1), fwd.Schedule{})
	for rank, r := range runners {
		if err := r.Run(t.Context(), passes[rank], nothing); err != nil {
			t.Errorf("rank %d: %v", rank, err)
		}
	}
	if len(recorder.Recent()) != 1 || passes[0].Agreement.Step != 4 {
		t.Errorf("step %d has the records %+v", passes[0].Agreement.Step, recorder.Recent())
	}
}
