// This file tests microbatches: how a pass is split, and how its parts run.

package fwd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

func TestRelaxVectors(t *testing.T) {
	type vector struct {
		Batch vectorBatch `json:"batch"`
		Want  vectorBatch `json:"want"`
	}
	for _, v := range readVectors[vector](t, "relax.json", 8) {
		if got := v.Batch.descriptor().RelaxForMixedBatchGraphs(); got != v.Want.descriptor() {
			t.Errorf("%+v relaxed is %+v, want %+v", v.Batch.descriptor(), got, v.Want.descriptor())
		}
	}
}

func TestSplitUBatchesVectors(t *testing.T) {
	type slice struct {
		Request [2]int `json:"request"`
		Token   [2]int `json:"token"`
	}
	type vector struct {
		NumScheduledTokens []int   `json:"num_scheduled_tokens"`
		NumTokensPadded    int     `json:"num_tokens_padded"`
		NumReqsPadded      int     `json:"num_reqs_padded"`
		NumUBatches        int     `json:"num_ubatches"`
		SplitPoint         *int    `json:"split_point"`
		Want               []slice `json:"want"`
		WantPadded         []slice `json:"want_padded"`
	}
	convert := func(slices []slice) (u []fwd.UBatchSlice) {
		for _, s := range slices {
			u = append(u, fwd.UBatchSlice{
				Requests: fwd.Range{Start: s.Request[0], Stop: s.Request[1]},
				Tokens:   fwd.Range{Start: s.Token[0], Stop: s.Token[1]},
			})
		}
		return u
	}
	for i, v := range readVectors[vector](t, "ubatch_slices.json", 60) {
		split := 0
		if v.SplitPoint != nil {
			split = *v.SplitPoint
		}
		slices, padded, err := fwd.SplitUBatches(v.NumScheduledTokens, v.NumTokensPadded, v.NumReqsPadded,
			v.NumUBatches, split)
		if err != nil {
			t.Errorf("case %d: %v; want %v", i, err, v.Want)
			continue
		}
		if diff := cmp.Diff(convert(v.Want), slices); diff != "" {
			t.Errorf("case %d: slices (-want +got):\n%s", i, diff)
		}
		if diff := cmp.Diff(convert(v.WantPadded), padded); diff != "" {
			t.Errorf("case %d: padded (-want +got):\n%s", i, diff)
		}
	}
}

func TestLastUBatchEmptyVectors(t *testing.T) {
	type vector struct {
		Orig   int  `json:"orig"`
		Padded int  `json:"padded"`
		N      int  `json:"n"`
		Want   bool `json:"want"`
	}
	for _, v := range readVectors[vector](t, "last_ubatch_empty.json", 24) {
		if got := fwd.LastUBatchEmpty(v.Orig, v.Padded, v.N); got != v.Want {
			t.Errorf("%d tokens padded to %d in %d microbatches: last empty %t, want %t", v.Orig, v.Padded, v.N, got,
				v.Want)
		}
	}
}

// ubatchRun runs fn in each microbatch of a pass.
func ubatchRun(t *testing.T, p fwd.Pass, fn func(ctx context.Context, i int) error) error {
	t.Helper()
	var r *fwd.Runner
	return r.Run(t.Context(), p, func(ctx context.Context) error { return fwd.RunUBatches(ctx, fn) })
}

// Microbatches run at the same time: each one can end only once another, before or after it, has
// started.
func TestUBatchesRunAtOnce(t *testing.T) {
	t.Parallel()
	for _, n := range []int{2, 3, 4} {
		for _, step := range []int{1, n - 1} { // each waits for its right neighbour, or for its left one
			t.Run(fmt.Sprintf("n=%d/step=%d", n, step), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { // which fails where all wait
					started := make([]chan struct{}, n)
					for i := range started {
						started[i] = make(chan struct{})
					}
					if err := ubatchRun(t, ubatchPass(n), func(_ context.Context, i int) error {
						close(started[i])
						<-started[(i+step)%n]
						return nil
					}); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// ubatchSeen is what a microbatch sees of its forward context.
type ubatchSeen struct {
	Tokens, Unpadded, Engine int
	Part                     fwd.UBatchSlice
	Counts                   []int
	Rank, Max                int
	Mode                     fwd.GraphMode
	Batch                    fwd.BatchDescriptor
	Slices                   int
	Attn, Any                string
	Slot, Layer              int
	Index, N                 int
	Skip, Dummy              bool
}

// Each microbatch has a forward context of its own, derived from the pass's.
func TestUBatchForwardContext(t *testing.T) {
	t.Parallel()
	layers := map[string]any{"layer": 42}
	r, err := fwd.New(
		fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 3, DataParallelRank: 1}, Layers: layers},
	)
	if err != nil {
		t.Fatal(err)
	}
	batch := fwd.BatchDescriptor{NumTokens: 12, NumReqs: 6, Uniform: true, HasLoRA: true, NumActiveLoRAs: 2}
	p := fwd.Pass{
		NumTokens: 12, NumTokensUnpadded: 6, VirtualEngine: 3, NumTokensAcrossDP: vec(12, 12, 12),
		GraphMode: fwd.GraphFull, Batch: batch,
		UBatches:     planSlices([4]int{0, 2, 0, 4}, [4]int{1, 4, 4, 9}, [4]int{4, 6, 9, 12}),
		AttnMetadata: []map[string]any{{"a": "a0", "": "any0"}, {"a": "a1", "": "any1"}, {"a": "a2"}},
		SlotMapping:  []map[string]any{{"a": 0}, {"a": 1}, {"a": 2}},
		SkipCompiled: true, Dummy: true,
	}
	whole := planSlices([4]int{0, 6, 0, 12})[0]
	got := make([]ubatchSeen, 3)
	kept := make([]context.Context, 3)
	if err := r.Run(t.Context(), p, func(outer context.Context) error {
		sized, err := fwd.WithSPLocalSizes(outer, 1)
		if err != nil {
			return err
		}
		err = fwd.RunUBatches(sized, func(ctx context.Context, i int) error {
			fc := fwd.MustFromContext(ctx)
			index, n, ok := fwd.UBatch(ctx)
			if !ok {
				return errors.New("in no microbatch")
			}
			attn, err1 := fwd.AttnMetadata[string](ctx, "a")
			fallback, err2 := fwd.AttnMetadata[string](ctx, "other")
			if errors.Is(err2, fwd.ErrLayer) && i == 2 {
				err2 = nil
			}
			slot, err3 := fwd.SlotMapping[int](ctx, "a")
			layer, err4 := fwd.Layer[int](ctx, "layer")
			got[i] = ubatchSeen{
				fc.NumTokens, fc.NumTokensUnpadded, fc.VirtualEngine, fc.Part,
				counts(fc.DP.NumTokensAcrossDPTo(nil)), fc.DP.Rank(), fc.DP.MaxTokensAcrossDP(),
				fc.GraphMode, fc.Batch, len(fc.UBatches), attn, fallback, slot, layer, index, n,
				fc.SkipCompiled, fc.Dummy,
			}
			dpNoSizes(t, "in a microbatch", ctx)
			kept[i] = ctx
			return errors.Join(err1, err2, err3, err4)
		})
		// A split pass uses no graph.
		if fc := fwd.MustFromContext(sized); fc.NumTokens != 12 || fc.GraphMode != fwd.GraphNone ||
			len(fc.UBatches) != 3 || fc.DP.NumTokens(2) != 12 || fc.Part != whole {
			t.Errorf("afterwards the pass is %+v", fc)
		}
		if _, _, ok := fwd.UBatch(sized); ok {
			t.Error("the pass is in a microbatch")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	none, parts := fwd.GraphNone, p.UBatches
	want := []ubatchSeen{
		{4, 4, 3, parts[0], []int{4, 4, 4}, 1, 4, none, batch, 0, "a0", "any0", 0, 42, 0, 3, true, true},
		{5, 2, 3, parts[1], []int{5, 5, 5}, 1, 5, none, batch, 0, "a1", "any1", 1, 42, 1, 3, true, true},
		{3, 0, 3, parts[2], []int{3, 3, 3}, 1, 3, none, batch, 0, "a2", "", 2, 42, 2, 3, true, true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("microbatches (-want +got):\n%s", diff)
	}
	for i, ctx := range kept { // they outlive their goroutines
		if attn, err := fwd.AttnMetadata[string](ctx, "a"); attn != want[i].Attn || err != nil ||
			fwd.MustFromContext(ctx).NumTokens != want[i].Tokens {
			t.Errorf("microbatch %d afterwards: %q, %v, %+v", i, attn, err, fwd.MustFromContext(ctx))
		}
	}
}

// A microbatch uses no graph, even if a forward context that somebody made by hand says that its pass does.
func TestUBatchUsesNoGraph(t *testing.T) {
	t.Parallel()
	ctx := fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 4, GraphMode: fwd.GraphFull,
		UBatches: planSlices([4]int{0, 1, 0, 2}, [4]int{1, 2, 2, 4}),
	})
	if err := fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
		if mode := fwd.MustFromContext(ctx).GraphMode; mode != fwd.GraphNone {
			t.Errorf("microbatch %d runs in mode %v, want NONE", i, mode)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// A microbatch is not split again.
func TestRunUBatchesInUBatch(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	if err := ubatchRun(t, ubatchPass(2), func(ctx context.Context, i int) error {
		return fwd.RunUBatches(ctx, func(inner context.Context, k int) error {
			calls.Add(1)
			if k != 0 || inner != ctx {
				t.Errorf("RunUBatches inside microbatch %d calls with %d and another ctx", i, k)
			}
			return nil
		})
	}); err != nil || calls.Load() != 2 {
		t.Errorf("RunUBatches inside two microbatches calls %d times, %v; want 2", calls.Load(), err)
	}
}

// A microbatch without metadata has none, as the pass.
func TestUBatchWithoutMetadata(t *testing.T) {
	t.Parallel()
	p := ubatchPass(2)
	p.AttnMetadata, p.SlotMapping = nil, nil
	if err := ubatchRun(t, p, func(ctx context.Context, i int) error {
		if _, err := fwd.AttnMetadata[string](ctx, "attn"); !errors.Is(err, fwd.ErrNoMetadata) {
			t.Errorf("AttnMetadata: %v, want %v", err, fwd.ErrNoMetadata)
		}
		if _, err := fwd.SlotMapping[int](ctx, "attn"); !errors.Is(err, fwd.ErrNoMetadata) {
			t.Errorf("SlotMapping: %v, want %v", err, fwd.ErrNoMetadata)
		}
		if dp := fwd.MustFromContext(ctx).DP; dp != nil {
			t.Errorf("microbatch %d has DP metadata", i)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// Outside its microbatches a split pass has no metadata of a layer that one could mean.
func TestSplitMetadataOutsideUBatch(t *testing.T) {
	t.Parallel()
	var r *fwd.Runner
	if err := r.Run(t.Context(), ubatchPass(2), func(ctx context.Context) error {
		for _, layer := range []string{"attn", "unknown"} {
			if got, err := fwd.AttnMetadata[string](ctx, layer); got != "" || !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("AttnMetadata of %q = %q, %v; want %v", layer, got, err, fwd.ErrInvalid)
			}
			if got, err := fwd.SlotMapping[int](ctx, layer); got != 0 || !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("SlotMapping of %q = %v, %v; want %v", layer, got, err, fwd.ErrInvalid)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// The first error cancels the contexts of the others and comes back with its index.
func TestUBatchFirstError(t *testing.T) {
	t.Parallel()
	errFirst, errLater := errors.New("first"), errors.New("later")
	for failing := range 3 {
		t.Run(fmt.Sprint(failing), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var causes [3]error
				err := ubatchRun(t, ubatchPass(3), func(ctx context.Context, i int) error {
					if i == failing {
						synctest.Wait() // the others wait for the end of their contexts
						return errFirst
					}
					<-ctx.Done()
					causes[i] = context.Cause(ctx)
					return errLater
				})
				var got *fwd.UBatchError
				if !errors.As(err, &got) || got.Index != failing || got.Err != errFirst || !errors.Is(err, errFirst) ||
					errors.Is(err, errLater) {
					t.Errorf("error %v, want the first one, of microbatch %d", err, failing)
				}
				if !strings.Contains(err.Error(), fmt.Sprint(failing)) || !strings.Contains(err.Error(), "first") {
					t.Errorf("the error %q does not say which microbatch failed, or how", err)
				}
				for i, cause := range causes {
					if i != failing && !errors.Is(cause, errFirst) {
						t.Errorf("the context of microbatch %d ended with %v, want %v", i, cause, errFirst)
					}
				}
			})
		})
	}
}

// The caller's context stays as it is when a microbatch fails, and its end reaches the
// microbatches.
func TestUBatchContexts(t *testing.T) {
	t.Parallel()
	var r *fwd.Runner
	parent, cancel := context.WithCancelCause(t.Context())
	errStop := errors.New("stop")
	if err := r.Run(parent, ubatchPass(2), func(ctx context.Context) error {
		err := fwd.RunUBatches(ctx, func(context.Context, int) error { return errStop })
		if !errors.Is(err, errStop) {
			t.Errorf("error %v, want %v", err, errStop)
		}
		if ctx.Err() != nil {
			t.Errorf("the pass's context has ended: %v", ctx.Err())
		}
		return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
			if i == 0 {
				cancel(errStop)
			}
			<-ctx.Done()
			if cause := context.Cause(ctx); cause != errStop {
				t.Errorf("microbatch %d ended with %v, want %v", i, cause, errStop)
			}
			return nil
		})
	}); err != nil {
		t.Error(err)
	}
}

// ubatchPanics is named in the stack of the panic.
func ubatchPanics(value any) { panic(value) }

// A panic reaches the caller with value and stack, once the other microbatches have stopped; it
// goes before errors.
func TestUBatchPanic(t *testing.T) {
	t.Parallel()
	errValue := errors.New("a value that is an error")
	for _, value := range []any{"boom", 42, errValue} {
		t.Run(fmt.Sprint(value), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var stopped atomic.Int32
				defer func() {
					got, ok := recover().(*fwd.UBatchPanic)
					if !ok {
						t.Fatalf("recovered %v, want a *UBatchPanic", got)
					}
					if got.Index != 1 || got.Value != value {
						t.Errorf("microbatch %d panicked with %v, want 1 with %v", got.Index, got.Value, value)
					}
					if !strings.Contains(string(got.Stack), "ubatchPanics") ||
						!strings.Contains(string(got.Stack), "TestUBatchPanic") {
						t.Errorf("the stack does not name what panicked:\n%s", got.Stack)
					}
					if n := stopped.Load(); n != 2 {
						t.Errorf("the panic came when %d of 2 other microbatches had stopped", n)
					}
					if errors.Is(got, errValue) != (value == errValue) || !strings.Contains(got.Error(), fmt.Sprint(value)) {
						t.Errorf("the panic %q does not show its value", got.Error())
					}
				}()
				err := ubatchRun(t, ubatchPass(3), func(ctx context.Context, i int) error {
					if i == 1 {
						synctest.Wait()
						ubatchPanics(value)
					}
					<-ctx.Done()            // by the panic
					time.Sleep(time.Second) // of simulated time
					stopped.Add(1)
					return errors.New("an error after the panic")
				})
				t.Errorf("RunUBatches returned %v", err)
			})
		})
	}
}

// A panic after another microbatch's error still goes before it.
func TestUBatchPanicAfterError(t *testing.T) {
	t.Parallel()
	defer func() {
		if got, ok := recover().(*fwd.UBatchPanic); !ok || got.Index != 1 || got.Value != "late" {
			t.Errorf("recovered %v, want the panic of microbatch 1", got)
		}
	}()
	err := ubatchRun(t, ubatchPass(2), func(ctx context.Context, i int) error {
		if i == 0 {
			return errors.New("an error")
		}
		<-ctx.Done()
		panic("late")
	})
	t.Errorf("RunUBatches returned %v", err)
}

// A microbatch that exits its goroutine exits the caller's, once the others have stopped.
func TestUBatchGoexit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var stopped, returned atomic.Bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = ubatchRun(t, ubatchPass(2), func(ctx context.Context, i int) error {
				if i == 0 {
					runtime.Goexit()
				}
				<-ctx.Done()
				time.Sleep(time.Second) // of simulated time
				stopped.Store(true)
				return nil
			})
			returned.Store(true)
		}()
		<-done
		if returned.Load() || !stopped.Load() {
			t.Errorf("RunUBatches returned: %t; the other microbatch had stopped: %t", returned.Load(), stopped.Load())
		}
	})
}

// However microbatches end, no goroutine is left.
func TestUBatchNoGoroutineLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	for i := range 100 {
		func() {
			defer func() { _ = recover() }()
			_ = ubatchRun(t, ubatchPass(4), func(ctx context.Context, k int) error {
				switch {
				case k != i%4:
				case i%3 == 0:
					return errors.New("an error")
				case i%3 == 1:
					panic("a panic")
				}
				return nil
			})
		}()
	}
	settleGoroutines(t, before)
}

// Ranks with unequal counts can't split at the same tokens.
func TestUBatchUnequalCounts(t *testing.T) {
	t.Parallel()
	never := func(context.Context, int) error { t.Error("a microbatch runs"); return nil }
	p := ubatchPass(2)
	p.NumTokensAcrossDP = vec(8, 9)
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}})
	if err != nil {
		t.Fatal(err)
	}
	err = r.Run(t.Context(), p, func(context.Context) error { t.Error("the pass runs"); return nil })
	if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), "8") ||
		!strings.Contains(err.Error(), "9") {
		t.Errorf("Run: %v, want %v with both counts", err, fwd.ErrInvalid)
	}
	ctx := fwd.NewContext(t.Context(),
		&fwd.ForwardContext{NumTokens: 8, DP: dpMetadata(t, 0, 8, 7), UBatches: p.UBatches})
	if err := fwd.RunUBatches(ctx, never); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("RunUBatches: %v, want %v", err, fwd.ErrInvalid)
	}
	p.NumTokensAcrossDP = vec(8, 8)
	if err := r.Run(t.Context(), p, func(context.Context) error { return nil }); err != nil {
		t.Errorf("with equal counts: %v", err)
	}
}

// A pass that is not split calls once, on the caller's goroutine and with its context.
func TestRunUBatchesUnsplit(t *testing.T) {
	t.Parallel()
	var r *fwd.Runner
	errOwn := errors.New("own")
	pass := fwd.Pass{NumTokens: 3, GraphMode: fwd.GraphFull, AttnMetadata: []map[string]any{{"": 1}}}
	if err := r.Run(t.Context(), pass, func(ctx context.Context) error {
		calls := 0
		err := fwd.RunUBatches(ctx, func(inner context.Context, i int) error {
			calls++
			if inner != ctx || i != 0 {
				t.Errorf("called with index %d and ctx %v, want 0 and %v", i, inner, ctx)
			}
			if _, _, ok := fwd.UBatch(inner); ok {
				t.Error("in a microbatch")
			}
			return errOwn
		})
		if calls != 1 || err != errOwn {
			t.Errorf("%d calls, error %v; want 1 and %v", calls, err, errOwn)
		}
		func() {
			defer func() {
				if got := recover(); got != "own panic" {
					t.Errorf("recovered %v, want the panic as it is", got)
				}
			}()
			_ = fwd.RunUBatches(ctx, func(context.Context, int) error { panic("own panic") })
		}()
		return nil
	}); err != nil {
		t.Error(err)
	}
	for _, ctx := range []context.Context{t.Context(), fwd.NewContext(t.Context(), nil)} {
		err := fwd.RunUBatches(ctx, func(context.Context, int) error { t.Error("called"); return nil })
		if !errors.Is(err, fwd.ErrNoForwardContext) {
			t.Errorf("outside a pass: %v, want %v", err, fwd.ErrNoForwardContext)
		}
	}
}

// What a batch is split into has names that other languages write the same.
func TestUBatchSliceJSON(t *testing.T) {
	t.Parallel()
	slice := planSlices([4]int{1, 4, 16, 40})[0]
	const want = `{"requests":{"start":1,"stop":4},"tokens":{"start":16,"stop":40}}`
	text, err := json.Marshal(slice)
	if err != nil || string(text) != want {
		t.Errorf("%v marshals as %s, %v; want %s", slice, text, err, want)
	}
	var got fwd.UBatchSlice
	if err := json.Unmarshal([]byte(want), &got); err != nil || got != slice {
		t.Errorf("%s is %v, %v; want %v", want, got, err, slice)
	}
}

// The parts of a pass are what its metadata is for, in the order of its maps.
func TestParts(t *testing.T) {
	t.Parallel()
	split := ubatchPass(3)
	for _, tt := range []struct {
		name string
		pass fwd.Pass
		want []fwd.UBatchSlice
	}{
		{"whole", fwd.Pass{NumTokens: 8, NumReqs: 3}, planSlices([4]int{0, 3, 0, 8})},
		{"requests not said", fwd.Pass{NumTokens: 8}, planSlices([4]int{0, 0, 0, 8})},
		{
			"padded requests",
			fwd.Pass{NumTokens: 8, NumReqs: 5, Batch: fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}},
			planSlices([4]int{0, 8, 0, 8}),
		},
		{"any number of requests", fwd.Pass{NumTokens: 8, NumReqs: 5, Batch: fwd.BatchDescriptor{NumTokens: 8}},
			planSlices([4]int{0, 5, 0, 8})},
		{"split", split, split.UBatches},
		{"dummy", fwd.Pass{NumTokens: 8, NumReqs: 3, Dummy: true}, nil},
	} {
		if diff := cmp.Diff(tt.want, tt.pass.Parts()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		// Each is the Part of the context that gets the metadata.
		if err := (*fwd.Runner)(nil).Run(t.Context(), tt.pass, func(ctx context.Context) error {
			return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
				if got := fwd.MustFromContext(ctx).Part; !tt.pass.Dummy && got != tt.want[i] {
					t.Errorf("%s: Part %d is %v, want %v", tt.name, i, got, tt.want[i])
				}
				return nil
			})
		}); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// Many ranks split a planned step, and each of their microbatches has its part of the agreed
// padding and metadata of its own.
func TestUBatchesOfManyRanks(t *testing.T) {
	t.Parallel()
	const ranks, n = 8, 4
	group := localGroup(t, ranks)
	var wg sync.WaitGroup
	for rank, c := range group {
		wg.Go(func() {
			r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{NumUBatches: n}}, fwd.WithCoordinator(c))
			if err != nil {
				t.Error(err)
				return
			}
			lengths := slices.Repeat([]int{128}, 5+rank%2) // 640 or 768 tokens
			pass, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: lengths, AllowUBatches: true})
			if err != nil {
				t.Error(err)
				return
			}
			parts := pass.Parts()
			if len(parts) != n || pass.NumTokens != 768 {
				t.Errorf("rank %d: %d tokens in the parts %v, want 768 in %d", rank, pass.NumTokens, parts, n)
				return
			}
			for _, part := range parts {
				pass.AttnMetadata = append(pass.AttnMetadata, fwd.AllLayers(part))
			}
			if err := r.Run(t.Context(), pass, func(ctx context.Context) error {
				return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
					fc := fwd.MustFromContext(ctx)
					attn := fwd.MustAttnMetadata[fwd.UBatchSlice](ctx, "layer")
					if fc.Part != parts[i] || attn != parts[i] || fc.NumTokens != 192 || fc.DP.NumTokens(ranks-1) != 192 {
						t.Errorf("rank %d, microbatch %d: %v with the metadata of %v", rank, i, fc.Part, attn)
					}
					return nil
				})
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
