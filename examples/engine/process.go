package engine

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
)

// Process says that an engine runs some of the ranks, and that their peers are in other processes. Each
// of them has an engine with the same configuration but for this. A rank has all experts then: the
// ranks still depend on each other in every step, but rows stay with their rank. So a step that went
// well for one rank of a process and not for another holds up neither.
type Process struct {
	Ranks []int

	// Target connects the ranks for the steps of the model, and Draft for the warm-up of its draft, in
	// the order of Ranks; Draft is nil if there is none.
	Target, Draft []fwd.Coordinator

	// Same is what must be the same in all processes beside the configuration, in the same order. Ranks
	// that differ in it refuse to serve together. They find out before they warm up; so does a rank
	// that is started again.
	Same []Setting

	// Rejoin is how long the ranks wait for one that is missing or out of step, counted from the first
	// exchange that failed: they try again until a step has gone well, and the first failure after
	// that time ends the run. 0: any failure does.
	Rejoin time.Duration
}

func (p *Process) check(c *Config) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("engine: Process: "+format, args...))
	}
	if len(p.Ranks) == 0 {
		bad("Ranks is empty, want at least one")
	}
	for i, rank := range p.Ranks {
		if rank < 0 || rank >= c.DataParallelSize {
			bad("Ranks is %v, want 0 to %d for %d ranks", p.Ranks, c.DataParallelSize-1, c.DataParallelSize)
		}
		if slices.Contains(p.Ranks[:i], rank) {
			bad("Ranks is %v, with rank %d twice", p.Ranks, rank)
		}
	}
	group := func(name string, group []fwd.Coordinator) {
		if len(group) != len(p.Ranks) {
			bad("%s has %d coordinators for %d ranks", name, len(group), len(p.Ranks))
			return
		}
		for i, rank := range p.Ranks {
			if g := group[i]; g == nil {
				bad("%s is missing for rank %d", name, rank)
			} else if g.Rank() != rank || g.Size() != c.DataParallelSize {
				bad("%s is of rank %d of %d, want rank %d of %d", name, g.Rank(), g.Size(), rank, c.DataParallelSize)
			}
		}
	}
	group("Target", p.Target)
	if c.NumSpeculativeTokens > 0 {
		group("Draft", p.Draft)
	}
	if p.Rejoin < 0 {
		bad("Rejoin is %v, want at least 0", p.Rejoin)
	}
	if c.Coordinators != nil || c.DraftCoordinators != nil {
		bad("%d coordinators and %d draft coordinators beside it: they are for ranks in one process",
			len(c.Coordinators), len(c.DraftCoordinators))
	}
	return errors.Join(errs...)
}

// ErrInterrupted is wrapped by the error of a run that ends because of another rank, whose own run
// was interrupted.
var ErrInterrupted = errors.New("engine: interrupted")

// isRankError reports whether an exchange failed because of other ranks.
func isRankError(err error) bool {
	return errors.Is(err, fwd.ErrRankMissing) || errors.Is(err, fwd.ErrLockstep)
}
