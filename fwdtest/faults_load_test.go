// This file lists faults that show after many steps.

package fwdtest_test

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/forwardctx/fwd"
)

func hold(bytes int) {
	b := make([]byte, bytes)
	held.Store(&b, true)
}

// sleepForEver leaves a goroutine behind.
func sleepForEver() { go func() { <-make(chan bool) }() }

// loadFaults are faults that show now and then.
var loadFaults = []fault{
	{"lets a broken round hang at times", inGroup(func() exchange {
		var errs atomic.Int64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrRankMissing) && errs.Add(1) == 20 {
				<-make(chan bool)
			}
			return votes, err
		}
	}), `rank \d in step \d+ has not returned after 10s`, []string{"Load/Chaos"}},
	{"does not come together", inGroup(func() exchange {
		var broken atomic.Bool
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if broken.Load() {
				return nil, &fwd.RankError{Err: fwd.ErrRankMissing, Step: v.Step, Ranks: others(c, c.Rank())}
			}
			votes, err := c.Exchange(ctx, v)
			broken.Store(broken.Load() || err != nil)
			return votes, err
		}
	}), `the group has not come together in 5 attempts`, []string{"Load/Chaos"}},
}

// leftFaults are faults that leave something behind.
var leftFaults = []fault{
	{"leaves a goroutine after a round",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			sleepForEver()
			return c.Exchange(ctx, v)
		}), `left \d+ goroutines`, []string{"NothingLeft/Rounds", "NothingLeft/BrokenRounds"}},
	{"keeps the votes of every round", inRanks(func() exchange {
		var kept [][]fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			kept = append(kept, votes)
			return votes, err
		}
	}), `and \d+ bytes behind`, []string{"NothingLeft/Rounds"}},
	{"leaves a goroutine after a broken round",
		inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
			sleepForEver()
			return err
		}), `left \d+ goroutines`, []string{"NothingLeft/BrokenRounds"}},
	{"keeps what it knew of broken rounds",
		inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
			hold(100)
			return err
		}), `and \d+ bytes behind`, []string{"NothingLeft/BrokenRounds"}},
	{"leaves a goroutine of a closed group", func([]fwd.Coordinator) { sleepForEver() },
		`left \d+ goroutines`, []string{"NothingLeft/Groups"}},
	{"keeps closed groups", func([]fwd.Coordinator) { hold(4096) },
		`and \d+ bytes behind`, []string{"NothingLeft/Groups"}},
}
