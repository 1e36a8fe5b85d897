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

// AttnMeta is the attention metadata of one pass, or of one microbatch of it: which rows belong
// together, and where their past lies. Rows of no sequence are padding; they attend to nothing.
type AttnMeta struct {
	Positions      []int // of each row in its sequence, so also the number of tokens before it
	Adapters       []int // LoRA adapter of each row, or NoAdapter; nil: no row has one
	ActiveAdapters int   // different ones
	Seqs           []SeqMeta

	// The order of the microbatches of a pass in this layer; nil: there is none before, or after. A
	// request that the split has cut has rows in both, and the later ones attend to keys and values of
	// the earlier ones.
	After   <-chan struct{} // closed once those of the microbatch before are in the cache
	Written chan<- struct{} // closed once those of this one are
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

// KVCache holds keys and values of one attention layer on one rank, in blocks of BlockSize slots:
// token p of a sequence lies in slot BlockTable[p/BlockSize]·BlockSize + p%BlockSize. Blocks of one
// sequence need not be neighbours, so memory is handed out a block at a time and no sequence has to
// know beforehand how long it gets.
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
	a := &Attention{
		Name:  name,
		Heads: c.Heads,
		Q:     projection{weight: w.Q},
		K:     projection{weight: w.K},
		V:     projection{weight: w.V},
		O:     projection{weight: w.O},
	}
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

// attnInputs are what attention must know about a batch.
type attnInputs struct {
	meta  *AttnMeta
	slots []int
	cache *KVCache
}

// inputs returns what the forward context says about the batch. A dummy pass has no metadata: no
// row belongs to a request.
func (a *Attention) inputs(ctx context.Context, rows int) (in attnInputs, dummy bool, err error) {
	in.cache, err = fwd.Layer[*KVCache](ctx, a.Name)
	if err != nil {
		return in, false, err
	}
	in.meta, err = fwd.AttnMetadata[*AttnMeta](ctx, a.Name)
	if errors.Is(err, fwd.ErrNoMetadata) {
		return in, true, nil
	}
	if err != nil {
		return in, false, err
	}
	in.slots, err = fwd.SlotMapping[[]int](ctx, a.Name)
	if err != nil {
		return in, false, err
	}
	if len(in.slots) != rows || len(in.meta.Positions) != rows {
		return in, false, fmt.Errorf("model: %s: %d rows with %d slots and %d positions", a.Name, rows,
			len(in.slots), len(in.meta.Positions))
	}
	scheduled := 0
	for _, s := range in.meta.Seqs {
		if s.Rows.Len() < 1 {
			return in, false, fmt.Errorf("model: %s: a request with rows [%d, %d)", a.Name, s.Rows.Start, s.Rows.Stop)
		}
		scheduled += s.Rows.Len()
	}
	if n := fwd.MustFromContext(ctx).NumTokensUnpadded; n != scheduled {
		return in, false, fmt.Errorf("model: %s: %d rows of requests in a pass with %d tokens without padding",
			a.Name, scheduled, n)
	}
	return in, false, nil
}

// Forward stores in t.attended what each row sees of its own sequence, up to itself. Keys and
// values of the new rows are written to the KV cache first and then read from it like those of
// earlier steps, so prefill, chunked prefill and decode are one case.
func (a *Attention) Forward(ctx context.Context, t *activations) error {
	rows, _ := t.q.Dims()
	in, dummy, err := a.inputs(ctx, rows)
	if err != nil {
		return err
	}
	t.attended.Zero()
	if dummy {
		return nil
	}
	if in.meta.After != nil {
		select {
		case <-in.meta.After:
		case <-ctx.Done():
			return fmt.Errorf("model: %s: waiting for the microbatch before: %w", a.Name, context.Cause(ctx))
		}
	}
	a.write(&in, t)
	if in.meta.Written != nil {
		close(in.meta.Written)
	}
	a.read(&in, t, nil)
	return nil
}

// write turns queries and keys by their positions, and puts keys and values into the KV cache.
func (a *Attention) write(in *attnInputs, t *activations) {
	a.rotate(t.q, in.meta.Positions)
	a.rotate(t.k, in.meta.Positions)
	for i, slot := range in.slots {
		if slot != NoSlot {
			in.cache.Keys.SetRow(slot, t.k.RawRowView(i))
			in.cache.Values.SetRow(slot, t.v.RawRowView(i))
		}
	}
}

// read lets the rows of every sequence attend. It returns scores for the next call to use again.
func (a *Attention) read(in *attnInputs, t *activations, scores []float64) []float64 {
	for _, seq := range in.meta.Seqs {
		for i := seq.Rows.Start; i < seq.Rows.Stop; i++ {
			scores = a.attend(t.attended.RawRowView(i), t.q.RawRowView(i), in.cache, seq.BlockTable,
				in.meta.Positions[i], scores)
		}
	}
	return scores
}

// attnPlan is attention laid out for a full graph, with buffers for what it must know about a
// batch.
type attnPlan struct {
	attn   *Attention
	key    fwd.BatchDescriptor
	in     attnInputs
	scores []float64
}

func (a *Attention) plan(ctx context.Context, key fwd.BatchDescriptor) (*attnPlan, error) {
	cache, err := fwd.Layer[*KVCache](ctx, a.Name)
	if err != nil {
		return nil, err
	}
	meta := &AttnMeta{Positions: make([]int, key.NumTokens)}
	return &attnPlan{attn: a, key: key, in: attnInputs{meta, make([]int, key.NumTokens), cache}}, nil
}

// load copies what the forward context says about the batch into the plan's buffers.
func (p *attnPlan) load(ctx context.Context) error {
	in, dummy, err := p.attn.inputs(ctx, p.key.NumTokens)
	if err != nil {
		return err
	}
	meta := p.in.meta
	if dummy {
		meta.Seqs = meta.Seqs[:0]
		clear(meta.Positions)
		for i := range p.in.slots {
			p.in.slots[i] = NoSlot
		}
		return nil
	}
	if p.key.Uniform {
		for i, s := range in.meta.Seqs {
			if i == p.key.NumReqs || s.Rows.Len() != p.key.NumTokens/p.key.NumReqs {
				return fmt.Errorf(
					"model: %s: request %d of %d has %d tokens, in a graph for %d requests of %d tokens each",
					p.attn.Name,
					i,
					len(in.meta.Seqs),
					s.Rows.Len(),
					p.key.NumReqs,
					p.key.NumTokens/p.key.NumReqs,
				)
			}
		}
	}
	copy(meta.Positions, in.meta.Positions)
	copy(p.in.slots, in.slots)
	meta.Seqs = append(meta.Seqs[:0], in.meta.Seqs...)
	return nil
}

func (p *attnPlan) run(t *activations) {
	t.attended.Zero()
	p.attn.write(&p.in, t)
	p.scores = p.attn.read(&p.in, t, p.scores)
}

// attend adds to dst the values of positions 0 to position, weighted by the softmax of their keys'
// products with q. It returns scores for the next call to use again.
func (a *Attention) attend(
	dst, q []float64,
	cache *KVCache,
	blockTable []int,
	position int,
	scores []float64,
) []float64 {
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

// rotate turns pair (i, i+dim/2) of every head of row r by positions[r]·freqs[i] (Su et al.,
// "RoFormer", 2021), so that the product of a query and a key depends on how far they are apart.
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

// softmax replaces x by exp(x)/sum(exp(x)); taking the maximum away first keeps exp from
// overflowing.
func softmax(x []float64) {
	top := floats.Max(x)
	var sum float64
	for i, v := range x {
		x[i] = math.Exp(v - top)
		sum += x[i]
	}
	floats.Scale(1/sum, x)
}
