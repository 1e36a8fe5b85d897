package engine

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/fwdplan"
	"gonum.org/v1/gonum/mat"
)

// instance is a model on a rank: its Runner, its graphs and its KV cache.
type instance struct {
	*blueprint
	runner    *fwd.Runner
	executor  *model.Executor
	experts   rankWorkers
	blockSize int

	sizes   []int         // of the graphs
	graphs  []fwd.Capture // all of them
	missing int           // of these, the ones that were not there when the sizes changed
	shown   atomic.Pointer[fwd.Runner]
	counts  *fwdplan.Sizes   // nil: the sizes stay
	counted fwdplan.Snapshot // of the steps that don't count any more
}

// newInstance puts a model on a rank. observe is told of every pass.
func newInstance(b *blueprint, cfg *Config, rank, numBlocks int, coordinator fwd.Coordinator,
	group *expertGroup, observe func(context.Context, *fwd.Record)) (*instance, error) {
	in := &instance{
		blueprint: b,
		experts:   group.workersOf(rank, cfg.SequenceParallel),
		blockSize: cfg.BlockSize,
		sizes:     b.config.CaptureSizes,
		graphs:    b.dispatcher.Captures(),
	}
	in.missing = len(in.graphs)
	tracers, meters := cfg.providers(rank)
	options := []fwd.Option{
		fwd.WithDispatcher(b.dispatcher),
		fwd.WithCoordinator(coordinator),
		fwd.WithExchangeTimeout(cfg.ExchangeTimeout),
		fwd.WithMiddleware(in.experts.inPass),
		fwd.WithObserver(observe),
		fwd.WithObserver(cfg.Observe),
		fwd.WithLogger(cfg.Logger),
		fwd.WithTracerProvider(tracers),
		fwd.WithMeterProvider(meters),
		fwd.WithPeerName(cfg.PeerName),
	}
	if cfg.Middleware != nil {
		options = append(options, fwd.WithMiddleware(cfg.Middleware(rank)...))
	}
	if cfg.Replan > 0 {
		in.counts = new(fwdplan.Sizes)
		options = append(options, fwd.WithObserver(in.counts.Observe))
	}
	if cfg.StepTrace {
		options = append(options, fwd.WithStepTrace())
	}
	parallel := b.parallel
	parallel.DataParallelRank = rank
	var err error
	if in.executor, err = model.NewExecutor(b.model); err != nil {
		return nil, err
	}
	layers := in.layers(cfg, numBlocks, group)
	in.runner, err = fwd.New(fwd.Config{Name: b.name, Parallel: parallel, Layers: layers}, options...)
	in.shown.Store(in.runner)
	return in, err
}

// layers returns the layer objects that the passes find: a KV cache for every attention layer, and
// the shares of the experts of the rank's workers for every mixture-of-experts layer.
func (in *instance) layers(cfg *Config, numBlocks int, group *expertGroup) map[string]any {
	weights := in.model.Weights()
	layers := map[string]any{}
	for l := range weights.Layers {
		layers[model.AttentionName(l)] = model.NewKVCache(weights.Config, numBlocks, cfg.BlockSize)
		workers := &model.Workers{MaxChunk: cfg.MaxChunk}
		for _, w := range in.experts {
			experts := model.NewExperts(&weights.Layers[l], w.worker, group.size, w)
			experts.Worker += group.first
			workers.Experts = append(workers.Experts, experts)
		}
		layers[model.MoEName(l)] = workers
	}
	return layers
}

// warmUp captures every graph that the dispatcher can choose, but for those that all ranks have already,
// and ends capturing.
func (in *instance) warmUp(ctx context.Context, have []fwd.Capture) error {
	for pass, err := range in.runner.WarmUp(ctx) {
		if err != nil {
			return fmt.Errorf("warm-up: %w", err)
		}
		if slices.Contains(have, fwd.Capture{Mode: pass.GraphMode, Batch: pass.Batch}) {
			continue
		}
		if _, err := in.forward(ctx, pass, make([]int, pass.NumTokens)); err != nil {
			return fmt.Errorf("warm-up: %v graph of %d tokens: %w", pass.GraphMode, pass.NumTokens, err)
		}
	}
	in.executor.CloseCapture()
	return nil
}

// newBatch lays out the step of a planned pass, and adds to the pass what attention must know about
// it.
func (in *instance) newBatch(pass *fwd.Pass, step []scheduled) *batch {
	b := newBatch(step, pass.NumTokens, in.blockSize, in.ahead)
	b.addTo(pass, len(in.model.Weights().Layers))
	return b
}

// forward runs a pass and returns the hidden state of every token.
func (in *instance) forward(ctx context.Context, pass fwd.Pass, tokens []int) (*mat.Dense, error) {
	return fwd.Call(ctx, in.runner, pass, func(ctx context.Context) (*mat.Dense, error) {
		return in.executor.Forward(ctx, tokens)
	})
}

// logits returns the scores of the next token after each row to sample from, one row after the
// other; it returns nil if there are none.
func (in *instance) logits(sample []sampled, hidden *mat.Dense) *mat.Dense {
	rows := 0
	for _, s := range sample {
		rows += s.rows.Len()
	}
	if rows == 0 {
		return nil
	}
	_, width := hidden.Dims()
	last := mat.NewDense(rows, width, nil)
	next := 0
	for _, s := range sample {
		for row := s.rows.Start; row < s.rows.Stop; row++ {
			last.SetRow(next, hidden.RawRowView(row))
			next++
		}
	}
	return in.model.Logits(last)
}
