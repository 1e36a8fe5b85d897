package engine

import (
	"context"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"
)

// scopeName is the instrumentation scope of the requests' spans.
const scopeName = "github.com/forwardctx/fwd/examples/engine"

// maxLinks is how many requests a pass's span can link to.
const maxLinks = 128

// rank is one data-parallel rank: its own requests, KV cache and Runner, and a share of the experts.
type rank struct {
	rank        int
	engine      *Engine
	gate        *gate
	coordinator *timedCoordinator
	experts     rankWorkers
	scheduler   *scheduler
	runner      *fwd.Runner

	// Figures, read when the rank has stopped.
	steps, dummies            int
	promptTokens, generated   int
	finished                  int
	reasons                   map[fwd.Reason]int
	graphPadding, dataPadding int
	forward                   time.Duration
}

// serve takes steps for as long as the ranks take steps.
func (r *rank) serve(ctx context.Context) error {
	for step := 1; r.gate.next(ctx, step); step++ {
		if err := r.step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// step is one step of the engine on one rank.
func (r *rank) step(ctx context.Context) error {
	step := r.scheduler.schedule(time.Now())
	if len(step) == 0 && r.engine.config.DataParallelSize == 1 {
		return nil // nobody waits for a dummy pass
	}
	schedule := fwd.Schedule{NumActiveLoRAs: activeAdapters(step)}
	for _, s := range step {
		schedule.NumScheduledTokens = append(schedule.NumScheduledTokens, s.count)
	}
	pass, err := r.runner.Plan(ctx, schedule)
	if err != nil {
		return err
	}

	// A dummy pass has tokens, so that every exchange finds this rank, but no metadata: they belong to no request.
	in := newBatch(step, pass.NumTokens, r.engine.config.BlockSize)
	if !pass.Dummy {
		pass.AttnMetadata = []map[string]any{{"": in.meta}} // "": all layers have the same
		pass.SlotMapping = []map[string]any{{"": in.slots}}
		pass.Links = r.links(step)
	}
	began := time.Now()
	var hidden *mat.Dense
	err = r.runner.Run(ctx, pass, func(ctx context.Context) (err error) {
		hidden, err = r.engine.model.Forward(ctx, in.tokens)
		return err
	})
	if err != nil {
		return err
	}
	r.forward += time.Since(began)
	r.count(&pass)
	r.advance(step)
	r.sample(in.sample, hidden)
	return nil
}

// advance notes that the tokens of a step are in the KV cache now.
func (r *rank) advance(step []scheduled) {
	for _, s := range step {
		prompt := len(s.seq.request.Prompt)
		r.promptTokens += min(s.seq.computed+s.count, prompt) - min(s.seq.computed, prompt)
		s.seq.computed += s.count
	}
}

// sample takes the most likely next token for each sequence that has caught up with itself.
func (r *rank) sample(rows []sampled, hidden *mat.Dense) {
	if len(rows) == 0 {
		return
	}
	_, width := hidden.Dims()
	last := mat.NewDense(len(rows), width, nil)
	for i, s := range rows {
		last.SetRow(i, hidden.RawRowView(s.row))
	}
	logits := r.engine.model.Logits(last)
	now := time.Now()
	for i, s := range rows {
		seq := s.seq
		seq.result.Logits = append(seq.result.Logits[:0], logits.RawRowView(i)...)
		seq.result.Tokens = append(seq.result.Tokens, model.Argmax(seq.result.Logits))
		if len(seq.result.Tokens) == 1 {
			seq.firstToken = now
		}
		r.generated++
		r.engine.generated.Add(1)
		if len(seq.result.Tokens) == seq.request.MaxTokens {
			seq.result.Finished = true
			seq.endSpan()
			r.scheduler.finish(seq)
			r.finished++
			r.engine.finished.Add(1)
			r.gate.finished.Add(1)
		}
	}
}

func (r *rank) count(pass *fwd.Pass) {
	r.steps++
	if pass.Dummy {
		r.dummies++
	}
	r.reasons[pass.Reason]++
	r.graphPadding += pass.NumTokensGraph - pass.NumTokensUnpadded
	r.dataPadding += pass.NumTokens - pass.NumTokensGraph
}

// links returns links from a pass to the requests in it. A request's span is a trace of its own, from its arrival to its
// last token: it takes part in many steps, and a step serves many requests, so neither can be the other's parent.
func (r *rank) links(step []scheduled) []trace.Link {
	var links []trace.Link
	for _, s := range step {
		if s.seq.span == nil {
			s.seq.span = r.startSpan(s.seq)
		}
		if sc := s.seq.span.SpanContext(); sc.IsValid() && len(links) < maxLinks {
			links = append(links, trace.Link{SpanContext: sc})
		}
	}
	return links
}

func (r *rank) startSpan(s *sequence) trace.Span {
	provider := r.engine.config.TracerProvider
	if provider == nil {
		provider = otel.GetTracerProvider()
	}
	_, span := provider.Tracer(scopeName).Start(context.Background(), "request", trace.WithNewRoot(), trace.WithTimestamp(s.arrived),
		trace.WithAttributes(
			attribute.Int("engine.request.id", s.request.ID),
			attribute.Int("engine.request.rank", r.rank),
			attribute.Int("engine.request.prompt_tokens", len(s.request.Prompt)),
		))
	return span
}

// endSpan ends the request's span, if it has one: at the last token, or with the run.
func (s *sequence) endSpan() {
	if s.span == nil {
		return
	}
	s.span.SetAttributes(
		attribute.Int("engine.request.generated_tokens", len(s.result.Tokens)),
		attribute.Bool("engine.request.finished", s.result.Finished),
		attribute.Float64("engine.request.queue_time", s.scheduled.Sub(s.arrived).Seconds()),
	)
	if !s.firstToken.IsZero() {
		s.span.SetAttributes(attribute.Float64("engine.request.time_to_first_token", s.firstToken.Sub(s.arrived).Seconds()))
	}
	s.span.End()
	s.span = nil
}

// Stats are the figures of a run.
type Stats struct {
	Requests, Finished            int
	Steps                         int // each with a pass on every rank
	PromptTokens, GeneratedTokens int
	Duration                      time.Duration
	Passes                        map[fwd.Reason]int // by the reason for their graph mode, dummy passes included
	DummyPasses                   int
	GraphPadding, DataPadding     int // tokens: up to a graph's size, and up to the largest rank's count
	Ranks                         []RankStats
}

// RankStats are the figures of one rank. Forward includes Experts.
type RankStats struct {
	Votes   time.Duration // waiting in Plan for the other ranks' votes
	Experts time.Duration // waiting in mixture-of-experts layers for the other ranks' rows
	Forward time.Duration // in passes
}

func collect(ranks []*rank, requests int, duration time.Duration) Stats {
	s := Stats{Requests: requests, Duration: duration, Passes: map[fwd.Reason]int{}}
	for _, r := range ranks {
		s.Finished += r.finished
		s.Steps = max(s.Steps, r.steps)
		s.PromptTokens += r.promptTokens
		s.GeneratedTokens += r.generated
		for reason, n := range r.reasons {
			s.Passes[reason] += n
		}
		s.DummyPasses += r.dummies
		s.GraphPadding += r.graphPadding
		s.DataPadding += r.dataPadding
		s.Ranks = append(s.Ranks, RankStats{Votes: r.coordinator.waited, Experts: r.experts.waiting(), Forward: r.forward})
	}
	return s
}
