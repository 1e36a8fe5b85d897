// This file has the benchmarks, each beside a baseline. Those with the SDK are in integration/sdk.

package fwd_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// benchKey is the key of a baseline's value, benchFiller the key of the values that lie between.
type (
	benchKey    struct{}
	benchFiller struct{}
)

// Each sink keeps a result, so that the compiler keeps the code that makes it.
var (
	sinkContext context.Context
	sinkForward *fwd.ForwardContext
	sinkInt     int
	sinkVotes   []fwd.Vote
)

// benchInPass calls f with the context of a pass.
func benchInPass(b *testing.B, p fwd.Pass, f func(ctx context.Context)) {
	b.Helper()
	var r *fwd.Runner
	err := r.Run(context.Background(), p, func(ctx context.Context) error {
		f(ctx)
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

// bury returns a context depth values below ctx.
func bury(ctx context.Context, depth int) context.Context {
	for i := range depth {
		ctx = context.WithValue(ctx, benchFiller{}, i)
	}
	return ctx
}

// BenchmarkLookup counts depth from the context that holds the value, which has depth 1.
func BenchmarkLookup(b *testing.B) {
	for _, depth := range []int{1, 2, 8, 32} {
		benchInPass(b, decodePass(), func(ctx context.Context) {
			below := bury(ctx, depth-1)
			b.Run(fmt.Sprintf("by=fwd/depth=%d", depth), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					sinkForward, _ = fwd.FromContext(below)
				}
			})
			below = context.WithValue(context.Background(), benchKey{}, fwd.MustFromContext(ctx))
			below = bury(below, depth-1)
			b.Run(fmt.Sprintf("by=value/depth=%d", depth), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					sinkForward, _ = below.Value(benchKey{}).(*fwd.ForwardContext)
				}
			})
		})
	}
}

// BenchmarkAttnMetadata looks up an entry of a layer's own and the one for all layers, beside a
// value of the same depth that needs no look-up by name.
func BenchmarkAttnMetadata(b *testing.B) {
	pass := decodePass()
	pass.AttnMetadata = []map[string]any{{"model.layers.0.attn": 1, "": 2}}
	benchInPass(b, pass, func(ctx context.Context) {
		for _, depth := range []int{1, 8} {
			below := bury(ctx, depth-1)
			for _, entry := range []struct{ name, layer string }{
				{"own", "model.layers.0.attn"}, {"shared", "model.layers.1.attn"},
			} {
				b.Run(fmt.Sprintf("by=fwd/entry=%s/depth=%d", entry.name, depth), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						sinkInt, _ = fwd.AttnMetadata[int](below, entry.layer)
					}
				})
			}
			value := bury(context.WithValue(context.Background(), benchKey{}, 1), depth-1)
			b.Run(fmt.Sprintf("by=value/depth=%d", depth), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					sinkInt, _ = value.Value(benchKey{}).(int)
				}
			})
		}
	})
}

// BenchmarkRun runs passes that do nothing, beside a bare context.WithValue, one that holds a new
// forward context, which is the least that a pass can take, and a bare span.
func BenchmarkRun(b *testing.B) {
	ctx, pass := context.Background(), decodePass()
	forward := func(ctx context.Context) error {
		sinkForward, _ = fwd.FromContext(ctx)
		return nil
	}
	b.Run("by=value", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			sinkContext = context.WithValue(ctx, benchKey{}, &pass)
			_ = sinkContext.Value(benchKey{})
		}
	})
	b.Run("by=fresh", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			fc := &fwd.ForwardContext{NumTokens: pass.NumTokens, GraphMode: pass.GraphMode, Batch: pass.Batch}
			sinkContext = context.WithValue(ctx, benchKey{}, fc)
			sinkForward, _ = sinkContext.Value(benchKey{}).(*fwd.ForwardContext)
		}
	})
	tracers := map[string]trace.TracerProvider{
		"noop": tracenoop.NewTracerProvider(), "global": otel.GetTracerProvider(),
	}
	for _, provider := range []string{"noop", "global"} {
		r, err := fwd.New(fwd.Config{Name: "target"}, providers()[provider]...)
		if err != nil {
			b.Fatal(err)
		}
		b.Run("by=fwd/provider="+provider, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := r.Run(ctx, pass, forward); err != nil {
					b.Fatal(err)
				}
			}
		})
		tracer := tracers[provider].Tracer("bare")
		b.Run("by=span/provider="+provider, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bareSpan(ctx, tracer)
			}
		})
	}
}

// bareSpan starts and ends a span that nobody records, and so has no attributes.
func bareSpan(ctx context.Context, tracer trace.Tracer) {
	ctx, span := tracer.Start(ctx, "forward")
	defer span.End()
	sinkContext = ctx
}

// BenchmarkReport reports a pass to nobody, beside 4 µs of simulated work: what a simulator spends
// on a pass.
func BenchmarkReport(b *testing.B) {
	ctx, pass, began := context.Background(), decodePass(), time.Unix(1, 0)
	for _, provider := range []string{"noop", "global"} {
		r, err := fwd.New(fwd.Config{Name: "target"}, providers()[provider]...)
		if err != nil {
			b.Fatal(err)
		}
		b.Run("by=fwd/provider="+provider, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := r.Report(ctx, pass, began, began.Add(time.Millisecond), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("by=work", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for began := time.Now(); time.Since(began) < 4*time.Microsecond; {
				sinkInt++
			}
		}
	})
}

// BenchmarkBegin plans a step of four ranks in one goroutine, beside what it can't do without: each
// rank's dispatch before the votes and after, and its Agree.
func BenchmarkBegin(b *testing.B) {
	const ranks = 4
	runners := localRunners(b, ranks)
	ctx, schedule := context.Background(), fwd.Schedule{NumScheduledTokens: []int{1, 1, 1}}
	b.Run("by=fwd", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var waits [ranks]func() (fwd.Pass, error)
			for rank, r := range runners {
				wait, err := r.Begin(ctx, schedule)
				if err != nil {
					b.Fatal(err)
				}
				waits[rank] = wait
			}
			for _, wait := range waits {
				pass, err := wait()
				if err != nil {
					b.Fatal(err)
				}
				sinkInt = pass.NumTokens
			}
		}
	})
	d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: fwd.DefaultCaptureSizes(64), MaxNumSeqs: 32,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("by=agree", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			votes := make([]fwd.Vote, ranks)
			query := fwd.DispatchQuery{NumTokens: 3, NumReqs: 3, UniformDecode: true}
			for rank := range votes {
				mode, batch, _ := d.Dispatch(query)
				votes[rank] = fwd.Vote{
					Step: 1, NumTokens: 3, NumTokensPadded: batch.NumTokens, NumReqs: 3, Uniform: true, GraphMode: mode,
				}
			}
			for range votes {
				a, err := fwd.Agree(votes, 1)
				if err != nil {
					b.Fatal(err)
				}
				query.NumTokens = int(a.NumTokensAcrossDP.AtVec(0))
				_, batch, _ := d.Dispatch(query)
				sinkInt = batch.NumTokens
			}
		}
	})
}

// BenchmarkRunUBatches runs microbatches that do nothing, beside a bare WaitGroup.
func BenchmarkRunUBatches(b *testing.B) {
	for _, n := range []int{1, 2, 4} {
		fn := func(context.Context, int) error { return nil }
		benchInPass(b, splitPass(64, n), func(ctx context.Context) {
			b.Run(fmt.Sprintf("by=fwd/ubatches=%d", n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := fwd.RunUBatches(ctx, fn); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
		b.Run(fmt.Sprintf("by=waitgroup/ubatches=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var wg sync.WaitGroup
				for i := range n {
					wg.Go(func() { fn(context.Background(), i) })
				}
				wg.Wait()
			}
		})
	}
}

// benchDP returns the metadata of so many ranks with unequal counts, and the counts.
func benchDP(b *testing.B, ranks int) (*fwd.DPMetadata, *mat.VecDense) {
	b.Helper()
	across := mat.NewVecDense(ranks, nil)
	for d := range ranks {
		across.SetVec(d, float64(d%4096))
	}
	m, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: ranks}, 0, across)
	if err != nil {
		b.Fatal(err)
	}
	return m, across
}

// BenchmarkDP does the arithmetic of a pass without sequence parallelism, beside the bare running
// sum.
func BenchmarkDP(b *testing.B) {
	const sp, maxChunk = 1, 256
	for _, ranks := range []int{8, 64, 1024, 65536} {
		m, across := benchDP(b, ranks)
		list, cu := make([]int, 0, ranks*sp), new(mat.VecDense)
		p := fwd.ParallelConfig{DataParallelSize: ranks}
		for _, op := range []struct {
			name string
			f    func()
		}{
			{"new", func() { m, _ = fwd.NewDPMetadata(p, 0, across) }},
			{"local", func() { list = m.AppendSPLocalSizes(list[:0], sp) }},
			{"chunk", func() { list = m.AppendChunkedSizes(list[:0], sp, maxChunk, 1) }},
			{"cumulative", func() { cu = m.CuTokensAcrossSPTo(cu, sp) }},
			{"max", func() { sinkInt = m.MaxTokensAcrossDP() }},
			{"baseline", func() {
				data, sum := cu.RawVector().Data, 0.0
				for d := range data {
					sum += across.AtVec(d)
					data[d] = sum
				}
			}},
		} {
			b.Run(fmt.Sprintf("op=%s/ranks=%d", op.name, ranks), func(b *testing.B) {
				m.CuTokensAcrossSPTo(cu, sp)
				b.ReportAllocs()
				for b.Loop() {
					op.f()
				}
			})
		}
	}
}

// BenchmarkDPSequenceParallel does the arithmetic of 65,536 ranks for SP sizes that are and are not
// 1, beside loops that only write the same memory.
func BenchmarkDPSequenceParallel(b *testing.B) {
	const ranks, maxChunk = 65536, 256
	m, _ := benchDP(b, ranks)
	for _, sp := range []int{1, 2, 8} {
		list, cu := make([]int, ranks*sp), mat.NewVecDense(ranks*sp, nil)
		for _, op := range []struct {
			name string
			f    func()
		}{
			{"local", func() { list = m.AppendSPLocalSizes(list[:0], sp) }},
			{"chunk", func() { list = m.AppendChunkedSizes(list[:0], sp, maxChunk, 1) }},
			{"write", func() {
				for i := range list {
					list[i] = i
				}
			}},
			{"cumulative", func() { m.CuTokensAcrossSPTo(cu, sp) }},
			{"writefloat", func() {
				for i, data := 0, cu.RawVector().Data; i < len(data); i++ {
					data[i] = float64(i)
				}
			}},
		} {
			b.Run(fmt.Sprintf("op=%s/sp=%d", op.name, sp), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					op.f()
				}
			})
		}
	}
}

func BenchmarkDispatch(b *testing.B) {
	for _, loras := range []int{0, 4} {
		cfg := fwd.DispatcherConfig{
			Mode: fwd.GraphFullAndPiecewise, CaptureSizes: fwd.DefaultCaptureSizes(512), MaxNumSeqs: 256,
		}
		if loras > 0 {
			cfg.LoRA = &fwd.LoRAConfig{MaxLoRAs: loras, SpecializeCount: true}
		}
		d, err := fwd.NewDispatcher(cfg)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("by=fwd/loras=%d", loras), func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n = (n + 37) % 500
				query := fwd.DispatchQuery{NumTokens: n, UniformDecode: n&1 == 0, NumActiveLoRAs: loras}
				_, batch, _ := d.Dispatch(query)
				sinkInt = batch.NumTokens
			}
		})
		// One look-up in a map of all keys, once the batch is padded.
		keys := map[fwd.BatchDescriptor]fwd.GraphMode{}
		for _, c := range d.Captures() {
			keys[c.Batch] = c.Mode
		}
		b.Run(fmt.Sprintf("by=map/loras=%d", loras), func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n = (n + 37) % 500
				padded := (n + 7) / 8 * 8
				sinkInt = int(keys[fwd.BatchDescriptor{NumTokens: padded, HasLoRA: loras > 0, NumActiveLoRAs: loras}])
			}
		})
	}
}

func BenchmarkSplitUBatches(b *testing.B) {
	for _, requests := range []int{8, 64, 512, 4096} {
		scheduled := make([]int, requests)
		total := 0
		for i := range scheduled {
			scheduled[i] = 1 + i%7
			total += scheduled[i]
		}
		b.Run(fmt.Sprintf("by=fwd/requests=%d", requests), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := fwd.SplitUBatches(scheduled, total, requests, 2, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("by=sum/requests=%d", requests), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				sum := 0
				for _, n := range scheduled {
					sum += n
				}
				sinkInt = sum
			}
		})
	}
}

func BenchmarkAgree(b *testing.B) {
	for _, ranks := range []int{2, 8, 64, 1024} {
		votes := make([]fwd.Vote, ranks)
		for i := range votes {
			votes[i] = fwd.Vote{Step: 1, NumTokens: i, NumTokensPadded: i + 1, UBatch: true, GraphMode: fwd.GraphFull}
		}
		b.Run(fmt.Sprintf("ranks=%d", ranks), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := fwd.Agree(votes, 2); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkExchange is one round of all ranks, beside an all-gather in which each rank sends its
// vote to every other over buffered channels, without steps, contexts and errors. It counts rounds
// by b.N, since all ranks must run the same number.
func BenchmarkExchange(b *testing.B) {
	for _, ranks := range []int{2, 4, 8} {
		b.Run(fmt.Sprintf("by=fwd/ranks=%d", ranks), func(b *testing.B) {
			group, err := fwd.NewLocalGroup(ranks)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			exchangeRounds(b, group, 1, b.N)
		})
		b.Run(fmt.Sprintf("by=channels/ranks=%d", ranks), func(b *testing.B) {
			b.ReportAllocs()
			gatherRounds(ranks, b.N)
		})
	}
}

// gatherRounds runs all-gathers over one channel for each pair of ranks, so that rounds do not mix.
func gatherRounds(ranks, rounds int) {
	pairs := make([][]chan fwd.Vote, ranks) // by receiver, then sender
	for to := range pairs {
		for range ranks {
			pairs[to] = append(pairs[to], make(chan fwd.Vote, 1))
		}
	}
	var wg sync.WaitGroup
	for rank := range ranks {
		wg.Go(func() {
			var votes []fwd.Vote
			for step := range rounds {
				v := fwd.Vote{Step: uint64(step), NumTokens: rank, NumTokensPadded: rank}
				for to := range pairs {
					if to != rank {
						pairs[to][rank] <- v
					}
				}
				votes = make([]fwd.Vote, ranks)
				votes[rank] = v
				for from, c := range pairs[rank] {
					if from != rank {
						votes[from] = <-c
					}
				}
			}
			if rank == 0 {
				sinkVotes = votes
			}
		})
	}
	wg.Wait()
}
