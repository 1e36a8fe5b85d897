// This file has the examples of the documentation.

package fwd_test

import (
	"context"
	"fmt"
	"sync"

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

// Microbatches run at once, each in a context of its own.
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
