package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
)

// run is one call of [Engine.Run]: its ranks, and what they serve.
type run struct {
	engine    *Engine
	results   []Result    // in the order of the requests
	sequences []*sequence // by arrival
	ranks     []*rank
}

func (e *Engine) newRun(requests []Request) (*run, error) {
	numBlocks, err := e.admit(requests)
	if err != nil {
		return nil, err
	}
	r := &run{engine: e, results: make([]Result, len(requests))}
	for i := range requests {
		r.results[i].ID = requests[i].ID
		r.sequences = append(r.sequences, &sequence{request: &requests[i], result: &r.results[i]})
	}
	slices.SortStableFunc(r.sequences, func(a, b *sequence) int {
		return cmp.Compare(e.arrival(a.request), e.arrival(b.request))
	})
	r.ranks, err = e.newRanks(r.sequences, numBlocks)
	return r, err
}

// supervise lets all ranks serve until they stop, and returns the error of the first one that
// failed.
//
// Steps don't run under ctx itself: if it ended in the middle of a step, some ranks would have
// exchanged rows and others not. Instead, each rank tells the others of the interrupt with its next
// vote, so that all of them stop after the same step.
func (r *run) supervise(ctx context.Context) error {
	steps, fail := context.WithCancelCause(context.WithoutCancel(ctx))
	defer fail(nil)
	defer r.limit(ctx, fail)()
	var serving sync.WaitGroup
	for _, rank := range r.ranks {
		serving.Go(func() {
			if err := rank.serve(steps, ctx.Done()); err != nil {
				// This ends the exchanges of the others. The first error stays.
				fail(fmt.Errorf("rank %d: %w", rank.rank, err))
			}
			rank.leave()
		})
	}
	serving.Wait()
	err := context.Cause(steps)
	ofOthers := isRankError(err) || errors.Is(err, ErrInterrupted)
	if ofOthers && r.engine.config.Process != nil && ctx.Err() != nil {
		return context.Cause(ctx) // whoever is missing or stops was interrupted, as this process was
	}
	return err
}

// limit gives up on a step that has not ended StopGrace after ctx did, until stop is called.
func (r *run) limit(ctx context.Context, fail context.CancelCauseFunc) (stop func()) {
	served := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-served:
			return
		case <-ctx.Done():
		}
		timer := time.NewTimer(r.engine.config.StopGrace)
		defer timer.Stop()
		select {
		case <-served:
		case <-timer.C:
			fail(context.Cause(ctx))
		}
	})
	return func() {
		close(served)
		watching.Wait()
	}
}

// end returns the figures of a run that is over.
func (r *run) end() Stats {
	now := time.Now()
	for _, s := range r.sequences {
		s.endSpan(now)
	}
	for _, rank := range r.ranks {
		rank.noteLoad(context.Background(), now)
		rank.endLadder()
	}
	return collect(r.ranks, len(r.results))
}

// newRanks builds the ranks of this process and deals the requests out to them, in turn.
func (e *Engine) newRanks(sequences []*sequence, numBlocks int) ([]*rank, error) {
	cfg := &e.config
	here := cfg.here()
	ranks := make([]*rank, len(here))
	for d, number := range here {
		r := &rank{
			rank:   number,
			engine: e,
			scheduler: &scheduler{
				blocks:  newBlockAllocator(numBlocks, cfg.BlockSize),
				budget:  cfg.MaxNumBatchedTokens,
				maxSeqs: cfg.MaxNumSeqs,
				drafts:  cfg.NumSpeculativeTokens,
			},
			figures: newFigures(cfg.DataParallelSize),
			replan:  replan{every: cfg.Replan},
			load:    load{allBlocks: int64(numBlocks)},
		}
		tracers, meters := cfg.providers(r.rank)
		r.tracer = tracers.Tracer(scopeName)
		var err error
		if r.meters, err = newMeters(meters, r.rank); err != nil {
			return nil, fmt.Errorf("rank %d: metrics: %w", r.rank, err)
		}
		for i := d; i < len(sequences); i += len(here) {
			r.scheduler.waiting = append(r.scheduler.waiting, sequences[i])
		}
		ranks[d] = r
	}
	if err := e.place(ranks, e.target, numBlocks, cfg.Coordinators); err != nil || e.draft == nil {
		return ranks, err
	}
	return ranks, e.place(ranks, e.draft, numBlocks, cfg.DraftCoordinators)
}

// place puts a model on the ranks of this process. They share its experts, unless there are others
// elsewhere: then each has all of them. All ranks of a model agree among themselves; the ranks of another
// model have nothing to do with it.
func (e *Engine) place(ranks []*rank, b *blueprint, numBlocks int, coordinators []fwd.Coordinator) error {
	size, sp := e.config.DataParallelSize, e.config.SequenceParallel
	if coordinators == nil {
		var err error
		if coordinators, err = fwd.NewLocalGroup(size); err != nil {
			return err
		}
	}
	sharing := len(ranks)
	if e.config.Process != nil {
		sharing = 1
	}
	var group *expertGroup
	for i, r := range ranks {
		if i%sharing == 0 {
			group = newExpertGroup(sharing * sp)
			group.first, group.total = r.rank*sp, size*sp
			group.spread(len(b.model.Weights().Layers[0].Experts), sp)
		}
		on, observe := &r.target, func(ctx context.Context, rec *fwd.Record) {
			r.figures.observe(ctx, rec, sp)
			r.replan.observe(rec)
		}
		if b == e.draft {
			on, observe = &r.draft, func(_ context.Context, rec *fwd.Record) { r.figures.observeDraft(rec) }
		}
		var err error
		*on, err = newInstance(b, &e.config, r.rank, numBlocks, coordinators[i], group, observe)
		if err != nil {
			return err
		}
	}
	return nil
}
