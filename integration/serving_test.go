package integration

import (
	"context"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// blocked is an exporter that blocks for ever, until the test is over. Spans don't even care for deadlines. Metrics do, since
// OpenTelemetry's periodic reader waits for their exporter when it is shut down, whatever its own deadline is.
type blocked struct {
	sdkmetric.Exporter
	over chan struct{}
}

func newBlocked(t *testing.T) blocked {
	b := blocked{over: make(chan struct{})}
	t.Cleanup(func() { close(b.over) })
	return b
}

func (b blocked) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error {
	<-b.over
	return nil
}

func (b blocked) Export(ctx context.Context, _ *metricdata.ResourceMetrics) error {
	select {
	case <-b.over:
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (b blocked) Temporality(k sdkmetric.InstrumentKind) metricdata.Temporality {
	return sdkmetric.DefaultTemporalitySelector(k)
}

func (b blocked) Aggregation(k sdkmetric.InstrumentKind) sdkmetric.Aggregation {
	return sdkmetric.DefaultAggregationSelector(k)
}

func (b blocked) ForceFlush(context.Context) error { return nil }
func (b blocked) Shutdown(context.Context) error   { return nil }

// endpoint returns a process that isn't Jaeger: both protocols lead to the same address.
func endpoint(address string) *process { return &process{grpc: address, http: address} }

// TestServingGoesOn: whatever is wrong with Jaeger, every token is the same, the run takes no longer than its passes, what
// could not be kept is counted, and the end does not wait either.
func TestServingGoesOn(t *testing.T) {
	const numSteps = 600
	requests := newRequests(2*ranks, 40, 100)
	requests[0].MaxTokens = numSteps
	want, _ := serve(t, engine.Config{DataParallelSize: ranks, GraphMode: fwd.GraphFullAndPiecewise, NumUBatches: 2}, requests)

	absent, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	stalled, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, and nobody ever answers
	if err != nil {
		t.Fatal(err)
	}
	defer stalled.Close()

	for name, start := range map[string]func(t *testing.T) (*process, string){
		"absent, gRPC":       func(*testing.T) (*process, string) { return endpoint("127.0.0.1:" + absent[0]), "grpc" },
		"absent, HTTP":       func(*testing.T) (*process, string) { return endpoint("127.0.0.1:" + absent[0]), "http" },
		"stalled, gRPC":      func(*testing.T) (*process, string) { return endpoint(stalled.Addr().String()), "grpc" },
		"stalled, HTTP":      func(*testing.T) (*process, string) { return endpoint(stalled.Addr().String()), "http" },
		"killed, gRPC":       func(t *testing.T) (*process, string) { return ownJaeger(t), "grpc" },
		"killed, HTTP":       func(t *testing.T) (*process, string) { return ownJaeger(t), "http" },
		"blocked exporter":   func(*testing.T) (*process, string) { return nil, "" },
		"there and in order": func(*testing.T) (*process, string) { return shared, "grpc" },
	} {
		t.Run(name, func(t *testing.T) {
			process, protocol := start(t)
			exporter, metrics := exporters(t, process, protocol)
			spans := &countingExporter{SpanExporter: exporter}
			before := readCounts(t)
			var ran ended
			traces := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans), sdktrace.WithSpanProcessor(&ran))
			meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics,
				sdkmetric.WithInterval(50*time.Millisecond), sdkmetric.WithTimeout(time.Second))))
			began := time.Now()
			results, _ := serve(t, engine.Config{
				DataParallelSize: ranks, GraphMode: fwd.GraphFullAndPiecewise, NumUBatches: 2,
				StepTrace: true, TracerProvider: traces, MeterProvider: meters,
				Middleware: inRank(0, nthPass(numSteps/2, func(ctx context.Context, next fwd.ForwardFunc) error {
					if process != nil && process.command != nil && process != shared {
						process.kill()
					}
					return next(ctx)
				})),
			}, requests)
			if d := time.Since(began); d > 30*time.Second { // what one timeout of an exporter would add to some pass
				t.Errorf("the run took %v", d)
			}
			if diff := cmp.Diff(want, results); diff != "" {
				t.Errorf("tokens and logits differ from those without telemetry (-without +with):\n%s", diff)
			}

			shutdown := 500 * time.Millisecond
			if process == shared {
				shutdown = patience // it needs some time for the last spans
			}
			began = time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), shutdown)
			defer cancel()
			failed := traces.Shutdown(ctx) != nil
			failed = meters.Shutdown(ctx) != nil || failed
			if d := time.Since(began); d > shutdown+5*time.Second {
				t.Errorf("the end took %v, with a deadline of %v", d, shutdown)
			}
			// What still was in the queue and in the batch when the deadline came is lost, and the shutdown's error says so.
			// Exporters of earlier tests may still give up on a batch, so this one counts what it failed at itself.
			counted := counts{readCounts(t).minus(before).dropped, spans.delivered.Load(), spans.failed.Load()}
			rest := ran.n.Load() - counted.exported - counted.failed - counted.dropped
			switch {
			case process == shared:
				if failed || rest != 0 || counted.failed != 0 || counted.dropped != 0 {
					t.Errorf("%+v of %d spans, shutdown failed: %v", counted, ran.n.Load(), failed)
				}
			case counted.dropped+counted.failed == 0 || (rest > 0 && !failed) || rest < 0 || rest > sdktrace.DefaultMaxQueueSize+sdktrace.DefaultMaxExportBatchSize:
				t.Errorf("%+v of %d spans, shutdown failed: %v; want losses that are counted, but for at most a full queue", counted, ran.n.Load(), failed)
			}
			if protocol != "" && process.command != nil && counted.exported == 0 {
				t.Error("nothing was exported before Jaeger was killed")
			}
		})
	}
}

// exporters returns what sends spans and metrics to a process; nil: nowhere, for ever.
func exporters(t *testing.T, p *process, protocol string) (sdktrace.SpanExporter, sdkmetric.Exporter) {
	t.Helper()
	if p == nil {
		b := newBlocked(t)
		return b, b
	}
	spans, err := protocols[protocol](t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := otlpmetricgrpc.New(t.Context(), otlpmetricgrpc.WithEndpoint(p.grpc), otlpmetricgrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	return spans, metrics
}

// ownJaeger returns a Jaeger that the test may kill.
func ownJaeger(t *testing.T) *process {
	t.Helper()
	p, err := startJaeger()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	return p
}

// TestMemoryBounded: with an exporter that blocks for ever, a long run keeps no more than the queue.
func TestMemoryBounded(t *testing.T) {
	before := readCounts(t)
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(newBlocked(t)))
	g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{},
		fwd.WithStepTrace(), fwd.WithTracerProvider(provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
	run := func(steps int) (heap int64) {
		for range steps {
			if err := g.step(t.Context(), decoding(), nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	const first, more = 1000, 10_000 // the first fill the queue
	full := run(first)
	if grown := run(more) - full; grown > 4<<20 { // all spans would be about 100 MB
		t.Errorf("%d more steps took %d bytes", more, grown)
	}
	const kept = sdktrace.DefaultMaxQueueSize + sdktrace.DefaultMaxExportBatchSize
	if counted, want := readCounts(t).minus(before), int64((first+more)*2*ranks-kept); counted.dropped < want {
		t.Errorf("%+v, want at least %d dropped", counted, want)
	}
}
