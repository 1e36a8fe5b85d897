// Which spans SkipIdle passes on.

package fwdtrace_test

import (
	"context"
	"errors"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtrace"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// TestSkipIdle: of a warm-up and four steps, the one in which both ranks were idle is missing.
func TestSkipIdle(t *testing.T) {
	t.Parallel()
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(recorder)))
	g := newGroup(t, provider)
	busy, idle := make([]trace.Link, 3), []trace.Link(nil)
	g.warmUp()
	warmUp := count(recorder.Ended())
	if warmUp["fwd.step IDLE"] != 1 || warmUp["fwd.coordinate"] < 4 || warmUp["fwd.forward model FULL"] < 2 {
		t.Errorf("spans of the warm-up: %v", warmUp)
	}
	recorder.Reset()
	g.take(idle, idle)
	g.take(busy, idle)
	g.take(idle, busy)
	g.take(busy, busy)
	got := count(recorder.Ended())
	want := map[string]int{"fwd.step FULL": 3, "fwd.coordinate": 6, "fwd.forward model FULL": 6}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for _, s := range recorder.Started() {
		if s.Name() == "fwd.step IDLE" {
			return
		}
	}
	t.Error("there was no step in which both ranks were idle")
}

// TestSkipIdleFailed: an exchange in which a rank is missing is passed on, though nobody ran.
func TestSkipIdleFailed(t *testing.T) {
	t.Parallel()
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(recorder)))
	g := newGroup(t, provider)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.ranks[0].Plan(ctx, fwd.Schedule{}); !errors.Is(err, fwd.ErrRankMissing) {
		t.Errorf("%v, want ErrRankMissing", err)
	}
	want := map[string]int{"fwd.step": 1, "fwd.coordinate": 1}
	if diff := cmp.Diff(want, count(recorder.Ended())); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestSkipIdleAttributes: only what fwd itself says counts, and never of a failure.
func TestSkipIdleAttributes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		scope      string
		idle, size int
		status     codes.Code
		passed     bool
	}{
		"all idle":             {fwd.ScopeName, 4, 4, codes.Unset, false},
		"some idle":            {fwd.ScopeName, 3, 4, codes.Unset, true},
		"neither":              {fwd.ScopeName, 0, 0, codes.Unset, true},
		"all idle, and failed": {fwd.ScopeName, 4, 4, codes.Error, true},
		"of another scope":     {"other", 4, 4, codes.Unset, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			recorder := tracetest.NewSpanRecorder()
			provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(recorder)))
			_, span := provider.Tracer(c.scope).Start(t.Context(), "span")
			if c.size > 0 {
				span.SetAttributes(attribute.Int("fwd.idle_ranks", c.idle), attribute.Int("fwd.dp.size", c.size))
			}
			span.SetStatus(c.status, "")
			span.End()
			if passed := len(recorder.Ended()) == 1; passed != c.passed {
				t.Errorf("passed on: %t, want %t", passed, c.passed)
			}
		})
	}
}

// TestSkipIdleForwards: the rest of the interface is next's.
func TestSkipIdleForwards(t *testing.T) {
	t.Parallel()
	next := &ended{err: errors.New("next's")}
	p := fwdtrace.SkipIdle(next)
	if err := p.ForceFlush(t.Context()); err != next.err {
		t.Errorf("ForceFlush: %v", err)
	}
	if err := p.Shutdown(t.Context()); err != next.err {
		t.Errorf("Shutdown: %v", err)
	}
}

// ended is a span processor whose calls that end something fail.
type ended struct {
	sdktrace.SpanProcessor
	err error
}

func (e *ended) Shutdown(context.Context) error   { return e.err }
func (e *ended) ForceFlush(context.Context) error { return e.err }
