// This file tests Begin: a plan in two halves, between which nobody need wait.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// beginGroups are groups of Runners whose coordinators are a local group's own, and others.
func beginGroups(t *testing.T, size int, test func(t *testing.T, group []fwd.Coordinator)) {
	t.Parallel()
	for _, local := range []bool{true, false} {
		t.Run(fmt.Sprintf("local=%t", local), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				group := localGroup(t, size)
				if !local {
					for rank, c := range group {
						group[rank] = &groupTap{Coordinator: c}
					}
				}
				test(t, group)
			})
		})
	}
}

// beginAll begins a step on all ranks, one after the other.
func beginAll(
	t *testing.T, runners []*fwd.Runner, schedules ...fwd.Schedule,
) (waits []func() (fwd.Pass, error)) {
	t.Helper()
	for rank, r := range runners {
		wait, err := r.Begin(t.Context(), schedules[rank])
		if err != nil {
			t.Fatalf("rank %d: %v", rank, err)
		}
		waits = append(waits, wait)
	}
	return waits
}

// Four ranks in one goroutine begin all, then wait for all. They plan what Plan would, whatever the caller
// has done to the schedule's slice since.
func TestBeginInOneGoroutine(t *testing.T) {
	beginGroups(t, 4, func(t *testing.T, group []fwd.Coordinator) {
		one := planMixed(1)
		ubatch := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 8}
		planners, _ := planGroup(t, ubatch, &one, 4)
		var runners []*fwd.Runner
		for _, c := range group {
			r, err := fwd.New(fwd.Config{Parallel: ubatch}, fwd.WithCoordinator(c),
				fwd.WithDispatcher(planDispatcher(t, one)))
			if err != nil {
				t.Fatal(err)
			}
			runners = append(runners, r)
		}
		for step := range uint64(20) {
			schedules := func() []fwd.Schedule {
				return []fwd.Schedule{
					planSplit(planBatch(3, 7)), {}, planSplit(planBatch(9, 2)), planSplit(planBatch(12)),
				}
			}
			want := planOf(t, planners, schedules()...)
			given := schedules()
			waits := beginAll(t, runners, given...)
			for _, s := range given {
				clear(s.NumScheduledTokens)
			}
			for rank := 3; rank >= 0; rank-- {
				pass, err := waits[rank]()
				if err != nil {
					t.Fatalf("rank %d: %v", rank, err)
				}
				if diff := planDiff(want[rank], pass); diff != "" || pass.Agreement.Step != step+1 {
					t.Errorf("rank %d in step %d (-want +got):\n%s", rank, pass.Agreement.Step, diff)
				}
				if err := runners[rank].Run(t.Context(), pass, nothing); err != nil {
					t.Errorf("rank %d: %v", rank, err)
				}
			}
		}
	})
}

// wait may be called as often as one likes, concurrently too: it returns the one pass, which runs once.
func TestBeginWaitsTwice(t *testing.T) {
	t.Parallel()
	for _, local := range []bool{true, false} {
		group := localGroup(t, 2)
		if !local {
			group[0] = &groupTap{Coordinator: group[0]}
		}
		r, peer := groupRunner(t, group[0]), groupRunner(t, group[1])
		wait, err := r.Begin(t.Context(), planBatch(3, 2))
		if err != nil {
			t.Fatal(err)
		}
		ran, refused := make([]int, 8), make([]int, 8)
		agreements := make([]*fwd.Agreement, 8)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				pass, err := wait()
				if err != nil || pass.NumTokens != 5 {
					t.Errorf("%+v, %v", pass, err)
					return
				}
				agreements[i] = pass.Agreement
				err = r.Run(t.Context(), pass, func(context.Context) error { ran[i]++; return nil })
				if errors.Is(err, fwd.ErrInvalid) {
					refused[i]++
				}
			})
		}
		if _, err := peer.Plan(t.Context(), planBatch(1)); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		sum := [2]int{}
		for i := range ran {
			sum[0], sum[1] = sum[0]+ran[i], sum[1]+refused[i]
			if agreements[i] != agreements[0] {
				t.Errorf("call %d has an agreement of its own", i)
			}
		}
		if sum != [2]int{1, 7} {
			t.Errorf("the pass ran %d times and was refused %d times, want 1 and 7", sum[0], sum[1])
		}
	}
}

// When the first exchange has ended, a second may begin, even if nobody has waited for the first. Each wait
// returns its own pass.
func TestBeginWithoutWaiting(t *testing.T) {
	beginGroups(t, 2, func(t *testing.T, group []fwd.Coordinator) {
		runners := []*fwd.Runner{groupRunner(t, group[0]), groupRunner(t, group[1])}
		var waits [][]func() (fwd.Pass, error)
		for step := range 3 {
			waits = append(waits, beginAll(t, runners, planBatch(step+1), planBatch(10)))
			synctest.Wait()
		}
		for step, waits := range waits {
			for rank, wait := range waits {
				pass, err := wait()
				if err != nil {
					t.Fatalf("step %d, rank %d: %v", step+1, rank, err)
				}
				if want := []int{step + 1, 10}[rank]; pass.NumTokens != want || pass.Agreement.Step != uint64(step+1) {
					t.Errorf("rank %d: %d tokens in step %d, want %d in step %d",
						rank, pass.NumTokens, pass.Agreement.Step, want, step+1)
				}
			}
		}
	})
}

// The exchange goes on under Begin's ctx whether or not anybody waits: its end, and the timeout, break the
// round for a peer immediately.
func TestBeginEndsUnattended(t *testing.T) {
	beginGroups(t, 3, func(t *testing.T, group []fwd.Coordinator) {
		r := groupRunner(t, group[0], fwd.WithExchangeTimeout(3*time.Second))
		peer := groupRunner(t, group[1], fwd.WithExchangeTimeout(0))
		for step := uint64(1); step <= 4; step++ {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			wait, err := r.Begin(ctx, planBatch(1))
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			began := time.Now()
			go func() {
				_, err := peer.Plan(t.Context(), planBatch(1))
				done <- err
			}()
			synctest.Wait()
			cause, after := context.DeadlineExceeded, 3*time.Second
			if step%2 == 0 {
				cause, after = errGone, 0
				cancel(errGone)
			}
			groupCheckError(t, 1, <-done, fwd.ErrRankMissing, step, 2)
			if waited := time.Since(began); waited != after {
				t.Errorf("step %d: the peer waited for %v, want %v", step, waited, after)
			}
			synctest.Wait()
			if s := r.Status(); s.Exchanging || s.Step != step {
				t.Errorf("step %d: nobody has waited yet, and the status is %+v", step, s)
			}
			for range 2 {
				_, err = wait()
				groupCheckError(t, 0, err, fwd.ErrRankMissing, step, 2)
				if !errors.Is(err, cause) {
					t.Errorf("step %d: the error %v is not %v", step, err, cause)
				}
			}
		}
	})
}

// Between the halves a second exchange is refused, and what Plan refuses before the exchange is Begin's own
// error, which leaves nothing behind.
func TestBeginRefuses(t *testing.T) {
	beginGroups(t, 2, func(t *testing.T, group []fwd.Coordinator) {
		r, peer := groupRunner(t, group[0]), groupRunner(t, group[1])
		for _, s := range []fwd.Schedule{planBatch(-1), planLoRAs(-1, planBatch(1))} {
			if wait, err := r.Begin(t.Context(), s); !errors.Is(err, fwd.ErrInvalid) || wait != nil {
				t.Errorf("Begin(%+v): %v, want %v", s, err, fwd.ErrInvalid)
			}
		}
		wait, err := r.Begin(t.Context(), planBatch(1))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			second, err := r.Begin(t.Context(), planBatch(1))
			if groupCheckError(t, 0, err, fwd.ErrLockstep, 1, 0); second != nil {
				t.Error("a wait beside the error")
			}
			_, err = r.Plan(t.Context(), planBatch(1))
			groupCheckError(t, 0, err, fwd.ErrLockstep, 1, 0)
		}
		for _, err := range r.WarmUp(t.Context()) {
			groupCheckError(t, 0, err, fwd.ErrLockstep, 1, 0)
		}
		if _, err := peer.Plan(t.Context(), planBatch(1)); err != nil {
			t.Error(err)
		}
		if pass, err := wait(); err != nil || pass.Agreement.Step != 1 {
			t.Errorf("the first: %+v, %v", pass, err)
		}
	})
	r, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Begin(t.Context(), planBatch(1)); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("without a coordinator: %v, want %v", err, fwd.ErrInvalid)
	}
}

// The time until the round has ended counts as waiting, not the time until somebody asks.
func TestBeginMeasuresTheRound(t *testing.T) {
	beginGroups(t, 2, func(t *testing.T, group []fwd.Coordinator) {
		recorder := fwd.NewRecorder(1)
		r := groupRunner(t, group[0], fwd.WithObserver(recorder.Observe))
		peer := groupRunner(t, group[1])
		wait, err := r.Begin(t.Context(), planBatch(1))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if _, err := peer.Plan(t.Context(), planBatch(1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		pass, err := wait()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Run(t.Context(), pass, nothing); err != nil {
			t.Fatal(err)
		}
		if got := recorder.Recent()[0].Wait; got != 5*time.Second {
			t.Errorf("the rank has waited for %v, want 5s", got)
		}
	})
}

// A panic of the coordinator's Exchange comes out of wait, each time, and the next step works. So does the
// end of its goroutine.
func TestBeginPanics(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(){"panic": func() { panic(errGone) }, "exit": runtime.Goexit} {
		calls := 0
		r := groupRunner(t, &groupFake{size: 2, exchange: func(v fwd.Vote) ([]fwd.Vote, error) {
			if calls++; calls == 1 {
				fail()
			}
			return votesAt(v, v.Step, v.Step), nil
		}})
		wait, err := r.Begin(t.Context(), planBatch(1))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if got := panicOf(func() { wait() }); got == nil || name == "panic" && got != error(errGone) {
				t.Errorf("%s: wait panics with %v", name, got)
			}
		}
		if pass, err := r.Plan(t.Context(), planBatch(1)); err != nil || pass.Agreement.Step != 2 {
			t.Errorf("%s: the step after: %+v, %v", name, pass, err)
		}
	}
}

// panicOf returns what f panics with.
func panicOf(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}

// A rank of a local group starts no goroutine to wait with.
func TestBeginStartsNoGoroutine(t *testing.T) {
	group := localGroup(t, 2)
	runners := []*fwd.Runner{groupRunner(t, group[0]), groupRunner(t, group[1])}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	before := runtime.NumGoroutine()
	for range 3 {
		waits := make([]func() (fwd.Pass, error), 2)
		for rank, r := range runners {
			var err error
			if waits[rank], err = r.Begin(ctx, planBatch(1)); err != nil {
				t.Fatal(err)
			}
			if n := runtime.NumGoroutine(); n > before {
				t.Errorf("%d goroutines after Begin of rank %d, want %d", n, rank, before)
			}
		}
		for _, wait := range waits {
			if _, err := wait(); err != nil {
				t.Error(err)
			}
		}
	}
}

// A rank that has nobody to wait for plans immediately: alone, dense, and with Reuse.
func TestBeginAlone(t *testing.T) {
	t.Parallel()
	again := fwd.Schedule{NumScheduledTokens: []int{3, 2}, Reuse: &fwd.Agreement{
		Votes: []fwd.Vote{planVote(1, 1, 1, fwd.GraphNone), planVote(5, 5, 2, fwd.GraphNone)},
	}}
	for name, tt := range map[string]struct {
		parallel fwd.ParallelConfig
		schedule fwd.Schedule
	}{
		"alone": {fwd.ParallelConfig{}, planBatch(3, 2)},
		"dense": {fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1, Dense: true}, planBatch(3, 2)},
		"reuse": {fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, again},
	} {
		r, err := fwd.New(fwd.Config{Parallel: tt.parallel})
		if err != nil {
			t.Fatal(err)
		}
		want, err := r.Plan(t.Context(), tt.schedule)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		wait, err := r.Begin(t.Context(), tt.schedule)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		first, err1 := wait()
		second, err2 := wait()
		if err := errors.Join(err1, err2); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := planDiff(want, first); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if err := r.Run(t.Context(), first, nothing); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := r.Run(t.Context(), second, nothing); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("%s: the one pass runs twice: %v", name, err)
		}
	}
	wait, err := (*fwd.Runner)(nil).Begin(t.Context(), planBatch(4))
	if err != nil {
		t.Fatal(err)
	}
	pass, err := wait()
	if diff := cmp.Diff([]int{4, 1}, []int{pass.NumTokens, pass.NumReqs}); diff != "" || err != nil {
		t.Errorf("of a nil Runner: %v\n%s", err, diff)
	}
}
