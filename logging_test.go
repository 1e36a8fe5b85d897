package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// attrs is an attribute set by key, with values of the types that attributes have: an int is an int64.
type attrs = map[string]any

// telemetry collects what the Runners with its options emit.
type telemetry struct {
	spans  *tracetest.SpanRecorder
	reader *sdkmetric.ManualReader
	tracer trace.Tracer // of the callers
	opts   []fwd.Option
}

func newTelemetry(more ...sdktrace.TracerProviderOption) *telemetry {
	o := &telemetry{spans: tracetest.NewSpanRecorder(), reader: sdkmetric.NewManualReader()}
	tracers := sdktrace.NewTracerProvider(append(more, sdktrace.WithSpanProcessor(o.spans))...)
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(o.reader), sdkmetric.WithCardinalityLimit(0))
	o.tracer = tracers.Tracer("caller")
	o.opts = []fwd.Option{fwd.WithTracerProvider(tracers), fwd.WithMeterProvider(meters)}
	return o
}

func (o *telemetry) runner(t *testing.T, cfg fwd.Config, opts ...fwd.Option) *fwd.Runner {
	t.Helper()
	r, err := fwd.New(cfg, slices.Concat(o.opts, opts)...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// ended returns the ended spans of that name, in the order in which they ended.
func (o *telemetry) ended(name string) (spans []sdktrace.ReadOnlySpan) {
	for _, s := range o.spans.Ended() {
		if s.Name() == name {
			spans = append(spans, s)
		}
	}
	return spans
}

// only returns the one ended span of that name.
func (o *telemetry) only(t *testing.T, name string) sdktrace.ReadOnlySpan {
	t.Helper()
	spans := o.ended(name)
	if len(spans) != 1 {
		t.Fatalf("%d spans %s have ended, want 1", len(spans), name)
	}
	return spans[0]
}

// ofRank returns the one ended span of that name and DP rank.
func (o *telemetry) ofRank(t *testing.T, name string, rank int) sdktrace.ReadOnlySpan {
	t.Helper()
	var found []sdktrace.ReadOnlySpan
	for _, s := range o.ended(name) {
		if attrsOf(s.Attributes())["fwd.dp.rank"] == int64(rank) {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d spans %s of rank %d have ended, want 1", len(found), name, rank)
	}
	return found[0]
}

func attrsOf(kvs []attribute.KeyValue) attrs {
	m := attrs{}
	for _, kv := range kvs {
		m[string(kv.Key)] = kv.Value.AsInterface()
	}
	return m
}

// point is one attribute set of a metric with its value.
type point struct {
	Attrs attrs
	Count uint64 // of a histogram
	Sum   float64
}

func (o *telemetry) scopes(t *testing.T) []metricdata.ScopeMetrics {
	t.Helper()
	var all metricdata.ResourceMetrics
	if err := o.reader.Collect(context.Background(), &all); err != nil {
		t.Fatal(err)
	}
	return all.ScopeMetrics
}

// points returns the attribute sets of a metric with their values, sorted by the text of the sets.
func (o *telemetry) points(t *testing.T, name string) (points []point) {
	t.Helper()
	for _, scope := range o.scopes(t) {
		for _, m := range scope.Metrics {
			if m.Name != name {
				continue
			}
			switch data := m.Data.(type) {
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					points = append(points, point{attrsOf(p.Attributes.ToSlice()), p.Count, p.Sum})
				}
			case metricdata.Histogram[int64]:
				for _, p := range data.DataPoints {
					points = append(points, point{attrsOf(p.Attributes.ToSlice()), p.Count, float64(p.Sum)})
				}
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					points = append(points, point{attrsOf(p.Attributes.ToSlice()), 0, float64(p.Value)})
				}
			}
		}
	}
	slices.SortFunc(points, func(a, b point) int { return strings.Compare(fmt.Sprint(a.Attrs), fmt.Sprint(b.Attrs)) })
	return points
}

func (o *telemetry) wantPoints(t *testing.T, name string, want ...point) {
	t.Helper()
	if diff := cmp.Diff(want, o.points(t, name)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func wantAttrs(t *testing.T, s sdktrace.ReadOnlySpan, want attrs) {
	t.Helper()
	if diff := cmp.Diff(want, attrsOf(s.Attributes())); diff != "" {
		t.Errorf("attributes of %s (-want +got):\n%s", s.Name(), diff)
	}
}

// with returns the base with other keys; a nil value takes the key away.
func with(base attrs, kvs ...any) attrs {
	m := attrs{}
	for k, v := range base {
		m[k] = v
	}
	for i := 0; i < len(kvs); i += 2 {
		if m[kvs[i].(string)] = kvs[i+1]; kvs[i+1] == nil {
			delete(m, kvs[i].(string))
		}
	}
	return m
}

// simClock is a clock that stands still until it is told to go on.
type simClock struct {
	mu  sync.Mutex
	now time.Time
}

func newSimClock() *simClock { return &simClock{now: time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)} }

func (c *simClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *simClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func nothing(context.Context) error { return nil }

// words is an error with a word of its own.
type words string

func (w words) Error() string     { return "an error of words" }
func (w words) ErrorType() string { return string(w) }

func localGroup(t *testing.T, size int) []fwd.Coordinator {
	t.Helper()
	g, err := fwd.NewLocalGroup(size)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// together calls f for every rank at once and waits for all.
func together(size int, f func(rank int)) {
	var wg sync.WaitGroup
	for rank := range size {
		wg.Go(func() { f(rank) })
	}
	wg.Wait()
}

func telemetryDispatcher(t *testing.T, mode fwd.GraphMode) *fwd.Dispatcher {
	t.Helper()
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{Mode: mode, CaptureSizes: []int{1, 2, 4, 8, 24}, MaxNumSeqs: 32, LoRA: &fwd.LoRAConfig{MaxLoRAs: 2}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// plainForward are the attributes of a pass of one token that says nothing else.
var plainForward = attrs{
	"fwd.num_tokens": int64(1), "fwd.num_tokens_unpadded": int64(1), "fwd.virtual_engine": int64(0),
	"fwd.padding.graph": int64(0), "fwd.padding.dp": int64(0),
	"fwd.graph.mode": "NONE", "fwd.graph.reason": "unknown", "fwd.dummy": false,
}

func TestForwardSpanAttributes(t *testing.T) {
	t.Parallel()
	halves := []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 4}},
		{Requests: fwd.Range{Start: 1, Stop: 2}, Tokens: fwd.Range{Start: 4, Stop: 8}},
	}
	two := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}
	dense := two
	dense.Dense = true
	for _, test := range []struct {
		name string
		cfg  fwd.Config
		pass fwd.Pass
		want attrs
	}{
		{"nothing said", fwd.Config{}, fwd.Pass{NumTokens: 1}, plainForward},
		{"no tokens", fwd.Config{}, fwd.Pass{}, with(plainForward, "fwd.num_tokens", int64(0), "fwd.num_tokens_unpadded", int64(0))},
		{"name", fwd.Config{Name: "draft"}, fwd.Pass{NumTokens: 1}, with(plainForward, "fwd.name", "draft")},
		{"dummy", fwd.Config{}, fwd.Pass{NumTokens: 1, Dummy: true}, with(plainForward, "fwd.dummy", true)},
		{"virtual engine", fwd.Config{}, fwd.Pass{NumTokens: 1, VirtualEngine: 3}, with(plainForward, "fwd.virtual_engine", int64(3))},
		{"requests", fwd.Config{}, fwd.Pass{NumTokens: 1, NumReqs: 1}, with(plainForward, "fwd.num_reqs", int64(1))},
		{
			"descriptor with adapters", fwd.Config{},
			fwd.Pass{NumTokens: 8, NumTokensUnpadded: 5, NumReqs: 5, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, Batch: fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true, HasLoRA: true, NumActiveLoRAs: 2}},
			with(plainForward, "fwd.num_tokens", int64(8), "fwd.num_tokens_unpadded", int64(5), "fwd.num_reqs", int64(5),
				"fwd.padding.graph", int64(3), "fwd.graph.mode", "FULL", "fwd.graph.reason", "exact",
				"fwd.batch.num_reqs", int64(8), "fwd.batch.uniform", true, "fwd.batch.num_active_loras", int64(2)),
		},
		{
			"relaxed descriptor", fwd.Config{},
			fwd.Pass{NumTokens: 8, GraphMode: fwd.GraphPiecewise, Reason: fwd.ReasonRelaxed, Batch: fwd.BatchDescriptor{NumTokens: 8}},
			with(plainForward, "fwd.num_tokens", int64(8), "fwd.num_tokens_unpadded", int64(8),
				"fwd.graph.mode", "PIECEWISE", "fwd.graph.reason", "relaxed", "fwd.batch.uniform", false),
		},
		{
			"padding split", fwd.Config{},
			fwd.Pass{NumTokens: 24, NumTokensUnpadded: 5, NumTokensGraph: 8, GraphMode: fwd.GraphFull, Reason: fwd.ReasonRelaxed},
			with(plainForward, "fwd.num_tokens", int64(24), "fwd.num_tokens_unpadded", int64(5), "fwd.padding.graph", int64(3), "fwd.padding.dp", int64(16),
				"fwd.graph.mode", "FULL", "fwd.graph.reason", "relaxed", "fwd.batch.uniform", false),
		},
		{
			"microbatches", fwd.Config{}, fwd.Pass{NumTokens: 8, UBatches: halves},
			with(plainForward, "fwd.num_tokens", int64(8), "fwd.num_tokens_unpadded", int64(8), "fwd.ubatches", int64(2)),
		},
		{
			"counts across ranks", fwd.Config{Parallel: two}, fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(7, 1)},
			with(plainForward, "fwd.dp.rank", int64(1), "fwd.dp.size", int64(2), "fwd.dp.max_tokens", int64(7)),
		},
		{
			"agreement", fwd.Config{Parallel: two},
			fwd.Pass{NumTokens: 1, Reason: fwd.ReasonDPRank, Agreement: &fwd.Agreement{Step: 9, NumTokensAcrossDP: vec(7, 1), MaxTokensRank: 0, LowestModeRank: 1}},
			with(plainForward, "fwd.dp.rank", int64(1), "fwd.dp.size", int64(2), "fwd.dp.max_tokens", int64(7), "fwd.step", int64(9),
				"fwd.dp.max_tokens_rank", int64(0), "fwd.dp.lowest_mode_rank", int64(1), "fwd.graph.reason", "dp_rank"),
		},
		{
			"agreement that nobody lowered", fwd.Config{Parallel: two},
			fwd.Pass{NumTokens: 7, Agreement: &fwd.Agreement{Step: 9, NumTokensAcrossDP: vec(1, 7), MaxTokensRank: 1, LowestModeRank: -1}},
			with(plainForward, "fwd.num_tokens", int64(7), "fwd.num_tokens_unpadded", int64(7), "fwd.dp.rank", int64(1), "fwd.dp.size", int64(2),
				"fwd.dp.max_tokens", int64(7), "fwd.step", int64(9), "fwd.dp.max_tokens_rank", int64(1)),
		},
		{
			"dense model", fwd.Config{Parallel: dense}, fwd.Pass{NumTokens: 1},
			with(plainForward, "fwd.dp.rank", int64(1), "fwd.dp.size", int64(2)),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			ctx, caller := o.tracer.Start(context.Background(), "caller")
			err := o.runner(t, test.cfg).Run(ctx, test.pass, func(ctx context.Context) error {
				if got := trace.SpanFromContext(ctx); got == caller || !got.IsRecording() {
					t.Errorf("the span in a pass is %v, want the pass's", got)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			s := o.only(t, "fwd.forward")
			wantAttrs(t, s, test.want)
			if s.SpanKind() != trace.SpanKindInternal {
				t.Errorf("kind %v, want internal", s.SpanKind())
			}
			if s.Parent().SpanID() != caller.SpanContext().SpanID() {
				t.Errorf("parent %v, want the caller's span", s.Parent().SpanID())
			}
			if s.Status() != (sdktrace.Status{}) || len(s.Events()) > 0 {
				t.Errorf("status %v, events %v, want none", s.Status(), s.Events())
			}
			if scope := s.InstrumentationScope(); scope.Name != "github.com/forwardctx/fwd" || scope.Version != "0.1.0" {
				t.Errorf("scope %q version %q", scope.Name, scope.Version)
			}
		})
	}
}

func TestCoordinateSpan(t *testing.T) {
	t.Parallel()
	group := localGroup(t, 2)
	os := []*telemetry{newTelemetry(), newTelemetry()}
	together(2, func(rank int) {
		r := os[rank].runner(t, fwd.Config{Name: "target", Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}},
			fwd.WithCoordinator(group[rank]), fwd.WithDispatcher(telemetryDispatcher(t, fwd.GraphFull)))
		for _, eager := range []bool{false, true} { // step 1: FULL on both; step 2: rank 0 lowers
			pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: [][]int{{3}, {5, 1}}[rank], Eager: eager && rank == 0})
			if err != nil {
				t.Error(err)
				return
			}
			if err := r.Run(context.Background(), pass, nothing); err != nil {
				t.Error(err)
			}
		}
	})
	for rank, o := range os {
		base := attrs{"fwd.step": int64(1), "fwd.dp.rank": int64(rank), "fwd.dp.size": int64(2), "fwd.dp.max_tokens_rank": int64(1)}
		spans := o.ended("fwd.coordinate")
		if len(spans) != 2 {
			t.Fatalf("rank %d: %d coordinate spans, want 2", rank, len(spans))
		}
		wantAttrs(t, spans[0], base)
		wantAttrs(t, spans[1], with(base, "fwd.step", int64(2), "fwd.dp.lowest_mode_rank", int64(0)))
		for _, s := range spans {
			if s.SpanKind() != trace.SpanKindInternal || s.InstrumentationScope().Name != fwd.ScopeName || s.InstrumentationScope().Version != fwd.Version {
				t.Errorf("rank %d: kind %v, scope %v", rank, s.SpanKind(), s.InstrumentationScope())
			}
		}
		if got := o.points(t, "fwd.coordinate.duration"); len(got) != 1 || len(got[0].Attrs) != 0 || got[0].Count != 2 {
			t.Errorf("rank %d: fwd.coordinate.duration %v, want 2 without attributes", rank, got)
		}
		forward := o.ended("fwd.forward")
		if len(forward) != 2 {
			t.Fatalf("rank %d: %d forward spans, want 2", rank, len(forward))
		}
		unpadded, graph := [][2]int64{{3, 4}, {6, 8}}[rank][0], [][2]int64{{3, 4}, {6, 8}}[rank][1]
		base = attrs{
			"fwd.name": "target", "fwd.num_tokens": int64(8), "fwd.num_tokens_unpadded": unpadded, "fwd.num_reqs": int64(rank + 1), "fwd.virtual_engine": int64(0),
			"fwd.step": int64(1), "fwd.dp.rank": int64(rank), "fwd.dp.size": int64(2), "fwd.dp.max_tokens": int64(8), "fwd.dp.max_tokens_rank": int64(1),
			"fwd.padding.graph": graph - unpadded, "fwd.padding.dp": 8 - graph,
			"fwd.graph.mode": "FULL", "fwd.graph.reason": "relaxed", "fwd.batch.uniform": false, "fwd.dummy": false,
		}
		wantAttrs(t, forward[0], base)
		// Rank 0, eager, has no padding; rank 1 keeps that of the graph which it can't use now.
		reason, eagerTokens := "disabled", int64(3)
		if rank == 1 {
			reason, eagerTokens = "dp_rank", 8
		}
		wantAttrs(t, forward[1], with(base, "fwd.step", int64(2), "fwd.num_tokens", eagerTokens, "fwd.padding.graph", eagerTokens-unpadded, "fwd.padding.dp", int64(0),
			"fwd.graph.mode", "NONE", "fwd.graph.reason", reason, "fwd.dp.lowest_mode_rank", int64(0)))
	}
	graph := point{attrs{"fwd.padding.kind": "graph"}, 0, 1}
	os[0].wantPoints(t, "fwd.padding", point{attrs{"fwd.padding.kind": "dp"}, 0, 4}, graph)
	graph.Sum = 4
	os[1].wantPoints(t, "fwd.padding", graph)
}

func TestFailedCoordinateSpan(t *testing.T) {
	t.Parallel()
	for _, stepTrace := range []bool{false, true} {
		for rank := range 2 {
			t.Run(fmt.Sprintf("stepTrace=%t/rank=%d", stepTrace, rank), func(t *testing.T) {
				t.Parallel()
				o := newTelemetry()
				opts := []fwd.Option{fwd.WithCoordinator(localGroup(t, 2)[rank])}
				if stepTrace {
					opts = append(opts, fwd.WithStepTrace())
				}
				r := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}}, opts...)
				ctx, caller := o.tracer.Start(context.Background(), "caller")
				ctx, cancel := context.WithCancel(ctx)
				cancel()
				err := r.Run(ctx, fwd.Pass{NumTokens: 1}, nothing)
				if !errors.Is(err, fwd.ErrRankMissing) {
					t.Fatalf("%v, want ErrRankMissing", err)
				}
				s := o.only(t, "fwd.coordinate")
				wantAttrs(t, s, attrs{"fwd.step": int64(1), "fwd.dp.rank": int64(rank), "fwd.dp.size": int64(2), "error.type": "rank_missing"})
				if s.Status().Code != codes.Error || s.Status().Description == "" {
					t.Errorf("status %v, want an error", s.Status())
				}
				if s.Parent().SpanID() != caller.SpanContext().SpanID() || len(s.Links()) > 0 {
					t.Errorf("parent %v, links %v, want the caller's span and no links", s.Parent().SpanID(), s.Links())
				}
				if got := o.points(t, "fwd.coordinate.duration"); len(got) != 1 || got[0].Count != 1 || got[0].Attrs["error.type"] != "rank_missing" || len(got[0].Attrs) != 1 {
					t.Errorf("fwd.coordinate.duration %v, want 1 rank_missing, also under a cancelled context", got)
				}
				if n := len(o.ended("fwd.forward")) + len(o.points(t, "fwd.forward.duration")); n > 0 {
					t.Errorf("a pass that has not started left %d spans and measurements", n)
				}
			})
		}
	}
}

func TestUBatchSpans(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	began := clock.Now()
	pass := fwd.Pass{NumTokens: 12, NumTokensUnpadded: 10, UBatches: []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 4}},
		{Requests: fwd.Range{Start: 1, Stop: 3}, Tokens: fwd.Range{Start: 4, Stop: 12}},
	}}
	failed, started := fmt.Errorf("wrapped: %w", fwd.ErrLayer), make(chan struct{})
	err := r.Run(context.Background(), pass, func(ctx context.Context) error {
		return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
			if i == 0 {
				close(started)
				<-ctx.Done()
				return nil
			}
			<-started
			clock.advance(time.Second)
			return failed
		})
	})
	if !errors.Is(err, fwd.ErrLayer) {
		t.Fatalf("%v, want ErrLayer", err)
	}
	forward := o.only(t, "fwd.forward")
	if got := attrsOf(forward.Attributes())["error.type"]; got != "layer" {
		t.Errorf("error.type of the pass is %v, want layer", got)
	}
	spans := o.ended("fwd.ubatch")
	if len(spans) != 2 {
		t.Fatalf("%d microbatch spans, want 2", len(spans))
	}
	slices.SortFunc(spans, func(a, b sdktrace.ReadOnlySpan) int {
		return int(attrsOf(a.Attributes())["fwd.ubatch.index"].(int64) - attrsOf(b.Attributes())["fwd.ubatch.index"].(int64))
	})
	wantAttrs(t, spans[0], attrs{"fwd.ubatch.index": int64(0), "fwd.num_tokens": int64(4)})
	wantAttrs(t, spans[1], attrs{"fwd.ubatch.index": int64(1), "fwd.num_tokens": int64(8), "error.type": "layer"})
	if spans[0].Status().Code != codes.Unset || spans[1].Status().Code != codes.Error {
		t.Errorf("status %v and %v, want none and an error", spans[0].Status(), spans[1].Status())
	}
	for i, s := range spans {
		if s.Parent().SpanID() != forward.SpanContext().SpanID() {
			t.Errorf("microbatch %d's parent is %v, want the pass", i, s.Parent().SpanID())
		}
		if s.SpanKind() != trace.SpanKindInternal {
			t.Errorf("microbatch %d's kind is %v, want internal", i, s.SpanKind())
		}
		if !s.EndTime().Equal(began.Add(time.Second)) {
			t.Errorf("microbatch %d ended at %v, want the clock's %v", i, s.EndTime(), began.Add(time.Second))
		}
	}
	if !spans[0].StartTime().Equal(began) {
		t.Errorf("microbatch 0 started at %v, want the clock's %v", spans[0].StartTime(), began)
	}
}

func TestMetricDefinitions(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	parallel := fwd.ParallelConfig{DataParallelSize: 1}
	r := o.runner(t, fwd.Config{Name: "m", Parallel: parallel})
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 4, NumTokensUnpadded: 1, NumTokensGraph: 2}, nothing); err != nil {
		t.Fatal(err)
	}
	two := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}, fwd.WithCoordinator(localGroup(t, 2)[0]))
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	two.Run(cancelled, fwd.Pass{NumTokens: 1}, nothing) // for fwd.coordinate.duration
	type definition struct {
		Kind, Unit string
		Monotonic  bool
		Bounds     []float64
	}
	var bounds []float64
	for k := range 14 {
		bounds = append(bounds, 0.0005*math.Pow(2, float64(k)))
	}
	want := map[string]definition{
		"fwd.forward.duration":    {"metricdata.Histogram[float64]", "s", false, bounds},
		"fwd.forward.tokens":      {"metricdata.Histogram[int64]", "{token}", false, nil},
		"fwd.padding":             {"metricdata.Sum[int64]", "{token}", true, nil},
		"fwd.coordinate.duration": {"metricdata.Histogram[float64]", "s", false, bounds},
		"fwd.graph.events":        {"metricdata.Sum[int64]", "{event}", true, nil},
	}
	got := map[string]definition{}
	scopes := o.scopes(t)
	if len(scopes) != 1 || scopes[0].Scope.Name != "github.com/forwardctx/fwd" || scopes[0].Scope.Version != "0.1.0" {
		t.Fatalf("scopes %v, want one, with name and version", scopes)
	}
	for _, m := range scopes[0].Metrics {
		d := definition{Kind: reflect.TypeOf(m.Data).String(), Unit: m.Unit}
		switch data := m.Data.(type) {
		case metricdata.Histogram[float64]:
			d.Bounds = data.DataPoints[0].Bounds
		case metricdata.Sum[int64]:
			d.Monotonic = data.IsMonotonic
		}
		got[m.Name] = d
		if m.Description == "" {
			t.Errorf("%s has no description", m.Name)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// TestMetricValues runs a few passes on a clock that says exactly how long each takes.
func TestMetricValues(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{Name: "target"}, fwd.WithClock(clock.Now))
	anonymous := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	run := func(r *fwd.Runner, d time.Duration, p fwd.Pass, want error) {
		t.Helper()
		if err := r.Run(context.Background(), p, func(context.Context) error { clock.advance(d); return want }); err != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	run(r, 250*time.Millisecond, fwd.Pass{NumTokens: 5, NumTokensUnpadded: 3}, nil)
	run(r, 500*time.Millisecond, fwd.Pass{NumTokens: 7}, nil) // the same bucket
	run(r, time.Second, fwd.Pass{NumTokens: 8, NumTokensUnpadded: 2, NumTokensGraph: 4, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, Dummy: true}, nil)
	run(r, 2*time.Second, fwd.Pass{NumTokens: 1}, fwd.ErrLayer)
	run(anonymous, 4*time.Second, fwd.Pass{NumTokens: 1}, nil)
	eager := attrs{"fwd.name": "target", "fwd.graph.mode": "NONE", "fwd.graph.reason": "unknown", "fwd.batch.bucket": int64(8), "fwd.dummy": false}
	want := []point{
		{eager, 2, 0.75},
		{with(eager, "fwd.graph.mode", "FULL", "fwd.graph.reason", "exact", "fwd.dummy", true), 1, 1},
		{with(eager, "fwd.batch.bucket", int64(1), "error.type", "layer"), 1, 2},
		{with(eager, "fwd.batch.bucket", int64(1), "fwd.name", nil), 1, 4},
	}
	slices.SortFunc(want, func(a, b point) int { return strings.Compare(fmt.Sprint(a.Attrs), fmt.Sprint(b.Attrs)) })
	o.wantPoints(t, "fwd.forward.duration", want...)
	o.wantPoints(t, "fwd.forward.tokens",
		point{attrs{"fwd.graph.mode": "NONE", "fwd.dummy": false}, 4, 3 + 7 + 1 + 1},
		point{attrs{"fwd.graph.mode": "FULL", "fwd.dummy": true}, 1, 2})
	o.wantPoints(t, "fwd.padding", point{attrs{"fwd.padding.kind": "dp"}, 0, 4}, point{attrs{"fwd.padding.kind": "graph"}, 0, 2 + 2})
	o.wantPoints(t, "fwd.graph.events", point{attrs{"fwd.graph.event": "eager"}, 0, 4})
}

func TestBatchBucket(t *testing.T) {
	t.Parallel()
	planned := func(tokens int) func(*testing.T, *fwd.Runner) fwd.Pass {
		return func(t *testing.T, r *fwd.Runner) fwd.Pass {
			p, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{tokens}})
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
	}
	given := func(p fwd.Pass) func(*testing.T, *fwd.Runner) fwd.Pass {
		return func(*testing.T, *fwd.Runner) fwd.Pass { return p }
	}
	for name, test := range map[string]struct {
		pass func(*testing.T, *fwd.Runner) fwd.Pass
		want int64
	}{
		"capture size, no power of two": {planned(9), 24},
		"capture size itself":           {planned(8), 8},
		"above the capture sizes":       {planned(25), 32},
		"a power of two":                {given(fwd.Pass{NumTokens: 64}), 64},
		"after a power of two":          {given(fwd.Pass{NumTokens: 65}), 128},
		"none":                          {given(fwd.Pass{}), 0},
		"one":                           {given(fwd.Pass{NumTokens: 1}), 1},
		"two":                           {given(fwd.Pass{NumTokens: 2}), 2},
		"three":                         {given(fwd.Pass{NumTokens: 3}), 4},
		"the largest":                   {given(fwd.Pass{NumTokens: math.MaxInt32}), 1 << 31},
		"a graph that nobody dispatched": {
			given(fwd.Pass{NumTokens: 24, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 24}}), 32,
		},
		"eager, of a capture size": {given(fwd.Pass{NumTokens: 24, Reason: fwd.ReasonDisabled}), 32},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			r := o.runner(t, fwd.Config{}, fwd.WithDispatcher(telemetryDispatcher(t, fwd.GraphPiecewise)))
			if err := r.Run(context.Background(), test.pass(t, r), nothing); err != nil {
				t.Fatal(err)
			}
			if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Attrs["fwd.batch.bucket"] != test.want {
				t.Errorf("%v, want bucket %d", got, test.want)
			}
		})
	}
}

type replay fwd.ForwardFunc

func (r replay) Replay(ctx context.Context) error { return r(ctx) }

func TestGraphEvents(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{})
	refuse := errors.New("no capture")
	var captureErr error
	cache, err := fwd.NewGraphCache(fwd.GraphFull, nothing, func(ctx context.Context, _ fwd.BatchDescriptor, forward fwd.ForwardFunc) (fwd.Graph, error) {
		return replay(forward), captureErr
	})
	if err != nil {
		t.Fatal(err)
	}
	run := func(mode fwd.GraphMode, tokens int, want error) {
		t.Helper()
		if err := r.Run(context.Background(), fwd.Pass{NumTokens: tokens, GraphMode: mode}, cache.Forward); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	run(fwd.GraphFull, 4, nil) // capture, replay
	run(fwd.GraphFull, 4, nil) // replay
	run(fwd.GraphFull, 8, nil) // capture, replay
	run(fwd.GraphNone, 4, nil) // eager
	run(fwd.GraphPiecewise, 4, nil)
	captureErr = refuse
	run(fwd.GraphFull, 16, refuse)
	cache.Forward(fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: 4, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 4}}))
	var none *fwd.Runner
	none.Run(context.Background(), fwd.Pass{NumTokens: 4, GraphMode: fwd.GraphFull}, cache.Forward)
	o.wantPoints(t, "fwd.graph.events",
		point{attrs{"fwd.graph.event": "capture"}, 0, 2},
		point{attrs{"fwd.graph.event": "eager"}, 0, 1},
		point{attrs{"fwd.graph.event": "replay"}, 0, 3})
}

func TestErrorTypes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want string
	}{
		{fwd.ErrNoForwardContext, "no_forward_context"},
		{fwd.ErrNoMetadata, "no_metadata"},
		{fwd.ErrLayer, "layer"},
		{fwd.ErrNoDescriptor, "no_descriptor"},
		{fwd.ErrInvalid, "invalid"},
		{fwd.ErrTokenMismatch, "token_mismatch"},
		{fwd.ErrLockstep, "lockstep"},
		{fwd.ErrRankMissing, "rank_missing"},
		{fwd.ErrCaptureClosed, "capture_closed"},
		{&fwd.RankError{Err: fwd.ErrRankMissing, Step: 3}, "rank_missing"},
		{fmt.Errorf("model: %w", &fwd.RankError{Err: fmt.Errorf("%w: %w", fwd.ErrLockstep, context.Canceled)}), "lockstep"},
		{fmt.Errorf("model: %w", fmt.Errorf("layer: %w", fwd.ErrInvalid)), "invalid"},
		{&fwd.UBatchError{Index: 1, Err: fwd.ErrNoMetadata}, "no_metadata"},
		{words("own_word"), "own_word"},
		{errors.New("plain"), "*errors.errorString"},
		{fmt.Errorf("wrapped: %w", errors.New("plain")), "*errors.errorString"},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			if err := o.runner(t, fwd.Config{}).Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return test.err }); err != test.err {
				t.Errorf("Run returned %v, want %v unchanged", err, test.err)
			}
			s := o.only(t, "fwd.forward")
			wantAttrs(t, s, with(plainForward, "error.type", test.want))
			if want := (sdktrace.Status{Code: codes.Error, Description: test.err.Error()}); s.Status() != want {
				t.Errorf("status %v, want %v", s.Status(), want)
			}
			if len(s.Events()) > 0 {
				t.Errorf("events %v, want none: errors are not recorded as events", s.Events())
			}
			if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Attrs["error.type"] != test.want || got[0].Count != 1 {
				t.Errorf("fwd.forward.duration %v, want error.type %s", got, test.want)
			}
		})
	}
}

// recovered returns what f panics with.
func recovered(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}

func wantPanicSpan(t *testing.T, s sdktrace.ReadOnlySpan, message string) {
	t.Helper()
	if s.Status().Code != codes.Error || attrsOf(s.Attributes())["error.type"] != "panic" {
		t.Errorf("%s: status %v, attributes %v, want an error and error.type panic", s.Name(), s.Status(), s.Attributes())
	}
	if len(s.Events()) != 1 || s.Events()[0].Name != "exception" {
		t.Errorf("%s: events %v, want an exception", s.Name(), s.Events())
	} else if got := attrsOf(s.Events()[0].Attributes)["exception.message"]; got != message {
		t.Errorf("%s: exception message %v, want %s", s.Name(), got, message)
	}
	if s.EndTime().IsZero() {
		t.Errorf("%s has not ended", s.Name())
	}
}

func TestPanics(t *testing.T) {
	t.Parallel()
	type boom struct{ int }
	value := &boom{1}
	throw := func(context.Context) error { panic(value) }
	message := fmt.Sprint(value)
	for name, run := range map[string]func(*testing.T, *telemetry){
		"forward": func(t *testing.T, o *telemetry) {
			o.runner(t, fwd.Config{}).Run(context.Background(), fwd.Pass{NumTokens: 1}, throw)
		},
		"forward in middleware": func(t *testing.T, o *telemetry) {
			mw := func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error { return next(ctx) }
			}
			o.runner(t, fwd.Config{}, fwd.WithMiddleware(mw)).Run(context.Background(), fwd.Pass{NumTokens: 1}, throw)
		},
		"forward, then synchronise": func(t *testing.T, o *telemetry) {
			o.runner(t, fwd.Config{}, fwd.WithSynchronize(nothing)).Run(context.Background(), fwd.Pass{NumTokens: 1}, throw)
		},
		"synchronise": func(t *testing.T, o *telemetry) {
			o.runner(t, fwd.Config{}, fwd.WithSynchronize(throw)).Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing)
		},
		"synchronise at the end of Start": func(t *testing.T, o *telemetry) {
			_, end, err := o.runner(t, fwd.Config{}, fwd.WithSynchronize(throw)).Start(context.Background(), fwd.Pass{NumTokens: 1})
			if err != nil {
				t.Fatal(err)
			}
			end(nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			if got := recovered(func() { run(t, o) }); got != value {
				t.Errorf("panic value %v, want %v itself", got, value)
			}
			s := o.only(t, "fwd.forward")
			wantPanicSpan(t, s, message)
			wantAttrs(t, s, with(plainForward, "error.type", "panic"))
			if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Attrs["error.type"] != "panic" {
				t.Errorf("fwd.forward.duration %v, want one panic", got)
			}
		})
	}
	t.Run("microbatch", func(t *testing.T) {
		t.Parallel()
		o := newTelemetry()
		pass := fwd.Pass{NumTokens: 2, UBatches: []fwd.UBatchSlice{
			{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 1}},
			{Requests: fwd.Range{Start: 1, Stop: 2}, Tokens: fwd.Range{Start: 1, Stop: 2}},
		}}
		got := recovered(func() {
			o.runner(t, fwd.Config{}).Run(context.Background(), pass, func(ctx context.Context) error {
				return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
					if i == 1 {
						panic(value)
					}
					return nil
				})
			})
		})
		if p, ok := got.(*fwd.UBatchPanic); !ok || p.Value != value || p.Index != 1 {
			t.Errorf("panic value %v, want a UBatchPanic of 1", got)
		}
		for _, s := range o.ended("fwd.ubatch") {
			if attrsOf(s.Attributes())["fwd.ubatch.index"] == int64(1) {
				wantPanicSpan(t, s, message)
			} else if s.Status().Code != codes.Unset {
				t.Errorf("the other microbatch has status %v", s.Status())
			}
		}
		if n := len(o.ended("fwd.ubatch")); n != 2 {
			t.Errorf("%d microbatch spans have ended, want 2", n)
		}
		if s := o.only(t, "fwd.forward"); attrsOf(s.Attributes())["error.type"] != "panic" || s.Status().Code != codes.Error {
			t.Errorf("the pass has status %v, attributes %v, want a panic", s.Status(), s.Attributes())
		}
	})
}

func TestStartEndsElsewhere(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	synchronised := 0
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now), fwd.WithSynchronize(func(context.Context) error { synchronised++; return nil }))
	began := clock.Now()
	ctx, end, err := r.Start(context.Background(), fwd.Pass{NumTokens: 1})
	if err != nil {
		t.Fatal(err)
	}
	if !trace.SpanFromContext(ctx).IsRecording() || len(o.ended("fwd.forward")) > 0 {
		t.Error("the span has not begun, or has ended")
	}
	clock.advance(time.Second)
	done := make(chan struct{})
	go func() {
		defer close(done)
		end(fwd.ErrLayer)
	}()
	<-done
	clock.advance(time.Second)
	end(nil)
	end(fwd.ErrInvalid)
	s := o.only(t, "fwd.forward")
	wantAttrs(t, s, with(plainForward, "error.type", "layer"))
	if s.StartTime() != began || s.EndTime() != began.Add(time.Second) {
		t.Errorf("the span is from %v to %v, want from %v for 1s", s.StartTime(), s.EndTime(), began)
	}
	if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Count != 1 || got[0].Sum != 1 {
		t.Errorf("fwd.forward.duration %v, want one of 1 s", got)
	}
	if synchronised != 1 {
		t.Errorf("synchronised %d times, want once", synchronised)
	}
}

// TestWaitingApart lets rank 1 come 3 s late: rank 0 waits in fwd.coordinate, and no pass has that in its time.
func TestWaitingApart(t *testing.T) {
	t.Parallel()
	for _, stepTrace := range []bool{false, true} {
		t.Run(fmt.Sprintf("stepTrace=%t", stepTrace), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o, group, began := newTelemetry(), localGroup(t, 2), time.Now()
				together(2, func(rank int) {
					opts := []fwd.Option{fwd.WithCoordinator(group[rank]), fwd.WithSynchronize(func(context.Context) error { time.Sleep(time.Second); return nil })}
					if stepTrace {
						opts = append(opts, fwd.WithStepTrace())
					}
					r := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}}, opts...)
					time.Sleep([]time.Duration{2 * time.Second, 5 * time.Second}[rank])
					err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error { time.Sleep(10 * time.Second); return nil })
					if err != nil {
						t.Error(err)
					}
				})
				for rank, want := range [][4]int{{2, 5, 5, 16}, {5, 5, 5, 16}} {
					coordinate, forward := o.ofRank(t, "fwd.coordinate", rank), o.ofRank(t, "fwd.forward", rank)
					var got [4]int
					for i, at := range []time.Time{coordinate.StartTime(), coordinate.EndTime(), forward.StartTime(), forward.EndTime()} {
						got[i] = int(at.Sub(began) / time.Second)
					}
					if got != want {
						t.Errorf("rank %d waits and computes %v s after the start, want %v", rank, got, want)
					}
				}
				o.wantPoints(t, "fwd.coordinate.duration", point{attrs{}, 2, 3})
				if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Sum != 22 {
					t.Errorf("fwd.forward.duration %v, want 22 s", got)
				}
			})
		})
	}
}

// TestClock is about simulators: all times are the clock's, not the machine's.
func TestClock(t *testing.T) {
	t.Parallel()
	for _, stepTrace := range []bool{false, true} {
		o, group := newTelemetry(), localGroup(t, 2)
		var clocks [2]*simClock
		together(2, func(rank int) {
			clocks[rank] = newSimClock()
			opts := []fwd.Option{fwd.WithClock(clocks[rank].Now), fwd.WithCoordinator(advancing{group[rank], clocks[rank]})}
			if stepTrace {
				opts = append(opts, fwd.WithStepTrace())
			}
			r := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}}, opts...)
			err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error { clocks[rank].advance(time.Minute); return nil })
			if err != nil {
				t.Error(err)
			}
		})
		began := newSimClock().now
		for rank := range 2 {
			c, f := o.ofRank(t, "fwd.coordinate", rank), o.ofRank(t, "fwd.forward", rank)
			got := []time.Time{c.StartTime(), c.EndTime(), f.StartTime(), f.EndTime()}
			want := []time.Time{began, began.Add(time.Hour), began.Add(time.Hour), began.Add(time.Hour + time.Minute)}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("step trace %t, rank %d: times (-want +got):\n%s", stepTrace, rank, diff)
			}
		}
		o.wantPoints(t, "fwd.coordinate.duration", point{attrs{}, 2, 2 * 3600})
		if got := o.points(t, "fwd.forward.duration"); len(got) != 1 || got[0].Sum != 120 {
			t.Errorf("fwd.forward.duration %v, want 120 s", got)
		}
	}
}

// advancing is a Coordinator that takes an hour of a simulated clock.
type advancing struct {
	fwd.Coordinator
	clock *simClock
}

func (c advancing) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	c.clock.advance(time.Hour)
	return c.Coordinator.Exchange(ctx, v)
}

// stepRanks runs one step of a group, each rank under a span of its own caller, and returns the callers.
func stepRanks(t *testing.T, os []*telemetry, option func(rank int) bool, caller func(ctx context.Context, rank int) context.Context) []trace.SpanContext {
	t.Helper()
	group, callers := localGroup(t, len(os)), make([]trace.SpanContext, len(os))
	together(len(os), func(rank int) {
		opts := []fwd.Option{fwd.WithCoordinator(group[rank])}
		if option(rank) {
			opts = append(opts, fwd.WithStepTrace())
		}
		r := os[rank].runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: len(os), DataParallelRank: rank}}, opts...)
		ctx := caller(context.Background(), rank)
		callers[rank] = trace.SpanContextFromContext(ctx)
		pass, err := r.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{rank + 1}})
		if err == nil {
			err = r.Run(ctx, pass, nothing)
		}
		if err != nil {
			t.Error(err)
		}
	})
	return callers
}

func always(int) bool { return true }

func wantTrace(t *testing.T, s sdktrace.ReadOnlySpan, parent trace.SpanContext, links ...trace.SpanContext) {
	t.Helper()
	rank := attrsOf(s.Attributes())["fwd.dp.rank"]
	if s.Parent().SpanID() != parent.SpanID() || parent.IsValid() && s.SpanContext().TraceID() != parent.TraceID() {
		t.Errorf("%s of rank %v: trace %v, parent %v, want %v, %v", s.Name(), rank, s.SpanContext().TraceID(), s.Parent().SpanID(), parent.TraceID(), parent.SpanID())
	}
	var got, want []trace.SpanID
	for _, l := range s.Links() {
		got = append(got, l.SpanContext.SpanID())
	}
	for _, l := range links {
		want = append(want, l.SpanID())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s of rank %v: links (-want +got):\n%s", s.Name(), rank, diff)
	}
}

func TestStepTrace(t *testing.T) {
	t.Parallel()
	// shared returns the telemetry of three ranks that record into the same place.
	shared := func(opts ...sdktrace.TracerProviderOption) (*telemetry, []*telemetry) {
		o := newTelemetry(opts...)
		return o, []*telemetry{o, o, o}
	}
	started := func(o *telemetry) func(context.Context, int) context.Context {
		return func(ctx context.Context, rank int) context.Context {
			ctx, _ = o.tracer.Start(ctx, fmt.Sprint("caller of ", rank))
			return ctx
		}
	}
	t.Run("one trace", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, always, started(o))
		root := o.ofRank(t, "fwd.coordinate", 0)
		wantTrace(t, root, callers[0])
		for rank := range 3 {
			if rank > 0 {
				wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), root.SpanContext(), callers[rank])
			}
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), root.SpanContext(), callers[rank])
		}
	})
	t.Run("no callers", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		stepRanks(t, os, always, func(ctx context.Context, _ int) context.Context { return ctx })
		root := o.ofRank(t, "fwd.coordinate", 0)
		wantTrace(t, root, trace.SpanContext{})
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), root.SpanContext())
		}
		wantTrace(t, o.ofRank(t, "fwd.coordinate", 1), root.SpanContext())
	})
	t.Run("without the option", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, func(int) bool { return false }, started(o))
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), callers[rank])
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), callers[rank])
		}
	})
	t.Run("a rank without the option", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, func(rank int) bool { return rank != 1 }, started(o))
		root := o.ofRank(t, "fwd.coordinate", 0)
		wantTrace(t, o.ofRank(t, "fwd.coordinate", 1), callers[1])
		wantTrace(t, o.ofRank(t, "fwd.forward", 1), callers[1])
		wantTrace(t, o.ofRank(t, "fwd.coordinate", 2), root.SpanContext(), callers[2])
		wantTrace(t, o.ofRank(t, "fwd.forward", 2), root.SpanContext(), callers[2])
	})
	t.Run("rank 0 without the option", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, func(rank int) bool { return rank != 0 }, started(o))
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), callers[rank])
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), callers[rank])
		}
	})
	t.Run("rank 0 not sampled", func(t *testing.T) {
		t.Parallel()
		o := newTelemetry()
		never := newTelemetry(sdktrace.WithSampler(sdktrace.NeverSample()))
		stepRanks(t, []*telemetry{never, o, o}, always, func(ctx context.Context, rank int) context.Context {
			if rank > 0 { // sampled callers, which do not decide
				ctx, _ = o.tracer.Start(ctx, "caller")
			}
			return ctx
		})
		if n := len(o.spans.Ended()) + len(never.spans.Ended()); n > 0 {
			t.Errorf("%d spans were recorded, want none", n)
		}
	})
	t.Run("rank 0 sampled, callers not", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		stepRanks(t, os, always, func(ctx context.Context, rank int) context.Context {
			if rank == 0 {
				return ctx
			}
			return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{byte(rank)}, SpanID: trace.SpanID{byte(rank)}}))
		})
		if c, f := len(o.ended("fwd.coordinate")), len(o.ended("fwd.forward")); c != 3 || f != 3 {
			t.Errorf("%d coordinate spans and %d forward spans were recorded, want 3 of each", c, f)
		}
	})
	t.Run("rank 0 has no valid span", func(t *testing.T) {
		t.Parallel()
		group, o := localGroup(t, 2), newTelemetry()
		r := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}}, fwd.WithStepTrace(), fwd.WithCoordinator(group[1]))
		ctx, caller := o.tracer.Start(context.Background(), "caller")
		together(2, func(rank int) {
			var err error
			if rank == 0 {
				_, err = group[0].Exchange(context.Background(), fwd.Vote{Step: 1, NumTokens: 1, NumTokensPadded: 1, SpanContext: trace.SpanContext{}.WithSpanID(trace.SpanID{1})})
			} else {
				err = r.Run(ctx, fwd.Pass{NumTokens: 1}, nothing)
			}
			if err != nil {
				t.Error(err)
			}
		})
		wantTrace(t, o.only(t, "fwd.coordinate"), caller.SpanContext())
		wantTrace(t, o.only(t, "fwd.forward"), caller.SpanContext())
	})
}

func TestLinks(t *testing.T) {
	t.Parallel()
	limits := sdktrace.NewSpanLimits()
	limits.LinkCountLimit = -1 // so that the bound is the library's
	links := make([]trace.Link, 200)
	for i := range links {
		links[i].SpanContext = trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1, byte(i)}})
		links[i].Attributes = []attribute.KeyValue{attribute.Int("request", i)}
	}
	root := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{9}, SpanID: trace.SpanID{9}, TraceFlags: trace.FlagsSampled})
	for _, n := range []int{0, 3, 127, 128, 200} {
		for _, stepTrace := range []bool{false, true} {
			t.Run(fmt.Sprintf("links=%d/stepTrace=%t", n, stepTrace), func(t *testing.T) {
				t.Parallel()
				o := newTelemetry(sdktrace.WithRawSpanLimits(limits))
				ctx, caller := o.tracer.Start(context.Background(), "caller")
				pass := fwd.Pass{NumTokens: 1, Links: links[:n:n], Agreement: &fwd.Agreement{NumTokensAcrossDP: vec(1, 1), SpanContext: root}}
				var opts []fwd.Option
				var want []trace.SpanID
				if stepTrace {
					opts, want = []fwd.Option{fwd.WithStepTrace()}, []trace.SpanID{caller.SpanContext().SpanID()}
				}
				for i := 0; i < n && len(want) < 128; i++ {
					want = append(want, links[i].SpanContext.SpanID())
				}
				r := o.runner(t, fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}, opts...)
				if err := r.Run(ctx, pass, nothing); err != nil {
					t.Fatal(err)
				}
				var got []trace.SpanID
				for _, l := range o.only(t, "fwd.forward").Links() {
					got = append(got, l.SpanContext.SpanID())
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("links (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestNilProvidersKeepTheOthers(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{}, fwd.WithTracerProvider(nil), fwd.WithMeterProvider(nil))
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Fatal(err)
	}
	if len(o.ended("fwd.forward")) != 1 || len(o.points(t, "fwd.forward.duration")) != 1 {
		t.Error("a nil provider took the place of one that was given")
	}
	r, err := fwd.New(fwd.Config{}, fwd.WithTracerProvider(nil), fwd.WithMeterProvider(nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Error(err)
	}
}

func TestCancelledPassIsRecorded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	ctx, cancel := context.WithCancel(context.Background())
	err := o.runner(t, fwd.Config{}).Run(ctx, fwd.Pass{NumTokens: 2, NumTokensUnpadded: 1}, func(ctx context.Context) error {
		cancel()
		return ctx.Err()
	})
	if err != context.Canceled {
		t.Errorf("%v, want context.Canceled", err)
	}
	o.only(t, "fwd.forward")
	for _, name := range []string{"fwd.forward.duration", "fwd.forward.tokens", "fwd.padding", "fwd.graph.events"} {
		if n := len(o.points(t, name)); n != 1 {
			t.Errorf("%s has %d points, want 1", name, n)
		}
	}
}

// TestExemplars checks that measurements carry the pass's own span.
func TestExemplars(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	if err := o.runner(t, fwd.Config{}).Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Fatal(err)
	}
	span := o.only(t, "fwd.forward").SpanContext().SpanID()
	for _, m := range o.scopes(t)[0].Metrics {
		if data, ok := m.Data.(metricdata.Histogram[float64]); ok && m.Name == "fwd.forward.duration" {
			if e := data.DataPoints[0].Exemplars; len(e) != 1 || trace.SpanID(e[0].SpanID) != span {
				t.Errorf("exemplars %v, want one of span %v", e, span)
			}
			return
		}
	}
	t.Error("there is no fwd.forward.duration")
}

// TestNothingOutsideARunner has passes of no Runner inside a Runner's pass, and alone.
func TestNothingOutsideARunner(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	split := []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 1}},
		{Requests: fwd.Range{Start: 1, Stop: 2}, Tokens: fwd.Range{Start: 1, Stop: 2}},
	}
	halves := func(ctx context.Context) error {
		return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
	}
	var none *fwd.Runner
	inside := func(ctx context.Context) error {
		return errors.Join(
			none.Run(ctx, fwd.Pass{NumTokens: 2, UBatches: split}, halves),
			halves(fwd.NewContext(ctx, &fwd.ForwardContext{NumTokens: 2, UBatches: split})),
			halves(fwd.NewContext(ctx, &fwd.ForwardContext{NumTokens: 2})),
		)
	}
	if err := inside(context.Background()); err != nil {
		t.Error(err)
	}
	if n := len(o.spans.Started()) + len(o.scopes(t)); n > 0 {
		t.Errorf("%d spans and scopes without a Runner's pass, want none", n)
	}
	if err := o.runner(t, fwd.Config{}).Run(context.Background(), fwd.Pass{NumTokens: 1}, inside); err != nil {
		t.Error(err)
	}
	if n := len(o.spans.Started()); n != 1 {
		t.Errorf("%d spans, want the Runner's pass alone", n)
	}
	o.wantPoints(t, "fwd.graph.events", point{attrs{"fwd.graph.event": "eager"}, 0, 1})
}

func TestAttributeSetsAreBounded(t *testing.T) {
	t.Parallel()
	count := func(t *testing.T, passes int, pass func(i int) fwd.Pass, err func(i int) error) int {
		o := newTelemetry()
		r := o.runner(t, fwd.Config{})
		for i := range passes {
			r.Run(context.Background(), pass(i), func(context.Context) error { return err(i) })
		}
		points := o.points(t, "fwd.forward.duration")
		total := uint64(0)
		for _, p := range points {
			total += p.Count
		}
		if total != uint64(passes) {
			t.Errorf("%d passes are in the histogram, want %d", total, passes)
		}
		for _, name := range []string{"fwd.forward.tokens", "fwd.padding", "fwd.graph.events"} {
			if n := len(o.points(t, name)); n > 2 {
				t.Errorf("%s has %d attribute sets, want at most 2", name, n)
			}
		}
		return len(points)
	}
	t.Run("errors", func(t *testing.T) {
		t.Parallel()
		n := count(t, 1000, func(int) fwd.Pass { return fwd.Pass{NumTokens: 1} }, func(i int) error { return words(fmt.Sprint("word", i)) })
		if n < 2 || n > 100 {
			t.Errorf("1,000 different errors have %d attribute sets, want a few dozen", n)
		}
	})
	t.Run("sizes", func(t *testing.T) {
		t.Parallel()
		n := count(t, 5000, func(i int) fwd.Pass { return fwd.Pass{NumTokens: i + 1} }, func(int) error { return nil })
		if n != 14 { // 1, 2, 4, ..., 8192
			t.Errorf("the sizes 1 to 5,000 have %d attribute sets, want 14", n)
		}
	})
}
