// This file tests further passes over the batch of an agreement, as a draft model's: nothing is exchanged.

package fwd_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// reuseGroup makes a Runner for each rank. They have no coordinator: they exchange nothing.
func reuseGroup(
	t *testing.T, parallel fwd.ParallelConfig, graphs *fwd.DispatcherConfig, size int,
) []*fwd.Runner {
	t.Helper()
	var d *fwd.Dispatcher
	if graphs != nil {
		d = planDispatcher(t, *graphs)
	}
	runners := make([]*fwd.Runner, size)
	for rank := range runners {
		parallel.DataParallelSize, parallel.DataParallelRank = size, rank
		r, err := fwd.New(fwd.Config{Name: "draft", Parallel: parallel}, fwd.WithDispatcher(d))
		if err != nil {
			t.Fatal(err)
		}
		runners[rank] = r
	}
	return runners
}

// reuseCase is a batch that a target has agreed on, and the passes of the draft over it.
type reuseCase struct {
	name     string
	target   *fwd.DispatcherConfig
	draft    *fwd.DispatcherConfig
	parallel fwd.ParallelConfig // of the draft
	oneToken bool
	batch    []fwd.Schedule // of the target
	again    []fwd.Schedule // of the draft
	want     []fwd.Pass
	idle     bool
}

func (tt *reuseCase) check(t *testing.T) {
	t.Parallel()
	ubatch := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 1, DecodeUBatchThreshold: 1}
	targets, _ := planGroup(t, ubatch, tt.target, len(tt.batch))
	planOf(t, targets, tt.batch...) // so that the step is not the first
	passes := planOf(t, targets, tt.batch...)
	tt.parallel.NumUBatches, tt.parallel.PrefillUBatchThreshold, tt.parallel.DecodeUBatchThreshold = 2, 1, 1
	drafts := reuseGroup(t, tt.parallel, tt.draft, len(tt.batch))
	var first *fwd.Agreement
	for rank, r := range drafts {
		s := tt.again[rank]
		s.Reuse, s.OneTokenPerRequest, s.AllowUBatches = passes[rank].Agreement, tt.oneToken, true
		for range 2 { // two drafts over one batch
			pass, err := r.Plan(t.Context(), s)
			if err != nil {
				t.Fatalf("rank %d: %v", rank, err)
			}
			if diff := planDiff(tt.want[rank], pass); diff != "" {
				t.Errorf("rank %d (-want +got):\n%s", rank, diff)
			}
			if first == nil {
				first = pass.Agreement
			}
			a := pass.Agreement
			if diff := cmp.Diff(first, a, groupAgreement); diff != "" {
				t.Errorf("rank %d agrees on something else than rank 0:\n%s", rank, diff)
			}
			if a.Step != 2 || a.Idle != tt.idle || a.SpanContext.IsValid() || len(a.Votes) != len(drafts) {
				t.Errorf("rank %d: the agreement is %+v", rank, a)
			}
			if err := r.Run(t.Context(), pass, nothing); err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
			if err := r.Run(t.Context(), pass, nothing); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("rank %d: the pass runs twice: %v", rank, err)
			}
		}
	}
}

// What a draft makes of its target's batches, by itself and alike on all ranks.
func TestReuse(t *testing.T) {
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	const exact, relaxed, lowered = fwd.ReasonExact, fwd.ReasonRelaxed, fwd.ReasonDPRank
	one, three := planMixed(1), planMixed(3)
	same := []fwd.Schedule{planDecode(3), planDecode(7)}
	prefill := planDecode(3)
	prefill.Prefill = true
	noFull := planDecode(3)
	noFull.ExcludeFull = true
	decode := func(tokens, graph, final, reqs int) fwd.Pass {
		return planDecoding(planTokens{tokens, graph, final, reqs}, full, exact, planUniform(final, final))
	}
	mixed := func(tokens, graph, final, reqs int) fwd.Pass {
		return planPass(planTokens{tokens, graph, final, reqs}, piecewise, relaxed, planKey(final))
	}
	for _, tt := range []reuseCase{
		{
			name: "the same batch", target: &one, draft: &one, batch: same, again: same,
			want: []fwd.Pass{decode(3, 4, 8, 3), decode(7, 8, 8, 7)},
		},
		{
			name: "a prompt stays one", target: &one, draft: &one,
			batch: []fwd.Schedule{prefill, planDecode(2)}, again: []fwd.Schedule{planDecode(3), planDecode(2)},
			want: []fwd.Pass{
				mixed(3, 4, 4, 3), planDecoding(planTokens{2, 2, 4, 2}, piecewise, lowered, planKey(4)),
			},
		},
		{
			name: "one token per request, of a mixed batch", target: &one, draft: &one, oneToken: true,
			batch: []fwd.Schedule{planBatch(9, 0, 5, 1), planBatch(6)},
			again: []fwd.Schedule{planDecode(3), planDecode(1)},
			want:  []fwd.Pass{decode(3, 4, 4, 3), decode(1, 1, 4, 1)},
		},
		{
			name: "one token per request, of another q", target: &three, draft: &one, oneToken: true,
			batch: []fwd.Schedule{planBatch(3, 3), planBatch(3, 3, 3)},
			again: []fwd.Schedule{planDecode(2), planDecode(3)},
			want:  []fwd.Pass{decode(2, 2, 4, 2), decode(3, 4, 4, 3)},
		},
		{
			name: "the same batch, of another q: not uniform here", target: &three, draft: &one,
			batch: []fwd.Schedule{planBatch(3, 3), planBatch(3)}, again: []fwd.Schedule{planBatch(3, 3), planBatch(3)},
			want: []fwd.Pass{mixed(6, 8, 8, 2), mixed(3, 4, 8, 1)},
		},
		{
			name: "without graphs", target: &one, batch: same, again: same,
			want: []fwd.Pass{
				planDecoding(planTokens{3, 3, 3, 3}, none, fwd.ReasonDisabled, planKey(3)),
				planDecoding(planTokens{7, 7, 7, 7}, none, fwd.ReasonDisabled, planKey(7)),
			},
		},
		{
			name: "an own multiple", target: &one, parallel: fwd.ParallelConfig{TokenMultiple: 4},
			batch: same, again: same,
			want: []fwd.Pass{
				planDecoding(planTokens{3, 4, 4, 3}, none, fwd.ReasonDisabled, planKey(4)),
				planDecoding(planTokens{7, 8, 8, 7}, none, fwd.ReasonDisabled, planKey(8)),
			},
		},
		{
			name: "only the tokens of the schedule are read", target: &one, draft: &one,
			batch: []fwd.Schedule{noFull, planDecode(3)},
			again: []fwd.Schedule{planDecode(3), {NumScheduledTokens: []int{1, 1, 1}, Eager: true, Prefill: true}},
			want: []fwd.Pass{
				planDecoding(planTokens{3, 4, 4, 3}, piecewise, fwd.ReasonFullExcluded, planKey(4)),
				planDecoding(planTokens{3, 4, 4, 3}, piecewise, lowered, planKey(4)),
			},
		},
	} {
		t.Run(tt.name, tt.check)
	}
}

// Idle ranks, eager ranks and adapters are as in the target's votes.
func TestReuseVotes(t *testing.T) {
	const none, full = fwd.GraphNone, fwd.GraphFull
	const exact, lowered = fwd.ReasonExact, fwd.ReasonDPRank
	one, three, lora := planMixed(1), planMixed(3), planMixed(1)
	lora.LoRA, three.Mode = &fwd.LoRAConfig{MaxLoRAs: 4}, fwd.GraphPiecewise
	idle := []fwd.Schedule{planBatch(0), {}}
	for _, tt := range []reuseCase{
		{
			name: "an idle rank, of another q", target: &one, draft: &three, oneToken: true,
			batch: []fwd.Schedule{planDecode(3), planBatch(0)}, again: []fwd.Schedule{planDecode(3), {}},
			want: []fwd.Pass{
				planPass(planTokens{3, 3, 3, 3}, fwd.GraphPiecewise, fwd.ReasonRelaxed, planKey(3)),
				planDummy(planTokens{3, 3, 3, 1}, fwd.GraphPiecewise, fwd.ReasonRelaxed, planKey(3)),
			},
		},
		{
			name: "an idle rank", target: &one, draft: &one, oneToken: true,
			batch: []fwd.Schedule{planBatch(5, 1, 1), planBatch(0)},
			again: []fwd.Schedule{planDecode(3), planBatch(0, 0)},
			want: []fwd.Pass{
				planDecoding(planTokens{3, 4, 4, 3}, full, exact, planUniform(4, 4)),
				planDummy(planTokens{1, 1, 4, 1}, full, exact, planUniform(4, 4)),
			},
		},
		{
			name: "all idle", target: &one, draft: &one, batch: idle, again: idle, idle: true,
			want: []fwd.Pass{
				planDummy(planTokens{1, 1, 1, 1}, none, lowered, planKey(1)),
				planDummy(planTokens{1, 1, 1, 1}, none, lowered, planKey(1)),
			},
		},
		{
			name: "an eager rank", target: &one, draft: &one,
			batch: []fwd.Schedule{planDecode(3), planEager(planDecode(2))},
			again: []fwd.Schedule{planDecode(3), planDecode(2)},
			want: []fwd.Pass{
				planDecoding(planTokens{3, 4, 4, 3}, none, lowered, planKey(4)),
				planDecoding(planTokens{2, 2, 2, 2}, none, fwd.ReasonDisabled, planKey(2)),
			},
		},
		{
			name: "adapters", target: &lora, draft: &lora,
			batch: []fwd.Schedule{planLoRAs(2, planDecode(3)), planDecode(4)},
			again: []fwd.Schedule{planDecode(3), planLoRAs(3, planDecode(4))},
			want: []fwd.Pass{
				planDecoding(planTokens{3, 4, 4, 3}, full, exact, withLoRAs(5, planUniform(4, 4))),
				planDecoding(planTokens{4, 4, 4, 4}, full, exact, planUniform(4, 4)),
			},
		},
	} {
		t.Run(tt.name, tt.check)
	}
}

// The schedule must be the batch of this rank's vote, and the votes must be those of as many ranks.
func TestReuseMismatch(t *testing.T) {
	t.Parallel()
	r := reuseGroup(t, fwd.ParallelConfig{}, nil, 2)[1]
	busy, other := planVote(7, 8, 3, fwd.GraphNone), planVote(2, 2, 1, fwd.GraphNone)
	idle := fwd.Vote{NumTokens: 1, NumTokensPadded: 1, Idle: true}
	notSaid := planVote(7, 8, 0, fwd.GraphNone)
	bad := planVote(7, 6, 3, fwd.GraphNone)
	for _, tt := range []struct {
		name     string
		votes    []fwd.Vote
		oneToken bool
		tokens   []int
		want     error
	}{
		{"right", []fwd.Vote{other, busy}, false, []int{2, 3, 2}, nil},
		{"right, one token each", []fwd.Vote{other, busy}, true, []int{1, 1, 1}, nil},
		{"right, with requests without tokens", []fwd.Vote{other, busy}, false, []int{2, 0, 3, 2}, nil},
		{"right, idle", []fwd.Vote{other, idle}, true, nil, nil},
		{"another rank's tokens", []fwd.Vote{busy, other}, false, []int{2, 3, 2}, fwd.ErrTokenMismatch},
		{"other tokens", []fwd.Vote{other, busy}, false, []int{2, 3, 3}, fwd.ErrTokenMismatch},
		{"other requests", []fwd.Vote{other, busy}, false, []int{4, 3}, fwd.ErrTokenMismatch},
		{"the batch again, one token each", []fwd.Vote{other, busy}, true, []int{2, 3, 2}, fwd.ErrTokenMismatch},
		{"one token each, for all again", []fwd.Vote{other, busy}, false, []int{1, 1, 1}, fwd.ErrTokenMismatch},
		{"idle now", []fwd.Vote{other, busy}, false, nil, fwd.ErrTokenMismatch},
		{"busy now", []fwd.Vote{other, idle}, false, []int{1}, fwd.ErrTokenMismatch},
		{"no votes", nil, false, []int{2, 3, 2}, fwd.ErrInvalid},
		{"too few", []fwd.Vote{busy}, false, []int{2, 3, 2}, fwd.ErrInvalid},
		{"too many", []fwd.Vote{other, busy, other}, false, []int{2, 3, 2}, fwd.ErrInvalid},
		{"requests not said", []fwd.Vote{other, notSaid}, true, []int{1, 1, 1}, fwd.ErrInvalid},
		{"requests of another not said", []fwd.Vote{notSaid, busy}, true, []int{1, 1, 1}, fwd.ErrInvalid},
		{"a vote that can't be", []fwd.Vote{bad, busy}, false, []int{2, 3, 2}, fwd.ErrInvalid},
	} {
		s := fwd.Schedule{
			NumScheduledTokens: tt.tokens, OneTokenPerRequest: tt.oneToken,
			Reuse: &fwd.Agreement{Step: 5, Votes: tt.votes},
		}
		for i := range tt.votes {
			tt.votes[i].Step = 5
		}
		pass, err := r.Plan(t.Context(), s)
		a := pass.Agreement
		if !errors.Is(err, tt.want) || err == nil && a.Step != 5 || err != nil && a != nil {
			t.Errorf("%s: %+v, %v; want %v", tt.name, pass, err, tt.want)
		}
		if s := r.Status(); s.Step != 0 || s.Exchanging {
			t.Errorf("%s: the status is %+v", tt.name, s)
		}
	}
}

// A rank alone, or of a dense model, has no agreement to reuse, and plans as ever.
func TestReuseAlone(t *testing.T) {
	t.Parallel()
	for _, parallel := range []fwd.ParallelConfig{{}, {DataParallelSize: 2, DataParallelRank: 1, Dense: true}} {
		r, err := fwd.New(fwd.Config{Parallel: parallel})
		if err != nil {
			t.Fatal(err)
		}
		for _, reuse := range []*fwd.Agreement{nil, {}, {Step: 3, Votes: make([]fwd.Vote, 2)}} {
			s := planBatch(3, 2)
			s.Reuse, s.OneTokenPerRequest = reuse, true
			pass, err := r.Plan(t.Context(), s)
			want := alonePass(5, 5, 2, fwd.GraphNone, fwd.ReasonDisabled, planKey(5))
			if diff := planDiff(want, pass); diff != "" || err != nil || pass.Agreement != nil {
				t.Errorf("%v: %v, %v (-want +got):\n%s", fmt.Sprint(parallel), err, pass.Agreement, diff)
			}
		}
	}
}
