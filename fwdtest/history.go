package fwdtest

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/forwardctx/fwd"
)

// history is what has come of the exchanges of a group in which some fail.
type history struct {
	mu       sync.Mutex
	size     int
	agreed   map[uint64][]fwd.Vote // the votes of each step that was complete on some rank
	complete map[uint64][]bool     // on which ranks; a step that is not there was on none
	failed   int                   // exchanges
}

func newHistory(size int) *history {
	return &history{size: size, agreed: make(map[uint64][]fwd.Vote), complete: make(map[uint64][]bool)}
}

// outcome checks and notes what an exchange returned, and returns the step that the rank goes on
// from. Ranks that get the votes of a step must get the same ones.
func (h *history) outcome(rank int, sent fwd.Vote, votes []fwd.Vote, err error) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failed++
		return missed(rank, sent, err)
	}
	if len(votes) != h.size {
		return 0, fmt.Errorf("%d votes, want %d", len(votes), h.size)
	}
	step := votes[rank].Step
	if sent.Step = max(sent.Step, step); !same(&votes[rank], &sent) {
		return 0, fmt.Errorf("the vote of rank %d itself has %s", rank, difference(votes[rank], sent))
	}
	for other, v := range votes {
		if v.Step != step {
			return 0, fmt.Errorf("votes of the steps %d and %d, of rank %d", step, v.Step, other)
		}
	}
	if h.agreed[step] == nil {
		h.agreed[step], h.complete[step] = votes, make([]bool, h.size)
	}
	if err := differ(votes, h.agreed[step]); err != nil {
		return 0, err
	}
	h.complete[step][rank] = true
	return step, nil
}

// completeOn returns on which ranks a step was complete.
func (h *history) completeOn(step uint64) []bool {
	if ranks := h.complete[step]; ranks != nil {
		return ranks
	}
	return make([]bool, h.size)
}

// apart returns an error if two ranks had different outcomes in two steps in a row: one of them got
// the votes, and the other did not.
func (h *history) apart() error {
	for step, ranks := range h.complete {
		next := h.complete[step+1]
		if next == nil || !slices.Contains(ranks, false) || !slices.Contains(next, false) {
			continue
		}
		for a := range ranks {
			for b := range a {
				if ranks[a] != ranks[b] && next[a] != next[b] {
					return fmt.Errorf("of the ranks %d and %d only one got the votes of step %d, "+
						"and only one those of step %d", b, a, step, step+1)
				}
			}
		}
	}
	return nil
}

// missed returns the step that a rank goes on from after an error, which must say that others are
// missing.
func missed(rank int, sent fwd.Vote, err error) (uint64, error) {
	var got *fwd.RankError
	ok := errors.As(err, &got)
	switch {
	case !ok || !errors.Is(err, fwd.ErrRankMissing) || errors.Is(err, fwd.ErrLockstep):
		return 0, fmt.Errorf("error %w, want votes or a RankError that is %v alone", err, fwd.ErrRankMissing)
	case len(got.Ranks) == 0 || slices.Contains(got.Ranks, rank):
		return 0, fmt.Errorf("error %w names itself, or nobody", err)
	case got.Step < sent.Step:
		return 0, fmt.Errorf("error %w has step %d, want at least %d", err, got.Step, sent.Step)
	}
	return got.Step, nil
}
