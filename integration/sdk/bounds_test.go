// This file tests the bounds of attribute sets: however many passes run, they stay few.

package sdk_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
)

// maxSets is the most attribute sets that an instrument may have. The SDK keeps 2,000.
const maxSets = 1500

// setsOf returns how many attribute sets fwd.forward.duration has after some passes, all of which
// it must count.
func setsOf(t *testing.T, o *telemetry, passes int) int {
	t.Helper()
	points := o.points(t, "fwd.forward.duration")
	total := uint64(0)
	for _, p := range points {
		total += p.Count
	}
	if total != uint64(passes) {
		t.Errorf("%d passes are in the histogram, want %d", total, passes)
	}
	return len(points)
}

// wordsOf returns the values of an attribute of fwd.forward.duration, sorted.
func wordsOf(t *testing.T, o *telemetry, key string) (words []string) {
	t.Helper()
	for _, p := range o.points(t, "fwd.forward.duration") {
		if word, ok := p.Attrs[key].(string); ok {
			words = append(words, word)
		}
	}
	slices.Sort(words)
	return slices.Compact(words)
}

func TestErrorsAreBounded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{})
	run := func(err error) {
		r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return err })
	}
	for i := range 1000 {
		run(words(fmt.Sprint("word", i)))
	}
	// However many words the callers have had, the library's own have their place.
	for _, err := range []error{fwd.ErrLayer, fwd.ErrRankMissing, fwd.ErrInvalid, context.Canceled} {
		run(fmt.Errorf("model: %w", err))
	}
	if n := setsOf(t, o, 1004); n < 2 || n > 100 {
		t.Errorf("1,000 different errors have %d attribute sets, want a few dozen", n)
	}
	got := wordsOf(t, o, "error.type")
	for _, want := range []string{"word0", "_OTHER", "layer", "rank_missing", "invalid"} {
		if !slices.Contains(got, want) {
			t.Errorf("the words %s have no %q", strings.Join(got, " "), want)
		}
	}
}

func TestSizesAreBounded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{})
	for i := range 5000 {
		pass := fwd.Pass{NumTokens: i + 1, NumTokensUnpadded: i/2 + 1}
		if err := r.Run(context.Background(), pass, nothing); err != nil {
			t.Fatal(err)
		}
	}
	if n := setsOf(t, o, 5000); n != 14 { // 1, 2, 4, ..., 8192
		t.Errorf("the sizes 1 to 5,000 have %d attribute sets, want 14", n)
	}
	for _, name := range []string{"fwd.forward.tokens", "fwd.padding", "fwd.graph.events"} {
		if n := len(o.points(t, name)); n != 1 {
			t.Errorf("%s has %d attribute sets, want 1", name, n)
		}
	}
}

// A Runner counts eight words of its callers as phases, beside those of Plan and WarmUp.
func TestPhasesAreBounded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{})
	for i := range 100 {
		run := fwd.Pass{NumTokens: 1, Phase: fmt.Sprintf("phase%02d", i%20)}
		if i >= 80 {
			run.Phase = []string{"", "decode", "mixed", "warmup"}[i%4]
		}
		if err := r.Run(context.Background(), run, nothing); err != nil {
			t.Fatal(err)
		}
	}
	want := "_OTHER decode mixed phase00 phase01 phase02 phase03 phase04 phase05 phase06 phase07 warmup"
	if got := strings.Join(wordsOf(t, o, "fwd.phase"), " "); got != want {
		t.Errorf("phases %s, want %s", got, want)
	}
	if n := setsOf(t, o, 100); n != 13 {
		t.Errorf("%d attribute sets, want 13", n)
	}
	if got := attrsOf(o.ended("fwd.forward")[19].Attributes())["fwd.phase"]; got != "phase19" {
		t.Errorf("the span's phase is %v, want the caller's own word", got)
	}
}

// Capture sizes are buckets only if there are at most 64 of them, and all together stay below the
// SDK's limit.
func TestCaptureSizesAreBounded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ sizes, buckets int }{{64, 64}, {65, 8}, {1024, 12}} {
		t.Run(fmt.Sprint(test.sizes), func(t *testing.T) {
			t.Parallel()
			o := newTelemetry()
			sizes := make([]int, test.sizes)
			for i := range sizes {
				sizes[i] = 2 * (i + 1)
			}
			d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
				Mode: fwd.GraphFullAndPiecewise, CaptureSizes: sizes, MaxNumSeqs: 4096,
			})
			if err != nil {
				t.Fatal(err)
			}
			r := o.runner(t, fwd.Config{}, fwd.WithDispatcher(d))
			for _, n := range sizes {
				pass, err := r.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{n}})
				if err != nil {
					t.Fatal(err)
				}
				if err := r.Run(context.Background(), pass, nothing); err != nil {
					t.Fatal(err)
				}
			}
			if n := setsOf(t, o, test.sizes); n > test.buckets {
				t.Errorf("%d capture sizes have %d attribute sets, want at most %d", test.sizes, n, test.buckets)
			}
		})
	}
}

// Whatever the callers do with sizes, phases, modes, reasons and errors together, an instrument
// stays below what the SDK keeps, and loses no pass.
func TestAttributeSetsAreBounded(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	sizes := fwd.DefaultCaptureSizes(16 * 1024)[:1024]
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: sizes, MaxNumSeqs: 4096,
	})
	if err != nil {
		t.Fatal(err)
	}
	r := o.runner(t, fwd.Config{}, fwd.WithDispatcher(d))
	errs := []error{
		nil, fwd.ErrLayer, fwd.ErrInvalid, fwd.ErrNoMetadata, context.Canceled, words("own"), words("more"),
	}
	const passes = 30000
	for i := range passes {
		n := sizes[i%len(sizes)]
		pass := fwd.Pass{
			NumTokens: n, NumTokensUnpadded: 1, GraphMode: fwd.GraphMode(i % 3), Reason: fwd.Reason(i % 10),
			Dummy: i%7 == 0, Phase: fmt.Sprint("phase", i%19),
		}
		r.Run(context.Background(), pass, func(context.Context) error { return errs[i%len(errs)] })
	}
	if n := setsOf(t, o, passes); n > maxSets {
		t.Errorf("fwd.forward.duration has %d attribute sets, want at most %d", n, maxSets)
	}
	for _, m := range o.scopes(t)[0].Metrics {
		if n := len(o.points(t, m.Name)); n > maxSets {
			t.Errorf("%s has %d attribute sets, want at most %d", m.Name, n, maxSets)
		}
	}
}

// Waits for a great many ranks are counted together beyond the first ones.
func TestWaitRanksAreBounded(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	const ranks = 3000
	err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		began := clock.Now()
		clock.advance(1 << 20)
		for rank := range ranks {
			fwd.Waited(ctx, rank, began)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	points, sum := o.points(t, "fwd.wait.time"), 0.0
	for _, p := range points {
		sum += p.Sum
	}
	if want := ranks * float64(1<<20) / 1e9; len(points) > maxSets || sum < want*0.999 || sum > want*1.001 {
		t.Errorf("%d attribute sets of %v s, want at most %d of %v s", len(points), sum, maxSets, want)
	}
}
