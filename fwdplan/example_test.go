// This file holds the examples of the documentation: one for each way in.

package fwdplan_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// A Runner tells its observer of each pass, and from what was seen the capture sizes are chosen.
func Example() {
	var sizes fwdplan.Sizes
	runner, err := fwd.New(fwd.Config{}, fwd.WithObserver(sizes.Observe))
	if err != nil {
		panic(err)
	}
	forward := func(context.Context) error { return nil }
	for _, requests := range []int{3, 3, 3, 7, 7, 6} {
		tokens := make([]int, requests)
		for i := range tokens {
			tokens[i] = 1
		}
		pass, err := runner.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: tokens})
		if err != nil {
			panic(err)
		}
		if err := runner.Run(context.Background(), pass, forward); err != nil {
			panic(err)
		}
	}
	plan, err := fwdplan.Choose(sizes.Snapshot(), fwdplan.Config{MaxGraphs: 2})
	if err != nil {
		panic(err)
	}
	fmt.Printf("sizes %v pad %d of %d tokens\n", plan.Sizes, plan.Decode.Padding, plan.Decode.Tokens)
	// Output: sizes [3 7] pad 1 of 29 tokens
}

// The default sizes beside the plan, both on traffic that the plan has not seen.
func ExampleEvaluate() {
	monday := snapshotOf(map[int]uint64{5: 300, 13: 200, 14: 50})
	tuesday := snapshotOf(map[int]uint64{5: 280, 12: 10, 13: 250})
	cfg := fwdplan.Config{MaxGraphs: 3, Must: []int{64}}
	plan, err := fwdplan.Choose(monday, cfg)
	if err != nil {
		panic(err)
	}
	for _, ladder := range []fwdplan.Ladder{plan.Ladder, {Sizes: fwd.DefaultCaptureSizes(64)}} {
		outcome, err := fwdplan.Evaluate(tuesday, cfg, ladder)
		if err != nil {
			panic(err)
		}
		fmt.Printf("%2d graphs, %.1f%% padding\n", outcome.Graphs, 100*outcome.All().PaddingRatio())
	}
	// Output:
	//  3 graphs, 5.7% padding
	// 11 graphs, 34.2% padding
}

// What one graph more or less would change.
func ExamplePlan() {
	plan, err := fwdplan.Choose(snapshotOf(map[int]uint64{1: 900, 4: 90, 30: 10}), fwdplan.Config{MaxGraphs: 2})
	if err != nil {
		panic(err)
	}
	for _, p := range plan.Curve {
		fmt.Printf("%d graphs: %v tokens\n", p.Graphs, p.Cost)
	}
	// Output:
	// 1 graphs: 30000 tokens
	// 2 graphs: 3900 tokens
	// 3 graphs: 1560 tokens
}

// Snapshots of two days count together.
func ExampleSnapshot_Merge() {
	monday, tuesday := snapshotOf(map[int]uint64{5: 300}), snapshotOf(map[int]uint64{5: 280, 12: 10})
	week, err := monday.Merge(tuesday)
	fmt.Println(week.Rows[0].Passes, week.Rows[1].Passes, err)
	// Output: 580 10 <nil>
}

// A snapshot is plain JSON.
func ExampleReadSnapshot() {
	data, err := json.Marshal(snapshotOf(map[int]uint64{5: 300}))
	if err != nil {
		panic(err)
	}
	fmt.Println(string(data))
	s, err := fwdplan.ReadSnapshot(strings.NewReader(string(data)))
	fmt.Println(s.Rows[0].Tokens, s.Rows[0].Passes, err)
	// Output:
	// {"format":"fwdplan.snapshot.1","ranks":1,"rows":[{"tokens":5,"uniform":true,"passes":300}],"left_out":{}}
	// 5 300 <nil>
}
