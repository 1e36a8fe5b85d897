//go:build unix

// Tests with ranks that stand still.

package faults

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestStopped: if a rank stands still for less time than the others wait for it, no step is lost.
// If it stands still for longer, steps are lost, and all go on with it afterwards.
func TestStopped(t *testing.T) {
	stop := func(t *testing.T, flags string) (g *group, down, up func(rank int)) {
		g = newGroup(t, 3, at(startServer(t, serverOptions())), flags)
		down = func(rank int) { g.ranks[rank].signal(syscall.SIGSTOP) }
		up = func(rank int) { g.ranks[rank].signal(syscall.SIGCONT) }
		return g, down, up
	}
	outages(t, 500*time.Millisecond, 2500*time.Millisecond, stop)
}

// TestTakenOver: a rank that stands still is taken for dead, and another process takes its place.
// When the first one goes on, it learns that and ends; the others don't notice. Each of the two has
// a results file of its own, since the first one may still write what it had finished.
func TestTakenOver(t *testing.T) {
	t.Parallel()
	for _, rank := range []int{0, 2} {
		t.Run(fmt.Sprint("rank=", rank), func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, 3, at(startServer(t, serverOptions())), "-exchange-timeout 1s -rejoin 1m")
			g.startAll()
			g.reach(0.3)
			old, oldFile := g.ranks[rank], g.files[rank]
			old.signal(syscall.SIGSTOP)
			g.standStill(500 * time.Millisecond)

			g.files[rank] = oldFile + ".2"
			copyLines(t, oldFile, g.files[rank])
			resumed := written(t, g.files[rank])
			g.start(rank)
			eventually(t, "the other process has results", func() bool { return written(t, g.files[rank]) > resumed })
			old.signal(syscall.SIGCONT)
			text, finished := old.failure()
			g.amid()
			if want := "another process has this rank: it became rank "; !strings.Contains(text, want) {
				t.Errorf("the first rank %d does not say %q: %s", rank, want, text)
			}
			if n := g.check(rank, oldFile); n != finished {
				t.Errorf("the first rank %d has %d results, and says %d", rank, n, finished)
			}
			// The new process asks for a warm-up while the others ask for a step. That exchange fails, and
			// then all of them warm up together.
			if r := g.complete()[rank]; r.Resumed != resumed || r.FailedSteps > 1 {
				t.Errorf("rank %d: %+v, want %d resumed and at most one failed step", rank, r, resumed)
			}
		})
	}
}
