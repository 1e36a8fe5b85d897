package engine

import (
	"context"
	"sync"
	"time"

	"github.com/forwardctx/fwd/examples/model"
)

// traffic counts what passes between a rank's experts and those of the others. It is in the context
// of the rank's passes, so that all its workers, microbatches and models find it, and warm-up passes
// don't count.
type traffic struct {
	mu    sync.Mutex
	waits []Wait // by the rank that came last, of all workers
	sent  []int  // rows, by the rank that has the expert
}

func newTraffic(ranks int) *traffic {
	return &traffic{waits: make([]Wait, ranks), sent: make([]int, ranks)}
}

type trafficKey struct{}

// in returns a context in which t counts.
func (t *traffic) in(ctx context.Context) context.Context {
	return context.WithValue(ctx, trafficKey{}, t)
}

// countWait notes in what counts in ctx that a worker has waited for a rank.
func countWait(ctx context.Context, last int, waited time.Duration) {
	if t, ok := ctx.Value(trafficKey{}).(*traffic); ok {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.waits[last].Experts += waited
		t.waits[last].ExpertTimes++
	}
}

// countSent notes rows that have been sent to their experts, whose ranks are owners.
func countSent(ctx context.Context, rows model.Routed, owners []int) {
	if t, ok := ctx.Value(trafficKey{}).(*traffic); ok {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, experts := range rows.Experts {
			for _, expert := range experts {
				t.sent[owners[expert]]++
			}
		}
	}
}

// spread says which ranks have a layer's experts.
func (g *expertGroup) spread(experts, sp int) {
	g.owners = make([]int, experts)
	for w := range g.size {
		for e := w * experts / g.size; e < (w+1)*experts/g.size; e++ {
			g.owners[e] = (g.first + w) / sp
		}
	}
}
