// This file tests graph modes, the dispatcher and the graph cache.

package fwd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

func TestGraphModeVectors(t *testing.T) {
	type vector struct {
		Mode            fwd.GraphMode          `json:"mode"`
		DecodeMode      fwd.GraphMode          `json:"decode_mode"`
		MixedMode       fwd.GraphMode          `json:"mixed_mode"`
		SeparateRoutine bool                   `json:"separate_routine"`
		MaxMode         fwd.GraphMode          `json:"max_mode"`
		HasFull         bool                   `json:"has_full"`
		HasPiecewise    bool                   `json:"has_piecewise"`
		RequiresPieces  bool                   `json:"requires_piecewise_compilation"`
		ValidRuntime    bool                   `json:"valid_runtime_mode"`
		HasMode         map[fwd.GraphMode]bool `json:"has_mode"`
	}
	for _, want := range readVectors[vector](t, "graph_modes.json", 5) {
		m := want.Mode
		got := vector{
			m, m.DecodeMode(), m.MixedMode(), m.SeparateRoutine(), m.MaxMode(), m.HasFullGraphs(),
			m.HasPiecewiseGraphs(), m.HasPiecewiseGraphs(), m.ValidRuntime(), map[fwd.GraphMode]bool{},
		}
		for _, r := range []fwd.GraphMode{fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull} {
			got.HasMode[r] = m.HasMode(r)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", m, diff)
		}
	}
}

func TestDispatcherVectors(t *testing.T) {
	type vector struct {
		Mode           fwd.GraphMode `json:"mode"`
		CaptureSizes   []int         `json:"capture_sizes"`
		MaxNumSeqs     int           `json:"max_num_seqs"`
		QueryLen       int           `json:"uniform_decode_query_len"`
		MaxLoRAs       *int          `json:"max_loras"`
		SpecializeLoRA bool          `json:"specialize_lora"`
		SpecializeNum  bool          `json:"specialize_active_lora"`
		Calls          []struct {
			NumTokens      int           `json:"num_tokens"`
			UniformDecode  bool          `json:"uniform_decode"`
			NumActiveLoRAs int           `json:"num_active_loras"`
			DisableFull    bool          `json:"disable_full"`
			WantMode       fwd.GraphMode `json:"want_mode"`
			WantBatch      vectorBatch   `json:"want_batch"`
		} `json:"calls"`
		WantCaptures []struct {
			Mode       fwd.GraphMode `json:"mode"`
			TokensDesc []int         `json:"num_tokens_desc"`
			Keys       []vectorBatch `json:"keys"`
		} `json:"want_captures"`
	}
	for i, v := range readVectors[vector](t, "dispatcher.json", 24) {
		cfg := fwd.DispatcherConfig{
			Mode:                  v.Mode,
			CaptureSizes:          v.CaptureSizes,
			MaxNumSeqs:            v.MaxNumSeqs,
			UniformDecodeQueryLen: v.QueryLen,
		}
		if v.MaxLoRAs != nil {
			cfg.LoRA = &fwd.LoRAConfig{
				MaxLoRAs:        *v.MaxLoRAs,
				Unspecialized:   !v.SpecializeLoRA,
				SpecializeCount: v.SpecializeNum,
			}
		}
		d, err := fwd.NewDispatcher(cfg)
		if err != nil {
			t.Errorf("case %d: %v", i, err)
			continue
		}
		for _, call := range v.Calls {
			q := fwd.DispatchQuery{
				NumTokens:      call.NumTokens,
				UniformDecode:  call.UniformDecode,
				NumActiveLoRAs: call.NumActiveLoRAs,
				ExcludeFull:    call.DisableFull,
			}
			mode, batch, reason := d.Dispatch(q)
			if mode != call.WantMode || batch != call.WantBatch.descriptor() {
				t.Errorf("case %d, %+v: Dispatch(%+v) = %v, %+v (%v), want %v, %+v", i, cfg, q, mode, batch, reason,
					call.WantMode, call.WantBatch.descriptor())
			}
		}
		var want []fwd.Capture
		var wantTokens []int
		for _, c := range v.WantCaptures {
			wantTokens = append(wantTokens, c.TokensDesc...)
			for _, key := range c.Keys {
				want = append(want, fwd.Capture{Mode: c.Mode, Batch: key.descriptor()})
			}
		}
		got := d.Captures()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("case %d: captures (-want +got):\n%s", i, diff)
		}
		for k, c := range got {
			if c.Batch.NumTokens != wantTokens[k] {
				t.Errorf("case %d: capture %d has %d tokens, want %d", i, k, c.Batch.NumTokens, wantTokens[k])
			}
		}
	}
}

// query is short, so that a case fits into a line.
type query = fwd.DispatchQuery

// Modes, for the same purpose.
const (
	none   = fwd.GraphNone
	pieces = fwd.GraphPiecewise
	full   = fwd.GraphFull
	decode = fwd.GraphFullDecodeOnly
	both   = fwd.GraphFullAndPiecewise
)

// dispatchCase is a dispatch with graphs for up to 16 tokens, and up to 4 decode requests of 2
// tokens.
type dispatchCase struct {
	name string
	mode fwd.GraphMode // configured
	lora *fwd.LoRAConfig
	q    query
	got  fwd.GraphMode
	want fwd.Reason
}

func dispatchReasons(t *testing.T, cases []dispatchCase) {
	t.Helper()
	for _, tt := range cases {
		d := planDispatcher(t, fwd.DispatcherConfig{
			Mode: tt.mode, CaptureSizes: []int{2, 4, 8, 16}, MaxNumSeqs: 4, UniformDecodeQueryLen: 2, LoRA: tt.lora,
		})
		mode, batch, got := d.Dispatch(tt.q)
		if mode != tt.got || got != tt.want {
			t.Errorf("%s: %v, %+v because %v; want %v because %v", tt.name, mode, batch, got, tt.got, tt.want)
		}
		if mode == none && batch != (fwd.BatchDescriptor{NumTokens: tt.q.NumTokens}) {
			t.Errorf("%s: no graph, and the descriptor is %+v", tt.name, batch)
		}
	}
}

// Why a dispatch went as it did, for each reason that a dispatcher gives.
func TestDispatchReasons(t *testing.T) {
	t.Parallel()
	dispatchReasons(t, []dispatchCase{
		{"exact", both, nil, query{NumTokens: 6, UniformDecode: true}, full, fwd.ReasonExact},
		{"exact at the bound", both, nil, query{NumTokens: 8, UniformDecode: true}, full, fwd.ReasonExact},
		{"beyond the bound", both, nil, query{NumTokens: 10, UniformDecode: true}, pieces, fwd.ReasonRelaxed},
		{"beyond the bound, nothing else", decode, nil,
			query{NumTokens: 10, UniformDecode: true}, none, fwd.ReasonNoKey},
		{"mixed", both, nil, query{NumTokens: 6}, pieces, fwd.ReasonRelaxed},
		{"mixed, nothing there", decode, nil, query{NumTokens: 6}, none, fwd.ReasonNoKey},
		{"relaxed full", full, nil, query{NumTokens: 6}, full, fwd.ReasonRelaxed},
		{"relaxed full of decode", full, nil, query{NumTokens: 6, UniformDecode: true}, full, fwd.ReasonRelaxed},
		{"relaxed full excluded", full, nil, query{NumTokens: 6, ExcludeFull: true}, none, fwd.ReasonFullExcluded},
		{"exact excluded", both, nil,
			query{NumTokens: 6, UniformDecode: true, ExcludeFull: true}, pieces, fwd.ReasonFullExcluded},
		{"exact excluded, nothing else", decode, nil,
			query{NumTokens: 6, UniformDecode: true, ExcludeFull: true}, none, fwd.ReasonFullExcluded},
		{"excluded where there is none", pieces, nil,
			query{NumTokens: 6, UniformDecode: true, ExcludeFull: true}, pieces, fwd.ReasonRelaxed},
		{"none", none, nil, query{NumTokens: 6}, none, fwd.ReasonDisabled},
		{"none and too large", none, nil, query{NumTokens: 600}, none, fwd.ReasonDisabled},
		{"largest", pieces, nil, query{NumTokens: 16}, pieces, fwd.ReasonRelaxed},
		{"too large", pieces, nil, query{NumTokens: 17}, none, fwd.ReasonTooLarge},
	})
}

// Full graphs have room for MaxNumSeqs requests.
func TestDispatchRequests(t *testing.T) {
	t.Parallel()
	dispatchReasons(t, []dispatchCase{
		{"as many requests as MaxNumSeqs", full, nil, query{NumTokens: 6, NumReqs: 4}, full, fwd.ReasonRelaxed},
		{"more requests than MaxNumSeqs", full, nil, query{NumTokens: 6, NumReqs: 5}, none, fwd.ReasonTooLarge},
		{"more requests, exact", both, nil,
			query{NumTokens: 8, NumReqs: 5, UniformDecode: true}, pieces, fwd.ReasonTooLarge},
		{"more requests, nothing else", decode, nil,
			query{NumTokens: 8, NumReqs: 5, UniformDecode: true}, none, fwd.ReasonTooLarge},
		{"more requests, and excluded", full, nil,
			query{NumTokens: 6, NumReqs: 5, ExcludeFull: true}, none, fwd.ReasonFullExcluded},
		{"more requests where there is no full graph", pieces, nil,
			query{NumTokens: 6, NumReqs: 5}, pieces, fwd.ReasonRelaxed},
	})
}

// A batch with more active adapters than MaxLoRAs has no graph.
func TestDispatchLoRAs(t *testing.T) {
	t.Parallel()
	some := &fwd.LoRAConfig{MaxLoRAs: 4}
	byCount := &fwd.LoRAConfig{MaxLoRAs: 4, SpecializeCount: true}
	only := &fwd.LoRAConfig{MaxLoRAs: 4, Unspecialized: true}
	dispatchReasons(t, []dispatchCase{
		{"adapters, not configured", pieces, nil, query{NumTokens: 6, NumActiveLoRAs: 1}, none, fwd.ReasonLoRA},
		{"adapters", pieces, some, query{NumTokens: 6, NumActiveLoRAs: 4}, pieces, fwd.ReasonRelaxed},
		{"adapters, more than MaxLoRAs", pieces, some,
			query{NumTokens: 6, NumActiveLoRAs: 5}, none, fwd.ReasonLoRA},
		{"adapters by count", pieces, byCount, query{NumTokens: 6, NumActiveLoRAs: 3}, pieces, fwd.ReasonRelaxed},
		{"adapters by count, more than MaxLoRAs", pieces, byCount,
			query{NumTokens: 6, NumActiveLoRAs: 5}, none, fwd.ReasonLoRA},
		{"no adapters, and graphs only with", pieces, only, query{NumTokens: 6}, none, fwd.ReasonLoRA},
	})
}

// cacheCalls counts what a cache does.
type cacheCalls struct{ forwards, captures, replays atomic.Int32 }

func (c *cacheCalls) check(t *testing.T, when string, forwards, captures, replays int32) {
	t.Helper()
	got := [3]int32{c.forwards.Load(), c.captures.Load(), c.replays.Load()}
	if want := [3]int32{forwards, captures, replays}; got != want {
		t.Errorf("%s: %v forwards, captures and replays; want %v", when, got, want)
	}
}

func (c *cacheCalls) forward(context.Context) error { c.forwards.Add(1); return nil }
func (c *cacheCalls) replay(context.Context) error  { c.replays.Add(1); return nil }
func (c *cacheCalls) capture(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
	c.captures.Add(1)
	return c.replay, nil
}

// cachePass is a context in a pass with that mode and key.
func cachePass(ctx context.Context, mode fwd.GraphMode, tokens int) context.Context {
	return fwd.NewContext(ctx,
		&fwd.ForwardContext{NumTokens: tokens, GraphMode: mode, Batch: fwd.BatchDescriptor{NumTokens: tokens}})
}

// The first pass with a key captures and replays, the later ones replay. What has no graph is
// called.
func TestGraphCache(t *testing.T) {
	t.Parallel()
	for _, mode := range []fwd.GraphMode{fwd.GraphPiecewise, fwd.GraphFull} {
		other := fwd.GraphPiecewise + fwd.GraphFull - mode
		var calls cacheCalls
		c := cacheNew(t, mode, calls.forward, calls.capture)
		forward := func(ctx context.Context) {
			t.Helper()
			if err := c.Forward(ctx); err != nil {
				t.Error(err)
			}
		}
		var r *fwd.Runner
		run := func(p fwd.Pass) {
			t.Helper()
			if err := r.Run(t.Context(), p, c.Forward); err != nil {
				t.Error(err)
			}
		}
		run(fwd.Pass{NumTokens: 4, GraphMode: mode})
		calls.check(t, "the first pass", 0, 1, 1)
		run(fwd.Pass{NumTokens: 4, GraphMode: mode, Batch: fwd.BatchDescriptor{NumTokens: 4}})
		calls.check(t, "the second pass", 0, 1, 2)
		run(
			fwd.Pass{
				NumTokens: 4,
				GraphMode: mode,
				Batch:     fwd.BatchDescriptor{NumTokens: 4, NumReqs: 4, Uniform: true},
			},
		)
		calls.check(t, "another key with as many tokens", 0, 2, 3)
		run(fwd.Pass{NumTokens: 4, GraphMode: other})
		run(fwd.Pass{NumTokens: 4})
		forward(t.Context())
		forward(fwd.NewContext(cachePass(t.Context(), mode, 4), nil))
		calls.check(t, "another mode, none, no pass, a hidden pass", 4, 2, 3)
		split := ubatchPass(2)
		split.GraphMode = mode
		run(split)
		calls.check(t, "a split pass", 5, 2, 3)
		if err := r.Run(t.Context(), split, func(ctx context.Context) error {
			return fwd.RunUBatches(ctx, func(ctx context.Context, _ int) error { return c.Forward(ctx) })
		}); err != nil {
			t.Error(err)
		}
		calls.check(t, "its two microbatches", 7, 2, 3)
		if c.Len() != 2 {
			t.Errorf("%d graphs, want 2", c.Len())
		}
	}
}

// A pass without descriptor has no key. Run gives it one, a context made by hand may not.
func TestGraphCacheNoDescriptor(t *testing.T) {
	t.Parallel()
	var calls cacheCalls
	c := cacheNew(t, fwd.GraphFull, calls.forward, calls.capture)
	ctx := fwd.NewContext(t.Context(), &fwd.ForwardContext{NumTokens: 4, GraphMode: fwd.GraphFull})
	if err := c.Forward(ctx); !errors.Is(err, fwd.ErrNoDescriptor) {
		t.Errorf("%v, want %v", err, fwd.ErrNoDescriptor)
	}
	calls.check(t, "without descriptor", 0, 0, 0)
	ctx = fwd.NewContext(t.Context(), &fwd.ForwardContext{NumTokens: 4})
	if err := c.Forward(ctx); err != nil {
		t.Errorf("without descriptor in mode NONE: %v", err)
	}
	calls.check(t, "in mode NONE", 1, 0, 0)
}

// 100 passes that meet 10 unknown keys concurrently capture 10 times, and every pass replays.
func TestGraphCacheCapturesOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		release := make(chan struct{})
		var replays [11]atomic.Int32
		c := cacheNew(
			t,
			fwd.GraphPiecewise,
			calls.forward,
			func(_ context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				calls.captures.Add(1)
				<-release
				return func(ctx context.Context) error {
					if fc := fwd.MustFromContext(ctx); fc.Batch != key {
						t.Errorf("the graph of %+v replays for %+v", key, fc.Batch)
					}
					replays[key.NumTokens].Add(1)
					return nil
				}, nil
			},
		)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				if err := c.Forward(cachePass(t.Context(), fwd.GraphPiecewise, 1+i%10)); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait() // all wait for the captures
		if calls.captures.Load() != 10 || c.Len() != 0 {
			t.Errorf("%d captures have begun and %d have ended, want 10 and 0", calls.captures.Load(), c.Len())
		}
		close(release)
		wg.Wait()
		for key := 1; key <= 10; key++ {
			if n := replays[key].Load(); n != 10 {
				t.Errorf("key %d has %d replays, want 10", key, n)
			}
		}
		calls.check(t, "at the end", 0, 10, 0)
		if c.Len() != 10 {
			t.Errorf("%d graphs, want 10", c.Len())
		}
	})
}

// Keys are captured side by side: one that takes its time holds up neither another's capture nor a
// replay.
func TestGraphCacheKeysAreIndependent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		release := make(chan struct{})
		c := cacheNew(
			t,
			fwd.GraphFull,
			calls.forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				if key.NumTokens == 1 {
					<-release
				}
				return calls.capture(ctx, key)
			},
		)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		for range 2 {
			if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 2)); err != nil {
				t.Error(err)
			}
		}
		calls.check(t, "while the other key is captured", 0, 1, 2)
		close(release)
		wg.Wait()
		calls.check(t, "at the end", 0, 2, 3)
	})
}

// A failed capture fails the passes that wait for it, leaves no entry and is tried again by a later
// pass.
func TestGraphCacheFailedCapture(t *testing.T) {
	t.Parallel()
	errCapture := errors.New("out of memory")
	for _, tt := range []struct {
		name string
		fail func() (fwd.ForwardFunc, error)
		want error
	}{
		{"error", func() (fwd.ForwardFunc, error) { return nil, errCapture }, errCapture},
		{"error and graph", func() (fwd.ForwardFunc, error) {
			return func(context.Context) error { return nil }, errCapture
		}, errCapture},
		{"no graph", func() (fwd.ForwardFunc, error) { return nil, nil }, fwd.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var calls cacheCalls
				release := make(chan struct{})
				fail := true
				c := cacheNew(
					t,
					fwd.GraphFull,
					calls.forward,
					func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
						if fail {
							calls.captures.Add(1)
							<-release
							return tt.fail()
						}
						return calls.capture(ctx, key)
					},
				)
				var wg sync.WaitGroup
				for range 5 {
					wg.Go(func() {
						if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); !errors.Is(err, tt.want) {
							t.Errorf("error %v, want %v", err, tt.want)
						}
					})
				}
				synctest.Wait()
				close(release)
				wg.Wait()
				calls.check(t, "after the failure", 0, 1, 0)
				if c.Len() != 0 {
					t.Errorf("%d graphs, want none", c.Len())
				}
				fail = false
				if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
					t.Errorf("a later pass: %v", err)
				}
				calls.check(t, "after a later pass", 0, 2, 1)
				if c.Len() != 1 {
					t.Errorf("%d graphs, want 1", c.Len())
				}
			})
		})
	}
}

// A capture that panics, or exits its goroutine, does so on the capturing pass; the waiting ones
// get an error, and a later pass tries again.
func TestGraphCacheCapturePanics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		release := make(chan struct{})
		fail := true
		c := cacheNew(
			t,
			fwd.GraphFull,
			calls.forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				if fail {
					<-release
					panic("boom")
				}
				return calls.capture(ctx, key)
			},
		)
		var panics, errs atomic.Int32
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				defer func() {
					if got := recover(); got == "boom" {
						panics.Add(1)
					} else if got != nil {
						t.Errorf("recovered %v", got)
					}
				}()
				if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err == nil {
					t.Error("a waiting pass succeeds")
				}
				errs.Add(1)
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if panics.Load() != 1 || errs.Load() != 4 || c.Len() != 0 {
			t.Errorf("%d panics, %d errors, %d graphs; want 1, 4, 0", panics.Load(), errs.Load(), c.Len())
		}
		fail = false
		if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
			t.Errorf("a later pass: %v", err)
		}
		calls.check(t, "after a later pass", 0, 1, 1)
	})
}

// A waiting pass whose ctx ends returns its cause; the capture goes on for the others.
func TestGraphCacheWaiterEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		release := make(chan struct{})
		c := cacheNew(
			t,
			fwd.GraphFull,
			calls.forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				<-release
				return calls.capture(ctx, key)
			},
		)
		errStop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		results := make(chan error, 3)
		begin := func(ctx context.Context) {
			go func() { results <- c.Forward(cachePass(ctx, fwd.GraphFull, 1)) }()
			synctest.Wait()
		}
		begin(t.Context())
		begin(ctx)
		begin(t.Context())
		cancel(errStop)
		if err := <-results; !errors.Is(err, errStop) {
			t.Errorf("the pass that ended: %v, want %v", err, errStop)
		}
		synctest.Wait()
		if len(results) != 0 {
			t.Errorf("another pass ended with %v", <-results)
		}
		close(release)
		for range 2 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		calls.check(t, "at the end", 0, 1, 2)
	})
}

// A capture that fails because the capturing pass ended says nothing to the waiting ones: one of
// them captures.
func TestGraphCacheCapturerEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		first := true
		c := cacheNew(
			t,
			fwd.GraphFull,
			calls.forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				if first {
					first = false
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return calls.capture(ctx, key)
			},
		)
		ctx, cancel := context.WithCancel(t.Context())
		capturer := make(chan error)
		go func() { capturer <- c.Forward(cachePass(ctx, fwd.GraphFull, 1)) }()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
					t.Errorf("a waiting pass: %v", err)
				}
			})
		}
		synctest.Wait()
		cancel()
		if err := <-capturer; !errors.Is(err, context.Canceled) {
			t.Errorf("the capturing pass: %v, want %v", err, context.Canceled)
		}
		wg.Wait()
		calls.check(t, "at the end", 0, 1, 5)
	})
}

// After CloseCapture an unknown key is an error and never a capture; a known one replays, and a
// capture in progress ends as it would have.
func TestGraphCacheCloseCapture(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls cacheCalls
		release := make(chan struct{})
		c := cacheNew(
			t,
			fwd.GraphFull,
			calls.forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				if key.NumTokens == 2 {
					<-release
				}
				return calls.capture(ctx, key)
			},
		)
		if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
			t.Error(err)
		}
		results := make(chan error, 2)
		for range 2 {
			go func() { results <- c.Forward(cachePass(t.Context(), fwd.GraphFull, 2)) }()
		}
		synctest.Wait()
		c.CloseCapture()
		c.CloseCapture()
		if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 3)); !errors.Is(err, fwd.ErrCaptureClosed) {
			t.Errorf("an unknown key: %v, want %v", err, fwd.ErrCaptureClosed)
		}
		if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil {
			t.Errorf("a known key: %v", err)
		}
		if err := c.Forward(cachePass(t.Context(), fwd.GraphPiecewise, 3)); err != nil {
			t.Errorf("another mode: %v", err)
		}
		close(release)
		for range 2 {
			if err := <-results; err != nil {
				t.Errorf("a capture in progress: %v", err)
			}
		}
		calls.check(t, "at the end", 1, 2, 4)
		if c.Len() != 2 {
			t.Errorf("%d graphs, want 2", c.Len())
		}
	})
}

// Caches nest: a full one outside piecewise ones. A pass uses the graphs of its own mode.
func TestGraphCachesNest(t *testing.T) {
	t.Parallel()
	var log []string
	cache := func(name string, mode fwd.GraphMode, forward fwd.ForwardFunc) *fwd.GraphCache {
		return cacheNew(
			t,
			mode,
			forward,
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				log = append(log, "capture "+name)
				return func(context.Context) error { log = append(log, "replay "+name); return nil }, forward(ctx)
			},
		)
	}
	piece := func(name string) fwd.ForwardFunc {
		return cache(name, fwd.GraphPiecewise,
			func(context.Context) error { log = append(log, "run "+name); return nil }).Forward
	}
	a, b := piece("a"), piece("b")
	model := cache("model", fwd.GraphFull,
		func(ctx context.Context) error { return errors.Join(a(ctx), b(ctx)) })
	for _, tt := range []struct {
		mode fwd.GraphMode
		want []string
	}{
		{fwd.GraphNone, []string{"run a", "run b"}},
		{fwd.GraphPiecewise, []string{"capture a", "run a", "replay a", "capture b", "run b", "replay b"}},
		{fwd.GraphPiecewise, []string{"replay a", "replay b"}},
		{fwd.GraphFull, []string{"capture model", "run a", "run b", "replay model"}},
		{fwd.GraphFull, []string{"replay model"}},
		{fwd.GraphNone, []string{"run a", "run b"}},
	} {
		log = nil
		pass := fwd.Pass{NumTokens: 8, GraphMode: tt.mode}
		if err := (*fwd.Runner)(nil).Run(t.Context(), pass, model.Forward); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(tt.want, log); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.mode, diff)
		}
	}
}

// The errors of the forward function and of the replay come out, and a failed replay does not lose
// its graph.
func TestGraphCacheErrors(t *testing.T) {
	t.Parallel()
	errForward, errReplay := errors.New("forward"), errors.New("replay")
	captures := 0
	c := cacheNew(t, fwd.GraphFull, func(context.Context) error { return errForward },
		func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
			captures++
			return func(context.Context) error { return errReplay }, nil
		})
	for range 2 {
		if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); !errors.Is(err, errReplay) {
			t.Errorf("a replay: %v, want %v", err, errReplay)
		}
	}
	if err := c.Forward(t.Context()); !errors.Is(err, errForward) {
		t.Errorf("a call: %v, want %v", err, errForward)
	}
	if captures != 1 || c.Len() != 1 {
		t.Errorf("%d captures, %d graphs; want 1 and 1", captures, c.Len())
	}
}

// Warm-up captures exactly what Dispatch can answer with, so that nothing is left to capture when
// it is closed.
func TestCapturesServeDispatch(t *testing.T) {
	t.Parallel()
	for _, mode := range []fwd.GraphMode{pieces, full, decode, both} {
		cfg := planMixed(2)
		cfg.Mode, cfg.LoRA = mode, &fwd.LoRAConfig{MaxLoRAs: 3, SpecializeCount: true}
		d := planDispatcher(t, cfg)
		captured := d.Captures()
		used := map[fwd.Capture]bool{}
		for n := range 40 {
			for k := range 6 {
				for flags := range 4 {
					q := fwd.DispatchQuery{
						NumTokens:      n,
						NumActiveLoRAs: k,
						UniformDecode:  flags&1 > 0,
						ExcludeFull:    flags&2 > 0,
					}
					m, batch, reason := d.Dispatch(q)
					if m == fwd.GraphNone {
						continue
					}
					capture := fwd.Capture{Mode: m, Batch: batch}
					if used[capture] = true; !slices.Contains(captured, capture) {
						t.Errorf("%v: Dispatch(%+v) = %+v (%v), which is not captured", mode, q, capture, reason)
					}
				}
			}
		}
		if len(used) != len(captured) {
			t.Errorf("%v: %d graphs are captured, and %d used: %s", mode, len(captured), len(used),
				fmt.Sprint(captured))
		}
	}
}

// A pass with SkipCompiled replays nothing, and captures nothing.
func TestGraphCacheSkipCompiled(t *testing.T) {
	t.Parallel()
	var calls cacheCalls
	c := cacheNew(t, fwd.GraphFull, calls.forward, calls.capture)
	var r *fwd.Runner
	for i, skip := range []bool{true, false, true} {
		pass := fwd.Pass{NumTokens: 4, GraphMode: fwd.GraphFull, SkipCompiled: skip}
		if err := r.Run(t.Context(), pass, c.Forward); err != nil {
			t.Error(err)
		}
		calls.check(t, fmt.Sprint("pass ", i), []int32{1, 1, 2}[i], min(int32(i), 1), min(int32(i), 1))
	}
}

// A split pass uses no graph, even if a forward context that somebody made by hand says so.
func TestGraphCacheSplitPass(t *testing.T) {
	t.Parallel()
	var calls cacheCalls
	c := cacheNew(t, fwd.GraphFull, calls.forward, calls.capture)
	ctx := fwd.NewContext(t.Context(), &fwd.ForwardContext{
		NumTokens: 4, GraphMode: fwd.GraphFull, Batch: fwd.BatchDescriptor{NumTokens: 4},
		UBatches: planSlices([4]int{0, 1, 0, 2}, [4]int{1, 2, 2, 4}),
	})
	if err := c.Forward(ctx); err != nil {
		t.Error(err)
	}
	calls.check(t, "split", 1, 0, 0)
}

// A descriptor that contradicts itself is no key, whoever made the context.
func TestGraphCacheBadDescriptor(t *testing.T) {
	t.Parallel()
	var calls cacheCalls
	c := cacheNew(t, fwd.GraphFull, calls.forward, calls.capture)
	for _, batch := range []fwd.BatchDescriptor{
		{NumTokens: 4, HasLoRA: true}, {NumTokens: 4, NumActiveLoRAs: 1}, {NumTokens: -4},
	} {
		ctx := fwd.NewContext(t.Context(), &fwd.ForwardContext{GraphMode: fwd.GraphFull, Batch: batch})
		if err := c.Forward(ctx); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("%+v: %v, want %v", batch, err, fwd.ErrInvalid)
		}
		pass := fwd.Pass{NumTokens: 4, GraphMode: fwd.GraphFull, Batch: batch}
		if err := (*fwd.Runner)(nil).Run(t.Context(), pass, c.Forward); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("a pass with %+v: %v, want %v", batch, err, fwd.ErrInvalid)
		}
	}
	calls.check(t, "with bad descriptors", 0, 0, 0)
}

// turns counts the replays of a graph that run at the same time.
type turns struct{ running, most, done atomic.Int32 }

func (x *turns) enter() { x.most.Store(max(x.most.Load(), x.running.Add(1))) }
func (x *turns) leave() { x.running.Add(-1); x.done.Add(1) }

// Replays of one graph never overlap, since they share its buffers; those of another one do not
// wait for them.
func TestGraphCacheTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var one, all turns
		replay := func(ctx context.Context) error {
			all.enter()
			defer all.leave()
			if fwd.MustFromContext(ctx).NumTokens == 1 {
				one.enter()
				defer one.leave()
			}
			time.Sleep(time.Second) // of simulated time
			return nil
		}
		c := cacheNew(t, fwd.GraphFull, nothing,
			func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return replay, nil })
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1+i%2)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if one.most.Load() != 1 || one.done.Load() != 10 {
			t.Errorf("%d replays of one graph overlap and %d ran, want 1 and 10", one.most.Load(), one.done.Load())
		}
		if all.most.Load() != 2 || time.Since(began) != 10*time.Second {
			t.Errorf("%d replays of two graphs overlap, in %v; want 2 in 10s", all.most.Load(), time.Since(began))
		}
	})
}

// A pass that waits for its turn ends with its ctx. One that need not wait runs whatever its ctx
// says.
func TestGraphCacheTurnEndsWithContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release, replays := make(chan struct{}), 0
		replay := func(context.Context) error { replays++; <-release; return nil }
		c := cacheNew(t, fwd.GraphFull, nothing,
			func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return replay, nil })
		errStop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)) }()
		synctest.Wait()
		go func() { second <- c.Forward(cachePass(ctx, fwd.GraphFull, 1)) }()
		synctest.Wait()
		cancel(errStop)
		if err := <-second; !errors.Is(err, errStop) {
			t.Errorf("a pass whose ctx ended while it waited: %v, want %v", err, errStop)
		}
		close(release)
		if err := <-first; err != nil || replays != 1 {
			t.Errorf("the pass that it waited for: %v, after %d replays; want 1", err, replays)
		}
		if err := c.Forward(cachePass(ctx, fwd.GraphFull, 1)); err != nil || replays != 2 {
			t.Errorf("a pass with an ended ctx that need not wait: %v, after %d replays; want 2", err, replays)
		}
	})
}

// A replay that panics, or exits its goroutine, gives the turn back.
func TestGraphCacheTurnAfterPanic(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(){"panic": func() { panic("boom") }, "exit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				replays := 0
				replay := func(context.Context) error {
					if replays++; replays == 1 {
						leave()
					}
					return nil
				}
				c := cacheNew(t, fwd.GraphFull, nothing,
					func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return replay, nil })
				var wg sync.WaitGroup
				wg.Go(func() {
					defer func() { _ = recover() }()
					_ = c.Forward(cachePass(t.Context(), fwd.GraphFull, 1))
					t.Error("the first replay returned")
				})
				wg.Wait()
				if err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1)); err != nil || replays != 2 {
					t.Errorf("the next pass: %v, after %d replays; want 2", err, replays)
				}
			})
		})
	}
}

// A capture that asks its own cache for what it captures would wait for itself, also through
// another key. It may capture another key inside, and the function that it captures may use other
// caches.
func TestGraphCacheCaptureOfItself(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		next map[int]int // which key the capture of a key asks for
		want error
		len  int
	}{
		{"the same key", map[int]int{1: 1}, fwd.ErrInvalid, 0},
		{"through another key", map[int]int{1: 2, 2: 1}, fwd.ErrInvalid, 0},
		{"another key", map[int]int{1: 2, 2: 3}, nil, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { // which fails if all wait
				var c *fwd.GraphCache
				c = cacheNew(t, fwd.GraphFull, nothing,
					func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
						if next, ok := tt.next[key.NumTokens]; ok {
							if err := c.Forward(cachePass(ctx, fwd.GraphFull, next)); err != nil {
								return nil, err
							}
						}
						return nothing, nil
					})
				err := c.Forward(cachePass(t.Context(), fwd.GraphFull, 1))
				if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) || c.Len() != tt.len {
					t.Errorf("%v with %d graphs, want %v with %d", err, c.Len(), tt.want, tt.len)
				}
			})
		})
	}
}

// Gaps names the batches that get less than the mode promises.
func TestGaps(t *testing.T) {
	t.Parallel()
	sizes := fwd.DefaultCaptureSizes(40)
	gap := func(start, stop int, decode bool, mode fwd.GraphMode, reason fwd.Reason) fwd.Gap {
		return fwd.Gap{Tokens: fwd.Range{Start: start, Stop: stop}, Decode: decode, Mode: mode, Reason: reason}
	}
	for _, tt := range []struct {
		name string
		cfg  fwd.DispatcherConfig
		want []fwd.Gap
	}{
		{
			"more requests than sizes",
			fwd.DispatcherConfig{Mode: both, CaptureSizes: sizes, MaxNumSeqs: 42},
			[]fwd.Gap{gap(41, 43, true, none, fwd.ReasonTooLarge), gap(41, 43, false, none, fwd.ReasonTooLarge)},
		},
		{
			"decode alone",
			fwd.DispatcherConfig{Mode: decode, CaptureSizes: sizes, MaxNumSeqs: 42},
			[]fwd.Gap{gap(41, 43, true, none, fwd.ReasonTooLarge)},
		},
		{"none", fwd.DispatcherConfig{Mode: both, CaptureSizes: sizes, MaxNumSeqs: 40}, nil},
		{
			// 6 requests of 2 tokens pad to 16, which is more than all 7 have, so no graph for decode holds
			// them.
			"between the sizes",
			fwd.DispatcherConfig{Mode: both, CaptureSizes: []int{8, 16}, MaxNumSeqs: 7, UniformDecodeQueryLen: 2},
			[]fwd.Gap{gap(10, 15, true, pieces, fwd.ReasonRelaxed)},
		},
		{
			"graphs only with adapters", fwd.DispatcherConfig{
				Mode: both, CaptureSizes: sizes, MaxNumSeqs: 40, LoRA: &fwd.LoRAConfig{MaxLoRAs: 2, Unspecialized: true},
			}, nil,
		},
		{"no graphs", fwd.DispatcherConfig{MaxNumSeqs: 4}, nil},
	} {
		if diff := cmp.Diff(tt.want, planDispatcher(t, tt.cfg).Gaps()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	if gaps := (*fwd.Dispatcher)(nil).Gaps(); gaps != nil {
		t.Errorf("a nil Dispatcher has the gaps %v", gaps)
	}
}

// Gaps agrees with Dispatch, asked for every batch.
func TestGapsAgreeWithDispatch(t *testing.T) {
	t.Parallel()
	for _, mode := range []fwd.GraphMode{none, pieces, full, decode, both} {
		for _, q := range []int{1, 2, 3} {
			for maxSeqs := 1; maxSeqs < 24; maxSeqs++ {
				d := planDispatcher(t, fwd.DispatcherConfig{
					Mode: mode, CaptureSizes: []int{q, 3 * q, 8 * q, 12 * q}, MaxNumSeqs: maxSeqs, UniformDecodeQueryLen: q,
				})
				type batch struct {
					tokens int
					decode bool
				}
				gaps := map[batch]fwd.Gap{}
				for _, g := range d.Gaps() {
					for n := g.Tokens.Start; n < g.Tokens.Stop; n++ {
						gaps[batch{n, g.Decode}] = g
					}
				}
				check := func(b batch, promised fwd.GraphMode) {
					m, _, reason := d.Dispatch(query{NumTokens: b.tokens, UniformDecode: b.decode})
					g, ok := gaps[b]
					if ok != (m < promised) || ok && (g.Mode != m || g.Reason != reason) {
						t.Errorf("%v, q %d, %d requests: %+v gets %v because %v, gap %v", mode, q, maxSeqs, b, m, reason, g)
					}
				}
				for n := 1; n <= max(q*maxSeqs, 12*q); n++ {
					check(batch{n, false}, mode.MixedMode())
					if n%q == 0 && n <= q*maxSeqs {
						check(batch{n, true}, mode.DecodeMode())
					}
				}
			}
		}
	}
}

// The default capture sizes end with the largest batch.
func TestDefaultCaptureSizes(t *testing.T) {
	t.Parallel()
	for most, want := range map[int][]int{
		-1: nil, 0: nil, 1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 8: {1, 2, 4, 8}, 9: {1, 2, 4, 8, 9}, 16: {1, 2, 4, 8, 16},
		42: {1, 2, 4, 8, 16, 24, 32, 40, 42},
	} {
		if diff := cmp.Diff(want, fwd.DefaultCaptureSizes(most)); diff != "" {
			t.Errorf("up to %d (-want +got):\n%s", most, diff)
		}
	}
	sizes := fwd.DefaultCaptureSizes(520)
	if tail := sizes[len(sizes)-3:]; !slices.Equal(tail, []int{496, 512, 520}) || !slices.Contains(sizes, 248) {
		t.Errorf("up to 520: %v", sizes)
	}
	planDispatcher(t, fwd.DispatcherConfig{Mode: both, CaptureSizes: sizes, MaxNumSeqs: 8})
}

// Each reason is read from its own word again, and from nothing else.
func TestReasonText(t *testing.T) {
	t.Parallel()
	words := []string{
		"unplanned", "exact", "relaxed", "disabled", "too_large", "full_excluded", "no_key", "lora",
		"dp_rank", "ubatch",
	}
	for i, word := range words {
		r := fwd.Reason(i)
		text, err := json.Marshal(r)
		if err != nil || string(text) != `"`+word+`"` || r.String() != word {
			t.Errorf("reason %d is %q and marshals as %s, %v; want %q", i, r, text, err, word)
		}
		got := fwd.ReasonDisabled
		if err := json.Unmarshal(text, &got); err != nil || got != r {
			t.Errorf("%s is %v, %v; want %v", text, got, err, r)
		}
	}
	unknown := fwd.Reason(len(words))
	if text, err := unknown.MarshalText(); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("an unknown reason marshals as %q, %v", text, err)
	}
	for _, text := range []string{"", "unknown", "EXACT", "Reason(10)"} {
		got := fwd.ReasonLoRA
		if err := got.UnmarshalText([]byte(text)); !errors.Is(err, fwd.ErrInvalid) || got != fwd.ReasonLoRA {
			t.Errorf("%q is %v, %v; want %v", text, got, err, fwd.ErrInvalid)
		}
	}
}
