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
func (r *rank) serve(ctx context.Context, gate *gate) error {
	for step := 1; gate.next(ctx, step); step++ {
		if err := r.step(ctx, gate); err != nil {
			return err
		}
	}
	return nil
}

// step is one step of the engine on one rank.
func (r *rank) step(ctx context.Context, gate *gate) error {
	step := r.scheduler.schedule(time.Now())
	if len(step) == 0 && r.engine.config.DataParallelSize == 1 {
		return nil // nobody waits for a dummy pass
	}
	pass, batch, err := r.target.plan(ctx, step, r.engine.config.BlockSize)
	if err != nil {
		return err
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
		r.sample(batch.sample, hidden, gate)
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
func (r *rank) sample(sample []sampled, hidden *mat.Dense, gate *gate) {
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
			seq.result.Finished = true
			seq.endSpan()
			r.scheduler.finish(seq)
			r.figures.finished++
			r.engine.finished.Add(1)
			gate.finished.Add(1)
		}
	}
}
