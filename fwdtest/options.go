package fwdtest

import (
	"testing"

	"github.com/forwardctx/fwd"
)

// Option says what more [TestCoordinator] checks.
type Option interface{ apply(*suite) }

type optionFunc func(*suite)

func (f optionFunc) apply(s *suite) { f(s) }

// WithLoss lets the suite check what happens when messages get lost in one direction. A coordinator
// without messages does not give this option, and the checks of Loss are skipped.
//
// lose belongs to a group that newGroup has made. From its return until end is called, no message of
// rank from comes to rank to, and nothing else is lost: what from sends to others comes, and what
// others pass on from it comes to rank to as well. Several losses may hold concurrently, of other
// pairs. end is not called for a loss that stays until the group is closed. The suite calls lose and
// end from the goroutine of the subtest t.
func WithLoss(lose func(t *testing.T, group []fwd.Coordinator, from, to int) (end func())) Option {
	return optionFunc(func(s *suite) { s.lose = lose })
}
