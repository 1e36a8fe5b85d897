// Spans and metrics of whole runs, against each other and against the figures.

package engine

import (
	"context"
	"fmt"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// TestTelemetry runs the engine and checks what its spans and metrics say against each other,
// against the figures of the run and against what follows from the requests: what the answers can't
// show.
func TestTelemetry(t *testing.T) {
	for _, c := range []struct {
		cfg      Config
		adapters int
	}{
		{Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise}, 3},
		{Config{DataParallelSize: 4, GraphMode: fwd.GraphFull, SequenceParallel: 2}, 0},
		{Config{DataParallelSize: 3, GraphMode: fwd.GraphFullDecodeOnly}, 0},
		{Config{DataParallelSize: 2, GraphMode: fwd.GraphPiecewise, NumUBatches: 2, DecodeUBatchThreshold: 3,
			PrefillUBatchThreshold: 20}, 0},
		{Config{DataParallelSize: 3, NumUBatches: 3, MaxChunk: 7, DecodeUBatchThreshold: 3,
			PrefillUBatchThreshold: 20}, 0},
		{Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise, NumSpeculativeTokens: 2}, 2},
		{Config{DataParallelSize: 2, GraphMode: fwd.GraphFullAndPiecewise, NumSpeculativeTokens: 2, NumUBatches: 2},
			0},
		{Config{GraphMode: fwd.GraphFullAndPiecewise, NumSpeculativeTokens: 2, NumUBatches: 2}, 2},
	} {
		name := fmt.Sprintf("dp=%d/graph=%v/ubatches=%d/spec=%d/loras=%d", max(c.cfg.DataParallelSize, 1),
			c.cfg.GraphMode, max(c.cfg.NumUBatches, 1), c.cfg.NumSpeculativeTokens, c.adapters)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkTelemetry(t, c.cfg, c.adapters)
		})
	}
}

func checkTelemetry(t *testing.T, cfg Config, adapters int) {
	requests := withAdapters(newRequests(9*max(cfg.DataParallelSize, 1), 25, 9), adapters)
	requests[0].MaxTokens = 40 // the other ranks are idle in the end
	for _, r := range []*Request{&requests[1], &requests[2]} {
		// Too large for any graph, for so long that the other ranks decode meanwhile and are lowered by
		// two of them.
		for len(r.Prompt) < 500 {
			r.Prompt = append(r.Prompt, len(r.Prompt)%256)
		}
	}
	checkTelemetryOf(t, cfg, adapters, requests).checkSeen()
}

// checkTelemetryOf runs the engine over requests and returns its spans.
func checkTelemetryOf(t *testing.T, cfg Config, adapters int, requests []Request) *spanView {
	recorder, reader := tracetest.NewSpanRecorder(), metric.NewManualReader()
	meeting := &meeting{SpanRecorder: recorder, met: make(chan struct{})}
	cfg.TracerProvider = sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(meeting))
	cfg.MeterProvider = metric.NewMeterProvider(metric.WithReader(reader))
	cfg.StepTrace = true
	cfg.Middleware = func(rank int) []fwd.Middleware { return []fwd.Middleware{inPass(t, rank)} }
	dp := max(cfg.DataParallelSize, 1)
	e := newEngineOf(t, newModel(t, adapters), cfg)
	results, stats, err := e.Run(t.Context(), requests)
	if err != nil {
		t.Fatal(err)
	}
	compareAll(t, e, requests, results)
	if started, ended := len(recorder.Started()), len(recorder.Ended()); started != ended {
		t.Errorf("%d spans started, %d ended", started, ended)
	}
	v := &spanView{T: t, engine: e, dp: dp, adapters: adapters, spans: map[trace.SpanID]*span{}}
	v.read(recorder.Ended())
	v.checkPasses()
	v.checkSteps()
	v.checkMicrobatches()
	v.checkFigures(&stats)

	var got metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &got); err != nil {
		t.Fatal(err)
	}
	v.checkMetrics(&got, &stats)
	return v
}

// checkSeen makes sure that the run had what there is to check.
func (v *spanView) checkSeen() {
	seen := map[string]bool{}
	for _, s := range v.ofKind("fwd.forward") {
		if s.int("fwd.ubatches") > 0 {
			seen["a split pass"] = true
		}
		if s.bool("fwd.dummy") && !s.warmUp {
			seen["a dummy pass"] = true
		}
		if s.int("fwd.dp.lowest_mode_rank") > 0 {
			seen["a pass lowered by a rank other than the first"] = true
		}
		if s.int("fwd.padding.dp") > 0 {
			seen["padding up to the largest rank"] = true
		}
		if s.int("fwd.padding.graph") > 0 {
			seen["padding up to a graph"] = true
		}
	}
	cfg := &v.engine.config
	graphs := cfg.GraphMode != fwd.GraphNone
	for what, want := range map[string]bool{
		"a split pass": cfg.NumUBatches > 1,
		"a dummy pass": v.dp > 1,
		"a pass lowered by a rank other than the first": v.dp > 2 && graphs,
		"padding up to the largest rank":                v.dp > 1,
		"padding up to a graph":                         graphs,
	} {
		if want && !seen[what] {
			v.Errorf("there was not %s", what)
		}
	}
}

// inPass is middleware that checks what a pass finds in its context, against the attributes of its
// span. It leaves local sizes in the context: a pass nested in this one must not see them.
func inPass(t *testing.T, rank int) fwd.Middleware {
	return func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			fc, ok := fwd.FromContext(ctx)
			recorded, recording := trace.SpanFromContext(ctx).(sdktrace.ReadOnlySpan)
			if !ok || !recording {
				t.Errorf("a pass without forward context (%t) or span (%t)", ok, recording)
				return next(ctx)
			}
			s := newSpan(recorded)
			if sizes, ok := fwd.LocalSizes(ctx); ok {
				t.Errorf("a pass begins with local sizes %v", sizes)
			}
			if i, n, ok := fwd.UBatch(ctx); ok {
				t.Errorf("a pass begins in microbatch %d of %d", i, n)
			}
			if s.kind() != "fwd.forward" || fc.NumTokens != s.int("fwd.num_tokens") ||
				fc.NumTokensUnpadded != s.int("fwd.num_tokens_unpadded") ||
				fc.GraphMode.String() != s.text("fwd.graph.mode") || fc.Dummy != s.bool("fwd.dummy") ||
				len(fc.UBatches) != s.int("fwd.ubatches") ||
				fc.Batch.NumReqs != s.int("fwd.batch.num_reqs") ||
				fc.Batch.NumActiveLoRAs != s.int("fwd.batch.num_active_loras") ||
				fc.Batch.Uniform != s.bool("fwd.batch.uniform") || fc.Batch.HasLoRA != (fc.Batch.NumActiveLoRAs > 0) ||
				fc.Batch.NumTokens != fc.NumTokens {
				t.Errorf("span %s with %v in a pass with %+v", s.Name(), s.Attributes(), *fc)
			}
			if fc.DP != nil &&
				(fc.DP.Rank() != rank || fc.DP.NumTokens(rank) != fc.NumTokens ||
					fc.DP.MaxTokensAcrossDP() != s.int("fwd.dp.max_tokens")) {
				t.Errorf("rank %d with DP metadata of rank %d: %d tokens of at most %d, with %v", rank, fc.DP.Rank(),
					fc.DP.NumTokens(fc.DP.Rank()), fc.DP.MaxTokensAcrossDP(), s.Attributes())
			}
			inner, err := fwd.WithSPLocalSizes(ctx, 1)
			if err != nil {
				return err
			}
			return next(inner)
		}
	}
}

// checkMetrics compares the metrics with the spans and with what the graphs have counted
// themselves.
func (v *spanView) checkMetrics(got *metricdata.ResourceMetrics, stats *Stats) {
	want := map[string]float64{
		"fwd.graph.events{capture}": float64(stats.Captures),
		"fwd.graph.events{replay}":  float64(stats.Replays),
	}
	if n := len(v.ofKind("fwd.coordinate")); n > 0 {
		want["fwd.coordinate.duration"] = float64(n)
	}
	for _, s := range v.ofKind("fwd.forward") {
		mode := s.text("fwd.graph.mode")
		if mode == "NONE" {
			want["fwd.graph.events{eager}"]++
		}
		want["fwd.forward.tokens{"+mode+"}"] += float64(s.int("fwd.num_tokens_unpadded"))
		for _, kind := range []string{"graph", "dp"} {
			if n := s.int(attribute.Key("fwd.padding." + kind)); n > 0 {
				want["fwd.padding{"+kind+"}"] += float64(n)
			}
		}
		want[fmt.Sprintf("fwd.forward.duration{%s %s %s %d}", s.text("fwd.name"), mode, s.text("fwd.graph.reason"),
			v.bucket(s))]++
	}
	want["fwd.forward.active{}"] = 0 // no pass is running any more
	is := map[string]float64{}
	value := func(set attribute.Set, key attribute.Key) string {
		value, _ := set.Value(key)
		return value.String()
	}
	for _, scope := range got.ScopeMetrics {
		if scope.Scope.Name != fwd.ScopeName { // the engine's own are checked with the requests
			continue
		}
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					is[m.Name+"{"+value(p.Attributes, "fwd.graph.event")+value(p.Attributes,
						"fwd.padding.kind")+"}"] += float64(p.Value)
				}
			case metricdata.Histogram[int64]:
				for _, p := range data.DataPoints {
					is[m.Name+"{"+value(p.Attributes, "fwd.graph.mode")+"}"] += float64(p.Sum)
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					name := m.Name
					if name == "fwd.forward.duration" {
						name = fmt.Sprintf("%s{%s %s %s %s}", name, value(p.Attributes, "fwd.name"),
							value(p.Attributes, "fwd.graph.mode"),
							value(p.Attributes, "fwd.graph.reason"), value(p.Attributes, "fwd.batch.bucket"))
					}
					is[name] += float64(p.Count)
				}
			}
		}
	}
	for name, n := range want {
		if is[name] != n {
			v.Errorf("%s is %v, want %v", name, is[name], n)
		}
	}
	for name, n := range is {
		if _, ok := want[name]; !ok {
			v.Errorf("%s is %v, want nothing", name, n)
		}
	}
}

// bucket returns what fwd.batch.bucket must be: the size of the graph, or the next power of two.
func (v *spanView) bucket(s *span) int {
	tokens := s.int("fwd.num_tokens")
	if s.text("fwd.graph.mode") != "NONE" {
		return tokens
	}
	bucket := 1
	for bucket < tokens {
		bucket *= 2
	}
	return bucket
}
