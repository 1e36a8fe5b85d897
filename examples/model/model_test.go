// Passes without graphs, against the reference.

package model

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/mat"
)

// alone exchanges rows with nobody.
type alone struct{}

func (alone) Dispatch(_ context.Context, _ Place, _ []int, rows Routed) ([]Routed, error) {
	return []Routed{rows}, nil
}

func (alone) Combine(_ context.Context, _ Place, _ []int, parts []*mat.Dense) ([]*mat.Dense, error) {
	return parts, nil
}

const blockSize = 4

// newTest returns a model of one rank, with layer objects for passes over it.
func newTest(t testing.TB, chunk int) (*Model, map[string]any) {
	t.Helper()
	w, err := NewWeights(
		Config{Layers: 2, Width: 16, Heads: 2, Experts: 4, ExpertWidth: 8, Vocab: 50, Adapters: 2, Seed: 3},
	)
	if err != nil {
		t.Fatal(err)
	}
	layers := map[string]any{}
	for l := range w.Layers {
		layers[AttentionName(l)] = NewKVCache(w.Config, 16, blockSize)
		layers[MoEName(l)] = &Workers{MaxChunk: chunk, Experts: []*Experts{NewExperts(&w.Layers[l], 0, 1, alone{})}}
	}
	return New(w), layers
}

// pass returns the context of a pass in which one sequence, whose blocks are scattered, has rows
// for positions first to first+count-1, and padding rows follow.
func pass(layers map[string]any, adapter, first, count, padding int) context.Context {
	table := []int{9, 2, 14, 0, 7}
	meta := &AttnMeta{
		Positions: make([]int, count+padding),
		Seqs:      []SeqMeta{{Rows: fwd.Range{Start: 0, Stop: count}, BlockTable: table}},
	}
	slots := make([]int, count+padding)
	for i := range slots {
		slots[i] = NoSlot
		if i < count {
			p := first + i
			meta.Positions[i], slots[i] = p, table[p/blockSize]*blockSize+p%blockSize
		}
	}
	if adapter != NoAdapter {
		meta.Adapters = append(slices.Repeat([]int{adapter}, count), make([]int, padding)...)
	}
	return fwd.NewContext(context.Background(), &fwd.ForwardContext{
		Layers:       layers,
		AttnMetadata: []map[string]any{{"": meta}},
		SlotMapping:  []map[string]any{{"": slots}},
		NumTokens:    count + padding, NumTokensUnpadded: count,
	})
}

// TestForward: however a sequence is cut into passes, padded and chunked, the last hidden state is
// that of the reference.
func TestForward(t *testing.T) {
	prompt := []int{7, 7, 49, 0, 12, 33, 5, 21, 8, 1, 40}
	for _, c := range []struct {
		name                    string
		parts                   []int
		padding, chunk, adapter int
	}{
		{"at once", []int{11}, 0, 100, 0},
		{"token by token", []int{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 0, 100, 0},
		{"chunked prefill", []int{4, 6, 1}, 0, 100, 0},
		{"padded", []int{5, 6}, 3, 100, 0},
		{"experts by rows", []int{5, 6}, 2, 1, 0},
		{"experts by three", []int{11}, 2, 3, 0},
		{"an adapter", []int{5, 6}, 2, 3, 1},
		{"another adapter", []int{5, 6}, 2, 3, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, layers := newTest(t, c.chunk)
			_, want, err := Generate(t.Context(), m.Weights(), c.adapter, prompt, 1)
			if err != nil {
				t.Fatal(err)
			}
			var got []float64
			first := 0
			for _, n := range c.parts {
				tokens := append(append([]int(nil), prompt[first:first+n]...), make([]int, c.padding)...)
				hidden, err := m.Forward(pass(layers, c.adapter, first, n, c.padding), tokens)
				if err != nil {
					t.Fatal(err)
				}
				got = m.Logits(hidden.Slice(n-1, n, 0, 16).(*mat.Dense)).RawRowView(0)
				first += n
			}
			for i := range want {
				if math.Abs(got[i]-want[i]) > 1e-12 {
					t.Fatalf("logit %d is %v, alone %v", i, got[i], want[i])
				}
			}
		})
	}
}

// TestDummyPass: without metadata there is nothing to attend to, and nothing is written, but the
// pass goes through.
func TestDummyPass(t *testing.T) {
	m, layers := newTest(t, 2)
	ctx := fwd.NewContext(context.Background(), &fwd.ForwardContext{Layers: layers, NumTokens: 3, Dummy: true})
	if _, err := m.Forward(ctx, make([]int, 3)); err != nil {
		t.Fatal(err)
	}
	if cache := layers[AttentionName(0)].(*KVCache); mat.Norm(cache.Keys, 1) != 0 {
		t.Error("a dummy pass wrote to the KV cache")
	}
}

func TestForwardErrors(t *testing.T) {
	m, layers := newTest(t, 2)
	without := func(name string) map[string]any {
		some := map[string]any{}
		for k, v := range layers {
			if k != name {
				some[k] = v
			}
		}
		return some
	}
	unequal, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: 2}, 2,
		mat.NewVecDense(2, []float64{2, 4}))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		ctx    context.Context
		tokens []int
		is     error
		want   string
	}{
		{"no forward context", context.Background(), []int{1}, fwd.ErrNoForwardContext, ""},
		{"no cache", pass(without(AttentionName(1)), 0, 0, 2, 0), []int{1, 2}, fwd.ErrLayer, "layers.1.attn"},
		{"no experts", pass(without(MoEName(0)), 0, 0, 2, 0), []int{1, 2}, fwd.ErrLayer, "layers.0.moe"},
		{"fewer tokens than slots", pass(layers, 0, 0, 3, 0), []int{1, 2}, nil,
			"layers.0.attn: 2 rows with 3 slots and 3 positions"},
		{"unknown token", pass(layers, 0, 0, 2, 0), []int{1, 50}, nil,
			"token 50 in row 1 is not in the vocabulary of 50"},
		{"no tokens", pass(layers, 0, 0, 0, 0), nil, nil, "without tokens"},
		{"more rows than the pass has",
			fwd.NewContext(context.Background(), &fwd.ForwardContext{Layers: layers, NumTokens: 3}), []int{1, 2}, nil,
			"layers.0.moe: 2 rows for 1 workers of 3 rows each"},
		{"a graph for unequal ranks",
			fwd.NewContext(context.Background(),
				&fwd.ForwardContext{Layers: layers, NumTokens: 2, DP: unequal, GraphMode: fwd.GraphPiecewise}),
			[]int{1, 2}, nil, "layers.0.moe: graph mode PIECEWISE with unequal local sizes [2 4]"},
	} {
		_, err := m.Forward(c.ctx, c.tokens)
		if err == nil || (c.is != nil && !errors.Is(err, c.is)) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %v with %q", c.name, err, c.is, c.want)
		}
	}
}

// TestExpertShares: every expert has one home, however many workers there are.
func TestExpertShares(t *testing.T) {
	w, err := NewWeights(DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	for workers := 1; workers <= 20; workers++ {
		next := 0
		for worker := range workers {
			e := NewExperts(&w.Layers[0], worker, workers, alone{})
			if e.First != next {
				t.Errorf("%d workers: worker %d starts with expert %d, want %d", workers, worker, e.First, next)
			}
			next += len(e.Local)
		}
		if next != w.Config.Experts {
			t.Errorf("%d workers hold %d experts, want %d", workers, next, w.Config.Experts)
		}
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Layers = 0 }, "layers is 0, want at least 1"},
		{func(c *Config) { c.Experts = 1 }, "experts is 1, want at least 2"},
		{func(c *Config) { c.Heads = -1 }, "heads is -1"},
		{func(c *Config) { c.Width = 30 }, "width 30 is no multiple of 2·2"},
		{func(c *Config) { c.Vocab = 0 }, "vocabulary is 0"},
		{func(c *Config) { c.ExpertWidth = 0 }, "expert width is 0"},
		{func(c *Config) { c.Adapters = -1 }, "adapters is -1, want at least 0"},
	} {
		cfg := DefaultConfig()
		c.change(&cfg)
		if _, err := NewWeights(cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want an error with %q", cfg, err, c.want)
		}
	}
}

// TestAdaptersDiffer: adapters change the answer, each in its own way, and leave the model without
// them as it is.
func TestAdaptersDiffer(t *testing.T) {
	config := DefaultConfig()
	plain, err := NewWeights(config)
	if err != nil {
		t.Fatal(err)
	}
	config.Adapters = 2
	adapted, err := NewWeights(config)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(w *Weights, adapter int) []int {
		tokens, _, err := Generate(t.Context(), w, adapter, []int{1, 2, 3, 4, 5}, 20)
		if err != nil {
			t.Fatal(err)
		}
		return tokens
	}
	none, one, two := answer(adapted, NoAdapter), answer(adapted, 1), answer(adapted, 2)
	if !slices.Equal(answer(plain, NoAdapter), none) || slices.Equal(none, one) || slices.Equal(none, two) ||
		slices.Equal(one, two) {
		t.Errorf("answers %v without adapter, %v and %v with one", none, one, two)
	}
}

func TestGenerateEnds(t *testing.T) {
	m, _ := newTest(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := Generate(ctx, m.Weights(), NoAdapter, []int{1}, 1000); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}
