package engine

import (
	"context"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// scopeName is the instrumentation scope of the spans and metrics that are the engine's own.
const scopeName = "github.com/forwardctx/fwd/examples/engine"

// maxLinks is how many requests the span of a pass can link to, and how many passes that of a
// request.
const maxLinks = 128

// The attributes of a request's span. Those of gen_ai have the names that vLLM gives them.
const (
	keyRequestID        = attribute.Key("gen_ai.request.id")
	keyMaxTokens        = attribute.Key("gen_ai.request.max_tokens")
	keyPromptTokens     = attribute.Key("gen_ai.usage.prompt_tokens")
	keyCompletionTokens = attribute.Key("gen_ai.usage.completion_tokens")
	keyTimeInQueue      = attribute.Key("gen_ai.latency.time_in_queue")
	keyTimeToFirstToken = attribute.Key("gen_ai.latency.time_to_first_token")
	keyEndToEnd         = attribute.Key("gen_ai.latency.e2e")

	keyID              = attribute.Key("engine.request.id")
	keyRequestRank     = attribute.Key("engine.request.rank")
	keyFinished        = attribute.Key("engine.request.finished")
	keyPasses          = attribute.Key("engine.request.passes")
	keyTokens          = attribute.Key("engine.request.tokens")      // of a request in a pass, on the link to it
	keyPassesNotLinked = attribute.Key("engine.passes.not_linked")   // on a request
	keyNotLinked       = attribute.Key("engine.requests.not_linked") // on a pass
)

// links returns links from a pass to the requests in it. A request's span is a trace of its own,
// from its arrival to its last token: it takes part in many steps, and a step serves many requests,
// so neither can be the other's parent. Requests that are not sampled, to which a link would lead
// nowhere, are left out, and so are those beyond the limit; it says how many these are.
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
		case !sc.IsSampled():
		case len(links) == limit:
			leftOut++
		default:
			links = append(links, trace.Link{SpanContext: sc})
		}
	}
	return links, leftOut
}

// linkPass links the requests of a step to the pass in ctx. It says on the pass's span how many
// requests are in the pass without a link from it.
func linkPass(ctx context.Context, step []scheduled, leftOut int) {
	pass := trace.SpanFromContext(ctx)
	if leftOut > 0 {
		pass.SetAttributes(keyNotLinked.Int(leftOut))
	}
	for _, s := range step {
		s.seq.linkTo(pass.SpanContext(), s.count)
	}
}

// linkTo notes a pass that has computed so many tokens of the request.
func (s *sequence) linkTo(pass trace.SpanContext, tokens int) {
	if s.passes++; s.passes > maxLinks || !pass.IsSampled() || !s.span.IsRecording() {
		return
	}
	s.span.AddLink(trace.Link{SpanContext: pass, Attributes: []attribute.KeyValue{keyTokens.Int(tokens)}})
}

func (r *rank) startSpan(s *sequence) trace.Span {
	_, span := r.tracer.Start(context.Background(), "request",
		trace.WithNewRoot(), trace.WithSpanKind(trace.SpanKindServer), trace.WithTimestamp(s.arrived))
	if span.IsRecording() {
		span.SetAttributes(
			keyID.Int(s.request.ID),
			keyRequestRank.Int(r.rank),
			keyRequestID.String(strconv.Itoa(s.request.ID)),
			keyPromptTokens.Int(len(s.request.Prompt)),
			keyMaxTokens.Int(s.request.MaxTokens),
		)
	}
	return span
}

// endSpan ends the request's span, if it has one: at the last token, or with the run.
func (s *sequence) endSpan(now time.Time) {
	if s.span == nil {
		return
	}
	defer func() {
		s.span.End(trace.WithTimestamp(now))
		s.span = nil
	}()
	if !s.span.IsRecording() {
		return
	}
	s.span.SetAttributes(
		keyCompletionTokens.Int(len(s.result.Tokens)),
		keyFinished.Bool(s.result.Finished),
		keyPasses.Int(s.passes),
		keyTimeInQueue.Float64(s.scheduled.Sub(s.arrived).Seconds()),
		keyEndToEnd.Float64(now.Sub(s.arrived).Seconds()),
	)
	if s.passes > maxLinks {
		s.span.SetAttributes(keyPassesNotLinked.Int(s.passes - maxLinks))
	}
	s.addPhase("queue", s.arrived, s.scheduled)
	if s.firstToken.IsZero() {
		s.addPhase("prefill", s.scheduled, now)
		return
	}
	s.span.SetAttributes(keyTimeToFirstToken.Float64(s.firstToken.Sub(s.arrived).Seconds()))
	s.addPhase("prefill", s.scheduled, s.firstToken)
	s.addPhase("decode", s.firstToken, now)
}

// addPhase adds a part of the request's life below its span.
func (s *sequence) addPhase(name string, began, ended time.Time) {
	ctx := trace.ContextWithSpan(context.Background(), s.span)
	_, span := s.span.TracerProvider().Tracer(scopeName).Start(ctx, name, trace.WithTimestamp(began))
	span.End(trace.WithTimestamp(ended))
}
