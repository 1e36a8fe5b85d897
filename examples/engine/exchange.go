package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"gonum.org/v1/gonum/mat"
)

// ErrRefused is wrapped by the error that every worker gets when what the workers brought to an
// exchange does not fit together. It means that they disagree about the step.
var ErrRefused = errors.New("refused exchange")

// expertGroup connects the workers over which the experts are spread: the workers of all ranks, or,
// if there are other processes, the workers of one rank. They are goroutines of this process,
// so an exchange is a meeting: everyone leaves a message, and the last to come lets all go on.
//
// A group breaks for good with its first error: workers that have lost each other can't go on
// together.
type expertGroup struct {
	// The group begins at worker first of the total workers of all ranks, which all have local sizes.
	first, total int
	owners       []int // the rank that has each expert of a layer

	mu     sync.Mutex
	size   int
	rounds map[int]*round // by microbatch, since those exchange at the same time
	passes []uint64       // how many passes each worker has ended
	err    error
	broken chan struct{} // closed when err is set
}

// round is one meeting.
type round struct {
	messages []*message // by worker; nil: has not come
	arrived  int
	last     int // the rank that came last, once all have come
	done     chan struct{}
}

// message is what one worker brings: rows to dispatch, or parts to combine.
type message struct {
	at     model.Place
	sizes  []int
	pass   uint64
	routed model.Routed
	parts  []*mat.Dense // nil: this is a dispatch
}

func (m *message) String() string {
	if m.parts == nil {
		return fmt.Sprintf("dispatch at %v", m.at)
	}
	return fmt.Sprintf("combine at %v", m.at)
}

// newExpertGroup returns a group of all workers there are.
func newExpertGroup(size int) *expertGroup {
	return &expertGroup{
		total:  size,
		size:   size,
		rounds: map[int]*round{},
		passes: make([]uint64, size),
		broken: make(chan struct{}),
	}
}

// expertWorker is one worker's end of a group. It implements [model.Exchanger].
type expertWorker struct {
	group  *expertGroup
	worker int // in the group
	rank   int // whose worker it is
}

// Dispatch implements [model.Exchanger].
func (w *expertWorker) Dispatch(
	ctx context.Context,
	at model.Place,
	sizes []int,
	rows model.Routed,
) ([]model.Routed, error) {
	messages, err := w.meet(ctx, &message{at: at, sizes: sizes, routed: rows})
	if err != nil {
		return nil, err
	}
	countSent(ctx, rows, w.group.owners)
	all := make([]model.Routed, len(messages))
	for i, m := range messages {
		all[i] = m.routed
	}
	return all, nil
}

// Combine implements [model.Exchanger].
func (w *expertWorker) Combine(
	ctx context.Context,
	at model.Place,
	sizes []int,
	parts []*mat.Dense,
) ([]*mat.Dense, error) {
	messages, err := w.meet(ctx, &message{at: at, sizes: sizes, parts: parts})
	if err != nil {
		return nil, err
	}
	own := make([]*mat.Dense, len(messages))
	for i, m := range messages {
		own[i] = m.parts[w.worker]
	}
	return own, nil
}

// rankWorkers are the workers of one rank. They work inside the rank's passes.
type rankWorkers []*expertWorker

// workersOf returns the workers of a rank that has sp of them: consecutive ones, so worker s of
// rank d is d·sp + s, the order of the local sizes.
func (g *expertGroup) workersOf(rank, sp int) rankWorkers {
	var workers rankWorkers
	for s := range sp {
		workers = append(workers, &expertWorker{group: g, worker: rank*sp + s - g.first, rank: rank})
	}
	return workers
}

// inPass is middleware that tells the group how each pass ended. So the others notice if a worker
// that they wait for has failed, or goes through fewer exchanges than they do.
func (ws rankWorkers) inPass(next fwd.ForwardFunc) fwd.ForwardFunc {
	return func(ctx context.Context) error {
		err := next(ctx)
		for _, w := range ws {
			w.group.endPass(w.worker, err)
		}
		return err
	}
}

// meet leaves m for the others and returns the messages of all workers once everyone has come. It
// tells fwd how long it has waited for the last rank to come: the passes of a step are equally long
// on all ranks, and this tells the rank that is waited for from those that wait.
func (w *expertWorker) meet(ctx context.Context, m *message) ([]*message, error) {
	g := w.group
	if ctx.Err() != nil {
		return nil, g.fail(fmt.Errorf("expert worker %d left at %v: %w", w.worker, m, context.Cause(ctx)))
	}
	began := time.Now()
	r, err := g.join(ctx, w, m)
	if err != nil {
		return nil, err
	}
	select {
	case <-r.done:
		if r.last != w.rank {
			fwd.Waited(ctx, r.last, began)
			countWait(ctx, r.last, time.Since(began))
		}
		return r.messages, nil
	case <-g.broken:
		return nil, g.err
	case <-ctx.Done():
		return nil, g.fail(fmt.Errorf("expert worker %d left at %v: %w", w.worker, m, context.Cause(ctx)))
	}
}

// join puts m into the round that the worker's pass, or microbatch, is in.
func (g *expertGroup) join(ctx context.Context, w *expertWorker, m *message) (*round, error) {
	worker := w.worker
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return nil, g.err
	}
	ubatch, _, _ := fwd.UBatch(ctx)
	r := g.rounds[ubatch]
	if r == nil {
		r = &round{messages: make([]*message, g.size), done: make(chan struct{})}
		g.rounds[ubatch] = r
	}
	m.pass = g.passes[worker]
	for other, ended := range g.passes {
		if ended > m.pass {
			return nil, g.failLocked(fmt.Errorf("%w: worker %d is at %v of pass %d, which worker %d has ended",
				ErrRefused, worker, m, m.pass+1, other))
		}
	}
	if r.messages[worker] != nil {
		return nil, g.failLocked(
			fmt.Errorf("%w: worker %d came twice: %v, %v", ErrRefused, worker, r.messages[worker], m),
		)
	}
	r.messages[worker] = m
	if r.arrived++; r.arrived < g.size {
		return r, nil
	}
	if err := g.verify(r.messages); err != nil {
		return nil, g.failLocked(err)
	}
	delete(g.rounds, ubatch)
	r.last = w.rank
	close(r.done)
	return r, nil
}

// endPass notes that worker has ended a pass. It must not leave anyone behind in it.
func (g *expertGroup) endPass(worker int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		g.failLocked(fmt.Errorf("expert worker %d failed: %w", worker, err))
		return
	}
	g.passes[worker]++
	for _, r := range g.rounds {
		for other, m := range r.messages {
			if m != nil && m.pass < g.passes[worker] {
				g.failLocked(fmt.Errorf("%w: worker %d is at %v of pass %d, which worker %d has ended",
					ErrRefused, other, m, m.pass+1, worker))
			}
		}
	}
}

func (g *expertGroup) fail(err error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failLocked(err)
}

// failLocked breaks the group and returns the error that it broke with first.
func (g *expertGroup) failLocked(err error) error {
	if g.err == nil {
		g.err = err
		close(g.broken)
	}
	return g.err
}

// verify checks what a network would not: that all workers mean the same exchange, and that each
// brought the rows that the others expect of it.
func (g *expertGroup) verify(messages []*message) error {
	var errs []error
	refuse := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...)))
	}
	first := messages[0]
	for w, m := range messages {
		switch {
		case m.String() != first.String():
			refuse("worker 0 is at %v, worker %d at %v", first, w, m)
		case len(m.sizes) != g.total:
			refuse("worker %d has sizes %v for %d workers", w, m.sizes, g.total)
		case !slices.Equal(m.sizes, first.sizes):
			refuse("%v: worker 0 has sizes %v, worker %d has %v", m, first.sizes, w, m.sizes)
		case m.parts == nil:
			size := m.sizes[g.first+w]
			if rows, _ := m.routed.Rows.Dims(); rows != size || len(m.routed.Experts) != rows {
				refuse("%v: worker %d brought %d rows and %d choices of experts, its local size is %d", m, w, rows,
					len(m.routed.Experts), size)
			}
		case len(m.parts) != g.size:
			refuse("%v: worker %d brought parts for %d of %d workers", m, w, len(m.parts), g.size)
		default:
			for to, part := range m.parts {
				size := m.sizes[g.first+to]
				if rows, _ := part.Dims(); rows != size*model.TopK {
					refuse("%v: worker %d brought %d rows for worker %d, want %d", m, w, rows, to, size*model.TopK)
				}
			}
		}
	}
	return errors.Join(errs...)
}
