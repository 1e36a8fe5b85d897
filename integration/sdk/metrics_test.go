// This file tests the metrics: their definitions, values, buckets, events and exemplars.

package sdk_test

import (
	"context"
	"errors"
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

func TestMetricDefinitions(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{Name: "m", Parallel: fwd.ParallelConfig{DataParallelSize: 1}})
	pass := fwd.Pass{NumTokens: 4, NumTokensUnpadded: 1, NumTokensGraph: 2}
	waits := func(ctx context.Context) error {
		fwd.Waited(ctx, 0, time.Now().Add(-time.Second))
		return nil
	}
	if err := r.Run(context.Background(), pass, waits); err != nil {
		t.Fatal(err)
	}
	two := o.runner(t, ofTwo(0), fwd.WithCoordinator(localGroup(t, 2)[0]))
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	two.Run(cancelled, fwd.Pass{NumTokens: 1}, nothing) // for fwd.coordinate.duration
	type definition struct {
		Kind, Unit string
		Monotonic  bool
		Bounds     []float64
	}
	seconds, tokens := make([]float64, 24), make([]float64, 21)
	for k := range seconds {
		seconds[k] = 0.00001 * math.Pow(2, float64(k)) // to 84 s
	}
	for k := range tokens {
		tokens[k] = math.Pow(2, float64(k)) // to 1,048,576
	}
	want := map[string]definition{
		"fwd.forward.duration":    {"metricdata.Histogram[float64]", "s", false, seconds},
		"fwd.forward.tokens":      {"metricdata.Histogram[int64]", "{token}", false, tokens},
		"fwd.padding":             {"metricdata.Sum[int64]", "{token}", true, nil},
		"fwd.coordinate.duration": {"metricdata.Histogram[float64]", "s", false, seconds},
		"fwd.graph.events":        {"metricdata.Sum[int64]", "{event}", true, nil},
		"fwd.forward.active":      {"metricdata.Sum[int64]", "{pass}", false, nil},
		"fwd.wait.time":           {"metricdata.Sum[float64]", "s", true, nil},
	}
	got := map[string]definition{}
	scopes := o.scopes(t)
	if len(scopes) != 1 || scopes[0].Scope.Name != scopeName || scopes[0].Scope.Version != scopeVersion {
		t.Fatalf("scopes %v, want one, with name and version", scopes)
	}
	for _, m := range scopes[0].Metrics {
		d := definition{Kind: reflect.TypeOf(m.Data).String(), Unit: m.Unit}
		switch data := m.Data.(type) {
		case metricdata.Histogram[float64]:
			d.Bounds = data.DataPoints[0].Bounds
		case metricdata.Histogram[int64]:
			d.Bounds = data.DataPoints[0].Bounds
		case metricdata.Sum[int64]:
			d.Monotonic = data.IsMonotonic
		case metricdata.Sum[float64]:
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

// TestMetricValues runs a few passes on a clock that makes each of them take an exact time.
func TestMetricValues(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{Name: "target"}, fwd.WithClock(clock.Now))
	anonymous := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	run := func(r *fwd.Runner, d time.Duration, p fwd.Pass, want error) {
		t.Helper()
		forward := func(context.Context) error { clock.advance(d); return want }
		if err := r.Run(context.Background(), p, forward); err != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	run(r, 250*time.Millisecond, fwd.Pass{NumTokens: 5, NumTokensUnpadded: 3}, nil)
	run(r, 500*time.Millisecond, fwd.Pass{NumTokens: 7}, nil) // the same bucket
	run(r, time.Second, fwd.Pass{
		NumTokens: 8, NumTokensUnpadded: 2, NumTokensGraph: 4,
		GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, Dummy: true,
	}, nil)
	run(r, 2*time.Second, fwd.Pass{NumTokens: 1}, fwd.ErrLayer)
	run(anonymous, 4*time.Second, fwd.Pass{NumTokens: 1}, nil)
	run(r, 8*time.Second, fwd.Pass{NumTokens: 8, Phase: "prefill"}, nil)
	eager := attrs{
		"fwd.name": "target", "fwd.graph.mode": "NONE", "fwd.graph.reason": "disabled",
		"fwd.batch.bucket": 8, "fwd.dummy": false,
	}
	want := []point{
		{eager, 2, 0.75},
		{with(eager, "fwd.graph.mode", "FULL", "fwd.graph.reason", "exact", "fwd.dummy", true), 1, 1},
		{with(eager, "fwd.batch.bucket", 1, "error.type", "layer"), 1, 2},
		{with(eager, "fwd.batch.bucket", 1, "fwd.name", nil), 1, 4},
		{with(eager, "fwd.phase", "prefill"), 1, 8},
	}
	o.wantPoints(t, "fwd.forward.duration", want...)
	tokens := attrs{"fwd.name": "target", "fwd.graph.mode": "NONE", "fwd.dummy": false}
	o.wantPoints(t, "fwd.forward.tokens",
		point{tokens, 4, 3 + 7 + 1 + 8},
		point{with(tokens, "fwd.name", nil), 1, 1},
		point{with(tokens, "fwd.graph.mode", "FULL", "fwd.dummy", true), 1, 2})
	padding := attrs{"fwd.name": "target", "fwd.padding.kind": "graph", "fwd.dummy": false}
	o.wantPoints(t, "fwd.padding",
		point{padding, 0, 2},
		point{with(padding, "fwd.dummy", true), 0, 2},
		point{with(padding, "fwd.dummy", true, "fwd.padding.kind", "dp"), 0, 4})
	o.wantPoints(t, "fwd.graph.events",
		point{attrs{"fwd.name": "target", "fwd.graph.event": "eager"}, 0, 4},
		point{attrs{"fwd.graph.event": "eager"}, 0, 1})
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
		want int
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
			r := o.runner(t, fwd.Config{}, fwd.WithDispatcher(dispatcher(t, fwd.GraphPiecewise)))
			if err := r.Run(context.Background(), test.pass(t, r), nothing); err != nil {
				t.Fatal(err)
			}
			if got := o.onlyPoint(t, "fwd.forward.duration"); got.Attrs["fwd.batch.bucket"] != test.want {
				t.Errorf("%v, want bucket %d", got, test.want)
			}
		})
	}
}

func TestGraphEvents(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{})
	refuse := errors.New("no capture")
	var captureErr error
	capture := func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return nothing, captureErr }
	cache, err := fwd.NewGraphCache(fwd.GraphFull, nothing, capture)
	if err != nil {
		t.Fatal(err)
	}
	run := func(mode fwd.GraphMode, tokens int, want error) {
		t.Helper()
		pass := fwd.Pass{NumTokens: tokens, GraphMode: mode}
		if err := r.Run(context.Background(), pass, cache.Forward); !errors.Is(err, want) {
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
	// Neither of these passes has a Runner with telemetry.
	cache.Forward(fwd.NewContext(context.Background(), &fwd.ForwardContext{
		NumTokens: 4, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 4},
	}))
	var none *fwd.Runner
	none.Run(context.Background(), fwd.Pass{NumTokens: 4, GraphMode: fwd.GraphFull}, cache.Forward)
	o.wantPoints(t, "fwd.graph.events",
		point{attrs{"fwd.graph.event": "capture"}, 0, 2},
		point{attrs{"fwd.graph.event": "eager"}, 0, 1},
		point{attrs{"fwd.graph.event": "replay"}, 0, 3})
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
