// Package engine serves requests with a mixture-of-experts model over data-parallel ranks: continuous batching with chunked
// prefill, a paged KV cache, expert parallelism and greedy sampling. Ranks are goroutines of one process, and each of them
// does in every step what a rank of a large engine does:
//
//	schedule           which requests get how many tokens (scheduler.go)
//	Runner.Plan        agree with the other ranks on graph mode and padding
//	metadata           lay the batch out in rows, for attention and KV cache (batch.go)
//	Runner.Run         the model, in which every mixture-of-experts layer exchanges rows with all ranks (exchange.go)
//	sample             the next token of each request that has caught up with itself
//
// No rank can take a step alone. One that has nothing to do takes it as a dummy pass, and all stop after the same one.
package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Config configures an engine. The zero value is one rank with the defaults.
type Config struct {
	DataParallelSize    int           // ranks; 0: 1
	SequenceParallel    int           // expert-parallel workers of a rank, among which its rows are split; 0: 1
	MaxChunk            int           // rows that a worker sends to the experts at once; 0: 32
	MaxNumBatchedTokens int           // of a rank in a step; 0: 128
	MaxNumSeqs          int           // requests of a rank in a step; 0: 16
	BlockSize           int           // tokens in a block of the KV cache; 0: 16
	NumBlocks           int           // blocks of a rank's KV cache; 0: 512, or what the longest request needs
	Speed               float64       // how many times faster than they say requests arrive; 0: all are there at once
	ExchangeTimeout     time.Duration // of a step's votes; 0: 30 s
	StopGrace           time.Duration // how long an interrupted run may take to end its step; 0: 2 s

	// Coordinators connects the ranks; nil: in this process. One for each rank, in rank order.
	Coordinators []fwd.Coordinator

	// Middleware returns what wraps the passes of a rank; nil: nothing.
	Middleware func(rank int) []fwd.Middleware

	TracerProvider trace.TracerProvider // nil: the global one
	MeterProvider  metric.MeterProvider // nil: the global one
	StepTrace      bool                 // one trace for a step across all ranks
}

// MaxRanks is the most ranks of an engine: each has a KV cache of its own in the same process.
const MaxRanks = 64

// MaxSequenceParallel is the most workers of a rank.
const MaxSequenceParallel = 16

// maxCapture is the largest batch, in tokens, that a graph exists for. It is below the default budget of a step, so that
// all the ways a batch can go are seen: full graphs for decode batches, piecewise ones for mixed batches, none for the
// largest prefills.
const maxCapture = 64

func (c Config) withDefaults() (Config, error) {
	var errs []error
	count := func(name string, v *int, zero int) {
		if *v < 0 {
			errs = append(errs, fmt.Errorf("engine: %s is %d, want at least 1, or 0 for the default of %d", name, *v, zero))
		}
		if *v == 0 {
			*v = zero
		}
	}
	count("DataParallelSize", &c.DataParallelSize, 1)
	count("SequenceParallel", &c.SequenceParallel, 1)
	count("MaxChunk", &c.MaxChunk, 32)
	count("MaxNumBatchedTokens", &c.MaxNumBatchedTokens, 128)
	count("MaxNumSeqs", &c.MaxNumSeqs, 16)
	count("BlockSize", &c.BlockSize, 16)
	if c.NumBlocks < 0 {
		errs = append(errs, fmt.Errorf("engine: NumBlocks is %d", c.NumBlocks))
	}
	if c.DataParallelSize > MaxRanks {
		errs = append(errs, fmt.Errorf("engine: DataParallelSize is %d, want at most %d", c.DataParallelSize, MaxRanks))
	}
	if c.SequenceParallel > MaxSequenceParallel {
		errs = append(errs, fmt.Errorf("engine: SequenceParallel is %d, want at most %d", c.SequenceParallel, MaxSequenceParallel))
	}
	if c.Speed < 0 || math.IsNaN(c.Speed) || math.IsInf(c.Speed, 0) {
		errs = append(errs, fmt.Errorf("engine: Speed is %v, want a finite number of at least 0", c.Speed))
	}
	if c.Coordinators != nil && len(c.Coordinators) != c.DataParallelSize {
		errs = append(errs, fmt.Errorf("engine: %d coordinators for %d ranks", len(c.Coordinators), c.DataParallelSize))
	}
	c.ExchangeTimeout = cmp.Or(c.ExchangeTimeout, 30*time.Second)
	c.StopGrace = cmp.Or(c.StopGrace, 2*time.Second)
	return c, errors.Join(errs...)
}

// Engine serves requests. Make one with [New].
type Engine struct {
	model      *model.Model
	config     Config
	dispatcher *fwd.Dispatcher

	running             atomic.Bool
	finished, generated atomic.Int64
}

// New returns an engine that serves m. Its error names every value of cfg that can't be.
func New(m *model.Model, cfg Config) (*Engine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	// The dispatcher is the same for all ranks: they could not agree on graphs that only some of them have.
	dispatch := fwd.DispatcherConfig{
		Mode:         fwd.GraphFullAndPiecewise,
		CaptureSizes: fwd.DefaultCaptureSizes(maxCapture),
		MaxNumSeqs:   cfg.MaxNumSeqs,
	}
	if n := m.Weights().Config.Adapters; n > 0 {
		dispatch.LoRA = &fwd.LoRAConfig{MaxLoRAs: n, SpecializeCount: true}
	}
	dispatcher, err := fwd.NewDispatcher(dispatch)
	if err != nil {
		return nil, err
	}
	return &Engine{model: m, config: cfg, dispatcher: dispatcher}, nil
}

// Progress returns how many requests have been finished and how many tokens generated by the current run, or the last.
func (e *Engine) Progress() (finished, generated int) {
	return int(e.finished.Load()), int(e.generated.Load())
}

// Run serves requests until all are finished or ctx ends, and returns the result of each in the order of requests,
// finished or not, and the figures so far. When ctx ends, the step in flight is finished, since the ranks need each other
// for that, and the error is ctx's cause. Any other error is of the first rank that failed. An engine runs once at a time.
func (e *Engine) Run(ctx context.Context, requests []Request) ([]Result, Stats, error) {
	if !e.running.CompareAndSwap(false, true) {
		return nil, Stats{}, errors.New("engine: it is running already")
	}
	defer e.running.Store(false)
	e.finished.Store(0)
	e.generated.Store(0)
	numBlocks, err := e.admit(requests)
	if err != nil {
		return nil, Stats{}, err
	}

	began := time.Now()
	results := make([]Result, len(requests))
	sequences := make([]*sequence, len(requests))
	for i := range requests {
		results[i].ID = requests[i].ID
		sequences[i] = &sequence{request: &requests[i], result: &results[i], arrived: began}
		if e.config.Speed > 0 {
			sequences[i].arrived = began.Add(time.Duration(float64(requests[i].Arrival) / e.config.Speed))
		}
	}
	slices.SortStableFunc(sequences, func(a, b *sequence) int { return a.arrived.Compare(b.arrived) })
	gate := newGate(ctx, sequences)
	ranks, err := e.newRanks(sequences, numBlocks, gate)
	if err != nil {
		return nil, Stats{}, err
	}

	// Steps don't run under ctx itself: where it ended in mid-step, some ranks would have exchanged rows and others not.
	stepCtx, fail := context.WithCancelCause(context.WithoutCancel(ctx))
	var working, watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-stepCtx.Done():
			return
		case <-ctx.Done():
		}
		select {
		case <-stepCtx.Done():
		case <-time.After(e.config.StopGrace):
			fail(context.Cause(ctx))
		}
	})
	for _, r := range ranks {
		working.Go(func() {
			if err := r.serve(stepCtx); err != nil {
				fail(fmt.Errorf("rank %d: %w", r.rank, err)) // ends the others' exchanges; the first error stays
			}
		})
	}
	working.Wait()
	err = context.Cause(stepCtx)
	fail(nil)
	watching.Wait()

	stats := collect(ranks, len(requests), time.Since(began))
	for _, s := range sequences {
		s.endSpan()
	}
	if err == nil && stats.Finished < len(requests) {
		err = context.Cause(ctx)
	}
	return results, stats, err
}

// admit checks requests and returns how many blocks a rank's KV cache has.
func (e *Engine) admit(requests []Request) (numBlocks int, err error) {
	numBlocks = cmp.Or(e.config.NumBlocks, 512)
	vocab, adapters := e.model.Weights().Config.Vocab, e.model.Weights().Config.Adapters
	for i := range requests {
		r := &requests[i]
		if len(r.Prompt) == 0 || r.MaxTokens < 1 || r.Arrival < 0 {
			return 0, fmt.Errorf("engine: request %d has %d prompt tokens, %d tokens to generate and arrives at %v: want at least 1, 1 and 0s",
				r.ID, len(r.Prompt), r.MaxTokens, r.Arrival)
		}
		if r.Adapter < 0 || r.Adapter > adapters {
			return 0, fmt.Errorf("engine: request %d: adapter %d is none of the model's %d", r.ID, r.Adapter, adapters)
		}
		for p, t := range r.Prompt {
			if t < 0 || t >= vocab {
				return 0, fmt.Errorf("engine: request %d: token %d at position %d is not in the vocabulary of %d", r.ID, t, p, vocab)
			}
		}
		need := blocksFor(r.length(), e.config.BlockSize)
		if e.config.NumBlocks > 0 && need > e.config.NumBlocks {
			return 0, fmt.Errorf("engine: request %d needs %d blocks of %d tokens, the KV cache has %d", r.ID, need, e.config.BlockSize, e.config.NumBlocks)
		}
		numBlocks = max(numBlocks, need)
	}
	return numBlocks, nil
}

// newRanks builds the ranks and deals the requests out to them, in turn.
func (e *Engine) newRanks(sequences []*sequence, numBlocks int, gate *gate) ([]*rank, error) {
	cfg, size := e.config, e.config.DataParallelSize
	coordinators := cfg.Coordinators
	if coordinators == nil {
		var err error
		if coordinators, err = fwd.NewLocalGroup(size); err != nil {
			return nil, err
		}
	}
	group := newExpertGroup(size * cfg.SequenceParallel)
	ranks := make([]*rank, size)
	for d := range size {
		r := &rank{
			rank:        d,
			engine:      e,
			gate:        gate,
			coordinator: &timedCoordinator{Coordinator: coordinators[d]},
			experts:     group.workersOf(d, cfg.SequenceParallel),
			scheduler: &scheduler{
				blocks:  newBlockAllocator(numBlocks, cfg.BlockSize),
				budget:  cfg.MaxNumBatchedTokens,
				maxSeqs: cfg.MaxNumSeqs,
			},
			reasons: map[fwd.Reason]int{},
		}
		for i := d; i < len(sequences); i += size {
			r.scheduler.waiting = append(r.scheduler.waiting, sequences[i])
		}
		if err := r.newRunner(numBlocks); err != nil {
			return nil, err
		}
		ranks[d] = r
	}
	return ranks, nil
}

// newRunner gives the rank its Runner, with the layer objects that its passes find: a KV cache for every attention layer,
// and its workers' shares of the experts for every mixture-of-experts layer.
func (r *rank) newRunner(numBlocks int) error {
	cfg, weights := r.engine.config, r.engine.model.Weights()
	layers := map[string]any{}
	for l := range weights.Layers {
		layers[model.AttentionName(l)] = model.NewKVCache(weights.Config, numBlocks, cfg.BlockSize)
		workers := &model.Workers{MaxChunk: cfg.MaxChunk}
		for _, w := range r.experts {
			workers.Experts = append(workers.Experts, model.NewExperts(&weights.Layers[l], w.worker, w.group.size, w))
		}
		layers[model.MoEName(l)] = workers
	}
	options := []fwd.Option{
		fwd.WithDispatcher(r.engine.dispatcher),
		fwd.WithCoordinator(r.coordinator),
		fwd.WithExchangeTimeout(cfg.ExchangeTimeout),
		fwd.WithMiddleware(r.experts.inPass),
		fwd.WithTracerProvider(cfg.TracerProvider),
		fwd.WithMeterProvider(cfg.MeterProvider),
	}
	if cfg.Middleware != nil {
		options = append(options, fwd.WithMiddleware(cfg.Middleware(r.rank)...))
	}
	if cfg.StepTrace {
		options = append(options, fwd.WithStepTrace())
	}
	var err error
	r.runner, err = fwd.New(fwd.Config{
		Parallel:        fwd.ParallelConfig{DataParallelSize: cfg.DataParallelSize, DataParallelRank: r.rank},
		NoCompileLayers: layers,
	}, options...)
	return err
}

// gate decides before each step whether it takes place, the same for all ranks: the first rank to come decides, with what it
// knows then, and the others follow. That needs no waiting, so the ranks wait for each other only where Plan measures it. It
// may decide for a step that turns out to have nothing in it; then all ranks run dummy passes.
type gate struct {
	ctx      context.Context // of Run: once it has ended, no further step starts
	arrivals []time.Time     // ascending
	finished atomic.Int64

	mu   sync.Mutex
	step int
	runs bool
	at   time.Time // when the step starts
}

func newGate(ctx context.Context, sequences []*sequence) *gate {
	g := &gate{ctx: ctx}
	for _, s := range sequences {
		g.arrivals = append(g.arrivals, s.arrived)
	}
	return g
}

// next reports whether step takes place, and returns when it starts, or early when stepCtx or the run ends. Steps count from
// one. A rank is never two steps ahead of another, since Plan holds it back, so one decision at a time is kept.
func (g *gate) next(stepCtx context.Context, step int) bool {
	g.mu.Lock()
	if step > g.step {
		g.step = step
		g.decide(time.Now())
	}
	runs, wait := g.runs, time.Until(g.at)
	g.mu.Unlock()
	if runs && wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-g.ctx.Done():
		case <-stepCtx.Done():
		}
	}
	return runs
}

func (g *gate) decide(now time.Time) {
	finished := int(g.finished.Load())
	g.at = now
	g.runs = finished < len(g.arrivals) && g.ctx.Err() == nil
	// What has finished has arrived. Where nothing else has, all ranks sleep until the next request comes.
	if g.runs && g.arrivals[finished].After(now) {
		g.at = g.arrivals[finished]
	}
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
