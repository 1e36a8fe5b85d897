// Runs of an engine whose ranks are goroutines: their answers, figures, failures and ends.

package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

func newModel(t testing.TB, adapters int) *model.Model {
	t.Helper()
	config := model.DefaultConfig()
	config.Adapters = adapters
	w, err := model.NewWeights(config)
	if err != nil {
		t.Fatal(err)
	}
	return model.New(w)
}

func newEngine(t testing.TB, cfg Config) *Engine {
	t.Helper()
	return newEngineOf(t, newModel(t, 0), cfg)
}

func newEngineOf(t testing.TB, m *model.Model, cfg Config) *Engine {
	t.Helper()
	e, err := New(m, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// newRequests returns n requests with prompts of 1 to maxPrompt tokens and answers of 1 to
// maxAnswer.
func newRequests(n, maxPrompt, maxAnswer int) []Request {
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	requests := make([]Request, n)
	for i := range requests {
		requests[i] = Request{ID: i, Prompt: make([]int, 1+rng.IntN(maxPrompt)), MaxTokens: 1 + rng.IntN(maxAnswer)}
		for p := range requests[i].Prompt {
			requests[i].Prompt[p] = rng.IntN(256)
		}
	}
	return requests
}

// serve runs requests to their end and compares every answer with the reference.
func serve(t *testing.T, cfg Config, requests []Request) Stats {
	t.Helper()
	adapters := 0
	for _, r := range requests {
		adapters = max(adapters, r.Adapter)
	}
	e := newEngineOf(t, newModel(t, adapters), cfg)
	results, stats, err := e.Run(t.Context(), requests)
	if err != nil {
		t.Fatal(err)
	}
	prompt, generated := 0, 0
	for _, r := range requests {
		prompt, generated = prompt+len(r.Prompt), generated+r.MaxTokens
	}
	if stats.Finished != len(requests) || stats.PromptTokens != prompt || stats.GeneratedTokens != generated {
		t.Errorf("finished %d requests with %d prompt and %d generated tokens, want %d, %d, %d",
			stats.Finished, stats.PromptTokens, stats.GeneratedTokens, len(requests), prompt, generated)
	}
	compareAll(t, e, requests, results)
	return stats
}

func compareAll(t *testing.T, e *Engine, requests []Request, results []Result) {
	t.Helper()
	for _, err := range Check(context.Background(), e.target.model.Weights(), requests, results, nil) {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestAgreesWithReference(t *testing.T) {
	requests := newRequests(11, 150, 12)
	for _, dp := range []int{1, 2, 3, 4} {
		for _, chunk := range []int{1, 7, 64} {
			t.Run(fmt.Sprintf("dp=%d/chunk=%d", dp, chunk), func(t *testing.T) {
				t.Parallel()
				serve(t, Config{DataParallelSize: dp, MaxChunk: chunk}, requests)
			})
		}
	}
	for name, cfg := range map[string]Config{
		"more ranks than experts":   {DataParallelSize: 10},
		"more ranks than requests":  {DataParallelSize: 13},
		"sequence parallel":         {DataParallelSize: 3, SequenceParallel: 2, MaxChunk: 7},
		"one rank of workers":       {SequenceParallel: 3, MaxChunk: 5},
		"more workers than rows":    {DataParallelSize: 2, SequenceParallel: 16},
		"one token a step":          {DataParallelSize: 2, MaxNumBatchedTokens: 1},
		"one request a step":        {DataParallelSize: 2, MaxNumSeqs: 1},
		"blocks of one token":       {DataParallelSize: 2, BlockSize: 1},
		"full graphs for any batch": {DataParallelSize: 2, GraphMode: fwd.GraphFull},
		"full decode graphs":        {DataParallelSize: 3, SequenceParallel: 2, GraphMode: fwd.GraphFullDecodeOnly},
		"piecewise graphs":          {DataParallelSize: 2, GraphMode: fwd.GraphPiecewise, MaxChunk: 7},
		"graphs of both kinds":      {DataParallelSize: 4, GraphMode: fwd.GraphFullAndPiecewise},
		"graphs of one rank":        {GraphMode: fwd.GraphFullAndPiecewise},
		"hardly any blocks":         {DataParallelSize: 2, NumBlocks: 11},
		"large blocks":              {BlockSize: 1000, NumBlocks: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			serve(t, cfg, requests)
		})
	}
}

// withAdapters returns requests in which request i uses adapter i mod (n+1).
func withAdapters(requests []Request, n int) []Request {
	for i := range requests {
		requests[i].Adapter = i % (n + 1)
	}
	return requests
}

// TestAdapters: requests of different adapters share a batch.
func TestAdapters(t *testing.T) {
	for _, dp := range []int{1, 3} {
		serve(t, Config{DataParallelSize: dp}, withAdapters(newRequests(20, 40, 12), 3))
	}
}

// TestMicrobatches: passes are split wherever they can be, through the middle of requests too.
func TestMicrobatches(t *testing.T) {
	requests := withAdapters(newRequests(24, 90, 12), 2)
	for _, cfg := range []Config{
		{NumUBatches: 2},
		{NumUBatches: 3, SequenceParallel: 2, DecodeUBatchThreshold: 1, PrefillUBatchThreshold: 1},
		{NumUBatches: 2, DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise},
		{NumUBatches: 16, DataParallelSize: 2, MaxChunk: 3},
	} {
		stats := serve(t, cfg, requests)
		if stats.SplitPasses == 0 {
			t.Errorf("%+v: no pass was split", cfg)
		}
	}
}

// TestSpeculative: guesses change how fast tokens come, and not which.
func TestSpeculative(t *testing.T) {
	requests := newRequests(24, 60, 25)
	for _, cfg := range []Config{
		{NumSpeculativeTokens: 1},
		{NumSpeculativeTokens: 4, BlockSize: 1},
		{NumSpeculativeTokens: 2, DataParallelSize: 4, SequenceParallel: 2, GraphMode: fwd.GraphFullAndPiecewise},
		{NumSpeculativeTokens: 2, DataParallelSize: 2, NumUBatches: 2, GraphMode: fwd.GraphFull},
		{NumSpeculativeTokens: 3, MaxNumBatchedTokens: 2, DataParallelSize: 2},
		{NumSpeculativeTokens: 31, MaxNumSeqs: 2, GraphMode: fwd.GraphFullDecodeOnly},
	} {
		stats := serve(t, cfg, requests)
		if stats.AcceptedTokens == 0 || stats.AcceptedTokens >= stats.ProposedTokens || stats.DraftPasses == 0 {
			t.Errorf("%+v: %d of %d guesses accepted in %d draft passes", cfg, stats.AcceptedTokens,
				stats.ProposedTokens, stats.DraftPasses)
		}
		if size := cfg.DataParallelSize; size > 1 &&
			stats.DraftPasses != stats.Steps*cfg.NumSpeculativeTokens*size {
			t.Errorf("%+v: %d draft passes in %d steps", cfg, stats.DraftPasses, stats.Steps)
		}
	}
}

// TestStats: figures that can be known beforehand.
func TestStats(t *testing.T) {
	t.Run("alone", func(t *testing.T) {
		// 200 prompt tokens: 128 are too large for a graph, 72 as well; then 4 decode steps.
		stats := serve(t, Config{GraphMode: fwd.GraphFullAndPiecewise},
			[]Request{{Prompt: make([]int, 200), MaxTokens: 5}})
		if stats.Steps != 6 || stats.Passes[fwd.ReasonTooLarge] != 2 || stats.Passes[fwd.ReasonExact] != 4 ||
			stats.DummyPasses != 0 || stats.GraphPadding != 0 || stats.DataPadding != 0 {
			t.Errorf("%+v", stats)
		}
		// 2 layers send each of the 204 tokens to 2 experts.
		if got := stats.Ranks[0].Sent; len(got) != 1 || got[0] != 2*2*204 || stats.Lowered[0] != 0 {
			t.Errorf("%v rows sent, want %d", got, 2*2*204)
		}
	})
	t.Run("idle rank", func(t *testing.T) {
		// Rank 0 prefills 30 tokens, padded to a graph of 32, and decodes 9 more. Rank 1 has one token in
		// dummy passes.
		stats := serve(t, Config{DataParallelSize: 2, GraphMode: fwd.GraphFullAndPiecewise},
			[]Request{{Prompt: make([]int, 30), MaxTokens: 10}})
		if stats.DummyPasses < stats.Steps || stats.GraphPadding != 2 || stats.DataPadding != 31 {
			t.Errorf("%+v, want a dummy pass a step, 2 tokens of graph padding and 31 of DP padding", stats)
		}
	})
	t.Run("lowered by a rank", func(t *testing.T) {
		requests := []Request{{Prompt: make([]int, 100), MaxTokens: 1}, {Prompt: make([]int, 1), MaxTokens: 1}}
		stats := serve(t, Config{DataParallelSize: 2, GraphMode: fwd.GraphFullAndPiecewise}, requests)
		if stats.Passes[fwd.ReasonTooLarge] != 1 || stats.Passes[fwd.ReasonDPRank] != 1 {
			t.Errorf("%+v, want one pass too large and one lowered by it", stats)
		}
		if !slices.Equal(stats.Lowered, []int{1, 0}) {
			t.Errorf("lowered %v, want once by rank 0", stats.Lowered)
		}
		sent, want := 0, 2*2*(100+4) // rank 0 takes 4 chunks, and rank 1 brings a row to each
		for _, r := range stats.Ranks {
			sent += r.Sent[0] + r.Sent[1]
		}
		if own := stats.Ranks[0].Sent[0]; sent != want || own == 0 || own == 2*2*100 {
			t.Errorf("%d rows sent, %d in rank 0; want %d, some of them to the other rank", sent, own, want)
		}
	})
}

// liar is a coordinator whose rank is told wrong votes.
type liar struct {
	fwd.Coordinator
	lie func(votes []fwd.Vote)
}

func (l liar) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := l.Coordinator.Exchange(ctx, v)
	if err == nil && !v.WarmUp {
		votes = slices.Clone(votes) // the ranks share them
		l.lie(votes)
	}
	return votes, err
}

// TestWrongVotes: if ranks know different numbers of each other's tokens, no answer comes out,
// and nobody hangs.
func TestWrongVotes(t *testing.T) {
	for name, lie := range map[string]func(votes []fwd.Vote){
		"one token more": func(votes []fwd.Vote) { votes[0].NumTokens++; votes[0].NumTokensPadded++ },
		"ranks swapped":  func(votes []fwd.Vote) { votes[0], votes[1] = votes[1], votes[0] },
		"another chunk":  func(votes []fwd.Vote) { votes[0].NumTokensPadded += 400 },
	} {
		t.Run(name, func(t *testing.T) {
			// No batch has a graph: then ranks are not padded, and each size counts.
			requests := []Request{
				{ID: 0, Prompt: make([]int, 100), MaxTokens: 9},
				{ID: 1, Prompt: make([]int, 90), MaxTokens: 9},
				{ID: 2, Prompt: make([]int, 80), MaxTokens: 9},
			}
			for _, sp := range []int{1, 2} {
				group, err := fwd.NewLocalGroup(3)
				if err != nil {
					t.Fatal(err)
				}
				group[2] = liar{group[2], lie}
				_, stats, err := newEngine(t,
					Config{DataParallelSize: 3, SequenceParallel: sp, Coordinators: group}).Run(t.Context(), requests)
				if !errors.Is(err, ErrRefused) || stats.Finished != 0 {
					t.Errorf("sp %d: %v, %d requests finished; want ErrRefused", sp, err, stats.Finished)
				}
			}
		})
	}
}

// TestRankFails: a rank that fails in a pass ends the run immediately, with its own error.
func TestRankFails(t *testing.T) {
	broken := errors.New("broken layer")
	for _, dp := range []int{1, 2, 4} {
		var passes atomic.Int64
		e := newEngine(
			t,
			Config{DataParallelSize: dp, ExchangeTimeout: time.Hour, Middleware: func(rank int) []fwd.Middleware {
				return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
					return func(ctx context.Context) error {
						if rank == dp-1 && passes.Add(1) == 5 {
							return broken
						}
						return next(ctx)
					}
				}}
			}},
		)
		requests := newRequests(20, 50, 20)
		results, stats, err := e.Run(t.Context(), requests)
		if !errors.Is(err, broken) || stats.Steps != 4 || stats.Requests != 20 {
			t.Errorf("dp %d: %v after %d steps, want %v after 4", dp, err, stats.Steps, broken)
		}
		compareAll(t, e, requests, results) // what had finished stays right
	}
}

// TestRankFailsAnywhere: whichever pass it is that fails, of the warm-up, of the model or of its
// draft, the others don't wait for it. Each model captures 11 graphs.
func TestRankFailsAnywhere(t *testing.T) {
	broken := errors.New("broken layer")
	for _, at := range []int64{1, 12, 22, 23, 24, 25, 26, 40} {
		var passes atomic.Int64
		cfg := Config{
			DataParallelSize:     2,
			SequenceParallel:     2,
			NumUBatches:          2,
			NumSpeculativeTokens: 1,
			GraphMode:            fwd.GraphPiecewise,
			ExchangeTimeout:      time.Hour,
		}
		cfg.Middleware = func(rank int) []fwd.Middleware {
			return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					if rank == 0 || passes.Add(1) != at {
						return next(ctx)
					}
					return broken
				}
			}}
		}
		requests := newRequests(20, 50, 20)
		e := newEngine(t, cfg)
		results, _, err := e.Run(t.Context(), requests)
		if !errors.Is(err, broken) {
			t.Errorf("pass %d: %v, want %v", at, err, broken)
		}
		compareAll(t, e, requests, results)
	}
}

// TestCancel: an interrupted run ends between two steps and returns what there is.
func TestCancel(t *testing.T) {
	stop := errors.New("stop")
	for _, dp := range []int{1, 3} {
		ctx, cancel := context.WithCancelCause(t.Context())
		var passes atomic.Int64
		e := newEngine(t, Config{DataParallelSize: dp, Middleware: func(rank int) []fwd.Middleware {
			return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					if rank == 0 && passes.Add(1) == 30 {
						cancel(stop)
					}
					return next(ctx)
				}
			}}
		}})
		requests := newRequests(60, 50, 30)
		results, stats, err := e.Run(ctx, requests)
		// The other ranks may have entered the next step already.
		if !errors.Is(err, stop) || stats.Steps < 30 || stats.Steps > 31 || stats.Finished == 0 ||
			stats.Finished == len(requests) {
			t.Errorf("dp %d: %v after %d steps, %d finished", dp, err, stats.Steps, stats.Finished)
		}
		compareAll(t, e, requests, results)
		if finished, generated := e.Progress(); finished != stats.Finished || generated != stats.GeneratedTokens {
			t.Errorf("progress says %d, %d, the figures %d, %d", finished, generated, stats.Finished,
				stats.GeneratedTokens)
		}
	}
}

// TestCancelHangingStep: a step that does not end is given up after StopGrace.
func TestCancelHangingStep(t *testing.T) {
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	e := newEngine(
		t,
		Config{DataParallelSize: 2, StopGrace: time.Millisecond, Middleware: func(rank int) []fwd.Middleware {
			return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
				return func(ctx context.Context) error {
					if rank == 1 {
						cancel(stop)
						<-ctx.Done()
						return context.Cause(ctx)
					}
					return next(ctx)
				}
			}}
		}},
	)
	if _, stats, err := e.Run(ctx, newRequests(4, 10, 10)); !errors.Is(err, stop) || stats.Finished != 0 {
		t.Errorf("%v, %d finished", err, stats.Finished)
	}
}

// TestSpeed: requests are not served before they arrive, and ranks sleep until then.
func TestSpeed(t *testing.T) {
	requests := newRequests(6, 20, 3)
	for i := range requests {
		requests[i].Arrival = time.Duration(i) * time.Second
	}
	for _, dp := range []int{1, 2} {
		stats := serve(t, Config{DataParallelSize: dp, Speed: 20}, requests)
		if stats.Duration < 250*time.Millisecond || stats.Duration > 10*time.Second {
			t.Errorf("dp %d: 5 s at 20 times the speed took %v", dp, stats.Duration)
		}
		if stats.Steps > 40 {
			t.Errorf("dp %d: %d steps: ranks did not sleep", dp, stats.Steps)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	requests[5].Arrival = 10000 * time.Hour
	if _, stats, err := newEngine(t, Config{DataParallelSize: 2, Speed: 1e4}).Run(ctx, requests); !errors.Is(err,
		context.DeadlineExceeded) || stats.Finished != 5 {
		t.Errorf("%v, %d finished, want the deadline in the long sleep", err, stats.Finished)
	}
}

// TestSpans: passes are linked to the requests in them, and a step of all ranks is one trace, also if
// the next one has begun.
func TestSpans(t *testing.T) {
	for _, overlap := range []bool{false, true} {
		t.Run(fmt.Sprintf("overlap=%t", overlap), func(t *testing.T) { testSpans(t, overlap) })
	}
}

func testSpans(t *testing.T, overlap bool) {
	const dp = 3
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	requests := newRequests(7, 60, 5)
	cfg := Config{DataParallelSize: dp, TracerProvider: provider, StepTrace: true, Overlap: overlap}
	stats := serve(t, cfg, requests)
	served := map[trace.SpanID]sdktrace.ReadOnlySpan{}
	steps := map[trace.TraceID]int{}
	for _, s := range recorder.Ended() {
		switch kindOf(s) {
		case "request":
			served[s.SpanContext().SpanID()] = s
		case "fwd.forward":
			steps[s.SpanContext().TraceID()]++
		}
	}
	if len(served) != len(requests) || len(steps) != stats.Steps ||
		len(recorder.Started()) != len(recorder.Ended()) {
		t.Errorf("%d request spans for %d requests, %d traces for %d steps, %d of %d spans ended",
			len(served), len(requests), len(steps), stats.Steps, len(recorder.Ended()), len(recorder.Started()))
	}
	for id, n := range steps {
		if n != dp {
			t.Errorf("trace %v has %d passes, want one of each of %d ranks", id, n, dp)
		}
	}
	linked := map[trace.SpanID]int{}
	for _, s := range recorder.Ended() {
		if kindOf(s) != "fwd.forward" {
			continue
		}
		for _, l := range s.Links() {
			if served[l.SpanContext.SpanID()] == nil {
				t.Errorf("%s links to a span that is no request's", s.Name())
			}
			linked[l.SpanContext.SpanID()]++
		}
	}
	for id, s := range served {
		attrs := attribute.NewSet(s.Attributes()...)
		n, _ := attrs.Value("engine.request.id")
		r := requests[n.AsInt64()]
		if tokens, _ := attrs.Value("gen_ai.usage.completion_tokens"); int(tokens.AsInt64()) != r.MaxTokens {
			t.Errorf("request %d: %v generated tokens on its span, want %d", r.ID, tokens, r.MaxTokens)
		}
		if linked[id] < r.MaxTokens { // one pass for each token, and more for the prompt if it took several
			t.Errorf("request %d: %d passes are linked to it, want at least %d", r.ID, linked[id], r.MaxTokens)
		}
	}
}

// TestNoGoroutines: nothing is left of a run, whatever its end.
func TestNoGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	requests := newRequests(8, 30, 10)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for range 10 {
		e := newEngine(
			t,
			Config{
				DataParallelSize:     4,
				SequenceParallel:     2,
				NumUBatches:          2,
				NumSpeculativeTokens: 1,
				GraphMode:            fwd.GraphFullAndPiecewise,
			},
		)
		if _, _, err := e.Run(t.Context(), requests); err != nil {
			t.Fatal(err)
		}
		if _, stats, err := e.Run(canceled, requests); !errors.Is(err, context.Canceled) || stats.Steps != 0 {
			t.Fatalf("%v after %d steps", err, stats.Steps)
		}
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{DataParallelSize: -1}, "DataParallelSize is -1"},
		{Config{DataParallelSize: 65}, "DataParallelSize is 65, want at most 64"},
		{Config{SequenceParallel: 17}, "SequenceParallel is 17, want at most 16"},
		{Config{MaxChunk: -2}, "MaxChunk is -2"},
		{Config{NumSpeculativeTokens: 32}, "NumSpeculativeTokens is 32, want 0 to 31"},
		{Config{GraphMode: fwd.GraphFullAndPiecewise, NumSpeculativeTokens: 2, CaptureSizes: []int{4, 6, 8}},
			"capture sizes [4 8] are not multiples of the uniform decode query length 3"},
		{Config{Overlap: true, NumSpeculativeTokens: 2}, "Overlap with NumSpeculativeTokens 2: a step can't be "},
		{Config{NumUBatches: 17}, "NumUBatches is 17, want at most 16"},
		{Config{NumUBatches: -1, DecodeUBatchThreshold: -2}, "DecodeUBatchThreshold is -2"},
		{Config{PrefillUBatchThreshold: -2}, "PrefillUBatchThreshold is -2"},
		{Config{MaxNumBatchedTokens: -3}, "MaxNumBatchedTokens is -3"},
		{Config{MaxNumSeqs: -4}, "MaxNumSeqs is -4"},
		{Config{BlockSize: -5}, "BlockSize is -5"},
		{Config{NumBlocks: -6}, "NumBlocks is -6"},
		{Config{Speed: -0.5}, "Speed is -0.5"},
		{Config{GraphMode: fwd.GraphFull, CaptureSizes: []int{8, 4}},
			"capture sizes are not ascending: 4 follows 8"},
		{Config{GraphMode: 9}, "GraphMode(9) is not a graph mode"},
		{Config{DataParallelSize: 2, Coordinators: make([]fwd.Coordinator, 3)}, "3 coordinators for 2 ranks"},
		{Config{DataParallelSize: 2, DraftCoordinators: make([]fwd.Coordinator, 1)},
			"1 draft coordinators for 2 ranks"},
	} {
		if _, err := New(newModel(t, 0), c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want an error with %q", c.cfg, err, c.want)
		}
	}
	for _, c := range []struct {
		request Request
		want    string
	}{
		{Request{ID: 7, MaxTokens: 1}, "request 7 has 0 prompt tokens"},
		{Request{ID: 7, Prompt: []int{1}}, "0 tokens to generate"},
		{Request{ID: 7, Prompt: []int{1}, MaxTokens: 1, Arrival: -time.Second}, "arrives at -1s"},
		{Request{ID: 7, Prompt: []int{1, 256}, MaxTokens: 1},
			"request 7: token 256 at position 1 is not in the vocabulary of 256"},
		{Request{ID: 7, Prompt: []int{1}, MaxTokens: 1, Adapter: 1},
			"request 7: adapter 1 is none of the 0 that the model has"},
		{Request{ID: 7, Prompt: make([]int, 60), MaxTokens: 6},
			"request 7 needs 5 blocks of 16 tokens, the KV cache has 4"},
	} {
		_, _, err := newEngine(t, Config{NumBlocks: 4}).Run(t.Context(), []Request{c.request})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want an error with %q", c.request, err, c.want)
		}
	}
}

// TestAdmitSlow: a request that would arrive too late for a time.Duration is refused.
func TestAdmitSlow(t *testing.T) {
	late := Request{ID: 7, Prompt: []int{1}, MaxTokens: 1, Arrival: time.Hour}
	_, _, err := newEngine(t, Config{Speed: 1e-7}).Run(t.Context(), []Request{late})
	if want := "Speed is 1e-07: request 7 would arrive after 3.6e+10 s, want at most 9.22e+09 s"; err == nil ||
		!strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestCheckNotices: the comparison itself finds a wrong token and a logit that is off by little.
func TestCheckNotices(t *testing.T) {
	e, requests := newEngine(t, Config{}), newRequests(4, 10, 5)
	results, _, err := e.Run(t.Context(), requests)
	if err != nil {
		t.Fatal(err)
	}
	results[1].Tokens[0]++
	results[2].Logits[9] += 1e-6
	results[3].Finished = false
	results[3].Tokens = nil
	for i, err := range Check(t.Context(), e.target.model.Weights(), requests, results, nil) {
		if want := i == 1 || i == 2; (err != nil) != want {
			t.Errorf("request %d: %v", i, err)
		}
	}
}
