// Package model is a decoder-only mixture-of-experts language model, written the way that models
// are written on fwd.
//
// A layer takes a context and its tensors, one token per row. Whatever else it needs to know about
// the forward pass comes out of the context through fwd: [Attention] reads which rows belong to
// which request (fwd.AttnMetadata), where in the KV cache new keys and values go (fwd.SlotMapping)
// and the cache itself (fwd.Layer); [MoE] reads its workers' experts (fwd.Layer) and the rows that
// each worker brings (fwd.Chunks, fwd.LocalSizes). So no layer passes anything on for another, and
// what lies in between ([Model], [Layer]) knows nothing of batching, paging or ranks.
//
// The model runs in stages, from one attention to the next (stage.go). A stage is planned for the
// shape of a pass and then run; an [Executor] keeps plans as graphs and replays them, so that a
// pass of a known shape needs no planning.
//
// The file reference.go computes the same model for one request by plain loops and knows nothing of
// all this. It is what the engine's answers are checked against.
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

// Model is the decoder: token embedding, layers, final norm, and the head that turns hidden states
// into logits. It holds weights only and serves any number of passes concurrently.
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

// Forward returns the hidden state of every token, without graphs. Tokens are rows of a batch:
// several requests, one after the other, then padding; the context says which is which. The
// microbatches of a split pass run at the same time.
func (m *Model) Forward(ctx context.Context, tokens []int) (*mat.Dense, error) {
	return m.forward(ctx, tokens, m.eager)
}

// forward takes tokens through the model: a stage, an attention, a stage, and so on. How stage i is
// run is the caller's choice; attention is called as it is, since what it does depends on what the
// batch holds.
func (m *Model) forward(
	ctx context.Context,
	tokens []int,
	stage func(ctx context.Context, i int, a *activations) error,
) (*mat.Dense, error) {
	if len(tokens) == 0 {
		return nil, errors.New("model: a pass without tokens")
	}
	hidden := mat.NewDense(len(tokens), m.weights.Config.Width, nil)
	pass, _ := fwd.FromContext(ctx)
	err := fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
		rows := fwd.Range{Start: 0, Stop: len(tokens)}
		if len(pass.UBatches) > 0 {
			rows = pass.UBatches[i].Tokens
		}
		if rows.Stop > len(tokens) {
			return fmt.Errorf("model: microbatch %d has rows [%d, %d) of %d", i, rows.Start, rows.Stop, len(tokens))
		}
		a := &activations{tokens: tokens[rows.Start:rows.Stop]}
		for i, l := range m.layers {
			if err := stage(ctx, i, a); err != nil {
				return err
			}
			if err := l.attn.Forward(ctx, a); err != nil {
				return err
			}
		}
		if err := stage(ctx, len(m.layers), a); err != nil {
			return err
		}
		for row := range rows.Len() {
			hidden.SetRow(rows.Start+row, a.hidden.RawRowView(row))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return hidden, nil
}

// eager plans a stage for the pass in ctx and runs it, once.
func (m *Model) eager(ctx context.Context, i int, a *activations) error {
	s, err := m.plan(ctx, i, len(a.tokens))
	if err != nil {
		return err
	}
	return s.run(ctx, a)
}

// Logits returns the scores of each possible next token for rows of hidden states. An engine asks
// for the last row of each request only: nobody samples from the others.
func (m *Model) Logits(hidden *mat.Dense) *mat.Dense {
	var logits mat.Dense
	logits.Mul(hidden, m.weights.Head)
	return &logits
}

// Layer is one decoder layer: attention and a mixture of experts, each behind a norm and beside a
// residual connection. A [stage] computes what lies between two attentions.
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

// AttentionName returns the name under which the attention of a layer finds its metadata, slot
// mapping and KV cache.
func AttentionName(layer int) string { return fmt.Sprintf("layers.%d.attn", layer) }

// MoEName returns the name under which the mixture of experts of a layer finds the rank's
// [Workers].
func MoEName(layer int) string { return fmt.Sprintf("layers.%d.moe", layer) }

// rmsNorm stores in dst each row of x divided by its root mean square and multiplied by weight.
func rmsNorm(dst, x *mat.Dense, weight []float64) {
	rows, cols := x.Dims()
	for i := range rows {
		in, out := x.RawRowView(i), dst.RawRowView(i)
		scale := 1 / math.Sqrt(floats.Dot(in, in)/float64(cols)+normEpsilon)
		for j, w := range weight {
			out[j] = in[j] * scale * w
		}
	}
}

// firstRows returns a view of the first rows of m.
func firstRows(m *mat.Dense, rows int) *mat.Dense {
	_, cols := m.Dims()
	return m.Slice(0, rows, 0, cols).(*mat.Dense)
}

// Argmax returns the index of the largest value, the first of several: greedy sampling.
func Argmax(logits []float64) int { return floats.MaxIdx(logits) }
