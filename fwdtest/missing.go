package fwdtest

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

// ending is a way in which a context ends. It returns a context, a function that returns when that
// has ended, and the cause.
type ending func(g *group) (ctx context.Context, end func(), cause error)

func cancelled(g *group) (context.Context, func(), error) {
	ctx, cancel := context.WithCancel(g.Context())
	return ctx, cancel, context.Canceled
}

func cancelledWithCause(g *group) (context.Context, func(), error) {
	cause := errors.New("the engine stops")
	ctx, cancel := context.WithCancelCause(g.Context())
	return ctx, func() { cancel(cause) }, cause
}

func deadlineExceeded(g *group) (context.Context, func(), error) {
	ctx, cancel := context.WithTimeout(g.Context(), 10*g.settle)
	return ctx, func() { <-ctx.Done(); cancel() }, context.DeadlineExceeded
}

// missing returns a check in which the context of a rank ends first. All that wait fail
// immediately, with the ranks that had not come, and that rank alone also has the cause. Then the
// group goes on, and those that come late get no error.
func missing(ending ending) func(s suite, t *testing.T, size int) {
	return func(s suite, t *testing.T, size int) {
		g := s.group(t, size)
		last := size - 1
		for _, here := range [][]int{{0}, {last}, {1, last - 1}, {last - 1, 0}, {last, 1, 0}, g.except(last)} {
			if here = distinct(here); len(here) == size {
				continue
			}
			g.together()
			ctx, end, cause := ending(g)
			calls := append(g.begin(ctx, here[0]), g.begin(context.Background(), here[1:]...)...)
			g.pause()
			end()
			g.fail(calls, fwd.ErrRankMissing, g.except(here...)...)
			for _, c := range calls {
				if own := c.rank == here[0]; errors.Is(c.err, cause) != own {
					t.Errorf("%v, when the context of rank %d ended: error %v is %q: %t, want %t",
						c, here[0], c.err, cause, !own, own)
				}
			}
			g.together()
		}
	}
}

// distinct returns the ranks without those that came before in the list.
func distinct(ranks []int) (distinct []int) {
	for _, rank := range ranks {
		if !slices.Contains(distinct, rank) {
			distinct = append(distinct, rank)
		}
	}
	return distinct
}

// late lets a rank come late to one broken step or to several, as the last, as the first or in
// between: its vote counts in the group's step.
func (s suite) late(t *testing.T, size int) {
	g := s.group(t, size)
	for broken := 1; broken <= 3; broken++ {
		for _, at := range some(g.all()) {
			late := (at + broken) % size
			others := g.except(late)
			for range broken {
				g.breakStep(others...)
			}
			g.agree(g.beginInOrder(t.Context(), slices.Insert(others, at, late)...))
			g.together()
		}
	}
}

// lateByDifferentSteps lets two ranks be late by different numbers of steps, and lets a late rank
// come to a round that breaks too.
func (s suite) lateByDifferentSteps(t *testing.T, size int) {
	g := s.group(t, size)
	g.together()
	g.breakStep(0, 1)
	g.breakStep(0)
	g.breakStep(0, 2)
	g.together()
	g.breakStep(0, 1)
	g.breakStep(2)
	g.breakStep(0, 2)
	g.together()
	g.together()
}

// lateAndRestarted checks that a late rank which was also restarted is out of step, as any
// restarted one, and that one which waits alone learns the group's step from its broken round.
func (s suite) lateAndRestarted(t *testing.T, size int) {
	g := s.group(t, size)
	for range 5 {
		g.together()
	}
	g.breakStep(0)
	g.restart(1)
	g.fail(g.begin(t.Context(), g.all()...), fwd.ErrLockstep, 1)
	g.together()
	g.restart(1)
	ctx, cancel := context.WithCancel(t.Context())
	alone := g.begin(ctx, 1)
	g.pause()
	cancel()
	alone[0].returned(atOnce)
	var err *fwd.RankError
	if errors.As(alone[0].err, &err) && err.Step == g.step {
		g.step-- // the round in which it waited need not count as a step
	}
	g.fail(alone, fwd.ErrRankMissing, g.except(1)...)
	g.together()
}

// endedBefore checks that a rank whose context has ended before it comes, when nobody is there,
// fails immediately.
func (s suite) endedBefore(t *testing.T, size int) {
	g := s.group(t, size)
	ended, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the engine stops")
	cancel(cause)
	for _, rank := range some(g.all()) {
		calls := g.begin(ended, rank)
		g.fail(calls, fwd.ErrRankMissing, g.except(rank)...)
		if err := calls[0].err; !errors.Is(err, cause) {
			t.Errorf("rank %d: error %v is not %q", rank, err, cause)
		}
		g.together()
	}
}

// endedBeforeTheLastCame lets a rank come last whose context has ended. It need not wait, so the
// round may be complete, or it may break; but it does the same for all.
func (s suite) endedBeforeTheLastCame(t *testing.T, size int) {
	g := s.group(t, size)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, last := range some(g.all()) {
		others := g.begin(t.Context(), g.except(last)...)
		g.waiting(others)
		c := g.begin(ended, last)[0]
		if c.returned(atOnce); c.err == nil {
			g.agree(append(others, c))
		} else {
			g.fail(others, fwd.ErrRankMissing, last)
			err := c.failed(fwd.ErrRankMissing)
			if len(err.Ranks) == 0 || slices.Contains(err.Ranks, last) || !errors.Is(err, context.Canceled) {
				t.Errorf("%v: error %v, want one that names others and is %q", c, err, context.Canceled)
			}
		}
		g.together()
	}
}

// endedAfter checks that a context which ends after its exchange has returned disturbs nobody.
func (s suite) endedAfter(t *testing.T, size int) {
	g := s.group(t, size)
	for _, last := range some(g.all()) {
		ctx, cancel := context.WithCancel(t.Context())
		g.agree(g.begin(ctx, g.all()...))
		others := g.begin(t.Context(), g.except(last)...)
		cancel()
		g.waiting(others)
		g.agree(append(others, g.begin(t.Context(), last)...))
	}
}
