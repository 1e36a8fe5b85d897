// This file tests the forward context, the lookups in it, and passes with their middleware.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// passOf returns a pass whose metadata says which it is.
func passOf(name string, tokens int) fwd.Pass {
	return fwd.Pass{
		NumTokens:    tokens,
		AttnMetadata: []map[string]any{{"": name}},
		SlotMapping:  []map[string]any{{"": name}},
	}
}

// passCheck reads everything that a context in passOf(name, tokens) holds, with these local sizes
// (nil: none) in microbatch ubatch (-1: none).
func passCheck(
	t *testing.T,
	where string,
	ctx context.Context,
	name string,
	tokens int,
	sizes []int,
	ubatch int,
) {
	t.Helper()
	fc, ok := fwd.FromContext(ctx)
	if !ok || fc != fwd.MustFromContext(ctx) || fc.NumTokens != tokens {
		t.Errorf("%s: FromContext = %+v, %t; want %d tokens", where, fc, ok, tokens)
	}
	if got, err := fwd.AttnMetadata[string](ctx, "layer"); got != name || err != nil {
		t.Errorf("%s: attention metadata %q, %v; want %q", where, got, err, name)
	}
	if got, err := fwd.SlotMapping[string](ctx, "layer"); got != name || err != nil {
		t.Errorf("%s: slot mapping %q, %v; want %q", where, got, err, name)
	}
	got, ok := fwd.LocalSizes(ctx)
	if !slices.Equal(got, sizes) || ok != (sizes != nil) {
		t.Errorf("%s: local sizes %v, %t; want %v", where, got, ok, sizes)
	}
	i, n, ok := fwd.UBatch(ctx)
	if ok != (ubatch >= 0) || ok && (i != ubatch || n != 2) {
		t.Errorf("%s: UBatch = %d, %d, %t; want index %d", where, i, n, ok, ubatch)
	}
}

// passNone checks that ctx is in no pass at all.
func passNone(t *testing.T, where string, ctx context.Context) {
	t.Helper()
	if fc, ok := fwd.FromContext(ctx); ok || fc != nil {
		t.Errorf("%s: FromContext = %+v, %t; want none", where, fc, ok)
	}
	func() {
		defer func() {
			if err, ok := recover().(error); !ok || !errors.Is(err, fwd.ErrNoForwardContext) {
				t.Errorf("%s: MustFromContext panics with %v, want %v", where, err, fwd.ErrNoForwardContext)
			}
		}()
		fwd.MustFromContext(ctx)
	}()
	_, err1 := fwd.AttnMetadata[string](ctx, "layer")
	_, err2 := fwd.SlotMapping[string](ctx, "layer")
	_, err3 := fwd.Layer[string](ctx, "layer")
	for _, err := range []error{err1, err2, err3} {
		if !errors.Is(err, fwd.ErrNoForwardContext) {
			t.Errorf("%s: %v, want %v", where, err, fwd.ErrNoForwardContext)
		}
	}
	if sizes, ok := fwd.LocalSizes(ctx); ok {
		t.Errorf("%s: local sizes %v", where, sizes)
	}
	if i, n, ok := fwd.UBatch(ctx); ok {
		t.Errorf("%s: UBatch = %d, %d", where, i, n)
	}
}

type passKey struct{}

// Nested passes shadow the outer one completely, its local sizes and microbatch too, and it is back
// afterwards.
func TestNestedPassesShadow(t *testing.T) {
	t.Parallel()
	target, err := fwd.New(fwd.Config{Name: "target"})
	if err != nil {
		t.Fatal(err)
	}
	draft, err := fwd.New(fwd.Config{Name: "draft"})
	if err != nil {
		t.Fatal(err)
	}
	run := func(r *fwd.Runner) func(ctx context.Context, p fwd.Pass, inner fwd.ForwardFunc) error {
		return func(ctx context.Context, p fwd.Pass, inner fwd.ForwardFunc) error { return r.Run(ctx, p, inner) }
	}
	for _, tt := range []struct {
		name string
		nest func(ctx context.Context, p fwd.Pass, inner fwd.ForwardFunc) error
	}{
		{"other Runner", run(draft)},
		{"same Runner", run(target)},
		{"nil Runner", run(nil)},
		{"Start", func(ctx context.Context, p fwd.Pass, inner fwd.ForwardFunc) error {
			ctx, end, err := draft.Start(ctx, p)
			if err != nil {
				return err
			}
			err = inner(ctx)
			end(err)
			return err
		}},
		{"NewContext", func(ctx context.Context, p fwd.Pass, inner fwd.ForwardFunc) error {
			return inner(fwd.NewContext(ctx, &fwd.ForwardContext{
				NumTokens: p.NumTokens, AttnMetadata: p.AttnMetadata, SlotMapping: p.SlotMapping,
			}))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := fwd.Pass{
				NumTokens: 8, UBatches: planSlices([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8}),
				AttnMetadata: []map[string]any{
					{"": "outer"},
					{"": "outer"},
				}, SlotMapping: []map[string]any{{"": "outer"}, {"": "outer"}},
			}
			if err := target.Run(t.Context(), p, func(ctx context.Context) error {
				return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
					ctx, err := fwd.WithChunkedSizes(context.WithValue(ctx, passKey{}, "kept"), 1, 3, 0)
					if err != nil {
						return err
					}
					passCheck(t, "outer, before", ctx, "outer", 4, []int{3}, i)
					err = tt.nest(ctx, passOf("inner", 5), func(inner context.Context) error {
						passCheck(t, "inner", inner, "inner", 5, nil, -1)
						fc := fwd.MustFromContext(inner)
						if fc.Batch != (fwd.BatchDescriptor{}) || fc.UBatches != nil || fc.DP != nil {
							t.Errorf("the inner pass has something of the outer one: %+v", fc)
						}
						if inner.Value(passKey{}) != "kept" {
							t.Error("the inner context has lost a value of its parent")
						}
						sized, err := fwd.WithSPLocalSizes(inner, 2)
						if err != nil {
							return err
						}
						passCheck(t, "inner, with sizes", sized, "inner", 5, []int{3, 3}, -1)
						passNone(t, "hidden in inner", fwd.NewContext(sized, nil))
						passCheck(t, "outer, meanwhile", ctx, "outer", 4, []int{3}, i)
						return nil
					})
					passCheck(t, "outer, afterwards", ctx, "outer", 4, []int{3}, i)
					return err
				})
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

// A nil forward context hides the outer pass and nothing else.
func TestNilHides(t *testing.T) {
	t.Parallel()
	passNone(t, "outside", t.Context())
	parent, cancel := context.WithCancel(context.WithValue(t.Context(), passKey{}, "kept"))
	pass := fwd.NewContext(
		parent,
		&fwd.ForwardContext{
			NumTokens:    3,
			AttnMetadata: []map[string]any{{"": "pass"}},
			SlotMapping:  []map[string]any{{"": "pass"}},
		},
	)
	hidden := fwd.NewContext(pass, nil)
	passNone(t, "hidden", hidden)
	passNone(t, "below hidden", context.WithValue(hidden, passKey{}, "below"))
	passCheck(t, "a pass inside hidden", fwd.NewContext(hidden, fwd.MustFromContext(pass)), "pass", 3, nil, -1)
	passCheck(t, "the outer pass", pass, "pass", 3, nil, -1)
	if hidden.Value(passKey{}) != "kept" {
		t.Error("the hidden context has lost a value of its parent")
	}
	if cancel(); hidden.Err() == nil || pass.Err() == nil {
		t.Error("the contexts do not end with their parent")
	}
}

// A goroutine that outlives its pass keeps what it holds, whatever the same Runner runs afterwards.
func TestContextOutlivesPass(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}})
	if err != nil {
		t.Fatal(err)
	}
	var late sync.WaitGroup
	release := make(chan struct{})
	for i := range 50 {
		name, tokens := fmt.Sprint("pass ", i), 4+2*i
		p := fwd.Pass{
			NumTokens: tokens, NumTokensAcrossDP: vec(tokens, tokens),
			UBatches: planSlices([4]int{0, 1, 0, tokens / 2}, [4]int{1, 2, tokens / 2, tokens}),
			AttnMetadata: []map[string]any{
				{"": name},
				{"": name},
			}, SlotMapping: []map[string]any{{"": name}, {"": name}},
		}
		check := func(ctx context.Context, tokens int, sizes []int, ubatch int) {
			before := *fwd.MustFromContext(ctx)
			late.Go(func() {
				<-release
				passCheck(t, name, ctx, name, tokens, sizes, ubatch)
				after := fwd.MustFromContext(ctx)
				if after.DP != before.DP || after.DP.NumTokens(0) != tokens || after.Batch != before.Batch ||
					len(after.UBatches) != len(before.UBatches) {
					t.Errorf("%s was %+v and is %+v", name, before, after)
				}
			})
		}
		if err := r.Run(t.Context(), p, func(ctx context.Context) error {
			return fwd.RunUBatches(ctx, func(ctx context.Context, k int) error {
				check(ctx, tokens/2, nil, k)
				sized, err := fwd.WithSPLocalSizes(ctx, 1)
				if err == nil {
					check(sized, tokens/2, []int{tokens / 2, tokens / 2}, k)
				}
				return err
			})
		}); err != nil {
			t.Fatal(err)
		}
		p = passOf(name, tokens)
		p.NumTokensAcrossDP = vec(tokens, tokens)
		if err := r.Run(t.Context(), p, func(ctx context.Context) error {
			check(ctx, tokens, nil, -1)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		ctx, end, err := r.Start(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		check(ctx, tokens, nil, -1)
		end(nil)
	}
	close(release)
	late.Wait()
}

// checkKept checks that nothing which the caller of TestCallerChangesItsOwn has changed is in its
// pass.
func checkKept(t *testing.T, when string, ctx context.Context, split bool) {
	t.Helper()
	fc := fwd.MustFromContext(ctx)
	if fc.NumTokens != 8 || fc.Batch.NumTokens != 8 || fc.DP.NumTokens(0) != 8 || fc.DP.NumTokens(1) != 8 {
		t.Errorf("%s the pass is %+v with counts %v", when, fc, counts(fc.DP.NumTokensAcrossDPTo(nil)))
	}
	if layer, err := fwd.Layer[string](ctx, "layer"); layer != "kept" || err != nil {
		t.Errorf("%s the layer is %q, %v", when, layer, err)
	}
	if _, err := fwd.Layer[string](ctx, "more"); !errors.Is(err, fwd.ErrLayer) {
		t.Errorf("%s there is another layer: %v", when, err)
	}
	calls := make([]bool, 2)
	if err := fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
		calls[i] = true
		if got, err := fwd.AttnMetadata[string](ctx, "layer"); got != "kept" || err != nil {
			t.Errorf("%s the metadata is %q, %v", when, got, err)
		}
		if got, err := fwd.SlotMapping[string](ctx, "layer"); got != "kept" || err != nil {
			t.Errorf("%s the slot mapping is %q, %v", when, got, err)
		}
		return nil
	}); err != nil || calls[1] != split {
		t.Errorf("%s the microbatches are %v, %v", when, calls, err)
	}
}

// A caller may change its own Pass, its slices, its counts and its Config while the pass runs and
// afterwards.
func TestCallerChangesItsOwn(t *testing.T) {
	t.Parallel()
	layers := map[string]any{"layer": "kept"}
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}, Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	for _, split := range []bool{false, true} {
		for _, agreed := range []bool{false, true} {
			across := vec(8, 8)
			p := passOf("kept", 8)
			p.Batch = fwd.BatchDescriptor{NumTokens: 8}
			if agreed {
				p.Agreement = &fwd.Agreement{NumTokensAcrossDP: across, LowestModeRank: -1}
			} else {
				p.NumTokensAcrossDP = across
			}
			if split {
				p.UBatches = planSlices([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8})
				p.AttnMetadata = append(p.AttnMetadata, p.AttnMetadata[0])
				p.SlotMapping = append(p.SlotMapping, p.SlotMapping[0])
			}
			change := func() {
				across.SetVec(0, 1)
				across.SetVec(1, 2)
				for i := range p.AttnMetadata {
					p.AttnMetadata[i], p.SlotMapping[i] = map[string]any{"": "changed"}, map[string]any{"": "changed"}
				}
				for i := range p.UBatches {
					p.UBatches[i] = fwd.UBatchSlice{}
				}
				layers["layer"] = "changed"
				layers["more"] = "changed"
				p.NumTokens, p.Batch = 99, fwd.BatchDescriptor{NumTokens: 99}
			}
			var kept []context.Context
			ctx, end, err := r.Start(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Run(t.Context(), p, func(ctx context.Context) error {
				checkKept(t, "before", ctx, split)
				change()
				checkKept(t, "during", ctx, split)
				kept = append(kept, ctx)
				return nil
			}); err != nil {
				t.Error(err)
			}
			checkKept(t, "in Start's pass", ctx, split)
			end(nil)
			checkKept(t, "after Start's pass", ctx, split)
			checkKept(t, "after the pass", kept[0], split)
			layers["layer"] = "kept"
			delete(layers, "more")
		}
	}
}

// onlyOwn returns an error if a context in one of TestManyGoroutines's passes shows another pass.
func onlyOwn(ctx context.Context) error {
	fc := fwd.MustFromContext(ctx)
	want := fmt.Sprint("pass ", fc.NumTokens)
	attn, err1 := fwd.AttnMetadata[string](ctx, "a")
	slot, err2 := fwd.SlotMapping[string](ctx, "a")
	layer, err3 := fwd.Layer[int](ctx, "layer")
	if attn != want || slot != want || layer != 7 || fc.DP.NumTokens(0) != fc.NumTokens {
		return fmt.Errorf("%s sees %q, %q, %d, counts %d", want, attn, slot, layer, fc.DP.NumTokens(0))
	}
	sized, err4 := fwd.WithSPLocalSizes(ctx, 1)
	if sizes, _ := fwd.LocalSizes(sized); !slices.Equal(sizes, []int{fc.NumTokens, 3}) &&
		!slices.Equal(sizes, []int{fc.NumTokens, fc.NumTokens}) {
		return fmt.Errorf("%s has local sizes %v", want, sizes)
	}
	_ = fmt.Sprint(ctx)
	return errors.Join(err1, err2, err3, err4)
}

// 1,000 goroutines over one Runner, one middleware and one cache: none sees another's pass. This is
// for the race detector.
func TestManyGoroutines(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(
		fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}, Layers: map[string]any{"layer": 7}},
		fwd.WithMiddleware(func(next fwd.ForwardFunc) fwd.ForwardFunc {
			return func(ctx context.Context) error {
				return next(context.WithValue(ctx, passKey{}, fwd.MustFromContext(ctx).NumTokens))
			}
		}),
	)
	if err != nil {
		t.Fatal(err)
	}
	var captures, replays, eager atomic.Int32
	cache := cacheNew(t, fwd.GraphFull,
		func(ctx context.Context) error { eager.Add(1); return onlyOwn(ctx) },
		func(_ context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
			captures.Add(1)
			return func(ctx context.Context) error {
				replays.Add(1)
				if got := fwd.MustFromContext(ctx).Batch; got != key {
					return fmt.Errorf("the graph of %+v replays for %+v", key, got)
				}
				return onlyOwn(ctx)
			}, nil
		})
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for i := range 1000 {
		wg.Go(func() {
			<-begin
			for k := range 3 {
				tokens := 2 + 2*(3*i+k)
				p := passOf(fmt.Sprint("pass ", tokens), tokens)
				p.NumTokensAcrossDP = vec(tokens, 3)
				forward := cache.Forward
				switch i % 4 {
				case 0: // eager
				case 1, 2:
					p.GraphMode, p.Batch = fwd.GraphFull, fwd.BatchDescriptor{NumTokens: 1 + i%40}
				case 3:
					p.NumTokensAcrossDP = vec(tokens, tokens)
					p.UBatches = planSlices([4]int{0, 1, 0, tokens / 2}, [4]int{1, 2, tokens / 2, tokens})
					half := map[string]any{"": fmt.Sprint("pass ", tokens/2)}
					p.AttnMetadata, p.SlotMapping = []map[string]any{half, half}, []map[string]any{half, half}
					forward = func(ctx context.Context) error {
						return fwd.RunUBatches(ctx, func(ctx context.Context, _ int) error { return cache.Forward(ctx) })
					}
				}
				if err := r.Run(t.Context(), p, func(ctx context.Context) error {
					if got := ctx.Value(passKey{}); got != tokens {
						return fmt.Errorf("the middleware of pass %d said %v", tokens, got)
					}
					return forward(ctx)
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	close(begin)
	wg.Wait()
	if captures.Load() != 20 || replays.Load() != 1500 || eager.Load() != 750+2*750 || cache.Len() != 20 {
		t.Errorf("%d captures, %d replays, %d calls, %d graphs; want 20, 1500, 2250, 20", captures.Load(),
			replays.Load(), eager.Load(), cache.Len())
	}
}

// Cancellation below our contexts costs no goroutine, as one that the context package can't look
// through would.
func TestCancelStartsNoGoroutine(t *testing.T) {
	parent, stop := context.WithCancel(t.Context())
	defer stop()
	check := func(name string, ctx context.Context) {
		t.Helper()
		before := runtime.NumGoroutine()
		for range 100 {
			_, cancel := context.WithCancel(ctx)
			defer cancel()
		}
		if n := runtime.NumGoroutine() - before; n >= 100 {
			t.Errorf("%s: 100 cancellable contexts start %d goroutines", name, n)
		}
	}
	// The check itself must be able to fail.
	before := runtime.NumGoroutine()
	for range 100 {
		_, cancel := context.WithCancel(opaqueContext{parent, make(chan struct{})})
		defer cancel()
	}
	if runtime.NumGoroutine() < before+100 {
		t.Fatal("a context with a Done of its own costs no goroutine: this test shows nothing")
	}
	check("NewContext", fwd.NewContext(parent, &fwd.ForwardContext{}))
	check("NewContext nil", fwd.NewContext(parent, nil))
	r, err := fwd.New(fwd.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*fwd.Runner{nil, r} {
		if err := r.Run(parent, ubatchPass(2), func(ctx context.Context) error {
			check("Run", ctx)
			sp, err1 := fwd.WithSPLocalSizes(ctx, 2)
			chunked, err2 := fwd.WithChunkedSizes(ctx, 2, 3, 0)
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			check("WithSPLocalSizes", sp)
			check("WithChunkedSizes", chunked)
			chunks, err := fwd.Chunks(ctx, 1, 4)
			if err != nil {
				return err
			}
			for chunk := range chunks {
				check("Chunks", chunk)
			}
			turn := make(chan struct{}, 1)
			return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
				turn <- struct{}{} // the other one starts nothing meanwhile
				check("RunUBatches", ctx)
				<-turn
				return nil
			})
		}); err != nil {
			t.Error(err)
		}
		ctx, end, err := r.Start(parent, fwd.Pass{NumTokens: 1})
		if err != nil {
			t.Fatal(err)
		}
		check("Start", ctx)
		end(nil)
	}
}

// opaqueContext has a Done of its own.
type opaqueContext struct {
	context.Context
	done chan struct{}
}

func (c opaqueContext) Done() <-chan struct{} { return c.done }

// Printing our context reads nothing that others may write, which is for the race detector to see;
// and it says where the context comes from, as the context package's own do.
func TestPrintContext(t *testing.T) {
	t.Parallel()
	type state struct{ n int }
	layer, attn, fc := &state{}, &state{}, &fwd.ForwardContext{NumTokens: 4}
	r, err := fwd.New(fwd.Config{Layers: map[string]any{"layer": layer}})
	if err != nil {
		t.Fatal(err)
	}
	printed := func(name string, ctx context.Context) {
		t.Helper()
		stop, stopped := make(chan struct{}), make(chan struct{})
		started := make(chan struct{})
		go func() {
			defer close(stopped)
			for i := 0; ; i++ {
				layer.n, attn.n = i, i
				fc.NumTokens = i // of NewContext's caller, who should not; printing must not be what shows it
				if i == 0 {
					close(started)
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
		<-started
		for range 20 {
			below := context.WithValue(ctx, passKey{}, attn)
			for _, ctx := range []context.Context{ctx, below, context.WithoutCancel(ctx)} {
				text := fmt.Sprintf("%v|%s|%+v", ctx, ctx, ctx)
				if !strings.Contains(text, "context.Background") {
					t.Errorf("%s: the context prints as %q", name, text)
				}
			}
		}
		close(stop)
		<-stopped
	}
	background := context.Background()
	printed("NewContext", fwd.NewContext(background, fc))
	if text := fmt.Sprint(fwd.NewContext(opaqueContext{background, nil}, fc)); !strings.Contains(text,
		"opaqueContext") {
		t.Errorf("below a context that does not print itself: %q", text)
	}
	p := ubatchPass(2)
	p.AttnMetadata[0][""], p.AttnMetadata[1][""] = attn, attn
	if err := r.Run(background, p, func(ctx context.Context) error {
		printed("Run", ctx)
		sized, err := fwd.WithSPLocalSizes(ctx, 1)
		if err != nil {
			return err
		}
		printed("WithSPLocalSizes", sized)
		turn := make(chan struct{}, 1)
		return fwd.RunUBatches(ctx, func(ctx context.Context, _ int) error {
			turn <- struct{}{}
			printed("RunUBatches", ctx)
			<-turn
			return nil
		})
	}); err != nil {
		t.Error(err)
	}
}

// Metadata and layers by name and by type.
func TestLayerAccess(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{Layers: map[string]any{"a": 1, "nothing": nil}})
	if err != nil {
		t.Fatal(err)
	}
	p := fwd.Pass{
		NumTokens:    1,
		AttnMetadata: []map[string]any{{"a": "attn a", "": "attn any"}},
		SlotMapping:  []map[string]any{{"a": []int{1}}},
	}
	if err := r.Run(t.Context(), p, func(ctx context.Context) error {
		for layer, want := range map[string]string{"a": "attn a", "b": "attn any", "": "attn any"} {
			if got, err := fwd.AttnMetadata[string](ctx, layer); got != want || err != nil {
				t.Errorf("AttnMetadata of %q = %q, %v; want %q", layer, got, err, want)
			}
		}
		if got, err := fwd.AttnMetadata[fmt.Stringer](ctx, "a"); got != nil || !errors.Is(err, fwd.ErrLayer) ||
			!strings.Contains(err.Error(), "has type string, want fmt.Stringer") {
			t.Errorf("AttnMetadata of another type = %v, %v; want %v with both types", got, err, fwd.ErrLayer)
		}
		if got, err := fwd.SlotMapping[[]int](ctx, "a"); len(got) != 1 || err != nil {
			t.Errorf("SlotMapping = %v, %v", got, err)
		}
		if got, err := fwd.SlotMapping[[]int](ctx, "b"); got != nil || !errors.Is(err, fwd.ErrLayer) ||
			!strings.Contains(err.Error(), `"b"`) {
			t.Errorf("SlotMapping without an entry for all = %v, %v; want %v", got, err, fwd.ErrLayer)
		}
		if got, err := fwd.Layer[int](ctx, "a"); got != 1 || err != nil {
			t.Errorf("Layer = %v, %v", got, err)
		}
		for _, name := range []string{"b", "", "nothing"} {
			if got, err := fwd.Layer[int](ctx, name); got != 0 || !errors.Is(err, fwd.ErrLayer) {
				t.Errorf("Layer of %q = %v, %v; want %v", name, got, err, fwd.ErrLayer)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1, Dummy: true}, func(ctx context.Context) error {
		if _, err := fwd.AttnMetadata[string](ctx, "a"); !errors.Is(err, fwd.ErrNoMetadata) {
			t.Errorf("a dummy pass: %v, want %v", err, fwd.ErrNoMetadata)
		}
		if _, err := fwd.SlotMapping[string](ctx, "a"); !errors.Is(err, fwd.ErrNoMetadata) {
			t.Errorf("a dummy pass: %v, want %v", err, fwd.ErrNoMetadata)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// What Run makes of a Pass: the defaults and all that it hands on.
func TestRunForwardContext(t *testing.T) {
	t.Parallel()
	layers := map[string]any{"a": 1}
	r, err := fwd.New(fwd.Config{Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	attn, slots := []map[string]any{{"": 1}}, []map[string]any{{"": 2}}
	part := func(reqs, tokens int) fwd.UBatchSlice { return planSlices([4]int{0, reqs, 0, tokens})[0] }
	uniform := fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}
	for _, tt := range []struct {
		name string
		pass fwd.Pass
		want fwd.ForwardContext
	}{
		{"nothing", fwd.Pass{}, fwd.ForwardContext{}},
		{
			"tokens", fwd.Pass{NumTokens: 3, NumReqs: 2},
			fwd.ForwardContext{NumTokens: 3, NumTokensUnpadded: 3, Part: part(2, 3)},
		},
		{
			"a graph without descriptor",
			fwd.Pass{NumTokens: 4, NumTokensUnpadded: 3, GraphMode: fwd.GraphPiecewise},
			fwd.ForwardContext{
				NumTokens: 4, NumTokensUnpadded: 3, GraphMode: fwd.GraphPiecewise,
				Batch: fwd.BatchDescriptor{NumTokens: 4}, Part: part(0, 4),
			},
		},
		{
			"a descriptor without graph",
			fwd.Pass{NumTokens: 4, NumReqs: 1, Batch: fwd.BatchDescriptor{NumTokens: 9, NumReqs: 2}},
			fwd.ForwardContext{
				NumTokens: 4, NumTokensUnpadded: 4, Batch: fwd.BatchDescriptor{NumTokens: 9, NumReqs: 2},
				Part: part(2, 4),
			},
		},
		{
			"counts of ranks, on a rank alone", fwd.Pass{NumTokens: 4, NumTokensAcrossDP: vec(4)},
			fwd.ForwardContext{NumTokens: 4, NumTokensUnpadded: 4, Part: part(0, 4)},
		},
		{
			"everything",
			fwd.Pass{
				NumTokens: 8, NumTokensUnpadded: 5, NumTokensGraph: 6, NumReqs: 2, AttnMetadata: attn, SlotMapping: slots,
				VirtualEngine: 3, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, Batch: uniform, SkipCompiled: true,
				Dummy: true, Phase: "verify",
			},
			fwd.ForwardContext{
				NumTokens: 8, NumTokensUnpadded: 5, AttnMetadata: attn, SlotMapping: slots, VirtualEngine: 3,
				GraphMode: fwd.GraphFull, Batch: uniform, Part: part(8, 8), SkipCompiled: true, Dummy: true,
			},
		},
	} {
		tt.want.Layers = layers
		if err := r.Run(t.Context(), tt.pass, func(ctx context.Context) error {
			if diff := cmp.Diff(&tt.want, fwd.MustFromContext(ctx)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.name, diff)
			}
			return nil
		}); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// Code that knows the metadata only inside the pass adds it there. Everything else of the pass
// stays.
func TestWithMetadata(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{Layers: map[string]any{"a": 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), passOf("outer", 4), func(ctx context.Context) error {
		sized, err := fwd.WithSPLocalSizes(context.WithValue(ctx, passKey{}, "kept"), 2)
		if err != nil {
			return err
		}
		both, err1 := fwd.WithMetadata(sized, fwd.AllLayers("inner"), fwd.AllLayers("inner"))
		attn, err2 := fwd.WithMetadata(sized, map[string]any{"layer": "attn"}, nil)
		none, err3 := fwd.WithMetadata(sized, nil, nil)
		slots, err4 := fwd.WithMetadata(sized, nil, fwd.AllLayers("slots"))
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return err
		}
		passCheck(t, "both", both, "inner", 4, []int{2, 2}, -1)
		passCheck(t, "nil keeps what is there", none, "outer", 4, []int{2, 2}, -1)
		passCheck(t, "the pass itself", sized, "outer", 4, []int{2, 2}, -1)
		if got := fwd.MustAttnMetadata[string](attn, "layer"); got != "attn" {
			t.Errorf("attention metadata %q, want the one that was added", got)
		}
		if got, err := fwd.SlotMapping[string](attn, "layer"); got != "outer" || err != nil {
			t.Errorf("slot mapping %q, %v; want that of the pass", got, err)
		}
		if got, err := fwd.AttnMetadata[string](slots, "layer"); got != "outer" || err != nil {
			t.Errorf("beside added slots: attention metadata %q, %v; want that of the pass", got, err)
		}
		if _, err := fwd.AttnMetadata[string](attn, "other"); !errors.Is(err, fwd.ErrLayer) {
			t.Errorf("an entry of the map that was replaced is still there: %v", err)
		}
		if layer, err := fwd.Layer[int](both, "a"); layer != 1 || err != nil || both.Value(passKey{}) != "kept" {
			t.Errorf("the layer is %d, %v and the value %v", layer, err, both.Value(passKey{}))
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for _, ctx := range []context.Context{t.Context(), fwd.NewContext(t.Context(), nil)} {
		got, err := fwd.WithMetadata(ctx, fwd.AllLayers(1), nil)
		if got != nil || !errors.Is(err, fwd.ErrNoForwardContext) {
			t.Errorf("outside a pass: %v, %v; want %v", got, err, fwd.ErrNoForwardContext)
		}
	}
}

// A split pass gets metadata inside each of its microbatches, and nowhere else.
func TestWithMetadataOfUBatch(t *testing.T) {
	t.Parallel()
	p := ubatchPass(2)
	p.AttnMetadata, p.SlotMapping = nil, nil
	if err := (*fwd.Runner)(nil).Run(t.Context(), p, func(ctx context.Context) error {
		if _, err := fwd.WithMetadata(ctx, fwd.AllLayers(1), nil); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("outside a microbatch: %v, want %v", err, fwd.ErrInvalid)
		}
		return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
			name := fmt.Sprint("microbatch ", i)
			ctx, err := fwd.WithMetadata(ctx, fwd.AllLayers(name), fwd.AllLayers(name))
			if err != nil {
				return err
			}
			passCheck(t, name, ctx, name, 4, nil, i)
			return nil
		})
	}); err != nil {
		t.Error(err)
	}
}

// MustAttnMetadata panics with the error that AttnMetadata returns.
func TestMustAttnMetadata(t *testing.T) {
	t.Parallel()
	pass := fwd.NewContext(t.Context(), &fwd.ForwardContext{AttnMetadata: []map[string]any{{"a": 1}}})
	if got := fwd.MustAttnMetadata[int](pass, "a"); got != 1 {
		t.Errorf("MustAttnMetadata = %v, want 1", got)
	}
	for name, tt := range map[string]struct {
		ctx   context.Context
		layer string
		want  error
	}{
		"outside a pass": {t.Context(), "a", fwd.ErrNoForwardContext},
		"no such layer":  {pass, "b", fwd.ErrLayer},
		"no metadata":    {fwd.NewContext(t.Context(), &fwd.ForwardContext{}), "a", fwd.ErrNoMetadata},
	} {
		func() {
			defer func() {
				if err, _ := recover().(error); !errors.Is(err, tt.want) {
					t.Errorf("%s: it panics with %v, want %v", name, err, tt.want)
				}
			}()
			fwd.MustAttnMetadata[int](tt.ctx, tt.layer)
		}()
	}
}

// AllLayers is metadata for every layer, and one map for one value.
func TestAllLayers(t *testing.T) {
	t.Parallel()
	if diff := cmp.Diff(map[string]any{"": 7}, fwd.AllLayers(7)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Call returns what forward returned, beside the errors of Run.
func TestCall(t *testing.T) {
	t.Parallel()
	errOwn, errSync := errors.New("own"), errors.New("synchronisation")
	var fail error
	r, err := fwd.New(fwd.Config{}, fwd.WithSynchronize(func(context.Context) error { return fail }))
	if err != nil {
		t.Fatal(err)
	}
	pass := fwd.Pass{NumTokens: 3}
	idle := fwd.Pass{NumTokens: 3, Agreement: &fwd.Agreement{Idle: true}}
	logits := func(err error) func(context.Context) ([]int, error) {
		return func(ctx context.Context) ([]int, error) { return []int{fwd.MustFromContext(ctx).NumTokens}, err }
	}
	for name, tt := range map[string]struct {
		r       *fwd.Runner
		pass    fwd.Pass
		forward func(context.Context) ([]int, error)
		sync    error
		want    []int
		err     error
	}{
		"success":          {r, pass, logits(nil), nil, []int{3}, nil},
		"nil Runner":       {nil, pass, logits(nil), nil, []int{3}, nil},
		"error and result": {r, pass, logits(errOwn), nil, []int{3}, errOwn},
		"synchronisation":  {r, pass, logits(nil), errSync, []int{3}, errSync},
		"refused":          {r, fwd.Pass{NumTokens: -3}, logits(nil), nil, nil, fwd.ErrInvalid},
		"no function":      {r, pass, nil, nil, nil, fwd.ErrInvalid},
		"all idle":         {r, idle, logits(nil), nil, nil, nil},
	} {
		fail = tt.sync
		got, err := fwd.Call(t.Context(), tt.r, tt.pass, tt.forward)
		diff := cmp.Diff(tt.want, got)
		if diff != "" || !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
			t.Errorf("%s: error %v, want %v (-want +got):\n%s", name, err, tt.err, diff)
		}
	}
}

// middlewareLog is a middleware that notes when it is entered and left.
func middlewareLog(log *[]string, composed *int, name string) fwd.Middleware {
	return func(next fwd.ForwardFunc) fwd.ForwardFunc {
		*composed++
		return func(ctx context.Context) error {
			fc, ok := fwd.FromContext(ctx)
			if !ok {
				return fmt.Errorf("middleware %s runs outside a pass", name)
			}
			*log = append(*log, fmt.Sprint("enter ", name, " ", fc.NumTokens))
			err := next(ctx)
			*log = append(*log, fmt.Sprint("leave ", name, " ", err))
			return err
		}
	}
}

// Middleware runs inside the pass, the first outermost, and is composed once.
func TestMiddlewareOrder(t *testing.T) {
	t.Parallel()
	var log []string
	composed := 0
	m := func(name string) fwd.Middleware { return middlewareLog(&log, &composed, name) }
	r, err := fwd.New(fwd.Config{}, fwd.WithMiddleware(m("a"), fwd.Chain(m("b"), fwd.Chain(), m("c"))),
		fwd.WithMiddleware(), fwd.WithMiddleware(m("d")))
	if err != nil {
		t.Fatal(err)
	}
	errOwn := errors.New("own")
	for tokens := 1; tokens <= 3; tokens++ {
		log = nil
		err := r.Run(t.Context(), fwd.Pass{NumTokens: tokens}, func(ctx context.Context) error {
			log = append(log, fmt.Sprint("forward ", fwd.MustFromContext(ctx).NumTokens))
			return errOwn
		})
		if err != errOwn {
			t.Errorf("error %v, want %v", err, errOwn)
		}
		var want []string
		for _, name := range []string{"a", "b", "c", "d"} {
			want = append(want, fmt.Sprint("enter ", name, " ", tokens))
		}
		want = append(want, fmt.Sprint("forward ", tokens), "leave d own", "leave c own", "leave b own",
			"leave a own")
		if diff := cmp.Diff(want, log); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	if composed != 4 {
		t.Errorf("the middleware was composed %d times, want 4", composed)
	}
	log = nil
	ctx, end, err := r.Start(t.Context(), fwd.Pass{NumTokens: 1})
	if err != nil {
		t.Fatal(err)
	}
	end(nil)
	if len(log) > 0 || ctx == nil {
		t.Errorf("Start runs middleware: %v", log)
	}
}

// nextCase is a middleware that calls next in some way around a pass of 3 tokens.
type nextCase struct {
	name   string
	mw     func(ctx context.Context, next fwd.ForwardFunc) error
	tokens []int // of the passes in which forward is called
	want   error
}

func checkNext(t *testing.T, cases []nextCase) {
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			mw := func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error { return tt.mw(ctx, next) }
			}
			r, err := fwd.New(fwd.Config{Name: "target"}, fwd.WithMiddleware(mw))
			if err != nil {
				t.Fatal(err)
			}
			var tokens []int
			err = r.Run(t.Context(), fwd.Pass{NumTokens: 3}, func(ctx context.Context) error {
				tokens = append(tokens, fwd.MustFromContext(ctx).NumTokens)
				return nil
			})
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if diff := cmp.Diff(tt.tokens, tokens); diff != "" {
				t.Errorf("forward ran in passes of these tokens (-want +got):\n%s", diff)
			}
		})
	}
}

// A middleware may give next another context of the pass, and call it again or not at all. A
// context from outside the pass is refused.
func TestMiddlewareNext(t *testing.T) {
	t.Parallel()
	errOwn := errors.New("own")
	checkNext(t, []nextCase{
		{"as it is", func(ctx context.Context, next fwd.ForwardFunc) error { return next(ctx) }, []int{3}, nil},
		{"derived", func(ctx context.Context, next fwd.ForwardFunc) error {
			ctx, cancel := context.WithCancel(context.WithValue(ctx, passKey{}, "derived"))
			defer cancel()
			return next(ctx)
		}, []int{3}, nil},
		{"with sizes", func(ctx context.Context, next fwd.ForwardFunc) error {
			ctx, err := fwd.WithSPLocalSizes(ctx, 1)
			if err != nil {
				return err
			}
			return next(ctx)
		}, []int{3}, nil},
		{"with metadata", func(ctx context.Context, next fwd.ForwardFunc) error {
			ctx, err := fwd.WithMetadata(ctx, fwd.AllLayers(1), nil)
			if err != nil {
				return err
			}
			return next(ctx)
		}, []int{3}, nil},
		{"another forward context", func(ctx context.Context, next fwd.ForwardFunc) error {
			fc := *fwd.MustFromContext(ctx)
			fc.NumTokens = 7
			return next(fwd.NewContext(ctx, &fc))
		}, []int{7}, nil},
		{"twice", func(ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(next(ctx), next(ctx))
		}, []int{3, 3}, nil},
		{"not at all", func(context.Context, fwd.ForwardFunc) error { return nil }, nil, nil},
		{"its own error", func(ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(next(ctx), errOwn)
		}, []int{3}, errOwn},
		{"on another goroutine", func(ctx context.Context, next fwd.ForwardFunc) error {
			done := make(chan error)
			go func() { done <- next(ctx) }()
			return <-done
		}, []int{3}, nil},
		{"foreign", func(_ context.Context, next fwd.ForwardFunc) error {
			return next(context.Background())
		}, nil, fwd.ErrNoForwardContext},
		{"foreign forward context", func(_ context.Context, next fwd.ForwardFunc) error {
			return next(fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: 5}))
		}, nil, fwd.ErrNoForwardContext},
	})
}

// A middleware may put another Runner's pass around next, or run one beside it.
func TestMiddlewareNestsOtherRunners(t *testing.T) {
	t.Parallel()
	through := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { return next(ctx) }
	}
	draft, err := fwd.New(fwd.Config{Name: "draft"}, fwd.WithMiddleware(through, through))
	if err != nil {
		t.Fatal(err)
	}
	pass := fwd.Pass{NumTokens: 5}
	checkNext(t, []nextCase{
		{"around next", func(ctx context.Context, next fwd.ForwardFunc) error {
			return draft.Run(ctx, pass, next)
		}, []int{5}, nil},
		{"twice around next", func(ctx context.Context, next fwd.ForwardFunc) error {
			return draft.Run(ctx, pass, func(ctx context.Context) error {
				return draft.Run(ctx, fwd.Pass{NumTokens: 6}, next)
			})
		}, []int{6}, nil},
		{"around next, again", func(ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(draft.Run(ctx, pass, next), next(ctx), draft.Run(ctx, pass, next))
		}, []int{5, 3, 5}, nil},
		{"a nil Runner's", func(ctx context.Context, next fwd.ForwardFunc) error {
			return (*fwd.Runner)(nil).Run(ctx, pass, next)
		}, []int{5}, nil},
		{"before next", func(ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(draft.Run(ctx, pass, nothing), next(ctx))
		}, []int{3}, nil},
		{"started", func(ctx context.Context, next fwd.ForwardFunc) error {
			ctx, end, err := draft.Start(ctx, pass)
			if err != nil {
				return err
			}
			defer end(nil)
			return next(ctx)
		}, []int{5}, nil},
		{"foreign", func(_ context.Context, next fwd.ForwardFunc) error {
			return draft.Run(context.Background(), pass, next)
		}, nil, fwd.ErrNoForwardContext},
	})
}

// A middleware that runs another pass of its own Runner around next is refused, in whatever way it
// does so: it would go round in circles. Beside next it may.
func TestMiddlewareOfOwnRunner(t *testing.T) {
	t.Parallel()
	dummy := fwd.Pass{NumTokens: 2, Dummy: true}
	for name, tt := range map[string]struct {
		around func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error
		within func(ctx context.Context) context.Context // what the dummy pass gives next
		want   error
		calls  int
	}{
		"around": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return r.Run(ctx, dummy, next)
		}, nil, fwd.ErrInvalid, 0},
		"around, with a derived context": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return r.Run(ctx, dummy, func(ctx context.Context) error {
				return next(context.WithValue(ctx, passKey{}, 1))
			})
		}, nil, fwd.ErrInvalid, 0},
		"around, with NewContext": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return r.Run(ctx, dummy, next)
		}, func(ctx context.Context) context.Context {
			return fwd.NewContext(ctx, fwd.MustFromContext(ctx))
		}, fwd.ErrInvalid, 0},
		"around, in another Runner's pass": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return (*fwd.Runner)(nil).Run(ctx, fwd.Pass{NumTokens: 9}, func(ctx context.Context) error {
				return r.Run(ctx, dummy, next)
			})
		}, nil, fwd.ErrInvalid, 0},
		"before": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(r.Run(ctx, dummy, nothing), next(ctx))
		}, nil, nil, 1},
		"after, and again": {func(r *fwd.Runner, ctx context.Context, next fwd.ForwardFunc) error {
			return errors.Join(next(ctx), r.Run(ctx, dummy, nothing), next(ctx))
		}, nil, nil, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *fwd.Runner
			r, err := fwd.New(fwd.Config{}, fwd.WithMiddleware(func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					switch {
					case !fwd.MustFromContext(ctx).Dummy:
						return tt.around(r, ctx, next)
					case tt.within != nil:
						ctx = tt.within(ctx)
					}
					return next(ctx)
				}
			}))
			if err != nil {
				t.Fatal(err)
			}
			calls := 0
			err = r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { calls++; return nil })
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) || calls != tt.calls {
				t.Errorf("%d calls, error %v; want %d, %v", calls, err, tt.calls, tt.want)
			}
		})
	}
}

// A pass of the same Runner inside its own forward function has a forward function of its own.
func TestNestedMiddleware(t *testing.T) {
	t.Parallel()
	var log []string
	composed := 0
	r, err := fwd.New(fwd.Config{}, fwd.WithMiddleware(middlewareLog(&log, &composed, "m")))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
		return r.Run(ctx, fwd.Pass{NumTokens: 2}, func(ctx context.Context) error {
			log = append(log, fmt.Sprint("forward ", fwd.MustFromContext(ctx).NumTokens))
			return nil
		})
	}); err != nil {
		t.Error(err)
	}
	want := []string{"enter m 1", "enter m 2", "forward 2", "leave m <nil>", "leave m <nil>"}
	if diff := cmp.Diff(want, log); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Run calls forward on the calling goroutine, with or without middleware: what it recovers and
// exits is the caller's.
func TestRunPanicPassesThrough(t *testing.T) {
	t.Parallel()
	synced := 0
	r, err := fwd.New(fwd.Config{},
		fwd.WithMiddleware(func(next fwd.ForwardFunc) fwd.ForwardFunc { return next }),
		fwd.WithSynchronize(func(ctx context.Context) error {
			if _, ok := fwd.FromContext(ctx); !ok {
				t.Error("the synchronisation is outside the pass")
			}
			synced++
			return nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range []*fwd.Runner{r, nil} {
		func() {
			defer func() {
				if got := recover(); got != "boom" {
					t.Errorf("recovered %v, want the panic as it is", got)
				}
			}()
			_ = r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { panic("boom") })
		}()
		done := make(chan bool, 1)
		go func() {
			defer func() { done <- recover() == nil }()
			_ = r.Run(t.Context(), fwd.Pass{NumTokens: 1},
				func(context.Context) error { runtime.Goexit(); return nil })
			t.Error("Run returned from a goroutine that exited")
		}()
		if !<-done {
			t.Error("an exit became a panic")
		}
		if err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
			t.Errorf("Runner %d afterwards: %v", i, err)
		}
	}
	if synced != 3 {
		t.Errorf("%d synchronisations in 3 passes of the Runner that has one", synced)
	}
}

// The synchronisation's error fails the pass, beside forward's own.
func TestSynchronizeError(t *testing.T) {
	t.Parallel()
	errSync, errOwn := errors.New("synchronisation"), errors.New("own")
	var fail error
	r, err := fwd.New(fwd.Config{}, fwd.WithSynchronize(func(context.Context) error { return fail }))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ sync, own error }{
		{nil, nil}, {errSync, nil}, {nil, errOwn}, {errSync, errOwn},
	} {
		fail = tt.sync
		err := r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return tt.own })
		if errors.Is(err, errSync) != (tt.sync != nil) || errors.Is(err, errOwn) != (tt.own != nil) ||
			(err == nil) != (tt.sync == nil && tt.own == nil) {
			t.Errorf("synchronisation %v, forward %v: %v", tt.sync, tt.own, err)
		}
	}
}

// A started pass may end in another goroutine, and ends once.
func TestStart(t *testing.T) {
	t.Parallel()
	var ends atomic.Int32
	r, err := fwd.New(fwd.Config{}, fwd.WithSynchronize(func(context.Context) error { ends.Add(1); return nil }))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*fwd.Runner{r, nil} {
		ctx, end, err := r.Start(t.Context(), passOf("started", 3))
		if err != nil {
			t.Fatal(err)
		}
		passCheck(t, "started", ctx, "started", 3, nil, -1)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { end(errors.New("any")) })
		}
		wg.Wait()
		end(nil)
		passCheck(t, "ended", ctx, "started", 3, nil, -1)
		if ctx.Err() != nil {
			t.Errorf("the end of the pass has ended its context: %v", ctx.Err())
		}
	}
	if ends.Load() != 1 {
		t.Errorf("the pass ended %d times", ends.Load())
	}
}

// With an error Start leaves the caller's context as it was, and an end that can be deferred.
func TestStartRefused(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}},
		fwd.WithSynchronize(func(context.Context) error { t.Error("a pass that has not begun ends"); return nil }))
	if err != nil {
		t.Fatal(err)
	}
	idle := &fwd.Agreement{Idle: true, NumTokensAcrossDP: vec(1, 1)}
	for name, tt := range map[string]struct {
		pass fwd.Pass
		want error
	}{
		"bad counts":            {fwd.Pass{NumTokens: -1}, fwd.ErrInvalid},
		"another rank's tokens": {fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(2, 1)}, fwd.ErrTokenMismatch},
		"no coordinator":        {fwd.Pass{NumTokens: 1}, fwd.ErrInvalid},
		"every rank is idle":    {fwd.Pass{NumTokens: 1, Dummy: true, Agreement: idle}, fwd.ErrInvalid},
	} {
		outer := context.WithValue(t.Context(), passKey{}, "outer")
		func() {
			ctx, end, err := r.Start(outer, tt.pass)
			defer end(nil)
			if ctx != outer || !errors.Is(err, tt.want) {
				t.Errorf("%s: ctx as it was: %t, %v; want %v", name, ctx == outer, err, tt.want)
			}
			end(err)
		}()
	}
	if s := r.Status(); s.Active != 0 {
		t.Errorf("%d passes are active, want none", s.Active)
	}
}

// The synchronisation's context is one of the pass, with all its values, and is never cancelled:
// the next pass uses the same buffers.
func TestSynchronizeContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), passKey{}, "kept"), time.Hour)
	defer cancel()
	calls := 0
	r, err := fwd.New(fwd.Config{}, fwd.WithSynchronize(func(ctx context.Context) error {
		calls++
		_, limited := ctx.Deadline()
		if ctx.Err() != nil || ctx.Done() != nil || limited {
			t.Errorf("the synchronisation can be cancelled: %v, deadline %t", ctx.Err(), limited)
		}
		if fwd.MustFromContext(ctx).NumTokens != 3 || ctx.Value(passKey{}) != "kept" {
			t.Error("the synchronisation is outside the pass")
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	pass := fwd.Pass{NumTokens: 3}
	if err := r.Run(ctx, pass, func(context.Context) error { cancel(); return nil }); err != nil {
		t.Error(err)
	}
	if err := r.Run(context.WithValue(context.Background(), passKey{}, "kept"), pass, nothing); err != nil {
		t.Error(err)
	}
	_, end, err := r.Start(ctx, pass)
	if err != nil {
		t.Fatal(err)
	}
	if end(nil); calls != 3 {
		t.Errorf("%d synchronisations, want 3", calls)
	}
}

// A nil Runner runs passes as rank 0 of 1.
func TestNilRunner(t *testing.T) {
	t.Parallel()
	var r *fwd.Runner
	errOwn := errors.New("own")
	if err := r.Run(t.Context(), passOf("pass", 3), func(ctx context.Context) error {
		passCheck(t, "nil Runner", ctx, "pass", 3, nil, -1)
		if dp := fwd.MustFromContext(ctx).DP; dp != nil {
			t.Errorf("DP metadata of rank %d of %d", dp.Rank(), dp.Size())
		}
		if _, err := fwd.Layer[int](ctx, "a"); !errors.Is(err, fwd.ErrLayer) {
			t.Errorf("Layer: %v, want %v", err, fwd.ErrLayer)
		}
		return errOwn
	}); err != errOwn {
		t.Errorf("error %v, want %v", err, errOwn)
	}
}

// Run does not look at ctx: forward runs, and sees that it has ended.
func TestRunWithEndedContext(t *testing.T) {
	t.Parallel()
	r, err := fwd.New(fwd.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, r := range []*fwd.Runner{r, nil} {
		called := false
		err := r.Run(ctx, fwd.Pass{NumTokens: 1}, func(ctx context.Context) error {
			called = true
			return ctx.Err()
		})
		if !called || !errors.Is(err, context.Canceled) {
			t.Errorf("called %t, error %v; want %v from forward", called, err, context.Canceled)
		}
	}
}
