// This file lists faults in Last, the method that names the rank whose vote came last.

package fwdtest_test

import (
	"context"
	"sync"

	"github.com/forwardctx/fwd"
)

// inLast breaks what Last returns; newLast is called once for a rank.
func inLast(newLast func() func(c fwd.Coordinator) int) breakGroup {
	return func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = broken{Coordinator: c, last: newLast()}
		}
	}
}

// asLast breaks Last of ranks that have no state.
func asLast(last func(c fwd.Coordinator) int) breakGroup {
	return inLast(func() func(fwd.Coordinator) int { return last })
}

var lastFaults = []fault{
	{"Last is the rank itself", asLast(fwd.Coordinator.Rank),
		`rank \d names \d as the last, want`, []string{"Last/None", "Last/InOrder"}},
	{"Last is the highest rank", asLast(func(c fwd.Coordinator) int { return c.Size() - 1 }),
		`names \d as the last, want`, []string{"Last/InOrder", "Last/AfterBrokenSteps"}},
	{"Last is one too high", asLast(func(c fwd.Coordinator) int { return last(c) + 1 }),
		`names \d as the last`, []string{"Last/None", "Last/InOrder", "Last/AnyTime"}},
	{"Last never knows", asLast(func(fwd.Coordinator) int { return -1 }),
		`names -1 as the last`, []string{"Last/None", "Last/InOrder", "Last/AnyTime"}},
	{"Last is 0 before the first exchange", asLast(func(c fwd.Coordinator) int { return max(last(c), 0) }),
		`names 0 as the last, want -1`, []string{"Last/None", "Last/AfterBrokenSteps"}},
	{"Last survives a broken step", inLast(func() func(fwd.Coordinator) int {
		var mu sync.Mutex
		known := -1
		return func(c fwd.Coordinator) int {
			mu.Lock()
			defer mu.Unlock()
			if now := last(c); now >= 0 {
				known = now
			}
			return known
		}
	}), `names \d as the last, want -1`, []string{"Last/AfterBrokenSteps"}},
	{"Last is that of the exchange before", func(group []fwd.Coordinator) {
		for i, c := range group {
			var mu sync.Mutex
			now, before := -1, -1
			e := func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
				votes, err := c.Exchange(ctx, v)
				mu.Lock()
				defer mu.Unlock()
				now, before = last(c), now
				return votes, err
			}
			group[i] = broken{Coordinator: c, exchange: e, last: func(fwd.Coordinator) int {
				mu.Lock()
				defer mu.Unlock()
				return before
			}}
		}
	}, `names -?\d as the last, want`, []string{"Last/None", "Last/InOrder"}},
	{"Last is the first of the others to come", func(group []fwd.Coordinator) {
		var mu sync.Mutex
		came := map[uint64][]int{}
		for i, c := range group {
			e := func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
				mu.Lock()
				came[v.Step] = append(came[v.Step], c.Rank())
				mu.Unlock()
				return c.Exchange(ctx, v)
			}
			group[i] = broken{Coordinator: c, exchange: e, last: func(c fwd.Coordinator) int {
				mu.Lock()
				defer mu.Unlock()
				for step := uint64(100); step > 0 && last(c) >= 0; step-- {
					if ranks := came[step]; len(ranks) == c.Size() {
						return ranks[0]
					}
				}
				return last(c)
			}}
		}
	}, `names \d as the last, want`, []string{"Last/None", "Last/InOrder"}},
	{"Last blocks while an exchange is open", func(group []fwd.Coordinator) {
		for i, c := range group {
			var mu sync.Mutex
			group[i] = broken{Coordinator: c, exchange: holding(&mu), last: func(c fwd.Coordinator) int {
				mu.Lock()
				defer mu.Unlock()
				return last(c)
			}}
		}
	}, `Last of rank \d has not returned after 2s`, []string{"Last/None", "Last/InOrder"}},
}
