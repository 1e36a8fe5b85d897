// This file has the examples of the documentation.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
)

// attnMetadata is what an attention layer of the examples needs to know about a batch.
type attnMetadata struct{ SeqLens []int }

// A basic pass: the forward function, and all it calls, finds the pass in its context.
func ExampleRunner_Run() {
	runner, err := fwd.New(fwd.Config{Name: "target"})
	if err != nil {
		fmt.Println(err)
		return
	}
	forward := func(ctx context.Context) error {
		fc := fwd.MustFromContext(ctx)
		fmt.Printf("%d tokens, graph mode %v\n", fc.NumTokens, fc.GraphMode)
		return nil
	}
	if err := runner.Run(context.Background(), fwd.Pass{NumTokens: 5}, forward); err != nil {
		fmt.Println(err)
	}
	_, ok := fwd.FromContext(context.Background())
	fmt.Println("outside a pass:", ok)
	// Output:
	// 5 tokens, graph mode NONE
	// outside a pass: false
}

// A layer reads what belongs to it by its name, with its type. The entry "" serves every layer
// without its own.
func ExampleAttnMetadata() {
	pass := fwd.Pass{
		NumTokens: 2,
		AttnMetadata: []map[string]any{{
			"":               &attnMetadata{SeqLens: []int{17, 4}},
			"layers.1.local": &attnMetadata{SeqLens: []int{8, 4}},
		}},
	}
	layer := func(ctx context.Context, name string) error {
		attn, err := fwd.AttnMetadata[*attnMetadata](ctx, name)
		if err != nil {
			return err
		}
		fmt.Println(name, attn.SeqLens)
		return nil
	}
	var runner *fwd.Runner // nil: rank 0 of 1, no telemetry
	err := runner.Run(context.Background(), pass, func(ctx context.Context) error {
		if err := layer(ctx, "layers.0.attn"); err != nil {
			return err
		}
		if err := layer(ctx, "layers.1.local"); err != nil {
			return err
		}
		_, err := fwd.Layer[*attnMetadata](ctx, "layers.2.mamba")
		return err
	})
	fmt.Println(err)
	// Output:
	// layers.0.attn [17 4]
	// layers.1.local [8 4]
	// fwd: layer lookup: no layer "layers.2.mamba" in Config.Layers (have none)
}

// Two data-parallel ranks plan a step together. One has a prefill of 6 tokens; the other is idle
// and keeps step.
func ExampleRunner_Plan() {
	group, err := fwd.NewLocalGroup(2)
	if err != nil {
		fmt.Println(err)
		return
	}
	schedules := []fwd.Schedule{{NumScheduledTokens: []int{4, 2}}, {}}
	lines := make([]string, 2)
	var ranks sync.WaitGroup
	for rank := range 2 {
		ranks.Go(func() {
			runner, err := fwd.New(
				fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}},
				fwd.WithCoordinator(group[rank]),
			)
			if err != nil {
				lines[rank] = err.Error()
				return
			}
			pass, err := runner.Plan(context.Background(), schedules[rank])
			if err != nil {
				lines[rank] = err.Error()
				return
			}
			err = runner.Run(context.Background(), pass, func(ctx context.Context) error {
				fc := fwd.MustFromContext(ctx)
				lines[rank] = fmt.Sprintf("rank %d: %d tokens, dummy %t, at most %d tokens on a rank",
					rank, fc.NumTokens, fc.Dummy, fc.DP.MaxTokensAcrossDP())
				return nil
			})
			if err != nil {
				lines[rank] = err.Error()
			}
		})
	}
	ranks.Wait()
	fmt.Println(lines[0])
	fmt.Println(lines[1])
	// Output:
	// rank 0: 6 tokens, dummy false, at most 6 tokens on a rank
	// rank 1: 1 tokens, dummy true, at most 6 tokens on a rank
}

// A forward context by itself is a value in a context. A nested one hides the outer one, and only
// in the context that it is in.
func ExampleNewContext() {
	target := fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: 16})
	draft := fwd.NewContext(target, &fwd.ForwardContext{NumTokens: 2})
	hidden := fwd.NewContext(draft, nil)
	for _, ctx := range []context.Context{target, draft, hidden} {
		if fc, ok := fwd.FromContext(ctx); ok {
			fmt.Println(fc.NumTokens, "tokens")
		} else {
			fmt.Println("no pass")
		}
	}
	// Output:
	// 16 tokens
	// 2 tokens
	// no pass
}

// Every step plans, adds metadata for each part of the pass, and runs. A batch of 600 tokens is worth
// two microbatches here; a small one stays whole.
func ExamplePass_Parts() {
	runner, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{NumUBatches: 2}})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	for _, lengths := range [][]int{{3, 1}, {350, 250}} {
		pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: lengths, AllowUBatches: true})
		if err != nil {
			log.Fatal(err)
		}
		for _, part := range pass.Parts() {
			fmt.Println("metadata of", part)
			pass.AttnMetadata = append(pass.AttnMetadata, fwd.AllLayers(part.NumTokens()))
		}
		tokens := make([]int, len(pass.AttnMetadata))
		err = runner.Run(ctx, pass, func(ctx context.Context) error {
			return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
				tokens[i] = fwd.MustAttnMetadata[int](ctx, "layers.0.attn")
				return nil
			})
		})
		fmt.Println("layers saw", tokens, err)
	}
	// Output:
	// metadata of requests [0, 2) tokens [0, 4)
	// layers saw [4] <nil>
	// metadata of requests [0, 1) tokens [0, 300)
	// metadata of requests [0, 2) tokens [300, 600)
	// layers saw [300 300] <nil>
}

// A pass that begins here and ends elsewhere. The end can be deferred before the error is looked at,
// since it is never nil.
func ExampleRunner_Start() {
	runner, err := fwd.New(fwd.Config{}, fwd.WithObserver(func(_ context.Context, rec *fwd.Record) {
		fmt.Println("the pass ended with", rec.Err)
	}))
	if err != nil {
		log.Fatal(err)
	}
	step := func(tokens int) (err error) {
		ctx, end, err := runner.Start(context.Background(), fwd.Pass{NumTokens: tokens})
		defer func() { end(err) }()
		if err != nil {
			return err
		}
		fmt.Println(fwd.MustFromContext(ctx).NumTokens, "tokens")
		return errors.New("out of memory")
	}
	step(2)
	fmt.Println(step(-2) != nil)
	// Output:
	// 2 tokens
	// the pass ended with out of memory
	// true
}

// A middleware wraps every pass, inside it: it can read the forward context and add to the context.
func ExampleWithMiddleware() {
	type key struct{}
	platform := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			fmt.Println("before", fwd.MustFromContext(ctx).NumTokens, "tokens")
			defer fmt.Println("after")
			return next(context.WithValue(ctx, key{}, "stream 7"))
		}
	}
	runner, err := fwd.New(fwd.Config{}, fwd.WithMiddleware(platform))
	if err != nil {
		log.Fatal(err)
	}
	err = runner.Run(context.Background(), fwd.Pass{NumTokens: 4}, func(ctx context.Context) error {
		fmt.Println("forward on", ctx.Value(key{}))
		return nil
	})
	fmt.Println(err)
	// Output:
	// before 4 tokens
	// forward on stream 7
	// after
	// <nil>
}

// Records of passes go to whoever wants them, without a collector: here a recorder that keeps the
// latest, and a function that counts padding.
func ExampleWithObserver() {
	padding := 0
	recorder := fwd.NewRecorder(2)
	runner, err := fwd.New(fwd.Config{Name: "target"},
		fwd.WithObserver(recorder.Observe),
		fwd.WithObserver(func(_ context.Context, rec *fwd.Record) {
			padding += rec.NumTokens - rec.NumTokensUnpadded
		}))
	if err != nil {
		log.Fatal(err)
	}
	forward := func(context.Context) error { return nil }
	for _, tokens := range []int{3, 5, 8} {
		pass := fwd.Pass{NumTokens: 8, NumTokensUnpadded: tokens, Phase: "decode"}
		if err := runner.Run(context.Background(), pass, forward); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println("padding:", padding)
	for _, rec := range recorder.Recent() {
		fmt.Println(rec.Name, rec.Phase, rec.NumTokensUnpadded, rec.GraphMode, rec.Err)
	}
	// Output:
	// padding: 8
	// target decode 5 NONE <nil>
	// target decode 8 NONE <nil>
}

// pair is a Coordinator of one's own, for two ranks that send each other their votes over channels.
// It is an illustration alone, since it does not look at steps. The module fwdtest checks an
// implementation that is meant seriously.
type pair struct {
	rank int
	mine chan<- fwd.Vote
	his  <-chan fwd.Vote
}

func (p *pair) Rank() int { return p.rank }

func (p *pair) Size() int { return 2 }

func (p *pair) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	p.mine <- v
	votes := []fwd.Vote{v, v}
	select {
	case votes[1-p.rank] = <-p.his:
		return votes, nil
	case <-ctx.Done():
		return nil, &fwd.RankError{Err: fwd.ErrRankMissing, Step: v.Step, Ranks: []int{1 - p.rank}}
	}
}

// Any collective that gives each rank the votes of all can connect the ranks. The Runner takes its rank
// and the number of ranks from it.
func ExampleCoordinator() {
	a, b := make(chan fwd.Vote, 1), make(chan fwd.Vote, 1)
	lines := make([]string, 2)
	var ranks sync.WaitGroup
	for rank, coordinator := range []fwd.Coordinator{&pair{0, a, b}, &pair{1, b, a}} {
		ranks.Go(func() {
			runner, err := fwd.New(fwd.Config{}, fwd.WithCoordinator(coordinator))
			if err != nil {
				log.Fatal(err)
			}
			pass, err := runner.Plan(context.Background(), fwd.Schedule{NumScheduledTokens: []int{2 + 5*rank}})
			if err != nil {
				log.Fatal(err)
			}
			lines[rank] = fmt.Sprintf("rank %d knows that rank %d has the most tokens",
				rank, pass.Agreement.MaxTokensRank)
		})
	}
	ranks.Wait()
	fmt.Println(lines[0])
	fmt.Println(lines[1])
	// Output:
	// rank 0 knows that rank 1 has the most tokens
	// rank 1 knows that rank 1 has the most tokens
}

// An event loop that holds several ranks in one goroutine begins all of them, then waits for all.
func ExampleRunner_Begin() {
	group, err := fwd.NewLocalGroup(3)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	waits := make([]func() (fwd.Pass, error), len(group))
	for rank, coordinator := range group {
		runner, err := fwd.New(fwd.Config{}, fwd.WithCoordinator(coordinator))
		if err != nil {
			log.Fatal(err)
		}
		schedule := fwd.Schedule{NumScheduledTokens: []int{10 * rank}} // rank 0 is idle
		if waits[rank], err = runner.Begin(ctx, schedule); err != nil {
			log.Fatal(err)
		}
	}
	for rank, wait := range waits {
		pass, err := wait()
		fmt.Println("rank", rank, "step", pass.Agreement.Step, "tokens", pass.NumTokens, "dummy", pass.Dummy, err)
	}
	// Output:
	// rank 0 step 1 tokens 1 dummy true <nil>
	// rank 1 step 1 tokens 10 dummy false <nil>
	// rank 2 step 1 tokens 20 dummy false <nil>
}

// A simulator has no pass to run: it computes how long one takes, and reports it. Spans, metrics and
// records are those of a pass that ran.
func ExampleRunner_Report() {
	print := func(_ context.Context, rec *fwd.Record) {
		fmt.Println(rec.Name, rec.Phase, rec.NumTokens, "tokens took", rec.Duration)
	}
	runner, err := fwd.New(fwd.Config{Name: "simulated"}, fwd.WithObserver(print))
	if err != nil {
		log.Fatal(err)
	}
	ctx, now := context.Background(), time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, lengths := range [][]int{{1, 1}, {40, 1}} {
		pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: lengths})
		if err != nil {
			log.Fatal(err)
		}
		ended := now.Add(time.Duration(pass.NumTokens) * time.Millisecond)
		if err := runner.Report(ctx, pass, now, ended, nil); err != nil {
			log.Fatal(err)
		}
		now = ended
	}
	// Output:
	// simulated decode 2 tokens took 2ms
	// simulated mixed 41 tokens took 41ms
}

// At its start an engine captures every graph that Dispatch can ask for. Serving then only replays.
func ExampleRunner_WarmUp() {
	dispatcher, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullDecodeOnly, CaptureSizes: []int{1, 2, 4}, MaxNumSeqs: 4,
	})
	if err != nil {
		log.Fatal(err)
	}
	runner, err := fwd.New(fwd.Config{}, fwd.WithDispatcher(dispatcher))
	if err != nil {
		log.Fatal(err)
	}
	model := func(context.Context) error { return nil }
	cache, err := fwd.NewGraphCache(fwd.GraphFull, model,
		func(_ context.Context, key fwd.BatchDescriptor) (replay fwd.ForwardFunc, err error) {
			fmt.Println("capture", key.NumTokens, "tokens")
			return model, nil
		})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	for pass, err := range runner.WarmUp(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		if err := runner.Run(ctx, pass, cache.Forward); err != nil {
			log.Fatal(err)
		}
	}
	cache.CloseCapture()
	fmt.Println(cache.Len(), "graphs")
	// Output:
	// capture 4 tokens
	// capture 2 tokens
	// capture 1 tokens
	// 3 graphs
}

// A draft model proposes tokens for the batch of the step that the target model has agreed on. Its
// first pass runs the same batch, later ones one token of each request; no votes are exchanged.
func ExampleRunner_Plan_reuse() {
	group, err := fwd.NewLocalGroup(2)
	if err != nil {
		log.Fatal(err)
	}
	ctx, batches := context.Background(), [][]int{{4, 1}, {1}}
	target, draft := make([]*fwd.Runner, 2), make([]*fwd.Runner, 2)
	waits := make([]func() (fwd.Pass, error), 2)
	for rank, c := range group {
		parallel := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: rank}
		target[rank], err = fwd.New(fwd.Config{Name: "target"}, fwd.WithCoordinator(c))
		if err != nil {
			log.Fatal(err)
		}
		if draft[rank], err = fwd.New(fwd.Config{Name: "draft", Parallel: parallel}); err != nil {
			log.Fatal(err)
		}
		if waits[rank], err = target[rank].Begin(ctx, fwd.Schedule{NumScheduledTokens: batches[rank]}); err != nil {
			log.Fatal(err)
		}
	}
	for rank, wait := range waits {
		pass, err := wait()
		if err != nil {
			log.Fatal(err)
		}
		again, err1 := draft[rank].Plan(ctx, fwd.Schedule{NumScheduledTokens: batches[rank], Reuse: pass.Agreement})
		ones := slices.Repeat([]int{1}, len(batches[rank]))
		single, err2 := draft[rank].Plan(ctx, fwd.Schedule{
			NumScheduledTokens: ones, Reuse: pass.Agreement, OneTokenPerRequest: true,
		})
		fmt.Println("rank", rank, "target", pass.NumTokens, "draft", again.NumTokens, single.NumTokens, err1, err2)
	}
	// Output:
	// rank 0 target 5 draft 5 2 <nil> <nil>
	// rank 1 target 1 draft 1 1 <nil> <nil>
}

// A forward function that returns something runs with Call.
func ExampleCall() {
	var runner *fwd.Runner // nil: rank 0 of 1, no telemetry
	logits, err := fwd.Call(context.Background(), runner, fwd.Pass{NumTokens: 3},
		func(ctx context.Context) ([]float64, error) {
			return make([]float64, fwd.MustFromContext(ctx).NumTokens), nil
		})
	fmt.Println(len(logits), err)
	// Output:
	// 3 <nil>
}

// A batch of 3 tokens is padded to the captured 4, and later passes replay.
func ExampleGraphCache() {
	dispatcher, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4}, MaxNumSeqs: 4,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	runner, err := fwd.New(fwd.Config{}, fwd.WithDispatcher(dispatcher))
	if err != nil {
		fmt.Println(err)
		return
	}
	eager := func(context.Context) error { fmt.Println("eager"); return nil }
	cache, err := fwd.NewGraphCache(fwd.GraphFull, eager,
		func(_ context.Context, key fwd.BatchDescriptor) (replay fwd.ForwardFunc, err error) {
			fmt.Printf("capture for %d tokens of %d requests\n", key.NumTokens, key.NumReqs)
			return func(context.Context) error {
				fmt.Printf("replay of %d tokens\n", key.NumTokens)
				return nil
			}, nil
		})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	for _, tokens := range [][]int{{1, 1, 1}, {1, 1, 1, 1}, {5}} {
		pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: tokens})
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(pass.GraphMode, pass.Reason)
		if err := runner.Run(ctx, pass, cache.Forward); err != nil {
			fmt.Println(err)
		}
	}
	// Output:
	// FULL exact
	// capture for 4 tokens of 4 requests
	// replay of 4 tokens
	// FULL exact
	// replay of 4 tokens
	// NONE too_large
	// eager
}

// A mixture-of-experts layer exchanges at most 4 rows of a rank at a time. Rank 1 has fewer rows
// than rank 0 and takes part to the end all the same.
func ExampleChunks() {
	parallel := fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}
	dp, err := fwd.NewDPMetadata(parallel, 3, vec(10, 3))
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: 3, DP: dp})
	chunks, err := fwd.Chunks(ctx, 1, 4)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, chunk := range chunks { // each round has a context of its own, for what runs in it
		fmt.Printf("chunk %d: ranks send %v, own rows [%d, %d), keep %t\n",
			chunk.Index, chunk.Sizes, chunk.Rows.Start, chunk.Rows.Stop, chunk.Keep)
	}
	_, ok := fwd.LocalSizes(ctx)
	fmt.Println("outside a chunk:", ok)
	// Output:
	// chunk 0: ranks send [4 3], own rows [0, 3), keep true
	// chunk 1: ranks send [4 1], own rows [2, 3), keep false
	// chunk 2: ranks send [2 1], own rows [2, 3), keep false
	// outside a chunk: false
}

// Descriptors are map keys. Relaxed ones match any number of requests with the same padded tokens.
func ExampleBatchDescriptor() {
	graphs := map[fwd.BatchDescriptor]string{
		{NumTokens: 8, NumReqs: 8, Uniform: true}: "full graph for 8 decodes",
		{NumTokens: 8}: "piecewise graphs for 8 tokens",
	}
	decode := fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true}
	mixed := fwd.BatchDescriptor{NumTokens: 8, NumReqs: 3}
	fmt.Println(graphs[decode])
	fmt.Println(graphs[mixed.RelaxForMixedBatchGraphs()])
	// Output:
	// full graph for 8 decodes
	// piecewise graphs for 8 tokens
}

// Microbatches run concurrently, each in a context of its own.
func ExampleRunUBatches() {
	_, slices, err := fwd.SplitUBatches([]int{3, 3, 2}, 8, 3, 2, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	pass := fwd.Pass{NumTokens: 8, UBatches: slices}
	lines := make([]string, len(slices))
	var runner *fwd.Runner
	err = runner.Run(context.Background(), pass, func(ctx context.Context) error {
		return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
			lines[i] = fmt.Sprintf("microbatch %d has %d tokens: %v", i, fwd.MustFromContext(ctx).NumTokens, slices[i])
			return nil
		})
	})
	fmt.Println(lines[0])
	fmt.Println(lines[1])
	fmt.Println(err)
	// Output:
	// microbatch 0 has 4 tokens: requests [0, 2) tokens [0, 4)
	// microbatch 1 has 4 tokens: requests [1, 3) tokens [4, 8)
	// <nil>
}
