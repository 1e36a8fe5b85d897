// This file tests the step trace: one trace for all ranks of a step.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

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

// WithStepRoot makes each step a trace of its own, with a link to the caller's span, although all steps run
// under one long span. Without it all are in the caller's trace.
func TestStepRoot(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 3} {
		for _, own := range []bool{false, true} {
			t.Run(fmt.Sprintf("ranks=%d/own=%t", size, own), func(t *testing.T) {
				t.Parallel()
				o := newTelemetry()
				var opts []fwd.Option
				if own {
					opts = append(opts, fwd.WithStepRoot())
				}
				runners, callers := o.steppers(t, size, opts...), make([]trace.SpanContext, size)
				together(size, func(rank int) {
					ctx := started(o)(context.Background(), rank)
					callers[rank] = trace.SpanContextFromContext(ctx)
					for range 2 {
						pass, err := runners[rank].Plan(ctx, one)
						if err == nil {
							err = runners[rank].Run(ctx, pass, nothing)
						}
						if err != nil {
							t.Error(err)
						}
					}
				})
				traces := map[trace.TraceID]bool{callers[0].TraceID(): true}
				for _, root := range o.ended("fwd.step") {
					traces[root.SpanContext().TraceID()] = true
					if own {
						wantTrace(t, root, trace.SpanContext{}, callers[0])
					} else {
						wantTrace(t, root, callers[0])
					}
					checkChildren(t, o, root, callers)
				}
				want := 1 // the caller's
				if own {
					want += 2
				}
				if len(traces) != want || len(o.ended("fwd.step")) != 2 {
					t.Errorf("%d steps in %d traces, want 2 in %d", len(o.ended("fwd.step")), len(traces), want)
				}
			})
		}
	}
}

// checkChildren checks the spans of a step: each rank has an exchange and a pass under its root, with links
// to the rank's caller. A rank that is alone has no exchange.
func checkChildren(t *testing.T, o *telemetry, root sdktrace.ReadOnlySpan, callers []trace.SpanContext) {
	t.Helper()
	kinds := map[string]int{}
	for _, s := range o.spans.Ended() {
		if s.Parent().SpanID() != root.SpanContext().SpanID() {
			continue
		}
		kinds[kindOf(s)]++
		if client := s.SpanKind() == trace.SpanKindClient; client != (kindOf(s) == "fwd.coordinate") {
			t.Errorf("%s is a span of kind %v", s.Name(), s.SpanKind())
		}
		rank, _ := attrsOf(s.Attributes())["fwd.dp.rank"].(int)
		wantTrace(t, s, root.SpanContext(), callers[rank])
	}
	want := map[string]int{"fwd.forward": len(callers), "fwd.coordinate": len(callers)}
	if len(callers) == 1 {
		delete(want, "fwd.coordinate")
	}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("children of a step (-want +got):\n%s", diff)
	}
}

// A failed step with a trace of its own has rank 0's exchange in it.
func TestStepRootOfAFailedStep(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	runners := o.steppers(t, 2, fwd.WithStepRoot())
	ctx := started(o)(context.Background(), 0)
	caller := trace.SpanContextFromContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := runners[0].Plan(ctx, one); !errors.Is(err, fwd.ErrRankMissing) {
		t.Errorf("%v, want ErrRankMissing", err)
	}
	root := o.only(t, "fwd.step")
	wantTrace(t, root, trace.SpanContext{}, caller)
	wantTrace(t, o.only(t, "fwd.coordinate"), root.SpanContext(), caller)
}

// WithStepRoot does nothing without the step trace.
func TestStepRootWithoutStepTrace(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{}, fwd.WithStepRoot())
	ctx := started(o)(context.Background(), 0)
	pass, err := r.Plan(ctx, one)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(ctx, pass, nothing); err != nil {
		t.Fatal(err)
	}
	o.wantSteps(t, 0)
	wantTrace(t, o.only(t, "fwd.forward"), trace.SpanContextFromContext(ctx))
}

// The passes of a draft model over the batch of an agreement are children of their own rank's pass if they
// are run inside it.
func TestStepTraceOfReuseInAPass(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	runners, drafts := o.steppers(t, 2), make([]*fwd.Runner, 2)
	for rank := range drafts {
		cfg := ofTwo(rank)
		cfg.Name = "draft"
		drafts[rank] = o.runner(t, cfg, fwd.WithStepTrace())
	}
	for rank, pass := range planAll(t, runners, one) {
		run(t, runners[rank], pass, func(ctx context.Context) error {
			s := one
			s.Reuse = pass.Agreement
			again, err := drafts[rank].Plan(ctx, s)
			if err != nil {
				return err
			}
			return drafts[rank].Run(ctx, again, nothing)
		})
	}
	root, passes := o.only(t, "fwd.step"), map[string]sdktrace.ReadOnlySpan{}
	for _, s := range o.ended("fwd.forward") {
		passes[fmt.Sprint(s.Name(), attrsOf(s.Attributes())["fwd.dp.rank"])] = s
	}
	for rank := range 2 {
		target := passes[fmt.Sprint("fwd.forward target NONE", rank)]
		wantTrace(t, target, root.SpanContext())
		wantTrace(t, passes[fmt.Sprint("fwd.forward draft NONE", rank)], target.SpanContext())
	}
}

// An exchange that fails between passes, while nobody waits for it, has a span that ends when it failed and
// not when somebody asks. So has its step.
func TestStepThatFailsBetweenPasses(t *testing.T) {
	t.Parallel()
	for rank := range 2 {
		t.Run(fmt.Sprint("rank ", rank), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began, o := time.Now(), newTelemetry()
				r := o.steppers(t, 2, fwd.WithExchangeTimeout(3*time.Second))[rank]
				if _, err := r.Begin(context.Background(), one); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Second)
				if _, err := r.Plan(context.Background(), one); !errors.Is(err, fwd.ErrRankMissing) {
					t.Fatalf("%v, want ErrRankMissing", err)
				}
				for i, want := range [][2]int{{0, 3}, {10, 13}} {
					s := o.ended("fwd.coordinate")[i]
					if got := secondsOf(s, began); got != want {
						t.Errorf("exchange %d lasts from second %d to %d, want %v", i, got[0], got[1], want)
					}
					got := attrsOf(s.Attributes())["fwd.dp.missing_ranks"]
					if !cmp.Equal(got, any([]int{1 - rank})) {
						t.Errorf("exchange %d lacks the ranks %v, want rank %d", i, got, 1-rank)
					}
					if rank > 0 {
						continue
					}
					if got := secondsOf(o.ended("fwd.step")[i], began); got != want {
						t.Errorf("step %d lasts from second %d to %d, want %v", i, got[0], got[1], want)
					}
				}
			})
		})
	}
}
