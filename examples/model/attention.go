package model

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"
)

// AttnMeta is the attention metadata of one pass, or of one microbatch of it: which rows belong together, and where their
// past lies. Rows of no sequence are padding; they attend to nothing.
type AttnMeta struct {
	Positions []int // of each row in its sequence, so also the number of tokens before it
	Adapters  []int // LoRA adapter of each row, or NoAdapter; nil: no row has one
	Seqs      []SeqMeta
}

// NoAdapter stands for the model as it is.
const NoAdapter = 0

// SeqMeta is one request's part of a batch.
type SeqMeta struct {
	Rows       fwd.Range // consecutive rows with consecutive positions
	BlockTable []int     // the blocks of the KV cache that hold the sequence, in order
}

// NoSlot in a slot mapping means that the row's keys and values are kept nowhere: padding.
const NoSlot = -1

// KVCache holds keys and values of one attention layer on one rank, in blocks of BlockSize slots: token p of a sequence lies
// in slot BlockTable[p/BlockSize]·BlockSize + p%BlockSize. Blocks of one sequence need not be neighbours, so memory is handed
// out a block at a time and no sequence has to know beforehand how long it gets.
type KVCache struct {
	BlockSize int
	Keys      *mat.Dense // slots × width
	Values    *mat.Dense
}

// NewKVCache returns a cache of blocks times blockSize slots.
func NewKVCache(c Config, blocks, blockSize int) *KVCache {
	return &KVCache{
		BlockSize: blockSize,
		Keys:      mat.NewDense(blocks*blockSize, c.Width, nil),
		Values:    mat.NewDense(blocks*blockSize, c.Width, nil),
	}
}

func (c *KVCache) slot(blockTable []int, position int) int {
	return blockTable[position/c.BlockSize]*c.BlockSize + position%c.BlockSize
}

// Attention is causal multi-head attention with rotary positions over a paged KV cache.
type Attention struct {
	Name       string
	Heads      int
	Q, K, V, O projection
	freqs      []float64 // rotary frequency of each pair of dimensions of a head
}

func newAttention(name string, c Config, w *LayerWeights) *Attention {
	a := &Attention{Name: name, Heads: c.Heads, Q: projection{weight: w.Q}, K: projection{weight: w.K}, V: projection{weight: w.V}, O: projection{weight: w.O}}
	for i := range w.Adapters {
		u := &w.Adapters[i]
		a.Q.updates, a.K.updates = append(a.Q.updates, u.Q), append(a.K.updates, u.K)
		a.V.updates, a.O.updates = append(a.V.updates, u.V), append(a.O.updates, u.O)
	}
	for i := range c.headDim() / 2 {
		a.freqs = append(a.freqs, math.Pow(ropeBase, -2*float64(i)/float64(c.headDim())))
	}
	return a
}

// Forward lets each row of x attend to its own sequence up to itself. Keys and values of the new rows are written to the KV
// cache first and then read from it like those of earlier steps, so prefill, chunked prefill and decode are one case.
func (a *Attention) Forward(ctx context.Context, x *mat.Dense) (*mat.Dense, error) {
	rows, width := x.Dims()
	out := mat.NewDense(rows, width, nil)

	meta, err := fwd.AttnMetadata[*AttnMeta](ctx, a.Name)
	if errors.Is(err, fwd.ErrNoMetadata) {
		return out, nil // a dummy pass: no row belongs to a request
	}
	if err != nil {
		return nil, err
	}
	slots, err := fwd.SlotMapping[[]int](ctx, a.Name)
	if err != nil {
		return nil, err
	}
	cache, err := fwd.Layer[*KVCache](ctx, a.Name)
	if err != nil {
		return nil, err
	}
	if len(slots) != rows || len(meta.Positions) != rows {
		return nil, fmt.Errorf("model: %s: %d rows with %d slots and %d positions", a.Name, rows, len(slots), len(meta.Positions))
	}

	var q, k, v mat.Dense
	a.Q.forward(&q, x, meta.Adapters)
	a.K.forward(&k, x, meta.Adapters)
	a.V.forward(&v, x, meta.Adapters)
	a.rotate(&q, meta.Positions)
	a.rotate(&k, meta.Positions)
	for i, slot := range slots {
		if slot != NoSlot {
			cache.Keys.SetRow(slot, k.RawRowView(i))
			cache.Values.SetRow(slot, v.RawRowView(i))
		}
	}

	attended := mat.NewDense(rows, width, nil)
	var scores []float64
	for _, seq := range meta.Seqs {
		for i := seq.Rows.Start; i < seq.Rows.Stop; i++ {
			scores = a.attend(attended.RawRowView(i), q.RawRowView(i), cache, seq.BlockTable, meta.Positions[i], scores)
		}
	}
	a.O.forward(out, attended, meta.Adapters)
	return out, nil
}

// attend adds to dst the values of positions 0 to position, weighted by the softmax of their keys' products with q. It
// returns scores for the next call to use again.
func (a *Attention) attend(dst, q []float64, cache *KVCache, blockTable []int, position int, scores []float64) []float64 {
	dim := len(q) / a.Heads
	for h := range a.Heads {
		lo, hi := h*dim, (h+1)*dim
		scores = scores[:0]
		for p := range position + 1 {
			key := cache.Keys.RawRowView(cache.slot(blockTable, p))[lo:hi]
			scores = append(scores, floats.Dot(q[lo:hi], key)/math.Sqrt(float64(dim)))
		}
		softmax(scores)
		for p, weight := range scores {
			floats.AddScaled(dst[lo:hi], weight, cache.Values.RawRowView(cache.slot(blockTable, p))[lo:hi])
		}
	}
	return scores
}

// rotate turns pair (i, i+dim/2) of every head of row r by positions[r]·freqs[i] (Su et al., "RoFormer", 2021), so that the
// product of a query and a key depends on how far they are apart.
func (a *Attention) rotate(x *mat.Dense, positions []int) {
	half := len(a.freqs)
	for r, position := range positions {
		row := x.RawRowView(r)
		for i, freq := range a.freqs {
			sin, cos := math.Sincos(float64(position) * freq)
			for h := range a.Heads {
				lo := h*2*half + i
				first, second := row[lo], row[lo+half]
				row[lo] = first*cos - second*sin
				row[lo+half] = second*cos + first*sin
			}
		}
	}
}

// softmax replaces x by exp(x)/sum(exp(x)); taking the maximum away first keeps exp from overflowing.
func softmax(x []float64) {
	top := floats.Max(x)
	var sum float64
	for i, v := range x {
		x[i] = math.Exp(v - top)
		sum += x[i]
	}
	floats.Scale(1/sum, x)
}
