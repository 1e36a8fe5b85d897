package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
)

// Process says that an engine runs one rank, and that its peers are in other processes. Each of them has an engine with the
// same configuration but for this. A rank has all experts then: the ranks still depend on each other in every step, but rows
// stay in the process.
type Process struct {
	Rank int

	// The groups that connect the ranks: for the steps of the model, for those of its draft, nil where there is none, and to
	// find out together whether there is anything left to do.
	Target, Draft, Finish fwd.Coordinator

	// Rejoin is how long the ranks wait for one that is missing or out of step, counted from the first exchange that failed:
	// they try again until a step has gone well, and the first failure after that time ends the run. 0: any failure does.
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
			bad("%s is of rank %d of %d, want rank %d of %d", name, group.Rank(), group.Size(), p.Rank, c.DataParallelSize)
		}
	}
	group("Target", p.Target)
	if c.NumSpeculativeTokens > 0 {
		group("Draft", p.Draft)
	}
	group("Finish", p.Finish)
	if p.Rejoin < 0 {
		bad("Rejoin is %v, want at least 0", p.Rejoin)
	}
	if c.Coordinators != nil || c.DraftCoordinators != nil {
		bad("%d coordinators and %d draft coordinators beside it: they are for ranks in one process", len(c.Coordinators), len(c.DraftCoordinators))
	}
	return errors.Join(errs...)
}

// ErrInterrupted is wrapped by the error of a run that ends because of another rank, whose own run was interrupted.
var ErrInterrupted = errors.New("engine: interrupted")

// isRankError reports whether an exchange failed because of other ranks.
func isRankError(err error) bool {
	return errors.Is(err, fwd.ErrRankMissing) || errors.Is(err, fwd.ErrLockstep)
}

// retryPause keeps a rank from asking in a busy loop where every answer is an error at once.
const retryPause = 10 * time.Millisecond

// missed is told of every exchange of the rank that has failed. It returns nil where the run goes on, err where it does not.
func (r *rank) missed(ctx context.Context, err error) error {
	if !isRankError(err) || ctx.Err() != nil {
		return err
	}
	r.figures.failed++
	if r.since.IsZero() {
		r.since = time.Now()
	}
	if p := r.engine.config.Process; p == nil || time.Since(r.since) >= p.Rejoin {
		return err
	}
	r.lost = true
	sleep(ctx, retryPause)
	return nil
}

// syncEvery is after how many steps the ranks ask each other whether there is anything left to do. It is what the last of
// them may be late with an answer to an interrupt, and what they may run for nothing.
const syncEvery = 16

// processGate is the gate of a rank whose peers are other processes. They share nothing, so they meet: before the first step,
// after every step whose number is a multiple of syncEvery, and after any failed exchange. The last is what brings ranks
// together again: one that was restarted begins here, and those who have missed it, wherever that was, come here too, the
// last of them when it has waited for the others in vain.
type processGate struct {
	ctx     context.Context // of Run: once it has ended, this rank wants to stop
	group   fwd.Coordinator
	timeout time.Duration
	step    uint64 // that the group has behind it
}

// next implements gate. It says the same to all ranks that have met.
func (g *processGate) next(ctx context.Context, r *rank) (bool, error) {
	if !r.lost && r.agreed%syncEvery != 0 {
		return true, nil
	}
	for {
		votes, err := g.exchange(ctx, r)
		if err != nil {
			if err := r.missed(ctx, fmt.Errorf("finish: %w", err)); err != nil {
				return false, err
			}
			continue
		}
		r.lost = false
		stop := slices.IndexFunc(votes, func(v fwd.Vote) bool { return v.UBatch })
		switch unfinished, idle := g.read(votes); {
		case stop >= 0 && !votes[r.rank].UBatch && r.scheduler.unfinished() > 0:
			return false, fmt.Errorf("%w with rank %d", ErrInterrupted, stop)
		case stop >= 0 || unfinished == 0:
			return false, nil
		case idle == 0:
			return true, nil
		default:
			sleep(ctx, idle)
		}
	}
}

// exchange tells the others what r has to do, and returns the votes of all. It is to the group what a Runner is to its own.
func (g *processGate) exchange(ctx context.Context, r *rank) ([]fwd.Vote, error) {
	began := time.Now()
	defer func() { r.figures.atGate += time.Since(began) }()
	ctx, cancel := context.WithTimeoutCause(ctx, g.timeout, fmt.Errorf("no exchange within %v: %w", g.timeout, context.DeadlineExceeded))
	defer cancel()
	votes, err := g.group.Exchange(ctx, g.vote(r, began))
	var agreed fwd.Agreement
	if err == nil {
		agreed, err = fwd.Agree(votes, 0)
		g.step = agreed.Step
	}
	if rankErr, ok := errors.AsType[*fwd.RankError](err); ok {
		g.step = rankErr.Step
	}
	return votes, err
}

// vote returns what r has to say. The group has votes of the form that it has for steps, in which the tokens are requests,
// the padding is how long there is nothing to do, in milliseconds, and what wants microbatches wants to stop.
func (g *processGate) vote(r *rank, now time.Time) fwd.Vote {
	unfinished := r.scheduler.unfinished()
	idle := r.scheduler.idle(now, g.longest())
	return fwd.Vote{
		Step:            g.step + 1,
		NumTokens:       unfinished,
		NumTokensPadded: unfinished + int((idle+time.Millisecond-1)/time.Millisecond),
		UBatch:          g.ctx.Err() != nil,
	}
}

// read returns what all ranks have to do: how many requests are unfinished, and how long none of them can go on.
func (g *processGate) read(votes []fwd.Vote) (unfinished int, idle time.Duration) {
	idle = g.longest()
	for _, v := range votes {
		unfinished += v.NumTokens
		idle = min(idle, time.Duration(v.NumTokensPadded-v.NumTokens)*time.Millisecond)
	}
	return unfinished, idle
}

// longest returns how long the ranks sleep at most: so late may an answer to an interrupt come, and a rank that was restarted
// waits for the others to wake up, for less than an exchange may take.
func (g *processGate) longest() time.Duration { return min(time.Second, g.timeout/2) }

// sleep waits for so long, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
