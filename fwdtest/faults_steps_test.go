// This file lists faults in steps that fail: ranks out of step, missing or late, and ended
// contexts.

package fwdtest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/forwardctx/fwd"
)

// lockstepFaults are faults with ranks at different steps.
var lockstepFaults = []fault{
	{"reports a wrong step", inErrors(fwd.ErrLockstep, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Step--
		return err
	}), `rank \d in step \d: error .* has step 2, want 3`, []string{"Lockstep/Restarted", "Runners/Restarted"}},
	{"reports the ranks in step", inErrors(fwd.ErrLockstep, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = others(c, err.Ranks...)
		return err
	}), `rank \d in step \d: error .* has ranks \[.*\], want \[`,
		[]string{"Lockstep/DifferentSteps", "Lockstep/Restarted"}},
	{"reports no RankError", inErrors(fwd.ErrLockstep, func(fwd.Coordinator, *fwd.RankError) error {
		return fwd.ErrLockstep
	}), `is not a RankError`, []string{"Lockstep/Restarted", "Lockstep/RestartedAgain"}},
	{"leaves those in step waiting",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			var rankErr *fwd.RankError
			if errors.As(err, &rankErr) && errors.Is(err, fwd.ErrLockstep) &&
				!slices.Contains(rankErr.Ranks, c.Rank()) {
				<-ctx.Done()
			}
			return votes, err
		}), `rank \d in step \d+ has not returned after 2s`, []string{"Lockstep/Restarted"}},
	{"only goes on", inRanks(func() exchange {
		last := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step <= last {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Step: last, Ranks: []int{c.Rank()}}
			}
			last = v.Step
			return c.Exchange(ctx, v)
		}
	}), `rank \d in step 1: .*out of step.*; want the votes of step 1`, []string{"Lockstep/AllRestarted"}},
	{"counts the steps itself", inRanks(func() exchange {
		step := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			step++
			v.Step = step
			return c.Exchange(ctx, v)
		}
	}), `rank \d in step \d: .*want`, []string{"Lockstep/AllAhead", "Lockstep/Restarted"}},
	{"refuses a restarted rank for ever", inRanks(func() exchange {
		first := true
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == 1 && !first {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Ranks: []int{c.Rank()}}
			}
			first = false
			return c.Exchange(ctx, v)
		}
	}), `error .* has step 0, want 1`,
		[]string{"Lockstep/RestartedAfterFirstStep", "Runners/RestartedAfterFirstStep"}},
}

// missingFaults are faults with ranks that are missing or late.
var missingFaults = []fault{
	{"ignores the context",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			return c.Exchange(context.WithoutCancel(ctx), v)
		}), `rank \d in step \d+ has not returned after \d+s`,
		[]string{"Missing/Cancelled", "Runners/Missing", "Context/EndedBefore"}},
	{"ignores deadlines",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if _, ok := ctx.Deadline(); ok {
				ctx = context.WithoutCancel(ctx)
			}
			return c.Exchange(ctx, v)
		}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/DeadlineExceeded"}},
	{"leaves the others waiting",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrRankMissing) && ctx.Err() == nil {
				<-ctx.Done()
			}
			return votes, err
		}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/Cancelled"}},
	{"takes its time to say so", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		time.Sleep(3 * time.Second)
		return err
	}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/Cancelled"}},
	{"names the wrong rank", inErrors(fwd.ErrRankMissing, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks[0] = (err.Ranks[0] + 1) % c.Size()
		return err
	}), `rank \d.*: error .* (has ranks \[.*\], want \[|want a RankError that is)`,
		[]string{"Missing/Cancelled", "Missing/LateByDifferentSteps", "Plans/BeginMissing"}},
	{"names itself", inErrors(fwd.ErrRankMissing, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = append(err.Ranks, c.Rank())
		slices.Sort(err.Ranks)
		return err
	}), `error .*(has ranks|names itself)`, []string{"Missing/Cancelled", "Context/EndedBefore", "Load/Chaos"}},
	{"names nobody", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = nil
		return err
	}), `error .*(has ranks|or nobody)`, []string{"Missing/CancelledWithCause", "Load/Chaos"}},
	{"does not count a broken step",
		inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
			err.Step--
			return err
		}), `error .* has step \d+, want `, []string{"Missing/Late", "Load/Chaos"}},
	{"never works again", inRanks(func() exchange {
		var last error
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if last != nil {
				return nil, last
			}
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrRankMissing) {
				last = err
			}
			return votes, err
		}
	}), `want the votes of step \d`, []string{"Missing/Cancelled", "Runners/Missing"}},
	{"loses the cause", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fwd.ErrRankMissing
		return err
	}), `error .* is(| not) "the engine stops"`, []string{"Missing/CancelledWithCause", "Context/EndedBefore"}},
	{"gives everyone the cause", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fmt.Errorf("%w: %w", err.Err, context.Canceled)
		return err
	}), `error .* is "context canceled": true, want false|rank 1, when the context .*canceled`,
		[]string{"Missing/Cancelled", "Plans/BeginMissing"}},
	{"says that it is both", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fmt.Errorf("%w: %w", err.Err, fwd.ErrLockstep)
		return err
	}), `error .* is also fwd: ranks out of step`, []string{"Missing/DeadlineExceeded"}},
	{"refuses a late rank", inGroup(func() exchange {
		var broken atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if step := broken.Load(); v.Step <= step {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Step: step, Ranks: []int{c.Rank()}}
			}
			votes, err := c.Exchange(ctx, v)
			var rankErr *fwd.RankError
			if errors.As(err, &rankErr) {
				broken.Store(rankErr.Step)
			}
			return votes, err
		}
	}), `rank \d in step \d: .*out of step.*; want the votes of step \d`,
		[]string{"Missing/Late", "Runners/Late"}},
	{"returns a late rank's own step",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			votes = slices.Clone(votes)
			for i := range votes {
				votes[i].Step = v.Step
			}
			return votes, err
		}), `rank \d in step (\d): the vote of rank 0 has Step \d, want \d`,
		[]string{"Missing/Late", "Missing/LateByDifferentSteps"}},
	{"takes a restarted rank for a late one", inGroup(func() exchange {
		var broken atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if step := broken.Load(); v.Step <= step {
				v.Step = step + 1
			}
			votes, err := c.Exchange(ctx, v)
			var rankErr *fwd.RankError
			if errors.As(err, &rankErr) {
				broken.Store(rankErr.Step)
			}
			return votes, err
		}
	}), `rank \d in step \d: .*want error fwd: ranks out of step`,
		[]string{"Missing/LateAndRestarted", "Runners/LateAndRestarted"}},
}

// contextFaults are faults with contexts that have ended.
var contextFaults = []fault{
	{"returns the context's error",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return c.Exchange(ctx, v)
		}), `want error fwd: rank missing`, []string{"Context/EndedBefore"}},
	{"stays away with an ended context",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if ctx.Err() != nil {
				err := fmt.Errorf("%w: %w", fwd.ErrRankMissing, context.Cause(ctx))
				return nil, &fwd.RankError{Err: err, Step: v.Step, Ranks: others(c, c.Rank())}
			}
			return c.Exchange(ctx, v)
		}), `rank \d( in step|.* has not returned)`,
		[]string{"Context/EndedBefore", "Context/EndedBeforeTheLastCame"}},
	{"looks at the last context too", inRanks(func() exchange {
		last := context.Background()
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			both, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(last, cancel)()
			last = ctx
			return c.Exchange(both, v)
		}
	}), `rank \d in step \d returned .*; want it to wait`, []string{"Context/EndedAfter"}},
}
