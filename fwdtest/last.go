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
func (s suite) lastNone(t *testing.T) {
	g := s.lastGroup(t, 3)
	g.cameLast(-1, g.all()...)
	calls := g.begin(t.Context(), 0, 1)
	g.pause()
	g.cameLast(-1, g.all()...)
	g.agree(append(calls, g.begin(t.Context(), 2)...))
	g.cameLast(2, g.all()...)
	alone := s.lastGroup(t, 1)
	alone.cameLast(-1, 0)
	alone.together()
	alone.cameLast(0, 0)
}

// lastInOrder checks that all ranks name the one that came last, in whatever order they come, and also
// if they are out of step. Until an exchange has ended, the one before counts.
func (s suite) lastInOrder(t *testing.T) {
	groups := map[int]*group{3: s.lastGroup(t, 3), 4: s.lastGroup(t, 4)}
	before := map[int]int{3: -1, 4: -1}
	for i, order := range arrivalOrders() {
		n := len(order)
		g, last := groups[n], order[n-1]
		restarted := i > 6 && i%3 == 0 // after several steps, so that its first one is another
		if restarted {
			g.restart(last)
		}
		calls := g.beginInOrder(t.Context(), order[:n-1]...)
		g.pause()
		g.cameLast(before[n], g.all()...)
		calls = append(calls, g.begin(t.Context(), last)...)
		if restarted {
			g.fail(calls, fwd.ErrLockstep, last)
		} else {
			g.agree(calls)
		}
		g.cameLast(last, g.all()...)
		before[n] = last
	}
}

// lastAfterBrokenSteps checks that nobody came last in a broken step: its ranks name none until the next
// one has ended. For ranks that were not in it, it is no exchange. A late rank may be the last.
func (s suite) lastAfterBrokenSteps(t *testing.T) {
	g := s.lastGroup(t, 3)
	for late := range g.ranks {
		others := g.except(late)
		g.agree(g.beginInOrder(t.Context(), append([]int{late}, others...)...))
		g.cameLast(others[1], g.all()...)
		g.breakStep(others...)
		g.cameLast(-1, others...)
		g.cameLast(others[1], late)
		g.agree(g.beginInOrder(t.Context(), append(others, late)...))
		g.cameLast(late, g.all()...)
	}
}

// lastAnyTime lets several goroutines ask while the group takes steps as fast as it can. Nobody can say
// who is the last at that moment, but it is a rank, or nobody yet.
func (s suite) lastAnyTime(t *testing.T) {
	g := s.lastGroup(t, 4)
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
