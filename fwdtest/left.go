package fwdtest

import (
	"context"
	"runtime"
	"testing"
	"time"
)

// footprint is what a process holds.
type footprint struct{ goroutines, bytes int }

func current() footprint {
	runtime.GC()
	runtime.GC() // frees what was in a pool
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return footprint{runtime.NumGoroutine(), int(stats.HeapAlloc)}
}

// leavesNothing checks that do, which does something so many times, leaves neither goroutines nor
// memory behind. The process may have other goroutines, which come and go, and memory for things
// that are made once. So one good try of several is enough: a leak shows in each.
func leavesNothing(t *testing.T, times int, do func()) {
	t.Helper()
	most := footprint{goroutines: times / 4, bytes: 32*times + 64<<10}
	var left footprint
	for range 5 {
		before := current()
		do()
		if left = before.grown(most); left.within(most) {
			return
		}
	}
	t.Errorf("%d times left %d goroutines and %d bytes behind, want about none",
		times, left.goroutines, left.bytes)
}

// grown returns how much more there is than before, after it has given goroutines time to end.
func (before footprint) grown(most footprint) footprint {
	deadline := time.Now().Add(500 * time.Millisecond)
	for {
		now := current()
		grown := footprint{now.goroutines - before.goroutines, now.bytes - before.bytes}
		if grown.within(most) || time.Now().After(deadline) {
			return grown
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (f footprint) within(most footprint) bool {
	return f.goroutines <= most.goroutines && f.bytes <= most.bytes
}

// nothingLeftByRounds checks that rounds leave nothing behind.
func (s suite) nothingLeftByRounds(t *testing.T, size int) {
	g := s.group(t, size)
	const rounds = 1000
	leavesNothing(t, rounds, func() { g.takeAll(rounds, noPause) })
}

// nothingLeftByBrokenRounds checks that broken rounds leave nothing behind.
func (s suite) nothingLeftByBrokenRounds(t *testing.T, size int) {
	g := s.group(t, size)
	here := g.except(size - 1)
	const rounds = 1000
	leavesNothing(t, rounds, func() {
		for range rounds {
			g.breakAtOnce(here...)
		}
	})
	g.comeTogether()
}

// breakAtOnce lets those ranks come, and all go away again, before or after the others have come.
func (g *group) breakAtOnce(here ...int) {
	g.Helper()
	ctx, cancel := context.WithCancel(g.Context())
	calls := g.begin(ctx, here...)
	cancel()
	for _, c := range calls {
		c.returned(atOnce)
		var err error
		if g.steps[c.rank], err = missed(c.rank, c.vote, c.err); err != nil {
			g.Fatalf("%v: %v", c, err)
		}
	}
}

// nothingLeftByGroups checks that groups which were closed leave nothing behind.
func (s suite) nothingLeftByGroups(t *testing.T, size int) {
	const each, groups = 10, 100
	leavesNothing(t, groups, func() {
		for range groups / each {
			t.Run("closed", func(t *testing.T) { // its Cleanup closes them
				for range each {
					g := s.group(t, size)
					g.together()
					g.breakAtOnce(0)
					g.comeTogether()
				}
			})
		}
	})
}
