// This file tests how passes and exchanges end: with errors and panics, cancelled, or by the end
// from Start.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

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
		{
			fmt.Errorf("model: %w", &fwd.RankError{Err: fmt.Errorf("%w: %w", fwd.ErrLockstep, context.Canceled)}),
			"lockstep",
		},
		{fmt.Errorf("model: %w", fmt.Errorf("layer: %w", fwd.ErrInvalid)), "invalid"},
		{&fwd.UBatchError{Index: 1, Err: fwd.ErrNoMetadata}, "no_metadata"},
		{words("own_word"), "own_word"},
		{errors.New("plain"), "*errors.errorString"},
		{fmt.Errorf("wrapped: %w", errors.New("plain")), "*errors.errorString"},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			fail := func(context.Context) error { return test.err }
			if err := o.run(t, fwd.Pass{NumTokens: 1}, fail); err != test.err {
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
			if got := o.onlyPoint(t, "fwd.forward.duration"); got.Attrs["error.type"] != test.want || got.Count != 1 {
				t.Errorf("fwd.forward.duration %v, want error.type %s", got, test.want)
			}
		})
	}
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
				r := o.runner(t, ofTwo(rank), opts...)
				ctx, caller := o.tracer.Start(context.Background(), "caller")
				ctx, cancel := context.WithCancel(ctx)
				cancel()
				err := r.Run(ctx, fwd.Pass{NumTokens: 1}, nothing)
				if !errors.Is(err, fwd.ErrRankMissing) {
					t.Fatalf("%v, want ErrRankMissing", err)
				}
				s := o.only(t, "fwd.coordinate")
				wantAttrs(t, s, attrs{
					"fwd.step": 1, "fwd.dp.rank": rank, "fwd.dp.size": 2, "error.type": "rank_missing",
					"fwd.dp.missing_ranks": []int{1 - rank},
				})
				if s.Status().Code != codes.Error || s.Status().Description == "" {
					t.Errorf("status %v, want an error", s.Status())
				}
				if stepTrace && rank == 0 {
					step := o.only(t, "fwd.step")
					wantFailedStep(t, step, "rank_missing")
					wantTrace(t, step, caller.SpanContext())
					wantTrace(t, s, step.SpanContext(), caller.SpanContext())
				} else {
					wantTrace(t, s, caller.SpanContext())
				}
				got := o.onlyPoint(t, "fwd.coordinate.duration") // recorded although the context is cancelled
				want := attrs{"error.type": "rank_missing", "fwd.dp.rank": rank}
				if diff := cmp.Diff(want, got.Attrs); diff != "" || got.Count != 1 {
					t.Errorf("fwd.coordinate.duration has %d values, want 1 (-want +got):\n%s", got.Count, diff)
				}
				if n := len(o.ended("fwd.forward")) + len(o.points(t, "fwd.forward.duration")); n > 0 {
					t.Errorf("a pass that has not started left %d spans and measurements", n)
				}
			})
		}
	}
}

// wantFailedStep checks the span of rank 0 of 2 for a first step whose exchange has failed.
func wantFailedStep(t *testing.T, s sdktrace.ReadOnlySpan, word string) {
	t.Helper()
	wantAttrs(t, s, attrs{"fwd.step": 1, "fwd.dp.rank": 0, "fwd.dp.size": 2, "error.type": word})
	if s.Name() != "fwd.step" || s.Status().Code != codes.Error || s.Status().Description == "" {
		t.Errorf("the step is named %q and has status %v, want fwd.step and an error", s.Name(), s.Status())
	}
}

func wantPanicSpan(t *testing.T, s sdktrace.ReadOnlySpan, message string) {
	t.Helper()
	if s.Status().Code != codes.Error || attrsOf(s.Attributes())["error.type"] != "panic" {
		t.Errorf("%s: status %v, attributes %v, want an error and error.type panic",
			s.Name(), s.Status(), s.Attributes())
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
			o.run(t, fwd.Pass{NumTokens: 1}, throw)
		},
		"forward in middleware": func(t *testing.T, o *telemetry) {
			mw := func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error { return next(ctx) }
			}
			o.run(t, fwd.Pass{NumTokens: 1}, throw, fwd.WithMiddleware(mw))
		},
		"forward, then synchronise": func(t *testing.T, o *telemetry) {
			o.run(t, fwd.Pass{NumTokens: 1}, throw, fwd.WithSynchronize(nothing))
		},
		"synchronise": func(t *testing.T, o *telemetry) {
			o.run(t, fwd.Pass{NumTokens: 1}, nothing, fwd.WithSynchronize(throw))
		},
		"synchronise at the end of Start": func(t *testing.T, o *telemetry) {
			r := o.runner(t, fwd.Config{}, fwd.WithSynchronize(throw))
			_, end, err := r.Start(context.Background(), fwd.Pass{NumTokens: 1})
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
			if got := o.onlyPoint(t, "fwd.forward.duration"); got.Attrs["error.type"] != "panic" {
				t.Errorf("fwd.forward.duration %v, want a panic", got)
			}
		})
	}
}

func TestPanicInUBatch(t *testing.T) {
	t.Parallel()
	value := new(int)
	message := fmt.Sprint(value)
	o := newTelemetry()
	got := recovered(func() {
		o.run(t, twoTokens(), func(ctx context.Context) error {
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
		if attrsOf(s.Attributes())["fwd.ubatch.index"] == 1 {
			wantPanicSpan(t, s, message)
		} else if s.Status().Code != codes.Unset {
			t.Errorf("the other microbatch has status %v", s.Status())
		}
	}
	if n := len(o.ended("fwd.ubatch")); n != 2 {
		t.Errorf("%d microbatch spans have ended, want 2", n)
	}
	forward := o.only(t, "fwd.forward")
	if attrsOf(forward.Attributes())["error.type"] != "panic" || forward.Status().Code != codes.Error {
		t.Errorf("the pass has status %v, attributes %v, want a panic", forward.Status(), forward.Attributes())
	}
}

func TestStartEndsElsewhere(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	synchronised := 0
	synchronise := func(context.Context) error { synchronised++; return nil }
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now), fwd.WithSynchronize(synchronise))
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
	if got := o.onlyPoint(t, "fwd.forward.duration"); got.Count != 1 || got.Sum != 1 {
		t.Errorf("fwd.forward.duration %v, want one of 1 s", got)
	}
	if synchronised != 1 {
		t.Errorf("synchronised %d times, want once", synchronised)
	}
}

func TestCancelledPassIsRecorded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	ctx, cancel := context.WithCancel(context.Background())
	pass := fwd.Pass{NumTokens: 2, NumTokensUnpadded: 1}
	err := o.runner(t, fwd.Config{}).Run(ctx, pass, func(ctx context.Context) error {
		cancel()
		return ctx.Err()
	})
	if err != context.Canceled {
		t.Errorf("%v, want context.Canceled", err)
	}
	o.only(t, "fwd.forward")
	o.onlyPoint(t, "fwd.forward.duration")
	o.onlyPoint(t, "fwd.forward.tokens")
	o.onlyPoint(t, "fwd.padding")
	o.onlyPoint(t, "fwd.graph.events")
}
