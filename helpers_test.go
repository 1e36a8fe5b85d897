// This file has the helpers that several test files share.

package fwd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// readVectors reads a file of cases whose expected values the reference system computed. It checks how
// many there are: a file that lost its cases would pass everything.
func readVectors[T any](t *testing.T, name string, want int) []T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	if err != nil {
		t.Fatal(err)
	}
	var cases []T
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if len(cases) != want {
		t.Fatalf("%s has %d cases, want %d", name, len(cases), want)
	}
	return cases
}

// nothing is a model without layers.
func nothing(context.Context) error { return nil }

// vec returns a vector of counts.
func vec(counts ...int) *mat.VecDense {
	v := mat.NewVecDense(len(counts), nil)
	for i, n := range counts {
		v.SetVec(i, float64(n))
	}
	return v
}

// counts returns the elements of a vector of whole numbers.
func counts(v *mat.VecDense) []int {
	c := make([]int, v.Len())
	for i := range c {
		c[i] = int(v.AtVec(i))
	}
	return c
}

// dpMetadata makes the metadata of a rank among ranks with these tokens.
func dpMetadata(t *testing.T, rank int, tokens ...int) *fwd.DPMetadata {
	t.Helper()
	parallel := fwd.ParallelConfig{DataParallelSize: len(tokens), DataParallelRank: rank}
	m, err := fwd.NewDPMetadata(parallel, tokens[rank], vec(tokens...))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func dpNoSizes(t *testing.T, where string, ctx context.Context) {
	t.Helper()
	if sizes, ok := fwd.LocalSizes(ctx); ok || sizes != nil {
		t.Errorf("%s: local sizes %v, %t; want none", where, sizes, ok)
	}
}

// vectorBatch is a descriptor as the vector files write it; a null num_reqs is any number.
type vectorBatch struct {
	NumTokens      int  `json:"num_tokens"`
	NumReqs        *int `json:"num_reqs"`
	Uniform        bool `json:"uniform"`
	HasLoRA        bool `json:"has_lora"`
	NumActiveLoRAs int  `json:"num_active_loras"`
}

func (b vectorBatch) descriptor() fwd.BatchDescriptor {
	d := fwd.BatchDescriptor{
		NumTokens: b.NumTokens, Uniform: b.Uniform, HasLoRA: b.HasLoRA, NumActiveLoRAs: b.NumActiveLoRAs,
	}
	if b.NumReqs != nil {
		d.NumReqs = *b.NumReqs
	}
	return d
}

// captureFunc is the capture function of a graph cache.
type captureFunc = func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error)

func cacheNew(
	t *testing.T, mode fwd.GraphMode, forward fwd.ForwardFunc, capture captureFunc,
) *fwd.GraphCache {
	t.Helper()
	c, err := fwd.NewGraphCache(mode, forward, capture)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func planDispatcher(t *testing.T, cfg fwd.DispatcherConfig) *fwd.Dispatcher {
	t.Helper()
	d, err := fwd.NewDispatcher(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// planMixed configures full graphs for up to 8 decode requests of q tokens, and piecewise graphs for
// others.
func planMixed(q int) fwd.DispatcherConfig {
	sizes := []int{1, 2, 4, 8, 16}
	for i := range sizes {
		sizes[i] *= q
	}
	return fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: sizes, MaxNumSeqs: 8, UniformDecodeQueryLen: q,
	}
}

// planSlices are slices by their bounds: requests, tokens.
func planSlices(bounds ...[4]int) []fwd.UBatchSlice {
	var s []fwd.UBatchSlice
	for _, b := range bounds {
		s = append(s, fwd.UBatchSlice{
			Requests: fwd.Range{Start: b[0], Stop: b[1]}, Tokens: fwd.Range{Start: b[2], Stop: b[3]},
		})
	}
	return s
}

// groupTap is a coordinator that keeps what passed through it. It hides what else the coordinator has.
type groupTap struct {
	fwd.Coordinator
	exchanges int
	sent      fwd.Vote
	votes     []fwd.Vote
}

func (c *groupTap) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	c.exchanges++
	c.sent = v
	votes, err := c.Coordinator.Exchange(ctx, v)
	c.votes = votes
	return votes, err
}

func localGroup(t *testing.T, size int) []fwd.Coordinator {
	t.Helper()
	group, err := fwd.NewLocalGroup(size)
	if err != nil {
		t.Fatal(err)
	}
	return group
}

func groupRunner(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) *fwd.Runner {
	t.Helper()
	cfg := fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: c.Size(), DataParallelRank: c.Rank()}}
	r, err := fwd.New(cfg, append([]fwd.Option{fwd.WithCoordinator(c)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// groupFake is a coordinator that answers by itself.
type groupFake struct {
	rank, size int
	exchange   func(fwd.Vote) ([]fwd.Vote, error)
}

func (c *groupFake) Rank() int { return c.rank }

func (c *groupFake) Size() int { return c.size }

func (c *groupFake) Exchange(_ context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return c.exchange(v)
}

// groupAgreement compares agreements, whose vectors go-cmp can't see into.
var groupAgreement = cmp.Comparer(func(a, b *mat.VecDense) bool {
	if a == nil || b == nil {
		return a == b
	}
	return mat.Equal(a, b)
})

// settleGoroutines waits for goroutines that are ending, and checks that then there are no more than
// before.
func settleGoroutines(t *testing.T, before int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			buf = buf[:runtime.Stack(buf, true)]
			t.Fatalf("%d goroutines, want at most %d:\n%s", runtime.NumGoroutine(), before, buf)
		}
	}
}

// ubatchPass is a pass of n microbatches with 4 tokens each, the last one less two tokens of
// padding.
func ubatchPass(n int) fwd.Pass {
	p := fwd.Pass{NumTokens: 4 * n, NumTokensUnpadded: 4*n - 2, NumReqs: n}
	for i := range n {
		p.UBatches = append(p.UBatches, planSlices([4]int{i, i + 1, 4 * i, 4 * (i + 1)})...)
		attn := map[string]any{"attn": fmt.Sprint("attn ", i), "": fmt.Sprint("any ", i)}
		p.AttnMetadata = append(p.AttnMetadata, attn)
		p.SlotMapping = append(p.SlotMapping, map[string]any{"attn": i})
	}
	return p
}

// providers returns options of Runners whose telemetry nobody records. The key "global" has no providers:
// its Runners use the global ones.
func providers() map[string][]fwd.Option {
	return map[string][]fwd.Option{
		"noop": {
			fwd.WithTracerProvider(tracenoop.NewTracerProvider()),
			fwd.WithMeterProvider(metricnoop.NewMeterProvider()),
		},
		"global": nil,
	}
}

// decodePass is a pass with everything that a rank without a group can set.
func decodePass() fwd.Pass {
	maps := []map[string]any{{"": 1}}
	return fwd.Pass{
		NumTokens: 16, NumTokensUnpadded: 13, NumTokensGraph: 16, NumReqs: 13,
		AttnMetadata: maps, SlotMapping: maps, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact,
		Batch: fwd.BatchDescriptor{NumTokens: 16, NumReqs: 16, Uniform: true},
	}
}

// exchangeRounds runs that many steps of a group, with all ranks concurrently. The first is step
// from.
func exchangeRounds(tb testing.TB, group []fwd.Coordinator, from, rounds int) {
	var wg sync.WaitGroup
	for rank, c := range group {
		wg.Go(func() {
			for step := from; step < from+rounds; step++ {
				vote := fwd.Vote{Step: uint64(step), NumTokens: rank, NumTokensPadded: rank}
				if _, err := c.Exchange(context.Background(), vote); err != nil {
					tb.Errorf("rank %d, step %d: %v", rank, step, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// splitPass returns a pass of requests with one token each, tokens in all, in n microbatches.
func splitPass(tokens, n int) fwd.Pass {
	pass := fwd.Pass{NumTokens: tokens}
	for i := range n {
		if n > 1 {
			part := fwd.Range{Start: i * tokens / n, Stop: (i + 1) * tokens / n}
			pass.UBatches = append(pass.UBatches, fwd.UBatchSlice{Requests: part, Tokens: part})
		}
	}
	return pass
}
