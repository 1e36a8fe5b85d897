//go:build unix

// Tests with ranks that die.

package faults

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestKilled: a rank that dies ends the run after the others have waited for it as long as they
// may. They say who is missing, and keep what they have finished.
func TestKilled(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	for killed := range 3 {
		t.Run(fmt.Sprint("rank=", killed), func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, 3, at(startServer(t, serverOptions())), "-exchange-timeout 2s")
			g.startAll()
			g.reach(0.3)
			g.ranks[killed].kill()
			began := time.Now()
			for _, p := range g.ranks {
				p.wait()
			}
			if took := time.Since(began); took < timeout/2 || took > timeout+5*time.Second {
				t.Errorf("the others ended after %v, want %v", took, timeout)
			}
			g.amid()
			whole := g.files[killed] + ".whole"
			copyLines(t, g.files[killed], whole)
			g.check(killed, whole)
			for rank, p := range g.ranks {
				if rank == killed {
					continue
				}
				text, finished := p.failure()
				if want := fmt.Sprintf("missing: ranks [%d])", killed); !strings.Contains(text, want) {
					t.Errorf("rank %d does not say %q: %s", rank, want, text)
				}
				if n := g.check(rank, g.files[rank]); n != finished {
					t.Errorf("rank %d has %d results, and says %d", rank, n, finished)
				}
			}
		})
	}
}

// TestKilledAndRestarted: ranks that die and are started again with the same command go on where
// they were, and the others go on with them. Each element of killed is the ranks that die together.
func TestKilledAndRestarted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		flags  string
		killed [][]int
	}{
		{"one", "", [][]int{{1}}},
		{"one after another", "", [][]int{{0}, {2}}},
		{"twice", "", [][]int{{2}, {2}}},
		{"several", "", [][]int{{0, 1}}},
		{"all", "", [][]int{{0, 1, 2}}},
		{"draft", "-spec 2", [][]int{{1}, {0}}},
		{"overlap", "-overlap", [][]int{{1}, {0, 2}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, 3, at(startServer(t, serverOptions())), "-exchange-timeout 1s -rejoin 1m "+tt.flags)
			g.startAll()
			resumed := make([]int, len(g.ranks))
			for i, killed := range tt.killed {
				g.reach(float64(i+1) / float64(len(tt.killed)+2))
				for _, rank := range killed {
					g.ranks[rank].kill()
				}
				g.amid()
				for _, rank := range killed {
					resumed[rank] = written(t, g.files[rank])
					g.start(rank)
				}
			}
			for rank, r := range g.complete() {
				if r.Resumed != resumed[rank] {
					t.Errorf("rank %d: %+v, want %d resumed", rank, r, resumed[rank])
				}
			}
		})
	}
}
