// This file tests the span of a step, fwd.step: its name, its attributes and how long it lasts. Under
// which span those of a step belong is tested in steptrace_test.go.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// one is a schedule of one request of one token.
var one = fwd.Schedule{NumScheduledTokens: []int{1}}

// steppers returns the Runners of a group in one process that has the step trace.
func (o *telemetry) steppers(t *testing.T, size int, opts ...fwd.Option) []*fwd.Runner {
	t.Helper()
	runners := make([]*fwd.Runner, size)
	for rank, c := range localGroup(t, size) {
		own := append([]fwd.Option{fwd.WithCoordinator(c), fwd.WithStepTrace()}, opts...)
		runners[rank] = o.runner(t, fwd.Config{Name: "target"}, own...)
	}
	return runners
}

// planAll lets all ranks plan a step. Rank 0 votes first.
func planAll(t *testing.T, runners []*fwd.Runner, s fwd.Schedule) []fwd.Pass {
	t.Helper()
	passes := make([]fwd.Pass, len(runners))
	var waits []func() (fwd.Pass, error)
	for _, r := range runners {
		wait, err := r.Begin(context.Background(), s)
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, wait)
	}
	for rank, wait := range waits {
		var err error
		if passes[rank], err = wait(); err != nil {
			t.Fatal(err)
		}
	}
	return passes
}

func run(t *testing.T, r *fwd.Runner, p fwd.Pass, forward fwd.ForwardFunc) {
	t.Helper()
	if err := r.Run(context.Background(), p, forward); err != nil {
		t.Error(err)
	}
}

// wantSteps checks how many spans of steps have ended.
func (o *telemetry) wantSteps(t *testing.T, n int) {
	t.Helper()
	if got := len(o.ended("fwd.step")); got != n {
		t.Errorf("%d steps have ended, want %d", got, n)
	}
}

// secondsOf returns the times of a span in seconds since began.
func secondsOf(s sdktrace.ReadOnlySpan, began time.Time) [2]int {
	at := times(s)
	return [2]int{int(at[0].Sub(began) / time.Second), int(at[1].Sub(began) / time.Second)}
}

// ways are the ways to run a pass that takes d, from inside a test's bubble.
var ways = map[string]func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error{
	"Run": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		return r.Run(ctx, p, sleep(d))
	},
	"Call": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		_, err := fwd.Call(ctx, r, p, func(ctx context.Context) (int, error) { return 0, sleep(d)(ctx) })
		return err
	},
	"Start": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		ctx, end, err := r.Start(ctx, p)
		if err == nil {
			err = sleep(d)(ctx)
		}
		end(err)
		return err
	},
	"Report": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		began := time.Now()
		time.Sleep(d)
		return r.Report(ctx, p, began, time.Now(), nil)
	},
	"panic": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		recovered(func() { r.Run(ctx, p, func(ctx context.Context) error { sleep(d)(ctx); panic("boom") }) })
		return nil
	},
	"Goexit": func(ctx context.Context, r *fwd.Runner, p fwd.Pass, d time.Duration) error {
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.Run(ctx, p, func(ctx context.Context) error { sleep(d)(ctx); runtime.Goexit(); return nil })
		}()
		<-done
		return nil
	},
}

// Rank k comes k seconds late and runs for 10 seconds, rank 0 for twice as long, or half: the step lasts
// from rank 0's call to the end of the last pass, however the passes are run and end.
func TestStepLastsAsLongAsItsPasses(t *testing.T) {
	t.Parallel()
	for name, way := range ways {
		for size := 1; size <= 3; size += 2 {
			for _, first := range []time.Duration{5 * time.Second, 20 * time.Second} {
				t.Run(fmt.Sprintf("%s/ranks=%d/%v", name, size, first), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						began, o := time.Now(), newTelemetry()
						runners := o.steppers(t, size)
						together(size, func(rank int) {
							time.Sleep(time.Duration(1+rank) * time.Second)
							takes := 10 * time.Second
							if rank == 0 {
								takes = first
							}
							pass, err := runners[rank].Plan(context.Background(), one)
							if err == nil {
								err = way(context.Background(), runners[rank], pass, takes)
							}
							if err != nil {
								t.Error(err)
							}
						})
						longest := first
						if size > 1 {
							longest = max(first, 10*time.Second)
						}
						want := [2]int{1, size + int(longest/time.Second)}
						if got := secondsOf(o.only(t, "fwd.step"), began); got != want {
							t.Errorf("the step lasts from second %d to %d, want %d to %d", got[0], got[1], want[0], want[1])
						}
						checkInside(t, o)
					})
				})
			}
		}
	}
}

// checkInside checks that all spans of a step end before its root, and begin after it but for the waits
// for rank 0.
func checkInside(t *testing.T, o *telemetry) {
	t.Helper()
	roots := map[trace.SpanID]sdktrace.ReadOnlySpan{}
	for _, s := range o.ended("fwd.step") {
		roots[s.SpanContext().SpanID()] = s
	}
	for _, s := range o.spans.Ended() {
		root, ok := roots[s.Parent().SpanID()]
		if !ok {
			continue
		}
		early := s.StartTime().Before(root.StartTime()) && kindOf(s) != "fwd.coordinate"
		if early || s.EndTime().After(root.EndTime()) {
			t.Errorf("%s is from %v to %v, its step from %v to %v",
				s.Name(), s.StartTime(), s.EndTime(), root.StartTime(), root.EndTime())
		}
	}
}

// A rank that waits for a late rank 0 began before the step, which rank 0 opens.
func TestStepOfALateRank0(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began, o := time.Now(), newTelemetry()
		runners := o.steppers(t, 2)
		together(2, func(rank int) {
			time.Sleep([]time.Duration{5 * time.Second, 0}[rank])
			pass, err := runners[rank].Plan(context.Background(), one)
			if err != nil {
				t.Error(err)
			}
			run(t, runners[rank], pass, sleep(time.Second))
		})
		for name, test := range map[string]struct {
			span sdktrace.ReadOnlySpan
			want [2]int
		}{
			"the step":               {o.only(t, "fwd.step"), [2]int{5, 6}},
			"the exchange of rank 0": {o.ofRank(t, "fwd.coordinate", 0), [2]int{5, 5}},
			"the exchange of rank 1": {o.ofRank(t, "fwd.coordinate", 1), [2]int{0, 5}},
		} {
			if got := secondsOf(test.span, began); got != test.want {
				t.Errorf("%s lasts from second %d to %d, want %v", name, got[0], got[1], test.want)
			}
		}
		root := o.only(t, "fwd.step").SpanContext()
		wantTrace(t, o.ofRank(t, "fwd.coordinate", 1), root)
	})
}

// stepCase is a step and how its span is named.
type stepCase struct {
	size     int
	opts     []fwd.Option
	schedule func(rank int) fwd.Schedule
	name     string
	want     attrs
}

func TestStepSpan(t *testing.T) {
	t.Parallel()
	full := fwd.WithDispatcher(dispatcher(t, fwd.GraphFull))
	piecewise := fwd.WithDispatcher(dispatcher(t, fwd.GraphPiecewise))
	all := func(s fwd.Schedule) func(int) fwd.Schedule { return func(int) fwd.Schedule { return s } }
	alone := attrs{"fwd.name": "target", "fwd.graph.mode": "NONE"}
	ofTwo := with(alone, "fwd.dp.rank", 0, "fwd.dp.size", 2, "fwd.step", 1)
	for name, test := range map[string]stepCase{
		"alone, eager": {1, nil, all(one), "fwd.step NONE", alone},
		"alone, FULL":  {1, []fwd.Option{full}, all(one), "fwd.step FULL", with(alone, "fwd.graph.mode", "FULL")},
		"eager":        {2, nil, all(one), "fwd.step NONE", ofTwo},
		"FULL":         {2, []fwd.Option{full}, all(one), "fwd.step FULL", with(ofTwo, "fwd.graph.mode", "FULL")},
		"PIECEWISE": {
			2, []fwd.Option{piecewise}, all(one), "fwd.step PIECEWISE", with(ofTwo, "fwd.graph.mode", "PIECEWISE"),
		},
		"one rank lowers it": {2, []fwd.Option{full}, func(rank int) fwd.Schedule {
			return fwd.Schedule{NumScheduledTokens: []int{1}, Eager: rank == 1}
		}, "fwd.step NONE", ofTwo},
		"rank 0 is idle": {2, []fwd.Option{full}, func(rank int) fwd.Schedule {
			return fwd.Schedule{NumScheduledTokens: []int{rank}}
		}, "fwd.step FULL", with(ofTwo, "fwd.graph.mode", "FULL")},
		"all are idle": {
			2, []fwd.Option{full}, all(fwd.Schedule{}), "fwd.step IDLE",
			with(ofTwo, "fwd.graph.mode", nil, "fwd.idle_ranks", 2),
		},
		"attributes": {
			2, []fwd.Option{fwd.WithAttributes(attribute.String("replica", "a"))}, all(one), "fwd.step NONE",
			with(ofTwo, "replica", "a"),
		},
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); checkStepSpan(t, test) })
	}
}

func checkStepSpan(t *testing.T, test stepCase) {
	o := newTelemetry()
	runners := o.steppers(t, test.size, test.opts...)
	together(test.size, func(rank int) {
		pass, err := runners[rank].Plan(context.Background(), test.schedule(rank))
		if err != nil {
			t.Error(err)
			return
		}
		run(t, runners[rank], pass, nothing)
	})
	s := o.only(t, "fwd.step")
	wantAttrs(t, s, test.want)
	if s.Name() != test.name || s.SpanKind() != trace.SpanKindInternal {
		t.Errorf("%q is a span of kind %v, want %q of kind internal", s.Name(), s.SpanKind(), test.name)
	}
	if s.Status() != (sdktrace.Status{}) || len(s.Events()) > 0 {
		t.Errorf("status %v, events %v, want none", s.Status(), s.Events())
	}
}

// A step that is idle ends with its exchange, whoever asks for the outcome last, and whether or not the
// pass is run.
func TestStepThatIsIdle(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	runners := o.steppers(t, 2)
	passes := planAll(t, runners, fwd.Schedule{})
	o.wantSteps(t, 1)
	run(t, runners[1], passes[1], nothing)
	planAll(t, runners, fwd.Schedule{})
	o.wantSteps(t, 2)
	if n := len(o.ended("fwd.forward")); n > 0 {
		t.Errorf("%d passes in idle steps, want none", n)
	}
}

// The steps of a warm-up say so. The last exchange runs no pass.
func TestStepsOfWarmUp(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 2} {
		o := newTelemetry()
		runners := o.steppers(t, size, fwd.WithDispatcher(dispatcher(t, fwd.GraphFull)))
		together(size, func(rank int) {
			for pass, err := range runners[rank].WarmUp(context.Background()) {
				if err != nil {
					t.Error(err)
					return
				}
				run(t, runners[rank], pass, nothing)
			}
		})
		var got, want []string
		for _, s := range o.ended("fwd.step") {
			got = append(got, s.Name())
			if phase := attrsOf(s.Attributes())["fwd.phase"]; phase != "warmup" {
				t.Errorf("%d ranks: %s has phase %v, want warmup", size, s.Name(), phase)
			}
		}
		for range len(o.ended("fwd.forward")) / size {
			want = append(want, "fwd.step FULL")
		}
		if size > 1 {
			want = append(want, "fwd.step IDLE")
		}
		if diff := cmp.Diff(want, got); diff != "" || len(want) < 5 {
			t.Errorf("%d ranks: steps (-want +got):\n%s", size, diff)
		}
	}
}

// The root of a step ends with the last pass, in whatever order the ranks end theirs, also by Start's end.
func TestStepEndsWithTheLastPass(t *testing.T) {
	t.Parallel()
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}} {
		o := newTelemetry()
		runners := o.steppers(t, 3)
		var ends []func(error)
		for rank, pass := range planAll(t, runners, one) {
			_, end, err := runners[rank].Start(context.Background(), pass)
			if err != nil {
				t.Fatal(err)
			}
			ends = append(ends, end)
		}
		for i, rank := range order {
			o.wantSteps(t, 0)
			ends[rank](nil)
			ends[rank](nil) // which does nothing
			if i == len(order)-1 {
				o.wantSteps(t, 1)
			}
		}
	}
}

// Passes that are reported in another order than that in which they ended end the step all the same.
func TestStepOfReportsInAnyOrder(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	began := clock.Now()
	runners := o.steppers(t, 3, fwd.WithClock(clock.Now))
	for rank, pass := range planAll(t, runners, one) {
		ended := began.Add([]time.Duration{4, 9, 2}[rank] * time.Second)
		if err := runners[rank].Report(context.Background(), pass, began, ended, nil); err != nil {
			t.Error(err)
		}
	}
	if got := secondsOf(o.only(t, "fwd.step"), began); got != [2]int{0, 9} {
		t.Errorf("the step lasts from second %d to %d, want 0 to 9", got[0], got[1])
	}
}

// Where a rank never runs its pass, the step ends when it begins one of a later step.
func TestStepWithoutAPass(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		size    int
		without []int
	}{
		"alone": {1, []int{0}}, "rank 0": {2, []int{0}}, "rank 1": {2, []int{1}}, "nobody": {2, []int{0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, clock := newTelemetry(), newSimClock()
			began := clock.Now()
			runners := o.steppers(t, test.size, fwd.WithClock(clock.Now))
			for rank, pass := range planAll(t, runners, one) {
				if !slices.Contains(test.without, rank) {
					run(t, runners[rank], pass, nothing)
				}
			}
			clock.advance(5 * time.Second)
			later := planAll(t, runners, one)
			o.wantSteps(t, 0)
			for rank, pass := range later {
				run(t, runners[rank], pass, func(context.Context) error {
					if rank == test.without[len(test.without)-1] {
						o.wantSteps(t, 1)
					}
					return nil
				})
			}
			o.wantSteps(t, 2)
			if got := secondsOf(o.ended("fwd.step")[0], began); got != [2]int{0, 5} {
				t.Errorf("the step lasts from second %d to %d, want 0 to 5", got[0], got[1])
			}
		})
	}
}

// An engine that votes for the next step before it runs the pass of this one has both open.
func TestStepsOneAhead(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	runners := o.steppers(t, 2)
	first, second := planAll(t, runners, one), planAll(t, runners, one)
	run(t, runners[0], first[0], nothing)
	run(t, runners[0], second[0], nothing)
	o.wantSteps(t, 0)
	run(t, runners[1], first[1], nothing)
	o.wantSteps(t, 1)
	run(t, runners[1], second[1], nothing)
	o.wantSteps(t, 2)
	checkInside(t, o)
}

// A rank that runs its passes in another order is done in a step once, so the step waits for the others.
func TestStepOfALatePass(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	runners := o.steppers(t, 3)
	first, second := planAll(t, runners, one), planAll(t, runners, one)
	run(t, runners[1], second[1], nothing)
	run(t, runners[1], first[1], nothing)
	run(t, runners[2], first[2], nothing)
	o.wantSteps(t, 0)
	run(t, runners[0], first[0], nothing)
	o.wantSteps(t, 1)
	run(t, runners[0], second[0], nothing)
	run(t, runners[2], second[2], nothing)
	o.wantSteps(t, 2)
}

// Steps of which nobody runs a pass, or one rank does not, don't stay open for ever.
func TestOpenStepsAreBounded(t *testing.T) {
	t.Parallel()
	const steps, most = 200, 20
	for name, test := range map[string]struct {
		size int
		runs func(rank int) bool
	}{
		"alone":               {1, func(int) bool { return false }},
		"nobody":              {2, func(int) bool { return false }},
		"rank 0 of 2":         {2, func(rank int) bool { return rank == 1 }},
		"rank 1 of 2":         {2, func(rank int) bool { return rank == 0 }},
		"rank 1 begins again": {2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			group := localGroup(t, test.size)
			runners := make([]*fwd.Runner, test.size)
			for i := range steps {
				for rank, c := range group {
					if i == 0 {
						runners[rank] = o.runner(t, fwd.Config{}, fwd.WithCoordinator(c), fwd.WithStepTrace())
					} else if test.runs == nil && rank == 1 { // a Runner that goes on where the last one was
						var err error
						if runners[rank], err = runners[rank].WithGraphs(nil); err != nil {
							t.Fatal(err)
						}
					}
				}
				for rank, pass := range planAll(t, runners, one) {
					if test.runs == nil && rank == 0 || test.runs != nil && test.runs(rank) {
						run(t, runners[rank], pass, nothing)
					}
				}
			}
			if n := len(o.ended("fwd.step")); n < steps-most {
				t.Errorf("%d of %d steps have ended, want all but %d", n, steps, most)
			}
		})
	}
}

// A rank that ends without its pass and is started anew leaves no step open for ever, and the span of such
// a step ends with the last pass.
func TestStepOfARestartedRank(t *testing.T) {
	t.Parallel()
	o, clock, group := newTelemetry(), newSimClock(), localGroup(t, 2)
	opts := []fwd.Option{fwd.WithStepTrace(), fwd.WithClock(clock.Now)}
	began := clock.Now()
	runners := make([]*fwd.Runner, 2)
	for rank, c := range group {
		runners[rank] = o.runner(t, fwd.Config{}, append(opts, fwd.WithCoordinator(c))...)
	}
	step := func() []fwd.Pass { clock.advance(time.Second); return planAll(t, runners, one) }
	for range 2 { // since a restarted Runner's first step would be the one after
		for rank, pass := range step() {
			run(t, runners[rank], pass, nothing)
		}
	}
	run(t, runners[0], step()[0], nothing) // rank 1 dies before its pass
	runners[1] = o.runner(t, fwd.Config{}, append(opts, fwd.WithCoordinator(group[1]))...)
	together(2, func(rank int) {
		if _, err := runners[rank].Plan(context.Background(), one); !errors.Is(err, fwd.ErrLockstep) {
			t.Errorf("rank %d: %v, want ErrLockstep", rank, err)
		}
	})
	for range 20 {
		for rank, pass := range step() {
			run(t, runners[rank], pass, nothing)
		}
	}
	o.wantSteps(t, 2+1+1+20)
	for _, s := range o.ended("fwd.step") {
		if got := secondsOf(s, began); got[0] != got[1] {
			t.Errorf("%s of step %v lasts from second %d to %d, want no time",
				s.Name(), attrsOf(s.Attributes())["fwd.step"], got[0], got[1])
		}
	}
}

// Whatever the ranks do in many steps, no span of a step ends after its root, and every root ends.
func TestNoSpanEndsAfterItsStep(t *testing.T) {
	t.Parallel()
	const size, steps = 4, 60
	o := newTelemetry()
	runners := o.steppers(t, size)
	together(size, func(rank int) {
		for i := range steps {
			s := one
			if i%7 == 0 {
				s = fwd.Schedule{}
			}
			pass, err := runners[rank].Plan(context.Background(), s)
			if err != nil {
				t.Error(err)
				return
			}
			if i%5 == rank && i != steps-1 {
				continue // this rank does not run its pass
			}
			recovered(func() {
				runners[rank].Run(context.Background(), pass, func(ctx context.Context) error {
					fwd.Waited(ctx, 0, time.Now().Add(-time.Millisecond))
					if i%11 == rank {
						panic("boom")
					}
					return nil
				})
			})
		}
	})
	o.wantSteps(t, steps)
	checkInside(t, o)
}

// A pass that is planned inside another one, as a draft model's, belongs to that one.
func TestStepOfADraft(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	target := o.steppers(t, 1)[0]
	draft := o.runner(t, fwd.Config{Name: "draft"}, fwd.WithStepTrace(), fwd.WithStepRoot())
	pass, err := target.Plan(context.Background(), one)
	if err != nil {
		t.Fatal(err)
	}
	run(t, target, pass, func(ctx context.Context) error {
		pass, err := draft.Plan(ctx, one)
		if err != nil {
			return err
		}
		return draft.Run(ctx, pass, nothing)
	})
	step := o.only(t, "fwd.step")
	passes := o.ended("fwd.forward")
	wantTrace(t, passes[1], step.SpanContext())
	wantTrace(t, passes[0], passes[1].SpanContext())
}

// A rank of a dense model, and a pass made by hand, have steps too.
func TestStepsOfOtherPasses(t *testing.T) {
	t.Parallel()
	t.Run("dense", func(t *testing.T) {
		t.Parallel()
		o := newTelemetry()
		cfg := fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 4, DataParallelRank: 3, Dense: true}}
		r := o.runner(t, cfg, fwd.WithStepTrace())
		pass, err := r.Plan(context.Background(), one)
		if err != nil {
			t.Fatal(err)
		}
		run(t, r, pass, nothing)
		step := o.only(t, "fwd.step")
		wantAttrs(t, step, attrs{"fwd.dp.rank": 3, "fwd.dp.size": 4, "fwd.graph.mode": "NONE"})
		wantTrace(t, o.only(t, "fwd.forward"), step.SpanContext())
	})
	t.Run("by hand", func(t *testing.T) {
		t.Parallel()
		o := newTelemetry()
		runners := o.steppers(t, 2)
		together(2, func(rank int) { run(t, runners[rank], fwd.Pass{NumTokens: 1}, nothing) })
		step := o.only(t, "fwd.step")
		for rank := range 2 {
			wantTrace(t, o.ofRank(t, "fwd.forward", rank), step.SpanContext())
		}
	})
	t.Run("by hand, alone", func(t *testing.T) { // nobody plans it, so nobody opens a step
		t.Parallel()
		o := newTelemetry()
		run(t, o.steppers(t, 1)[0], fwd.Pass{NumTokens: 1}, nothing)
		wantTrace(t, o.only(t, "fwd.forward"), trace.SpanContext{})
		o.wantSteps(t, 0)
	})
}

// A rank that is not seen, since nobody records its spans or since its coordinator hides that of the group,
// holds up no step.
func TestStepWithStrangers(t *testing.T) {
	t.Parallel()
	for name, stranger := range map[string]func(o *telemetry, c fwd.Coordinator) (*fwd.Runner, error){
		"without spans": func(o *telemetry, c fwd.Coordinator) (*fwd.Runner, error) {
			return fwd.New(fwd.Config{Name: "target"}, fwd.WithCoordinator(c), fwd.WithStepTrace())
		},
		"with metrics alone": func(o *telemetry, c fwd.Coordinator) (*fwd.Runner, error) {
			return fwd.New(fwd.Config{Name: "target"}, fwd.WithCoordinator(c), fwd.WithStepTrace(), o.opts[1])
		},
		"hidden": func(o *telemetry, c fwd.Coordinator) (*fwd.Runner, error) {
			opts := append(o.opts, fwd.WithCoordinator(struct{ fwd.Coordinator }{c}), fwd.WithStepTrace())
			return fwd.New(fwd.Config{Name: "target"}, opts...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, group := newTelemetry(), localGroup(t, 3)
			runners := make([]*fwd.Runner, 3)
			for rank, c := range group {
				if rank < 2 {
					runners[rank] = o.runner(t, fwd.Config{Name: "target"}, fwd.WithCoordinator(c), fwd.WithStepTrace())
					continue
				}
				var err error
				if runners[rank], err = stranger(o, c); err != nil {
					t.Fatal(err)
				}
			}
			for step := range 2 {
				passes := planAll(t, runners, one)
				run(t, runners[0], passes[0], nothing)
				o.wantSteps(t, step)
				run(t, runners[1], passes[1], nothing)
				o.wantSteps(t, step+1)
				run(t, runners[2], passes[2], nothing)
			}
			planAll(t, runners, fwd.Schedule{})
			o.wantSteps(t, 3)
		})
	}
}

// With a coordinator whose other ranks are elsewhere, the step ends with rank 0's pass.
func TestStepOfRanksElsewhere(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, ofTwo(0), fwd.WithCoordinator(lone{func() {}}), fwd.WithStepTrace())
	pass, err := r.Plan(context.Background(), one)
	if err != nil {
		t.Fatal(err)
	}
	o.wantSteps(t, 0)
	run(t, r, pass, nothing)
	o.wantSteps(t, 1)
}

// The observer of a pass finds the step ended, and its panic leaves nothing open.
func TestStepEndsBeforeObservers(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"Run", "Start", "Report"} {
		o := newTelemetry()
		r := o.steppers(t, 1, fwd.WithObserver(func(context.Context, *fwd.Record) {
			o.wantSteps(t, 1)
			panic("observer")
		}))[0]
		pass, err := r.Plan(context.Background(), one)
		if err != nil {
			t.Fatal(err)
		}
		if got := recovered(func() { ways[way](context.Background(), r, pass, 0) }); got != "observer" {
			t.Errorf("%s panics with %v, want the observer's panic", way, got)
		}
	}
}
