package fwdtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// watch is where goroutines that exchange by themselves report: each its end, and a call that does
// not end.
type watch chan error

// run calls f with 0 to n-1 concurrently, and waits until they have returned. The first error fails
// the test and ends the contexts of the others.
func run(t *testing.T, n int, f func(ctx context.Context, w watch, i int) error) {
	t.Helper()
	runWhile(t, n, f, func() {})
}

// runWhile is run that calls meanwhile, in the goroutine of the test, before it waits.
func runWhile(t *testing.T, n int, f func(ctx context.Context, w watch, i int) error, meanwhile func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := make(watch, 2*n) // enough for all, also if nobody reads any more
	for i := range n {
		go func() { w <- f(ctx, w, i) }()
	}
	meanwhile()
	for range n {
		if err := <-w; err != nil {
			t.Fatal(err)
		}
	}
}

// exchange is c's Exchange, watched.
func (w watch) exchange(ctx context.Context, c fwd.Coordinator, v fwd.Vote) ([]fwd.Vote, error) {
	overdue := time.AfterFunc(patience, func() {
		w <- fmt.Errorf("rank %d in step %d has not returned after %v", c.Rank(), v.Step, patience)
	})
	defer overdue.Stop()
	return c.Exchange(ctx, v)
}

// take lets one rank take n steps, with a pause before each.
func (g *group) take(ctx context.Context, w watch, rank, n int, pause func()) error {
	for step := g.steps[rank] + 1; step <= g.steps[rank]+uint64(n); step++ {
		pause()
		votes, err := w.exchange(ctx, g.ranks[rank], g.vote(rank, step))
		if err == nil {
			err = differ(votes, g.votes(step))
		}
		if err != nil {
			return fmt.Errorf("rank %d in step %d: %w", rank, step, err)
		}
	}
	return nil
}

// takeAll lets all ranks take n steps on their own.
func (g *group) takeAll(n int, pause func()) {
	g.Helper()
	run(g.T, len(g.ranks), func(ctx context.Context, w watch, rank int) error {
		return g.take(ctx, w, rank, n, pause)
	})
	g.advance(n)
}

// advance says that all ranks have taken n steps.
func (g *group) advance(n int) {
	g.step += uint64(n)
	for rank := range g.steps {
		g.steps[rank] = g.step
	}
}

func noPause()     {}
func randomPause() { time.Sleep(rand.N(time.Millisecond)) }

// backToBack takes many steps, as fast as the ranks can.
func (s suite) backToBack(t *testing.T, size int) {
	s.group(t, size).takeAll(s.many(3000), noPause)
}

// backToBackOfRunners is backToBack in groups in which a Runner drives each rank.
func (s suite) backToBackOfRunners(t *testing.T, size int) { s.withRunners().backToBack(t, size) }

// paced takes many steps of ranks that don't come at the same time.
func (s suite) paced(t *testing.T, size int) {
	s.group(t, size).takeAll(s.many(500), randomPause)
}

// severalGroups checks that groups which run concurrently don't get each other's votes.
func (s suite) severalGroups(t *testing.T, size int) {
	const n = 5
	var groups []*group
	for range n {
		groups = append(groups, s.group(t, size))
	}
	steps := min(s.many(1000), s.many(1000*n)/n) // they share the time
	run(t, size*n, func(ctx context.Context, w watch, i int) error {
		return groups[i/size].take(ctx, w, i%size, steps, noPause)
	})
}

// chaos lets contexts end at any time, for a while. Every exchange must end, and the group must
// come together again when all is calm.
func (s suite) chaos(t *testing.T, size int) {
	c := chaos{s.group(t, size), newHistory(size)}
	length := time.Second
	if testing.Short() {
		length /= 10
	}
	run(t, len(c.ranks), func(ctx context.Context, w watch, rank int) error {
		ctx, cancel := context.WithTimeout(ctx, length)
		defer cancel()
		return c.rank(ctx, w, rank)
	})
	t.Logf("%d steps came together, and ranks got an error %d times", len(c.agreed), c.failed)
	c.comeTogether()
}

// chaos is a group in which contexts end, with what has come of it.
type chaos struct {
	*group
	*history
}

// rank lets one rank take steps until ctx ends. About every other exchange has a context that ends
// about when the others come.
func (c *chaos) rank(ctx context.Context, w watch, rank int) error {
	random := rand.New(rand.NewPCG(uint64(rank), 42))
	upTo := func(d time.Duration) time.Duration { return time.Duration(random.Int64N(int64(d))) }
	for ctx.Err() == nil {
		time.Sleep(pick(random, 0, upTo(c.settle/100)))
		own, cancel := context.WithTimeout(ctx, pick(random, time.Hour, upTo(c.settle/25)))
		sent := randomVote(random, c.steps[rank]+1)
		votes, err := w.exchange(own, c.ranks[rank], sent)
		cancel()
		if c.steps[rank], err = c.outcome(rank, sent, votes, err); err != nil {
			return fmt.Errorf("rank %d in step %d: %w", rank, sent.Step, err)
		}
	}
	return nil
}

// comeTogether lets all ranks come until they get the votes, and then take several steps. A few
// rounds may fail first because of what the ranks have not heard of yet.
func (g *group) comeTogether() {
	g.Helper()
	g.pause()
	for attempts := 1; !g.attempt(); attempts++ {
		if attempts == 5 {
			g.Fatalf("the group has not come together in %d attempts, when all is calm", attempts)
		}
		g.pause()
	}
	for range 5 {
		g.together()
	}
}

// attempt lets all ranks come, and reports whether they got the votes of one step.
func (g *group) attempt() bool {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), atOnce)
	defer cancel()
	whole := true
	for _, c := range g.begin(ctx, g.all()...) {
		c.returned(patience)
		var err *fwd.RankError
		if errors.As(c.err, &err) {
			g.Logf("%v: %v", c, err)
			g.steps[c.rank] = err.Step
			whole = false
			continue
		}
		if c.err != nil || len(c.votes) == 0 {
			g.Fatalf("%v: %d votes, error %v", c, len(c.votes), c.err)
		}
		g.steps[c.rank] = c.votes[0].Step
	}
	g.step = g.steps[0]
	return whole && slices.Max(g.steps) == slices.Min(g.steps)
}
