package fwdtest

import (
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

// laster is a coordinator that names the rank whose vote came last.
type laster interface{ Last() int }

// lastGroup returns a group whose coordinators have a method Last. It skips the check if they have
// none.
func (s suite) lastGroup(t *testing.T, size int) *group {
	t.Helper()
	return groupWith[laster](s.group(t, size), "Last() int")
}

// lastOf returns the rank that one names, which it must do immediately.
func (g *group) lastOf(rank int) int {
	g.Helper()
	return immediately(g, rank, "Last", g.ranks[rank].(laster).Last)
}

// cameLast checks that those ranks name one as the last in their latest exchange, or -1.
func (g *group) cameLast(want int, ranks ...int) {
	g.Helper()
	for _, rank := range ranks {
		if got := g.lastOf(rank); got != want {
			g.Errorf("rank %d names %d as the last, want %d", rank, got, want)
		}
	}
}

// lastNone checks that nobody names a rank before the first exchange has ended, and that a rank which is
// alone is its own last one.
func (s suite) lastNone(t *testing.T, size int) {
	g := s.lastGroup(t, size)
	last := size - 1
	g.cameLast(-1, g.all()...)
	calls := g.begin(t.Context(), g.except(last)...)
	g.pause()
	g.cameLast(-1, g.all()...)
	g.agree(append(calls, g.begin(t.Context(), last)...))
	g.cameLast(last, g.all()...)
	alone := s.lastGroup(t, 1)
	alone.cameLast(-1, 0)
	alone.together()
	alone.cameLast(0, 0)
}

// lastInOrder checks that all ranks name the one that came last, in whatever order they come, and also
// if they are out of step. Until an exchange has ended, the one before counts.
func (s suite) lastInOrder(t *testing.T, size int) {
	g := s.lastGroup(t, size)
	before := -1
	for i, order := range arrivalOrders(size) {
		last := order[size-1]
		restarted := i > 0 && i%3 == 0 && size > 2 // not after the first step, which it would repeat
		if restarted {
			g.restart(last)
		}
		calls := g.beginInOrder(t.Context(), order[:size-1]...)
		g.pause()
		g.cameLast(before, g.all()...)
		calls = append(calls, g.begin(t.Context(), last)...)
		if restarted {
			g.fail(calls, fwd.ErrLockstep, last)
		} else {
			g.agree(calls)
		}
		g.cameLast(last, g.all()...)
		before = last
	}
}

// lastAfterBrokenSteps checks that nobody came last in a broken step: its ranks name none until the next
// one has ended. For ranks that were not in it, it is no exchange. A late rank may be the last.
func (s suite) lastAfterBrokenSteps(t *testing.T, size int) {
	g := s.lastGroup(t, size)
	for _, late := range some(g.all()) {
		others := g.except(late)
		last := others[size-2]
		g.agree(g.beginInOrder(t.Context(), append([]int{late}, others...)...))
		g.cameLast(last, g.all()...)
		g.breakStep(others...)
		g.cameLast(-1, others...)
		g.cameLast(last, late)
		g.agree(g.beginInOrder(t.Context(), append(others, late)...))
		g.cameLast(late, g.all()...)
	}
}

// lastAnyTime lets several goroutines ask while the group takes steps as fast as it can. Nobody can say
// who is the last at that moment, but it is a rank, or nobody yet.
func (s suite) lastAnyTime(t *testing.T, size int) {
	g := s.lastGroup(t, size)
	g.whileStepsAreTaken(s.many(1000), func() bool {
		for rank, c := range g.ranks {
			if last := c.(laster).Last(); last < -1 || last >= len(g.ranks) {
				t.Errorf("rank %d of %d names %d as the last while steps are taken", rank, len(g.ranks), last)
				return false
			}
		}
		return true
	})
	for rank := range g.ranks {
		if last := g.lastOf(rank); !slices.Contains(g.all(), last) {
			t.Errorf("rank %d names %d as the last after many steps, want a rank", rank, last)
		}
	}
}
