// This file measures what a pass costs while it is recorded. The benchmarks without the SDK are in
// the root.

package sdk_test

import (
	"context"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

type benchKey struct{} // of the baseline's value

// Each sink keeps a result, so that the compiler keeps the code that makes it.
var (
	sinkContext context.Context
	sinkForward *fwd.ForwardContext
)

// BenchmarkRun runs passes that do nothing, beside a bare context.WithValue and the same telemetry
// by hand: a span with the same attributes and the same measurements. Its results go with those of
// the root's benchmark of this name.
func BenchmarkRun(b *testing.B) {
	ctx, pass := context.Background(), decodePass()
	forward := func(ctx context.Context) error {
		sinkForward, _ = fwd.FromContext(ctx)
		return nil
	}
	b.Run("by=value", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			sinkContext = context.WithValue(ctx, benchKey{}, &pass)
			_ = sinkContext.Value(benchKey{})
		}
	})
	r, err := fwd.New(fwd.Config{Name: "target"}, recording()...)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("by=fwd/provider=sdk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := r.Run(ctx, pass, forward); err != nil {
				b.Fatal(err)
			}
		}
	})
	hand := newByHand(b)
	b.Run("by=hand/provider=sdk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			hand.run(ctx, &pass)
		}
	})
}

// byHand is the telemetry of a pass as one would write it with the SDK alone, with all options made
// beforehand.
type byHand struct {
	tracer           trace.Tracer
	duration         metric.Float64Histogram
	tokens           metric.Int64Histogram
	padding          metric.Int64Counter
	durations, sizes []metric.RecordOption
	kinds            []metric.AddOption
}

func newByHand(b *testing.B) *byHand {
	b.Helper()
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader())).Meter("bare")
	h := &byHand{tracer: sdktrace.NewTracerProvider().Tracer("bare")}
	var errs [3]error
	h.duration, errs[0] = meter.Float64Histogram("duration")
	h.tokens, errs[1] = meter.Int64Histogram("tokens")
	h.padding, errs[2] = meter.Int64Counter("padding")
	for _, err := range errs {
		if err != nil {
			b.Fatal(err)
		}
	}
	name, mode := attribute.String("name", "target"), attribute.String("mode", "FULL")
	dummy := attribute.Bool("dummy", false)
	set := func(attrs ...attribute.KeyValue) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attrs...))
	}
	h.durations = []metric.RecordOption{
		set(name, mode, dummy, attribute.String("reason", "exact"), attribute.Int("bucket", 16)),
	}
	h.sizes = []metric.RecordOption{set(name, mode, dummy)}
	h.kinds = []metric.AddOption{set(name, dummy, attribute.String("kind", "graph"))}
	return h
}

// run is a span with the attributes, and the measurements, of a Runner's pass.
func (h *byHand) run(ctx context.Context, p *fwd.Pass) {
	began := time.Now()
	ctx, span := h.tracer.Start(ctx, "forward")
	defer span.End()
	if span.IsRecording() {
		span.SetAttributes(
			attribute.String("fwd.name", "target"),
			attribute.Int("fwd.num_tokens", p.NumTokens),
			attribute.Int("fwd.num_tokens_unpadded", p.NumTokensUnpadded),
			attribute.Int("fwd.num_reqs", p.NumReqs),
			attribute.Int("fwd.batch.num_reqs", p.Batch.NumReqs),
			attribute.Bool("fwd.batch.uniform", p.Batch.Uniform),
			attribute.Int("fwd.padding.graph", p.NumTokensGraph-p.NumTokensUnpadded),
			attribute.Int("fwd.padding.dp", p.NumTokens-p.NumTokensGraph),
			attribute.Float64("fwd.padding.ratio", float64(p.NumTokens-p.NumTokensUnpadded)/float64(p.NumTokens)),
			attribute.String("fwd.graph.mode", p.GraphMode.String()),
			attribute.String("fwd.graph.reason", p.Reason.String()),
			attribute.Bool("fwd.dummy", p.Dummy),
		)
	}
	sinkContext = context.WithValue(ctx, benchKey{}, p)
	h.duration.Record(ctx, time.Since(began).Seconds(), h.durations...)
	h.tokens.Record(ctx, int64(p.NumTokensUnpadded), h.sizes...)
	h.padding.Add(ctx, int64(p.NumTokensGraph-p.NumTokensUnpadded), h.kinds...)
}
