// This file tests WarmUp: the passes that capture every graph, agreed by all ranks.

package fwd_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/forwardctx/fwd"
)

// warmUp warms up one rank. It runs each pass, stops after most of them if that is above 0, and returns the
// passes and the error.
func warmUp(
	ctx context.Context, r *fwd.Runner, most int, forward fwd.ForwardFunc,
) (passes []fwd.Pass, err error) {
	for pass, err := range r.WarmUp(ctx) {
		if err != nil {
			return passes, err
		}
		if err := r.Run(ctx, pass, forward); err != nil {
			return passes, err
		}
		if passes = append(passes, pass); len(passes) == most {
			break
		}
	}
	return passes, nil
}

// warmUpAll warms up all ranks concurrently.
func warmUpAll(t *testing.T, runners []*fwd.Runner) (passes [][]fwd.Pass) {
	t.Helper()
	passes = make([][]fwd.Pass, len(runners))
	var wg sync.WaitGroup
	for rank, r := range runners {
		wg.Go(func() {
			var err error
			if passes[rank], err = warmUp(t.Context(), r, 0, nothing); err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
		})
	}
	wg.Wait()
	return passes
}

// warmGraphs has graphs that differ in tokens, requests, uniformity, adapters and mode.
func warmGraphs() fwd.DispatcherConfig {
	cfg := planMixed(1)
	cfg.CaptureSizes = []int{1, 2, 16}
	cfg.LoRA = &fwd.LoRAConfig{MaxLoRAs: 2, SpecializeCount: true}
	return cfg
}

// WarmUp yields a dummy pass for each graph, in the order of Captures, and exchanges once more at the end.
func TestWarmUpOrder(t *testing.T) {
	t.Parallel()
	graphs := warmGraphs()
	captures := planDispatcher(t, graphs).Captures()
	runners, taps := planGroup(t, fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 1}, &graphs, 3)
	for round := range 2 { // ranks may warm up again
		for rank, passes := range warmUpAll(t, runners) {
			var got []fwd.Capture
			for i, pass := range passes {
				got = append(got, fwd.Capture{Mode: pass.GraphMode, Batch: pass.Batch})
				want := fwd.Pass{
					NumTokens: pass.Batch.NumTokens, NumTokensUnpadded: pass.Batch.NumTokens,
					NumTokensGraph: pass.Batch.NumTokens, NumReqs: pass.Batch.NumReqs, GraphMode: pass.GraphMode,
					Batch: pass.Batch, Dummy: true, Phase: "warmup", Reason: fwd.ReasonRelaxed,
				}
				if pass.Batch.Uniform {
					want.Reason = fwd.ReasonExact
				}
				if diff := planDiff(want, pass); diff != "" {
					t.Errorf("rank %d, pass %d (-want +got):\n%s", rank, i, diff)
				}
				if want := uint64(round*(len(captures)+1) + i + 1); pass.Agreement.Step != want {
					t.Errorf("rank %d, pass %d is of step %d, want %d", rank, i, pass.Agreement.Step, want)
				}
			}
			if diff := cmp.Diff(captures, got); diff != "" {
				t.Errorf("rank %d (-want +got):\n%s", rank, diff)
			}
		}
	}
	last := fwd.Vote{Step: uint64(2 * (len(captures) + 1)), WarmUp: true}
	for rank, tap := range taps {
		diff := cmp.Diff(last, tap.sent, cmpopts.IgnoreFields(fwd.Vote{}, "Config"))
		if diff != "" || tap.exchanges != int(last.Step) {
			t.Errorf("rank %d: %d exchanges, the last vote (-want +got):\n%s", rank, tap.exchanges, diff)
		}
	}
}

// Without graphs there is the last exchange alone. A rank alone, or of a dense model, exchanges nothing.
func TestWarmUpAlone(t *testing.T) {
	t.Parallel()
	runners, taps := planGroup(t, fwd.ParallelConfig{}, nil, 2)
	if passes := warmUpAll(t, runners); len(passes[0])+len(passes[1]) > 0 || taps[0].exchanges != 1 {
		t.Errorf("without graphs: %d exchanges, passes %v", taps[0].exchanges, passes)
	}
	d := planDispatcher(t, warmGraphs())
	for name, parallel := range map[string]fwd.ParallelConfig{
		"alone": {}, "dense": {DataParallelSize: 2, Dense: true},
		"dense of unknown": {DataParallelRank: 3, Dense: true},
	} {
		r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(d))
		if err != nil {
			t.Fatal(err)
		}
		passes, err := warmUp(t.Context(), r, 0, nothing)
		if len(passes) != len(d.Captures()) || err != nil {
			t.Errorf("%s: %d passes for %d graphs, %v", name, len(passes), len(d.Captures()), err)
		}
		for i, pass := range passes {
			if pass.Batch != d.Captures()[i].Batch || pass.Agreement != nil {
				t.Errorf("%s: pass %d is %+v", name, i, pass)
			}
			if err := r.Run(t.Context(), pass, nothing); !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%s: pass %d runs twice: %v", name, i, err)
			}
		}
	}
	if passes, err := warmUp(t.Context(), nil, 0, nothing); len(passes) > 0 || err != nil {
		t.Errorf("a nil Runner warms up %v, %v", passes, err)
	}
}

// What has been warmed up serves: no batch that finds a graph finds one that is not captured.
func TestWarmUpCaptures(t *testing.T) {
	t.Parallel()
	d := planDispatcher(t, warmGraphs())
	r, err := fwd.New(fwd.Config{}, fwd.WithDispatcher(d))
	if err != nil {
		t.Fatal(err)
	}
	var mode fwd.GraphMode
	capture := func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
		return func(ctx context.Context) error { mode = fwd.MustFromContext(ctx).GraphMode; return nil }, nil
	}
	piecewise := cacheNew(t, fwd.GraphPiecewise, nothing, capture)
	full := cacheNew(t, fwd.GraphFull, piecewise.Forward, capture)
	if _, err := warmUp(t.Context(), r, 0, full.Forward); err != nil {
		t.Fatal(err)
	}
	if n := piecewise.Len() + full.Len(); n != len(d.Captures()) {
		t.Errorf("%d graphs are captured, want %d", n, len(d.Captures()))
	}
	piecewise.CloseCapture()
	full.CloseCapture()
	for reqs := 1; reqs <= 17; reqs++ {
		for loras := range 4 {
			pass, err := r.Plan(t.Context(), planLoRAs(loras, planDecode(reqs)))
			if err != nil {
				t.Fatal(err)
			}
			mode = fwd.GraphNone
			if err := r.Run(t.Context(), pass, full.Forward); err != nil || mode != pass.GraphMode {
				t.Errorf("%d requests, %d adapters: replayed in %v, want %v, %v", reqs, loras, mode, pass.GraphMode, err)
			}
		}
	}
}

// A rank that begins its warm-up again is at another graph than the others. All are told which ranks are at
// fault, and the step after is in lockstep.
func TestWarmUpMismatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		graphs := warmGraphs()
		runners, _ := planGroup(t, fwd.ParallelConfig{}, &graphs, 3)
		most := len(planDispatcher(t, graphs).Captures())
		step := uint64(0)
		for taken := 1; taken < most; taken++ { // neighbours in the order differ in one thing or another
			var wg sync.WaitGroup
			for rank, r := range runners {
				wg.Go(func() {
					if rank == 1 {
						if _, err := warmUp(t.Context(), r, taken, nothing); err != nil {
							t.Error(err)
						}
					}
					passes, err := warmUp(t.Context(), r, 0, nothing)
					groupCheckError(t, rank, err, fwd.ErrLockstep, step+uint64(taken)+1, 1)
					if want := map[bool]int{true: 0, false: taken}[rank == 1]; len(passes) != want {
						t.Errorf("rank %d warmed up %d graphs, want %d", rank, len(passes), want)
					}
				})
			}
			wg.Wait()
			step += uint64(taken) + 1
		}
		warmUpAll(t, runners)
	})
}

// Some ranks warm up and others serve: all are told, and the fewer are named, in the last exchange too. An
// error is yielded once.
func TestWarmUpBesideServing(t *testing.T) {
	t.Parallel()
	graphs := warmGraphs()
	runners, _ := planGroup(t, fwd.ParallelConfig{}, &graphs, 3)
	most := len(planDispatcher(t, graphs).Captures())
	step := uint64(0)
	for _, taken := range []int{0, 1, most} {
		step += uint64(taken) + 1
		var wg sync.WaitGroup
		for rank, r := range runners {
			wg.Go(func() {
				if rank != 2 {
					var errs []error
					for pass, err := range r.WarmUp(t.Context()) {
						if errs = append(errs, err); err != nil && pass.NumTokens != 0 {
							t.Errorf("rank %d: a pass %+v beside %v", rank, pass, err)
						}
					}
					if len(errs) != taken+1 {
						t.Errorf("rank %d: %d passes and errors %v, want %d", rank, len(errs), errs, taken+1)
					}
					groupCheckError(t, rank, errs[len(errs)-1], fwd.ErrLockstep, step, 2)
					return
				}
				if taken > 0 {
					if _, err := warmUp(t.Context(), r, taken, nothing); err != nil {
						t.Errorf("rank %d: %v", rank, err)
					}
				}
				_, err := r.Plan(t.Context(), fwd.Schedule{})
				groupCheckError(t, rank, err, fwd.ErrLockstep, step, 2)
			})
		}
		wg.Wait()
	}
	pass := planOf(t, runners, planDecode(1), planDecode(1), planDecode(1))[0]
	if pass.Agreement.Step != step+1 {
		t.Errorf("the step after is %d, want %d", pass.Agreement.Step, step+1)
	}
}

// A caller that breaks off skips the last exchange, so the others' fails.
func TestWarmUpBreakOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		graphs := warmGraphs()
		most := len(planDispatcher(t, graphs).Captures())
		for _, taken := range []int{1, most} {
			runners, taps := planGroup(t, fwd.ParallelConfig{}, &graphs, 3)
			var wg sync.WaitGroup
			for rank, r := range runners {
				wg.Go(func() {
					passes, err := warmUp(t.Context(), r, map[bool]int{true: taken}[rank == 0], nothing)
					if len(passes) != taken {
						t.Errorf("rank %d: %d passes, want %d", rank, len(passes), taken)
					}
					if rank > 0 {
						groupCheckError(t, rank, err, fwd.ErrRankMissing, uint64(taken)+1, 0)
					} else if err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if taps[0].exchanges != taken {
				t.Errorf("the rank that broke off has exchanged %d times, want %d", taps[0].exchanges, taken)
			}
			warmUpAll(t, runners)
		}
	})
}
