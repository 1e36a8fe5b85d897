// This file tests that the coordinators of the root package pass the suite.

package fwdtest_test

import (
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
)

func localGroup(t *testing.T, size int) []fwd.Coordinator {
	t.Helper()
	group, err := fwd.NewLocalGroup(size)
	if err != nil {
		t.Fatal(err)
	}
	return group
}

// asked notes of how many ranks the groups are that the suite makes.
type asked struct {
	mu    sync.Mutex
	sizes map[int]int // how many groups of each size
}

func (a *asked) localGroup(t *testing.T, size int) []fwd.Coordinator {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sizes == nil {
		a.sizes = make(map[int]int)
	}
	a.sizes[size]++
	return localGroup(t, size)
}

// Without options all groups are small.
func TestLocalGroup(t *testing.T) {
	var a asked
	fwdtest.TestCoordinator(t, a.localGroup)
	for size, groups := range a.sizes {
		if size > 8 {
			t.Errorf("%d groups have %d ranks, want at most 8 ranks", groups, size)
		}
	}
}

// All checks pass in groups of the sizes of common deployments, and a few in larger ones.
func TestSizes(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("takes a minute, and many with the race detector")
	}
	var a asked
	fwdtest.TestCoordinator(t, a.localGroup, fwdtest.WithSizes(2, 3, 8, 32), fwdtest.WithSmoke(128))
	for size, most := range map[int]int{2: 1000, 3: 1000, 8: 1000, 32: 1000, 128: 20} {
		if groups := a.sizes[size]; groups < 10 || groups > most {
			t.Errorf("%d groups have %d ranks, want 10 to %d", groups, size, most)
		}
	}
}
