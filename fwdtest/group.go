package fwdtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// How long an exchange may take that must return: now, or at once. No clock is that exact on a busy machine, and a network
// takes its time.
const (
	patience = 10 * time.Second
	atOnce   = 2 * time.Second
)

// group is one group under test. Its ranks do as the contract says: each votes for the step after the last one that it
// knows of.
type group struct {
	*testing.T
	ranks  []fwd.Coordinator
	settle time.Duration
	salt   int      // in the votes, so that groups don't say the same
	step   uint64   // of the last round
	steps  []uint64 // the same as each rank knows it
	last   []*call  // of each rank
}

var salts atomic.Int64

func (s suite) group(t *testing.T, size int) *group {
	t.Helper()
	ranks := s.newGroup(t, size)
	if len(ranks) != size {
		t.Fatalf("a new group of %d ranks has %d coordinators", size, len(ranks))
	}
	return &group{
		T: t, ranks: ranks, settle: s.settle,
		salt:  int(salts.Add(1)%10_000) * 10_000,
		steps: make([]uint64, size), last: make([]*call, size),
	}
}

func (g *group) all() []int { return g.except() }

// except returns the other ranks.
func (g *group) except(ranks ...int) []int {
	var others []int
	for rank := range g.ranks {
		if !slices.Contains(ranks, rank) {
			others = append(others, rank)
		}
	}
	return others
}

// vote is a vote that tells groups, ranks and steps apart.
func (g *group) vote(rank int, step uint64) fwd.Vote {
	n := g.salt + 1000*rank + int(step%1000) + 1
	return fwd.Vote{Step: step, NumTokens: n, NumTokensPadded: n}
}

// votes are the votes of all ranks in one step.
func (g *group) votes(step uint64) []fwd.Vote {
	votes := make([]fwd.Vote, len(g.ranks))
	for rank := range votes {
		votes[rank] = g.vote(rank, step)
	}
	return votes
}

// differ says where votes are not the wanted ones.
func differ(got, want []fwd.Vote) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d votes, want %d", len(got), len(want))
	}
	for rank, v := range got {
		if !same(v, want[rank]) {
			return fmt.Errorf("the vote of rank %d is %+v, want %+v", rank, v, want[rank])
		}
	}
	return nil
}

// same reports whether two votes say the same. Whether a span context comes from elsewhere is not part of what is said.
func same(v, w fwd.Vote) bool {
	return v.Step == w.Step && v.NumTokens == w.NumTokens && v.NumTokensPadded == w.NumTokensPadded &&
		v.UBatch == w.UBatch && v.GraphMode == w.GraphMode &&
		v.SpanContext.WithRemote(false).Equal(w.SpanContext.WithRemote(false))
}

// restart lets ranks begin anew on the same coordinators.
func (g *group) restart(ranks ...int) {
	for _, rank := range ranks {
		g.steps[rank] = 0
	}
}

// call is one exchange of one rank.
type call struct {
	*group
	rank  int
	vote  fwd.Vote
	done  chan struct{}
	votes []fwd.Vote // these two once it is done
	err   error
}

func (c *call) String() string { return fmt.Sprintf("rank %d in step %d", c.rank, c.vote.Step) }

// send starts an exchange.
func (g *group) send(ctx context.Context, rank int, v fwd.Vote) *call {
	c := &call{group: g, rank: rank, vote: v, done: make(chan struct{})}
	running := make(chan struct{})
	go func() {
		defer close(c.done)
		close(running)
		c.votes, c.err = g.ranks[rank].Exchange(ctx, v)
	}()
	<-running
	return c
}

// come lets a rank come to a round with that vote.
func (g *group) come(ctx context.Context, rank int, v fwd.Vote) *call {
	g.last[rank] = g.send(ctx, rank, v)
	return g.last[rank]
}

// begin lets ranks come to their next steps, in no particular order.
func (g *group) begin(ctx context.Context, ranks ...int) []*call {
	var calls []*call
	for _, rank := range ranks {
		calls = append(calls, g.come(ctx, rank, g.vote(rank, g.steps[rank]+1)))
	}
	return calls
}

// beginInOrder lets ranks come to their next steps one after the other.
func (g *group) beginInOrder(ctx context.Context, ranks ...int) []*call {
	var calls []*call
	for i, rank := range ranks {
		if i > 0 {
			g.pause()
		}
		calls = append(calls, g.begin(ctx, rank)...)
	}
	return calls
}

// pause waits until what was sent has arrived.
func (g *group) pause() { time.Sleep(g.settle) }

// waiting checks, after a pause, that no call has returned.
func (g *group) waiting(calls []*call) {
	g.Helper()
	g.pause()
	for _, c := range calls {
		if c.isDone() {
			g.Fatalf("%v returned %+v, %v; want it to wait", c, c.votes, c.err)
		}
	}
}

func (c *call) isDone() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// returned waits for the call to return. One that does not is left behind.
func (c *call) returned(within time.Duration) {
	c.Helper()
	select {
	case <-c.done:
	case <-time.After(within):
		c.Fatalf("%v has not returned after %v%s", c, within, c.errs())
	}
}

// errs says which ranks have got an error, for which others may still wait.
func (g *group) errs() string {
	var text string
	for _, c := range g.last {
		if c != nil && c.isDone() && c.err != nil {
			text += fmt.Sprintf("; %v: %v", c, c.err)
		}
	}
	return text
}

// agree checks that the calls return the votes of all ranks, at the group's next step.
func (g *group) agree(calls []*call) {
	g.Helper()
	g.step++
	for _, c := range calls {
		c.agreed()
	}
}

// agreed checks that the call returns the votes of all ranks, at the group's step.
func (c *call) agreed() {
	c.Helper()
	step := c.group.step
	if c.returned(patience); c.err != nil {
		c.Fatalf("%v: %v; want the votes of step %d", c, c.err, step)
	}
	var want []fwd.Vote
	for _, last := range c.last {
		v := last.vote
		v.Step = step
		want = append(want, v)
	}
	if err := differ(c.votes, want); err != nil {
		c.Fatalf("%v: %v", c, err)
	}
	c.steps[c.rank] = step
}

// fail checks that the calls return an error of that kind, with the group's next step and those ranks. Who was missing has time
// to hear of it: over a network a rank that comes while the news is on its way can't know.
func (g *group) fail(calls []*call, kind error, ranks ...int) {
	g.Helper()
	g.step++
	for _, c := range calls {
		if err := c.failed(kind); !slices.Equal(err.Ranks, ranks) {
			g.Errorf("%v: error %v has ranks %v, want %v", c, err, err.Ranks, ranks)
		}
	}
	if kind == fwd.ErrRankMissing {
		g.pause()
	}
}

// failed checks that the call returns an error of that kind, with the group's step.
func (c *call) failed(kind error) *fwd.RankError {
	c.Helper()
	c.refused(kind)
	var err *fwd.RankError
	ok := errors.As(c.err, &err)
	if !ok {
		c.Fatalf("%v: error %v is not a RankError", c, c.err)
	}
	if err.Step != c.group.step {
		c.Fatalf("%v: error %v has step %d, want %d", c, err, err.Step, c.group.step)
	}
	c.steps[c.rank] = err.Step
	return err
}

// refused checks that the call returns at once, with an error of that kind alone and without votes.
func (c *call) refused(kind error) {
	c.Helper()
	if c.returned(atOnce); len(c.votes) != 0 || !errors.Is(c.err, kind) {
		c.Fatalf("%v: %+v, %v; want error %v", c, c.votes, c.err, kind)
	}
	for _, other := range []error{fwd.ErrInvalid, fwd.ErrLockstep, fwd.ErrRankMissing} {
		if other != kind && errors.Is(c.err, other) {
			c.Errorf("%v: error %v is %v too", c, c.err, other)
		}
	}
}

// together checks that the group is whole: all ranks come and get the votes of the next step.
func (g *group) together() {
	g.Helper()
	g.agree(g.begin(g.Context(), g.all()...))
}

// breakStep lets those ranks come, the first of which then goes away again.
func (g *group) breakStep(here ...int) {
	g.Helper()
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	calls := append(g.begin(ctx, here[0]), g.begin(g.Context(), here[1:]...)...)
	g.pause()
	cancel()
	g.fail(calls, fwd.ErrRankMissing, g.except(here...)...)
}
