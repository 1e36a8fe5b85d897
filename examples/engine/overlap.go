package engine

import (
	"context"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtrace"
	"go.opentelemetry.io/otel/trace"
)

// With Config.Overlap a rank votes for step k + 1 just before it runs pass k, and asks for the others'
// votes after it, so that they travel while the pass runs. The schedule of step k + 1 is then made from
// what pass k will have done. In this engine all of that is known beforehand: each request gets the
// tokens that are scheduled, one that has caught up with itself gets one more, and ends if that is its
// last. What that token is shows in time, since a pass is laid out when the one before it has ended.
//
// The number of guesses that turn out right is not known beforehand, so there is no speculative decoding
// with it. An interrupt, or a request that arrives during pass k, is told with the votes for step k + 2,
// and so is the end of this rank's last request: until its pass has run, it may fail, and the other ranks
// must be there when this one is started again. Nothing is begun while the ranks sleep, or have agreed to
// stop, since an open exchange would wait for a step that never comes. Ranks that overlap and ranks that
// don't get along: their votes are the same.

// begun is a step that a rank has scheduled. If it was begun ahead, the rank has voted for it, too.
type begun struct {
	step    []scheduled
	own     note
	links   []trace.Link
	leftOut int                      // requests of the step that its pass has no links to
	agree   func() (fwd.Pass, error) // waits for the other ranks
	ahead   bool
	at      time.Time
}

// begin schedules a step. It votes only if it does so ahead; otherwise agree does.
func (r *rank) begin(ctx context.Context, interrupt <-chan struct{}, ahead bool) *begun {
	now := time.Now()
	b := &begun{step: r.scheduler.schedule(now), ahead: ahead, at: now}
	b.own = r.note(now, interrupt)
	b.links, b.leftOut = r.links(ctx, b.step)
	ctx = fwdtrace.ContextWithLinks(ctx, b.links...)
	schedule := scheduleOf(b.step)
	schedule.Note = b.own.word()
	if !ahead {
		b.agree = func() (fwd.Pass, error) { return r.target.runner.Plan(ctx, schedule) }
		return b
	}
	wait, err := r.target.runner.Begin(ctx, schedule)
	if b.agree = wait; err != nil {
		b.agree = func() (fwd.Pass, error) { return fwd.Pass{}, err } // after the pass that others count on
	}
	return b
}

// current returns the step to take: the one that was begun during the last pass, or a new one.
func (r *rank) current(ctx context.Context, interrupt <-chan struct{}) *begun {
	b := r.next
	if r.next = nil; b == nil {
		b = r.begin(ctx, interrupt, false)
	}
	return b
}

// beginNext begins the step after one whose pass is about to run. A rank that is alone waits for nobody.
func (r *rank) beginNext(ctx context.Context, interrupt <-chan struct{}, step []scheduled) {
	if cfg := &r.engine.config; cfg.Overlap && cfg.DataParallelSize > 1 {
		r.scheduler.foresee(step)
		r.next = r.begin(ctx, interrupt, true)
	}
}

// until returns for how long the rank has done something else when it asks for the votes.
func (b *begun) until(asked time.Time) time.Duration {
	if !b.ahead {
		return 0
	}
	return asked.Sub(b.at)
}

// leave waits for the end of the exchange that the rank has begun, if it has, when the run is over and
// its context has ended.
func (r *rank) leave() {
	if r.next != nil {
		_, _ = r.next.agree()
	}
}

// foresee makes the scheduler take a step for done whose pass is about to run. A request that ends with
// it leaves the batch now. Its blocks can go to another request, whose first pass comes after this one.
func (s *scheduler) foresee(step []scheduled) {
	for _, part := range step {
		seq := part.seq
		seq.coming = part.count
		caughtUp := seq.computed+part.count == seq.known()
		if caughtUp && len(seq.result.Tokens)+1 == seq.request.MaxTokens {
			s.remove(seq)
			seq.left = true
			s.leaving++
		}
	}
}
