// This file has the examples that need the SDK: how a program sets it up, and how passes lead to
// requests.

package sdk_test

import (
	"context"
	"fmt"
	"log"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/stdout/stdoutmetric"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// A program sets up the SDK once, at its start. All Runners then emit spans and metrics, here as
// JSON on standard output; otlptracegrpc and otlpmetricgrpc take the place of the two exporters to
// send them to a collector.
func Example_setup() {
	ctx := context.Background()
	spans, err := stdouttrace.New()
	if err != nil {
		log.Fatal(err)
	}
	metrics, err := stdoutmetric.New()
	if err != nil {
		log.Fatal(err)
	}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans))
	defer tracers.Shutdown(ctx)
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics)))
	defer meters.Shutdown(ctx)
	otel.SetTracerProvider(tracers)
	otel.SetMeterProvider(meters)

	runner, err := fwd.New(fwd.Config{Name: "target"})
	if err != nil {
		log.Fatal(err)
	}
	if err := runner.Run(ctx, fwd.Pass{NumTokens: 1}, nothing); err != nil {
		log.Fatal(err)
	}
}

// A batch serves many requests, so its span can't be a child of theirs. It has a link to each
// instead.
func Example_links() {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	runner, err := fwd.New(fwd.Config{}, fwd.WithTracerProvider(provider))
	if err != nil {
		fmt.Println(err)
		return
	}
	pass := fwd.Pass{NumTokens: 2}
	for _, name := range []string{"POST /v1/completions", "POST /v1/chat"} {
		// The context of a request, as its handler has it.
		request, span := provider.Tracer("server").Start(context.Background(), name)
		defer span.End()
		pass.Links = append(pass.Links, trace.LinkFromContext(request))
	}
	if err := runner.Run(context.Background(), pass, nothing); err != nil {
		fmt.Println(err)
	}
	for _, span := range recorder.Ended() {
		fmt.Println(span.Name(), "has", len(span.Links()), "links")
	}
	// Output:
	// fwd.forward NONE has 2 links
}
