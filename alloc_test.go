// This file counts the allocations of everything that a pass does, without the SDK.

package fwd_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

func wantAllocs(t *testing.T, name string, most float64, f func()) {
	t.Helper()
	if got := testing.AllocsPerRun(200, f); got > most {
		t.Errorf("%s allocates %v times, want at most %v", name, got, most)
	}
}

// skipUnderRace skips a test that counts allocations. No such test may be parallel.
func skipUnderRace(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
}

func TestAllocsRun(t *testing.T) {
	skipUnderRace(t)
	through := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { return next(ctx) }
	}
	three := fwd.WithMiddleware(through, through, through)
	clock := fwd.WithClock(func() time.Time { return time.Time{} })
	ctx, pass := context.Background(), decodePass()
	for provider, most := range map[string]float64{"noop": 1, "global": 2} {
		for name, opts := range map[string][]fwd.Option{
			"": nil, " with 3 middlewares": {three}, " with a clock": {clock}, " with both": {three, clock},
		} {
			r, err := fwd.New(fwd.Config{Name: "target"}, slices.Concat(providers()[provider], opts)...)
			if err != nil {
				t.Fatal(err)
			}
			wantAllocs(t, "Run, provider "+provider+name, most, func() {
				if err := r.Run(ctx, pass, nothing); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// Records cost a pass nothing more than its context.
func TestAllocsObserver(t *testing.T) {
	skipUnderRace(t)
	recorder := fwd.NewRecorder(8)
	opts := append(providers()["noop"], fwd.WithObserver(recorder.Observe))
	r, err := fwd.New(fwd.Config{Name: "target"}, opts...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, pass := context.Background(), decodePass()
	wantAllocs(t, "Run with an observer", 1, func() {
		if err := r.Run(ctx, pass, nothing); err != nil {
			t.Error(err)
		}
	})
}

// Report costs nothing if nobody listens.
func TestAllocsReport(t *testing.T) {
	skipUnderRace(t)
	ctx, pass, began := context.Background(), decodePass(), time.Unix(1, 0)
	for name, opts := range providers() {
		r, err := fwd.New(fwd.Config{Name: "target"}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		wantAllocs(t, "Report, provider "+name, 0, func() {
			if err := r.Report(ctx, pass, began, began, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAllocsUBatches(t *testing.T) {
	skipUnderRace(t)
	noop, err := fwd.New(fwd.Config{}, providers()["noop"]...)
	if err != nil {
		t.Fatal(err)
	}
	fn := func(context.Context, int) error { return nil }
	for n, most := range map[int]float64{1: 0, 2: 6, 4: 8} {
		for name, r := range map[string]*fwd.Runner{"nil": nil, "noop": noop} {
			pass := splitPass(64, n)
			wantAllocs(t, fmt.Sprintf("Parts of %d", n), max(2-float64(n), 0), func() { pass.Parts() })
			err := r.Run(context.Background(), pass, func(ctx context.Context) error {
				wantAllocs(t, fmt.Sprintf("RunUBatches of %d, Runner %s", n, name), most, func() {
					if err := fwd.RunUBatches(ctx, fn); err != nil {
						t.Error(err)
					}
				})
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// Four local ranks begin and wait in one goroutine: none is started.
func TestAllocsBegin(t *testing.T) {
	const ranks = 4
	runners := localRunners(t, ranks)
	step := func() {
		var waits [ranks]func() (fwd.Pass, error)
		for rank, r := range runners {
			wait, err := r.Begin(context.Background(), fwd.Schedule{NumScheduledTokens: []int{1 + rank}})
			if err != nil {
				t.Fatal(err)
			}
			waits[rank] = wait
		}
		for _, wait := range waits {
			if _, err := wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := runtime.NumGoroutine()
	wait, err := runners[0].Begin(context.Background(), fwd.Schedule{NumScheduledTokens: []int{1}})
	if err != nil {
		t.Fatal(err)
	}
	if n := runtime.NumGoroutine() - before; n > 0 {
		t.Errorf("Begin starts %d goroutines, want none", n)
	}
	for _, r := range runners[1:] {
		if _, err := r.Begin(context.Background(), fwd.Schedule{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine() - before; n > 0 {
		t.Errorf("Begin of all ranks leaves %d goroutines, want none", n)
	}
	if _, err := wait(); err != nil {
		t.Fatal(err)
	}
	if !raceEnabled {
		wantAllocs(t, "a step of 4 ranks, with their schedules", 4*ranks, step)
	}
}

// localRunners returns the Runners of a local group, with a dispatcher and without telemetry.
func localRunners(tb testing.TB, ranks int) []*fwd.Runner {
	tb.Helper()
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: fwd.DefaultCaptureSizes(64), MaxNumSeqs: 32,
	})
	if err != nil {
		tb.Fatal(err)
	}
	group, err := fwd.NewLocalGroup(ranks)
	if err != nil {
		tb.Fatal(err)
	}
	runners := make([]*fwd.Runner, ranks)
	for rank, c := range group {
		opts := append(providers()["noop"], fwd.WithCoordinator(c), fwd.WithDispatcher(d))
		if runners[rank], err = fwd.New(fwd.Config{}, opts...); err != nil {
			tb.Fatal(err)
		}
	}
	return runners
}

// allocsOfLookups looks up in ctx what is there and what isn't.
func allocsOfLookups(t *testing.T, where string, ctx context.Context) {
	t.Helper()
	type value = *fwd.ForwardContext
	for what, f := range map[string]func() bool{
		"FromContext":         func() bool { _, ok := fwd.FromContext(ctx); return ok },
		"MustFromContext":     func() bool { return fwd.MustFromContext(ctx) != nil },
		"LocalSizes":          func() bool { _, ok := fwd.LocalSizes(ctx); return ok },
		"AttnMetadata":        func() bool { _, err := fwd.AttnMetadata[value](ctx, "attn"); return err == nil },
		"MustAttnMetadata":    func() bool { return fwd.MustAttnMetadata[value](ctx, "attn") != nil },
		"AttnMetadata of all": func() bool { _, err := fwd.AttnMetadata[value](ctx, "other"); return err == nil },
		"SlotMapping":         func() bool { _, err := fwd.SlotMapping[value](ctx, "attn"); return err == nil },
		"Layer":               func() bool { _, err := fwd.Layer[value](ctx, "attn"); return err == nil },
	} {
		if !f() {
			t.Errorf("%s%s misses", what, where)
		}
		wantAllocs(t, what+where, 0, func() { f() })
	}
	for what, f := range map[string]func() error{
		"AttnMetadata of another type": func() error { _, err := fwd.AttnMetadata[int](ctx, "attn"); return err },
		"SlotMapping unknown":          func() error { _, err := fwd.SlotMapping[int](ctx, "other"); return err },
		"Layer unknown":                func() error { _, err := fwd.Layer[int](ctx, "other"); return err },
	} {
		if f() == nil {
			t.Errorf("%s%s hits", what, where)
		}
		wantAllocs(t, what+where, 1, func() { f() })
	}
}

func TestAllocsContext(t *testing.T) {
	skipUnderRace(t)
	type key struct{}
	var none *fwd.Runner
	var outer context.Context
	fc := &fwd.ForwardContext{NumTokens: 16}
	wantAllocs(t, "NewContext", 1, func() { outer = fwd.NewContext(context.Background(), fc) })
	cfg := fwd.Config{Layers: map[string]any{"attn": fc}}
	r, err := fwd.New(cfg, providers()["noop"]...)
	if err != nil {
		t.Fatal(err)
	}
	pass := decodePass()
	pass.AttnMetadata = []map[string]any{{"attn": fc, "": fc}}
	pass.SlotMapping = []map[string]any{{"attn": fc}}
	err = r.Run(outer, pass, func(ctx context.Context) error {
		sized, err := fwd.WithSPLocalSizes(ctx, 2)
		if err != nil {
			return err
		}
		allocsOfLookups(t, "", sized)
		below := context.WithValue(context.WithValue(sized, key{}, 1), key{}, 2)
		allocsOfLookups(t, " 2 values below", below)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	none.Run(context.Background(), fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		wantAllocs(t, "AttnMetadata without any", 1, func() { fwd.AttnMetadata[int](ctx, "attn") })
		return nil
	})
	outside := context.Background()
	wantAllocs(t, "AttnMetadata outside a pass", 1, func() { fwd.AttnMetadata[int](outside, "attn") })
}

func TestAllocsDP(t *testing.T) {
	skipUnderRace(t)
	const sp = 4
	m, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: 4}, 3, vec(3, 400, 5, 6))
	if err != nil {
		t.Fatal(err)
	}
	list := make([]int, 0, 4*sp)
	across, cu := new(mat.VecDense), new(mat.VecDense)
	m.NumTokensAcrossDPTo(across)
	m.CuTokensAcrossSPTo(cu, sp)
	wantAllocs(t, "AppendSPLocalSizes", 0, func() { list = m.AppendSPLocalSizes(list[:0], sp) })
	wantAllocs(t, "AppendChunkedSizes", 0, func() { list = m.AppendChunkedSizes(list[:0], sp, 7, 1) })
	wantAllocs(t, "NumTokensAcrossDPTo", 0, func() { m.NumTokensAcrossDPTo(across) })
	wantAllocs(t, "CuTokensAcrossSPTo", 0, func() { m.CuTokensAcrossSPTo(cu, sp) })
	wantAllocs(t, "NumChunks", 0, func() { m.NumChunks(sp, 7) })
	votes := make([]fwd.Vote, 8)
	wantAllocs(t, "Agree", 2, func() {
		if _, err := fwd.Agree(votes, 2); err != nil {
			t.Error(err)
		}
	})
}

func TestAllocsDispatch(t *testing.T) {
	skipUnderRace(t)
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: fwd.DefaultCaptureSizes(512), MaxNumSeqs: 256,
		LoRA: &fwd.LoRAConfig{MaxLoRAs: 4, SpecializeCount: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	wantAllocs(t, "Dispatch", 0, func() {
		n = (n + 37) % 600
		d.Dispatch(fwd.DispatchQuery{
			NumTokens: n, UniformDecode: n%2 == 0, NumActiveLoRAs: n % 5, ExcludeFull: n%3 == 0,
		})
	})
}

func TestAllocsExchange(t *testing.T) {
	skipUnderRace(t)
	const rounds = 2000
	for _, size := range []int{2, 4, 8} {
		group := localGroup(t, size)
		exchangeRounds(t, group, 1, rounds) // warm
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		exchangeRounds(t, group, rounds+1, rounds)
		runtime.ReadMemStats(&after)
		got := float64(after.Mallocs-before.Mallocs) / float64(rounds*size)
		if got > 1.05 { // the goroutines of the test itself are the rest
			t.Errorf("an exchange of %d ranks allocates %.2f times a rank, want at most 1", size, got)
		}
	}
}
