package engine

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// scopeName is the instrumentation scope of the requests' spans.
const scopeName = "github.com/forwardctx/fwd/examples/engine"

// maxLinks is how many requests a pass's span can link to.
const maxLinks = 128

// links returns links from a pass to the requests in it. A request's span is a trace of its own,
// from its arrival to its last token: it takes part in many steps, and a step serves many requests,
// so neither can be the other's parent. Requests beyond the limit are left out; it says how many.
func (r *rank) links(ctx context.Context, step []scheduled) (links []trace.Link, leftOut int) {
	limit := maxLinks
	if r.engine.config.StepTrace && trace.SpanContextFromContext(ctx).IsValid() {
		limit-- // the step trace links the pass to its caller
	}
	for _, s := range step {
		if s.seq.span == nil {
			s.seq.span = r.startSpan(s.seq)
		}
		switch sc := s.seq.span.SpanContext(); {
		case !sc.IsValid():
		case len(links) == limit:
			leftOut++
		default:
			links = append(links, trace.Link{SpanContext: sc})
		}
	}
	return links, leftOut
}

// noteLeftOut says on the pass's span how many requests are in the pass without a link.
func noteLeftOut(ctx context.Context, leftOut int) {
	if leftOut > 0 {
		trace.SpanFromContext(ctx).SetAttributes(attribute.Int("engine.requests.not_linked", leftOut))
	}
}

func (r *rank) startSpan(s *sequence) trace.Span {
	_, span := r.engine.tracer().
		Start(context.Background(), "request", trace.WithNewRoot(), trace.WithTimestamp(s.arrived),
			trace.WithAttributes(attribute.Int("engine.request.id", s.request.ID),
				attribute.Int("engine.request.rank", r.rank),
				attribute.Int("engine.request.prompt_tokens", len(s.request.Prompt))))
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
		s.span.SetAttributes(
			attribute.Float64("engine.request.time_to_first_token", s.firstToken.Sub(s.arrived).Seconds()),
		)
	}
	s.span.End()
	s.span = nil
}
