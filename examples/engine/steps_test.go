// What a step is made of: what the scheduler tells Plan, how often the ranks exchange votes, what
// the notes with the votes decide, and what runs.

package engine

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// TestPrefillNotUniform: a prompt, or the end of one, may be as long as what a decoding request
// brings to a step. No decode graph replays it.
func TestPrefillNotUniform(t *testing.T) {
	for _, c := range []struct {
		name              string
		spec, prompt      int
		budget, maxTokens int
		prefills, decodes int // passes
	}{
		{"prompt of one token", 0, 1, 128, 1, 1, 0},
		{"prompt of 1 + K tokens", 4, 5, 128, 1, 1, 0},
		{"chunk of one token at the end", 0, 9, 8, 1, 2, 0},
		{"chunks of 1 + K tokens", 4, 10, 5, 1, 2, 0},
		{"decode", 0, 1, 128, 3, 1, 2},
		{"decode with guesses", 4, 5, 128, 2, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{
				GraphMode: fwd.GraphFullDecodeOnly, NumSpeculativeTokens: c.spec, MaxNumBatchedTokens: c.budget,
			}
			requests := []Request{{Prompt: make([]int, c.prompt), MaxTokens: c.maxTokens}}
			stats := serve(t, cfg, requests)
			if got := stats.Passes[fwd.ReasonNoKey]; got != c.prefills {
				t.Errorf("%d eager passes, want %d for the prompt: %v", got, c.prefills, stats.Passes)
			}
			if got := stats.Passes[fwd.ReasonExact]; got != c.decodes {
				t.Errorf("%d passes by decode graphs, want %d: %v", got, c.decodes, stats.Passes)
			}
		})
	}
}

// counted is a coordinator that counts its rank's exchanges.
type counted struct {
	fwd.Coordinator
	warmUps, steps *atomic.Int64
}

func (c counted) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if v.WarmUp {
		c.warmUps.Add(1)
	} else {
		c.steps.Add(1)
	}
	return c.Coordinator.Exchange(ctx, v)
}

// countAll returns a group of counted coordinators. All ranks add to the same counts.
func countAll(t *testing.T, size int) (group []fwd.Coordinator, warmUps, steps *atomic.Int64) {
	t.Helper()
	group, err := fwd.NewLocalGroup(size)
	if err != nil {
		t.Fatal(err)
	}
	warmUps, steps = new(atomic.Int64), new(atomic.Int64)
	for i := range group {
		group[i] = counted{group[i], warmUps, steps}
	}
	return group, warmUps, steps
}

// TestExchanges: a step costs one exchange, also with a draft model that takes several passes in
// it, and one exchange ends the run. The warm-up of each model costs one for each graph, and one
// that ends it.
func TestExchanges(t *testing.T) {
	const dp, spec = 3, 4
	target, targetWarmUps, steps := countAll(t, dp)
	draft, draftWarmUps, draftSteps := countAll(t, dp)
	cfg := Config{
		DataParallelSize: dp, NumSpeculativeTokens: spec, GraphMode: fwd.GraphFullAndPiecewise,
		Coordinators: target, DraftCoordinators: draft,
	}
	stats := serve(t, cfg, newRequests(20, 40, 20))
	if got, want := int(steps.Load()), dp*(stats.Steps+1); got != want ||
		stats.DraftPasses != dp*spec*stats.Steps {
		t.Errorf("%d exchanges of %d ranks in %d steps with %d draft passes, want %d",
			got, dp, stats.Steps, stats.DraftPasses, want)
	}
	if n := draftSteps.Load(); n != 0 {
		t.Errorf("%d exchanges of the draft model, want none", n)
	}
	e := newEngine(t, cfg)
	for _, c := range []struct {
		of        *blueprint
		exchanges *atomic.Int64
	}{{e.target, targetWarmUps}, {e.draft, draftWarmUps}} {
		graphs := len(c.of.dispatcher.Captures())
		if got, want := int(c.exchanges.Load()), dp*(graphs+1); got != want || graphs == 0 {
			t.Errorf("model %q: %d exchanges to warm up %d graphs on %d ranks, want %d", c.of.name, got, graphs, dp,
				want)
		}
	}
}

// TestAllIdle: while no rank has anything to do, the ranks exchange votes now and then, and nobody
// runs a pass.
func TestAllIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const dp = 3
		var passes atomic.Int64
		target, _, steps := countAll(t, dp)
		cfg := Config{DataParallelSize: dp, Speed: 1, Coordinators: target}
		cfg.Middleware = func(int) []fwd.Middleware {
			return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					passes.Add(1)
					return next(ctx)
				}
			}}
		}
		requests := []Request{{Prompt: []int{1}, MaxTokens: 2}, {ID: 1, Prompt: []int{2}, MaxTokens: 1}}
		requests[1].Arrival = 10 * time.Second
		stats := serve(t, cfg, requests)
		if stats.Steps != 3 || passes.Load() != dp*3 || stats.DummyPasses != (dp-1)*3 {
			t.Errorf("%d steps, %d passes, %d of them dummy; want 3, %d, %d",
				stats.Steps, passes.Load(), stats.DummyPasses, dp*3, (dp-1)*3)
		}
		// Three steps, ten sleeps of a second or less, and the end.
		if got, want := steps.Load(), int64(dp*14); got != want {
			t.Errorf("%d exchanges, want %d", got, want)
		}
		if stats.Duration != 10*time.Second {
			t.Errorf("the run took %v of simulated time, want 10s", stats.Duration)
		}
	})
}

// TestWaited: a rank that waits for another's rows in a pass says so, and for how long.
func TestWaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{DataParallelSize: 2}
		cfg.Middleware = func(rank int) []fwd.Middleware {
			return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					time.Sleep(time.Duration(rank) * time.Second) // rank 1 is slow
					return next(ctx)
				}
			}}
		}
		stats := serve(t, cfg, newRequests(4, 10, 10))
		want := time.Duration(stats.Steps) * time.Second
		if got := stats.Ranks[0]; got.Experts != want || got.Forward != want {
			t.Errorf("rank 0 waited %v in passes that took %v, want %v", got.Experts, got.Forward, want)
		}
		if got := stats.Ranks[1].Experts; got != 0 {
			t.Errorf("rank 1, for which rank 0 waited, has waited %v", got)
		}
		if got := stats.Ranks[0].WaitedFor; got[1].Experts != want || got[1].ExpertTimes < stats.Steps ||
			got[0] != (Wait{}) {
			t.Errorf("rank 0 waited for %+v, want %v for rank 1", got, want)
		}
		for _, s := range stats.Slowest {
			if work := time.Duration(s.Rank) * time.Second; s.Took != time.Second || s.Work != work || s.Votes != 0 ||
				s.Reason != fwd.ReasonDisabled || s.Tokens == 0 {
				t.Errorf("%+v, want a second for all, in which rank 1 worked", s)
			}
		}
		if len(stats.Slowest) != 2*maxSlowest {
			t.Errorf("%d slow steps of 2 ranks, want %d each", len(stats.Slowest), maxSlowest)
		}
	})
}

// TestGaps: New says which batches have no graph, once for each model, and nothing if all have one.
func TestGaps(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want []string
	}{
		{Config{CaptureSizes: []int{8}}, []string{
			"model=target gap=\"uniform decode batches of 9 to 16 tokens run in NONE: too_large\"",
			"model=target gap=\"mixed batches of 9 to 16 tokens run in NONE: too_large\"",
		}},
		{Config{NumSpeculativeTokens: 1, CaptureSizes: []int{16}}, []string{
			"model=target gap=\"uniform decode batches of 18 to 32 tokens",
			"model=target gap=\"mixed batches of 17 to 32 tokens",
		}},
		{Config{NumSpeculativeTokens: 7}, nil},
		{Config{NumSpeculativeTokens: 4, MaxNumSeqs: 42}, nil},
		{Config{MaxNumSeqs: 100}, nil},
	} {
		var out bytes.Buffer
		c.cfg.GraphMode = fwd.GraphFullAndPiecewise
		c.cfg.Logger = slog.New(slog.NewTextHandler(&out, nil))
		newEngine(t, c.cfg)
		if got := strings.Count(out.String(), "\n"); got != len(c.want) {
			t.Errorf("%+v: %d lines, want %d:\n%s", c.cfg, got, len(c.want), &out)
		}
		for _, want := range c.want {
			text := strings.ReplaceAll(out.String(), `\"`, `"`)
			if !strings.Contains(text, want) {
				t.Errorf("%+v: no %s in\n%s", c.cfg, want, &out)
			}
		}
	}
}

// TestNote: what a rank says comes out as it was said; times are rounded up to whole milliseconds.
func TestNote(t *testing.T) {
	for _, n := range []note{
		{}, {stop: true}, {unfinished: true}, {idle: time.Second}, {sizes: 1<<sizesBits - 1},
		{stop: true, unfinished: true, idle: time.Millisecond, sizes: 1},
	} {
		if got := readNote(n.word()); got != n {
			t.Errorf("%+v came out as %+v", n, got)
		}
	}
	if got := readNote(note{idle: time.Microsecond}.word()).idle; got != time.Millisecond {
		t.Errorf("a microsecond came out as %v, want 1ms", got)
	}
}
