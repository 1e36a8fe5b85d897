// Package model is a decoder-only mixture-of-experts language model, written the way that models are written on fwd.
//
// A layer takes a context and its input tensor, one token per row, and returns its output tensor. Whatever else it needs to
// know about the forward pass comes out of the context through fwd: [Attention] reads which rows belong to which request
// (fwd.AttnMetadata), where in the KV cache new keys and values go (fwd.SlotMapping) and the cache itself (fwd.Layer); [MoE]
// reads its workers' experts (fwd.Layer) and the rows that each worker brings (fwd.Chunks, fwd.LocalSizes). So no layer
// passes anything on for another, and the layers in between ([Model], [Layer]) know nothing of batching, paging or ranks.
//
// The file reference.go computes the same model for one request by plain loops and knows nothing of all this. It is what the
// engine's answers are checked against.
package model

import (
	"context"
	"errors"
	"fmt"
	"math"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"
)

// Model is the decoder: token embedding, layers, final norm, and the head that turns hidden states into logits. It holds
// weights only and serves any number of passes at once.
type Model struct {
	weights *Weights
	layers  []*Layer
}

// New builds a model on weights.
func New(w *Weights) *Model {
	m := &Model{weights: w}
	for i := range w.Layers {
		m.layers = append(m.layers, newLayer(i, w))
	}
	return m
}

// Weights returns the weights that m was built on.
func (m *Model) Weights() *Weights { return m.weights }

// Forward returns the hidden state of every token. Tokens are rows of a batch: several requests, one after the other, then
// padding; the context says which is which.
func (m *Model) Forward(ctx context.Context, tokens []int) (*mat.Dense, error) {
	h, err := m.embed(tokens)
	if err != nil {
		return nil, err
	}
	for _, l := range m.layers {
		if h, err = l.Forward(ctx, h); err != nil {
			return nil, err
		}
	}
	return rmsNorm(like(h), h, m.weights.FinalNorm), nil
}

// Logits returns the scores of each possible next token for rows of hidden states. An engine asks for the last row of each
// request only: nobody samples from the others.
func (m *Model) Logits(hidden *mat.Dense) *mat.Dense {
	var logits mat.Dense
	logits.Mul(hidden, m.weights.Head)
	return &logits
}

func (m *Model) embed(tokens []int) (*mat.Dense, error) {
	if len(tokens) == 0 {
		return nil, errors.New("model: a pass without tokens")
	}
	h := mat.NewDense(len(tokens), m.weights.Config.Width, nil)
	for i, t := range tokens {
		if t < 0 || t >= m.weights.Config.Vocab {
			return nil, fmt.Errorf("model: token %d in row %d is not in the vocabulary of %d", t, i, m.weights.Config.Vocab)
		}
		h.SetRow(i, m.weights.Embedding.RawRowView(t))
	}
	return h, nil
}

// Layer is one decoder layer: attention and a mixture of experts, each behind a norm and beside a residual connection.
type Layer struct {
	attnNorm, moeNorm []float64
	attn              *Attention
	moe               *MoE
}

func newLayer(i int, w *Weights) *Layer {
	lw := &w.Layers[i]
	return &Layer{
		attnNorm: lw.AttnNorm,
		moeNorm:  lw.MoENorm,
		attn:     newAttention(AttentionName(i), w.Config, lw),
		moe:      &MoE{Name: MoEName(i), Router: lw.Router},
	}
}

// AttentionName returns the name under which the attention of a layer finds its metadata, slot mapping and KV cache.
func AttentionName(layer int) string { return fmt.Sprintf("layers.%d.attn", layer) }

// MoEName returns the name under which the mixture of experts of a layer finds this worker's experts.
func MoEName(layer int) string { return fmt.Sprintf("layers.%d.moe", layer) }

// Forward returns x after the layer, in a new matrix.
func (l *Layer) Forward(ctx context.Context, x *mat.Dense) (*mat.Dense, error) {
	attended, err := l.attn.Forward(ctx, rmsNorm(like(x), x, l.attnNorm))
	if err != nil {
		return nil, err
	}
	attended.Add(attended, x)
	rows, _ := attended.Dims()
	moe, err := l.moe.plan(ctx, rows)
	if err != nil {
		return nil, err
	}
	rmsNorm(moe.in, attended, l.moeNorm)
	if err := moe.run(ctx); err != nil {
		return nil, err
	}
	attended.Add(attended, moe.out)
	return attended, nil
}

// rmsNorm stores in dst each row of x divided by its root mean square and multiplied by weight, and returns dst.
func rmsNorm(dst, x *mat.Dense, weight []float64) *mat.Dense {
	rows, cols := x.Dims()
	for i := range rows {
		in, out := x.RawRowView(i), dst.RawRowView(i)
		scale := 1 / math.Sqrt(floats.Dot(in, in)/float64(cols)+normEpsilon)
		for j, w := range weight {
			out[j] = in[j] * scale * w
		}
	}
	return dst
}

// firstRows returns a view of the first rows of m.
func firstRows(m *mat.Dense, rows int) *mat.Dense {
	_, cols := m.Dims()
	return m.Slice(0, rows, 0, cols).(*mat.Dense)
}

// like returns a matrix of zeros with the shape of m.
func like(m *mat.Dense) *mat.Dense {
	rows, cols := m.Dims()
	return mat.NewDense(rows, cols, nil)
}

// Argmax returns the index of the largest value, the first of several: greedy sampling.
func Argmax(logits []float64) int { return floats.MaxIdx(logits) }
