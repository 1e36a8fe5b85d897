// This file counts what a pass allocates while it is recorded. The counts without the SDK are in
// the root.

package sdk_test

import (
	"context"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

func TestAllocsRun(t *testing.T) {
	skipUnderRace(t)
	through := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { return next(ctx) }
	}
	const most = 5
	ctx, pass := context.Background(), decodePass()
	for name, opts := range map[string][]fwd.Option{
		"":                    nil,
		" with 3 middlewares": {fwd.WithMiddleware(through, through, through)},
		" with an observer":   {fwd.WithObserver(func(context.Context, *fwd.Record) {})},
	} {
		r, err := fwd.New(fwd.Config{Name: "target"}, append(recording(), opts...)...)
		if err != nil {
			t.Fatal(err)
		}
		wantAllocs(t, "Run"+name, most, func() {
			if err := r.Run(ctx, pass, nothing); err != nil {
				t.Error(err)
			}
		})
	}
}

// Metrics alone cost a pass nothing more than its context.
func TestAllocsMetrics(t *testing.T) {
	skipUnderRace(t)
	r, err := fwd.New(fwd.Config{Name: "target"}, recording()[1])
	if err != nil {
		t.Fatal(err)
	}
	ctx, pass := context.Background(), decodePass()
	wantAllocs(t, "Run with metrics alone", 1, func() {
		if err := r.Run(ctx, pass, func(ctx context.Context) error {
			fwd.Waited(ctx, 1, time.Time{})
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
}

func wantAllocs(t *testing.T, name string, most float64, f func()) {
	t.Helper()
	if got := testing.AllocsPerRun(200, f); got > most {
		t.Errorf("%s allocates %v times, want at most %v", name, got, most)
	}
}
