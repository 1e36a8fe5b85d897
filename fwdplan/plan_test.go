// This file is about plans as callers see them: what they say, and what is refused.

package fwdplan_test

import (
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// TestEvaluateDispatcher compares what Evaluate says of a ladder with what a dispatcher does with it.
func TestEvaluateDispatcher(t *testing.T) {
	t.Parallel()
	var s fwdplan.Snapshot
	s.Ranks = 1
	for tokens := 1; tokens <= 40; tokens++ {
		s.Rows = append(s.Rows, fwdplan.Row{Tokens: tokens, Uniform: true, Passes: uint64(tokens)},
			fwdplan.Row{Tokens: tokens, Passes: 3})
	}
	for _, mode := range []fwd.GraphMode{
		fwd.GraphPiecewise, fwd.GraphFull, fwd.GraphFullDecodeOnly, fwd.GraphFullAndPiecewise,
	} {
		for _, loras := range []*fwd.LoRAConfig{nil, {MaxLoRAs: 4, SpecializeCount: true}} {
			config := fwd.DispatcherConfig{
				Mode: mode, CaptureSizes: []int{2, 6, 16, 24, 32}, MaxNumSeqs: 10, UniformDecodeQueryLen: 2, LoRA: loras,
			}
			dispatcher, err := fwd.NewDispatcher(config)
			if err != nil {
				t.Fatal(err)
			}
			got, err := fwdplan.Evaluate(s, fwdplan.Config{Dispatcher: config},
				fwdplan.Ladder{Sizes: config.CaptureSizes})
			if err != nil {
				t.Fatal(err)
			}
			var want fwdplan.Share
			for _, r := range s.Rows {
				want.Passes += r.Passes
				ran, batch, _ := dispatcher.Dispatch(fwd.DispatchQuery{
					NumTokens: (r.Tokens + 1) / 2 * 2, UniformDecode: r.Uniform,
				})
				if ran == fwd.GraphNone {
					want.Eager += r.Passes
					continue
				}
				want.Tokens += r.Passes * uint64(r.Tokens)
				want.Padding += r.Passes * uint64(batch.NumTokens-r.Tokens)
			}
			if got.All() != want || got.Graphs != len(dispatcher.Captures()) {
				t.Errorf("%v, adapters %v: %+v and %d graphs; the dispatcher %+v and %d",
					mode, loras, got.All(), got.Graphs, want, len(dispatcher.Captures()))
			}
		}
	}
}

func TestPlan(t *testing.T) {
	t.Parallel()
	s := snapshotOf(map[int]uint64{1: 1000, 3: 100, 4: 1, 20: 5, 90: 2})
	got, err := fwdplan.Choose(s, fwdplan.Config{MaxGraphs: 3, Max: 64, Must: []int{32}})
	want := fwdplan.Plan{
		Ladder: fwdplan.Ladder{Sizes: []int{1, 3, 32}},
		Outcome: fwdplan.Outcome{
			Graphs: 3, Decode: fwdplan.Share{Passes: 1108, Eager: 2, Tokens: 1404, Padding: 88}, Cost: 1492,
		},
		Curve: []fwdplan.Point{
			{Graphs: 1, Cost: 1106 * 32}, {Graphs: 2, Cost: 1100*3 + 6*32}, {Graphs: 3, Cost: 1492},
			{Graphs: 4, Cost: 1300 + 6*20}, {Graphs: 5, Cost: 1404}, // with 32, which then serves nobody
		},
		Steps: []fwdplan.Step{{Size: 1, Passes: 1000}, {Size: 3, Passes: 100}, {Size: 32, Passes: 6, Padding: 88}},
		Confidence: fwdplan.Confidence{Passes: 1106, Sizes: 4, SeenOnce: 1, Evidence: []fwdplan.Evidence{
			{AtLeast: 10, Share: 1100 / 1106.0}, {AtLeast: 100, Share: 1100 / 1106.0},
			{AtLeast: 1000, Share: 1000 / 1106.0}}},
	}
	for i := range want.Curve {
		want.Curve[i].Excess = want.Curve[i].Cost/1404 - 1
	}
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestPlanMeasured(t *testing.T) {
	t.Parallel()
	row := func(tokens, captured int, passes, ms uint64) fwdplan.Row {
		return fwdplan.Row{Tokens: tokens, Uniform: true, Captured: captured, Passes: passes,
			Nanoseconds: passes * ms * 1e6}
	}
	s := fwdplan.Snapshot{Ranks: 1, Rows: []fwdplan.Row{
		row(1, 8, 10, 4), row(9, 16, 30, 6), row(17, 24, 10, 2), // 24 was faster than 16: noise
		row(30, 0, 5, 50),
	}}
	cfg := fwdplan.Config{MaxGraphs: 3, Measured: true}
	plan, err := fwdplan.Choose(s, cfg)
	if err != nil {
		t.Fatal(err)
	}
	// 16 and 24 are levelled to 5 ms, in between it is interpolated, and above in proportion.
	want := 40*(0.004+0.001/8) + 10*0.005 + 5*0.005*30/24
	if plan.Adjusted != 2 || !slices.Equal(plan.Sizes, []int{9, 17, 30}) || math.Abs(plan.Cost-want) > 1e-9 {
		t.Errorf("plan %+v, want cost %v with 2 times adjusted", plan, want)
	}
	s.Rows[3].Nanoseconds = 5 * 6e6 // now passes of 30 tokens are faster without a graph, which takes 6.25 ms
	if plan, err = fwdplan.Choose(s, cfg); err != nil || slices.Contains(plan.Sizes, 30) ||
		plan.Decode.Eager != 5 {
		t.Errorf("plan %+v, %v, want passes of 30 tokens to run eagerly", plan, err)
	}
	s.Rows = s.Rows[3:]
	if _, err := fwdplan.Choose(s, cfg); !errors.Is(err, fwd.ErrInvalid) ||
		!strings.Contains(err.Error(), "timed") {
		t.Errorf("no pass with a graph was measured: %v", err)
	}
}

func TestChooseErrors(t *testing.T) {
	t.Parallel()
	s := snapshotOf(map[int]uint64{4: 10, 700: 1})
	full := fwd.DispatcherConfig{Mode: fwd.GraphFullAndPiecewise, MaxNumSeqs: 8, UniformDecodeQueryLen: 2}
	for _, c := range []struct {
		snapshot fwdplan.Snapshot
		cfg      fwdplan.Config
		want     string
	}{
		{fwdplan.Snapshot{}, fwdplan.Config{MaxGraphs: 4}, "has no passes"},
		{s, fwdplan.Config{}, "MaxGraphs is 0 and GraphPrice 0, want one of them"},
		{s, fwdplan.Config{MaxGraphs: -1}, "MaxGraphs is -1"},
		{s, fwdplan.Config{GraphPrice: math.NaN()}, "GraphPrice is NaN"},
		{s, fwdplan.Config{MaxGraphs: 4, EagerPrice: -1}, "EagerPrice -1"},
		{s, fwdplan.Config{MaxGraphs: 4, EagerPrice: 1, Measured: true}, "EagerPrice is 1 with Measured"},
		{s, fwdplan.Config{MaxGraphs: 4, Must: []int{512}, Max: 256}, "512 in Must is above Max, 256"},
		{s, fwdplan.Config{MaxGraphs: 4, Must: []int{511}, Multiple: 2}, "511 in Must is no multiple of 2"},
		{s, fwdplan.Config{MaxGraphs: 4, Max: 511, Multiple: 2}, "Max is 511, want a multiple of 2"},
		{s, fwdplan.Config{MaxGraphs: 4, Multiple: 3, Dispatcher: full},
			"Multiple is 3, want a multiple of the query length 2"},
		{s, fwdplan.Config{MaxGraphs: 2, Must: []int{2, 4, 8}}, "MaxGraphs is 2, but Must [2 4 8]"},
		{s, fwdplan.Config{MaxGraphs: 1, Must: []int{8}, Dispatcher: full}, "need at least 2 graphs"},
		{s, fwdplan.Config{MaxGraphs: 4, Separate: true}, "Separate with graph mode PIECEWISE"},
		{s, fwdplan.Config{MaxGraphs: 4, Max: 2}, "of 4 to 700 tokens, could use a graph of at most 2"},
		{s, fwdplan.Config{MaxGraphs: 4, Dispatcher: fwd.DispatcherConfig{Mode: 99}},
			"GraphMode(99) is not a graph mode"},
	} {
		plan, err := fwdplan.Choose(c.snapshot, c.cfg)
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), c.want) ||
			strings.Count(err.Error(), "fwd: ") != 1 {
			t.Errorf("Choose with %+v: %+v, %v; want an error with %q", c.cfg, plan, err, c.want)
		}
	}
	for _, l := range []fwdplan.Ladder{{Sizes: []int{4, 2}}, {Sizes: []int{3}}, {MixedSizes: []int{2}},
		{Sizes: []int{0}}} {
		if o, err := fwdplan.Evaluate(s, fwdplan.Config{Multiple: 2}, l); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("Evaluate(%v) = %+v, %v, want an error", l, o, err)
		}
	}
}
