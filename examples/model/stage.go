package model

import (
	"context"
	"errors"
	"fmt"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/mat"
)

// activations are the tensors that the pieces of a pass hand to each other, one row for each token.
// An eager pass has fresh ones in every piece; a graph leaves its own buffers here.
type activations struct {
	tokens   []int
	x        *mat.Dense // the residual stream
	q, k, v  *mat.Dense // for the next attention
	attended *mat.Dense // of the last attention, or room for the next
	hidden   *mat.Dense // at the end
}

// stage is the part of a model between two attention calls, laid out for a pass of a certain shape:
// the output projection of the attention before, the mixture of experts of that layer, and the
// projections for the attention after. So the first stage begins with the embedding and the last
// one ends with the final norm.
//
// Laying it out is the planning: what the experts exchange, and room for every tensor. Running it
// is the computation.
type stage struct {
	weights       *Weights
	before, after *Layer // nil at the ends of the model
	loras         int    // how many adapters a batch may have; -1: any number

	tokens, adapters []int
	x, attended      *mat.Dense
	update           *mat.Dense
	moe              *moePlan // of before
	normed           *mat.Dense
	q, k, v, room    *mat.Dense // for after
	hidden           *mat.Dense
}

// plan lays out stage i for the pass in ctx, of so many rows.
func (m *Model) plan(ctx context.Context, i, rows int) (*stage, error) {
	if rows == 0 {
		return nil, errors.New("model: a pass without tokens")
	}
	fc, ok := fwd.FromContext(ctx)
	if !ok {
		return nil, fmt.Errorf("model: stage %d: %w", i, fwd.ErrNoForwardContext)
	}
	if u, n, split := fwd.UBatch(ctx); split && fc.GraphMode != fwd.GraphNone {
		// A graph is for a whole pass: its exchanges have as many rows as that.
		return nil, fmt.Errorf("model: microbatch %d of %d in graph mode %v", u, n, fc.GraphMode)
	}
	tensor := func() *mat.Dense { return mat.NewDense(rows, m.weights.Config.Width, nil) }
	s := &stage{weights: m.weights, loras: -1, x: tensor()}
	if fc.GraphMode != fwd.GraphNone {
		s.loras = fc.Batch.NumActiveLoRAs
	}
	if i == 0 {
		s.tokens = make([]int, rows)
	} else {
		s.before, s.attended, s.update = m.layers[i-1], tensor(), tensor()
		var err error
		if s.moe, err = s.before.moe.plan(ctx, rows); err != nil {
			return nil, err
		}
	}
	if i == len(m.layers) {
		s.hidden = tensor()
	} else {
		s.after, s.normed = m.layers[i], tensor()
		s.q, s.k, s.v, s.room = tensor(), tensor(), tensor(), tensor()
	}
	return s, nil
}

// bytes returns how much memory the tensors of the stage take.
func (s *stage) bytes() int {
	tensors := []*mat.Dense{s.x, s.attended, s.update, s.normed, s.q, s.k, s.v, s.room, s.hidden}
	if s.moe != nil {
		tensors = append(tensors, s.moe.mixed, s.moe.mixed) // the experts' input has as many rows
	}
	numbers := 0
	for _, t := range tensors {
		if t != nil {
			rows, columns := t.Dims()
			numbers += rows * columns
		}
	}
	return 8 * numbers
}

// run copies what the stage takes into its buffers, computes, and leaves what it gives in a.
func (s *stage) run(ctx context.Context, a *activations) error {
	if err := s.load(ctx, a); err != nil {
		return err
	}
	if s.before == nil {
		if err := s.embed(); err != nil {
			return err
		}
	} else {
		s.before.attn.O.forward(s.update, s.attended, s.adapters)
		s.x.Add(s.x, s.update)
		rmsNorm(s.moe.in, s.x, s.before.moeNorm)
		if err := s.moe.run(ctx); err != nil {
			return err
		}
		s.x.Add(s.x, s.moe.out)
	}
	if s.after == nil {
		rmsNorm(s.hidden, s.x, s.weights.FinalNorm)
		a.hidden = s.hidden
		return nil
	}
	rmsNorm(s.normed, s.x, s.after.attnNorm)
	s.after.attn.Q.forward(s.q, s.normed, s.adapters)
	s.after.attn.K.forward(s.k, s.normed, s.adapters)
	s.after.attn.V.forward(s.v, s.normed, s.adapters)
	a.x, a.q, a.k, a.v, a.attended = s.x, s.q, s.k, s.v, s.room
	return nil
}

func (s *stage) load(ctx context.Context, a *activations) error {
	rows, _ := s.x.Dims()
	if len(a.tokens) != rows {
		return fmt.Errorf("model: a batch of %d tokens for a graph of %d", len(a.tokens), rows)
	}
	if s.before == nil {
		copy(s.tokens, a.tokens)
	} else {
		s.x.Copy(a.x)
		s.attended.Copy(a.attended)
	}
	// Both attentions that a stage has a part of have the same rows, so either's metadata will do.
	next := s.after
	if next == nil {
		next = s.before
	}
	meta, err := fwd.AttnMetadata[*AttnMeta](ctx, next.attn.Name)
	if errors.Is(err, fwd.ErrNoMetadata) {
		meta, err = &AttnMeta{}, nil // a dummy pass: no row belongs to a request
	}
	if err != nil {
		return err
	}
	if s.loras >= 0 && meta.ActiveAdapters > s.loras {
		return fmt.Errorf("model: %s: a batch with %d adapters for a graph with %d", next.attn.Name,
			meta.ActiveAdapters, s.loras)
	}
	if n := len(meta.Adapters); n != 0 && n != rows {
		return fmt.Errorf("model: %s: %d rows with %d adapters", next.attn.Name, rows, n)
	}
	s.adapters = append(s.adapters[:0], meta.Adapters...)
	return nil
}

func (s *stage) embed() error {
	for i, t := range s.tokens {
		if t < 0 || t >= s.weights.Config.Vocab {
			return fmt.Errorf("model: token %d in row %d is not in the vocabulary of %d", t, i, s.weights.Config.Vocab)
		}
		s.x.SetRow(i, s.weights.Embedding.RawRowView(t))
	}
	return nil
}
