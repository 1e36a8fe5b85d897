// This file tests the step trace: one trace for all ranks of a step.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// stepRanks runs one step of a group, each rank under a span of its own caller, which must end on
// every rank with this error. It returns the callers.
func stepRanks(
	t *testing.T, os []*telemetry, option func(rank int) bool,
	caller func(ctx context.Context, rank int) context.Context, want error,
) []trace.SpanContext {
	t.Helper()
	group, callers := localGroup(t, len(os)), make([]trace.SpanContext, len(os))
	together(len(os), func(rank int) {
		opts := []fwd.Option{fwd.WithCoordinator(group[rank])}
		if option(rank) {
			opts = append(opts, fwd.WithStepTrace())
		}
		parallel := fwd.ParallelConfig{DataParallelSize: len(os), DataParallelRank: rank}
		r := os[rank].runner(t, fwd.Config{Parallel: parallel}, opts...)
		ctx := caller(context.Background(), rank)
		callers[rank] = trace.SpanContextFromContext(ctx)
		pass, err := r.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{rank + 1}})
		if err == nil {
			err = r.Run(ctx, pass, nothing)
		}
		if !errors.Is(err, want) {
			t.Errorf("rank %d: %v, want %v", rank, err, want)
		}
	})
	return callers
}

func always(int) bool { return true }

// shared returns the telemetry of three ranks that record into the same place.
func shared() (*telemetry, []*telemetry) {
	o := newTelemetry()
	return o, []*telemetry{o, o, o}
}

// started returns callers with spans.
func started(o *telemetry) func(context.Context, int) context.Context {
	return func(ctx context.Context, rank int) context.Context {
		ctx, _ = o.tracer.Start(ctx, fmt.Sprint("caller of ", rank))
		return ctx
	}
}

func wantTrace(t *testing.T, s sdktrace.ReadOnlySpan, parent trace.SpanContext, links ...trace.SpanContext) {
	t.Helper()
	rank := attrsOf(s.Attributes())["fwd.dp.rank"]
	traceID := s.SpanContext().TraceID()
	if s.Parent().SpanID() != parent.SpanID() || parent.IsValid() && traceID != parent.TraceID() {
		t.Errorf("%s of rank %v: trace %v, parent %v, want %v, %v",
			s.Name(), rank, traceID, s.Parent().SpanID(), parent.TraceID(), parent.SpanID())
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
	t.Run("one trace", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, always, started(o), nil)
		root := o.only(t, "fwd.step")
		wantTrace(t, root, callers[0])
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), root.SpanContext(), callers[rank])
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), root.SpanContext(), callers[rank])
		}
	})
	t.Run("no callers", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		stepRanks(t, os, always, func(ctx context.Context, _ int) context.Context { return ctx }, nil)
		root := o.only(t, "fwd.step")
		wantTrace(t, root, trace.SpanContext{})
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), root.SpanContext())
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), root.SpanContext())
		}
	})
}

// The span of a further pass over an agreement's batch stays under its caller's, since that pass has no
// exchange of its own.
func TestStepTraceOfReuse(t *testing.T) {
	t.Parallel()
	o, group, callers := newTelemetry(), localGroup(t, 2), make([]trace.SpanContext, 2)
	together(2, func(rank int) {
		r := o.runner(t, ofTwo(rank), fwd.WithCoordinator(group[rank]), fwd.WithStepTrace())
		ctx := started(o)(context.Background(), rank)
		callers[rank] = trace.SpanContextFromContext(ctx)
		s := fwd.Schedule{NumScheduledTokens: []int{rank + 1}}
		pass, err := r.Plan(ctx, s)
		if err == nil {
			s.Reuse = pass.Agreement
			pass, err = r.Plan(ctx, s)
		}
		if err == nil {
			err = r.Run(ctx, pass, nothing)
		}
		if err != nil {
			t.Errorf("rank %d: %v", rank, err)
		}
	})
	for rank, caller := range callers {
		wantTrace(t, o.ofRank(t, "fwd.forward", rank), caller)
	}
}

// TestStepTraceOption has ranks without the option. Either all have it or none.
func TestStepTraceOption(t *testing.T) {
	t.Parallel()
	t.Run("no rank", func(t *testing.T) {
		t.Parallel()
		o, os := shared()
		callers := stepRanks(t, os, func(int) bool { return false }, started(o), nil)
		for rank := range 3 {
			wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), callers[rank])
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), callers[rank])
		}
	})
	for without := range 3 {
		t.Run(fmt.Sprint("not rank ", without), func(t *testing.T) {
			t.Parallel()
			o, os := shared()
			option := func(rank int) bool { return rank != without }
			callers := stepRanks(t, os, option, started(o), fwd.ErrInvalid)
			for rank := range 3 { // of a step that fails, rank 0's exchange alone is in a step
				if rank == 0 && without > 0 {
					root := o.only(t, "fwd.step")
					wantTrace(t, root, callers[0])
					wantTrace(t, o.ofRank(t, "fwd.coordinate", 0), root.SpanContext(), callers[0])
					continue
				}
				wantTrace(t, o.ofRank(t, "fwd.coordinate", rank), callers[rank])
			}
			if n := len(o.ended("fwd.forward")); n > 0 {
				t.Errorf("%d passes ran, want none", n)
			}
		})
	}
}

// TestStepTraceSampling checks that rank 0 alone decides whether a step is sampled.
func TestStepTraceSampling(t *testing.T) {
	t.Parallel()
	t.Run("rank 0 not sampled", func(t *testing.T) {
		t.Parallel()
		o := newTelemetry()
		never := newTelemetry(sdktrace.WithSampler(sdktrace.NeverSample()))
		stepRanks(t, []*telemetry{never, o, o}, always, func(ctx context.Context, rank int) context.Context {
			if rank > 0 { // sampled callers, which do not decide
				ctx, _ = o.tracer.Start(ctx, "caller")
			}
			return ctx
		}, nil)
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
			return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
				TraceID: trace.TraceID{byte(rank)}, SpanID: trace.SpanID{byte(rank)},
			}))
		}, nil)
		c, f := len(o.ended("fwd.coordinate")), len(o.ended("fwd.forward"))
		if s := len(o.ended("fwd.step")); c != 3 || f != 3 || s != 1 {
			t.Errorf("%d exchanges, %d passes and %d steps were recorded, want 3, 3 and 1", c, f, s)
		}
	})
}

func TestStepTraceWithoutRoot(t *testing.T) {
	t.Parallel()
	group, o := localGroup(t, 2), newTelemetry()
	r := o.runner(t, ofTwo(1), fwd.WithStepTrace(), fwd.WithCoordinator(group[1]))
	half := trace.SpanContext{}.WithSpanID(trace.SpanID{1}) // without a trace ID
	ctx, caller := o.tracer.Start(context.Background(), "caller")
	together(2, func(rank int) {
		var err error
		if rank == 0 {
			vote := fwd.Vote{Step: 1, NumTokens: 1, NumTokensPadded: 1, SpanContext: half}
			_, err = group[0].Exchange(context.Background(), vote)
		} else {
			err = r.Run(ctx, fwd.Pass{NumTokens: 1}, nothing)
		}
		if err != nil {
			t.Error(err)
		}
	})
	wantTrace(t, o.only(t, "fwd.coordinate"), caller.SpanContext())
	wantTrace(t, o.only(t, "fwd.forward"), caller.SpanContext())
}
