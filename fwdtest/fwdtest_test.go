// This file tests that the coordinators of the root package pass the suite.

package fwdtest_test

import (
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

func TestLocalGroup(t *testing.T) { fwdtest.TestCoordinator(t, localGroup) }

// All checks pass in groups of the sizes of common deployments, and a few in larger ones.
func TestSizes(t *testing.T) {
	fwdtest.TestCoordinator(t, localGroup, fwdtest.WithSizes(2, 3, 8, 32), fwdtest.WithSmoke(128))
}
