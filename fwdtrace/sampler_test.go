// Which spans SampleLinked samples, by themselves and in steps.

package fwdtrace_test

import (
	"testing"

	"github.com/forwardctx/fwd/fwdtrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// spanContext returns a span context that is sampled or not.
func spanContext(sampled bool) trace.SpanContext {
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.TraceFlags(0).WithSampled(sampled),
	})
}

func links(sampled ...bool) (links []trace.Link) {
	for _, s := range sampled {
		links = append(links, trace.Link{SpanContext: spanContext(s)})
	}
	return links
}

func TestSampleLinked(t *testing.T) {
	t.Parallel()
	never, always := sdktrace.NeverSample(), sdktrace.AlwaysSample()
	for name, c := range map[string]struct {
		base     sdktrace.Sampler
		parent   trace.SpanContext
		links    []trace.Link
		expected []trace.Link
		want     bool
	}{
		"nothing":                     {base: never, want: false},
		"base":                        {base: always, want: true},
		"sampled parent":              {base: never, parent: spanContext(true), want: true},
		"other parent":                {base: never, parent: spanContext(false), want: false},
		"other parent, base":          {base: always, parent: spanContext(false), want: true},
		"sampled link":                {base: never, links: links(false, true), want: true},
		"sampled link below other":    {base: never, parent: spanContext(false), links: links(true), want: true},
		"other links":                 {base: never, links: links(false, false), want: false},
		"sampled link that will come": {base: never, expected: links(false, true), want: true},
		"other links that will come":  {base: never, expected: links(false), want: false},
		"sampled link that will come, below other": {base: never, parent: spanContext(false),
			expected: links(true), want: true},
	} {
		ctx := trace.ContextWithSpanContext(t.Context(), c.parent)
		ctx = fwdtrace.ContextWithLinks(ctx, c.expected...)
		got := fwdtrace.SampleLinked(c.base).
			ShouldSample(sdktrace.SamplingParameters{ParentContext: ctx, Links: c.links}).Decision
		if sampled := got == sdktrace.RecordAndSample; sampled != c.want {
			t.Errorf("%s: %v, want sampled: %t", name, got, c.want)
		}
	}
	if got := fwdtrace.SampleLinked(never).Description(); got != "SampleLinked{AlwaysOffSampler}" {
		t.Errorf("Description is %q", got)
	}
}

// TestSampleLinkedState: what the parent's system says in its trace state stays.
func TestSampleLinkedState(t *testing.T) {
	t.Parallel()
	state, err := trace.ParseTraceState("vendor=1")
	if err != nil {
		t.Fatal(err)
	}
	ctx := trace.ContextWithSpanContext(t.Context(), spanContext(true).WithTraceState(state))
	got := fwdtrace.SampleLinked(sdktrace.NeverSample()).
		ShouldSample(sdktrace.SamplingParameters{ParentContext: ctx})
	if got.Tracestate.String() != "vendor=1" {
		t.Errorf("trace state %q, want the parent's", got.Tracestate)
	}
}

// TestSampleSteps: of steps that the base never samples, each pass with a sampled request is
// recorded, and the whole step if that is on rank 0.
func TestSampleSteps(t *testing.T) {
	t.Parallel()
	recorder := tracetest.NewSpanRecorder()
	g := newGroup(t, sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder),
		sdktrace.WithSampler(fwdtrace.SampleLinked(sdktrace.NeverSample()))))
	for _, c := range []struct {
		name  string
		ranks [2][]trace.Link
		want  map[string]int
	}{
		{"no sampled request", [2][]trace.Link{links(false), links(false)}, map[string]int{}},
		{"rank 0 has one", [2][]trace.Link{links(true, false), links(false)},
			map[string]int{"fwd.step FULL": 1, "fwd.coordinate": 2, "fwd.forward model FULL": 2}},
		{"rank 1 has one", [2][]trace.Link{links(false), links(true)},
			map[string]int{"fwd.coordinate": 1, "fwd.forward model FULL": 1}},
	} {
		recorder.Reset()
		g.take(c.ranks[:]...)
		for name, n := range count(recorder.Ended()) {
			if n != c.want[name] {
				t.Errorf("%s: %d spans %q, want %v", c.name, n, name, c.want)
			}
		}
		if got := count(recorder.Ended()); len(got) != len(c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNil(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(){
		"SkipIdle":     func() { fwdtrace.SkipIdle(nil) },
		"SampleLinked": func() { fwdtrace.SampleLinked(nil) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s(nil) doesn't panic", name)
				}
			}()
			f()
		}()
	}
}
