// This file counts what a pass allocates while it is recorded. The counts without the SDK are in the root.

package sdk_test

import (
	"context"
	"testing"

	"github.com/forwardctx/fwd"
)

func TestAllocsRun(t *testing.T) {
	skipUnderRace(t)
	through := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { return next(ctx) }
	}
	const most = 5
	ctx, pass := context.Background(), decodePass()
	three := []fwd.Middleware{through, through, through}
	for name, mw := range map[string][]fwd.Middleware{"": nil, " with 3 middlewares": three} {
		r, err := fwd.New(fwd.Config{Name: "target"}, append(recording(), fwd.WithMiddleware(mw...))...)
		if err != nil {
			t.Fatal(err)
		}
		got := testing.AllocsPerRun(200, func() {
			if err := r.Run(ctx, pass, nothing); err != nil {
				t.Error(err)
			}
		})
		if got > most {
			t.Errorf("Run%s allocates %v times, want at most %v", name, got, most)
		}
	}
}
