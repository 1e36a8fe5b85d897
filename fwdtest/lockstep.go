package fwdtest

import (
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

// differentSteps checks that all ranks fail if they come at different steps, with the highest step
// and the ranks that are not at it. The group is whole again in the next one.
func (s suite) differentSteps(t *testing.T, size int) {
	g := s.group(t, size)
	for _, ahead := range [][]uint64{ // of the group; rank after rank, again and again
		{1, 2, 2}, {2, 1, 2}, {2, 2, 1}, {1, 1, 2}, {3, 1, 2}, {2, 1 << 40, 2},
	} {
		ahead = ahead[:min(size, 3)]
		highest := slices.Max(ahead)
		var calls []*call
		var behind []int
		for rank := range g.ranks {
			n := ahead[rank%3]
			calls = append(calls, g.come(t.Context(), rank, g.vote(rank, g.step+n)))
			if n < highest {
				behind = append(behind, rank)
			}
		}
		if g.step += highest - 1; behind == nil {
			g.agree(calls)
		} else {
			g.fail(calls, fwd.ErrLockstep, behind...)
		}
		g.together()
	}
}

// restarted checks that a restarted rank costs one failed step, whichever it is and whenever it
// comes, and that two cost no more.
func (s suite) restarted(t *testing.T, size int) {
	g := s.group(t, size)
	end := size - 1
	for _, restarted := range [][]int{{0}, {1}, {end}, {0, end}, {1, end}} {
		if restarted = slices.Compact(restarted); len(restarted) == size {
			continue // they agree at step 1
		}
		for _, last := range some(g.all()) {
			g.together()
			g.together()
			g.restart(restarted...)
			calls := g.begin(t.Context(), g.except(last)...)
			g.waiting(calls)
			g.fail(append(calls, g.begin(t.Context(), last)...), fwd.ErrLockstep, restarted...)
			g.together()
		}
	}
}

// restartedAfterFirstStep restarts a rank after the very first step, so that it says again what it
// said before. The coordinator may let it fail alone, as a rank that votes twice, or let all fail.
func (s suite) restartedAfterFirstStep(t *testing.T, size int) {
	g := s.group(t, size)
	g.together()
	g.restart(1)
	peers := g.begin(t.Context(), g.except(1)...)
	again := g.begin(t.Context(), 1)
	again[0].refused(fwd.ErrLockstep)
	g.pause()
	if peers[0].isDone() {
		g.fail(append(peers, again...), fwd.ErrLockstep, 1)
	} else {
		again[0].failed(fwd.ErrLockstep)
		g.agree(append(peers, g.begin(t.Context(), 1)...))
	}
	g.together()
}

// restartedAgain checks that a rank which restarts right after its first, failed step costs
// another.
func (s suite) restartedAgain(t *testing.T, size int) {
	g := s.group(t, size)
	for range 4 {
		g.together()
	}
	for range 3 {
		g.restart(1)
		g.fail(g.begin(t.Context(), g.all()...), fwd.ErrLockstep, 1)
	}
	g.together()
}

// allRestarted restarts all ranks together: nothing but the votes says at which step a group is.
func (s suite) allRestarted(t *testing.T, size int) {
	g := s.group(t, size)
	for range 3 {
		for range 5 {
			g.together()
		}
		g.restart(g.all()...)
		g.step = 0
	}
	g.together()
}

// allAhead lets all ranks be further on than the group was.
func (s suite) allAhead(t *testing.T, size int) {
	g := s.group(t, size)
	for _, ahead := range []uint64{1, 7, 1 << 40} {
		g.together()
		g.step += ahead
		for rank := range g.steps {
			g.steps[rank] = g.step
		}
		g.together()
	}
}
