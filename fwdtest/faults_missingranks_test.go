// This file lists faults in Missing, the method that names the ranks which an exchange waits for.

package fwdtest_test

import (
	"context"
	"slices"
	"sync"

	"github.com/forwardctx/fwd"
)

// inMissing breaks what Missing returns; newMissing is called once for a rank.
func inMissing(newMissing func() func(c fwd.Coordinator) []int) breakGroup {
	return func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = broken{Coordinator: c, missing: newMissing()}
		}
	}
}

// inRanksMissing breaks the ranks that Missing returns if an exchange is open.
func inRanksMissing(spoil func(c fwd.Coordinator, ranks []int) []int) breakGroup {
	return inMissing(func() func(fwd.Coordinator) []int {
		return func(c fwd.Coordinator) []int {
			ranks := missing(c)
			if ranks != nil {
				ranks = spoil(c, ranks)
			}
			return ranks
		}
	})
}

var missingRanksFaults = []fault{
	{"Missing is nil while it waits", inRanksMissing(func(fwd.Coordinator, []int) []int { return nil }),
		`names \[\]int\(nil\) as missing, want \[\]int\{`, []string{"MissingRanks/Waiting"}},
	{"Missing includes the rank itself", inRanksMissing(func(c fwd.Coordinator, ranks []int) []int {
		return append(ranks, c.Rank())
	}), `rank \d names .* as missing`, []string{"MissingRanks/Waiting", "MissingRanks/AnyTime"}},
	{"Missing names the wrong rank", inRanksMissing(func(c fwd.Coordinator, ranks []int) []int {
		ranks[0] = (ranks[0] + 1) % c.Size()
		return ranks
	}), `names .* as missing, want`, []string{"MissingRanks/Waiting", "MissingRanks/AfterBrokenSteps"}},
	{"Missing names one rank too few", inRanksMissing(func(_ fwd.Coordinator, ranks []int) []int {
		return ranks[:len(ranks)-1]
	}), `names .* as missing`, []string{"MissingRanks/Waiting", "MissingRanks/AnyTime"}},
	{"Missing names those who are here", inRanksMissing(func(c fwd.Coordinator, ranks []int) []int {
		return others(c, ranks...)
	}), `names .* as missing`, []string{"MissingRanks/Waiting"}},
	{"Missing is not nil when none is open", inMissing(func() func(fwd.Coordinator) []int {
		return func(c fwd.Coordinator) []int { return append([]int{}, missing(c)...) }
	}), `names \[\]int\{\} as missing, want \[\]int\(nil\)`,
		[]string{"MissingRanks/NoneOpen", "MissingRanks/Waiting"}},
	{"Missing names all others when none is open", inMissing(func() func(fwd.Coordinator) []int {
		return func(c fwd.Coordinator) []int {
			if ranks := missing(c); ranks != nil {
				return ranks
			}
			return others(c, c.Rank())
		}
	}), `names .* as missing, want \[\]int\(nil\)`, []string{"MissingRanks/NoneOpen"}},
	{"Missing is stale in a round", inMissing(func() func(fwd.Coordinator) []int {
		var mu sync.Mutex
		var first []int
		return func(c fwd.Coordinator) []int { // what it said when it was asked first in the round
			mu.Lock()
			defer mu.Unlock()
			if ranks := missing(c); first == nil || ranks == nil {
				first = ranks
			}
			return slices.Clone(first)
		}
	}), `names .* as missing, want \[\]int\{`, []string{"MissingRanks/Waiting"}},
	{"Missing is stale after a broken round", func(group []fwd.Coordinator) {
		var mu sync.Mutex
		were := make(map[int]bool) // those that were in a broken round, until a round is complete
		for i, c := range group {
			e := func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
				votes, err := c.Exchange(ctx, v)
				mu.Lock()
				defer mu.Unlock()
				if were[c.Rank()] = err != nil; err == nil {
					clear(were)
				}
				return votes, err
			}
			group[i] = broken{Coordinator: c, exchange: e, missing: func(c fwd.Coordinator) []int {
				mu.Lock()
				defer mu.Unlock()
				return slices.DeleteFunc(missing(c), func(rank int) bool { return were[rank] })
			}}
		}
	}, `names .* as missing, want`, []string{"MissingRanks/AfterBrokenSteps"}},
	{"Missing blocks while an exchange is open", func(group []fwd.Coordinator) {
		for i, c := range group {
			var mu sync.Mutex
			group[i] = broken{Coordinator: c, exchange: holding(&mu), missing: func(c fwd.Coordinator) []int {
				mu.Lock()
				defer mu.Unlock()
				return missing(c)
			}}
		}
	}, `Missing of rank \d has not returned after 2s`, []string{"MissingRanks/Waiting"}},
}
