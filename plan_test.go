// This file tests Plan, alone and across ranks, and that Run takes its passes.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/forwardctx/fwd"
)

// planRank is one rank of a planned step: how it is configured, what is scheduled, and what comes out.
type planRank struct {
	dispatcher *fwd.DispatcherConfig // nil: none
	schedule   fwd.Schedule
	want       fwd.Pass // without Agreement
	invalid    string   // what the error that is ErrInvalid says; empty: there is none
}

// planGroup makes the Runners of ranks that are configured so.
func planGroup(t *testing.T, parallel fwd.ParallelConfig, ranks []planRank) ([]*fwd.Runner, []*groupTap) {
	t.Helper()
	runners, taps := make([]*fwd.Runner, len(ranks)), make([]*groupTap, len(ranks))
	parallel.DataParallelSize = len(ranks)
	for rank, c := range localGroup(t, len(ranks)) {
		parallel.DataParallelRank = rank
		taps[rank] = &groupTap{Coordinator: c}
		opts := []fwd.Option{fwd.WithCoordinator(taps[rank])}
		if cfg := ranks[rank].dispatcher; cfg != nil {
			opts = append(opts, fwd.WithDispatcher(planDispatcher(t, *cfg)))
		}
		r, err := fwd.New(fwd.Config{Parallel: parallel}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		runners[rank] = r
	}
	return runners, taps
}

// planStep plans a step on all ranks at once.
func planStep(ctx context.Context, runners []*fwd.Runner, schedule func(rank int) fwd.Schedule) ([]fwd.Pass, []error) {
	passes, errs := make([]fwd.Pass, len(runners)), make([]error, len(runners))
	var wg sync.WaitGroup
	for rank, r := range runners {
		wg.Go(func() { passes[rank], errs[rank] = r.Plan(ctx, schedule(rank)) })
	}
	wg.Wait()
	return passes, errs
}

// planDiff compares plans without their agreements.
func planDiff(want, got fwd.Pass) string {
	return cmp.Diff(want, got, cmpopts.IgnoreFields(fwd.Pass{}, "Agreement"), cmpopts.EquateEmpty(), groupAgreement)
}

func planRequests(n, tokens int) []int {
	reqs := make([]int, n)
	for i := range reqs {
		reqs[i] = tokens
	}
	return reqs
}

// Steps 1 and 2 of a plan: what the schedule is dispatched to, and what is voted for.
func TestPlanVote(t *testing.T) {
	t.Parallel()
	one, three := planMixed(1), planMixed(3)
	lora := planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	ubatch := fwd.ParallelConfig{NumUBatches: 2}
	for _, tt := range []struct {
		name       string
		parallel   fwd.ParallelConfig
		dispatcher *fwd.DispatcherConfig
		schedule   fwd.Schedule
		want       fwd.Vote
	}{
		{"decode", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}, fwd.Vote{NumTokens: 3, NumTokensPadded: 4, GraphMode: fwd.GraphFull}},
		{"mixed", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{1, 2}}, fwd.Vote{NumTokens: 3, NumTokensPadded: 4, GraphMode: fwd.GraphPiecewise}},
		{"decode q=3", ubatch, &three, fwd.Schedule{NumScheduledTokens: []int{3, 3, 3}}, fwd.Vote{NumTokens: 9, NumTokensPadded: 12, GraphMode: fwd.GraphFull}},
		{"not all decode q=3", ubatch, &three, fwd.Schedule{NumScheduledTokens: []int{3, 2, 3}}, fwd.Vote{NumTokens: 8, NumTokensPadded: 12, GraphMode: fwd.GraphPiecewise}},
		{"as many tokens as decode q=3", ubatch, &three, fwd.Schedule{NumScheduledTokens: []int{2, 4}}, fwd.Vote{NumTokens: 6, NumTokensPadded: 6, GraphMode: fwd.GraphPiecewise}},
		{"full excluded", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, ExcludeFull: true}, fwd.Vote{NumTokens: 3, NumTokensPadded: 4, GraphMode: fwd.GraphPiecewise}},
		{"eager", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, Eager: true}, fwd.Vote{NumTokens: 3, NumTokensPadded: 3}},
		{"no dispatcher", ubatch, nil, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}, fwd.Vote{NumTokens: 3, NumTokensPadded: 3}},
		{"too large", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{17}}, fwd.Vote{NumTokens: 17, NumTokensPadded: 17}},
		{"adapters", ubatch, &lora, fwd.Schedule{NumScheduledTokens: []int{3}, NumActiveLoRAs: 2}, fwd.Vote{NumTokens: 3, NumTokensPadded: 4, GraphMode: fwd.GraphPiecewise}},
		{"adapters without configuration", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{3}, NumActiveLoRAs: 2}, fwd.Vote{NumTokens: 3, NumTokensPadded: 3}},
		{"a request without tokens", ubatch, &one, fwd.Schedule{NumScheduledTokens: []int{1, 0, 1}}, fwd.Vote{NumTokens: 2, NumTokensPadded: 2, GraphMode: fwd.GraphPiecewise}},

		{"decode at the threshold", ubatch, nil, fwd.Schedule{NumScheduledTokens: planRequests(32, 1), AllowUBatches: true}, fwd.Vote{NumTokens: 32, NumTokensPadded: 32, UBatch: true}},
		{"decode below the threshold", ubatch, nil, fwd.Schedule{NumScheduledTokens: planRequests(31, 1), AllowUBatches: true}, fwd.Vote{NumTokens: 31, NumTokensPadded: 31}},
		{"prefill at the threshold", ubatch, nil, fwd.Schedule{NumScheduledTokens: []int{500, 12}, AllowUBatches: true}, fwd.Vote{NumTokens: 512, NumTokensPadded: 512, UBatch: true}},
		{"prefill below the threshold", ubatch, nil, fwd.Schedule{NumScheduledTokens: []int{500, 11}, AllowUBatches: true}, fwd.Vote{NumTokens: 511, NumTokensPadded: 511}},
		{"microbatches not allowed", ubatch, nil, fwd.Schedule{NumScheduledTokens: []int{5000}}, fwd.Vote{NumTokens: 5000, NumTokensPadded: 5000}},
		{"microbatches off", fwd.ParallelConfig{NumUBatches: 1}, nil, fwd.Schedule{NumScheduledTokens: []int{5000}, AllowUBatches: true}, fwd.Vote{NumTokens: 5000, NumTokensPadded: 5000}},
		{"microbatches not configured", fwd.ParallelConfig{}, nil, fwd.Schedule{NumScheduledTokens: []int{5000}, AllowUBatches: true}, fwd.Vote{NumTokens: 5000, NumTokensPadded: 5000}},
		{"own decode threshold", fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 2}, nil, fwd.Schedule{NumScheduledTokens: []int{1, 1}, AllowUBatches: true}, fwd.Vote{NumTokens: 2, NumTokensPadded: 2, UBatch: true}},
		{"own prefill threshold", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 40}, nil, fwd.Schedule{NumScheduledTokens: []int{40}, AllowUBatches: true}, fwd.Vote{NumTokens: 40, NumTokensPadded: 40, UBatch: true}},
		{"padding does not count", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 4}, &one, fwd.Schedule{NumScheduledTokens: []int{3}, AllowUBatches: true}, fwd.Vote{NumTokens: 3, NumTokensPadded: 4, GraphMode: fwd.GraphPiecewise}},

		{"idle", ubatch, &one, fwd.Schedule{AllowUBatches: true}, fwd.Vote{NumTokens: 1, NumTokensPadded: 1, GraphMode: fwd.GraphFull}},
		{"idle q=3", ubatch, &three, fwd.Schedule{}, fwd.Vote{NumTokens: 3, NumTokensPadded: 3, GraphMode: fwd.GraphFull}},
		{"idle with adapters", ubatch, &one, fwd.Schedule{NumActiveLoRAs: 3}, fwd.Vote{NumTokens: 1, NumTokensPadded: 1, GraphMode: fwd.GraphFull}},
		{"idle without dispatcher", ubatch, nil, fwd.Schedule{}, fwd.Vote{NumTokens: 1, NumTokensPadded: 1}},
		{"idle and eager q=3", ubatch, &three, fwd.Schedule{Eager: true}, fwd.Vote{NumTokens: 3, NumTokensPadded: 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rank := planRank{dispatcher: tt.dispatcher}
			runners, taps := planGroup(t, tt.parallel, []planRank{rank, rank})
			if _, errs := planStep(t.Context(), runners, func(int) fwd.Schedule { return tt.schedule }); errors.Join(errs...) != nil {
				t.Fatal(errs)
			}
			tt.want.Step = 1
			for rank, tap := range taps {
				if diff := cmp.Diff(tt.want, tap.sent); diff != "" || tap.exchanges != 1 {
					t.Errorf("rank %d voted %d times (-want +got):\n%s", rank, tap.exchanges, diff)
				}
			}
		})
	}
}

// Steps 3 and 4 of a plan: what the ranks make of their agreement.
func TestPlanAgreed(t *testing.T) {
	t.Parallel()
	one, three := planMixed(1), planMixed(3)
	decodeOnly := planMixed(1)
	decodeOnly.Mode = fwd.GraphFullDecodeOnly
	full := planMixed(1)
	full.Mode = fwd.GraphFull
	lora := planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	decode := func(n int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: planRequests(n, 1)} }
	prefill := func(tokens ...int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: tokens} }
	split := func(s fwd.Schedule) fwd.Schedule { s.AllowUBatches = true; return s }
	desc := func(tokens int) fwd.BatchDescriptor { return fwd.BatchDescriptor{NumTokens: tokens} }
	uniform := func(tokens, reqs int) fwd.BatchDescriptor {
		return fwd.BatchDescriptor{NumTokens: tokens, NumReqs: reqs, Uniform: true}
	}
	// pass is a plan's usual fields: unpadded, after graph padding, final tokens, requests.
	pass := func(unpadded, graph, tokens, reqs int, mode fwd.GraphMode, reason fwd.Reason, batch fwd.BatchDescriptor) fwd.Pass {
		return fwd.Pass{NumTokensUnpadded: unpadded, NumTokensGraph: graph, NumTokens: tokens, NumReqs: reqs, GraphMode: mode, Reason: reason, Batch: batch}
	}
	dummy := func(p fwd.Pass) fwd.Pass { p.Dummy = true; return p }
	cut := func(p fwd.Pass, bounds ...[4]int) fwd.Pass { p.UBatches = planSlices(bounds...); return p }

	for _, tt := range []struct {
		name     string
		parallel fwd.ParallelConfig
		ranks    []planRank
	}{
		{"full on all ranks", fwd.ParallelConfig{}, []planRank{
			{&one, decode(3), pass(3, 4, 8, 3, fwd.GraphFull, fwd.ReasonExact, uniform(8, 8)), ""},
			{&one, decode(7), pass(7, 8, 8, 7, fwd.GraphFull, fwd.ReasonExact, uniform(8, 8)), ""},
		}},
		{"piecewise on all ranks", fwd.ParallelConfig{}, []planRank{
			{&one, prefill(3), pass(3, 4, 16, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), ""},
			{&one, prefill(2, 7), pass(9, 16, 16, 2, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), ""},
		}},
		{"lowered to piecewise", fwd.ParallelConfig{}, []planRank{
			{&one, decode(3), pass(3, 4, 8, 3, fwd.GraphPiecewise, fwd.ReasonDPRank, desc(8)), ""},
			{&one, prefill(6), pass(6, 8, 8, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(8)), ""},
		}},
		{"lowered to piecewise beyond the full graphs", fwd.ParallelConfig{}, []planRank{
			{&one, decode(8), pass(8, 8, 16, 8, fwd.GraphPiecewise, fwd.ReasonDPRank, desc(16)), ""},
			{&one, prefill(16), pass(16, 16, 16, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), ""},
		}},
		{"lowered to none: nobody pads for the others", fwd.ParallelConfig{}, []planRank{
			{&one, decode(3), pass(3, 4, 4, 3, fwd.GraphNone, fwd.ReasonDPRank, desc(4)), ""},
			{&one, prefill(9, 8), pass(17, 17, 17, 2, fwd.GraphNone, fwd.ReasonTooLarge, desc(17)), ""},
			{&one, prefill(5), pass(5, 8, 8, 1, fwd.GraphNone, fwd.ReasonDPRank, desc(8)), ""},
			{&one, fwd.Schedule{NumScheduledTokens: []int{5}, Eager: true}, pass(5, 5, 5, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(5)), ""},
			{&one, fwd.Schedule{}, dummy(pass(1, 1, 1, 1, fwd.GraphNone, fwd.ReasonDPRank, desc(1))), ""},
		}},
		{"no key lowers the others", fwd.ParallelConfig{}, []planRank{
			{&decodeOnly, decode(3), pass(3, 4, 4, 3, fwd.GraphNone, fwd.ReasonDPRank, desc(4)), ""},
			{&decodeOnly, prefill(3), pass(3, 3, 3, 1, fwd.GraphNone, fwd.ReasonNoKey, desc(3)), ""},
		}},
		{"full excluded on one rank", fwd.ParallelConfig{}, []planRank{
			{&one, decode(3), pass(3, 4, 4, 3, fwd.GraphPiecewise, fwd.ReasonDPRank, desc(4)), ""},
			{&one, fwd.Schedule{NumScheduledTokens: []int{1}, ExcludeFull: true}, pass(1, 1, 4, 1, fwd.GraphPiecewise, fwd.ReasonFullExcluded, desc(4)), ""},
		}},
		{"full graphs for every batch", fwd.ParallelConfig{}, []planRank{
			{&full, decode(3), pass(3, 4, 16, 3, fwd.GraphFull, fwd.ReasonRelaxed, desc(16)), ""},
			{&full, prefill(9), pass(9, 16, 16, 1, fwd.GraphFull, fwd.ReasonRelaxed, desc(16)), ""},
		}},
		{"adapters stay a rank's own", fwd.ParallelConfig{}, []planRank{
			{&lora, fwd.Schedule{NumScheduledTokens: []int{1, 1}, NumActiveLoRAs: 2}, pass(2, 2, 4, 2, fwd.GraphFull, fwd.ReasonExact, fwd.BatchDescriptor{NumTokens: 4, NumReqs: 4, Uniform: true, HasLoRA: true, NumActiveLoRAs: 5}), ""},
			{&lora, decode(3), pass(3, 4, 4, 3, fwd.GraphFull, fwd.ReasonExact, uniform(4, 4)), ""},
			{&lora, fwd.Schedule{NumActiveLoRAs: 3}, dummy(pass(1, 1, 4, 1, fwd.GraphFull, fwd.ReasonExact, uniform(4, 4))), ""},
		}},
		{"idle", fwd.ParallelConfig{}, []planRank{
			{&one, decode(3), pass(3, 4, 4, 3, fwd.GraphFull, fwd.ReasonExact, uniform(4, 4)), ""},
			{&one, fwd.Schedule{}, dummy(pass(1, 1, 4, 1, fwd.GraphFull, fwd.ReasonExact, uniform(4, 4))), ""},
		}},
		{"idle beside prefill", fwd.ParallelConfig{}, []planRank{
			{&one, prefill(11), pass(11, 16, 16, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), ""},
			{&one, fwd.Schedule{}, dummy(pass(1, 1, 16, 1, fwd.GraphPiecewise, fwd.ReasonDPRank, desc(16))), ""},
		}},
		{"idle q=3", fwd.ParallelConfig{}, []planRank{
			{&three, fwd.Schedule{}, dummy(pass(3, 3, 6, 1, fwd.GraphFull, fwd.ReasonExact, uniform(6, 2))), ""},
			{&three, prefill(3, 3), pass(6, 6, 6, 2, fwd.GraphFull, fwd.ReasonExact, uniform(6, 2)), ""},
		}},
		{"all idle q=3", fwd.ParallelConfig{}, []planRank{
			{&three, fwd.Schedule{}, dummy(pass(3, 3, 3, 1, fwd.GraphFull, fwd.ReasonExact, uniform(3, 1))), ""},
			{&three, fwd.Schedule{}, dummy(pass(3, 3, 3, 1, fwd.GraphFull, fwd.ReasonExact, uniform(3, 1))), ""},
		}},
		{"idle q=3 lowered to none", fwd.ParallelConfig{}, []planRank{
			{&three, fwd.Schedule{}, dummy(pass(3, 3, 3, 1, fwd.GraphNone, fwd.ReasonDPRank, desc(3))), ""},
			{&three, prefill(49), pass(49, 49, 49, 1, fwd.GraphNone, fwd.ReasonTooLarge, desc(49)), ""},
		}},
		{"idle without dispatcher", fwd.ParallelConfig{}, []planRank{
			{nil, fwd.Schedule{}, dummy(pass(1, 1, 1, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(1))), ""},
			{nil, prefill(5, 6), pass(11, 11, 11, 2, fwd.GraphNone, fwd.ReasonDisabled, desc(11)), ""},
		}},

		{"microbatches of prefill", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}, []planRank{
			{nil, split(prefill(6, 4)), cut(pass(10, 10, 12, 2, fwd.GraphNone, fwd.ReasonDisabled, desc(12)), [4]int{0, 1, 0, 6}, [4]int{1, 2, 6, 12}), ""},
			{nil, split(prefill(3, 3, 6)), cut(pass(12, 12, 12, 3, fwd.GraphNone, fwd.ReasonDisabled, desc(12)), [4]int{0, 2, 0, 6}, [4]int{2, 3, 6, 12}), ""},
		}},
		{"microbatches of padded decode", fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4}, []planRank{
			{&one, split(decode(5)), cut(pass(5, 8, 8, 5, fwd.GraphFull, fwd.ReasonExact, uniform(8, 8)), [4]int{0, 4, 0, 4}, [4]int{4, 8, 4, 8}), ""},
			{&one, split(decode(8)), cut(pass(8, 8, 8, 8, fwd.GraphFull, fwd.ReasonExact, uniform(8, 8)), [4]int{0, 4, 0, 4}, [4]int{4, 8, 4, 8}), ""},
		}},
		{"microbatches of padded decode q=3", fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4}, []planRank{
			{&three, split(prefill(3, 3, 3)), cut(pass(9, 12, 12, 3, fwd.GraphFull, fwd.ReasonExact, uniform(12, 4)), [4]int{0, 2, 0, 6}, [4]int{2, 4, 6, 12}), ""},
			{&three, split(prefill(3, 3, 3)), cut(pass(9, 12, 12, 3, fwd.GraphFull, fwd.ReasonExact, uniform(12, 4)), [4]int{0, 2, 0, 6}, [4]int{2, 4, 6, 12}), ""},
		}},
		{"three microbatches that cut requests", fwd.ParallelConfig{NumUBatches: 3, PrefillUBatchThreshold: 8}, []planRank{
			{&one, split(prefill(14)), cut(pass(14, 16, 16, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), [4]int{0, 1, 0, 5}, [4]int{0, 1, 5, 10}, [4]int{0, 1, 10, 16}), ""},
			{&one, split(prefill(7, 7)), cut(pass(14, 16, 16, 2, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), [4]int{0, 1, 0, 5}, [4]int{0, 2, 5, 10}, [4]int{1, 2, 10, 16}), ""},
		}},
		{"microbatches that one rank does not want", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}, []planRank{
			{nil, split(prefill(12)), pass(12, 12, 12, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(12)), ""},
			{nil, split(prefill(7)), pass(7, 7, 7, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(7)), ""},
		}},
		{"microbatches of which the last would be empty", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}, []planRank{
			{nil, split(prefill(20)), pass(20, 20, 20, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(20)), ""},
			{nil, split(prefill(10)), pass(10, 10, 10, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(10)), ""},
		}},
		{"microbatches of which the last is just not empty", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}, []planRank{
			{nil, split(prefill(20)), cut(pass(20, 20, 20, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(20)), [4]int{0, 1, 0, 10}, [4]int{0, 1, 10, 20}), ""},
			{nil, split(prefill(11)), cut(pass(11, 11, 20, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(20)), [4]int{0, 1, 0, 10}, [4]int{0, 1, 10, 20}), ""},
		}},
		{"an idle rank beside microbatches", fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8, DecodeUBatchThreshold: 1}, []planRank{
			{nil, split(prefill(20)), pass(20, 20, 20, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(20)), ""},
			{nil, split(fwd.Schedule{}), dummy(pass(1, 1, 1, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(1))), ""},
		}},
		{"fewer tokens than microbatches: nobody splits, all pad", fwd.ParallelConfig{NumUBatches: 4, PrefillUBatchThreshold: 1, DecodeUBatchThreshold: 1}, []planRank{
			{nil, split(prefill(3)), pass(3, 3, 3, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(3)), ""},
			{nil, split(decode(1)), pass(1, 1, 3, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(3)), ""},
			{nil, split(fwd.Schedule{}), dummy(pass(1, 1, 3, 1, fwd.GraphNone, fwd.ReasonDisabled, desc(3))), ""},
		}},

		{"other capture sizes", fwd.ParallelConfig{}, []planRank{
			{&fwd.DispatcherConfig{Mode: fwd.GraphPiecewise, CaptureSizes: []int{4, 8}, MaxNumSeqs: 8}, prefill(4), fwd.Pass{}, "6 tokens"},
			{&fwd.DispatcherConfig{Mode: fwd.GraphPiecewise, CaptureSizes: []int{6, 12}, MaxNumSeqs: 8}, prefill(5), pass(5, 6, 6, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(6)), ""},
		}},
		{"a smaller largest capture size", fwd.ParallelConfig{}, []planRank{
			{&one, prefill(15), pass(15, 16, 16, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16)), ""},
			{&fwd.DispatcherConfig{Mode: fwd.GraphPiecewise, CaptureSizes: []int{4, 8}, MaxNumSeqs: 8}, prefill(4), fwd.Pass{}, "too_large"},
		}},
		{"fewer sequences", fwd.ParallelConfig{}, []planRank{
			{&one, decode(8), pass(8, 8, 8, 8, fwd.GraphFull, fwd.ReasonExact, uniform(8, 8)), ""},
			{&fwd.DispatcherConfig{Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4, 8, 16}, MaxNumSeqs: 4}, decode(4), fwd.Pass{}, "FULL"},
		}},
		{"no piecewise graphs", fwd.ParallelConfig{}, []planRank{
			{&decodeOnly, decode(4), fwd.Pass{}, "PIECEWISE"},
			{&one, prefill(4), pass(4, 4, 4, 1, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(4)), ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			runners, taps := planGroup(t, tt.parallel, tt.ranks)
			for step := uint64(1); step <= 2; step++ { // the ranks stay in step whatever comes of their plans
				passes, errs := planStep(t.Context(), runners, func(rank int) fwd.Schedule { return tt.ranks[rank].schedule })
				votes := taps[0].votes
				want, err := fwd.Agree(votes, tt.parallel.NumUBatches)
				if err != nil || want.Step != step {
					t.Fatalf("agreement %+v, %v; want one of step %d", want, err, step)
				}
				for rank, pass := range passes {
					if text := tt.ranks[rank].invalid; text != "" {
						if err := errs[rank]; !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), "configured differently") || !strings.Contains(err.Error(), text) {
							t.Errorf("rank %d: error %v, want one that ranks are configured differently with %q", rank, err, text)
						}
						if diff := cmp.Diff(fwd.Pass{}, pass); diff != "" {
							t.Errorf("rank %d: a plan beside the error:\n%s", rank, diff)
						}
						continue
					}
					if errs[rank] != nil {
						t.Errorf("rank %d: %v", rank, errs[rank])
						continue
					}
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

// Every reason, on a rank that decides for itself; a rank alone and a rank of a dense model decide alike.
func TestPlanAlone(t *testing.T) {
	t.Parallel()
	one := planMixed(1)
	none := fwd.DispatcherConfig{Mode: fwd.GraphNone}
	decodeOnly := planMixed(1)
	decodeOnly.Mode = fwd.GraphFullDecodeOnly
	sparse := planMixed(1)
	sparse.CaptureSizes = []int{16}
	lora, byCount, onlyLoRA := planMixed(1), planMixed(1), planMixed(1)
	lora.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4}
	byCount.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, SpecializeCount: true}
	onlyLoRA.LoRA = &fwd.LoRAConfig{MaxLoRAs: 4, Unspecialized: true}
	desc := func(tokens int) fwd.BatchDescriptor { return fwd.BatchDescriptor{NumTokens: tokens} }
	uniform4 := fwd.BatchDescriptor{NumTokens: 4, NumReqs: 4, Uniform: true}
	type result struct {
		tokens   int
		mode     fwd.GraphMode
		reason   fwd.Reason
		batch    fwd.BatchDescriptor
		ubatches []fwd.UBatchSlice
	}
	for _, tt := range []struct {
		name       string
		dispatcher *fwd.DispatcherConfig
		schedule   fwd.Schedule
		want       result
	}{
		{"exact", &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}, result{4, fwd.GraphFull, fwd.ReasonExact, uniform4, nil}},
		{"relaxed", &one, fwd.Schedule{NumScheduledTokens: []int{2, 1}}, result{4, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(4), nil}},
		{"more requests than sequences", &one, fwd.Schedule{NumScheduledTokens: planRequests(9, 1)}, result{16, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16), nil}},
		{"no dispatcher", nil, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}, result{3, fwd.GraphNone, fwd.ReasonDisabled, desc(3), nil}},
		{"mode none", &none, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}, result{3, fwd.GraphNone, fwd.ReasonDisabled, desc(3), nil}},
		{"eager", &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, Eager: true}, result{3, fwd.GraphNone, fwd.ReasonDisabled, desc(3), nil}},
		{"too large", &one, fwd.Schedule{NumScheduledTokens: []int{17}}, result{17, fwd.GraphNone, fwd.ReasonTooLarge, desc(17), nil}},
		{"full excluded", &one, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, ExcludeFull: true}, result{4, fwd.GraphPiecewise, fwd.ReasonFullExcluded, desc(4), nil}},
		{"full excluded and nothing else", &decodeOnly, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, ExcludeFull: true}, result{3, fwd.GraphNone, fwd.ReasonFullExcluded, desc(3), nil}},
		{"full excluded where there is none", &one, fwd.Schedule{NumScheduledTokens: []int{3}, ExcludeFull: true}, result{4, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(4), nil}},
		{"no key", &decodeOnly, fwd.Schedule{NumScheduledTokens: []int{2, 1}}, result{3, fwd.GraphNone, fwd.ReasonNoKey, desc(3), nil}},
		{"lora none configured", &one, fwd.Schedule{NumScheduledTokens: []int{3}, NumActiveLoRAs: 1}, result{3, fwd.GraphNone, fwd.ReasonLoRA, desc(3), nil}},
		{"lora too many", &byCount, fwd.Schedule{NumScheduledTokens: []int{3}, NumActiveLoRAs: 6}, result{3, fwd.GraphNone, fwd.ReasonLoRA, desc(3), nil}},
		{"lora not without", &onlyLoRA, fwd.Schedule{NumScheduledTokens: []int{3}}, result{3, fwd.GraphNone, fwd.ReasonLoRA, desc(3), nil}},
		{"lora", &lora, fwd.Schedule{NumScheduledTokens: []int{3}, NumActiveLoRAs: 1}, result{4, fwd.GraphPiecewise, fwd.ReasonRelaxed, fwd.BatchDescriptor{NumTokens: 4, HasLoRA: true, NumActiveLoRAs: 5}, nil}},
		{"lora by count", &byCount, fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}, NumActiveLoRAs: 3}, result{4, fwd.GraphFull, fwd.ReasonExact, fwd.BatchDescriptor{NumTokens: 4, NumReqs: 4, Uniform: true, HasLoRA: true, NumActiveLoRAs: 4}, nil}},
		{"split", nil, fwd.Schedule{NumScheduledTokens: []int{10, 2}, AllowUBatches: true}, result{12, fwd.GraphNone, fwd.ReasonDisabled, desc(12), planSlices([4]int{0, 1, 0, 6}, [4]int{0, 2, 6, 12})}},
		{"split and padded", &one, fwd.Schedule{NumScheduledTokens: planRequests(7, 1), AllowUBatches: true}, result{8, fwd.GraphFull, fwd.ReasonExact, fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}, planSlices([4]int{0, 4, 0, 4}, [4]int{4, 8, 4, 8})}},
		{"split and padded, mixed", &one, fwd.Schedule{NumScheduledTokens: []int{10, 2}, AllowUBatches: true}, result{16, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16), planSlices([4]int{0, 1, 0, 8}, [4]int{0, 2, 8, 16})}},
		{"last microbatch just not empty", &sparse, fwd.Schedule{NumScheduledTokens: []int{9}, AllowUBatches: true}, result{16, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16), planSlices([4]int{0, 1, 0, 8}, [4]int{0, 1, 8, 16})}},
		{"last microbatch empty", &sparse, fwd.Schedule{NumScheduledTokens: []int{8}, AllowUBatches: true}, result{16, fwd.GraphPiecewise, fwd.ReasonRelaxed, desc(16), nil}},
		{"one token can't be split", nil, fwd.Schedule{NumScheduledTokens: []int{1}, AllowUBatches: true}, result{1, fwd.GraphNone, fwd.ReasonDisabled, desc(1), nil}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, parallel := range []fwd.ParallelConfig{{}, {DataParallelSize: 4, DataParallelRank: 2, Dense: true}} {
				parallel.NumUBatches, parallel.DecodeUBatchThreshold, parallel.PrefillUBatchThreshold = 2, 1, 1
				var d *fwd.Dispatcher
				if tt.dispatcher != nil {
					d = planDispatcher(t, *tt.dispatcher)
				}
				r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(d))
				if err != nil {
					t.Fatal(err)
				}
				pass, err := r.Plan(t.Context(), tt.schedule)
				if err != nil {
					t.Fatal(err)
				}
				sum := 0
				for _, n := range tt.schedule.NumScheduledTokens {
					sum += n
				}
				want := fwd.Pass{
					NumTokens: tt.want.tokens, NumTokensUnpadded: sum, NumTokensGraph: tt.want.tokens, NumReqs: len(tt.schedule.NumScheduledTokens),
					GraphMode: tt.want.mode, Reason: tt.want.reason, Batch: tt.want.batch, UBatches: tt.want.ubatches,
				}
				if diff := cmp.Diff(want, pass, cmpopts.EquateEmpty(), groupAgreement); diff != "" {
					t.Errorf("%+v (-want +got):\n%s", parallel, diff)
				}
				if err := r.Run(t.Context(), pass, func(ctx context.Context) error {
					if dp := fwd.MustFromContext(ctx).DP; dp != nil {
						t.Errorf("%+v: the pass has DP metadata", parallel)
					}
					return nil
				}); err != nil {
					t.Errorf("%+v: running the plan: %v", parallel, err)
				}
			}
		})
	}
}

// A pass that nobody planned has no reason, and each reason has a word of its own.
func TestReasonWords(t *testing.T) {
	t.Parallel()
	if got := (fwd.Pass{}).Reason; got != fwd.ReasonUnknown {
		t.Errorf("the zero reason is %v", got)
	}
	want := map[fwd.Reason]string{
		fwd.ReasonUnknown: "unknown", fwd.ReasonExact: "exact", fwd.ReasonRelaxed: "relaxed", fwd.ReasonDisabled: "disabled", fwd.ReasonTooLarge: "too_large",
		fwd.ReasonFullExcluded: "full_excluded", fwd.ReasonNoKey: "no_key", fwd.ReasonLoRA: "lora", fwd.ReasonDPRank: "dp_rank",
	}
	for reason, word := range want {
		if got := reason.String(); got != word {
			t.Errorf("reason %d is %q, want %q", reason, got, word)
		}
	}
}

// A rank that nobody waits for has nothing to do when it is idle.
func TestPlanIdleAlone(t *testing.T) {
	t.Parallel()
	for _, parallel := range []fwd.ParallelConfig{{}, {DataParallelSize: 1}, {DataParallelSize: 4, Dense: true}} {
		r, err := fwd.New(fwd.Config{Parallel: parallel})
		if err != nil {
			t.Fatal(err)
		}
		if pass, err := r.Plan(t.Context(), fwd.Schedule{}); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("%+v: an idle Plan = %+v, %v; want %v", parallel, pass, err, fwd.ErrInvalid)
		}
	}
	if _, err := (*fwd.Runner)(nil).Plan(t.Context(), fwd.Schedule{}); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("an idle Plan of a nil Runner: %v, want %v", err, fwd.ErrInvalid)
	}
	pass, err := (*fwd.Runner)(nil).Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{2, 3}})
	want := fwd.Pass{NumTokens: 5, NumTokensUnpadded: 5, NumTokensGraph: 5, NumReqs: 2, Reason: fwd.ReasonDisabled, Batch: fwd.BatchDescriptor{NumTokens: 5}}
	if diff := cmp.Diff(want, pass); diff != "" || err != nil {
		t.Errorf("Plan of a nil Runner: %v (-want +got):\n%s", err, diff)
	}
}

// A dense model never exchanges, whatever its coordinator.
func TestPlanDenseDoesNotExchange(t *testing.T) {
	t.Parallel()
	tap := &groupTap{Coordinator: localGroup(t, 2)[1]}
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1, Dense: true}}, fwd.WithCoordinator(tap))
	if err != nil {
		t.Fatal(err)
	}
	pass, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{3}})
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

// What Plan can't plan is refused before the other ranks hear of it: the next Plan is this rank's vote.
func TestPlanRefusedBeforeExchange(t *testing.T) {
	t.Parallel()
	one := planMixed(1)
	runners, taps := planGroup(t, fwd.ParallelConfig{}, []planRank{{dispatcher: &one}, {dispatcher: &one}})
	for _, s := range []fwd.Schedule{
		{NumScheduledTokens: []int{-1}}, {NumScheduledTokens: []int{0, 0}}, {NumScheduledTokens: []int{1}, NumActiveLoRAs: -1},
	} {
		if _, err := runners[0].Plan(t.Context(), s); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("Plan(%+v): %v, want %v", s, err, fwd.ErrInvalid)
		}
	}
	_, errs := planStep(t.Context(), runners, func(int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: []int{1}} })
	if errors.Join(errs...) != nil || taps[0].exchanges != 1 || taps[0].sent.Step != 1 {
		t.Errorf("then %d exchanges, the last in step %d: %v", taps[0].exchanges, taps[0].sent.Step, errs)
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
	if _, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}}); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("Plan: %v, want %v", err, fwd.ErrInvalid)
	}
	if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, never); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("Run: %v, want %v", err, fwd.ErrInvalid)
	}
	ran := false
	if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 7)}, func(context.Context) error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("Run with counts: %v, ran %t", err, ran)
	}
}

// Run's own exchange pads nobody, and each rank keeps its graph mode.
func TestRunExchanges(t *testing.T) {
	t.Parallel()
	runners, taps := planGroup(t, fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 1}, make([]planRank, 3))
	passes := []fwd.Pass{
		{NumTokens: 8, NumTokensUnpadded: 5, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}},
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
			if diff := cmp.Diff([]int{8, 3, 40}, counts(fc.DP.NumTokensAcrossDPTo(nil))); diff != "" || fc.DP.Rank() != rank {
				t.Errorf("rank %d: counts as rank %d (-want +got):\n%s", rank, fc.DP.Rank(), diff)
			}
			if fc.GraphMode != passes[rank].GraphMode || fc.NumTokens != passes[rank].NumTokens {
				t.Errorf("rank %d runs %d tokens in mode %v, want those of %+v", rank, fc.NumTokens, fc.GraphMode, passes[rank])
			}
		}
	}
	run()
	for rank, want := range []fwd.Vote{{Step: 1, NumTokens: 5, NumTokensPadded: 8}, {Step: 1, NumTokens: 3, NumTokensPadded: 3}, {Step: 1, NumTokens: 40, NumTokensPadded: 40}} {
		if diff := cmp.Diff(want, taps[rank].sent); diff != "" {
			t.Errorf("rank %d: vote (-want +got):\n%s", rank, diff)
		}
	}
	// Refused before anything is exchanged: no tokens, slices without an agreement. Then the step is still to come.
	for _, p := range []fwd.Pass{{}, {NumTokens: 4, UBatches: planSlices([4]int{0, 1, 0, 2}, [4]int{1, 2, 2, 4})}} {
		if err := runners[1].Run(t.Context(), p, func(context.Context) error { t.Error("the pass runs"); return nil }); !errors.Is(err, fwd.ErrInvalid) {
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

// A plan belongs to a step: Run takes its agreement and exchanges nothing again. All ranks see the same counts, run the
// same number of chunks and microbatches, and the counts are those of the passes.
func TestPlanRunRoundTrip(t *testing.T) {
	t.Parallel()
	const size, steps = 4, 300
	one := planMixed(1)
	ranks := make([]planRank, size)
	for rank := range ranks {
		ranks[rank].dispatcher = &one
	}
	runners, taps := planGroup(t, fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4, PrefillUBatchThreshold: 6}, ranks)
	type seen struct {
		Counts   []int
		Mode     fwd.GraphMode
		Max      int
		UBatches int
		Chunks   int
		Sizes    [][]int // of every chunk, in every microbatch
	}
	results := make([][]seen, size)
	var wg sync.WaitGroup
	for rank, r := range runners {
		results[rank] = make([]seen, steps)
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(rank), 7))
			for step := range steps {
				schedule := fwd.Schedule{AllowUBatches: step%2 == 0, ExcludeFull: random.IntN(8) == 0, Eager: random.IntN(8) == 0}
				switch random.IntN(6) {
				case 0: // idle
				case 1:
					schedule.NumScheduledTokens = []int{1 + random.IntN(18), 1 + random.IntN(3)}
				default:
					schedule.NumScheduledTokens = planRequests(4+random.IntN(5), 1)
				}
				pass, err := r.Plan(t.Context(), schedule)
				if err != nil {
					t.Errorf("rank %d, step %d: %v", rank, step, err)
					return
				}
				s := &results[rank][step]
				attn := map[string]any{"": rank}
				for range max(len(pass.UBatches), 1) {
					pass.AttnMetadata = append(pass.AttnMetadata, attn)
				}
				err = r.Run(t.Context(), pass, func(ctx context.Context) error {
					fc := fwd.MustFromContext(ctx)
					*s = seen{Counts: counts(fc.DP.NumTokensAcrossDPTo(nil)), Mode: fc.GraphMode, Max: fc.DP.MaxTokensAcrossDP(), UBatches: len(fc.UBatches)}
					if fc.NumTokens != fc.DP.NumTokens(rank) || fc.DP.Rank() != rank {
						return fmt.Errorf("%d tokens, and the counts say %d of rank %d", fc.NumTokens, fc.DP.NumTokens(rank), fc.DP.Rank())
					}
					var mu sync.Mutex
					sizes := make([][][]int, max(len(fc.UBatches), 1))
					if err := fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
						chunks, err := fwd.Chunks(ctx, 2, 3)
						if err != nil {
							return err
						}
						for ctx := range chunks {
							local, _ := fwd.LocalSizes(ctx)
							mu.Lock()
							sizes[i] = append(sizes[i], local)
							mu.Unlock()
						}
						return nil
					}); err != nil {
						return err
					}
					s.Sizes = slices.Concat(sizes...)
					s.Chunks = len(s.Sizes)
					return nil
				})
				if err != nil {
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

// A pass whose step was agreed always runs, even where its ctx has ended since; and where its ctx ends in the exchange
// itself, it does not.
func TestAgreedPassAlwaysRuns(t *testing.T) {
	t.Parallel()
	ended := func(ctx context.Context) error {
		if !errors.Is(ctx.Err(), context.Canceled) {
			return fmt.Errorf("forward sees a ctx that has not ended: %v", ctx.Err())
		}
		return nil
	}
	runners, _ := planGroup(t, fwd.ParallelConfig{}, make([]planRank, 2))
	passes, errs := planStep(t.Context(), runners, func(int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: []int{1}} })
	if errors.Join(errs...) != nil {
		t.Fatal(errs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for rank, r := range runners {
		if err := r.Run(ctx, passes[rank], ended); err != nil {
			t.Errorf("rank %d: %v", rank, err)
		}
		passCtx, end, err := r.Start(ctx, passes[rank])
		if err != nil {
			t.Fatalf("rank %d: Start: %v", rank, err)
		}
		if err := ended(passCtx); err != nil {
			t.Errorf("rank %d: %v", rank, err)
		}
		end(nil)
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
		if err := peer.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return nil }); err != nil {
			t.Error(err)
		}
	})
	if err := r.Run(ctx, fwd.Pass{NumTokens: 1}, ended); err != nil {
		t.Error(err)
	}
	wg.Wait()
}
