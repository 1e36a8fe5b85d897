// This file tests how observers, Waited, Report and WithAttributes go with spans and metrics. What
// needs no SDK is tested in the root's record_test.go.

package sdk_test

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// An observer finds the span ended, however the pass or the exchange ended, and its own span in its
// context.
func TestObserverRunsAfterTheSpan(t *testing.T) {
	t.Parallel()
	fails := func(context.Context) error { return fwd.ErrLayer }
	panics := func(context.Context) error { panic("boom") }
	for name, test := range map[string]struct {
		span    string
		forward fwd.ForwardFunc
		ranks   int
		start   bool
	}{
		"success":         {span: "fwd.forward", forward: nothing, ranks: 1},
		"error":           {span: "fwd.forward", forward: fails, ranks: 1},
		"panic":           {span: "fwd.forward", forward: panics, ranks: 1},
		"Start":           {span: "fwd.forward", ranks: 1, start: true},
		"failed exchange": {span: "fwd.coordinate", forward: nothing, ranks: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, calls := newTelemetry(), 0
			observe := func(ctx context.Context, rec *fwd.Record) {
				calls++
				s := o.only(t, test.span)
				if got := trace.SpanFromContext(ctx).SpanContext().SpanID(); got != s.SpanContext().SpanID() {
					t.Errorf("the observer's span is %v, want %v", got, s.SpanContext().SpanID())
				}
				if failed := attrsOf(s.Attributes())["error.type"] != nil; failed != (rec.Err != nil) {
					t.Errorf("the span has failed: %t, the record has error %v", failed, rec.Err)
				}
			}
			cfg := fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: test.ranks}}
			r := o.runner(t, cfg, fwd.WithObserver(observe), fwd.WithCoordinator(localGroup(t, test.ranks)[0]))
			ctx, cancel := context.WithCancel(context.Background())
			if test.ranks > 1 {
				cancel()
			}
			defer cancel()
			recovered(func() {
				if !test.start {
					r.Run(ctx, fwd.Pass{NumTokens: 1}, test.forward)
					return
				}
				_, end, err := r.Start(ctx, fwd.Pass{NumTokens: 1})
				if err != nil {
					t.Fatal(err)
				}
				end(nil)
				end(fwd.ErrLayer)
			})
			if calls != 1 {
				t.Errorf("the observer was called %d times, want once", calls)
			}
		})
	}
}

// An observer's panic passes through and leaves span and metrics as they are.
func TestObserverPanics(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	observe := func(context.Context, *fwd.Record) { panic("observer") }
	r := o.runner(t, fwd.Config{}, fwd.WithObserver(observe))
	got := recovered(func() { r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing) })
	if got != "observer" {
		t.Errorf("Run panics with %v, want the observer's panic", got)
	}
	wantAttrs(t, o.only(t, "fwd.forward"), plainForward)
	if p := o.onlyPoint(t, "fwd.forward.duration"); p.Count != 1 || p.Attrs["error.type"] != nil {
		t.Errorf("fwd.forward.duration %v, want one success", p)
	}
	if s := r.Status(); s.Active != 0 {
		t.Errorf("%d passes are active, want none", s.Active)
	}
}

// Waits inside a pass add up, on the span, in the record and by rank in the metric.
func TestWaited(t *testing.T) {
	t.Parallel()
	o, clock, recorder := newTelemetry(), newSimClock(), fwd.NewRecorder(2)
	r := o.runner(t, fwd.Config{Name: "moe", Parallel: fwd.ParallelConfig{DataParallelSize: 3}},
		fwd.WithClock(clock.Now), fwd.WithObserver(recorder.Observe))
	pass := fwd.Pass{NumTokens: 2, NumTokensAcrossDP: vec(2, 2, 2), UBatches: twoTokens().UBatches}
	err := r.Run(context.Background(), pass, func(ctx context.Context) error {
		began := clock.Now()
		clock.advance(2 * time.Second)
		fwd.Waited(ctx, 1, began)
		fwd.Waited(ctx, 2, began) // at the same time: waits that overlap add up
		fwd.Waited(ctx, 2, clock.Now().Add(time.Hour))
		return fwd.RunUBatches(ctx, func(ctx context.Context, _ int) error {
			ctx, err := fwd.WithMetadata(ctx, fwd.AllLayers(1), nil) // which keeps the pass's telemetry
			if err != nil {
				return err
			}
			fwd.Waited(context.WithValue(ctx, benchKey{}, 0), 1, clock.Now().Add(-time.Microsecond))
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	want := 4*time.Second + 2*time.Microsecond
	if got := recorder.Recent()[0].Waited; got != want {
		t.Errorf("Record.Waited is %v, want %v", got, want)
	}
	if got := attrsOf(o.only(t, "fwd.forward").Attributes())["fwd.wait_time"]; got != want.Seconds() {
		t.Errorf("fwd.wait_time is %v, want %v", got, want.Seconds())
	}
	one := attrs{"fwd.name": "moe", "fwd.wait.kind": "forward", "fwd.dp.peer_rank": 1}
	two := with(one, "fwd.dp.peer_rank", 2)
	points := o.points(t, "fwd.wait.time")
	if len(points) != 2 || !cmp.Equal(points[0].Attrs, one) || !cmp.Equal(points[1].Attrs, two) {
		t.Fatalf("fwd.wait.time has the points %v, want one for rank 1 and one for rank 2", points)
	}
	if d := points[0].Sum - 2.000002; d < -1e-9 || d > 1e-9 || points[1].Sum != 2 {
		t.Errorf("fwd.wait.time %v, want 2.000002 s and 2 s", points)
	}
	fwd.Waited(context.Background(), 1, clock.Now()) // outside a pass: nothing happens
	pass = fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 1, 1)}
	if err := r.Run(context.Background(), pass, nothing); err != nil {
		t.Fatal(err)
	}
	if _, ok := attrsOf(o.ended("fwd.forward")[1].Attributes())["fwd.wait_time"]; ok {
		t.Error("a pass without waits has fwd.wait_time")
	}
}

// The rank that comes last has waited for nobody, and the other for it.
func TestNobodyWaitsForItself(t *testing.T) {
	t.Parallel()
	group, os := localGroup(t, 2), []*telemetry{newTelemetry(), newTelemetry()}
	runners := make([]*fwd.Runner, 2)
	for rank, o := range os {
		runners[rank] = o.runner(t, ofTwo(rank), fwd.WithCoordinator(group[rank]))
	}
	s := fwd.Schedule{NumScheduledTokens: []int{1}}
	wait, err := runners[0].Begin(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := runners[1].Plan(context.Background(), s)
	_, err0 := wait()
	if err := errors.Join(err0, err1); err != nil {
		t.Fatal(err)
	}
	want := attrs{"fwd.wait.kind": "coordinate", "fwd.dp.peer_rank": 1}
	if got := os[0].onlyPoint(t, "fwd.wait.time").Attrs; !cmp.Equal(got, want) {
		t.Errorf("rank 0 has waited with %v, want %v", got, want)
	}
	os[1].wantPoints(t, "fwd.wait.time")
}

// Every span and every attribute set of a Runner has the attributes of WithAttributes.
func TestWithAttributes(t *testing.T) {
	t.Parallel()
	o, group := newTelemetry(), localGroup(t, 2)
	together(2, func(rank int) {
		r := o.runner(t, ofTwo(rank), fwd.WithCoordinator(group[rank]), fwd.WithStepTrace(),
			fwd.WithAttributes(attribute.String("replica", "a")),
			fwd.WithAttributes(attribute.Int("pod", 7), attribute.Int("fwd.num_tokens", 99)))
		pass := twoTokens()
		pass.NumTokensUnpadded, pass.NumTokensAcrossDP = 1, vec(2, 2)
		halves := func(ctx context.Context) error {
			fwd.Waited(ctx, 1-rank, time.Now().Add(-time.Second))
			return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
		}
		err := errors.Join(
			r.Run(context.Background(), fwd.Pass{NumTokens: 2}, nothing), // exchanges
			r.Run(context.Background(), pass, halves),
		)
		if err != nil {
			t.Error(err)
		}
	})
	spans := map[string]int{}
	for _, s := range o.spans.Ended() {
		spans[kindOf(s)]++
		got := attrsOf(s.Attributes())
		if got["replica"] != "a" || got["pod"] != 7 {
			t.Errorf("%s has the attributes %v", s.Name(), got)
		}
		if n := got["fwd.num_tokens"]; kindOf(s) == "fwd.forward" && n != 2 {
			t.Errorf("fwd.num_tokens is %v, want the package's own", n)
		}
	}
	want := map[string]int{"fwd.coordinate": 2, "fwd.forward": 4, "fwd.ubatch": 4, "fwd.wait": 2, "fwd.step": 1}
	if diff := cmp.Diff(want, spans); diff != "" {
		t.Errorf("spans (-want +got):\n%s", diff)
	}
	for _, m := range o.scopes(t)[0].Metrics {
		points := o.points(t, m.Name)
		if len(points) == 0 {
			t.Errorf("%s has no points", m.Name)
		}
		for _, p := range points {
			if p.Attrs["replica"] != "a" || p.Attrs["pod"] != 7 {
				t.Errorf("%s has the attributes %v", m.Name, p.Attrs)
			}
		}
	}
}

// The count of active passes is observed, and nobody observes the Runner once it is garbage.
func TestActivePasses(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	active := func(want ...point) {
		t.Helper()
		o.wantPoints(t, "fwd.forward.active", want...)
	}
	func() {
		r := o.runner(t, fwd.Config{Name: "target"})
		one := o.runner(t, ofTwo(1))
		of, ofOne := attrs{"fwd.name": "target"}, attrs{"fwd.dp.rank": 1}
		active(point{of, 0, 0}, point{ofOne, 0, 0})
		_, endA, errA := r.Start(context.Background(), fwd.Pass{NumTokens: 1})
		_, endB, errB := r.Start(context.Background(), fwd.Pass{NumTokens: 1})
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		active(point{of, 0, 2}, point{ofOne, 0, 0})
		endA(nil)
		err := one.Run(context.Background(), fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 1)},
			func(context.Context) error {
				active(point{of, 0, 1}, point{ofOne, 0, 1})
				return nil
			})
		endB(nil)
		if err != nil {
			t.Error(err)
		}
		active(point{of, 0, 0}, point{ofOne, 0, 0})
		recovered(func() {
			r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error { panic("boom") })
		})
		active(point{of, 0, 0}, point{ofOne, 0, 0})
		runtime.KeepAlive(r)
		runtime.KeepAlive(one)
	}()
	for range 100 {
		runtime.GC()
		if len(o.points(t, "fwd.forward.active")) == 0 {
			return
		}
	}
	t.Error("the active passes of Runners that are garbage are still observed")
}

// Report leaves what Run does: the same attributes on the span and in the metrics, and the same
// times.
func TestReportIsLikeRun(t *testing.T) {
	t.Parallel()
	failed := errors.New("failed")
	link := trace.Link{SpanContext: trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1},
	})}
	for name, err := range map[string]error{"success": nil, "failure": failed} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var spans [2]sdktrace.ReadOnlySpan
			var points [2][][]point
			var records [2]fwd.Record
			for i := range 2 {
				o, clock, recorder := newTelemetry(), newSimClock(), fwd.NewRecorder(4)
				r := o.runner(t, fwd.Config{Name: "target"}, fwd.WithClock(clock.Now), fwd.WithObserver(recorder.Observe),
					fwd.WithDispatcher(dispatcher(t, fwd.GraphFull)))
				pass, planErr := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{5, 1}})
				if planErr != nil {
					t.Fatal(planErr)
				}
				pass.Phase, pass.Links = "verify", []trace.Link{link}
				began := clock.Now()
				if i == 0 {
					r.Run(context.Background(), pass, func(context.Context) error { clock.advance(time.Second); return err })
				} else if e := r.Report(context.Background(), pass, began, began.Add(time.Second), err); e != nil {
					t.Fatal(e)
				}
				spans[i] = o.only(t, "fwd.forward")
				for _, m := range o.scopes(t)[0].Metrics {
					points[i] = append(points[i], o.points(t, m.Name))
				}
				records[i] = recorder.Recent()[0]
			}
			wantAttrs(t, spans[1], attrsOf(spans[0].Attributes()))
			if diff := cmp.Diff(times(spans[0]), times(spans[1])); diff != "" {
				t.Errorf("times (-Run +Report):\n%s", diff)
			}
			if spans[0].Status() != spans[1].Status() || len(spans[1].Links()) != 1 {
				t.Errorf("status %v, links %v, want %v and one", spans[1].Status(), spans[1].Links(), spans[0].Status())
			}
			if diff := cmp.Diff(points[0], points[1]); diff != "" {
				t.Errorf("metrics (-Run +Report):\n%s", diff)
			}
			same := cmp.Comparer(func(a, b error) bool { return a == b })
			if diff := cmp.Diff(records[0], records[1], same); diff != "" {
				t.Errorf("records (-Run +Report):\n%s", diff)
			}
		})
	}
}

// A pass that ended before it began took no time, and a span never ends before it starts.
func TestReportBackwards(t *testing.T) {
	t.Parallel()
	o, began := newTelemetry(), newSimClock().Now()
	r := o.runner(t, fwd.Config{})
	err := r.Report(context.Background(), fwd.Pass{NumTokens: 1}, began, began.Add(-time.Second), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s := o.only(t, "fwd.forward"); !s.StartTime().Equal(began) || s.EndTime().Before(s.StartTime()) {
		t.Errorf("the span is from %v to %v, want no negative duration", s.StartTime(), s.EndTime())
	}
	if got := o.onlyPoint(t, "fwd.forward.duration"); got.Count != 1 || got.Sum != 0 {
		t.Errorf("fwd.forward.duration %v, want 0 s", got)
	}
}

// An idle pass, and one of another Runner, are not reported.
func TestReportOfNothing(t *testing.T) {
	t.Parallel()
	o, now := newTelemetry(), newSimClock().Now()
	r, foreign := o.runner(t, ofTwo(0)), o.runner(t, ofTwo(0))
	all := &fwd.Agreement{Idle: true, NumTokensAcrossDP: vec(1, 1)}
	idle := fwd.Pass{NumTokens: 1, Dummy: true, Agreement: all}
	if err := r.Report(context.Background(), idle, now, now, nil); err != nil {
		t.Errorf("an idle pass: %v", err)
	}
	var alone *fwd.Runner
	planned, err := alone.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{1}})
	if err != nil {
		t.Fatal(err)
	}
	planned.NumTokensAcrossDP = vec(1, 1)
	if err := foreign.Report(context.Background(), planned, now, now, nil); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("a foreign pass: %v, want ErrInvalid", err)
	}
	if n := len(o.spans.Started()); n > 0 {
		t.Errorf("%d spans, want none", n)
	}
	for _, m := range o.scopes(t)[0].Metrics {
		if _, ok := m.Data.(metricdata.Sum[int64]); !ok || m.Name != "fwd.forward.active" {
			t.Errorf("%s was recorded", m.Name)
		}
	}
}

func TestEnabled(t *testing.T) {
	t.Parallel()
	o, ctx := newTelemetry(), context.Background()
	for name, opt := range map[string]fwd.Option{"spans": o.opts[0], "metrics": o.opts[1]} {
		r, err := fwd.New(fwd.Config{}, opt)
		if err != nil {
			t.Fatal(err)
		}
		if !r.Enabled(ctx) {
			t.Errorf("with %s alone a Runner is not enabled", name)
		}
	}
}
