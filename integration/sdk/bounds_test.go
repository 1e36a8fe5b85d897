// This file tests the bounds of attribute sets: however many passes run, they stay few.

package sdk_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/forwardctx/fwd"
)

func TestAttributeSetsAreBounded(t *testing.T) {
	t.Parallel()
	count := func(t *testing.T, passes int, pass func(i int) fwd.Pass, err func(i int) error) int {
		o := newTelemetry()
		r := o.runner(t, fwd.Config{})
		for i := range passes {
			r.Run(context.Background(), pass(i), func(context.Context) error { return err(i) })
		}
		points := o.points(t, "fwd.forward.duration")
		total := uint64(0)
		for _, p := range points {
			total += p.Count
		}
		if total != uint64(passes) {
			t.Errorf("%d passes are in the histogram, want %d", total, passes)
		}
		for _, name := range []string{"fwd.forward.tokens", "fwd.padding", "fwd.graph.events"} {
			if n := len(o.points(t, name)); n > 2 {
				t.Errorf("%s has %d attribute sets, want at most 2", name, n)
			}
		}
		return len(points)
	}
	t.Run("errors", func(t *testing.T) {
		t.Parallel()
		pass := func(int) fwd.Pass { return fwd.Pass{NumTokens: 1} }
		n := count(t, 1000, pass, func(i int) error { return words(fmt.Sprint("word", i)) })
		if n < 2 || n > 100 {
			t.Errorf("1,000 different errors have %d attribute sets, want a few dozen", n)
		}
	})
	t.Run("sizes", func(t *testing.T) {
		t.Parallel()
		pass := func(i int) fwd.Pass { return fwd.Pass{NumTokens: i + 1} }
		n := count(t, 5000, pass, func(int) error { return nil })
		if n != 14 { // 1, 2, 4, ..., 8192
			t.Errorf("the sizes 1 to 5,000 have %d attribute sets, want 14", n)
		}
	})
}
