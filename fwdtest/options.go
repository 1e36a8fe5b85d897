package fwdtest

import (
	"testing"

	"github.com/forwardctx/fwd"
)

// Option says what more [TestCoordinator] checks.
type Option interface{ apply(*suite) }

type optionFunc func(*suite)

func (f optionFunc) apply(s *suite) { f(s) }

// WithLoss lets the suite check what happens when messages get lost in one direction: a rank hears the
// others, and some of them do not hear it. A coordinator without messages does not give this option,
// and the checks of Loss are skipped.
//
// lose belongs to a group that newGroup has made. From its return until end is called, no message of
// rank from comes to rank to, and nothing else is lost: what rank from sends to others comes, and if
// these pass it on, that comes to rank to. Several losses may hold concurrently, of other pairs. end is
// not called for a loss that stays until the group is closed. The suite calls lose and end in the
// goroutine of t.
//
// The suite does not know which messages a coordinator sends, and over which ranks. So a loss may disturb
// nobody; then all must go on. Otherwise it demands this of every coordinator:
//
//   - Only the first step in which the loss can be felt may be complete on some ranks and broken on
//     others. In later ones nobody gets votes, or all do, until the loss ends. Ranks that get the votes
//     of a step get the same ones.
//   - Whoever gets no votes gets a [fwd.RankError] that is [fwd.ErrRankMissing] and names others. It
//     comes when its context ends, at the latest. If a rank that does not hear another gives up, all
//     that wait for votes with it, and that it hears, get it immediately.
//   - The error of a rank that does not hear others names only these. Once they know of it, the errors
//     of the others name ranks that are not heard or that do not hear. So a rank that is not heard by
//     one other learns which one that is. If a rank gives up before it has heard why it has to wait,
//     its error may name any other rank.
//   - It never happens in two steps in a row that, of the same two ranks, only one gets the votes.
//   - Once the loss has ended, at most two more steps fail, and then the group is whole. A step that
//     was open when the loss ended does not count.
func WithLoss(lose func(t *testing.T, group []fwd.Coordinator, from, to int) (end func())) Option {
	return optionFunc(func(s *suite) { s.lose = lose })
}

// WithSizes sets the numbers of ranks of the groups in which the checks run, instead of a few small ones
// for each check. Each check runs in a group of each size, in a subtest of its own, and is
// skipped for a size that it can't use: some need 3 ranks. In groups of more than 4 ranks the suite
// tries some of the ranks, pairs and orders where it tries all of a small one. NothingLeft always has
// small groups. All checks are meant for up to 32 ranks or so; for more there is [WithSmoke].
func WithSizes(sizes ...int) Option {
	return optionFunc(func(s *suite) { s.sizes = sizes })
}

// WithSmoke adds groups of those numbers of ranks for a few checks, one for each thing that may depend
// on the number: votes, order, lockstep, missing, late and last ranks, and plans.
func WithSmoke(sizes ...int) Option {
	return optionFunc(func(s *suite) { s.smoke = sizes })
}
