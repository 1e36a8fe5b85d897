// Ranks that choose their capture sizes anew while they serve: together, without late captures, and
// also when some have missed steps or were started again.

package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// TestReplanCovering: the answers are those of the reference in every configuration, as far as any two
// settings go together, and all ranks have the same ladders.
func TestReplanCovering(t *testing.T) {
	var changes atomic.Int64
	t.Run("configurations", func(t *testing.T) {
		forCovering(t, func(t *testing.T, cfg Config, adapters int) {
			if cfg.GraphMode == fwd.GraphNone {
				t.Skip("there are no graphs")
			}
			cfg.Replan, cfg.DecodeUBatchThreshold = 15, 12 // so that most decode steps are not split
			votes := watchVotes(t, &cfg)
			stats := serve(t, cfg, withAdapters(newRequests(7*cfg.DataParallelSize, 20, 30), adapters))
			changes.Add(int64(votes.check(stats)))
			if len(stats.Ladders) == 0 || stats.LadderChanges != len(stats.Ladders)-1 {
				t.Errorf("%d changes, ladders %+v", stats.LadderChanges, stats.Ladders)
			}
			steps := 0
			for _, l := range stats.Ladders {
				steps += l.Steps
				if l.Graphs > stats.Ladders[0].Graphs || l.Captured > l.Graphs || l.Bytes == 0 {
					t.Errorf("%+v after %+v", l, stats.Ladders[0])
				}
			}
			if steps != stats.Steps {
				t.Errorf("%d steps of ladders, %d in all", steps, stats.Steps)
			}
		})
	})
	if changes.Load() == 0 {
		t.Error("no ladder ever changed")
	}
}

// fingerprints are those of the votes of a group, in the order of its steps.
type fingerprints struct {
	*testing.T
	mu    sync.Mutex
	ranks [][]uint64 // by rank, each other than the one before
}

// watched is a coordinator that looks at the fingerprints in the votes.
type watched struct {
	fwd.Coordinator
	*fingerprints
}

func (c watched) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := c.Coordinator.Exchange(ctx, v)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for rank, w := range votes {
		if w.Config != v.Config || w.Config == 0 {
			c.Errorf("step %d: rank %d has the graphs %x, rank %d %x", v.Step, c.Rank(), v.Config, rank, w.Config)
		}
	}
	own := &c.ranks[c.Rank()]
	if n := len(*own); n == 0 || (*own)[n-1] != v.Config {
		*own = append(*own, v.Config)
	}
	return votes, nil
}

// watchVotes makes the ranks of an engine vote where the fingerprints are looked at.
func watchVotes(t *testing.T, cfg *Config) *fingerprints {
	t.Helper()
	group, err := fwd.NewLocalGroup(cfg.DataParallelSize)
	if err != nil {
		t.Fatal(err)
	}
	f := &fingerprints{T: t, ranks: make([][]uint64, len(group))}
	for i := range group {
		group[i] = watched{group[i], f}
	}
	cfg.Coordinators = group
	return f
}

// check checks that every rank has voted with every ladder of the model that is served, and returns how
// often that changed.
func (f *fingerprints) check(stats Stats) (changes int) {
	f.Helper()
	for i, l := range stats.Ladders {
		if i > 0 && !slices.Equal(l.Sizes, stats.Ladders[i-1].Sizes) {
			changes++
		}
	}
	for rank, seen := range f.ranks {
		if len(f.ranks) > 1 && (len(seen) != changes+1 || !slices.Equal(seen, f.ranks[0])) {
			f.Errorf("rank %d voted with the graphs %x, rank 0 with %x; want %d changes",
				rank, seen, f.ranks[0], changes)
		}
	}
	return changes
}

// TestReplanCaptures: only graphs that are new are captured, when the ladder changes and never in a
// pass that serves; those that are not in the ladder any more are gone.
func TestReplanCaptures(t *testing.T) {
	const dp = 2
	reader := metric.NewManualReader()
	cfg := Config{
		DataParallelSize: dp, GraphMode: fwd.GraphFull, Replan: 20, // each graph is captured as one
		MeterProvider: metric.NewMeterProvider(metric.WithReader(reader)),
	}
	late := watchCaptures(t, &cfg)
	stats := serve(t, cfg, newRequests(60, 20, 40))
	late()
	if stats.LadderChanges == 0 {
		t.Fatal("the ladder never changed")
	}
	captured, kept, steps := 0, 0, 0
	for i, l := range stats.Ladders {
		captured += dp * l.Captured
		steps += l.Steps
		if i > 0 {
			kept += l.Graphs - l.Captured
		}
		// A graph takes memory in proportion to its size.
		if first := stats.Ladders[0]; l.Bytes*sum(first.Sizes) != first.Bytes*sum(l.Sizes) {
			t.Errorf("%d bytes for the sizes %v, %d for %v", l.Bytes, l.Sizes, first.Bytes, first.Sizes)
		}
	}
	if steps != stats.Steps {
		t.Errorf("%d steps of ladders, %d in all", steps, stats.Steps)
	}
	if stats.Captures != captured || kept == 0 {
		t.Errorf("%d captures on %d ranks, want %d; %d graphs were kept", stats.Captures, dp, captured, kept)
	}
	var got metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &got); err != nil {
		t.Fatal(err)
	}
	if n := captureEvents(&got); n != captured {
		t.Errorf("%d events of captures, want %d", n, captured)
	}
}

func sum(all []int) (n int) {
	for _, v := range all {
		n += v
	}
	return n
}

// watchCaptures makes an engine look for captures in passes that serve, and returns what ends that.
func watchCaptures(t *testing.T, cfg *Config) (end func()) {
	type key struct {
		rank int
		name string
	}
	var e *Engine
	var mu sync.Mutex
	captures, passes := map[key]int{}, 0
	cfg.Started = func(started *Engine) { e = started }
	cfg.Observe = func(_ context.Context, rec *fwd.Record) {
		r := e.latest.Load().ranks[rec.Rank]
		in := r.target
		if rec.Name != "" {
			in = r.draft
		}
		n, _ := in.executor.Graphs()
		mu.Lock()
		defer mu.Unlock()
		k := key{rec.Rank, rec.Name}
		if passes++; rec.Phase != warmUpPhase && n != captures[k] {
			t.Errorf("%d captures in a pass of step %d, rank %d", n-captures[k], rec.Step, rec.Rank)
		}
		captures[k] = n
	}
	return func() {
		if passes == 0 {
			t.Error("no pass was looked at")
		}
	}
}

// captureEvents returns how many captures the metrics count.
func captureEvents(all *metricdata.ResourceMetrics) (n int) {
	for _, scope := range all.ScopeMetrics {
		for _, m := range scope.Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if m.Name != "fwd.graph.events" || !ok {
				continue
			}
			for _, p := range sum.DataPoints {
				if event, _ := p.Attributes.Value(attribute.Key("fwd.graph.event")); event.AsString() == "capture" {
					n += int(p.Value)
				}
			}
		}
	}
	return n
}

// TestReplanPads: a ladder that was chosen from the same traffic pads less.
func TestReplanPads(t *testing.T) {
	cfg := Config{DataParallelSize: 2, GraphMode: fwd.GraphFullAndPiecewise, Replan: 100}
	var requests []Request
	for i := range 60 { // steps of 5 or 6 requests a rank, which the configured ladder pads to 8
		requests = append(requests, Request{ID: i, Prompt: make([]int, 3), MaxTokens: 33 + i%5})
	}
	cfg.MaxNumSeqs, cfg.CaptureSizes = 6, []int{1, 2, 4, 8, 64}
	stats := serve(t, cfg, requests)
	if len(stats.Ladders) < 2 {
		t.Fatalf("ladders %+v", stats.Ladders)
	}
	first, last := stats.Ladders[0], stats.Ladders[len(stats.Ladders)-1]
	if first.Steps != cfg.Replan+1 { // all have chosen when they vote for that one
		t.Errorf("the ladder changed after %d steps, want %d", first.Steps, cfg.Replan+1)
	}
	if first.Padding == 0 || 4*last.Padding*first.Tokens > first.Padding*last.Tokens || last.Eager > 0 {
		t.Errorf("%+v, then %+v", first, last)
	}
	if slices.Max(last.Sizes) != 64 || !slices.Contains(last.Sizes, 6) || last.Graphs > first.Graphs {
		t.Errorf("sizes %v with %d graphs, at first %d", last.Sizes, last.Graphs, first.Graphs)
	}
}

// TestReplanNothing: the ladder stays if no graph could serve what was seen, or if it is the best.
func TestReplanNothing(t *testing.T) {
	for name, c := range map[string]struct {
		cfg       Config
		maxTokens int
	}{
		"prompts alone":     {Config{GraphMode: fwd.GraphFullDecodeOnly}, 1},
		"split passes":      {Config{GraphMode: fwd.GraphFull, NumUBatches: 2, DecodeUBatchThreshold: 1}, 5},
		"the best there is": {Config{GraphMode: fwd.GraphFull, CaptureSizes: []int{1, 5, 16}}, 30},
	} {
		t.Run(name, func(t *testing.T) {
			c.cfg.Replan = 3
			requests := newRequests(120, 1, 1)
			for i := range requests {
				requests[i].Prompt, requests[i].MaxTokens = make([]int, 5), c.maxTokens
			}
			if name == "the best there is" {
				requests = requests[:1]
			}
			stats := serve(t, c.cfg, requests)
			if stats.LadderChanges != 0 || len(stats.Ladders) != 1 || stats.Steps < 4 {
				t.Errorf("%d steps, %d changes: %+v", stats.Steps, stats.LadderChanges, stats.Ladders)
			}
		})
	}
	if _, err := New(newModel(t, 0), Config{Replan: 5}); err == nil ||
		!strings.Contains(err.Error(), "Replan is 5 with graph mode NONE") {
		t.Errorf("without graphs: %v", err)
	}
}

// TestReplanKeepsFew: of many ladders the first one and the last ones are kept.
func TestReplanKeepsFew(t *testing.T) {
	cfg := Config{GraphMode: fwd.GraphFull, Replan: 1}
	stats := serve(t, cfg, newRequests(40, 40, 30))
	if stats.LadderChanges < maxLadders || len(stats.Ladders) != maxLadders ||
		!slices.Equal(stats.Ladders[0].Sizes, newEngine(t, cfg).target.config.CaptureSizes) {
		t.Errorf("%d changes, ladders %+v", stats.LadderChanges, stats.Ladders)
	}
}

// replanned returns a fleet whose ranks are processes and choose anew after ten steps, all of which
// run by graphs.
func replanned(t *testing.T, cfg Config) *fleet {
	cfg.CaptureSizes = []int{3, 6, 12, 24, 48, 129}
	cfg.GraphMode, cfg.Replan, cfg.ExchangeTimeout = fwd.GraphFullAndPiecewise, 10, 300*time.Millisecond
	return newFleet(t, cfg, newRequests(14*cfg.DataParallelSize, 20, 40))
}

// TestReplanProcesses: processes change together, without a failed step.
func TestReplanProcesses(t *testing.T) {
	for _, cfg := range []Config{{}, {NumSpeculativeTokens: 2}, {Overlap: true}} {
		cfg.DataParallelSize = 3
		f := replanned(t, cfg)
		f.cfg.ExchangeTimeout = 0
		outcomes := f.all(0)
		f.allFinished(outcomes)
		for rank, o := range outcomes {
			if o.stats.FailedSteps > 0 || o.stats.LadderChanges == 0 ||
				o.stats.LadderChanges != outcomes[0].stats.LadderChanges {
				t.Errorf("rank %d: %d failed steps, %d changes, rank 0 has %d", rank, o.stats.FailedSteps,
					o.stats.LadderChanges, outcomes[0].stats.LadderChanges)
			}
		}
	}
}

// TestReplanRejoin: a rank that was started again has seen nothing and has the ladder of the
// configuration. The others go back to it, and all change again later.
func TestReplanRejoin(t *testing.T) {
	for name, cfg := range map[string]Config{
		"alone":        {},
		"with guesses": {NumSpeculativeTokens: 2},
		"overlapping":  {Overlap: true},
	} {
		t.Run(name, simulated(func(t *testing.T) {
			cfg.DataParallelSize = 3
			f := replanned(t, cfg)
			outcomes := f.each(func(rank int) outcome {
				cfg := f.config(rank, time.Hour)
				if rank != 1 {
					return f.run(t.Context(), cfg, f.requests[rank])
				}
				life := cfg
				crashAfterChange(&life)
				first := f.run(t.Context(), life, f.requests[rank])
				if !errors.Is(first.err, errCrash) || first.stats.LadderChanges == 0 {
					t.Errorf("the first life ended with %v after %d changes", first.err, first.stats.LadderChanges)
				}
				return f.resume(cfg, first, f.requests[rank])
			})
			f.allFinished(outcomes)
			f.sameLadder(outcomes)
			base := outcomes[0].stats.Ladders[0].Sizes
			back := slices.ContainsFunc(outcomes[0].stats.Ladders[2:], func(l Ladder) bool {
				return slices.Equal(l.Sizes, base)
			})
			if !back {
				t.Errorf("rank 0 did not go back to %v: %+v", base, outcomes[0].stats.Ladders)
			}
		}))
	}
}

// sameLadder fails the test unless all ranks have ended with the same ladder, another than at first.
func (f *fleet) sameLadder(outcomes []outcome) {
	f.Helper()
	last := func(o outcome) []int { return o.stats.Ladders[len(o.stats.Ladders)-1].Sizes }
	for rank, o := range outcomes {
		if len(o.stats.Ladders) < 2 || !slices.Equal(last(o), last(outcomes[0])) {
			f.Errorf("rank %d has %+v, rank 0 %+v", rank, o.stats.Ladders, outcomes[0].stats.Ladders)
		}
	}
}

// crashAfterChange makes a rank crash in a step soon after its ladder has changed.
func crashAfterChange(cfg *Config) {
	var e *Engine
	cfg.Started = func(started *Engine) { e = started }
	cfg.Middleware = func(int) []fwd.Middleware {
		return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
			return func(ctx context.Context) error {
				r := e.latest.Load().ranks[0]
				if p := &r.replan; p.changes > 1 && p.steps == 5 && fwd.MustFromContext(ctx).Layers != nil {
					return errCrash
				}
				return next(ctx)
			}
		}}
	}
}

// TestReplanLostAnswers: wherever a rank misses the others' votes, the ranks find each other again, all
// with the same ladder.
func TestReplanLostAnswers(t *testing.T) {
	e := newEngine(t, replanned(t, Config{DataParallelSize: 3}).cfg)
	graphs := int64(len(e.target.dispatcher.Captures()))
	for name, c := range map[string]struct {
		lose  func(warmUp, step int64) bool
		alone bool // the other ranks don't even notice
	}{
		// The first answer is that of the greeting, then come ten steps that are counted.
		"of a step that is counted": {func(_, step int64) bool { return step == 4 }, true},
		"of the last one":           {func(_, step int64) bool { return step == 11 }, true},
		"with the choice":           {func(_, step int64) bool { return step == 12 }, false},
		"in the new warm-up":        {func(warmUp, _ int64) bool { return warmUp == graphs+5 }, false},
		"at its end":                {func(warmUp, _ int64) bool { return warmUp == 2*(graphs+1) }, false},
		"in a warm-up after it": {
			func(warmUp, step int64) bool { return step == 12 || warmUp == graphs+3 }, false,
		},
		"again and again": {func(_, step int64) bool { return step%3 == 2 && step < 20 }, true},
	} {
		t.Run(name, simulated(func(t *testing.T) { testLostAnswers(t, false, c.alone, c.lose) }))
		t.Run(name+", overlapping", simulated(func(t *testing.T) {
			testLostAnswers(t, true, c.alone, func(warmUp, step int64) bool {
				return c.lose(warmUp, step-1) // the votes with a choice are sent a step later
			})
		}))
	}
}

func testLostAnswers(t *testing.T, overlap, alone bool, lose func(warmUp, step int64) bool) {
	f := replanned(t, Config{DataParallelSize: 3, Overlap: overlap})
	outcomes := f.each(func(rank int) outcome {
		cfg := f.config(rank, time.Hour)
		if rank == 1 {
			cfg.Process.Target[0] = &forgetful{Coordinator: cfg.Process.Target[0], lose: lose}
		}
		return f.run(t.Context(), cfg, f.requests[rank])
	})
	f.allFinished(outcomes)
	f.sameLadder(outcomes)
	own, others := outcomes[1].stats.FailedSteps, outcomes[0].stats.FailedSteps
	if own == 0 || (others == 0) != alone {
		t.Errorf("%d steps failed, and %d of the others", own, others)
	}
}

// TestReplanStrangers: ranks that were configured with different sizes say so, however long they would
// wait for each other.
func TestReplanStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := replanned(t, Config{DataParallelSize: 2})
		began := time.Now()
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, time.Hour)
			if rank == 1 {
				cfg.CaptureSizes = []int{3, 129}
			}
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		for rank, o := range outcomes {
			if !errors.Is(o.err, fwd.ErrInvalid) || !strings.Contains(o.err.Error(), "configured differently") ||
				o.stats.FailedSteps != mostStrangers || time.Since(began) > time.Minute {
				t.Errorf("rank %d: %v after %d failed steps", rank, o.err, o.stats.FailedSteps)
			}
		}
	})
}
