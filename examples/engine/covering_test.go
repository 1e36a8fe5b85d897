// Answers in every configuration, as far as any two settings go together.

package engine

import (
	"fmt"
	"testing"

	"github.com/forwardctx/fwd"
)

// TestCovering: the answers are those of the reference in every configuration, as far as any two
// settings go together.
func TestCovering(t *testing.T) {
	forCovering(t, func(t *testing.T, cfg Config, adapters int) {
		// A prompt that is larger than any graph, and some small ones for every rank.
		requests := newRequests(9*cfg.DataParallelSize, 20, 10)
		requests[0].Prompt = newRequests(1, 1, 1)[0].Prompt
		for len(requests[0].Prompt) < 150 {
			requests[0].Prompt = append(requests[0].Prompt, 7*len(requests[0].Prompt)%256)
		}
		stats := serve(t, cfg, withAdapters(requests, adapters))
		for what, got := range map[string]struct{ want, is bool }{
			"split passes":    {cfg.NumUBatches > 1, stats.SplitPasses > 0},
			"accepted tokens": {cfg.NumSpeculativeTokens > 0, stats.AcceptedTokens > 0},
			"captures":        {cfg.GraphMode != fwd.GraphNone, stats.Captures > 0},
			"replays":         {cfg.GraphMode != fwd.GraphNone, stats.Replays > stats.Captures},
			"FULL passes":     {cfg.GraphMode.HasFullGraphs(), stats.Modes[fwd.GraphFull] > 0},
		} {
			if what == "FULL passes" && cfg.NumUBatches > 1 {
				continue // it may be that all passes are split
			}
			if got.want != got.is {
				t.Errorf("%s: %t, want %t: %+v", what, got.is, got.want, stats)
			}
		}
	})
}

// forCovering runs a test in so many configurations that any two settings are together in one of
// them, with so many adapters.
func forCovering(t *testing.T, test func(t *testing.T, cfg Config, adapters int)) {
	dp, sp, chunk := []int{1, 2, 3, 4}, []int{1, 2}, []int{1, 7, 64}
	modes := []fwd.GraphMode{
		fwd.GraphNone,
		fwd.GraphPiecewise,
		fwd.GraphFull,
		fwd.GraphFullDecodeOnly,
		fwd.GraphFullAndPiecewise,
	}
	ubatches, spec, loras := []int{1, 2, 3}, []int{0, 2}, []int{0, 3}
	for _, row := range pairwise(len(dp), len(sp), len(chunk), len(modes), len(ubatches), len(spec),
		len(loras)) {
		cfg := Config{
			DataParallelSize:     dp[row[0]],
			SequenceParallel:     sp[row[1]],
			MaxChunk:             chunk[row[2]],
			GraphMode:            modes[row[3]],
			NumUBatches:          ubatches[row[4]],
			NumSpeculativeTokens: spec[row[5]],

			DecodeUBatchThreshold:  2,
			PrefillUBatchThreshold: 2,
		}
		adapters := loras[row[6]]
		name := fmt.Sprintf("dp=%d/sp=%d/chunk=%d/graph=%v/ubatches=%d/spec=%d/loras=%d", cfg.DataParallelSize,
			cfg.SequenceParallel, cfg.MaxChunk, cfg.GraphMode, cfg.NumUBatches, cfg.NumSpeculativeTokens, adapters)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, cfg, adapters)
		})
	}
}

// pairwise returns rows of one level for each factor, so that any two levels of two factors are
// together in some row. It takes a pair that is missing and fills its row with the levels that
// bring the most missing pairs, until none is.
func pairwise(levels ...int) [][]int {
	type pair struct{ f, lf, g, lg int }
	missing := map[pair]bool{}
	var order []pair
	for f := range levels {
		for g := f + 1; g < len(levels); g++ {
			for lf := range levels[f] {
				for lg := range levels[g] {
					missing[pair{f, lf, g, lg}] = true
					order = append(order, pair{f, lf, g, lg})
				}
			}
		}
	}
	var rows [][]int
	for _, first := range order {
		if !missing[first] {
			continue
		}
		row := make([]int, len(levels))
		for f := range row {
			row[f] = -1
		}
		row[first.f], row[first.g] = first.lf, first.lg
		brings := func(f, level int) (n int) {
			for g, other := range row {
				if other >= 0 && (missing[pair{f, level, g, other}] || missing[pair{g, other, f, level}]) {
					n++
				}
			}
			return n
		}
		for f := range row {
			if row[f] >= 0 {
				continue
			}
			best, most := 0, -1
			for level := range levels[f] {
				if n := brings(f, (level+len(rows))%levels[f]); n > most {
					best, most = (level+len(rows))%levels[f], n
				}
			}
			row[f] = best
		}
		for f := range row {
			for g := f + 1; g < len(row); g++ {
				delete(missing, pair{f, row[f], g, row[g]})
			}
		}
		rows = append(rows, row)
	}
	return rows
}

func TestPairwise(t *testing.T) {
	levels := []int{4, 2, 3, 5}
	rows := pairwise(levels...)
	for f := range levels {
		for g := f + 1; g < len(levels); g++ {
			seen := map[[2]int]bool{}
			for _, row := range rows {
				seen[[2]int{row[f], row[g]}] = true
			}
			if len(seen) != levels[f]*levels[g] {
				t.Errorf("factors %d and %d: %d of %d pairs", f, g, len(seen), levels[f]*levels[g])
			}
		}
	}
	if len(rows) > 30 {
		t.Errorf("%d rows, where 20 are needed", len(rows))
	}
}
