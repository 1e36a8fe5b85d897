package fwdtest

import (
	"context"
	"errors"
	"iter"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// fleet is the Runners of a group's ranks.
type fleet struct {
	*testing.T
	runners []*fwd.Runner
	settle  time.Duration
	step    uint64 // of the last exchange
}

// fleet returns Runners on the coordinators of a new group. All are configured alike.
func (s suite) fleet(t *testing.T, size int) *fleet {
	t.Helper()
	f := &fleet{T: t, settle: s.settle}
	parallel := fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 4, PrefillUBatchThreshold: 4}
	for rank, c := range s.newGroup(t, size) {
		parallel.DataParallelSize, parallel.DataParallelRank = size, rank
		r, err := fwd.New(fwd.Config{Name: "suite", Parallel: parallel},
			fwd.WithCoordinator(c), fwd.WithDispatcher(graphs(t, 8, 32)))
		if err != nil {
			t.Fatal(err)
		}
		f.runners = append(f.runners, r)
	}
	return f
}

func (f *fleet) all() (ranks []int) {
	for rank := range f.runners {
		ranks = append(ranks, rank)
	}
	return ranks
}

// graphs returns a dispatcher with those capture sizes.
func graphs(t *testing.T, sizes ...int) *fwd.Dispatcher {
	t.Helper()
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: sizes, MaxNumSeqs: 16,
		LoRA: &fwd.LoRAConfig{MaxLoRAs: 2},
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// planned is what a plan returned.
type planned struct {
	pass fwd.Pass
	err  error
}

// each calls f for every rank concurrently, and returns what it returned, by rank. If one does not
// return, the check fails, and it is left behind.
func (f *fleet) each(do func(rank int) planned) []planned {
	f.Helper()
	type result struct {
		rank int
		planned
	}
	done := make(chan result, len(f.runners))
	for rank := range f.runners {
		go func() { done <- result{rank, do(rank)} }()
	}
	all := make([]planned, len(f.runners))
	returned := make([]bool, len(f.runners))
	overdue := time.After(patience)
	for range f.runners {
		select {
		case r := <-done:
			all[r.rank], returned[r.rank] = r.planned, true
		case <-overdue:
			f.Fatalf("after %v these ranks have returned: %v", patience, returned)
		}
	}
	return all
}

// plan lets every rank plan a step.
func (f *fleet) plan(schedule func(rank int) fwd.Schedule) []planned {
	f.Helper()
	return f.each(func(rank int) planned {
		pass, err := f.runners[rank].Plan(f.Context(), schedule(rank))
		return planned{pass, err}
	})
}

// agreed checks that all ranks have agreed, at the group's next step, on the same votes.
func (f *fleet) agreed(all []planned) {
	f.Helper()
	f.step++
	for rank, p := range all {
		switch {
		case p.err != nil:
			f.Fatalf("rank %d in step %d: %v", rank, f.step, p.err)
		case p.pass.Agreement == nil || p.pass.Agreement.Step != f.step:
			f.Fatalf("rank %d agrees on %+v, want an agreement of step %d", rank, p.pass.Agreement, f.step)
		}
		if err := differ(p.pass.Agreement.Votes, all[0].pass.Agreement.Votes); err != nil {
			f.Fatalf("rank %d agrees on other votes than rank 0 in step %d: %v", rank, f.step, err)
		}
	}
}

// failed checks that all ranks get a RankError of that kind, with the group's next step and that
// rank.
func (f *fleet) failed(all []planned, kind error, odd int) {
	f.Helper()
	f.step++
	for rank, p := range all {
		var err *fwd.RankError
		if !errors.As(p.err, &err) || !errors.Is(err, kind) || err.Step != f.step ||
			!slices.Equal(err.Ranks, []int{odd}) {
			f.Fatalf("rank %d: error %v, want a RankError that is %v, in step %d with ranks [%d]",
				rank, p.err, kind, f.step, odd)
		}
	}
}

// mixed is a schedule of 17 tokens, which a graph of 32 tokens holds.
func mixed(int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: []int{10, 7}} }

// together checks that the group is whole.
func (f *fleet) together() {
	f.Helper()
	f.agreed(f.plan(mixed))
}

// planSchedules checks that all of what each rank schedules comes to all.
func (s suite) planSchedules(t *testing.T, size int) {
	f := s.fleet(t, size)
	schedules := []fwd.Schedule{
		{NumScheduledTokens: []int{1, 1, 1, 1, 1}, NumActiveLoRAs: 1, AllowUBatches: true, Note: 1<<63 + 1},
		{NumScheduledTokens: []int{3, 4}, NumActiveLoRAs: 2, ExcludeFull: true, Note: 1 << 40},
		{NumScheduledTokens: []int{1, 1}, Prefill: true, Eager: true, Note: 7},
	}
	want := []fwd.Vote{
		{NumTokens: 5, NumTokensPadded: 8, NumReqs: 5, NumActiveLoRAs: 1, Uniform: true, UBatch: true,
			GraphMode: fwd.GraphFull, Note: 1<<63 + 1},
		{NumTokens: 7, NumTokensPadded: 8, NumReqs: 2, NumActiveLoRAs: 2, ExcludeFull: true,
			GraphMode: fwd.GraphPiecewise, Note: 1 << 40},
		{NumTokens: 2, NumTokensPadded: 2, NumReqs: 2, Eager: true, Note: 7},
	}
	for turn := range 3 { // each schedule has its turn on each rank
		of := func(rank int) int { return (rank + turn) % 3 }
		all := f.plan(func(rank int) fwd.Schedule { return schedules[of(rank)] })
		f.agreed(all)
		votes := all[0].pass.Agreement.Votes
		for rank := range votes {
			w := want[of(rank)]
			w.Step, w.Config = f.step, votes[0].Config
			if w.Config == 0 || !same(&votes[rank], &w) {
				t.Errorf("the vote of rank %d has %s", rank, difference(votes[rank], w))
			}
		}
	}
}

// planIdle checks that an idle rank neither lowers the mode nor forbids microbatches, and that its
// dummy pass takes the shape on which the others agree.
func (s suite) planIdle(t *testing.T, size int) {
	f := s.fleet(t, size)
	for _, idle := range some(f.all()) {
		for _, split := range []bool{false, true} {
			all := f.plan(func(rank int) fwd.Schedule {
				if rank == idle {
					return fwd.Schedule{AllowUBatches: split}
				}
				return fwd.Schedule{NumScheduledTokens: []int{10, 7}, AllowUBatches: split}
			})
			f.agreed(all)
			for rank, p := range all {
				a := p.pass.Agreement
				if a.Idle || a.UBatch != split || a.GraphMode != fwd.GraphPiecewise || p.pass.NumTokens != 32 {
					t.Errorf("rank %d with rank %d idle: agreed on %v, microbatches %t, %d tokens, all idle %t; "+
						"want PIECEWISE, %t, 32, false", rank, idle, a.GraphMode, a.UBatch, p.pass.NumTokens, a.Idle, split)
				}
				if dummy := rank == idle; p.pass.Dummy != dummy || a.Votes[rank].Idle != dummy {
					t.Errorf("rank %d with rank %d idle: dummy pass %t, idle vote %t", rank, idle,
						p.pass.Dummy, a.Votes[rank].Idle)
				}
			}
		}
	}
}

// planAllIdle checks that every rank knows when all are idle, so that nobody runs a pass.
func (s suite) planAllIdle(t *testing.T, size int) {
	f := s.fleet(t, size)
	for range 2 {
		all := f.plan(func(int) fwd.Schedule { return fwd.Schedule{} })
		f.agreed(all)
		for rank, p := range all {
			if !p.pass.Agreement.Idle {
				t.Errorf("rank %d does not know that all ranks are idle", rank)
			}
			err := f.runners[rank].Run(t.Context(), p.pass, func(context.Context) error {
				t.Errorf("rank %d runs a pass although all ranks are idle", rank)
				return nil
			})
			if err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
		}
		f.together()
	}
}

// planConfiguredDifferently checks that all ranks get an error that names the one with other
// graphs, and that the next step works, with the right ones.
func (s suite) planConfiguredDifferently(t *testing.T, size int) {
	f := s.fleet(t, size)
	for _, odd := range some(f.all()) {
		f.together()
		f.withGraphs(odd, graphs(t, 8, 32, 64))
		f.failed(f.plan(mixed), fwd.ErrInvalid, odd)
		f.withGraphs(odd, graphs(t, 8, 32))
		f.together()
	}
}

func (f *fleet) withGraphs(rank int, d *fwd.Dispatcher) {
	f.Helper()
	r, err := f.runners[rank].WithGraphs(d)
	if err != nil {
		f.Fatal(err)
	}
	f.runners[rank] = r
}

// planWarmUp lets the ranks warm up every graph together, and then serve.
func (s suite) planWarmUp(t *testing.T, size int) {
	f := s.fleet(t, size)
	captures := graphs(t, 8, 32).Captures()
	all := f.each(func(rank int) planned {
		n := 0
		for pass, err := range f.runners[rank].WarmUp(t.Context()) {
			if err != nil {
				return planned{err: err}
			}
			if n < len(captures) && pass.Batch != captures[n].Batch {
				t.Errorf("rank %d warms up %+v, want %+v", rank, pass.Batch, captures[n].Batch)
			}
			n++
		}
		if n != len(captures) {
			t.Errorf("rank %d has warmed up %d graphs, want %d", rank, n, len(captures))
		}
		return planned{}
	})
	for rank, p := range all {
		if p.err != nil {
			t.Fatalf("rank %d: %v", rank, p.err)
		}
	}
	f.step += uint64(len(captures)) + 1 // the last exchange says that all have ended
	f.together()
}

// planWarmUpAlone lets ranks warm up while another serves: all get an error that names it.
func (s suite) planWarmUpAlone(t *testing.T, size int) {
	f := s.fleet(t, size)
	for _, serves := range some(f.all()) {
		all := f.each(func(rank int) planned {
			if rank == serves {
				pass, err := f.runners[rank].Plan(t.Context(), mixed(rank))
				return planned{pass, err}
			}
			return f.warmUp(rank)()
		})
		f.failed(all, fwd.ErrLockstep, serves)
		f.together()
	}
}

// warmUp returns a function that plans the next graph of a warm-up.
func (f *fleet) warmUp(rank int) (next func() planned) {
	pull, stop := iter.Pull2(f.runners[rank].WarmUp(f.Context()))
	f.Cleanup(stop)
	return func() planned {
		pass, err, _ := pull()
		return planned{pass, err}
	}
}

// planWarmUpAnotherGraph lets one rank begin its warm-up again while the others go on to the next
// graph.
func (s suite) planWarmUpAnotherGraph(t *testing.T, size int) {
	f := s.fleet(t, size)
	for _, odd := range some(f.all()) {
		next := make([]func() planned, len(f.runners))
		for rank := range next {
			next[rank] = f.warmUp(rank)
		}
		f.agreed(f.each(func(rank int) planned { return next[rank]() }))
		next[odd] = f.warmUp(odd)
		f.failed(f.each(func(rank int) planned { return next[rank]() }), fwd.ErrLockstep, odd)
		f.together()
	}
}

// begin lets ranks begin a plan, all in this goroutine.
func (f *fleet) begin(ctx context.Context, ranks ...int) (waits []func() planned) {
	f.Helper()
	for _, rank := range ranks {
		schedule := mixed(rank)
		schedule.Note = 1<<63 + f.step*1000 + uint64(rank)
		wait, err := f.runners[rank].Begin(ctx, schedule)
		if err != nil {
			f.Fatalf("rank %d begins step %d: %v", rank, f.step+1, err)
		}
		clear(schedule.NumScheduledTokens) // the caller may use it again
		waits = append(waits, func() planned {
			pass, err := wait()
			return planned{pass, err}
		})
	}
	return waits
}

// planBegin lets all ranks begin in one goroutine, then wait, in another order and more than once.
func (s suite) planBegin(t *testing.T, size int) {
	f := s.fleet(t, size)
	for step := range uint64(6) {
		waits := f.begin(t.Context(), f.all()...)
		slices.Reverse(waits)
		all := f.each(func(i int) planned { return waits[i]() })
		slices.Reverse(all)
		f.agreed(all)
		slices.Reverse(waits)
		for rank, p := range all {
			if want := 1<<63 + step*1000 + uint64(rank); p.pass.Agreement.Votes[rank].Note != want {
				t.Errorf("the Note of rank %d is %d, want %d", rank, p.pass.Agreement.Votes[rank].Note, want)
			}
			if again := waits[rank](); !reflect.DeepEqual(again, p) {
				t.Errorf("rank %d: another wait returns %+v, want %+v", rank, again, p)
			}
		}
	}
}

// planBeginMissing lets the ctx of a begun plan end before the last rank has come: all that have
// begun get an error that names it. It comes late, and the group is whole.
func (s suite) planBeginMissing(t *testing.T, size int) {
	f := s.fleet(t, size)
	f.together()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	last := size - 1
	waits := f.begin(ctx, 0)
	waits = append(waits, f.begin(t.Context(), f.all()[1:last]...)...)
	waits = append(waits, waits[last-1]) // the last rank has not begun
	time.Sleep(f.settle)
	cancel()
	all := f.each(func(i int) planned { return waits[i]() })
	f.failed(all, fwd.ErrRankMissing, last)
	for rank, p := range all[:last] {
		if own := rank == 0; errors.Is(p.err, context.Canceled) != own {
			t.Errorf("rank %d, when the context of rank 0 ended: %v", rank, p.err)
		}
	}
	time.Sleep(f.settle) // for the news to come to the last rank
	f.together()
}
