package engine

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/trace"
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

	turn   int       // of serve, from one
	agreed uint64    // the number of the last step, the same on all ranks; 0: none was agreed on
	lost   bool      // an exchange has failed, and where the other ranks are now is not known
	since  time.Time // when exchanges began to fail; zero: the last step went well
}

// warmUp gets a rank ready to serve.
func (r *rank) warmUp(ctx context.Context) error {
	ctx, span := r.engine.tracer().Start(ctx, "warm-up", trace.WithNewRoot())
	defer span.End()
	if err := r.target.warmUp(ctx); err != nil || r.draft == nil {
		return err
	}
	return r.draft.warmUp(ctx)
}

// serve takes steps for as long as the ranks take steps.
func (r *rank) serve(ctx context.Context, gate gate) error {
	for r.turn = 1; ; r.turn++ {
		runs, err := gate.next(ctx, r)
		if err != nil || !runs {
			return err
		}
		if err := r.step(ctx); err != nil {
			return err
		}
	}
}

// step is one step of the engine on one rank. Where the ranks don't come together for it nothing has happened: what was
// scheduled will be again.
func (r *rank) step(ctx context.Context) error {
	step := r.scheduler.schedule(time.Now())
	if len(step) == 0 && r.engine.config.DataParallelSize == 1 {
		return nil // nobody waits for a dummy pass
	}
	pass, batch, err := r.target.plan(ctx, step, r.engine.config.BlockSize)
	if err != nil {
		return r.missed(ctx, err)
	}
	r.since = time.Time{}
	if pass.Agreement != nil {
		r.agreed = pass.Agreement.Step
	}
	var leftOut int
	pass.Links, leftOut = r.links(ctx, step)
	began := time.Now()
	err = r.target.runner.Run(ctx, pass, func(ctx context.Context) error {
		noteLeftOut(ctx, leftOut)
		hidden, err := r.target.executor.Forward(ctx, batch.tokens)
		if err != nil {
			return err
		}
		r.advance(step)
		if err := r.sample(batch.sample, hidden); err != nil {
			return err
		}
		return r.propose(ctx, step)
	})
	if err != nil {
		return err
	}
	r.figures.forward += time.Since(began)
	r.figures.count(&pass)
	return nil
}

// advance notes that the tokens of a step are in the KV cache now.
func (r *rank) advance(step []scheduled) {
	for _, s := range step {
		prompt := len(s.seq.request.Prompt)
		r.figures.promptTokens += min(s.seq.computed+s.count, prompt) - min(s.seq.computed, prompt)
		s.seq.computed += s.count
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
		}
		if len(seq.result.Tokens) == seq.request.MaxTokens {
			if err := r.finish(seq); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish takes leave of a sequence that has all its tokens.
func (r *rank) finish(seq *sequence) error {
	seq.result.Finished = true
	seq.endSpan()
	r.scheduler.finish(seq)
	r.figures.finished++
	r.engine.finished.Add(1)
	if finished := r.engine.config.Finished; finished != nil {
		return finished(*seq.result)
	}
	return nil
}
