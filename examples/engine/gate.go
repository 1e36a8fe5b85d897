package engine

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// gate decides before each step whether it takes place, the same for all ranks.
type gate interface {
	// next reports whether r takes another step, and returns when it starts, or early when ctx or the run ends.
	next(ctx context.Context, r *rank) (bool, error)
}

// localGate is the gate of ranks that share memory. The first rank to come decides, with what it knows then, and the others
// follow. That needs no waiting, so the ranks wait for each other only where Plan measures it. It may decide for a step that
// turns out to have nothing in it; then all ranks run dummy passes.
type localGate struct {
	ctx      context.Context // of Run: once it has ended, no further step starts
	arrivals []time.Time     // ascending
	finished *atomic.Int64   // requests, of all ranks

	mu   sync.Mutex
	step int
	runs bool
	at   time.Time // when the step starts
}

func newLocalGate(ctx context.Context, sequences []*sequence, finished *atomic.Int64) *localGate {
	g := &localGate{ctx: ctx, finished: finished}
	for _, s := range sequences {
		g.arrivals = append(g.arrivals, s.arrived)
	}
	return g
}

// next implements gate. A rank is never two steps ahead of another, since Plan holds it back, so one decision at a time is
// kept.
func (g *localGate) next(ctx context.Context, r *rank) (bool, error) {
	g.mu.Lock()
	if r.turn > g.step {
		g.step = r.turn
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
		case <-ctx.Done():
		}
	}
	return runs, nil
}

func (g *localGate) decide(now time.Time) {
	finished := int(g.finished.Load())
	g.at = now
	g.runs = finished < len(g.arrivals) && g.ctx.Err() == nil
	// What has finished has arrived. Where nothing else has, all ranks sleep until the next request comes.
	if g.runs && g.arrivals[finished].After(now) {
		g.at = g.arrivals[finished]
	}
}
