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

// WithSizes sets the numbers of ranks of the groups in which the checks run, instead of a few small ones
// that each check has chosen. Each check runs in a group of each size, in a subtest of its own, and is
// skipped for a size that it can't use: some need 3 ranks. In groups of more than 4 ranks the suite
// tries some of the ranks, pairs and orders in which it tries all of a small group. Checks of groups
// with 32 ranks are fine; for more there is [WithSmoke].
func WithSizes(sizes ...int) Option {
	return optionFunc(func(s *suite) { s.sizes = sizes })
}

// WithSmoke adds groups of those numbers of ranks for a few checks, one for each thing that may depend
// on the number: votes, order, lockstep, missing, late and last ranks, and plans.
func WithSmoke(sizes ...int) Option {
	return optionFunc(func(s *suite) { s.smoke = sizes })
}
