// This file tests what follows from votes: the vectors, the rules for idle ranks, and votes that don't fit
// together.

package fwd_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

func TestAgreeVectors(t *testing.T) {
	type vector struct {
		NumUBatches int `json:"num_ubatches"`
		Ranks       []struct {
			Unpadded     int           `json:"num_tokens_unpadded"`
			Padded       int           `json:"num_tokens_padded"`
			ShouldUBatch bool          `json:"should_ubatch"`
			GraphMode    fwd.GraphMode `json:"graph_mode"`
		} `json:"ranks"`
		WantUBatch bool          `json:"want_should_ubatch"`
		WantTokens []int         `json:"want_num_tokens_across_dp"`
		WantMode   fwd.GraphMode `json:"want_graph_mode"`
	}
	for i, v := range readVectors[vector](t, "coordinate.json", 60) {
		var votes []fwd.Vote
		for _, r := range v.Ranks {
			votes = append(votes, fwd.Vote{
				Step: 7, NumTokens: r.Unpadded, NumTokensPadded: r.Padded, UBatch: r.ShouldUBatch, GraphMode: r.GraphMode,
			})
		}
		for _, config := range []uint64{0, 5} { // not said, and equal
			for rank := range votes {
				votes[rank].Config = config
			}
			a, err := fwd.Agree(votes, v.NumUBatches)
			if err != nil {
				t.Errorf("case %d: %v", i, err)
				continue
			}
			if a.UBatch != v.WantUBatch || a.GraphMode != v.WantMode || a.Step != 7 || a.Idle {
				t.Errorf("case %d: agreed on %+v, want microbatches %t, %v, step 7", i, a, v.WantUBatch, v.WantMode)
			}
			if diff := cmp.Diff(v.WantTokens, counts(a.NumTokensAcrossDP)); diff != "" {
				t.Errorf("case %d: tokens (-want +got):\n%s", i, diff)
			}
		}
	}
}

// Agreements that the vectors don't say: who set the maximum and who lowered the mode, always the first.
func TestAgreeRanks(t *testing.T) {
	t.Parallel()
	vote := func(tokens int, mode fwd.GraphMode) fwd.Vote {
		return fwd.Vote{Step: 3, NumTokens: tokens, NumTokensPadded: tokens, GraphMode: mode}
	}
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	for _, tt := range []struct {
		votes          []fwd.Vote
		tokens, lowest int
	}{
		{[]fwd.Vote{vote(1, full), vote(2, full), vote(2, full)}, 1, -1},
		{[]fwd.Vote{vote(2, none), vote(2, none), vote(2, none)}, 0, -1},
		{[]fwd.Vote{vote(2, none), vote(3, none), vote(2, full)}, 1, 0},
		{[]fwd.Vote{vote(0, full), vote(0, piecewise), vote(1, piecewise)}, 2, 1},
		{[]fwd.Vote{vote(9, full), vote(8, piecewise), vote(7, none)}, 0, 2},
	} {
		a, err := fwd.Agree(tt.votes, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		if a.MaxTokensRank != tt.tokens || a.LowestModeRank != tt.lowest || a.Step != 3 {
			t.Errorf("%+v: agreed %+v, want the most tokens on rank %d, the lowest mode on rank %d",
				tt.votes, a, tt.tokens, tt.lowest)
		}
		if diff := cmp.Diff(tt.votes, a.Votes); diff != "" {
			t.Errorf("the agreement has other votes (-want +got):\n%s", diff)
		}
	}
}

// Agreements are over one step only.
func TestAgreeDifferentSteps(t *testing.T) {
	t.Parallel()
	votes := []fwd.Vote{groupVote(0, 5), groupVote(1, 7), groupVote(2, 7), groupVote(3, 2)}
	_, err := fwd.Agree(votes, 0)
	groupCheckError(t, 0, err, fwd.ErrLockstep, 7, 0, 3)
	if err != nil && !strings.Contains(err.Error(), "[5 7 7 2]") {
		t.Errorf("the error %q does not show each rank's step", err)
	}
}

// Idle ranks neither lower the mode nor forbid microbatches nor raise the padding. What they run without
// padding is their own.
func TestAgreeIdle(t *testing.T) {
	t.Parallel()
	const none, piecewise, full = fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull
	busy := func(tokens, padded int, mode fwd.GraphMode) fwd.Vote {
		return fwd.Vote{Step: 3, NumTokens: tokens, NumTokensPadded: padded, GraphMode: mode, UBatch: true}
	}
	idle := func(tokens, padded int, mode fwd.GraphMode) fwd.Vote {
		return fwd.Vote{Step: 3, NumTokens: tokens, NumTokensPadded: padded, GraphMode: mode, Idle: true}
	}
	for _, tt := range []struct {
		name     string
		ubatches int
		votes    []fwd.Vote
		want     fwd.Agreement // without Step, Votes
		tokens   []int
	}{
		{
			"the mode is that of the busy", 0, []fwd.Vote{idle(1, 1, none), busy(3, 4, full), busy(7, 8, full)},
			fwd.Agreement{GraphMode: full, MaxTokensRank: 2, LowestModeRank: -1}, []int{8, 8, 8},
		},
		{
			"who lowered the mode was busy", 0,
			[]fwd.Vote{idle(1, 1, none), busy(3, 4, full), idle(1, 1, piecewise), busy(7, 8, piecewise)},
			fwd.Agreement{GraphMode: piecewise, MaxTokensRank: 3, LowestModeRank: 3}, []int{8, 8, 8, 8},
		},
		{
			"an idle rank with a higher mode was not lowered", 0, []fwd.Vote{idle(1, 1, full), busy(3, 4, piecewise)},
			fwd.Agreement{GraphMode: piecewise, MaxTokensRank: 1, LowestModeRank: -1}, []int{4, 4},
		},
		{
			"more tokens than the busy, with padding", 0, []fwd.Vote{busy(3, 4, full), idle(99, 99, none)},
			fwd.Agreement{GraphMode: full, MaxTokensRank: 0, LowestModeRank: -1}, []int{4, 4},
		},
		{
			"more tokens than the busy, without padding", 0, []fwd.Vote{busy(3, 3, none), idle(99, 100, full)},
			fwd.Agreement{GraphMode: none, MaxTokensRank: 1, LowestModeRank: -1}, []int{3, 100},
		},
		{
			"microbatches of the busy", 2, []fwd.Vote{busy(9, 12, none), idle(1, 1, none), busy(7, 7, none)},
			fwd.Agreement{UBatch: true, MaxTokensRank: 0, LowestModeRank: -1}, []int{12, 12, 12},
		},
		{
			"microbatches of which the last would be empty", 2,
			[]fwd.Vote{busy(9, 12, none), idle(12, 99, none), busy(6, 7, none)},
			fwd.Agreement{MaxTokensRank: 1, LowestModeRank: -1}, []int{12, 99, 7},
		},
		{
			"all idle", 2, []fwd.Vote{idle(1, 1, full), idle(3, 4, full), idle(2, 2, piecewise)},
			fwd.Agreement{Idle: true, MaxTokensRank: 1, LowestModeRank: -1}, []int{1, 4, 2},
		},
	} {
		got, err := fwd.Agree(tt.votes, tt.ubatches)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		tt.want.Step, tt.want.Votes, tt.want.NumTokensAcrossDP = 3, tt.votes, vec(tt.tokens...)
		if diff := cmp.Diff(tt.want, got, groupAgreement); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// agreeCase is votes that don't fit together, and the ranks that the error names.
type agreeCase struct {
	name string
	keys []int // by rank, what differs; 0 has a meaning of its own
	odd  []int // nil: they fit
}

// The ranks named are those that differ from most; if equally many differ, from the first.
var agreeMinorities = []agreeCase{
	{"equal", []int{5, 5, 5}, nil},
	{"the first", []int{4, 5, 5}, []int{0}},
	{"the last", []int{5, 5, 4}, []int{2}},
	{"two of five", []int{5, 4, 5, 3, 5}, []int{1, 3}},
	{"as many", []int{4, 5}, []int{1}},
	{"as many, later", []int{3, 4, 5, 5, 4}, []int{0, 2, 3}},
	{"all", []int{3, 4, 5}, []int{1, 2}},
}

func TestAgreeConfig(t *testing.T) {
	t.Parallel()
	for _, tt := range append([]agreeCase{
		{"nobody says", []int{0, 0}, nil},
		{"one does not say", []int{0, 5, 5}, nil},
		{"who does not say is not odd", []int{0, 0, 5, 4, 5}, []int{3}},
	}, agreeMinorities...) {
		votes := make([]fwd.Vote, len(tt.keys))
		for rank, key := range tt.keys {
			votes[rank] = groupVote(rank, 9)
			votes[rank].Config = uint64(key)
		}
		checkMinority(t, tt, votes, fwd.ErrInvalid)
	}
}

// checkMinority agrees over votes, and checks which ranks are named.
func checkMinority(t *testing.T, tt agreeCase, votes []fwd.Vote, want error) {
	t.Helper()
	a, err := fwd.Agree(votes, 0)
	switch {
	case tt.odd == nil && err != nil:
		t.Errorf("%s: %v", tt.name, err)
	case tt.odd == nil && a.Step != 9:
		t.Errorf("%s: agreed %+v", tt.name, a)
	case tt.odd == nil:
	case a.NumTokensAcrossDP != nil:
		t.Errorf("%s: an agreement %+v beside %v", tt.name, a, err)
	default:
		groupCheckError(t, 0, err, want, 9, tt.odd...)
	}
}

// Ranks warm up the same graph, or none does. Whatever identifies the graph is compared.
func TestAgreeWarmUp(t *testing.T) {
	t.Parallel()
	for name, vary := range map[string]func(v *fwd.Vote, key int){
		"tokens":   func(v *fwd.Vote, key int) { v.NumTokens, v.NumTokensPadded = key, 99 },
		"requests": func(v *fwd.Vote, key int) { v.NumReqs = key },
		"adapters": func(v *fwd.Vote, key int) { v.NumActiveLoRAs = key },
		"serving": func(v *fwd.Vote, key int) {
			v.WarmUp = key == 5
			v.NumTokens, v.NumTokensPadded = 0, 0 // the last exchange of a warm-up looks like an idle rank's
		},
		"warming up": func(v *fwd.Vote, key int) { v.WarmUp = key != 5 },
		"mode": func(v *fwd.Vote, key int) {
			v.GraphMode = map[int]fwd.GraphMode{3: fwd.GraphNone, 4: fwd.GraphFull, 5: fwd.GraphPiecewise}[key]
		},
		"uniform": func(v *fwd.Vote, key int) { v.Uniform = key == 5 },
	} {
		for _, tt := range agreeMinorities {
			twoKinds := name == "serving" || name == "warming up" || name == "uniform"
			if twoKinds && distinct(tt.keys) > 2 {
				continue
			}
			votes := make([]fwd.Vote, len(tt.keys))
			for rank, key := range tt.keys {
				votes[rank] = fwd.Vote{Step: 9, WarmUp: true, NumTokens: 8, NumTokensPadded: 8}
				vary(&votes[rank], key)
			}
			tt.name = name + ": " + tt.name
			checkMinority(t, tt, votes, fwd.ErrLockstep)
		}
	}
	// What does not identify a graph may differ.
	votes := []fwd.Vote{{Step: 9, WarmUp: true, Note: 1}, {Step: 9, WarmUp: true, Note: 2}}
	if a, err := fwd.Agree(votes, 0); err != nil || a.Idle {
		t.Errorf("notes of a warm-up: %+v, %v", a, err)
	}
}

// distinct returns how many different numbers there are.
func distinct(list []int) int {
	seen := map[int]bool{}
	for _, n := range list {
		seen[n] = true
	}
	return len(seen)
}

// Several things are wrong: a vote that can't be, before steps, before configurations, before warm-up.
func TestAgreeOrderOfErrors(t *testing.T) {
	t.Parallel()
	warm := fwd.Vote{Step: 4, NumTokens: 1, NumTokensPadded: 1, WarmUp: true, Config: 7}
	odd := fwd.Vote{Step: 4, NumTokens: 1, NumTokensPadded: 1, Config: 8}
	var rankErr *fwd.RankError
	_, err := fwd.Agree([]fwd.Vote{warm, odd}, 0)
	if !errors.Is(err, fwd.ErrInvalid) || !errors.As(err, &rankErr) {
		t.Errorf("configured differently while one warms up: %v, want a RankError that is %v", err, fwd.ErrInvalid)
	}
	odd.Step = 5
	if _, err = fwd.Agree([]fwd.Vote{warm, odd}, 0); !errors.Is(err, fwd.ErrLockstep) {
		t.Errorf("at another step, configured differently: %v, want %v", err, fwd.ErrLockstep)
	}
	odd.NumTokens = 2
	_, err = fwd.Agree([]fwd.Vote{warm, odd}, 0)
	if !errors.Is(err, fwd.ErrInvalid) || errors.As(err, &rankErr) {
		t.Errorf("a vote that can't be: %v, want %v without ranks", err, fwd.ErrInvalid)
	}
}
