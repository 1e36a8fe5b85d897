package fwdtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// healsWithin is in how many steps, after messages have come again, the exchanges may still fail.
const healsWithin = 2

// link is the way of the messages from one rank to another.
type link struct{ from, to int }

// links returns every ordered pair of ranks, or some of them if there are many ranks.
func links(size int) (all []link) {
	if size > 4 {
		last, middle := size-1, size/2
		return []link{{0, 1}, {1, 0}, {0, last}, {last, 0}, {1, middle}, {middle, 1}, {last, middle}}
	}
	for from := range size {
		for to := range size {
			if to != from {
				all = append(all, link{from, to})
			}
		}
	}
	return all
}

// toOthers returns the links from a rank to all others.
func (g *group) toOthers(from int) (all []link) {
	for _, to := range g.except(from) {
		all = append(all, link{from, to})
	}
	return all
}

// fromOthers returns the links from all others to a rank.
func (g *group) fromOthers(to int) (all []link) {
	for _, from := range g.except(to) {
		all = append(all, link{from, to})
	}
	return all
}

// lossy is a group whose messages get lost, with what has come of it.
type lossy struct {
	*group
	*history
	lose  func(t *testing.T, group []fwd.Coordinator, from, to int) (end func())
	lost  []link   // now
	ends  []func() // which end these losses
	since uint64   // the lowest step in which they can be felt
}

// lossyGroup returns a new group that is whole. It skips the check if nothing can get lost.
func (s suite) lossyGroup(t *testing.T, size int) *lossy {
	t.Helper()
	if s.lose == nil {
		t.Skip("there is no option WithLoss, so nothing gets lost")
	}
	l := &lossy{group: s.group(t, size), history: newHistory(size), lose: s.lose}
	l.together()
	return l
}

// loses lets messages get lost from now on, in the open step and later.
func (l *lossy) loses(lost ...link) {
	for _, k := range lost {
		l.ends = append(l.ends, l.lose(l.T, l.ranks, k.from, k.to))
	}
	l.lost, l.since = append(l.lost, lost...), l.step+1
}

// losesNothing ends all losses.
func (l *lossy) losesNothing() {
	for _, end := range l.ends {
		end()
	}
	l.lost, l.ends = nil, nil
}

// unheardBy returns the ranks that a rank does not hear.
func (l *lossy) unheardBy(rank int) (ranks []int) {
	for _, k := range l.lost {
		if k.to == rank {
			ranks = append(ranks, k.from)
		}
	}
	slices.Sort(ranks)
	return ranks
}

// deafTo returns the ranks that do not hear a rank.
func (l *lossy) deafTo(rank int) (ranks []int) {
	for _, k := range l.lost {
		if k.from == rank {
			ranks = append(ranks, k.to)
		}
	}
	slices.Sort(ranks)
	return ranks
}

// attempt is one exchange of each rank, with a context of its own. It need not come to a good end.
type attempt struct {
	*lossy
	calls []*call              // by rank
	stop  []context.CancelFunc // ends the context
	blind []int                // ranks that may have given up before they knew why
}

// newAttempt opens an attempt, and lets ranks come to it. What was said in the one before has come by
// then, as far as it comes.
func (l *lossy) newAttempt(ranks ...int) *attempt {
	l.pause()
	a := &attempt{
		lossy: l, calls: make([]*call, len(l.ranks)), stop: make([]context.CancelFunc, len(l.ranks)),
	}
	a.join(ranks...)
	return a
}

// join lets more ranks come.
func (a *attempt) join(ranks ...int) {
	for _, rank := range ranks {
		var ctx context.Context
		ctx, a.stop[rank] = context.WithCancel(a.Context())
		a.calls[rank] = a.begin(ctx, rank)[0]
	}
}

// open returns which of these ranks still wait.
func (a *attempt) open(ranks []int) (open []int) {
	for _, rank := range ranks {
		if !a.calls[rank].isDone() {
			open = append(open, rank)
		}
	}
	return open
}

// giveUp ends the contexts of ranks. Their exchanges must return immediately.
func (a *attempt) giveUp(ranks ...int) {
	a.Helper()
	for _, rank := range ranks {
		a.stop[rank]()
	}
	a.returned(ranks...)
}

// returned waits for the exchanges of these ranks, which must return immediately.
func (a *attempt) returned(ranks ...int) {
	a.Helper()
	for _, rank := range ranks {
		a.calls[rank].returned(atOnce)
	}
}

// settled waits until all have returned, or wait only for ranks that they don't hear, or that don't hear
// others. Coordinators without Missing get the time that votes take.
func (a *attempt) settled() {
	a.Helper()
	if len(a.lost) > 0 {
		a.pause()
	}
	_, ok := a.ranks[0].(misser)
	for end := time.Now().Add(atOnce); time.Now().Before(end); time.Sleep(time.Millisecond) {
		open := a.open(a.all())
		if open == nil || len(a.lost) > 0 && (!ok || !slices.ContainsFunc(open, a.waitsForOthers)) {
			return
		}
	}
}

// waitsForOthers reports whether a rank waits for a rank that its error must not name.
func (a *attempt) waitsForOthers(rank int) bool {
	return !within(a.missing(rank), a.mayName(rank))
}

// within reports whether all ranks are among those.
func within(ranks, those []int) bool {
	return !slices.ContainsFunc(ranks, func(rank int) bool { return !slices.Contains(those, rank) })
}

// deafFirst ends the attempt as it ends if the ranks that do not hear others have the shortest
// patience: these report the step as broken, and everybody else knows of it. The ranks that are not
// heard have the longest, and must have heard by then who does not hear them.
func (a *attempt) deafFirst() (whole bool) {
	a.Helper()
	var deaf, unheard, others []int
	for rank := range a.ranks {
		switch {
		case a.unheardBy(rank) != nil:
			deaf = append(deaf, rank)
		case a.deafTo(rank) != nil:
			unheard = append(unheard, rank)
		default:
			others = append(others, rank)
		}
	}
	a.settled()
	if len(a.lost) > 0 {
		for range 2 {
			a.giveUp(deaf...)
			if a.pause(); a.open(others) == nil {
				break
			}
			a.again(deaf...) // they were a step behind the others, and did not hear that it was over
			if a.settled(); a.open(others) == nil {
				a.blind = append(a.blind, deaf...) // no, the others have heard of it late, and are not there
				break
			}
		}
		a.giveUp(deaf...)
		a.returned(others...)
	}
	if a.open(unheard) != nil { // in the next step: this one was broken without them
		a.again(slices.Concat(deaf, others)...)
		a.settled()
		a.giveUp(unheard...)
		a.blind = append(a.blind, deaf...)
		a.blind = append(a.blind, others...)
	}
	a.giveUp(a.all()...)
	whole = a.note(a.all()...)
	a.step = slices.Max(a.steps)
	return whole && slices.Min(a.steps) == a.step
}

// again lets ranks come again whose exchanges have returned.
func (a *attempt) again(ranks ...int) {
	a.Helper()
	a.note(ranks...)
	for _, rank := range ranks {
		a.stop[rank]()
	}
	a.join(ranks...)
}

// inTurn ends the attempt as ranks give up one after the other. Then they may not know yet why they
// have to wait.
func (a *attempt) inTurn(order []int) {
	a.Helper()
	a.settled()
	for _, rank := range order {
		a.giveUp(rank)
	}
	a.blind = order
	a.note(order...)
	a.step = slices.Max(a.steps)
}

// note checks and notes what has come of the exchanges of these ranks, and reports whether all of them
// got votes.
func (a *attempt) note(ranks ...int) (complete bool) {
	a.Helper()
	complete = true
	for _, rank := range ranks {
		c := a.calls[rank]
		step, err := a.outcome(rank, c.vote, c.votes, c.err)
		if err == nil && c.err == nil {
			err = differ(c.votes, a.said(step))
		}
		if err != nil {
			a.Fatalf("%v, with %s: %v%s", c, a.losses(), err, a.errs())
		}
		if c.err != nil && len(a.lost) > 0 && !slices.Contains(a.blind, rank) {
			a.namesThePair(c)
		}
		a.steps[rank] = step
		complete = complete && c.err == nil
	}
	return complete
}

// mayName returns the ranks that an error may name: to a rank that does not hear others, only those; to
// all others, ranks that are not heard or that do not hear. So it names the one to the other if there is
// one loss. The others can't always know which of the two it is, as if one of them passes votes on.
func (l *lossy) mayName(to int) (ranks []int) {
	if ranks = l.unheardBy(to); ranks != nil {
		return ranks
	}
	for _, k := range l.lost {
		ranks = append(ranks, k.from, k.to)
	}
	return slices.DeleteFunc(distinct(ranks), func(rank int) bool { return rank == to })
}

// namesThePair checks whom an error names.
func (l *lossy) namesThePair(c *call) {
	l.Helper()
	var named *fwd.RankError
	errors.As(c.err, &named) // note has seen that it is one
	if want := l.mayName(c.rank); !within(named.Ranks, want) {
		l.Errorf("%v, with %s: error %v has ranks %v, want ranks of %v%s",
			c, l.losses(), c.err, named.Ranks, want, l.errs())
	}
}

// losses says what is lost now.
func (l *lossy) losses() string {
	if len(l.lost) == 0 {
		return "nothing lost"
	}
	text := "lost"
	for i, k := range l.lost {
		if i == 4 {
			return text + ", ..."
		}
		text += fmt.Sprintf(" %d to %d", k.from, k.to)
	}
	return text
}

// nobodyAlone checks that the first step in which the losses can be felt is the only one that may be
// complete on some ranks and broken on others. In the later ones nobody gets the votes, unless all do:
// ranks may pass on what others say.
func (l *lossy) nobodyAlone() {
	l.Helper()
	if len(l.lost) == 0 {
		return
	}
	broken := l.since
	for broken < l.step && !slices.Contains(l.completeOn(broken), false) {
		broken++
	}
	for step := broken + 1; step <= l.step; step++ {
		if on := l.completeOn(step); slices.Contains(on, true) && slices.Contains(on, false) {
			l.Fatalf("only some ranks got the votes of step %d, although step %d was broken with %s: %v",
				step, broken, l.losses(), on)
		}
	}
}

// heal ends all losses. The group must be whole soon, and stay so.
func (l *lossy) heal() {
	l.Helper()
	l.nobodyAlone()
	l.losesNothing()
	for failed := 0; !l.newAttempt(l.all()...).deafFirst(); failed++ {
		if failed == healsWithin {
			l.Fatalf("the group is not whole %d steps after messages have come again%s", failed, l.errs())
		}
	}
	l.notApart()
	for range 2 {
		l.together()
	}
}

// notApart checks that no two ranks came apart in two steps in a row.
func (l *lossy) notApart() {
	l.Helper()
	if err := l.apart(); err != nil {
		l.Fatal(err)
	}
}

// lossBeforeTheVote checks losses that begin before anybody votes, and end after one step or after
// several.
func (s suite) lossBeforeTheVote(t *testing.T, size int) {
	l := s.lossyGroup(t, size)
	for i, k := range links(size) {
		l.loses(k)
		for range []int{1, 3, 4}[i%3] {
			l.newAttempt(l.all()...).deafFirst()
		}
		l.heal()
	}
}

// lossAfterFirstVotes checks losses that begin after the vote of a rank has come to all, whichever rank
// that is. In a large group it takes turns.
func (s suite) lossAfterFirstVotes(t *testing.T, size int) {
	l := s.lossyGroup(t, size)
	for i, k := range links(size) {
		firsts := []int{k.from, k.to, l.except(k.from, k.to)[0]}
		if size > 4 {
			firsts = firsts[i%3:][:1]
		}
		for _, first := range firsts {
			a := l.newAttempt(first)
			a.pause()
			l.loses(k)
			a.join(l.except(first)...)
			a.deafFirst()
			for range []int{1, 3}[i%2] {
				l.newAttempt(l.all()...).deafFirst()
			}
			l.heal()
		}
	}
}

// lossUnheardByAll lets no other rank hear one.
func (s suite) lossUnheardByAll(t *testing.T, size int) {
	s.lossOfSeveral(t, size, (*group).toOthers)
}

// lossHearsNobody lets one rank hear no other.
func (s suite) lossHearsNobody(t *testing.T, size int) {
	s.lossOfSeveral(t, size, (*group).fromOthers)
}

func (s suite) lossOfSeveral(t *testing.T, size int, of func(g *group, rank int) []link) {
	l := s.lossyGroup(t, size)
	for i, rank := range some(l.all()) {
		l.loses(of(l.group, rank)...)
		for range []int{1, 3}[i%2] {
			l.newAttempt(l.all()...).deafFirst()
		}
		l.heal()
	}
}

// lossGiveUpInTurn checks losses in which the rank that is not heard gives up first, or one that has no
// part in it does.
func (s suite) lossGiveUpInTurn(t *testing.T, size int) {
	l := s.lossyGroup(t, size)
	for i, k := range links(size) {
		order, others := []int{k.from, k.to}, l.except(k.from, k.to)
		if i%2 == 0 {
			order = append(order, others...)
		} else {
			order = append(others, order...)
		}
		l.loses(k)
		for range 3 {
			l.newAttempt(l.all()...).inTurn(order)
		}
		l.heal()
	}
}

// lossStays checks losses that begin while ranks take steps as they like, and never end.
func (s suite) lossStays(t *testing.T, size int) {
	for _, k := range links(size) {
		l := s.lossyGroup(t, size)
		l.losesWhileRunning(k)
		for range 3 {
			l.newAttempt(l.all()...).deafFirst()
		}
		l.nobodyAlone()
		l.notApart()
	}
}

// losesWhileRunning lets a loss begin while the ranks take steps. It returns when one of them, probably
// the one that does not hear another, has given up, or if nobody is disturbed for a while.
func (l *lossy) losesWhileRunning(k link) {
	running, stop := context.WithCancel(l.Context())
	defer stop()
	begun := make([]atomic.Uint64, len(l.ranks)) // the step of each rank
	runWhile(l.T, len(l.ranks), func(ctx context.Context, w watch, rank int) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(running, cancel)()
		patience := time.Hour
		if rank == k.to {
			patience = 4 * l.settle
		}
		for ctx.Err() == nil {
			randomPause()
			begun[rank].Store(l.steps[rank] + 1)
			if failed, err := l.exchange(ctx, w, rank, patience); failed || err != nil {
				stop()
				return err
			}
		}
		return nil
	}, func() {
		time.Sleep(l.settle)
		l.loses(k)
		for rank := range begun {
			l.since = max(l.since, begun[rank].Load())
		}
		select {
		case <-running.Done():
		case <-time.After(10 * l.settle):
			stop()
		}
	})
	l.step = slices.Max(l.steps)
}

// exchange is an exchange of one rank among ranks that take steps on their own. It reports whether
// that failed.
func (l *lossy) exchange(ctx context.Context, w watch, rank int, patience time.Duration) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	sent := l.vote(rank, l.steps[rank]+1)
	votes, failed := w.exchange(ctx, l.ranks[rank], sent)
	step, err := l.outcome(rank, sent, votes, failed)
	if err != nil {
		return true, fmt.Errorf("rank %d in step %d: %w", rank, sent.Step, err)
	}
	l.steps[rank] = step
	return failed != nil, nil
}

// lossComesAndGoes lets messages of changing ranks get lost for a while, as ranks take steps on their
// own.
func (s suite) lossComesAndGoes(t *testing.T, size int) {
	l := s.lossyGroup(t, size)
	length := max(time.Second, 40*l.settle)
	if testing.Short() {
		length /= 4
	}
	running, stop := context.WithTimeout(t.Context(), length)
	defer stop()
	runWhile(t, size, func(ctx context.Context, w watch, rank int) error {
		random := rand.New(rand.NewPCG(uint64(rank), 43))
		for running.Err() == nil {
			randomPause()
			patience := l.settle + time.Duration(random.Int64N(int64(4*l.settle)))
			if _, err := l.exchange(ctx, w, rank, patience); err != nil {
				return err
			}
		}
		return nil
	}, func() {
		random := rand.New(rand.NewPCG(uint64(size), 44))
		for running.Err() == nil {
			from := random.IntN(size)
			to := (from + 1 + random.IntN(size-1)) % size
			l.loses(pick(random, nil, []link{{from, to}}, []link{{from, to}}, l.toOthers(from), l.fromOthers(to))...)
			time.Sleep(time.Duration(random.Int64N(int64(4 * l.settle))))
			l.losesNothing()
		}
	})
	l.step = slices.Max(l.steps)
	t.Logf("%d steps came together, and ranks got an error %d times", len(l.agreed), l.failed)
	l.heal()
}
