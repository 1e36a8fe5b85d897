// This file compares Choose with trying every list of sizes, and measures how long it takes.

package fwdplan

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

// randomCase returns a small snapshot and a configuration for it.
func randomCase(rng *rand.Rand) (Snapshot, Config) {
	q := 1 + rng.IntN(2)
	multiple := q * (1 + rng.IntN(2))
	modes := []fwd.GraphMode{fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull, fwd.GraphFullDecodeOnly,
		fwd.GraphFullAndPiecewise}
	cfg := Config{
		MaxGraphs: rng.IntN(8),
		Multiple:  multiple,
		Measured:  rng.IntN(3) == 0,
		Dispatcher: fwd.DispatcherConfig{
			Mode: modes[rng.IntN(len(modes))], MaxNumSeqs: rng.IntN(7), UniformDecodeQueryLen: q,
		},
	}
	if cfg.MaxGraphs == 0 || rng.IntN(3) == 0 {
		cfg.GraphPrice = float64(1 + rng.IntN(40))
	}
	if !cfg.Measured && rng.IntN(2) == 0 {
		cfg.EagerPrice = float64(1+rng.IntN(4)) / 2
	}
	if rng.IntN(2) == 0 {
		cfg.Max = multiple * (1 + rng.IntN(6))
	}
	for range rng.IntN(3) {
		if size := multiple * (1 + rng.IntN(5)); cfg.Max == 0 || size <= cfg.Max {
			cfg.Must = append(cfg.Must, size)
		}
	}
	if rng.IntN(3) == 0 {
		cfg.Dispatcher.LoRA = &fwd.LoRAConfig{MaxLoRAs: 1 + rng.IntN(3), SpecializeCount: rng.IntN(2) == 0}
		cfg.MaxGraphs *= 3
	}
	cfg.Separate = cfg.Dispatcher.Mode == fwd.GraphFullAndPiecewise && rng.IntN(2) == 0
	largest := 10
	if cfg.Separate {
		largest = 5 // two lists are tried together
	}
	rows := map[Row]Row{}
	for range 1 + rng.IntN(9) {
		r := Row{Tokens: 1 + rng.IntN(largest), Uniform: rng.IntN(2) == 0}
		if rng.IntN(2) == 0 {
			r.Captured = r.Tokens + rng.IntN(4)
		}
		kind := r
		r.Passes, r.Nanoseconds = uint64(1+rng.IntN(20)), uint64(rng.Int64N(1e11))
		rows[kind] = r
	}
	s := Snapshot{Ranks: 1}
	for _, r := range rows {
		s.Rows = append(s.Rows, r)
	}
	sortRows(s.Rows)
	return s, cfg
}

// TestUnseen compares plans that allow for unseen sizes with all others on the passes that they expect.
func TestUnseen(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		s, cfg := randomCase(rand.New(rand.NewPCG(seed, 2)))
		cfg.Unseen = true
		task, err := newTask(s, cfg)
		if err != nil || cfg.MaxGraphs == 0 || cfg.Separate || cfg.Measured || cfg.EagerPrice > 0 {
			continue
		}
		plan, err := Choose(s, cfg)
		if err != nil {
			continue
		}
		total := func(l Ladder) float64 {
			sum := task.priceOf(l)
			for kind := range kinds {
				for _, u := range task.unseen(kind) {
					next, _ := slices.BinarySearch(l.Sizes, u.size)
					if next == len(l.Sizes) || !task.serves(kind, l.Sizes[next]) {
						return math.Inf(1)
					}
					sum += u.passes * float64(l.Sizes[next])
				}
			}
			return sum
		}
		var sizes []int
		for size := task.multiple; size <= task.Max; size += task.multiple {
			sizes = append(sizes, size)
		}
		got := total(plan.Ladder)
		for _, l := range subsets(sizes) {
			if want := total(Ladder{Sizes: l}); want < got-1e-9*got {
				t.Fatalf("Choose(%+v, %+v) = %v costs %v, but %v costs %v", s, cfg, plan.Sizes, got, l, want)
			}
		}
	}
}

// bruteForce returns the least that any ladder costs with its graphs, graphs above MaxGraphs excluded, or
// +Inf. It tries every set of multiples up to the largest size.
func bruteForce(t *task) float64 {
	largest := max(t.Max, t.sizes[len(t.sizes)-1])
	var sizes []int
	for size := t.multiple; size <= min(largest, t.Max); size += t.multiple {
		sizes = append(sizes, size)
	}
	least := math.Inf(1)
	if !t.Separate {
		for _, l := range subsets(sizes) {
			least = min(least, t.priceOf(Ladder{Sizes: l}))
		}
		return least
	}
	for _, decodes := range subsets(sizes) {
		for _, mixeds := range subsets(sizes) {
			least = min(least, t.priceOf(Ladder{decodes, mixeds}))
		}
	}
	return least
}

func subsets(sizes []int) [][]int {
	all := [][]int{nil}
	for _, size := range sizes {
		for _, l := range all {
			all = append(all, append(slices.Clone(l), size))
		}
	}
	return all
}

// priceOf returns what a ladder costs with its graphs, or +Inf if it is not allowed.
func (t *task) priceOf(l Ladder) float64 {
	o := t.evaluate(l)
	if t.MaxGraphs > 0 && o.Graphs > t.MaxGraphs {
		return math.Inf(1)
	}
	for i, kinds := range t.ladders() {
		sizes := [][]int{l.Sizes, l.MixedSizes}[i]
		for _, size := range t.Must {
			if t.serves(kinds[0], size) && !slices.Contains(sizes, size) {
				return math.Inf(1)
			}
		}
		for _, kind := range kinds {
			for k, size := range t.sizes { // without a price, what may have a graph must have one
				_, priced := t.eagerPrice(kind, size)
				next, _ := slices.BinarySearch(sizes, size)
				served := next < len(sizes) && t.serves(kind, sizes[next])
				if !priced && !served && t.plannable(kind, size) && t.passes[kind][k] > 0 {
					return math.Inf(1)
				}
			}
		}
	}
	return o.Cost + t.GraphPrice*float64(o.Graphs)
}

func checkBest(t *testing.T, s Snapshot, cfg Config) {
	t.Helper()
	task, err := newTask(s, cfg)
	if err != nil {
		return // what is refused has tests of its own
	}
	plan, err := Choose(s, cfg)
	want := math.Inf(1)
	if task.confidence().Passes > 0 {
		want = bruteForce(task)
	}
	if err != nil {
		if !math.IsInf(want, 1) {
			t.Fatalf("Choose(%+v, %+v): %v, but some ladder costs %v", s, cfg, err, want)
		}
		return
	}
	got := task.priceOf(plan.Ladder)
	if math.Abs(got-want) > 1e-9*max(want, 1) {
		t.Fatalf("Choose(%+v, %+v) = %+v costs %v, the best ladder %v", s, cfg, plan.Ladder, got, want)
	}
	for i, p := range plan.Curve {
		if i > 0 && (p.Graphs <= plan.Curve[i-1].Graphs || p.Cost >= plan.Curve[i-1].Cost) {
			t.Fatalf("the curve %+v does not fall", plan.Curve)
		}
		if p.Graphs == plan.Graphs && math.Abs(p.Cost-plan.Cost) > 1e-9*max(p.Cost, 1) {
			t.Fatalf("the plan costs %v, but its point on the curve is %+v", plan.Cost, p)
		}
	}
}

func TestChooseBest(t *testing.T) {
	t.Parallel()
	feasible := 0
	for seed := range uint64(1500) {
		s, cfg := randomCase(rand.New(rand.NewPCG(seed, 1)))
		checkBest(t, s, cfg)
		if _, err := Choose(s, cfg); err == nil {
			feasible++
		}
	}
	if feasible < 750 {
		t.Errorf("only %d cases had a plan", feasible)
	}
}

func FuzzChoose(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		s, cfg := randomCase(rand.New(rand.NewPCG(a, b)))
		checkBest(t, s, cfg)
	})
}

// TestLadderPieces compares ladders of many graphs, which are put together from pieces, with the costs
// that were computed in one go.
func TestLadderPieces(t *testing.T) {
	t.Parallel()
	s := manySizes(400)
	for _, mode := range []fwd.GraphMode{fwd.GraphPiecewise, fwd.GraphFullAndPiecewise} {
		for _, graphs := range []int{1, 2, 15, 16, 17, 18, 33, 64, 100, 257, 300} {
			cfg := Config{
				MaxGraphs: graphs, Must: []int{2, 100, 400},
				Dispatcher: fwd.DispatcherConfig{Mode: mode, MaxNumSeqs: 150},
			}
			plan, err := Choose(s, cfg)
			if graphs < 3 {
				if err == nil {
					t.Errorf("%d graphs for 3 sizes that must be there: %v", graphs, plan.Sizes)
				}
				continue
			}
			if mode == fwd.GraphFullAndPiecewise && graphs < 5 {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(plan.Curve, func(p Point) bool { return p.Graphs == plan.Graphs })
			if at < 0 || plan.Curve[at].Cost != plan.Cost || plan.Graphs > graphs {
				t.Errorf("%v with %d graphs: the ladder costs %v with %d graphs, the curve is %v",
					mode, graphs, plan.Cost, plan.Graphs, plan.Curve)
			}
			for _, size := range cfg.Must {
				if !slices.Contains(plan.Sizes, size) {
					t.Errorf("%v with %d graphs: %d is not in %v", mode, graphs, size, plan.Sizes)
				}
			}
		}
	}
}

// manySizes returns a snapshot with that many sizes of both kinds.
func manySizes(n int) Snapshot {
	rng := rand.New(rand.NewPCG(1, 2))
	s := Snapshot{Ranks: 1}
	for size := 1; size <= n; size++ {
		s.Rows = append(s.Rows,
			Row{Tokens: size, Uniform: true, Passes: uint64(1 + rng.IntN(1e6))},
			Row{Tokens: size, Passes: uint64(1 + rng.IntN(1e6))})
	}
	return s
}

func BenchmarkChoose(b *testing.B) {
	s := manySizes(8192)
	for _, mode := range []fwd.GraphMode{fwd.GraphPiecewise, fwd.GraphFullAndPiecewise} {
		b.Run("sizes=8192/graphs=256/mode="+mode.String(), func(b *testing.B) {
			b.ReportAllocs()
			cfg := Config{MaxGraphs: 256, Dispatcher: fwd.DispatcherConfig{Mode: mode, MaxNumSeqs: 1024}}
			for b.Loop() {
				if _, err := Choose(s, cfg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
