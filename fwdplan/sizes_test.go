// This file is about counting passes: which count, as what size, and what that costs.

package fwdplan_test

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// vote is that of a busy rank.
func vote(tokens int, uniform bool) fwd.Vote {
	return fwd.Vote{NumTokens: tokens, NumTokensPadded: tokens, NumReqs: tokens, Uniform: uniform}
}

func TestObserve(t *testing.T) {
	t.Parallel()
	full := fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}
	adapted := fwd.BatchDescriptor{NumTokens: 16, HasLoRA: true, NumActiveLoRAs: 4}
	idle := fwd.Vote{NumTokens: 64, Idle: true, Uniform: true}
	for name, c := range map[string]struct {
		rec  fwd.Record
		want fwdplan.Row
	}{
		"alone, decode": {
			rec:  fwd.Record{NumTokensUnpadded: 5, GraphMode: fwd.GraphFull, Batch: full, Duration: 7},
			want: fwdplan.Row{Tokens: 5, Uniform: true, Captured: 8, Passes: 1, Nanoseconds: 7},
		},
		"alone, eager decode": {
			rec:  fwd.Record{NumTokensUnpadded: 5, Phase: "decode"},
			want: fwdplan.Row{Tokens: 5, Uniform: true, Passes: 1},
		},
		"alone, mixed with adapters": {
			rec:  fwd.Record{NumTokensUnpadded: 9, GraphMode: fwd.GraphPiecewise, Batch: adapted, Phase: "mixed"},
			want: fwdplan.Row{Tokens: 9, Adapters: 4, Captured: 16, Passes: 1},
		},
		"the largest busy rank decides": {
			rec: fwd.Record{
				NumTokensUnpadded: 2, Votes: []fwd.Vote{vote(2, true), vote(6, true), idle},
				GraphMode: fwd.GraphFull, Batch: full,
			},
			want: fwdplan.Row{Tokens: 6, Uniform: true, Captured: 8, Passes: 1},
		},
		"one rank is not uniform": {
			rec:  fwd.Record{NumTokensUnpadded: 2, Votes: []fwd.Vote{vote(2, true), vote(6, false)}},
			want: fwdplan.Row{Tokens: 6, Passes: 1},
		},
		"an idle rank keeps step": {
			rec: fwd.Record{
				NumTokensUnpadded: 1, Rank: 1, Votes: []fwd.Vote{vote(6, true), idle}, Dummy: true,
				GraphMode: fwd.GraphFull, Batch: full,
			},
			want: fwdplan.Row{Tokens: 6, Uniform: true, Captured: 8, Dummies: 1},
		},
		"eager with adapters": {
			rec: fwd.Record{Rank: 1, Votes: []fwd.Vote{
				{NumTokens: 7, NumActiveLoRAs: 1}, {NumTokens: 2, NumActiveLoRAs: 3}}},
			want: fwdplan.Row{Tokens: 7, Adapters: 3, Passes: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkObserved(t, c.rec, []fwdplan.Row{c.want}, fwdplan.LeftOut{})
		})
	}
}

func TestObserveLeftOut(t *testing.T) {
	t.Parallel()
	full := fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}
	for name, c := range map[string]struct {
		rec  fwd.Record
		left fwdplan.LeftOut
	}{
		"failed": {rec: fwd.Record{Err: errors.New("no")}, left: fwdplan.LeftOut{Failed: 1}},
		"warm-up": {rec: fwd.Record{NumTokensUnpadded: 8, Dummy: true, Batch: full},
			left: fwdplan.LeftOut{NoBatch: 1}},
		"warm-up of a group": {
			rec:  fwd.Record{NumTokensUnpadded: 8, Dummy: true, Votes: []fwd.Vote{{NumTokens: 8, WarmUp: true}}},
			left: fwdplan.LeftOut{NoBatch: 1},
		},
		"split": {rec: fwd.Record{NumTokensUnpadded: 600, UBatches: 2}, left: fwdplan.LeftOut{NoGraph: 1}},
		"eager by choice": {
			rec:  fwd.Record{NumTokensUnpadded: 6, Votes: []fwd.Vote{vote(6, true), {NumTokens: 1, Eager: true}}},
			left: fwdplan.LeftOut{NoGraph: 1},
		},
		"no full graph by choice": {
			rec: fwd.Record{NumTokensUnpadded: 6, Votes: []fwd.Vote{vote(6, true),
				{NumTokens: 1, ExcludeFull: true}}},
			left: fwdplan.LeftOut{NoGraph: 1},
		},
		"too many adapters": {
			rec:  fwd.Record{NumTokensUnpadded: 6, Reason: fwd.ReasonLoRA},
			left: fwdplan.LeftOut{NoGraph: 1},
		},
		"beyond": {rec: fwd.Record{NumTokensUnpadded: 1 << 23}, left: fwdplan.LeftOut{Beyond: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkObserved(t, c.rec, nil, c.left)
		})
	}
}

// checkObserved gives a record to a new Sizes, and one of another Runner.
func checkObserved(t *testing.T, rec fwd.Record, rows []fwdplan.Row, left fwdplan.LeftOut) {
	t.Helper()
	rec.Name, rec.Size = "target", max(len(rec.Votes), 1)
	var sizes fwdplan.Sizes
	sizes.Observe(t.Context(), &rec)
	want := fwdplan.Snapshot{Name: "target", Ranks: rec.Size, Rows: rows, LeftOut: left}
	if got := sizes.Snapshot(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	rec.Name = "draft"
	sizes.Observe(t.Context(), &rec)
	if got := sizes.Snapshot(); got.LeftOut.Other != 1 {
		t.Errorf("a record of another Runner: %+v", got)
	}
}

// TestObserveRunner counts what real Runners report.
func TestObserveRunner(t *testing.T) {
	t.Parallel()
	dispatcher, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{4, 8}, MaxNumSeqs: 8,
	})
	if err != nil {
		t.Fatal(err)
	}
	coordinators, err := fwd.NewLocalGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	lengths := [][][]int{{{1, 1, 1}, nil, {1, 5}}, {{1}, {1, 1}, {1}}} // by rank and step
	var sizes [2]fwdplan.Sizes
	var group sync.WaitGroup
	for rank := range sizes {
		group.Go(func() {
			runner, err := fwd.New(fwd.Config{}, fwd.WithCoordinator(coordinators[rank]),
				fwd.WithDispatcher(dispatcher), fwd.WithObserver(sizes[rank].Observe))
			if err != nil {
				t.Error(err)
				return
			}
			for _, scheduled := range lengths[rank] {
				pass, err := runner.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: scheduled})
				if err != nil {
					t.Error(err)
					return
				}
				if err := runner.Run(t.Context(), pass, func(context.Context) error { return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	for rank := range sizes {
		got := sizes[rank].Snapshot()
		for i := range got.Rows {
			got.Rows[i].Nanoseconds = 0
		}
		want := []fwdplan.Row{
			{Tokens: 2, Uniform: true, Captured: 4, Passes: 1},
			{Tokens: 3, Uniform: true, Captured: 4, Passes: 1},
			{Tokens: 6, Captured: 8, Passes: 1},
		}
		if rank == 0 {
			want[0].Passes, want[0].Dummies = 0, 1
		}
		if !reflect.DeepEqual(got.Rows, want) {
			t.Errorf("rank %d counted %+v\nwant %+v", rank, got.Rows, want)
		}
	}
}

// TestObserveBound gives more kinds of passes than there is place for, from several goroutines.
func TestObserveBound(t *testing.T) {
	t.Parallel()
	const routines, each = 4, 40_000
	var sizes fwdplan.Sizes
	var group sync.WaitGroup
	for range routines {
		group.Go(func() {
			for n := range each {
				sizes.Observe(context.Background(), &fwd.Record{NumTokensUnpadded: n + 1, Duration: time.Nanosecond})
				if n%10_000 == 0 {
					sizes.Snapshot()
				}
			}
		})
	}
	group.Wait()
	snap := sizes.Snapshot()
	counted := uint64(0)
	for i, r := range snap.Rows {
		counted += r.Passes
		if r.Passes != routines || r.Nanoseconds != routines || i > 0 && r.Tokens <= snap.Rows[i-1].Tokens {
			t.Fatalf("row %+v, want %d passes", r, routines)
		}
	}
	if counted+snap.LeftOut.Beyond != routines*each || snap.LeftOut.Beyond == 0 || len(snap.Rows) > 1<<15 {
		t.Errorf("%d rows with %d passes, and %d beyond", len(snap.Rows), counted, snap.LeftOut.Beyond)
	}
}

// TestObserveTogether lets goroutines meet new sizes concurrently.
func TestObserveTogether(t *testing.T) {
	t.Parallel()
	const routines, sizesEach = 8, 64
	for range 30 {
		var sizes fwdplan.Sizes
		var group sync.WaitGroup
		begin := make(chan struct{})
		for range routines {
			group.Go(func() {
				<-begin
				for n := range sizesEach {
					sizes.Observe(context.Background(), &fwd.Record{NumTokensUnpadded: n + 1})
				}
			})
		}
		close(begin)
		group.Wait()
		snap := sizes.Snapshot()
		if len(snap.Rows) != sizesEach {
			t.Fatalf("%d rows, want %d", len(snap.Rows), sizesEach)
		}
		for _, r := range snap.Rows {
			if r.Passes != routines {
				t.Fatalf("row %+v, want %d passes", r, routines)
			}
		}
	}
}

// TestObserveExact counts as many sizes as a planner has to bear, and loses none.
func TestObserveExact(t *testing.T) {
	t.Parallel()
	var sizes fwdplan.Sizes
	for size := 1; size <= 8192; size++ {
		for _, phase := range []string{"decode", "mixed"} {
			sizes.Observe(t.Context(), &fwd.Record{NumTokensUnpadded: size, Phase: phase})
		}
	}
	if snap := sizes.Snapshot(); len(snap.Rows) != 2*8192 || snap.LeftOut != (fwdplan.LeftOut{}) {
		t.Errorf("%d rows of %d, %+v left out", len(snap.Rows), 2*8192, snap.LeftOut)
	}
}

func TestObserveAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	var sizes fwdplan.Sizes
	rec := fwd.Record{Name: "target", Size: 2, Votes: []fwd.Vote{vote(3, true), vote(4, true)}}
	sizes.Observe(t.Context(), &rec)
	n := 0
	if got := testing.AllocsPerRun(200, func() {
		n++
		rec.Votes[0].NumTokens = n // also the first pass of a size
		sizes.Observe(context.Background(), &rec)
	}); got != 0 {
		t.Errorf("a pass allocates %v times", got)
	}
}

func BenchmarkObserve(b *testing.B) {
	var sizes fwdplan.Sizes
	rec := fwd.Record{Name: "target", Size: 4, Duration: time.Millisecond, Votes: []fwd.Vote{
		vote(3, true), vote(4, true), vote(9, true), vote(1, true)}}
	b.ReportAllocs()
	for b.Loop() {
		sizes.Observe(context.Background(), &rec)
	}
}
