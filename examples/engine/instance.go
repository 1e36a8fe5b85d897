package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"gonum.org/v1/gonum/mat"
)

// instance is a model on a rank: its Runner, its graphs and its KV cache.
type instance struct {
	*blueprint
	runner      *fwd.Runner
	executor    *model.Executor
	coordinator *timedCoordinator
	experts     rankWorkers
}

// newInstance puts a model on a rank, with the layer objects that its passes find: a KV cache for every attention layer, and
// the shares of the experts of the rank's workers for every mixture-of-experts layer.
func newInstance(b *blueprint, cfg *Config, rank, numBlocks int, coordinator fwd.Coordinator, group *expertGroup) (*instance, error) {
	in := &instance{
		blueprint:   b,
		coordinator: &timedCoordinator{Coordinator: coordinator},
		experts:     group.workersOf(rank, cfg.SequenceParallel),
	}
	weights := b.model.Weights()
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
	options := []fwd.Option{
		fwd.WithDispatcher(b.dispatcher),
		fwd.WithCoordinator(in.coordinator),
		fwd.WithExchangeTimeout(cfg.ExchangeTimeout),
		fwd.WithMiddleware(in.experts.inPass),
		fwd.WithTracerProvider(cfg.TracerProvider),
		fwd.WithMeterProvider(cfg.MeterProvider),
	}
	if cfg.Middleware != nil {
		options = append(options, fwd.WithMiddleware(cfg.Middleware(rank)...))
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
	in.runner, err = fwd.New(fwd.Config{Name: b.name, Parallel: parallel, NoCompileLayers: layers}, options...)
	return in, err
}

// warmUp captures every graph that the dispatcher can choose, in its order, and ends capturing. All ranks capture the same
// graphs in the same order, so they are in lockstep in the experts' exchanges, and no votes are needed: everyone knows that
// every rank has as many tokens as the graph.
func (in *instance) warmUp(ctx context.Context) error {
	for _, c := range in.dispatcher.Captures() {
		n := c.Batch.NumTokens
		pass := fwd.Pass{NumTokens: n, GraphMode: c.Mode, Batch: c.Batch, Dummy: true}
		if size := in.parallel.DataParallelSize; size > 1 {
			pass.NumTokensAcrossDP = mat.NewVecDense(size, nil)
			for d := range size {
				pass.NumTokensAcrossDP.SetVec(d, float64(n))
			}
		}
		err := in.runner.Run(ctx, pass, func(ctx context.Context) error {
			_, err := in.executor.Forward(ctx, make([]int, n))
			return err
		})
		if err != nil {
			return fmt.Errorf("warm-up: %v graph of %d tokens: %w", c.Mode, n, err)
		}
	}
	in.executor.CloseCapture()
	return nil
}

// plan prepares a pass over a step, or a dummy pass.
func (in *instance) plan(ctx context.Context, step []scheduled, blockSize int) (fwd.Pass, *batch, error) {
	schedule := fwd.Schedule{NumActiveLoRAs: activeAdapters(step), AllowUBatches: true}
	for _, s := range step {
		schedule.NumScheduledTokens = append(schedule.NumScheduledTokens, s.count)
	}
	pass, err := in.runner.Plan(ctx, schedule)
	if err != nil {
		return pass, nil, err
	}
	// A dummy pass has tokens, so that every exchange finds this rank, but no metadata: they belong to no request.
	b := newBatch(step, pass.NumTokens, blockSize, schedule.NumActiveLoRAs)
	if !pass.Dummy {
		pass.AttnMetadata, pass.SlotMapping = b.metadata(pass.UBatches, len(in.model.Weights().Layers))
	}
	return pass, b, nil
}

// logits returns the scores of the next token after each row to sample from, one row after the other; nil for none.
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

// timedCoordinator measures how long its rank waits for the others' votes.
type timedCoordinator struct {
	fwd.Coordinator
	waited time.Duration
}

// Exchange implements [fwd.Coordinator].
func (c *timedCoordinator) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	began := time.Now()
	defer func() { c.waited += time.Since(began) }()
	return c.Coordinator.Exchange(ctx, v)
}
