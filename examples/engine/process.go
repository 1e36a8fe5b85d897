package engine

import (
	"errors"
	"fmt"
	"time"

	"github.com/forwardctx/fwd"
)

// Process says that an engine runs one rank, and that its peers are in other processes. Each of
// them has an engine with the same configuration but for this. A rank has all experts then: the
// ranks still depend on each other in every step, but rows stay in the process.
type Process struct {
	Rank int

	// Target connects the ranks for the steps of the model, and Draft for the warm-up of its draft;
	// Draft is nil if there is none.
	Target, Draft fwd.Coordinator

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
	if p.Rank < 0 || p.Rank >= c.DataParallelSize {
		bad("Rank is %d, want 0 to %d for %d ranks", p.Rank, c.DataParallelSize-1, c.DataParallelSize)
	}
	group := func(name string, group fwd.Coordinator) {
		if group == nil {
			bad("%s is missing", name)
		} else if group.Rank() != p.Rank || group.Size() != c.DataParallelSize {
			bad("%s is of rank %d of %d, want rank %d of %d",
				name, group.Rank(), group.Size(), p.Rank, c.DataParallelSize)
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
