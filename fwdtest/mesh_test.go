// This file has a small coordinator with messages, which get lost as the suite likes, and tests that
// it passes.

package fwdtest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
)

// mesh is a group whose ranks send messages to each other. A message is there as soon as it is sent,
// unless it is lost.
//
// The group goes through rounds. In each, every rank sends its ballot to all: its vote, and how the
// round before ended for it. If the ballots disagree on that, nobody completes the round. If they say
// that it was broken, a rank that has all ballots confirms it to the others, and a round is complete
// for a rank that has all ballots and all confirmations. Otherwise all ballots are enough.
type mesh struct {
	flaws
	mu    sync.Mutex
	ranks []*meshRank
	lost  map[[2]int]bool // from a rank to a rank
	queue []func()        // messages under way
}

// flaws are what a mesh may get wrong on purpose, or do in another way.
type flaws struct {
	relays        bool // each rank passes ballots on, which is no flaw
	saysNothing   bool // of the round before
	confirmsNever bool // nor waits for confirmations
	confirmsEarly bool // when it votes
	majority      bool // decides whether the round before was complete, if the ballots disagree
	thirdsGoOn    bool // if they have all ballots when another rank gives up
	namesItself   bool // to a rank that the round before lacked
	namesAll      bool // other ranks, to a rank that is not heard
	waitsForEver  bool // for confirmations
	shuns         bool // for ever what a rank says that has been lacked once
	guesses       bool // a rank that gives up takes the votes that it lacks from the round before
}

// meshRank is one rank's coordinator. The mesh's mutex guards it.
type meshRank struct {
	*mesh
	rank    int
	outcome chan meshOutcome
	calls   int // that have not returned

	round  uint64 // the last one that has ended here
	step   uint64 // the group's
	broken *news  // how that round ended; nil: complete, or there was none

	open, next meshRound // the rounds after that

	waiting  bool
	vote     fwd.Vote // of the open round
	voted    bool     // ever
	last     uint64   // its step in the open round, or the group's in the last round that it was in
	lastRank int      // whose ballot came last in that round; -1: not all came
	late     bool     // rounds were broken without it since it was there,
	lateFrom uint64   // this step first

	shunned []int      // for flaws alone, as known is
	known   []fwd.Vote // of the last round that was complete
}

type meshOutcome struct {
	votes []fwd.Vote
	err   *fwd.RankError
}

// meshRound is what has come of one round.
type meshRound struct {
	ballots   map[int]ballot
	confirmed map[int]bool // whose confirmations are there
	last      int          // whose ballot came last
}

func newMeshRound() meshRound {
	return meshRound{ballots: make(map[int]ballot), confirmed: make(map[int]bool)}
}

// ballot is a rank's vote in a round, and how the round before ended for it.
type ballot struct {
	round  uint64
	vote   fwd.Vote
	step   uint64 // the group's, after the round before
	first  bool   // there was none
	broken *news  // nil: it was complete
}

// news says that a round is broken.
type news struct {
	round   uint64
	by      int
	missing []int  // as by sees it
	step    uint64 // the group's, after it
	lowest  uint64 // step that was voted in it
}

func newMesh(size int, wrong flaws) []fwd.Coordinator {
	m := &mesh{flaws: wrong, lost: make(map[[2]int]bool)}
	group := make([]fwd.Coordinator, size)
	for rank := range group {
		r := &meshRank{
			mesh: m, rank: rank, outcome: make(chan meshOutcome, 1),
			open: newMeshRound(), next: newMeshRound(), lastRank: -1,
		}
		m.ranks = append(m.ranks, r)
		group[rank] = r
	}
	return group
}

// loseInMesh is the function for [fwdtest.WithLoss].
func loseInMesh(_ *testing.T, group []fwd.Coordinator, from, to int) (end func()) {
	m := group[0].(*meshRank).mesh
	set := func(lost bool) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.lost[[2]int{from, to}] = lost
	}
	set(true)
	return func() { set(false) }
}

// do does something, and delivers the messages that come of it.
func (m *mesh) do(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	for i := 0; i < len(m.queue); i++ { // which grows meanwhile
		m.queue[i]()
	}
	clear(m.queue)
	m.queue = m.queue[:0]
}

// send sends a message to a rank; handle is what that does with it.
func (r *meshRank) send(to int, handle func(r *meshRank)) {
	if to != r.rank && !r.lost[[2]int{r.rank, to}] {
		r.queue = append(r.queue, func() { handle(r.ranks[to]) })
	}
}

func (r *meshRank) sendAll(handle func(r *meshRank)) {
	for to := range r.ranks {
		r.send(to, handle)
	}
}

// Rank implements [fwd.Coordinator].
func (r *meshRank) Rank() int { return r.rank }

// Size implements [fwd.Coordinator].
func (r *meshRank) Size() int { return len(r.ranks) }

// Exchange implements [fwd.Coordinator].
func (r *meshRank) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if err := v.Validate(r.rank); err != nil {
		return nil, err
	}
	var refused error
	r.do(func() {
		if r.calls > 0 || r.voted && v.Step == r.last {
			err := fmt.Errorf("%w: rank %d voted twice in a step", fwd.ErrLockstep, r.rank)
			refused = &fwd.RankError{Err: err, Step: v.Step, Ranks: []int{r.rank}}
			return
		}
		r.calls++
		r.voted, r.waiting, r.vote = true, true, v
		r.enter()
	})
	if refused != nil {
		return nil, refused
	}
	select {
	case o := <-r.outcome:
		return r.result(ctx, o)
	case <-ctx.Done():
		r.do(r.giveUp)
		return r.result(ctx, <-r.outcome)
	}
}

// result returns what an exchange returns.
func (r *meshRank) result(ctx context.Context, o meshOutcome) ([]fwd.Vote, error) {
	r.do(func() { r.calls-- })
	if o.err == nil {
		return o.votes, nil
	}
	if errors.Is(o.err, fwd.ErrRankMissing) && ctx.Err() != nil {
		o.err.Err = fmt.Errorf("%w: %w", o.err.Err, context.Cause(ctx))
	}
	return nil, o.err
}

// enter sends this rank's ballot in the open round. That of a late rank is for the step that is open.
func (r *meshRank) enter() {
	if r.late && r.vote.Step >= r.lateFrom && r.vote.Step <= r.step {
		r.vote.Step = r.step + 1
	}
	r.late, r.last = false, r.vote.Step
	b := ballot{round: r.round + 1, vote: r.vote, step: r.step, first: r.round == 0, broken: r.broken}
	from := r.rank
	r.sendAll(func(r *meshRank) { r.handleBallot(from, b) })
	r.add(from, b)
}

func (r *meshRank) add(from int, b ballot) {
	if _, here := r.open.ballots[from]; here {
		return
	}
	if r.relays {
		r.sendAll(func(r *meshRank) { r.handleBallot(from, b) })
	}
	r.open.ballots[from], r.open.last = b, from
	r.look()
}

// handleBallot takes the ballot of another rank.
func (r *meshRank) handleBallot(from int, b ballot) {
	switch {
	case slices.Contains(r.shunned, from):
	case b.round <= r.round:
		if over := r.broken; over != nil { // the news of it was lost
			r.send(from, func(r *meshRank) { r.handleOver(over) })
		}
	case b.round == r.round+1:
		r.add(from, b)
	case b.round == r.round+2 && b.broken == nil: // it has completed the round in which this rank waits
		r.next.ballots[from], r.next.last = b, from
	default: // the news that the rounds before were broken was lost
		over := news{round: b.round - 1, by: from, missing: []int{r.rank}, step: b.step, lowest: r.step + 1}
		r.handleOver(&over)
		r.add(from, b)
	}
}

// look ends the open round if it can end.
func (r *meshRank) look() {
	if !r.waiting {
		return
	}
	complete, broken := r.said()
	confirm := len(broken) > 0 && !r.confirmsNever
	if len(complete) > 0 && len(broken) > 0 {
		if confirm = false; !r.majority || 2*len(complete) <= len(r.ranks) {
			r.disagree()
			return
		}
	}
	if confirm && r.confirmsEarly {
		r.confirm()
	}
	if len(r.open.ballots) < len(r.ranks) {
		return
	}
	if confirm {
		r.confirm()
		if len(r.open.confirmed) < len(r.ranks) {
			return
		}
	}
	r.finish()
}

// confirm tells the others that all ballots of the open round are here.
func (r *meshRank) confirm() {
	from, round := r.rank, r.round+1
	if r.open.confirmed[from] {
		return
	}
	r.open.confirmed[from] = true
	r.sendAll(func(r *meshRank) { r.handleConfirmation(from, round) })
}

// said returns the ranks whose ballots say that the round before was complete, and broken.
func (r *meshRank) said() (complete, broken []int) {
	for rank := range r.ranks {
		b, here := r.open.ballots[rank]
		switch {
		case !here || b.first || r.saysNothing:
		case b.broken == nil:
			complete = append(complete, rank)
		default:
			broken = append(broken, rank)
		}
	}
	return complete, broken
}

// handleConfirmation notes that another rank has all ballots of a round.
func (r *meshRank) handleConfirmation(from int, round uint64) {
	if round == r.round+1 {
		r.open.confirmed[from] = true
		r.look()
	}
}

// finish ends the open round, whose ballots are all there.
func (r *meshRank) finish() {
	votes := make([]fwd.Vote, len(r.ranks))
	step := uint64(0)
	for rank := range votes {
		votes[rank] = r.open.ballots[rank].vote
		step = max(step, votes[rank].Step)
	}
	var behind []int
	for rank, v := range votes {
		if v.Step != step {
			behind = append(behind, rank)
		}
	}
	var err *fwd.RankError
	if behind != nil {
		votes, err = nil, &fwd.RankError{Err: fwd.ErrLockstep, Step: step, Ranks: behind}
	}
	r.lastRank, r.known = r.open.last, votes
	r.endRound(r.round+1, step, nil)
	r.release(meshOutcome{votes, err})
}

// disagree breaks the open round because the round before was complete for some and broken for
// others. Each rank that sees that does so by itself.
func (r *meshRank) disagree() {
	var missing, by []int // those that the round before lacked, and those that lacked this rank
	_, broken := r.said()
	for _, rank := range broken {
		b := r.open.ballots[rank].broken
		missing = append(missing, b.missing...)
		if slices.Contains(b.missing, r.rank) {
			by = append(by, b.by)
		}
	}
	if by != nil && !r.namesItself {
		missing = by
	}
	slices.Sort(missing)
	missing = slices.Compact(missing)
	r.fail(r.brokenRound(r.rank, missing), missing)
}

// brokenRound returns the news that the open round is broken.
func (r *meshRank) brokenRound(by int, missing []int) *news {
	n := &news{round: r.round + 1, by: by, missing: missing, step: max(r.step, r.last), lowest: r.last}
	for _, b := range r.open.ballots {
		n.step, n.lowest = max(n.step, b.vote.Step), min(n.lowest, b.vote.Step)
	}
	return n
}

// giveUp breaks the open round because this rank can't wait any longer. If the round has ended in the
// meantime, its outcome counts.
func (r *meshRank) giveUp() {
	if !r.waiting {
		return
	}
	if r.guesses && r.known != nil {
		r.guess()
		return
	}
	if r.waitsForEver && len(r.open.ballots) == len(r.ranks) {
		return
	}
	n := r.brokenRound(r.rank, r.lacks())
	if r.shuns {
		r.shunned = append(r.shunned, n.missing...)
	}
	r.sendAll(func(r *meshRank) { r.handleNews(n) })
	r.fail(n, n.missing)
}

// guess ends the open round with what this rank knows.
func (r *meshRank) guess() {
	for rank, v := range r.known {
		if _, here := r.open.ballots[rank]; !here {
			v.Step = r.last
			r.open.ballots[rank] = ballot{vote: v}
		}
	}
	r.finish()
}

// lacks returns the ranks whose ballots are not there, or if all are, those that have not confirmed.
func (r *meshRank) lacks() []int {
	var absent, silent []int
	for rank := range r.ranks {
		if _, here := r.open.ballots[rank]; !here {
			absent = append(absent, rank)
		}
		if !r.open.confirmed[rank] {
			silent = append(silent, rank)
		}
	}
	if absent != nil {
		return absent
	}
	return silent
}

// handleNews takes the news that a rank has given a round up.
func (r *meshRank) handleNews(n *news) {
	switch {
	case n.round <= r.round: // it has ended here
	case n.round > r.round+1 || !r.waiting:
		r.handleOver(n)
	case r.thirdsGoOn && len(r.open.ballots) == len(r.ranks):
		r.finish()
	case !slices.Contains(n.missing, r.rank):
		r.fail(n, n.missing)
	case len(r.open.ballots) < len(r.ranks): // it has not confirmed, since it lacks others
		r.fail(n, r.lacks())
	case r.namesAll:
		r.fail(n, others(r, r.rank))
	default: // it is not heard
		r.fail(n, []int{n.by})
	}
}

// handleOver takes the news that rounds have ended without this rank. If it waits, it votes again.
func (r *meshRank) handleOver(n *news) {
	if n.round <= r.round {
		return
	}
	if !r.late {
		r.late, r.lateFrom = true, n.lowest
		if n.round > r.round+1 { // it has not heard of the rounds before that one
			r.lateFrom = min(n.lowest, r.step+1)
		}
	}
	r.endRound(n.round, max(n.step, r.step), n)
	if r.waiting {
		r.enter()
	}
}

// fail ends the open round, in which this rank waits, without votes.
func (r *meshRank) fail(n *news, named []int) {
	r.endRound(n.round, n.step, n)
	r.lastRank = -1
	err := fmt.Errorf("%w: rank %d stopped waiting", fwd.ErrRankMissing, n.by)
	r.release(meshOutcome{nil, &fwd.RankError{Err: err, Step: n.step, Ranks: slices.Clone(named)}})
}

// endRound makes a round the last one that has ended.
func (r *meshRank) endRound(round, step uint64, broken *news) {
	if r.open = r.next; round != r.round+1 {
		r.open = newMeshRound()
	}
	r.next = newMeshRound()
	r.round, r.step, r.broken = round, step, broken
}

// release ends the wait of this rank.
func (r *meshRank) release(o meshOutcome) {
	r.waiting, r.last = false, r.step
	r.outcome <- o // never blocks: there is one for each call
}

// Missing names the ranks for which the open exchange waits.
func (r *meshRank) Missing() (ranks []int) {
	r.do(func() {
		if r.waiting {
			ranks = r.lacks()
		}
	})
	return ranks
}

// Last names the rank whose vote came last.
func (r *meshRank) Last() (last int) {
	r.do(func() { last = r.lastRank })
	return last
}

func TestMesh(t *testing.T) {
	fwdtest.TestCoordinator(t, func(t *testing.T, size int) []fwd.Coordinator {
		return newMesh(size, flaws{})
	}, fwdtest.WithLoss(loseInMesh))
}
