// This file tests the times of spans and durations: waiting is not computing, and WithClock gives all times.

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

// TestWaitingApart lets rank 1 come 3 s late. Rank 0 waits in fwd.coordinate, and no pass counts that time.
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
