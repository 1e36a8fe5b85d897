package model

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	graphs            map[place]graph // that the caches have
	adopting          bool            // a cache is given a graph, and nothing runs
	captures, replays atomic.Int64

	// The pass in flight. A fwd.ForwardFunc takes its context and nothing else, so its tensors lie
	// here, as a device graph's lie at fixed addresses.
	tokens []int
	hidden *mat.Dense
	active []*activations // by microbatch
}

// place is where a graph belongs: the stage that it is of, or wholeModel, and the batches that it is
// for.
type place struct {
	stage int
	key   fwd.BatchDescriptor
}

const wholeModel = -1

// graph is one that was captured.
type graph struct {
	replay fwd.ForwardFunc
	bytes  int // of its tensors
}

// NewExecutor returns an executor that has captured nothing yet.
func NewExecutor(m *Model) (*Executor, error) {
	e := &Executor{model: m, graphs: map[place]graph{}}
	return e, e.newCaches()
}

// newCaches gives the executor caches that are empty and open.
func (e *Executor) newCaches() (err error) {
	e.full, err = fwd.NewGraphCache(fwd.GraphFull, e.byStages, e.capturing(wholeModel, e.captureFull))
	e.stages = nil
	for i := range len(e.model.layers) + 1 {
		eager := func(ctx context.Context) error { return e.model.eager(ctx, i, e.current(ctx)) }
		stage, failed := fwd.NewGraphCache(fwd.GraphPiecewise, eager, e.capturing(i,
			func(ctx context.Context, key fwd.BatchDescriptor) (graph, error) { return e.captureStage(ctx, i, key) }))
		e.stages, err = append(e.stages, stage), errors.Join(err, failed)
	}
	return err
}

// captureFunc is what a cache calls.
type captureFunc func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error)

// capturing returns what captures a graph for a cache, unless the executor has it from a cache before.
func (e *Executor) capturing(
	stage int, capture func(context.Context, fwd.BatchDescriptor) (graph, error),
) captureFunc {
	return func(ctx context.Context, key fwd.BatchDescriptor) (fwd.ForwardFunc, error) {
		g, ok := e.graphs[place{stage, key}]
		if !ok {
			var err error
			if g, err = capture(ctx, key); err != nil {
				return nil, err
			}
			e.captures.Add(1)
			e.graphs[place{stage, key}] = g
		}
		return func(ctx context.Context) error {
			if e.adopting {
				return nil
			}
			e.replays.Add(1)
			return g.replay(ctx)
		}, nil
	}
}

// Keep ends the use of all graphs but these, and lets others be captured again, until CloseCapture.
// Graphs that stay are not captured again. No pass may run meanwhile.
func (e *Executor) Keep(stay []fwd.Capture) error {
	before := e.graphs
	e.graphs = map[place]graph{}
	if err := e.newCaches(); err != nil {
		return err
	}
	e.adopting = true
	defer func() { e.adopting = false }()
	for at, g := range before {
		mode, cache := fwd.GraphFull, e.full
		if at.stage != wholeModel {
			mode, cache = fwd.GraphPiecewise, e.stages[at.stage]
		}
		if !slices.Contains(stay, fwd.Capture{Mode: mode, Batch: at.key}) {
			continue
		}
		e.graphs[at] = g
		fc := &fwd.ForwardContext{NumTokens: at.key.NumTokens, GraphMode: mode, Batch: at.key}
		if err := cache.Forward(fwd.NewContext(context.Background(), fc)); err != nil {
			return err
		}
	}
	return nil
}

// Bytes returns how much memory the tensors of the captured graphs take.
func (e *Executor) Bytes() int {
	sum := 0
	for _, g := range e.graphs {
		sum += g.bytes
	}
	return sum
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

func (e *Executor) captureStage(ctx context.Context, i int, key fwd.BatchDescriptor) (graph, error) {
	s, err := e.model.plan(ctx, i, key.NumTokens)
	if err != nil {
		return graph{}, err
	}
	return graph{func(ctx context.Context) error { return s.run(ctx, e.current(ctx)) }, s.bytes()}, nil
}

// fullGraph is the whole model laid out for one shape.
type fullGraph struct {
	stages     []*stage
	attentions []*attnPlan
	tensors    activations
}

func (e *Executor) captureFull(ctx context.Context, key fwd.BatchDescriptor) (graph, error) {
	g := &fullGraph{tensors: activations{tokens: make([]int, key.NumTokens)}}
	bytes := 0
	for i := range len(e.model.layers) + 1 {
		s, err := e.model.plan(ctx, i, key.NumTokens)
		if err != nil {
			return graph{}, err
		}
		g.stages = append(g.stages, s)
		bytes += s.bytes()
	}
	for _, l := range e.model.layers {
		p, err := l.attn.plan(ctx, key)
		if err != nil {
			return graph{}, err
		}
		g.attentions = append(g.attentions, p)
	}
	return graph{func(ctx context.Context) error {
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
	}, bytes}, nil
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
