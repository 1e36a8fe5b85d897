// This file measures what a pass costs while it is recorded. The benchmarks without the SDK are in the root.

package sdk_test

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel/attribute"
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

// BenchmarkRun runs passes that do nothing, beside a bare context.WithValue and a bare span with the same
// attributes. Its results go with those of the root's benchmark of this name.
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
	tracer := sdktrace.NewTracerProvider().Tracer("bare")
	b.Run("by=span/provider=sdk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			bareSpan(ctx, tracer, &pass)
		}
	})
}

// bareSpan is a span with the attributes that a Runner's pass has.
func bareSpan(ctx context.Context, tracer trace.Tracer, p *fwd.Pass) {
	ctx, span := tracer.Start(ctx, "forward")
	defer span.End()
	if span.IsRecording() {
		span.SetAttributes(
			attribute.String("fwd.name", "target"),
			attribute.Int("fwd.num_tokens", p.NumTokens),
			attribute.Int("fwd.num_tokens_unpadded", p.NumTokensUnpadded),
			attribute.Int("fwd.num_reqs", p.NumReqs),
			attribute.Int("fwd.batch.num_reqs", p.Batch.NumReqs),
			attribute.Int("fwd.virtual_engine", p.VirtualEngine),
			attribute.Int("fwd.padding.graph", p.NumTokensGraph-p.NumTokensUnpadded),
			attribute.Int("fwd.padding.dp", p.NumTokens-p.NumTokensGraph),
			attribute.String("fwd.graph.mode", p.GraphMode.String()),
			attribute.String("fwd.graph.reason", p.Reason.String()),
			attribute.Bool("fwd.batch.uniform", p.Batch.Uniform),
			attribute.Bool("fwd.dummy", p.Dummy),
		)
	}
	sinkContext = ctx
}
