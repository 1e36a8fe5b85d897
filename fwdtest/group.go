package fwdtest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// These are how long an exchange may take that must return, and one that must return immediately. A
// busy machine delays both, and a network takes its time.
const (
	patience = 10 * time.Second
	atOnce   = 2 * time.Second
)

// group is one group under test. Its ranks do as the contract says: each votes for the step after
// the last one that it knows of.
type group struct {
	*testing.T
	ranks  []fwd.Coordinator
	settle time.Duration
	salt   int      // in the votes, so that groups don't say the same
	step   uint64   // of the last round
	steps  []uint64 // the same, as far as each rank knows
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

// some returns those ranks, or a few of them if they are many.
func some(ranks []int) []int {
	if len(ranks) <= 4 {
		return ranks
	}
	return []int{ranks[0], ranks[len(ranks)/2], ranks[len(ranks)-1]}
}

// vote returns a vote that tells groups, ranks and steps apart. It is one that a Runner could give.
func (g *group) vote(rank int, step uint64) fwd.Vote {
	n := g.salt + 1000*rank + int(step%1000) + 1
	return fwd.Vote{Step: step, NumTokens: n, NumTokensPadded: n, NumReqs: 1, Note: uint64(n) << 32}
}

// votes returns the votes of all ranks in one step.
func (g *group) votes(step uint64) []fwd.Vote {
	votes := make([]fwd.Vote, len(g.ranks))
	for rank := range votes {
		votes[rank] = g.vote(rank, step)
	}
	return votes
}

// said returns the votes that the ranks have given last, for that step.
func (g *group) said(step uint64) []fwd.Vote {
	votes := make([]fwd.Vote, len(g.ranks))
	for rank, last := range g.last {
		votes[rank] = last.vote
		votes[rank].Step = step
	}
	return votes
}

// differ returns an error that says in what the votes are not the wanted ones.
func differ(got, want []fwd.Vote) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d votes, want %d", len(got), len(want))
	}
	for rank := range got {
		if !same(&got[rank], &want[rank]) {
			return fmt.Errorf("the vote of rank %d has %s", rank, difference(got[rank], want[rank]))
		}
	}
	return nil
}

// same reports whether two votes say the same. Whether a span context is remote is not part of
// that.
func same(v, w *fwd.Vote) bool {
	return v.Step == w.Step && v.NumTokens == w.NumTokens && v.NumTokensPadded == w.NumTokensPadded &&
		v.NumReqs == w.NumReqs && v.NumActiveLoRAs == w.NumActiveLoRAs &&
		v.Uniform == w.Uniform && v.ExcludeFull == w.ExcludeFull && v.Eager == w.Eager &&
		v.UBatch == w.UBatch && v.Idle == w.Idle && v.WarmUp == w.WarmUp &&
		v.GraphMode == w.GraphMode && v.Note == w.Note && v.Config == w.Config &&
		v.SpanContext.WithRemote(false).Equal(w.SpanContext.WithRemote(false))
}

// difference names the fields in which two votes differ.
func difference(got, want fwd.Vote) string {
	var fields []string
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		if one, other := g.Field(i).Interface(), w.Field(i).Interface(); !reflect.DeepEqual(one, other) {
			fields = append(fields, fmt.Sprintf("%s %v, want %v", g.Type().Field(i).Name, one, other))
		}
	}
	return strings.Join(fields, "; ")
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
	votes []fwd.Vote // this and err once it is done
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

// beginInOrder lets ranks come to their next steps one after the other. If they are many, only the first
// and the last ones come alone.
func (g *group) beginInOrder(ctx context.Context, ranks ...int) []*call {
	var calls []*call
	for i, rank := range ranks {
		if i > 0 && (i <= 2 || i >= len(ranks)-2) {
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
			g.Fatalf("%v returned %d votes, %v; want it to wait", c, len(c.votes), c.err)
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

// errs says which ranks have got an error: others may wait in vain because of it.
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
	if err := differ(c.votes, c.said(step)); err != nil {
		c.Fatalf("%v: %v", c, err)
	}
	c.steps[c.rank] = step
}

// fail checks that the calls return an error of that kind, with the group's next step and those
// ranks. It gives the ranks that were missing time to hear of it: over a network, a rank that comes
// while the news is on its way can't know.
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

// failed checks that the call returns a RankError of that kind, with the group's step.
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

// refused checks that the call returns immediately, with an error of that kind alone and without
// votes.
func (c *call) refused(kind error) {
	c.Helper()
	if c.returned(atOnce); len(c.votes) != 0 || !errors.Is(c.err, kind) {
		c.Fatalf("%v: %d votes, %v; want error %v", c, len(c.votes), c.err, kind)
	}
	for _, other := range []error{fwd.ErrInvalid, fwd.ErrLockstep, fwd.ErrRankMissing} {
		if other != kind && errors.Is(c.err, other) {
			c.Errorf("%v: error %v is also %v", c, c.err, other)
		}
	}
}

// together checks that the group is whole: all ranks come, and get the votes of the next step.
func (g *group) together() {
	g.Helper()
	g.agree(g.begin(g.Context(), g.all()...))
}

// breakStep lets those ranks come; then the first of them goes away again.
func (g *group) breakStep(here ...int) {
	g.Helper()
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	calls := append(g.begin(ctx, here[0]), g.begin(g.Context(), here[1:]...)...)
	g.pause()
	cancel()
	g.fail(calls, fwd.ErrRankMissing, g.except(here...)...)
}
