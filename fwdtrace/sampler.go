package fwdtrace

import (
	"context"
	"slices"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// SampleLinked returns a sampler that samples a span that is below a sampled one, and one that links
// to a sampled one, and otherwise does what base does. So a pass is recorded if one of its requests
// is, although its step is not. Rank 0's step span starts before the links of its pass are known; pass
// them with [ContextWithLinks]. It panics if base is nil.
//
// A span with neither a sampled parent nor a sampled link goes to base, so base should not sample parts of
// a trace: [sdktrace.TraceIDRatioBased] and [sdktrace.ParentBased] don't.
func SampleLinked(base sdktrace.Sampler) sdktrace.Sampler {
	if base == nil {
		panic("fwdtrace: SampleLinked(nil): want a sampler")
	}
	return &sampleLinked{base}
}

type sampleLinked struct{ base sdktrace.Sampler }

// ShouldSample implements [sdktrace.Sampler].
func (s *sampleLinked) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	parent := trace.SpanContextFromContext(p.ParentContext)
	if parent.IsSampled() || anySampled(p.Links) || expected(p.ParentContext) {
		return sdktrace.SamplingResult{Decision: sdktrace.RecordAndSample, Tracestate: parent.TraceState()}
	}
	return s.base.ShouldSample(p)
}

// Description implements [sdktrace.Sampler].
func (s *sampleLinked) Description() string { return "SampleLinked{" + s.base.Description() + "}" }

// ContextWithLinks returns a context for [fwd.Runner.Plan] and [fwd.Runner.Begin], before the pass is
// there that will have these links. If the target of one of them is sampled, so are the spans that
// start below it: the exchange, and on rank 0 the step. If none is sampled, ctx is returned unchanged.
//
// Only rank 0 decides over a step. If another rank alone has a sampled request, the exchange and the
// pass of that rank are recorded without the rest of the step.
func ContextWithLinks(ctx context.Context, links ...trace.Link) context.Context {
	if !anySampled(links) {
		return ctx
	}
	return context.WithValue(ctx, expectedKey{}, true)
}

type expectedKey struct{}

func expected(ctx context.Context) bool { return ctx.Value(expectedKey{}) != nil }

func anySampled(links []trace.Link) bool {
	return slices.ContainsFunc(links, func(l trace.Link) bool { return l.SpanContext.IsSampled() })
}
