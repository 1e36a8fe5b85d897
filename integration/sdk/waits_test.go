// This file tests who is waited for: the spans of waits inside passes, fwd.wait, and peer.service on them
// and on exchanges. The sums of waits are tested in observe_test.go.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

func TestWaitSpan(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{},
		fwd.WithClock(clock.Now), fwd.WithAttributes(attribute.String("replica", "a")))
	began := clock.Now()
	run(t, r, fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		clock.advance(2 * time.Second)
		fwd.Waited(ctx, 7, began.Add(time.Second))
		return nil
	})
	s, pass := o.only(t, "fwd.wait"), o.only(t, "fwd.forward")
	wantAttrs(t, s, attrs{"peer.service": "rank 7", "fwd.dp.peer_rank": 7, "replica": "a"})
	if s.Name() != "fwd.wait" || s.SpanKind() != trace.SpanKindClient {
		t.Errorf("%q is a span of kind %v, want fwd.wait of kind client", s.Name(), s.SpanKind())
	}
	if got := secondsOf(s, began); got != [2]int{1, 2} {
		t.Errorf("the wait lasts from second %d to %d, want 1 to 2", got[0], got[1])
	}
	wantTrace(t, s, pass.SpanContext())
	if s.Status() != (sdktrace.Status{}) {
		t.Errorf("status %v, want none", s.Status())
	}
}

// Waits below 100 µs, and those beyond the first 256 of a pass, have no span, and all of them count.
func TestWaitSpansAreBounded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		wait        time.Duration
		waits, want int
	}{
		{0, 3, 0}, {100*time.Microsecond - 1, 3, 0}, {100 * time.Microsecond, 3, 3}, {time.Second, 256, 256},
		{time.Second, 257, 256}, {time.Second, 1000, 256}, {-time.Second, 3, 0},
	} {
		t.Run(fmt.Sprint(test.wait, "*", test.waits), func(t *testing.T) {
			t.Parallel()
			o, clock, recorder := newTelemetry(), newSimClock(), fwd.NewRecorder(2)
			r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now), fwd.WithObserver(recorder.Observe))
			for range 2 { // the bound is of a pass
				run(t, r, fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
					clock.advance(time.Hour)
					for range test.waits {
						fwd.Waited(ctx, 1, clock.Now().Add(-test.wait))
					}
					return nil
				})
			}
			if got := len(o.ended("fwd.wait")); got != 2*test.want {
				t.Errorf("%d spans of two passes with %d waits each, want %d of each", got, test.waits, test.want)
			}
			total := max(test.wait, 0) * time.Duration(test.waits)
			if got := recorder.Recent()[0].Waited; got != total {
				t.Errorf("Record.Waited is %v, want %v", got, total)
			}
			if total == 0 {
				o.wantPoints(t, "fwd.wait.time")
				return
			}
			got := o.onlyPoint(t, "fwd.wait.time").Sum
			if want := 2 * total.Seconds(); got < want*0.999 || got > want*1.001 {
				t.Errorf("fwd.wait.time is %v s, want %v", got, want)
			}
			attr := attrsOf(o.ended("fwd.forward")[0].Attributes())["fwd.wait_time"]
			if attr != total.Seconds() {
				t.Errorf("fwd.wait_time is %v, want %v", attr, total.Seconds())
			}
		})
	}
}

// Many goroutines that wait leave no more spans than one.
func TestWaitSpansOfManyGoroutines(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	run(t, r, fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for range 100 {
					fwd.Waited(ctx, i, clock.Now().Add(-time.Second))
				}
			})
		}
		wg.Wait()
		return nil
	})
	if n := len(o.ended("fwd.wait")); n != 256 {
		t.Errorf("%d spans of waits, want 256", n)
	}
}

// A wait is a child of what waited: the pass, its microbatch, or a nested pass.
func TestWaitSpanParents(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{Name: "target"}, fwd.WithClock(clock.Now))
	draft := o.runner(t, fwd.Config{Name: "draft"}, fwd.WithClock(clock.Now))
	waited := func(ctx context.Context, rank int) error {
		ctx, err := fwd.WithMetadata(ctx, fwd.AllLayers(rank), nil) // which keeps the span
		fwd.Waited(ctx, rank, clock.Now().Add(-time.Second))
		return err
	}
	run(t, r, twoTokens(), func(ctx context.Context) error {
		fwd.Waited(ctx, 2, clock.Now().Add(-time.Second))
		return errors.Join(
			fwd.RunUBatches(ctx, waited),
			draft.Run(ctx, fwd.Pass{NumTokens: 1}, func(ctx context.Context) error { return waited(ctx, 3) }),
		)
	})
	parents := map[trace.SpanID]string{}
	for _, s := range o.spans.Ended() {
		parents[s.SpanContext().SpanID()] = s.Name()
	}
	got := map[any]string{}
	for _, s := range o.ended("fwd.wait") {
		got[attrsOf(s.Attributes())["peer.service"]] = parents[s.Parent().SpanID()]
	}
	want := map[any]string{
		"rank 0": "fwd.ubatch 0", "rank 1": "fwd.ubatch 1",
		"rank 2": "fwd.forward target NONE", "rank 3": "fwd.forward draft NONE",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parents of waits, by peer (-want +got):\n%s", diff)
	}
}

// Outside a pass, after it, and in one that is not sampled, a wait has no span.
func TestNoWaitSpan(t *testing.T) {
	t.Parallel()
	ago := time.Now().Add(-time.Second)
	o, never := newTelemetry(), newTelemetry(sdktrace.WithSampler(sdktrace.NeverSample()))
	var after context.Context
	run(t, o.runner(t, fwd.Config{}), fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		after = ctx
		return nil
	})
	fwd.Waited(after, 1, ago)
	fwd.Waited(context.Background(), 1, ago)
	run(t, never.runner(t, fwd.Config{}), fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		fwd.Waited(ctx, 1, ago)
		return nil
	})
	if n := len(o.ended("fwd.wait")) + len(never.spans.Started()); n > 0 {
		t.Errorf("%d spans of waits, want none", n)
	}
	if got := never.onlyPoint(t, "fwd.wait.time").Sum; got < 1 {
		t.Errorf("fwd.wait.time is %v s, want more than 1: what is not sampled counts", got)
	}
}

// Exchanges name the rank whose vote came last, unless that is the rank itself, or nobody knows it.
func TestPeerOfExchange(t *testing.T) {
	t.Parallel()
	service := fwd.WithPeerName(func(rank int) string { return fmt.Sprint("engine-", rank) })
	for name, test := range map[string]struct {
		opts []fwd.Option
		peer string
	}{
		"default":      {nil, "rank 1"},
		"WithPeerName": {[]fwd.Option{service}, "engine-1"},
		"nil":          {[]fwd.Option{fwd.WithPeerName(nil)}, "rank 1"},
		"step trace":   {[]fwd.Option{service, fwd.WithStepTrace()}, "engine-1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, group := newTelemetry(), localGroup(t, 2)
			var runners []*fwd.Runner
			for rank, c := range group {
				opts := append([]fwd.Option{fwd.WithCoordinator(c)}, test.opts...)
				runners = append(runners, o.runner(t, ofTwo(rank), opts...))
			}
			for rank, pass := range planAll(t, runners, one) { // rank 1 votes last
				run(t, runners[rank], pass, func(ctx context.Context) error {
					fwd.Waited(ctx, 1, time.Now().Add(-time.Second))
					return nil
				})
			}
			for rank, peer := range []any{test.peer, nil} {
				got := attrsOf(o.ofRank(t, "fwd.coordinate", rank).Attributes())
				if got["peer.service"] != peer || got["fwd.dp.last_rank"] != 1 {
					t.Errorf("rank %d waited for %v, rank %v came last; want %v and 1",
						rank, got["peer.service"], got["fwd.dp.last_rank"], peer)
				}
			}
			if got := attrsOf(o.ended("fwd.wait")[0].Attributes())["peer.service"]; got != test.peer {
				t.Errorf("the wait is for %v, want %s", got, test.peer)
			}
		})
	}
}

// naming is a coordinator of rank 0 of 2 that names a rank as the last, whatever its exchange returns.
type naming struct {
	lone
	last int
	err  error
}

func (c naming) Last() int { return c.last }

func (c naming) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if c.err != nil {
		return nil, c.err
	}
	return c.lone.Exchange(ctx, v)
}

// If nobody knows who came last, or nobody can have, an exchange has no peer.
func TestNoPeerOfExchange(t *testing.T) {
	t.Parallel()
	alone := lone{func() {}}
	known := attrs{"fwd.step": 1, "fwd.dp.rank": 0, "fwd.dp.size": 2, "fwd.dp.max_tokens_rank": 0}
	other := with(known, "fwd.dp.last_rank", 1, "peer.service", "rank 1")
	failed := with(known, "fwd.dp.max_tokens_rank", nil, "error.type", "lockstep")
	for name, test := range map[string]struct {
		coordinator fwd.Coordinator
		want        attrs
	}{
		"the other rank":         {naming{alone, 1, nil}, other},
		"itself":                 {naming{alone, 0, nil}, with(known, "fwd.dp.last_rank", 0)},
		"unknown":                {alone, known},
		"none":                   {naming{alone, -1, nil}, known},
		"below none":             {naming{alone, -2, nil}, known},
		"no such rank":           {naming{alone, 2, nil}, known},
		"that of an earlier one": {naming{alone, 1, fwd.ErrLockstep}, failed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			r := o.runner(t, ofTwo(0), fwd.WithCoordinator(test.coordinator))
			if _, err := r.Plan(context.Background(), one); (err != nil) != (test.want["error.type"] != nil) {
				t.Fatal(err)
			}
			wantAttrs(t, o.only(t, "fwd.coordinate"), test.want)
		})
	}
}
