package model

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/mat"
)

// Executor runs a model for one rank, by graphs if the pass asks for them. A graph is a plan
// that is kept: the stages of the model laid out for one shape, with buffers of their own into
// which a replay copies its inputs. A pass in mode PIECEWISE replays each stage, expert exchanges
// included, and calls attention in between as an eager pass does; one in mode FULL replays stages
// and attention as one. Any other pass makes its plans anew.
//
// It runs one pass at a time, and its result is good until the next.
type Executor struct {
	model             *Model
	full              *fwd.GraphCache
	stages            []*fwd.GraphCache
	captures, replays atomic.Int64

	// The pass in flight. A fwd.ForwardFunc takes its context and nothing else, so its tensors lie
	// here, as a device graph's lie at fixed addresses.
	tokens []int
	hidden *mat.Dense
	active []*activations // by microbatch
}

// NewExecutor returns an executor that has captured nothing yet.
func NewExecutor(m *Model) (*Executor, error) {
	e := &Executor{model: m}
	var err error
	if e.full, err = fwd.NewGraphCache(fwd.GraphFull, e.byStages, e.captureFull); err != nil {
		return nil, err
	}
	for i := range len(m.layers) + 1 {
		stage, err := fwd.NewGraphCache(fwd.GraphPiecewise,
			func(ctx context.Context) error { return m.eager(ctx, i, e.current(ctx)) },
			func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
				return e.captureStage(ctx, i, key)
			})
		if err != nil {
			return nil, err
		}
		e.stages = append(e.stages, stage)
	}
	return e, nil
}

// Forward returns the hidden state of every token, as [Model.Forward] does.
func (e *Executor) Forward(ctx context.Context, tokens []int) (*mat.Dense, error) {
	e.tokens, e.hidden = tokens, nil
	if err := e.full.Forward(ctx); err != nil {
		return nil, err
	}
	return e.hidden, nil
}

// CloseCapture ends warm-up: a pass that has no graph then is an error.
func (e *Executor) CloseCapture() {
	e.full.CloseCapture()
	for _, s := range e.stages {
		s.CloseCapture()
	}
}

// Graphs returns how many graphs have been captured, and how often one was replayed.
func (e *Executor) Graphs() (captures, replays int) {
	return int(e.captures.Load()), int(e.replays.Load())
}

// byStages is what a pass without a full graph does.
func (e *Executor) byStages(ctx context.Context) (err error) {
	e.active = make([]*activations, max(1, len(fwd.MustFromContext(ctx).UBatches)))
	e.hidden, err = e.model.forward(ctx, e.tokens, func(ctx context.Context, i int, a *activations) error {
		u, _, _ := fwd.UBatch(ctx)
		e.active[u] = a
		return e.stages[i].Forward(ctx)
	})
	return err
}

// current returns the tensors of the pass, or the microbatch, that ctx is in.
func (e *Executor) current(ctx context.Context) *activations {
	u, _, _ := fwd.UBatch(ctx)
	return e.active[u]
}

func (e *Executor) captureStage(
	ctx context.Context,
	i int,
	key fwd.BatchDescriptor,
) (fwd.ForwardFunc, error) {
	s, err := e.model.plan(ctx, i, key.NumTokens)
	if err != nil {
		return nil, err
	}
	e.captures.Add(1)
	return func(ctx context.Context) error {
		e.replays.Add(1)
		return s.run(ctx, e.current(ctx))
	}, nil
}

// fullGraph is the whole model laid out for one shape.
type fullGraph struct {
	stages     []*stage
	attentions []*attnPlan
	tensors    activations
}

func (e *Executor) captureFull(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
	g := &fullGraph{tensors: activations{tokens: make([]int, key.NumTokens)}}
	for i := range len(e.model.layers) + 1 {
		s, err := e.model.plan(ctx, i, key.NumTokens)
		if err != nil {
			return nil, err
		}
		g.stages = append(g.stages, s)
	}
	for _, l := range e.model.layers {
		p, err := l.attn.plan(ctx, key)
		if err != nil {
			return nil, err
		}
		g.attentions = append(g.attentions, p)
	}
	e.captures.Add(1)
	return func(ctx context.Context) error {
		e.replays.Add(1)
		if len(e.tokens) != key.NumTokens {
			return fmt.Errorf("model: a batch of %d tokens for a graph of %d", len(e.tokens), key.NumTokens)
		}
		copy(g.tensors.tokens, e.tokens)
		e.hidden = nil
		if err := g.run(ctx); err != nil {
			return err
		}
		e.hidden = g.tensors.hidden
		return nil
	}, nil
}

func (g *fullGraph) run(ctx context.Context) error {
	for i, p := range g.attentions {
		if err := p.load(ctx); err != nil {
			return err
		}
		if err := g.stages[i].run(ctx, &g.tensors); err != nil {
			return err
		}
		p.run(&g.tensors)
	}
	return g.stages[len(g.attentions)].run(ctx, &g.tensors)
}
