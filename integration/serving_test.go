// Tests that serving goes on with every token the same, whatever is wrong with what telemetry is
// sent to.

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

// blocked is an exporter that blocks until the test is over. With spans it ignores deadlines too.
// With metrics it does not, because OpenTelemetry's periodic reader waits for its exporter when it
// is shut down, whatever its own deadline is.
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

// endpoint stands for something that isn't Jaeger: both protocols lead to the same address.
func endpoint(address string) *process { return &process{grpc: address, http: address} }

// TestServingGoesOn: whatever is wrong with Jaeger, every token is the same, the run takes no
// longer than its passes, what could not be kept is counted, and the end does not wait either.
func TestServingGoesOn(t *testing.T) {
	requests := newRequests(2*ranks, 40, 100)
	requests[0].MaxTokens = longAnswer
	want, _ := serve(t, engine.Config{
		DataParallelSize: ranks, GraphMode: fwd.GraphFullAndPiecewise, NumUBatches: 2,
	}, requests)

	absent, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	stalled, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, and nobody ever answers
	if err != nil {
		t.Fatal(err)
	}
	defer stalled.Close()

	nobody := endpoint("127.0.0.1:" + absent[0])
	silent := endpoint(stalled.Addr().String())
	for _, tt := range []struct {
		name, protocol string
		start          func(t *testing.T) *process
	}{
		{"absent, gRPC", "grpc", func(*testing.T) *process { return nobody }},
		{"absent, HTTP", "http", func(*testing.T) *process { return nobody }},
		{"stalled, gRPC", "grpc", func(*testing.T) *process { return silent }},
		{"stalled, HTTP", "http", func(*testing.T) *process { return silent }},
		{"killed, gRPC", "grpc", ownJaeger},
		{"killed, HTTP", "http", ownJaeger},
		{"blocked exporter", "", func(*testing.T) *process { return nil }},
		{"there and in order", "grpc", func(*testing.T) *process { return shared }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOutage(t, tt.start(t), tt.protocol)
			began := time.Now()
			results, _ := serve(t, o.config(), requests)
			if d := time.Since(began); d > 30*time.Second { // one timeout of an exporter is as long
				t.Errorf("the run took %v", d)
			}
			if diff := cmp.Diff(want, results); diff != "" {
				t.Errorf("tokens and logits differ from those without telemetry (-without +with):\n%s", diff)
			}
			o.end(t)
		})
	}
}

// longAnswer is how many tokens the longest answer has in TestServingGoesOn.
const longAnswer = 600

// outage is telemetry that goes to a process with which something may be wrong.
type outage struct {
	process  *process // nil: there is none
	protocol string
	before   counts
	ran      ended
	spans    *countingExporter
	traces   *sdktrace.TracerProvider
	meters   *sdkmetric.MeterProvider
}

func newOutage(t *testing.T, p *process, protocol string) *outage {
	t.Helper()
	exporter, metrics := exporters(t, p, protocol)
	o := &outage{
		process: p, protocol: protocol, before: readCounts(t),
		spans: &countingExporter{SpanExporter: exporter},
	}
	o.traces = sdktrace.NewTracerProvider(sdktrace.WithBatcher(o.spans), sdktrace.WithSpanProcessor(&o.ran))
	o.meters = sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics,
		sdkmetric.WithInterval(50*time.Millisecond), sdkmetric.WithTimeout(time.Second))))
	return o
}

// config returns the configuration of an engine, in the middle of whose run a Jaeger of the test's
// own is killed.
func (o *outage) config() engine.Config {
	kill := nthPass(longAnswer/2, func(ctx context.Context, next fwd.ForwardFunc) error {
		if o.process != nil && o.process.command != nil && o.process != shared {
			o.process.kill()
		}
		return next(ctx)
	})
	return engine.Config{
		DataParallelSize: ranks, GraphMode: fwd.GraphFullAndPiecewise, NumUBatches: 2,
		StepTrace: true, TracerProvider: o.traces, MeterProvider: o.meters,
		Middleware: inRank(0, kill),
	}
}

// end shuts down, and checks that this takes no longer than it may, and that all spans are
// accounted for.
func (o *outage) end(t *testing.T) {
	t.Helper()
	shutdown := 500 * time.Millisecond
	if o.process == shared {
		shutdown = patience // it needs some time for the last spans
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), shutdown)
	defer cancel()
	failed := o.traces.Shutdown(ctx) != nil
	failed = o.meters.Shutdown(ctx) != nil || failed
	if d := time.Since(began); d > shutdown+5*time.Second {
		t.Errorf("the end took %v, with a deadline of %v", d, shutdown)
	}
	// What is in the queue and in the batch when the deadline comes is lost, and the shutdown's error
	// says so. Exporters of earlier tests may still give up on a batch, so this one counts its
	// failures itself.
	c := counts{readCounts(t).minus(o.before).dropped, o.spans.delivered.Load(), o.spans.failed.Load()}
	lost, ran := c.dropped+c.failed, o.ran.n.Load()
	rest := ran - c.exported - lost
	switch {
	case o.process == shared:
		if failed || rest != 0 || lost != 0 {
			t.Errorf("%+v of %d spans, shutdown failed: %v", c, ran, failed)
		}
	case lost == 0 || rest > 0 && !failed || rest < 0 || rest > queued:
		t.Errorf("%+v of %d spans, shutdown failed: %v; want losses that are counted, but for at most a full queue",
			c, ran, failed)
	}
	if o.protocol != "" && o.process.command != nil && c.exported == 0 {
		t.Error("nothing was exported before Jaeger was killed")
	}
}

// queued is the most spans that a span processor holds.
const queued = sdktrace.DefaultMaxQueueSize + sdktrace.DefaultMaxExportBatchSize

// exporters returns what sends spans and metrics to a process, or blocks if that is nil.
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
	metrics, err := otlpmetricgrpc.New(t.Context(),
		otlpmetricgrpc.WithEndpoint(p.grpc), otlpmetricgrpc.WithInsecure())
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

// TestMemoryBounded: with an exporter that blocks, a long run keeps no more than the queue.
func TestMemoryBounded(t *testing.T) {
	before := readCounts(t)
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(newBlocked(t)))
	g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{},
		fwd.WithStepTrace(), fwd.WithTracerProvider(provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
	run := func(steps int) (heap int64) {
		for range steps {
			g.takeAll(t, onAll(tokens(1)))
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
	const want = (first+more)*2*ranks - queued
	if counted := readCounts(t).minus(before); counted.dropped < want {
		t.Errorf("%+v, want at least %d dropped", counted, want)
	}
}
