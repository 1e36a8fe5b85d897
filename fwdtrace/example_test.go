// How a program uses both.

package fwdtrace_test

import (
	"context"
	"fmt"
	"slices"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// A request is sampled, and so are the steps that serve it.
func Example() {
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithSampler(fwdtrace.SampleLinked(sdktrace.TraceIDRatioBased(0))), // 0.01, say
		sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(sdktrace.NewSimpleSpanProcessor(exporter))),
	)
	runner, err := fwd.New(fwd.Config{}, fwd.WithTracerProvider(provider), fwd.WithStepTrace())
	if err != nil {
		panic(err)
	}
	sampled := trace.Link{SpanContext: trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceFlags: trace.FlagsSampled,
	})}
	other := trace.Link{SpanContext: sampled.SpanContext.WithTraceFlags(0)}

	for _, request := range []trace.Link{other, sampled, other} {
		ctx := fwdtrace.ContextWithLinks(context.Background(), request)
		pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{1}})
		if err != nil {
			panic(err)
		}
		pass.Links = []trace.Link{request}
		if err := runner.Run(ctx, pass, func(context.Context) error { return nil }); err != nil {
			panic(err)
		}
	}
	var names []string
	for _, span := range exporter.GetSpans() {
		names = append(names, span.Name)
	}
	slices.Sort(names)
	fmt.Println(names)
	// Output: [fwd.forward NONE fwd.step NONE]
}
