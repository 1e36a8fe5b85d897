// This file tests Plan, alone and across ranks, and that Run takes its passes.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/forwardctx/fwd"
)

// planCase is a step that is planned on all ranks.
type planCase struct {
	name     string
	parallel fwd.ParallelConfig
	graphs   *fwd.DispatcherConfig // nil: none
	ranks    []planRank
}

// planRank is what is scheduled on a rank, and what comes out.
type planRank struct {
	schedule fwd.Schedule
	want     fwd.Pass // without Agreement
}

// planGroup makes the Runners of so many ranks.
func planGroup(
	t *testing.T, parallel fwd.ParallelConfig, graphs *fwd.DispatcherConfig, size int,
) ([]*fwd.Runner, []*groupTap) {
	t.Helper()
	runners, taps := make([]*fwd.Runner, size), make([]*groupTap, size)
	var d *fwd.Dispatcher
	if graphs != nil {
		d = planDispatcher(t, *graphs)
	}
	for rank, c := range localGroup(t, size) {
		taps[rank] = &groupTap{Coordinator: c}
		r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithCoordinator(taps[rank]), fwd.WithDispatcher(d))
		if err != nil {
			t.Fatal(err)
		}
		runners[rank] = r
	}
	return runners, taps
}

// planStep plans a step on all ranks concurrently.
func planStep(
	ctx context.Context, runners []*fwd.Runner, schedule func(rank int) fwd.Schedule,
) ([]fwd.Pass, []error) {
	passes, errs := make([]fwd.Pass, len(runners)), make([]error, len(runners))
	var wg sync.WaitGroup
	for rank, r := range runners {
		wg.Go(func() { passes[rank], errs[rank] = r.Plan(ctx, schedule(rank)) })
	}
	wg.Wait()
	return passes, errs
}

// planOf plans a step with these schedules.
func planOf(t *testing.T, runners []*fwd.Runner, schedules ...fwd.Schedule) []fwd.Pass {
	t.Helper()
	passes, errs := planStep(t.Context(), runners, func(rank int) fwd.Schedule { return schedules[rank] })
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return passes
}

// planDiff compares plans without their agreements.
func planDiff(want, got fwd.Pass) string {
	return cmp.Diff(want, got, cmpopts.IgnoreFields(fwd.Pass{}, "Agreement"),
		cmpopts.IgnoreUnexported(fwd.Pass{}), cmpopts.EquateEmpty(), groupAgreement)
}

func planRequests(n, tokens int) []int {
	reqs := make([]int, n)
	for i := range reqs {
		reqs[i] = tokens
	}
	return reqs
}

// planBatch schedules requests with these tokens, and planDecode n requests with one token each.
func planBatch(tokens ...int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: tokens} }

func planDecode(n int) fwd.Schedule { return planBatch(planRequests(n, 1)...) }

func planSplit(s fwd.Schedule) fwd.Schedule { s.AllowUBatches = true; return s }

func planEager(s fwd.Schedule) fwd.Schedule { s.Eager = true; return s }

func planLoRAs(n int, s fwd.Schedule) fwd.Schedule { s.NumActiveLoRAs = n; return s }

// planKey is the key of a graph for mixed batches, and planUniform that of one for uniform decode batches.
func planKey(tokens int) fwd.BatchDescriptor { return fwd.BatchDescriptor{NumTokens: tokens} }

func planUniform(tokens, reqs int) fwd.BatchDescriptor {
	return fwd.BatchDescriptor{NumTokens: tokens, NumReqs: reqs, Uniform: true}
}

func withLoRAs(n int, d fwd.BatchDescriptor) fwd.BatchDescriptor {
	d.HasLoRA, d.NumActiveLoRAs = true, n
	return d
}

// planTokens are the counts of a pass: unpadded, after graph padding, final, and the requests.
type planTokens [4]int

// planPass is the plan of a mixed batch, and planDecoding that of a uniform decode batch.
func planPass(n planTokens, mode fwd.GraphMode, reason fwd.Reason, batch fwd.BatchDescriptor) fwd.Pass {
	return fwd.Pass{
		NumTokensUnpadded: n[0], NumTokensGraph: n[1], NumTokens: n[2], NumReqs: n[3],
		GraphMode: mode, Reason: reason, Batch: batch, Phase: "mixed",
	}
}

func planDecoding(n planTokens, mode fwd.GraphMode, reason fwd.Reason, batch fwd.BatchDescriptor) fwd.Pass {
	p := planPass(n, mode, reason, batch)
	p.Phase = "decode"
	return p
}

// planDummy is the plan of an idle rank.
func planDummy(n planTokens, mode fwd.GraphMode, reason fwd.Reason, batch fwd.BatchDescriptor) fwd.Pass {
	p := planDecoding(n, mode, reason, batch)
	p.Dummy = true
	return p
}

func planCut(p fwd.Pass, bounds ...[4]int) fwd.Pass { p.UBatches = planSlices(bounds...); return p }

// checkPlans plans each case on all its ranks, twice.
func checkPlans(t *testing.T, cases []planCase) {
	t.Helper()
	t.Parallel()
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			runners, taps := planGroup(t, tt.parallel, tt.graphs, len(tt.ranks))
			for step := uint64(1); step <= 2; step++ {
				var schedules []fwd.Schedule
				for _, rank := range tt.ranks {
					schedules = append(schedules, rank.schedule)
				}
				passes := planOf(t, runners, schedules...)
				want, err := fwd.Agree(taps[0].votes, tt.parallel.NumUBatches)
				if err != nil || want.Step != step {
					t.Fatalf("agreement %+v, %v; want one of step %d", want, err, step)
				}
				for rank, pass := range passes {
					if diff := planDiff(tt.ranks[rank].want, pass); diff != "" {
						t.Errorf("rank %d (-want +got):\n%s", rank, diff)
					}
					if diff := cmp.Diff(&want, pass.Agreement, groupAgreement); diff != "" {
						t.Errorf("rank %d: agreement (-want +got):\n%s", rank, diff)
					}
				}
			}
		})
	}
}

// voteCase is a schedule, and what a rank votes for.
type voteCase struct {
	name     string
	parallel fwd.ParallelConfig
	graphs   *fwd.DispatcherConfig
	schedule fwd.Schedule
	want     fwd.Vote
}

// checkVotes plans each case on two equal ranks. The fingerprint is tested elsewhere.
func checkVotes(t *testing.T, cases []voteCase) {
	t.Helper()
	t.Parallel()
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			runners, taps := planGroup(t, tt.parallel, tt.graphs, 2)
			planOf(t, runners, tt.schedule, tt.schedule)
			tt.want.Step = 1
			for rank, tap := range taps {
				diff := cmp.Diff(tt.want, tap.sent, cmpopts.IgnoreFields(fwd.Vote{}, "Config"))
				if diff != "" || tap.exchanges != 1 {
					t.Errorf("rank %d voted %d times (-want +got):\n%s", rank, tap.exchanges, diff)
				}
			}
		})
	}
}

// planVote is the vote for a batch: its tokens without and with padding, its requests, and its mode.
func planVote(tokens, padded, reqs int, mode fwd.GraphMode) fwd.Vote {
	return fwd.Vote{NumTokens: tokens, NumTokensPadded: padded, NumReqs: reqs, GraphMode: mode}
}

// decodeVote is planVote for a uniform decode batch.
func decodeVote(tokens, padded, reqs int, mode fwd.GraphMode) fwd.Vote {
	v := planVote(tokens, padded, reqs, mode)
	v.Uniform = true
	return v
}

// What a schedule is dispatched to.
func TestPlanVote(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	var ranks fwd.ParallelConfig
	one, three := planMixed(1), planMixed(3)
	lora := planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	excluded := planDecode(3)
	excluded.ExcludeFull, excluded.Note = true, 1<<63+5
	excludedVote := decodeVote(3, 4, 3, piecewise)
	excludedVote.ExcludeFull, excludedVote.Note = true, 1<<63+5
	eagerVote := decodeVote(3, 3, 3, none)
	eagerVote.Eager = true
	prefill := planDecode(3)
	prefill.Prefill = true
	twoLoRAs := func(v fwd.Vote) fwd.Vote { v.NumActiveLoRAs = 2; return v }
	checkVotes(t, []voteCase{
		{"decode", ranks, &one, planDecode(3), decodeVote(3, 4, 3, full)},
		{"mixed", ranks, &one, planBatch(1, 2), planVote(3, 4, 2, piecewise)},
		{"decode q=3", ranks, &three, planBatch(3, 3, 3), decodeVote(9, 12, 3, full)},
		{"not all decode q=3", ranks, &three, planBatch(3, 2, 3), planVote(8, 12, 3, piecewise)},
		{"as many tokens as decode q=3", ranks, &three, planBatch(2, 4), planVote(6, 6, 2, piecewise)},
		{"a prompt that looks like decode", ranks, &one, prefill, planVote(3, 4, 3, piecewise)},
		{"full excluded", ranks, &one, excluded, excludedVote},
		{"eager", ranks, &one, planEager(planDecode(3)), eagerVote},
		{"no dispatcher", ranks, nil, planDecode(3), decodeVote(3, 3, 3, none)},
		{"too large", ranks, &one, planBatch(17), planVote(17, 17, 1, none)},
		{"adapters", ranks, &lora, planLoRAs(2, planBatch(3)), twoLoRAs(planVote(3, 4, 1, piecewise))},
		{
			"adapters without configuration", ranks, &one, planLoRAs(2, planBatch(3)),
			twoLoRAs(planVote(3, 3, 1, none)),
		},
		{"requests without tokens", ranks, &one, planBatch(0, 1, 0, 1), decodeVote(2, 2, 2, full)},
		{"mixed beside requests without tokens", ranks, &one, planBatch(2, 0), planVote(2, 2, 1, piecewise)},
	})
}

// When a rank wants microbatches.
func TestPlanVoteUBatches(t *testing.T) {
	const none, piecewise = fwd.GraphNone, fwd.GraphPiecewise
	one := planMixed(1)
	ubatch := fwd.ParallelConfig{NumUBatches: 2}
	ownDecode := fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 2}
	ownPrefill := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 40}
	low := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 4}
	wanted := func(v fwd.Vote) fwd.Vote { v.UBatch = true; return v }
	prefill := func(n int) fwd.Schedule {
		s := planSplit(planDecode(n))
		s.Prefill = true
		return s
	}
	large := planSplit(planBatch(5000))
	checkVotes(t, []voteCase{
		{"decode at the threshold", ubatch, nil, planSplit(planDecode(32)), wanted(decodeVote(32, 32, 32, none))},
		{"decode below", ubatch, nil, planSplit(planDecode(31)), decodeVote(31, 31, 31, none)},
		{
			"prefill at the threshold", ubatch, nil, planSplit(planBatch(500, 12)),
			wanted(planVote(512, 512, 2, none)),
		},
		{"prefill below", ubatch, nil, planSplit(planBatch(500, 11)), planVote(511, 511, 2, none)},
		{"prompts that look like decode", ubatch, nil, prefill(511), planVote(511, 511, 511, none)},
		{"prompts at the threshold", ubatch, nil, prefill(512), wanted(planVote(512, 512, 512, none))},
		{"not allowed", ubatch, nil, planBatch(5000), planVote(5000, 5000, 1, none)},
		{"off", fwd.ParallelConfig{NumUBatches: 1}, nil, large, planVote(5000, 5000, 1, none)},
		{"not configured", fwd.ParallelConfig{}, nil, large, planVote(5000, 5000, 1, none)},
		{"own decode threshold", ownDecode, nil, planSplit(planDecode(2)), wanted(decodeVote(2, 2, 2, none))},
		{"own prefill threshold", ownPrefill, nil, planSplit(planBatch(40)), wanted(planVote(40, 40, 1, none))},
		{"padding does not count", low, &one, planSplit(planBatch(3)), planVote(3, 4, 1, piecewise)},
	})
}

// TokenMultiple rounds what is dispatched and split. Votes and thresholds keep the tokens that are scheduled.
func TestPlanTokenMultiple(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	four := fwd.ParallelConfig{TokenMultiple: 4}
	ubatch := fwd.ParallelConfig{TokenMultiple: 4, NumUBatches: 2, PrefillUBatchThreshold: 10}
	ten := fwd.ParallelConfig{TokenMultiple: 4, NumUBatches: 3, PrefillUBatchThreshold: 10}
	graphs := fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{4, 8, 16}, MaxNumSeqs: 16,
	}
	t.Run("vote", func(t *testing.T) {
		wanted := func(v fwd.Vote) fwd.Vote { v.UBatch = true; return v }
		idle := fwd.Vote{NumTokens: 1, NumTokensPadded: 4, Uniform: true, Idle: true}
		checkVotes(t, []voteCase{
			{"rounded up", four, nil, planBatch(5), planVote(5, 8, 1, none)},
			{"a multiple already", four, nil, planBatch(8), planVote(8, 8, 1, none)},
			{"eager", four, &graphs, planBatch(17), planVote(17, 20, 1, none)},
			{"dispatched", four, &graphs, planBatch(9), planVote(9, 16, 1, piecewise)},
			{"decode", four, &graphs, planDecode(3), decodeVote(3, 4, 3, full)},
			{"idle", four, nil, fwd.Schedule{}, idle},
			{"below the threshold", ubatch, nil, planSplit(planBatch(9)), planVote(9, 12, 1, none)},
			{"at the threshold", ubatch, nil, planSplit(planBatch(10)), wanted(planVote(10, 12, 1, none))},
		})
	})
	t.Run("plan", func(t *testing.T) {
		pass := planPass(planTokens{10, 12, 12, 1}, none, fwd.ReasonDisabled, planKey(12))
		raised := planPass(planTokens{9, 12, 16, 1}, none, fwd.ReasonDisabled, planKey(16))
		thirds := planCut(planPass(planTokens{16, 16, 16, 1}, none, fwd.ReasonDisabled, planKey(16)),
			[4]int{0, 1, 0, 4}, [4]int{0, 1, 4, 8}, [4]int{0, 1, 8, 16})
		few := planPass(planTokens{3, 4, 4, 1}, none, fwd.ReasonDisabled, planKey(4))
		one := fwd.ParallelConfig{TokenMultiple: 4, NumUBatches: 2, PrefillUBatchThreshold: 1}
		checkPlans(t, []planCase{
			{"each its own", four, nil, []planRank{
				{planBatch(10), pass},
				{planBatch(3), few},
				{fwd.Schedule{}, planDummy(planTokens{1, 4, 4, 1}, none, fwd.ReasonDisabled, planKey(4))},
			}},
			{"the split point is rounded down", ubatch, nil, []planRank{
				{planSplit(planBatch(10)), planCut(pass, [4]int{0, 1, 0, 4}, [4]int{0, 1, 4, 12})},
				{planSplit(planBatch(10)), planCut(pass, [4]int{0, 1, 0, 4}, [4]int{0, 1, 4, 12})},
			}},
			{"three parts", ten, nil, []planRank{
				{planSplit(planBatch(16)), thirds},
				{planSplit(planBatch(16)), thirds},
			}},
			{"too few for a multiple each", one, nil, []planRank{
				{planSplit(planBatch(3)), few},
				{planSplit(planBatch(3)), few},
			}},
			{"padded for the others", fwd.ParallelConfig{
				TokenMultiple: 4, NumUBatches: 2, PrefillUBatchThreshold: 9,
			}, nil, []planRank{
				{planSplit(planBatch(9)), planCut(raised, [4]int{0, 1, 0, 8}, [4]int{0, 1, 8, 16})},
				{planSplit(planBatch(14)), planCut(
					planPass(planTokens{14, 16, 16, 1}, none, fwd.ReasonDisabled, planKey(16)),
					[4]int{0, 1, 0, 8}, [4]int{0, 1, 8, 16})},
			}},
		})
	})
}

// A graph's padding must keep the multiple, so New refuses capture sizes that don't.
func TestTokenMultipleOfCaptureSizes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		mode     fwd.GraphMode
		multiple int
		refused  bool
	}{
		{fwd.GraphPiecewise, 4, false},
		{fwd.GraphPiecewise, 0, false},
		{fwd.GraphPiecewise, 1, false},
		{fwd.GraphPiecewise, 3, true},
		{fwd.GraphFull, 8, true},
		{fwd.GraphNone, 3, false}, // its sizes are not used
	} {
		d := planDispatcher(t, fwd.DispatcherConfig{Mode: tt.mode, CaptureSizes: []int{4, 8, 20}, MaxNumSeqs: 4})
		cfg := fwd.Config{Parallel: fwd.ParallelConfig{TokenMultiple: tt.multiple}}
		_, err := fwd.New(cfg, fwd.WithDispatcher(d))
		if errors.Is(err, fwd.ErrInvalid) != tt.refused || (err == nil) == tt.refused {
			t.Errorf("%+v: %v", tt, err)
		}
		r, err := fwd.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.WithGraphs(d); errors.Is(err, fwd.ErrInvalid) != tt.refused || (err == nil) == tt.refused {
			t.Errorf("%+v: WithGraphs: %v", tt, err)
		}
	}
}

// The graphs that ranks agree on.
func TestPlanGraphs(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	const exact, relaxed, lowered = fwd.ReasonExact, fwd.ReasonRelaxed, fwd.ReasonDPRank
	var ranks fwd.ParallelConfig
	one := planMixed(1)
	decodeOnly, always, lora := planMixed(1), planMixed(1), planMixed(1)
	decodeOnly.Mode = fwd.GraphFullDecodeOnly
	always.Mode = fwd.GraphFull
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	excluded := fwd.Schedule{NumScheduledTokens: []int{1}, ExcludeFull: true}
	checkPlans(t, []planCase{
		{"full on all ranks", ranks, &one, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 8, 3}, full, exact, planUniform(8, 8))},
			{planDecode(7), planDecoding(planTokens{7, 8, 8, 7}, full, exact, planUniform(8, 8))},
		}},
		{"piecewise on all ranks", ranks, &one, []planRank{
			{planBatch(3), planPass(planTokens{3, 4, 16, 1}, piecewise, relaxed, planKey(16))},
			{planBatch(2, 7), planPass(planTokens{9, 16, 16, 2}, piecewise, relaxed, planKey(16))},
		}},
		{"lowered to piecewise", ranks, &one, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 8, 3}, piecewise, lowered, planKey(8))},
			{planBatch(6), planPass(planTokens{6, 8, 8, 1}, piecewise, relaxed, planKey(8))},
		}},
		{"lowered to piecewise beyond the full graphs", ranks, &one, []planRank{
			{planDecode(8), planDecoding(planTokens{8, 8, 16, 8}, piecewise, lowered, planKey(16))},
			{planBatch(16), planPass(planTokens{16, 16, 16, 1}, piecewise, relaxed, planKey(16))},
		}},
		{"lowered to none: nobody pads for the others", ranks, &one, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 4, 3}, none, lowered, planKey(4))},
			{planBatch(9, 8), planPass(planTokens{17, 17, 17, 2}, none, fwd.ReasonTooLarge, planKey(17))},
			{planBatch(5), planPass(planTokens{5, 8, 8, 1}, none, lowered, planKey(8))},
			{planEager(planBatch(5)), planPass(planTokens{5, 5, 5, 1}, none, fwd.ReasonDisabled, planKey(5))},
		}},
		{"no key lowers the others", ranks, &decodeOnly, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 4, 3}, none, lowered, planKey(4))},
			{planBatch(3), planPass(planTokens{3, 3, 3, 1}, none, fwd.ReasonNoKey, planKey(3))},
		}},
		{"full excluded on one rank", ranks, &one, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 4, 3}, piecewise, lowered, planKey(4))},
			{excluded, planDecoding(planTokens{1, 1, 4, 1}, piecewise, fwd.ReasonFullExcluded, planKey(4))},
		}},
		{"full graphs for every batch", ranks, &always, []planRank{
			{planDecode(3), planDecoding(planTokens{3, 4, 16, 3}, full, relaxed, planKey(16))},
			{planBatch(9), planPass(planTokens{9, 16, 16, 1}, full, relaxed, planKey(16))},
		}},
		{"adapters stay a rank's own", ranks, &lora, []planRank{
			{
				planLoRAs(2, planDecode(2)),
				planDecoding(planTokens{2, 2, 4, 2}, full, exact, withLoRAs(5, planUniform(4, 4))),
			},
			{planDecode(3), planDecoding(planTokens{3, 4, 4, 3}, full, exact, planUniform(4, 4))},
		}},
	})
}

// The microbatches that ranks agree on. They run without graphs, and the descriptor stays.
func TestPlanUBatches(t *testing.T) {
	const none, disabled, split = fwd.GraphNone, fwd.ReasonDisabled, fwd.ReasonUBatch
	one, three := planMixed(1), planMixed(3)
	prefill2 := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}
	prefill3 := fwd.ParallelConfig{NumUBatches: 3, PrefillUBatchThreshold: 8}
	decode2 := fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4}
	low := fwd.ParallelConfig{NumUBatches: 4, PrefillUBatchThreshold: 1, DecodeUBatchThreshold: 1}
	plain := func(unpadded, tokens, reqs int) fwd.Pass {
		return planPass(planTokens{unpadded, unpadded, tokens, reqs}, none, disabled, planKey(tokens))
	}
	single := plain(1, 3, 1)
	single.Phase = "decode"
	halves := [][4]int{{0, 4, 0, 4}, {4, 8, 4, 8}}
	threes := planCut(planDecoding(planTokens{9, 12, 12, 3}, none, split, planUniform(12, 4)),
		[4]int{0, 2, 0, 6}, [4]int{2, 4, 6, 12})
	mixed16 := func(reqs int) fwd.Pass {
		return planPass(planTokens{14, 16, 16, reqs}, none, split, planKey(16))
	}
	checkPlans(t, []planCase{
		{"prefill", prefill2, nil, []planRank{
			{planSplit(planBatch(6, 4)), planCut(plain(10, 12, 2), [4]int{0, 1, 0, 6}, [4]int{1, 2, 6, 12})},
			{planSplit(planBatch(3, 3, 6)), planCut(plain(12, 12, 3), [4]int{0, 2, 0, 6}, [4]int{2, 3, 6, 12})},
		}},
		{"requests without tokens", prefill2, nil, []planRank{
			{planSplit(planBatch(0, 6, 0, 6)), planCut(plain(12, 12, 2), [4]int{0, 1, 0, 6}, [4]int{1, 2, 6, 12})},
			{planSplit(planBatch(12, 0)), planCut(plain(12, 12, 1), [4]int{0, 1, 0, 6}, [4]int{0, 1, 6, 12})},
		}},
		{"padded decode", decode2, &one, []planRank{
			{planSplit(planDecode(5)), planCut(
				planDecoding(planTokens{5, 8, 8, 5}, none, split, planUniform(8, 8)), halves...)},
			{planSplit(planDecode(8)), planCut(
				planDecoding(planTokens{8, 8, 8, 8}, none, split, planUniform(8, 8)), halves...)},
		}},
		{"padded decode q=3", decode2, &three, []planRank{
			{planSplit(planBatch(3, 3, 3)), threes},
			{planSplit(planBatch(3, 3, 3)), threes},
		}},
		{"three that cut requests", prefill3, &one, []planRank{
			{planSplit(planBatch(14)), planCut(mixed16(1),
				[4]int{0, 1, 0, 5}, [4]int{0, 1, 5, 10}, [4]int{0, 1, 10, 16})},
			{planSplit(planBatch(7, 7)), planCut(mixed16(2),
				[4]int{0, 1, 0, 5}, [4]int{0, 2, 5, 10}, [4]int{1, 2, 10, 16})},
		}},
		{"one rank does not want them", prefill2, nil, []planRank{
			{planSplit(planBatch(12)), plain(12, 12, 1)},
			{planSplit(planBatch(7)), plain(7, 7, 1)},
		}},
		{"the last would be empty", prefill2, nil, []planRank{
			{planSplit(planBatch(20)), plain(20, 20, 1)},
			{planSplit(planBatch(10)), plain(10, 10, 1)},
		}},
		{"the last is just not empty", prefill2, nil, []planRank{
			{planSplit(planBatch(20)), planCut(plain(20, 20, 1), [4]int{0, 1, 0, 10}, [4]int{0, 1, 10, 20})},
			{planSplit(planBatch(11)), planCut(plain(11, 20, 1), [4]int{0, 1, 0, 10}, [4]int{0, 1, 10, 20})},
		}},
		{"fewer tokens than microbatches: nobody splits, all pad", low, nil, []planRank{
			{planSplit(planBatch(3)), plain(3, 3, 1)},
			{planSplit(planDecode(1)), single},
		}},
	})
}

// aloneCase is what a rank that decides for itself makes of a schedule.
type aloneCase struct {
	name     string
	graphs   *fwd.DispatcherConfig
	schedule fwd.Schedule
	want     fwd.Pass
}

// checkAlone plans each case on a rank alone and on a rank of a dense model, which decide alike, and runs it.
func checkAlone(t *testing.T, cases []aloneCase) {
	t.Helper()
	t.Parallel()
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, parallel := range []fwd.ParallelConfig{
				{}, {DataParallelSize: 4, DataParallelRank: 2, Dense: true}, {DataParallelRank: 2, Dense: true},
			} {
				parallel.NumUBatches, parallel.DecodeUBatchThreshold, parallel.PrefillUBatchThreshold = 2, 1, 1
				var d *fwd.Dispatcher
				if tt.graphs != nil {
					d = planDispatcher(t, *tt.graphs)
				}
				r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(d))
				if err != nil {
					t.Fatal(err)
				}
				pass, err := r.Plan(t.Context(), tt.schedule)
				if err != nil {
					t.Fatal(err)
				}
				if diff := planDiff(tt.want, pass); diff != "" || pass.Agreement != nil {
					t.Errorf("%+v: agreement %v (-want +got):\n%s", parallel, pass.Agreement, diff)
				}
				err = r.Run(t.Context(), pass, func(ctx context.Context) error {
					if dp := fwd.MustFromContext(ctx).DP; dp != nil {
						t.Errorf("%+v: the pass has DP metadata", parallel)
					}
					return nil
				})
				if err != nil {
					t.Errorf("%+v: running the plan: %v", parallel, err)
				}
			}
		})
	}
}

// alonePass is the plan of a mixed batch, with or without a graph, on a rank alone.
func alonePass(
	tokens, padded, reqs int, mode fwd.GraphMode, reason fwd.Reason, key fwd.BatchDescriptor,
) fwd.Pass {
	return planPass(planTokens{tokens, padded, padded, reqs}, mode, reason, key)
}

// Every reason for a batch without adapters.
func TestPlanAlone(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	one, decodeOnly, always := planMixed(1), planMixed(1), planMixed(1)
	decodeOnly.Mode, always.Mode = fwd.GraphFullDecodeOnly, fwd.GraphFull
	off := fwd.DispatcherConfig{Mode: none}
	excluded, mixed, prefill := planDecode(3), planBatch(3), planDecode(3)
	excluded.ExcludeFull, mixed.ExcludeFull, prefill.Prefill = true, true, true
	decode := func(p fwd.Pass) fwd.Pass { p.Phase = "decode"; return p }
	four := alonePass(3, 4, 3, piecewise, fwd.ReasonRelaxed, planKey(4))
	disabled := decode(alonePass(3, 3, 3, none, fwd.ReasonDisabled, planKey(3)))
	checkAlone(t, []aloneCase{
		{"exact", &one, planDecode(3), decode(alonePass(3, 4, 3, full, fwd.ReasonExact, planUniform(4, 4)))},
		{"relaxed", &one, planBatch(2, 1), alonePass(3, 4, 2, piecewise, fwd.ReasonRelaxed, planKey(4))},
		{"prefill", &one, prefill, four},
		{
			"more requests than full graphs", &one, planDecode(9),
			decode(alonePass(9, 16, 9, piecewise, fwd.ReasonRelaxed, planKey(16))),
		},
		{
			"more requests than buffers", &always, planDecode(9),
			decode(alonePass(9, 9, 9, none, fwd.ReasonTooLarge, planKey(9))),
		},
		{"no dispatcher", nil, planDecode(3), disabled},
		{"mode none", &off, planDecode(3), disabled},
		{"eager", &one, planEager(planDecode(3)), disabled},
		{"too large", &one, planBatch(17), alonePass(17, 17, 1, none, fwd.ReasonTooLarge, planKey(17))},
		{
			"full excluded", &one, excluded,
			decode(alonePass(3, 4, 3, piecewise, fwd.ReasonFullExcluded, planKey(4))),
		},
		{
			"full excluded and nothing else", &decodeOnly, excluded,
			decode(alonePass(3, 3, 3, none, fwd.ReasonFullExcluded, planKey(3))),
		},
		{
			"full excluded where there is none", &one, mixed,
			alonePass(3, 4, 1, piecewise, fwd.ReasonRelaxed, planKey(4)),
		},
		{"no key", &decodeOnly, planBatch(2, 1), alonePass(3, 3, 2, none, fwd.ReasonNoKey, planKey(3))},
		{
			"a request without tokens", &one, planBatch(1, 0, 1, 1),
			decode(alonePass(3, 4, 3, full, fwd.ReasonExact, planUniform(4, 4))),
		},
	})
}

// Batches with adapters.
func TestPlanAloneLoRA(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	one, lora, byCount, onlyLoRA := planMixed(1), planMixed(1), planMixed(1), planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	byCount.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, SpecializeCount: true}
	onlyLoRA.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, Unspecialized: true}
	refused := alonePass(3, 3, 1, none, fwd.ReasonLoRA, planKey(3))
	five := alonePass(3, 4, 1, piecewise, fwd.ReasonRelaxed, withLoRAs(5, planKey(4)))
	counted := alonePass(3, 4, 3, full, fwd.ReasonExact, withLoRAs(4, planUniform(4, 4)))
	counted.Phase = "decode"
	checkAlone(t, []aloneCase{
		{"none configured", &one, planLoRAs(1, planBatch(3)), refused},
		{"too many", &lora, planLoRAs(5, planBatch(3)), refused},
		{"too many by count", &byCount, planLoRAs(5, planBatch(3)), refused},
		{"the most", &lora, planLoRAs(4, planBatch(3)), five},
		{"not without", &onlyLoRA, planBatch(3), refused},
		{"some", &lora, planLoRAs(1, planBatch(3)), five},
		{"by count", &byCount, planLoRAs(3, planDecode(3)), counted},
	})
}

// Microbatches of a rank that decides for itself.
func TestPlanAloneUBatches(t *testing.T) {
	const none, piecewise, split = fwd.GraphNone, fwd.GraphPiecewise, fwd.ReasonUBatch
	one, sparse := planMixed(1), planMixed(1)
	sparse.CaptureSizes = []int{16}
	decode := func(p fwd.Pass) fwd.Pass { p.Phase = "decode"; return p }
	sixteen := alonePass(12, 16, 2, none, split, planKey(16))
	checkAlone(t, []aloneCase{
		{"without graphs", nil, planSplit(planBatch(10, 2)), planCut(
			alonePass(12, 12, 2, none, fwd.ReasonDisabled, planKey(12)), [4]int{0, 1, 0, 6}, [4]int{0, 2, 6, 12})},
		{"padded", &one, planSplit(planDecode(7)), planCut(
			decode(alonePass(7, 8, 7, none, split, planUniform(8, 8))), [4]int{0, 4, 0, 4}, [4]int{4, 8, 4, 8})},
		{"padded, mixed", &one, planSplit(planBatch(10, 2)), planCut(
			sixteen, [4]int{0, 1, 0, 8}, [4]int{0, 2, 8, 16})},
		{"last just not empty", &sparse, planSplit(planBatch(9)), planCut(
			alonePass(9, 16, 1, none, split, planKey(16)), [4]int{0, 1, 0, 8}, [4]int{0, 1, 8, 16})},
		{
			"last empty", &sparse, planSplit(planBatch(8)),
			alonePass(8, 16, 1, piecewise, fwd.ReasonRelaxed, planKey(16)),
		},
		{
			"one token can't be split", nil, planSplit(planBatch(1)),
			decode(alonePass(1, 1, 1, none, fwd.ReasonDisabled, planKey(1))),
		},
	})
}

// A pass that nobody planned has no reason, and each reason has a word of its own.
func TestReasonWords(t *testing.T) {
	t.Parallel()
	if got := (fwd.Pass{}).Reason; got != fwd.ReasonUnknown {
		t.Errorf("the zero reason is %v", got)
	}
	want := map[fwd.Reason]string{
		fwd.ReasonUnknown: "unplanned", fwd.ReasonExact: "exact", fwd.ReasonRelaxed: "relaxed",
		fwd.ReasonDisabled: "disabled", fwd.ReasonTooLarge: "too_large", fwd.ReasonFullExcluded: "full_excluded",
		fwd.ReasonNoKey: "no_key", fwd.ReasonLoRA: "lora", fwd.ReasonDPRank: "dp_rank", fwd.ReasonUBatch: "ubatch",
	}
	for reason, word := range want {
		if got := reason.String(); got != word {
			t.Errorf("reason %d is %q, want %q", reason, got, word)
		}
		text, err := reason.MarshalText()
		again := fwd.Reason(99)
		if unmarshalErr := again.UnmarshalText(text); err != nil || unmarshalErr != nil || again != reason {
			t.Errorf("reason %v marshals to %q, %v, which is %v, %v", reason, text, err, again, unmarshalErr)
		}
	}
}

// A rank that nobody waits for has nothing to do when it is idle.
func TestPlanIdleAlone(t *testing.T) {
	t.Parallel()
	for _, parallel := range []fwd.ParallelConfig{
		{}, {DataParallelSize: 1}, {DataParallelSize: 4, Dense: true},
	} {
		r, err := fwd.New(fwd.Config{Parallel: parallel})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []fwd.Schedule{{}, planBatch(0, 0)} {
			if pass, err := r.Plan(t.Context(), s); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%+v: an idle Plan = %+v, %v; want %v", parallel, pass, err, fwd.ErrInvalid)
			}
		}
	}
	if _, err := (*fwd.Runner)(nil).Plan(t.Context(), fwd.Schedule{}); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("an idle Plan of a nil Runner: %v, want %v", err, fwd.ErrInvalid)
	}
	pass, err := (*fwd.Runner)(nil).Plan(t.Context(), planBatch(2, 3))
	want := alonePass(5, 5, 2, fwd.GraphNone, fwd.ReasonDisabled, planKey(5))
	if diff := planDiff(want, pass); diff != "" || err != nil {
		t.Errorf("Plan of a nil Runner: %v (-want +got):\n%s", err, diff)
	}
}

// A dense model never exchanges, whatever its coordinator.
func TestPlanDenseDoesNotExchange(t *testing.T) {
	t.Parallel()
	tap := &groupTap{Coordinator: localGroup(t, 2)[1]}
	parallel := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1, Dense: true}
	r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithCoordinator(tap))
	if err != nil {
		t.Fatal(err)
	}
	pass, err := r.Plan(t.Context(), planBatch(3))
	if err != nil || pass.Agreement != nil {
		t.Fatalf("Plan = %+v, %v", pass, err)
	}
	for _, p := range []fwd.Pass{pass, {NumTokens: 3}, {}, {NumTokens: 3, NumTokensAcrossDP: vec(8, 9)}} {
		if err := r.Run(t.Context(), p, func(ctx context.Context) error {
			if dp := fwd.MustFromContext(ctx).DP; dp != nil {
				t.Errorf("a dense pass has DP metadata %+v", dp)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if tap.exchanges != 0 {
		t.Errorf("%d exchanges", tap.exchanges)
	}
}

// Plan refuses what it can't plan before the other ranks hear of it: the next Plan is this rank's vote.
func TestPlanRefusedBeforeExchange(t *testing.T) {
	t.Parallel()
	one := planMixed(1)
	runners, taps := planGroup(t, fwd.ParallelConfig{}, &one, 2)
	for _, s := range []fwd.Schedule{planBatch(-1), planLoRAs(-1, planBatch(1)), planLoRAs(-1, fwd.Schedule{})} {
		if _, err := runners[0].Plan(t.Context(), s); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("Plan(%+v): %v, want %v", s, err, fwd.ErrInvalid)
		}
	}
	planOf(t, runners, planBatch(1), planBatch(1))
	if taps[0].exchanges != 1 || taps[0].sent.Step != 1 {
		t.Errorf("then %d exchanges, the last in step %d", taps[0].exchanges, taps[0].sent.Step)
	}
}

// Without a coordinator a rank of several can neither plan nor run without counts.
func TestNoCoordinator(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}, fwd.WithCoordinator(nil))
	if err != nil {
		t.Fatal(err)
	}
	never := func(context.Context) error { t.Error("the pass runs"); return nil }
	if _, err := r.Plan(t.Context(), planBatch(1)); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("Plan: %v, want %v", err, fwd.ErrInvalid)
	}
	if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, never); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("Run: %v, want %v", err, fwd.ErrInvalid)
	}
	ran := false
	err = r.Run(t.Context(), fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 7)}, func(context.Context) error {
		ran = true
		return nil
	})
	if err != nil || !ran {
		t.Errorf("Run with counts: %v, ran %t", err, ran)
	}
}

// Run's own exchange pads nobody, and each rank keeps its graph mode.
func TestRunExchanges(t *testing.T) {
	t.Parallel()
	runners, taps := planGroup(t, fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 1}, nil, 3)
	passes := []fwd.Pass{
		{NumTokens: 8, NumTokensUnpadded: 5, NumReqs: 5, GraphMode: fwd.GraphFull, Batch: planUniform(8, 8)},
		{NumTokens: 3, Dummy: true},
		{NumTokens: 40, NumTokensUnpadded: 40, GraphMode: fwd.GraphPiecewise},
	}
	run := func() {
		t.Helper()
		got := make([]fwd.ForwardContext, 3)
		var wg sync.WaitGroup
		for rank, r := range runners {
			wg.Go(func() {
				if err := r.Run(t.Context(), passes[rank], func(ctx context.Context) error {
					got[rank] = *fwd.MustFromContext(ctx)
					return nil
				}); err != nil {
					t.Errorf("rank %d: %v", rank, err)
				}
			})
		}
		wg.Wait()
		for rank, fc := range got {
			if fc.DP == nil {
				t.Fatalf("rank %d has no DP metadata", rank)
			}
			diff := cmp.Diff([]int{8, 3, 40}, counts(fc.DP.NumTokensAcrossDPTo(nil)))
			if diff != "" || fc.DP.Rank() != rank {
				t.Errorf("rank %d: counts as rank %d (-want +got):\n%s", rank, fc.DP.Rank(), diff)
			}
			if fc.GraphMode != passes[rank].GraphMode || fc.NumTokens != passes[rank].NumTokens {
				t.Errorf("rank %d runs %d tokens in mode %v, want those of %+v",
					rank, fc.NumTokens, fc.GraphMode, passes[rank])
			}
		}
	}
	run()
	for rank, want := range []fwd.Vote{
		{Step: 1, NumTokens: 5, NumTokensPadded: 8, NumReqs: 5},
		{Step: 1, NumTokens: 3, NumTokensPadded: 3},
		{Step: 1, NumTokens: 40, NumTokensPadded: 40},
	} {
		if diff := cmp.Diff(want, taps[rank].sent, cmpopts.IgnoreFields(fwd.Vote{}, "Config")); diff != "" {
			t.Errorf("rank %d: vote (-want +got):\n%s", rank, diff)
		}
	}
	// Refused before anything is exchanged: no tokens, slices without an agreement. Then the step is still to
	// come.
	never := func(context.Context) error { t.Error("the pass runs"); return nil }
	halves := planSlices([4]int{0, 1, 0, 2}, [4]int{1, 2, 2, 4})
	for _, p := range []fwd.Pass{{}, {NumTokens: 4, UBatches: halves}} {
		if err := runners[1].Run(t.Context(), p, never); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("Run(%+v): %v, want %v", p, err, fwd.ErrInvalid)
		}
	}
	run()
	for rank, tap := range taps {
		if tap.exchanges != 2 || tap.sent.Step != 2 {
			t.Errorf("rank %d has exchanged %d times, the last in step %d; want 2", rank, tap.exchanges, tap.sent.Step)
		}
	}
}

// roundTrip is what a rank sees in a step.
type roundTrip struct {
	Counts   []int
	Mode     fwd.GraphMode
	Max      int
	UBatches int
	Sizes    [][]int // of every chunk, in every microbatch
}

// A plan belongs to a step: Run takes its agreement and exchanges nothing again. All ranks see the same
// counts, run the same number of chunks and microbatches, and the counts are those of the passes.
func TestPlanRunRoundTrip(t *testing.T) {
	t.Parallel()
	const size, steps = 4, 300
	one := planMixed(1)
	parallel := fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4, PrefillUBatchThreshold: 6}
	runners, taps := planGroup(t, parallel, &one, size)
	results := make([][]roundTrip, size)
	var wg sync.WaitGroup
	for rank, r := range runners {
		results[rank] = make([]roundTrip, steps)
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(rank), 7))
			for step := range steps {
				schedule := randomSchedule(random)
				schedule.AllowUBatches = step%2 == 0
				if err := results[rank][step].take(t.Context(), r, rank, schedule); err != nil {
					t.Errorf("rank %d, step %d: %v", rank, step, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	reached := map[string]bool{}
	for step, want := range results[0] {
		for rank := range results {
			if diff := cmp.Diff(want, results[rank][step]); diff != "" {
				t.Fatalf("step %d: rank %d differs from rank 0:\n%s", step, rank, diff)
			}
		}
		reached[want.Mode.String()] = true
		reached[fmt.Sprintf("split %t", want.UBatches > 0)] = true
	}
	if len(reached) != 5 {
		t.Errorf("the steps reached only %v", reached)
	}
	for rank, tap := range taps {
		if tap.exchanges != steps {
			t.Errorf("rank %d exchanged %d times in %d steps", rank, tap.exchanges, steps)
		}
	}
}

// randomSchedule is idle, mixed or decode.
func randomSchedule(random *rand.Rand) fwd.Schedule {
	s := fwd.Schedule{ExcludeFull: random.IntN(8) == 0, Eager: random.IntN(8) == 0}
	switch random.IntN(6) {
	case 0:
	case 1:
		s.NumScheduledTokens = []int{1 + random.IntN(18), 1 + random.IntN(3)}
	default:
		s.NumScheduledTokens = planRequests(4+random.IntN(5), 1)
	}
	return s
}

// take plans a step, runs it, and notes what the rank sees.
func (s *roundTrip) take(ctx context.Context, r *fwd.Runner, rank int, schedule fwd.Schedule) error {
	pass, err := r.Plan(ctx, schedule)
	if err != nil {
		return err
	}
	parts := pass.Parts()
	if pass.Dummy != (len(parts) == 0) {
		return fmt.Errorf("dummy %t with parts %v", pass.Dummy, parts)
	}
	for _, part := range parts {
		pass.AttnMetadata = append(pass.AttnMetadata, fwd.AllLayers(part))
	}
	return r.Run(ctx, pass, func(ctx context.Context) error {
		fc := fwd.MustFromContext(ctx)
		*s = roundTrip{
			Counts: counts(fc.DP.NumTokensAcrossDPTo(nil)), Mode: fc.GraphMode, Max: fc.DP.MaxTokensAcrossDP(),
			UBatches: len(fc.UBatches),
		}
		if fc.NumTokens != fc.DP.NumTokens(rank) || fc.DP.Rank() != rank {
			return fmt.Errorf("%d tokens, and the counts say %d of rank %d",
				fc.NumTokens, fc.DP.NumTokens(rank), fc.DP.Rank())
		}
		sizes := make([][][]int, max(len(fc.UBatches), 1))
		err := fwd.RunUBatches(ctx, func(ctx context.Context, i int) (err error) {
			if part, err := fwd.AttnMetadata[fwd.UBatchSlice](ctx, "any"); !fc.Dummy &&
				(err != nil || part != fwd.MustFromContext(ctx).Part) {
				return fmt.Errorf("in %v the metadata is that of %v: %v", fwd.MustFromContext(ctx).Part, part, err)
			}
			sizes[i], err = chunkSizes(ctx)
			return err
		})
		s.Sizes = slices.Concat(sizes...)
		return err
	})
}

// chunkSizes returns the local sizes of each round of a layer.
func chunkSizes(ctx context.Context) (sizes [][]int, err error) {
	chunks, err := fwd.Chunks(ctx, 2, 3)
	if err != nil {
		return nil, err
	}
	for ctx := range chunks {
		local, _ := fwd.LocalSizes(ctx)
		sizes = append(sizes, local)
	}
	return sizes, nil
}

// A pass whose step was agreed always runs, even if its ctx has ended since.
func TestAgreedPassAlwaysRuns(t *testing.T) {
	t.Parallel()
	ended := func(ctx context.Context) error {
		if !errors.Is(ctx.Err(), context.Canceled) {
			return fmt.Errorf("forward sees a ctx that has not ended: %v", ctx.Err())
		}
		return nil
	}
	runners, _ := planGroup(t, fwd.ParallelConfig{}, nil, 2)
	ctx, cancel := context.WithCancel(t.Context())
	passes := planOf(t, runners, planBatch(1), planBatch(1))
	cancel()
	if err := runners[0].Run(ctx, passes[0], ended); err != nil {
		t.Error(err)
	}
	passCtx, end, err := runners[1].Start(ctx, passes[1])
	defer end(nil)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	if err := ended(passCtx); err != nil {
		t.Error(err)
	}
	// Run's own exchange: the ctx ends the moment the votes are there.
	group := localGroup(t, 2)
	ctx, cancel = context.WithCancel(t.Context())
	r := groupRunner(t, &groupFake{rank: 0, size: 2, exchange: func(v fwd.Vote) ([]fwd.Vote, error) {
		defer cancel()
		return group[0].Exchange(ctx, v)
	}})
	peer := groupRunner(t, group[1])
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := peer.Run(t.Context(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
			t.Error(err)
		}
	})
	if err := r.Run(ctx, fwd.Pass{NumTokens: 1}, ended); err != nil {
		t.Error(err)
	}
	wg.Wait()
}
