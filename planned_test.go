// This file tests what a planned pass and one made by hand are to Run, Start and Report: whose they are, how
// often they run, and what of them needs metadata.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// plannedWays are the ways to use a pass up.
var plannedWays = map[string]func(ctx context.Context, r *fwd.Runner, p fwd.Pass) error{
	"run": func(ctx context.Context, r *fwd.Runner, p fwd.Pass) error { return r.Run(ctx, p, nothing) },
	"call": func(ctx context.Context, r *fwd.Runner, p fwd.Pass) error {
		_, err := fwd.Call(ctx, r, p, func(context.Context) (int, error) { return 1, nil })
		return err
	},
	"start": func(ctx context.Context, r *fwd.Runner, p fwd.Pass) error {
		_, end, err := r.Start(ctx, p)
		end(nil)
		return err
	},
	"report": func(ctx context.Context, r *fwd.Runner, p fwd.Pass) error {
		now := time.Now()
		return r.Report(ctx, p, now, now, nil)
	},
}

// plannedPasses returns a Runner, and a function that plans a pass of it: alone, and among ranks.
func plannedPasses(t *testing.T) map[string]func() (*fwd.Runner, fwd.Pass) {
	alone, err := fwd.New(fwd.Config{})
	if err != nil {
		t.Fatal(err)
	}
	runners, _ := planGroup(t, fwd.ParallelConfig{}, nil, 2)
	return map[string]func() (*fwd.Runner, fwd.Pass){
		"alone": func() (*fwd.Runner, fwd.Pass) {
			pass, err := alone.Plan(t.Context(), planBatch(3))
			if err != nil {
				t.Fatal(err)
			}
			return alone, pass
		},
		"ranks": func() (*fwd.Runner, fwd.Pass) {
			return runners[1], planOf(t, runners, planBatch(3), planBatch(3))[1]
		},
		"nil": func() (*fwd.Runner, fwd.Pass) {
			pass, err := (*fwd.Runner)(nil).Plan(t.Context(), planBatch(3))
			if err != nil {
				t.Fatal(err)
			}
			return nil, pass
		},
	}
}

// A planned pass runs once, and so does a copy of it, whichever way.
func TestPlannedRunsOnce(t *testing.T) {
	t.Parallel()
	for name, plan := range plannedPasses(t) {
		for first, use := range plannedWays {
			r, pass := plan()
			pass.Phase = "verify"
			if err := use(t.Context(), r, pass); err != nil {
				t.Errorf("%s: %s: %v", name, first, err)
			}
			pass.AttnMetadata = []map[string]any{fwd.AllLayers(1)}
			for second, use := range plannedWays {
				if err := use(t.Context(), r, pass); !errors.Is(err, fwd.ErrInvalid) {
					t.Errorf("%s: %s after %s: %v, want %v", name, second, first, err, fwd.ErrInvalid)
				}
			}
		}
	}
}

// Of many that run the same pass concurrently, one does.
func TestPlannedRunsOnceConcurrently(t *testing.T) {
	t.Parallel()
	for name, plan := range plannedPasses(t) {
		r, pass := plan()
		var ran, refused atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				err := r.Run(t.Context(), pass, func(context.Context) error { ran.Add(1); return nil })
				if errors.Is(err, fwd.ErrInvalid) {
					refused.Add(1)
				}
			})
		}
		if wg.Wait(); ran.Load() != 1 || refused.Load() != 7 {
			t.Errorf("%s: the pass ran %d times and was refused %d times", name, ran.Load(), refused.Load())
		}
	}
}

// A planned pass belongs to the Runner that planned it, and a refusal does not use it up.
func TestPlannedRefused(t *testing.T) {
	t.Parallel()
	other, err := fwd.New(fwd.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for name, plan := range plannedPasses(t) {
		for way, use := range plannedWays {
			r, pass := plan()
			if err := use(t.Context(), other, pass); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%s: %s of another Runner: %v, want %v", name, way, err, fwd.ErrInvalid)
			}
			bad := pass
			bad.AttnMetadata = make([]map[string]any, 3)
			if err := use(t.Context(), r, bad); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%s: %s with three maps: %v, want %v", name, way, err, fwd.ErrInvalid)
			}
			if name == "ranks" {
				bad = pass
				bad.NumTokens++
				if err := use(t.Context(), r, bad); !errors.Is(err, fwd.ErrTokenMismatch) {
					t.Errorf("%s of a changed pass: %v, want %v", way, err, fwd.ErrTokenMismatch)
				}
			}
			if err := r.Run(t.Context(), pass, nil); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%s: without forward function: %v, want %v", name, err, fwd.ErrInvalid)
			}
			if err := use(t.Context(), r, pass); err != nil {
				t.Errorf("%s: %s after refusals: %v", name, way, err)
			}
		}
	}
}

// A pass made by hand runs as often as one likes, and on any Runner.
func TestPassByHandRunsAgain(t *testing.T) {
	t.Parallel()
	group := localGroup(t, 2)
	runners := []*fwd.Runner{groupRunner(t, group[0]), groupRunner(t, group[1])}
	pass := fwd.Pass{NumTokens: 4}
	for range 3 {
		var wg sync.WaitGroup
		for rank, r := range runners {
			wg.Go(func() {
				if err := r.Run(t.Context(), pass, nothing); err != nil {
					t.Errorf("rank %d: %v", rank, err)
				}
			})
		}
		wg.Wait()
	}
}

// Parts are what needs metadata: what the contexts of the pass, or of its microbatches, cover.
func TestPassParts(t *testing.T) {
	t.Parallel()
	whole := func(reqs, tokens int) []fwd.UBatchSlice { return planSlices([4]int{0, reqs, 0, tokens}) }
	halves := planSlices([4]int{0, 1, 0, 4}, [4]int{0, 2, 4, 8})
	for name, tt := range map[string]struct {
		pass fwd.Pass
		want []fwd.UBatchSlice
	}{
		"plain":           {fwd.Pass{NumTokens: 8, NumReqs: 2}, whole(2, 8)},
		"requests unsaid": {fwd.Pass{NumTokens: 8}, whole(0, 8)},
		"padded requests": {fwd.Pass{NumTokens: 8, NumReqs: 5, Batch: planUniform(8, 8)}, whole(8, 8)},
		"any requests":    {fwd.Pass{NumTokens: 8, NumReqs: 5, Batch: planKey(8)}, whole(5, 8)},
		"split":           {fwd.Pass{NumTokens: 8, NumReqs: 2, UBatches: halves}, halves},
		"dummy":           {fwd.Pass{NumTokens: 8, NumReqs: 2, Dummy: true}, nil},
		"split dummy":     {fwd.Pass{NumTokens: 8, NumReqs: 2, UBatches: halves, Dummy: true}, nil},
	} {
		got := tt.pass.Parts()
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		seen := make([]fwd.UBatchSlice, max(len(tt.pass.UBatches), 1))
		for _, part := range got {
			tt.pass.AttnMetadata = append(tt.pass.AttnMetadata, fwd.AllLayers(part))
		}
		err := (*fwd.Runner)(nil).Run(t.Context(), tt.pass, func(ctx context.Context) error {
			if part := fwd.MustFromContext(ctx).Part; part.Tokens != (fwd.Range{Stop: 8}) {
				t.Errorf("%s: the pass covers %v", name, part)
			}
			return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
				seen[i] = fwd.MustFromContext(ctx).Part
				part, err := fwd.AttnMetadata[fwd.UBatchSlice](ctx, "attn")
				if got != nil && (err != nil || part != seen[i]) {
					return fmt.Errorf("the metadata of %v is that of %v: %v", seen[i], part, err)
				}
				return nil
			})
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(tt.want, seen); diff != "" && tt.want != nil {
			t.Errorf("%s: what the contexts cover (-want +got):\n%s", name, diff)
		}
	}
}

// The mode and reason of passes that nobody planned. A split one runs without graphs and keeps its
// descriptor.
func TestPassByHandReason(t *testing.T) {
	t.Parallel()
	halves := planSlices([4]int{0, 1, 0, 4}, [4]int{1, 2, 4, 8})
	d := planDispatcher(t, planMixed(1))
	for _, tt := range []struct {
		name       string
		dispatcher *fwd.Dispatcher
		pass       fwd.Pass
		mode       fwd.GraphMode
		reason     fwd.Reason
		batch      fwd.BatchDescriptor
	}{
		{"no graph", nil, fwd.Pass{NumTokens: 8}, fwd.GraphNone, fwd.ReasonDisabled, planKey(0)},
		{"no graph, a dispatcher", d, fwd.Pass{NumTokens: 8}, fwd.GraphNone, fwd.ReasonUnknown, planKey(0)},
		{
			"a graph", nil, fwd.Pass{NumTokens: 8, GraphMode: fwd.GraphFull},
			fwd.GraphFull, fwd.ReasonUnknown, planKey(8),
		},
		{
			"a graph, with its reason", d, fwd.Pass{NumTokens: 8, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact},
			fwd.GraphFull, fwd.ReasonExact, planKey(8),
		},
		{
			"split", nil, fwd.Pass{NumTokens: 8, GraphMode: fwd.GraphFull, Batch: planUniform(8, 8), UBatches: halves},
			fwd.GraphNone, fwd.ReasonUBatch, planUniform(8, 8),
		},
		{
			"split without graph", d, fwd.Pass{NumTokens: 8, UBatches: halves, Reason: fwd.ReasonTooLarge},
			fwd.GraphNone, fwd.ReasonTooLarge, planKey(0),
		},
	} {
		recorder := fwd.NewRecorder(2)
		r, err := fwd.New(fwd.Config{}, fwd.WithObserver(recorder.Observe), fwd.WithDispatcher(tt.dispatcher))
		if err != nil {
			t.Fatal(err)
		}
		for way, use := range map[string]func(context.Context, *fwd.Runner, fwd.Pass) error{
			"run": plannedWays["run"], "report": plannedWays["report"],
		} {
			if err := use(t.Context(), r, tt.pass); err != nil {
				t.Errorf("%s, %s: %v", tt.name, way, err)
			}
		}
		for _, got := range recorder.Recent() {
			if got.GraphMode != tt.mode || got.Reason != tt.reason || got.Batch != tt.batch {
				t.Errorf("%s: %v, %v, %+v; want %v, %v, %+v",
					tt.name, got.GraphMode, got.Reason, got.Batch, tt.mode, tt.reason, tt.batch)
			}
		}
	}
}

// A dense rank need not know how many others there are.
func TestDenseOfUnknownSize(t *testing.T) {
	t.Parallel()
	recorder := fwd.NewRecorder(1)
	parallel := fwd.ParallelConfig{DataParallelRank: 3, Dense: true}
	r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithObserver(recorder.Observe))
	if err != nil {
		t.Fatal(err)
	}
	pass, err := r.Plan(t.Context(), planBatch(2))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), pass, nothing); err != nil {
		t.Error(err)
	}
	if got := recorder.Recent()[0]; got.Rank != 3 || got.Size != 0 || got.Step != 0 || got.Votes != nil {
		t.Errorf("the record says %+v, want rank 3 of a size that is not known", got)
	}
}
