// This file has the helpers that several files share: the telemetry of a test, comparisons, a
// clock, passes.

package sdk_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// The instrumentation scope, as backends show it.
const (
	scopeName    = "github.com/forwardctx/fwd"
	scopeVersion = "0.1.0-dev"
)

// attrs is an attribute set by key. Its whole numbers are ints, in lists too.
type attrs = map[string]any

// telemetry collects everything that Runners with its options emit.
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

// run runs one pass of a Runner without a configuration.
func (o *telemetry) run(t *testing.T, p fwd.Pass, forward fwd.ForwardFunc, opts ...fwd.Option) error {
	t.Helper()
	return o.runner(t, fwd.Config{}, opts...).Run(context.Background(), p, forward)
}

// kindOf returns the word of a span's name that says what it covers. What follows is of each span.
func kindOf(s sdktrace.ReadOnlySpan) string {
	kind, _, _ := strings.Cut(s.Name(), " ")
	return kind
}

// ended returns the ended spans of that kind, in the order in which they ended.
func (o *telemetry) ended(kind string) (spans []sdktrace.ReadOnlySpan) {
	for _, s := range o.spans.Ended() {
		if kindOf(s) == kind {
			spans = append(spans, s)
		}
	}
	return spans
}

// only returns the one ended span of that kind.
func (o *telemetry) only(t *testing.T, kind string) sdktrace.ReadOnlySpan {
	t.Helper()
	spans := o.ended(kind)
	if len(spans) != 1 {
		t.Fatalf("%d spans %s have ended, want 1", len(spans), kind)
	}
	return spans[0]
}

// ofRank returns the one ended span of that kind and DP rank.
func (o *telemetry) ofRank(t *testing.T, kind string, rank int) sdktrace.ReadOnlySpan {
	t.Helper()
	var found []sdktrace.ReadOnlySpan
	for _, s := range o.ended(kind) {
		if attrsOf(s.Attributes())["fwd.dp.rank"] == rank {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d spans %s of rank %d have ended, want 1", len(found), kind, rank)
	}
	return found[0]
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
			case metricdata.Sum[float64]:
				for _, p := range data.DataPoints {
					points = append(points, point{attrsOf(p.Attributes.ToSlice()), 0, p.Value})
				}
			}
		}
	}
	slices.SortFunc(points, byText)
	return points
}

// byText orders points by the text of their attribute sets.
func byText(a, b point) int { return strings.Compare(fmt.Sprint(a.Attrs), fmt.Sprint(b.Attrs)) }

// onlyPoint returns the one attribute set of a metric with its value.
func (o *telemetry) onlyPoint(t *testing.T, name string) point {
	t.Helper()
	points := o.points(t, name)
	if len(points) != 1 {
		t.Fatalf("%s has the points %v, want one", name, points)
	}
	return points[0]
}

func (o *telemetry) wantPoints(t *testing.T, name string, want ...point) {
	t.Helper()
	slices.SortFunc(want, byText)
	if diff := cmp.Diff(want, o.points(t, name)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func attrsOf(kvs []attribute.KeyValue) attrs {
	m := attrs{}
	for _, kv := range kvs {
		switch kv.Value.Type() {
		case attribute.INT64:
			m[string(kv.Key)] = int(kv.Value.AsInt64())
		case attribute.INT64SLICE:
			var list []int
			for _, n := range kv.Value.AsInt64Slice() {
				list = append(list, int(n))
			}
			m[string(kv.Key)] = list
		default:
			m[string(kv.Key)] = kv.Value.AsInterface()
		}
	}
	return m
}

func wantAttrs(t *testing.T, s sdktrace.ReadOnlySpan, want attrs) {
	t.Helper()
	if diff := cmp.Diff(want, attrsOf(s.Attributes())); diff != "" {
		t.Errorf("attributes of %s (-want +got):\n%s", s.Name(), diff)
	}
}

// with returns base with the given keys changed. A nil value removes its key.
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

// plainForward has the attributes of a pass of one token that sets nothing else.
var plainForward = attrs{
	"fwd.num_tokens": 1, "fwd.num_tokens_unpadded": 1,
	"fwd.graph.mode": "NONE", "fwd.graph.reason": "disabled", "fwd.dummy": false,
}

// twoTokens is a pass of two tokens in two microbatches.
func twoTokens() fwd.Pass {
	return fwd.Pass{NumTokens: 2, UBatches: []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 1}},
		{Requests: fwd.Range{Start: 1, Stop: 2}, Tokens: fwd.Range{Start: 1, Stop: 2}},
	}}
}

// simClock is a clock that stands still until advance.
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

// words is an error with its own error.type.
type words string

func (w words) Error() string { return "an error of words" }

func (w words) ErrorType() string { return string(w) }

// nothing is a forward function without layers.
func nothing(context.Context) error { return nil }

// recovered returns what f panics with.
func recovered(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}

func localGroup(t *testing.T, size int) []fwd.Coordinator {
	t.Helper()
	g, err := fwd.NewLocalGroup(size)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// ofTwo is the configuration of one of two ranks.
func ofTwo(rank int) fwd.Config {
	return fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}}
}

// together calls f for all ranks concurrently and waits for them.
func together(size int, f func(rank int)) {
	var wg sync.WaitGroup
	for rank := range size {
		wg.Go(func() { f(rank) })
	}
	wg.Wait()
}

// dispatcher has a capture size that is no power of two, and adapters.
func dispatcher(t *testing.T, mode fwd.GraphMode) *fwd.Dispatcher {
	t.Helper()
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: mode, CaptureSizes: []int{1, 2, 4, 8, 24}, MaxNumSeqs: 32, LoRA: &fwd.LoRAConfig{MaxLoRAs: 2},
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// vec returns a vector of counts.
func vec(counts ...int) *mat.VecDense {
	v := mat.NewVecDense(len(counts), nil)
	for i, n := range counts {
		v.SetVec(i, float64(n))
	}
	return v
}

// decodePass is a pass with everything that a rank without a group can set.
func decodePass() fwd.Pass {
	maps := []map[string]any{{"": 1}}
	return fwd.Pass{
		NumTokens: 16, NumTokensUnpadded: 13, NumTokensGraph: 16, NumReqs: 13,
		AttnMetadata: maps, SlotMapping: maps, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact,
		Batch: fwd.BatchDescriptor{NumTokens: 16, NumReqs: 16, Uniform: true},
	}
}

// recording returns options for telemetry that is recorded and not read, as allocations and time
// are counted.
func recording() []fwd.Option {
	return []fwd.Option{
		fwd.WithTracerProvider(sdktrace.NewTracerProvider()),
		fwd.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))),
	}
}

// skipUnderRace skips a test that counts allocations. No such test may be parallel.
func skipUnderRace(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
}
