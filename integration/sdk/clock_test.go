// This file tests the times of spans and durations: waiting is not computing, and WithClock gives
// all times.

package sdk_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/forwardctx/fwd"
)

// sleep returns a forward function that takes so long.
func sleep(d time.Duration) fwd.ForwardFunc {
	return func(context.Context) error { time.Sleep(d); return nil }
}

// times returns the start and the end of each span.
func times(spans ...sdktrace.ReadOnlySpan) (at []time.Time) {
	for _, s := range spans {
		at = append(at, s.StartTime(), s.EndTime())
	}
	return at
}

// TestWaitingApart lets rank 1 come 3 s late. Rank 0 waits in fwd.coordinate, and no pass counts
// that time.
func TestWaitingApart(t *testing.T) {
	t.Parallel()
	for _, stepTrace := range []bool{false, true} {
		t.Run(fmt.Sprintf("stepTrace=%t", stepTrace), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o, group, began := newTelemetry(), localGroup(t, 2), time.Now()
				together(2, func(rank int) {
					opts := []fwd.Option{fwd.WithCoordinator(group[rank]), fwd.WithSynchronize(sleep(time.Second))}
					if stepTrace {
						opts = append(opts, fwd.WithStepTrace())
					}
					r := o.runner(t, ofTwo(rank), opts...)
					time.Sleep([]time.Duration{2 * time.Second, 5 * time.Second}[rank])
					if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, sleep(10*time.Second)); err != nil {
						t.Error(err)
					}
				})
				for rank, want := range [][4]int{{2, 5, 5, 16}, {5, 5, 5, 16}} {
					coordinate, forward := o.ofRank(t, "fwd.coordinate", rank), o.ofRank(t, "fwd.forward", rank)
					var got [4]int
					for i, at := range times(coordinate, forward) {
						got[i] = int(at.Sub(began) / time.Second)
					}
					if got != want {
						t.Errorf("rank %d waits and computes %v s after the start, want %v", rank, got, want)
					}
				}
				o.wantPoints(t, "fwd.coordinate.duration",
					point{attrs{"fwd.dp.rank": 0}, 1, 3}, point{attrs{"fwd.dp.rank": 1}, 1, 0})
				// Rank 1, which came last, waited for nobody.
				o.wantPoints(t, "fwd.wait.time",
					point{attrs{"fwd.dp.peer_rank": 1, "fwd.wait.kind": "coordinate"}, 0, 3})
				for rank := range 2 {
					if got := attrsOf(o.ofRank(t, "fwd.coordinate", rank).Attributes())["fwd.dp.last_rank"]; got != 1 {
						t.Errorf("rank %d: fwd.dp.last_rank is %v, want 1", rank, got)
					}
				}
				for _, p := range o.points(t, "fwd.forward.duration") {
					if p.Sum != 11 {
						t.Errorf("fwd.forward.duration %v, want 11 s", p)
					}
				}
			})
		})
	}
}

// TestClock plays a simulator: all times are from its clock, none from the machine's.
func TestClock(t *testing.T) {
	t.Parallel()
	for _, stepTrace := range []bool{false, true} {
		o, group := newTelemetry(), localGroup(t, 2)
		var clocks [2]*simClock
		together(2, func(rank int) {
			clocks[rank] = newSimClock()
			opts := []fwd.Option{
				fwd.WithClock(clocks[rank].Now), fwd.WithCoordinator(advancing{group[rank], clocks[rank]}),
			}
			if stepTrace {
				opts = append(opts, fwd.WithStepTrace())
			}
			r := o.runner(t, ofTwo(rank), opts...)
			err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error {
				clocks[rank].advance(time.Minute)
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
		began := newSimClock().now
		for rank := range 2 {
			c, f := o.ofRank(t, "fwd.coordinate", rank), o.ofRank(t, "fwd.forward", rank)
			got := times(c, f)
			want := []time.Time{began, began.Add(time.Hour), began.Add(time.Hour), began.Add(time.Hour + time.Minute)}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("step trace %t, rank %d: times (-want +got):\n%s", stepTrace, rank, diff)
			}
		}
		o.wantPoints(t, "fwd.coordinate.duration",
			point{attrs{"fwd.dp.rank": 0}, 1, 3600}, point{attrs{"fwd.dp.rank": 1}, 1, 3600})
		passes := o.points(t, "fwd.forward.duration")
		if len(passes) != 2 || passes[0].Sum != 60 || passes[1].Sum != 60 {
			t.Errorf("fwd.forward.duration %v, want 60 s on each rank", passes)
		}
	}
}

// advancing is a Coordinator whose exchanges take an hour of a simulated clock.
type advancing struct {
	fwd.Coordinator
	clock *simClock
}

func (c advancing) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	c.clock.advance(time.Hour)
	return c.Coordinator.Exchange(ctx, v)
}

// A clock that is set back makes nothing negative: no span, no duration, no wait, no record.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	o, clock, recorder := newTelemetry(), newSimClock(), fwd.NewRecorder(4)
	r := o.runner(t, ofTwo(0), fwd.WithClock(clock.Now), fwd.WithObserver(recorder.Observe),
		fwd.WithCoordinator(lone{func() { clock.advance(-time.Hour) }}))
	pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{1, 1}})
	if err != nil {
		t.Fatal(err)
	}
	pass.UBatches = twoTokens().UBatches
	err = r.Run(context.Background(), pass, func(ctx context.Context) error {
		began := clock.Now()
		clock.advance(-time.Hour)
		fwd.Waited(ctx, 1, began)
		return fwd.RunUBatches(ctx, func(context.Context, int) error { clock.advance(-time.Hour); return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range o.spans.Ended() {
		if s.EndTime().Before(s.StartTime()) {
			t.Errorf("%s is from %v to %v", s.Name(), s.StartTime(), s.EndTime())
		}
	}
	if n := len(o.spans.Ended()); n != 4 {
		t.Errorf("%d spans, want an exchange, a pass and two microbatches", n)
	}
	for _, name := range []string{"fwd.forward.duration", "fwd.coordinate.duration"} {
		if got := o.onlyPoint(t, name); got.Count != 1 || got.Sum != 0 {
			t.Errorf("%s %v, want 0 s", name, got)
		}
	}
	o.wantPoints(t, "fwd.wait.time")
	if rec := recorder.Recent()[0]; rec.Wait != 0 || rec.Duration != 0 || rec.Waited != 0 {
		t.Errorf("the record has wait %v, duration %v, waited %v; want 0", rec.Wait, rec.Duration, rec.Waited)
	}
}

// lone is the coordinator of rank 0 of 2, which answers for rank 1 with the same vote.
type lone struct{ exchange func() }

func (lone) Rank() int { return 0 }

func (lone) Size() int { return 2 }

func (c lone) Exchange(_ context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	c.exchange()
	return []fwd.Vote{v, v}, nil
}

// A clock may begin at the zero time. Spans that are given it would take the machine's time.
func TestClockAtTheZeroTime(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), new(simClock)
	r := o.runner(t, ofTwo(0), fwd.WithClock(clock.Now), fwd.WithCoordinator(lone{func() {}}))
	err := r.Run(context.Background(), fwd.Pass{NumTokens: 2}, func(ctx context.Context) error {
		err := r.Report(ctx, fwd.Pass{NumTokens: 1}, time.Time{}, time.Time{}, nil)
		clock.advance(time.Second)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range o.spans.Ended() {
		if s.StartTime().Year() != 1 || s.EndTime().Year() != 1 {
			t.Errorf("%s is from %v to %v, want the clock's times", s.Name(), s.StartTime(), s.EndTime())
		}
	}
	sum := 0.0
	for _, p := range o.points(t, "fwd.forward.duration") {
		sum += p.Sum
	}
	if sum != 1 {
		t.Errorf("the passes take %v s, want 1", sum)
	}
}

// Durations of passes on a shared Queue sum to the time that went by, although each pass begins
// before the one before it has ended. Spans keep their own times.
func TestQueue(t *testing.T) {
	t.Parallel()
	for _, simulated := range []bool{false, true} {
		t.Run(fmt.Sprintf("simulated=%t", simulated), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o, queue := newTelemetry(), new(fwd.Queue)
				now, opts := time.Now, []fwd.Option{fwd.WithQueue(queue)}
				wait := func(d time.Duration) { time.Sleep(d) }
				if simulated {
					clock := newSimClock()
					now, wait, opts = clock.Now, clock.advance, append(opts, fwd.WithClock(clock.Now))
				}
				target := o.runner(t, fwd.Config{Name: "target"}, opts...)
				draft := o.runner(t, fwd.Config{Name: "draft"}, opts...)
				began := now()
				var ends []func(error)
				for k := range 6 { // pass k runs from second 3k to 3k+3, but begins when pass k-1 begins to run
					_, end, err := []*fwd.Runner{target, draft}[k%2].Start(context.Background(), fwd.Pass{NumTokens: 1})
					if err != nil {
						t.Fatal(err)
					}
					if ends = append(ends, end); k > 0 {
						wait(3 * time.Second)
						ends[k-1](nil)
					}
				}
				wait(3 * time.Second)
				ends[5](nil)
				wait(10 * time.Second) // the device is idle
				if err := target.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error {
					wait(2 * time.Second)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				sum, want := 0.0, 18.0+2
				for _, p := range o.points(t, "fwd.forward.duration") {
					sum += p.Sum
				}
				if sum != want {
					t.Errorf("the durations sum to %v s, want %v", sum, want)
				}
				second := o.ended("fwd.forward")[1]
				at := times(second)
				if at[0].Sub(began) != 0 || at[1].Sub(began) != 6*time.Second {
					t.Errorf("the second span is from %v to %v after the start, want from 0s to 6s",
						at[0].Sub(began), at[1].Sub(began))
				}
			})
		})
	}
}
