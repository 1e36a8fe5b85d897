package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
)

// shutdownTimeout bounds how long the program stays to deliver the last spans, to a collector that
// may not be there.
const shutdownTimeout = 5 * time.Second

// telemetry exports traces and metrics. It never holds up a pass: spans go into a queue, and what
// doesn't fit is dropped.
type telemetry struct {
	traces  *trace.TracerProvider
	metrics *metric.MeterProvider

	mu     sync.Mutex
	failed int
	last   error
}

// startTelemetry sends what this instance of the service emits to an endpoint. An empty instance is
// the only one.
func startTelemetry(ctx context.Context, endpoint, instance string) (*telemetry, error) {
	// Exporters connect when they have something to send. Their context must outlive an interrupted
	// run.
	ctx = context.WithoutCancel(ctx)
	spans, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(endpoint), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, fmt.Errorf("-otlp %s: %w", endpoint, err)
	}
	metrics, err := otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithEndpoint(endpoint), otlpmetricgrpc.WithInsecure())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("-otlp %s: %w", endpoint, err), spans.Shutdown(ctx))
	}
	about := []attribute.KeyValue{attribute.String("service.name", "serve")}
	if instance != "" {
		about = append(about, attribute.String("service.instance.id", instance))
	}
	res, err := resource.Merge(resource.Default(), resource.NewSchemaless(about...))
	if err != nil {
		return nil, errors.Join(err, spans.Shutdown(ctx), metrics.Shutdown(ctx))
	}
	t := &telemetry{
		traces: trace.NewTracerProvider(trace.WithBatcher(spans), trace.WithResource(res)),
		metrics: metric.NewMeterProvider(
			metric.WithReader(metric.NewPeriodicReader(metrics, metric.WithInterval(5*time.Second))),
			metric.WithResource(res),
		),
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(t.handle)) // the default one would print into the progress bar
	return t, nil
}

func (t *telemetry) handle(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed++
	t.last = err
}

// stop delivers what is left, and says what could not be delivered.
func (t *telemetry) stop(stderr io.Writer) {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, shutdown := range []func(context.Context) error{t.traces.Shutdown, t.metrics.Shutdown} {
		wg.Go(func() {
			if err := shutdown(ctx); err != nil {
				t.handle(err)
			}
		})
	}
	wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed > 0 {
		fmt.Fprintf(stderr, "serve: telemetry is incomplete, %d exports failed, the last with: %v\n", t.failed,
			t.last)
	}
}
