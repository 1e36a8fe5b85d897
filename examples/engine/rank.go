package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"gonum.org/v1/gonum/mat"
)

// rank is one data-parallel rank: its own requests and an instance of the model.
type rank struct {
	rank      int
	engine    *Engine
	scheduler *scheduler
	target    *instance
	draft     *instance // nil: no speculative decoding
	figures   figures
	load      load
	tracer    trace.Tracer
	meters    *meters
	missing   time.Time // when exchanges began to fail; zero: the last one went well
	replan    replan
	next      *begun // during a pass, the step after it; nil: it is not begun ahead
}

// serve is the life of a rank. It warms up, and then takes steps until the ranks agree to stop.
//
// If ranks turn out to be out of step, one of them may have been restarted, and have no graphs yet.
// Then all of them warm up again, which costs those that have their graphs no more than a few dummy
// passes.
func (r *rank) serve(ctx context.Context, interrupt <-chan struct{}) error {
	defer func() { r.figures.ended = time.Now() }()
	ready, more := false, true
	for more {
		var err error
		switch {
		case !ready:
			err = r.warmUp(ctx)
			ready = err == nil
		case r.replan.agreed:
			err = r.change(ctx)
			ready = err == nil
		default:
			more, err = r.step(ctx, interrupt)
		}
		if err != nil {
			if err := r.missed(ctx, err); err != nil {
				return err
			}
			ready = ready && !errors.Is(err, fwd.ErrLockstep) && !r.replan.isStranger(err)
		}
	}
	return nil
}

// warmUp captures all graphs, together with the other ranks, which must have been started alike.
func (r *rank) warmUp(ctx context.Context) error {
	ctx, span := r.startWarmUp(ctx)
	defer span.End()
	began := time.Now()
	if err := r.fallBack(); err != nil {
		return err
	}
	if err := r.greet(ctx); err != nil {
		return err
	}
	for _, in := range r.instances() {
		if err := in.warmUp(ctx, nil); err != nil {
			return err
		}
	}
	r.countAnew()
	r.beginLadder(time.Since(began))
	if r.figures.began.IsZero() { // the first time: requests arrive from now on
		r.figures.began = time.Now()
		r.figures.warmUp = r.figures.began.Sub(began)
		r.scheduler.open(r.figures.began, r.engine.arrival)
	}
	return nil
}

// startWarmUp starts the span of a warm-up. With the step trace all steps are below that of rank 0,
// so the others need none.
func (r *rank) startWarmUp(ctx context.Context) (context.Context, trace.Span) {
	if r.engine.config.StepTrace && r.rank > 0 {
		return ctx, noop.Span{}
	}
	return r.tracer.Start(ctx, "warm-up", trace.WithNewRoot())
}

// instances returns the rank's models.
func (r *rank) instances() []*instance {
	if r.draft == nil {
		return []*instance{r.target}
	}
	return []*instance{r.target, r.draft}
}

// step is one step of the engine on one rank. It returns false if the ranks have agreed to stop. If
// the ranks don't come together, nothing has happened: what was scheduled will be scheduled again.
func (r *rank) step(ctx context.Context, interrupt <-chan struct{}) (more bool, err error) {
	b := r.current(ctx, interrupt)
	asked := time.Now()
	r.figures.meanwhile = b.until(asked)
	r.noteLoad(ctx, asked)
	pass, err := r.plan(b)
	if err != nil {
		r.figures.votes += time.Since(asked)
		return true, err
	}
	r.missing, r.replan.strangers = time.Time{}, 0
	all := notesOf(pass.Agreement, b.own)
	if stop := all.stopping(); stop >= 0 {
		return false, r.interrupted(stop, b.own)
	}
	if !all.unfinished() {
		return false, nil
	}
	r.hear(all)
	if idle := all.idle(); idle > 0 {
		sleep(ctx, interrupt, idle)
		return true, nil
	}
	pass.Links = b.links
	if !r.replan.agreed { // graphs can't change while an exchange is open
		r.beginNext(ctx, interrupt, b.step)
	}
	return true, r.run(ctx, &pass, b.step, b.leftOut)
}

// noteLoad shows what the rank holds.
func (r *rank) noteLoad(ctx context.Context, now time.Time) {
	r.load.note(r.scheduler, now)
	r.meters.noteLoad(ctx, &r.load)
}

// note returns what this rank has to say with its vote.
func (r *rank) note(now time.Time, interrupt <-chan struct{}) note {
	n := note{
		unfinished: r.scheduler.unfinished() > 0,
		idle:       r.scheduler.idle(now, r.engine.config.longestSleep()),
		sizes:      r.choice(),
	}
	select {
	case <-interrupt:
		n.stop = true
	default:
	}
	return n
}

// plan agrees with the other ranks on the step. A rank that is alone and has nothing to do agrees
// with nobody, and has no pass.
func (r *rank) plan(b *begun) (fwd.Pass, error) {
	if len(b.step) == 0 && r.engine.config.DataParallelSize == 1 {
		return fwd.Pass{}, nil
	}
	pass, err := b.agree()
	if err == nil && pass.Agreement != nil {
		err = outOfStep(pass.Agreement, func(note uint64) bool { return note&greeting != 0 })
	}
	return pass, err
}

// outOfStep returns an error if some ranks greet the others, since they have been started again, and
// some take a step. The note of either tells it from the other.
func outOfStep(a *fwd.Agreement, is func(note uint64) bool) error {
	var ranks []int
	for rank, v := range a.Votes {
		if is(v.Note) {
			ranks = append(ranks, rank)
		}
	}
	if ranks == nil {
		return nil
	}
	return &fwd.RankError{Err: fwd.ErrLockstep, Step: a.Step, Ranks: ranks}
}

// run runs the pass of a step. Everything that follows from the model's output happens inside the
// pass, so that the passes of the draft model are nested in it. leftOut is how many requests of the
// step the pass has no links to.
func (r *rank) run(ctx context.Context, pass *fwd.Pass, step []scheduled, leftOut int) error {
	batch := r.target.newBatch(pass, step)
	if a := pass.Agreement; a != nil && a.LowestModeRank >= 0 {
		r.figures.lowered[a.LowestModeRank]++
	}
	return r.target.runner.Run(r.figures.traffic.in(ctx), *pass, func(ctx context.Context) error {
		linkPass(ctx, step, leftOut)
		prompt, generated := r.figures.promptTokens, r.figures.generated
		hidden, err := r.target.executor.Forward(ctx, batch.tokens)
		if err != nil {
			return err
		}
		r.advance(step)
		if err := r.sample(batch.toVerify(step), hidden); err != nil {
			return err
		}
		r.meters.countTokens(ctx, r.figures.promptTokens-prompt, r.figures.generated-generated)
		return r.propose(ctx, step, pass.Agreement)
	})
}

// advance notes that the tokens of a step are in the KV cache now.
func (r *rank) advance(step []scheduled) {
	for _, s := range step {
		prompt := len(s.seq.request.Prompt)
		r.figures.promptTokens += min(s.seq.computed+s.count, prompt) - min(s.seq.computed, prompt)
		s.seq.computed, s.seq.coming = s.seq.computed+s.count, 0
	}
}

// sample takes the most likely next tokens for each sequence that has caught up with itself.
func (r *rank) sample(sample []sampled, hidden *mat.Dense) error {
	logits := r.target.logits(sample, hidden)
	now, next := time.Now(), 0
	for _, s := range sample {
		seq, rows := s.seq, s.rows.Len()
		_, vocab := logits.Dims()
		r.verify(seq, logits.Slice(next, next+rows, 0, vocab).(*mat.Dense))
		next += rows
		if seq.firstToken.IsZero() {
			seq.firstToken = now
			r.meters.sampled(seq)
		}
		if len(seq.result.Tokens) == seq.request.MaxTokens {
			if err := r.finish(seq, now); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish takes leave of a sequence that has all its tokens.
func (r *rank) finish(seq *sequence, now time.Time) error {
	seq.result.Finished = true
	r.meters.finished(seq, now)
	seq.endSpan(now)
	r.scheduler.finish(seq)
	r.figures.finished++
	r.engine.finished.Add(1)
	if finished := r.engine.config.Finished; finished != nil {
		return finished(*seq.result)
	}
	return nil
}

// interrupted is how a rank stops because of an interrupt. It is an error if another process was
// interrupted, and this one has requests left.
func (r *rank) interrupted(by int, own note) error {
	if r.engine.config.Process == nil || own.stop || !own.unfinished {
		return nil
	}
	return fmt.Errorf("%w with rank %d", ErrInterrupted, by)
}

// missed decides what a failed exchange means. It returns nil if the rank tries again, and err if
// the run is over.
func (r *rank) missed(ctx context.Context, err error) error {
	if r.replan.isStranger(err) {
		r.replan.strangers++
	} else if !isRankError(err) {
		return err
	}
	if ctx.Err() != nil || r.replan.strangers > mostStrangers {
		return err
	}
	r.figures.failed++
	if r.missing.IsZero() {
		r.missing = time.Now()
	}
	if p := r.engine.config.Process; p == nil || time.Since(r.missing) >= p.Rejoin {
		return err
	}
	sleep(ctx, nil, retryPause)
	return nil
}

// retryPause keeps a rank from asking in a busy loop if every answer is an error immediately.
const retryPause = 10 * time.Millisecond

// sleep waits for so long, or until ctx ends or interrupt is closed.
func sleep(ctx context.Context, interrupt <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-interrupt:
	case <-ctx.Done():
	}
}
