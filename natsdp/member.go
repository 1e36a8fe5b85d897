package natsdp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/forwardctx/fwd"
)

// member is one rank's part in the protocol, apart from the network: it is told what comes in, and
// is given a function to send.
//
// The group goes through rounds. In each, every rank publishes its vote to all. A rank that has the
// votes of all knows how the round ends, without asking anybody: with the votes, or in ErrLockstep
// if their steps differ. A rank that can't wait any longer ends the round too, and tells the
// others. Rounds are numbered, and a vote belongs to one of them. So votes never mix, whatever is
// lost, comes twice, or comes late. Steps could not serve for that, since ranks that restart vote
// for low ones again.
//
// A rank may be started again while its last process lives on, cut off from the others. So a vote
// says which lives of all ranks its sender counts, and a round is complete only if all votes agree
// on that. A rank votes once in a round: if it learns of a new life while its vote is there, it gives
// the round up, since the last life may have completed it, and votes again in the next one. So all
// that complete a round have the same votes, of the same processes.
//
// Messages get lost. A rank that waits sends its vote again from time to time. A rank that has that
// round behind it answers how the round ended: with its own vote if the votes of all were there,
// otherwise with the news that the round is broken. A rank that finds out that it has been left
// behind votes again, in the round that is open now.
type member struct {
	group uint64 // see hashGroup
	rank  int
	size  int

	// send sends to a rank, or toAll. It never waits, and it keeps the message.
	send func(to int, message []byte)

	log *slog.Logger // says what happens to the group; nothing that happens in each step

	busy    atomic.Bool // in exchange
	outcome chan outcome
	resend  *time.Timer
	closing chan struct{} // closed when the rank leaves

	mu    sync.Mutex
	epoch uint64 // of this life of the rank
	stats Stats
	peers []peer // by rank

	// The last round that has ended, as far as this rank knows.
	round    uint64
	step     uint64 // the group's
	complete bool   // the votes of all were there
	answer   []byte // to a rank that is still in that round; nil: only that it is over

	// The votes of rounds round+1 and round+2. Another rank may have the next round behind it already
	// when its vote in the one after comes.
	open, next gathering

	// down says that there is no connection: what still comes in was said before. cut says that it was
	// lost while the round was open, so that votes may be missing.
	down, cut bool

	// This rank's vote in the open round.
	waiting bool
	vote    fwd.Vote
	sent    []byte // as a message

	voted bool   // ever
	last  uint64 // its step in the open round, otherwise the group's in the last round that it was in

	lastRank int // whose vote came last here in the last round that it was in; -1: not all came, or no round

	// late says that rounds have ended without this rank since it was there. Its vote goes to the step
	// that is open now if it is for lateFrom or a later step.
	late     bool
	lateFrom uint64

	strangers limit // answers to those who are no other rank of this group

	phase     phase
	contested bool          // another process has, or had, this rank
	former    []uint64      // epochs that this life of the rank had before
	leaving   bool          // it votes no more
	dead      error         // why it can't take part any more
	changed   chan struct{} // something may have happened for which join or leave waits
}

// toAll is the address of messages for every rank.
const toAll = -1

// peer is what is known of another rank.
type peer struct {
	epoch uint64 // of the life that counts; 0: none
	asked uint64 // epoch of the life that has asked last
	heard bool   // it has answered, see join
	gone  bool   // it has left
	ended uint64 // the last round that it knows to have ended

	// Rounds up to taken may have votes of an earlier life of the rank. They ended at most at step.
	taken, step uint64

	otherSize int   // that it has said last, see handleOtherSize; 0: none
	answers   limit // of answers to it
}

// limit bounds answers: whoever floods a rank does not make it flood others. A rank that waits asks
// far less often, and asks again for an answer that it did not get.
type limit struct {
	began time.Time // of the present interval
	count int       // of answers in it
}

const (
	limitInterval = resendFirst
	limitAnswers  = 16 // in an interval
)

// allow reports whether another answer may be sent now, and counts it.
func (l *limit) allow() bool {
	if now := time.Now(); now.Sub(l.began) >= limitInterval {
		*l = limit{began: now}
	}
	l.count++
	return l.count <= limitAnswers
}

// gathering is the votes of one round.
type gathering struct {
	votes []fwd.Vote
	lives []uint64 // what the votes say of them, see hashLives
	here  []bool
	count int
	last  int // the rank whose vote came last
}

func newGathering(size int) gathering {
	return gathering{votes: make([]fwd.Vote, size), lives: make([]uint64, size), here: make([]bool, size)}
}

func (g *gathering) add(rank int, v fwd.Vote, lives uint64) {
	g.votes[rank], g.lives[rank], g.here[rank], g.last = v, lives, true, rank
	g.count++
}

// lacks returns the ranks whose votes are not there, or that count other lives than this one. They
// vote again when they have heard of the others' lives, or this rank does.
func (g *gathering) lacks(lives uint64) (ranks []int) {
	for rank, here := range g.here {
		if !here || g.lives[rank] != lives {
			ranks = append(ranks, rank)
		}
	}
	return ranks
}

func (g *gathering) remove(rank int) {
	if g.here[rank] {
		g.here[rank] = false
		g.count--
	}
}

// highest returns the highest step of a vote, or 0 if none is there.
func (g *gathering) highest() (step uint64) {
	for rank, here := range g.here {
		if here {
			step = max(step, g.votes[rank].Step)
		}
	}
	return step
}

// reset empties a gathering. It takes a new slice, since a caller may have been given the old one.
func (g *gathering) reset() {
	clear(g.here)
	g.votes, g.count = make([]fwd.Vote, len(g.here)), 0
}

// outcome is how a round ended for the rank that waits.
type outcome struct {
	votes []fwd.Vote
	err   error
}

func newMember(group string, rank, size int, send func(to int, message []byte)) *member {
	return &member{
		group: hashGroup(group), rank: rank, size: size, send: send,
		epoch:   newEpoch(),
		peers:   make([]peer, size),
		open:    newGathering(size),
		next:    newGathering(size),
		outcome: make(chan outcome, 1),
		resend:  time.NewTimer(time.Hour),
		closing: make(chan struct{}),
		log:     slog.New(slog.DiscardHandler),
		changed: make(chan struct{}, 1),

		contested: size == 1, // no other rank could tell
		lastRank:  -1,
	}
}

// newEpoch returns a number for a life of a rank. Its upper bits are the time, so that a later life
// has a larger number. The lower ones are random, for processes that start at the same time.
func newEpoch() uint64 {
	const chance = 1<<16 - 1
	return uint64(time.Now().UnixNano())&^chance | rand.Uint64()&chance
}

// message returns a message of that kind with this rank's state.
func (m *member) message(k kind) message {
	return message{
		kind: k, group: m.group, size: m.size, rank: m.rank, epoch: m.epoch, round: m.round, step: m.step,
	}
}

func (m *member) sendMessage(to int, msg message) { m.send(to, msg.encode()) }

// exchange is the Exchange of [fwd.Coordinator].
func (m *member) exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if ctx == nil { // noticed later, it would leave a vote behind
		panic("natsdp: Exchange with a nil context")
	}
	if err := v.Validate(m.rank); err != nil {
		return nil, err
	}
	if !m.busy.CompareAndSwap(false, true) {
		return nil, twice(m.rank, v.Step)
	}
	defer m.busy.Store(false)
	if err := m.begin(v); err != nil {
		return nil, err
	}
	return m.wait(ctx)
}

// wait waits for the end of the round, and breaks it when ctx ends first.
func (m *member) wait(ctx context.Context) ([]fwd.Vote, error) {
	interval := resendFirst
	m.resend.Reset(interval)
	defer m.resend.Stop()
	done, closing := ctx.Done(), m.closing
	for {
		select {
		case o := <-m.outcome:
			return o.votes, withCause(o.err, m.cause(ctx))
		case <-m.resend.C:
			m.again()
			interval = min(2*interval, resendMost)
			m.resend.Reset(interval)
			continue
		case <-done:
		case <-closing:
		}
		m.breakRound() // which leaves the outcome there
		done, closing = nil, nil
	}
}

// cause returns what keeps this rank from waiting on, or nil.
func (m *member) cause(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case <-m.closing:
		return ErrClosed
	default:
		return nil
	}
}

// withCause adds the cause that ended this rank's own wait, if any, to the error of a broken round.
func withCause(err, cause error) error {
	if rankErr, ok := err.(*fwd.RankError); ok && cause != nil && errors.Is(rankErr.Err, fwd.ErrRankMissing) {
		rankErr.Err = fmt.Errorf("%w: %w", rankErr.Err, cause)
	}
	return err
}

// begin gives this rank's vote. The end of the round comes out of m.outcome.
func (m *member) begin(v fwd.Vote) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil {
		return m.dead
	}
	if m.leaving {
		return ErrClosed
	}
	if m.voted && v.Step == m.last {
		return twice(m.rank, v.Step)
	}
	if most := m.mostStep(); v.Step > most {
		return invalidf("rank %d votes for step %d, but the group is at step %d; want at most %d",
			m.rank, v.Step, m.step, most)
	}
	m.voted, m.waiting = true, true
	m.enter(v)
	return nil
}

func twice(rank int, step uint64) error {
	return &fwd.RankError{
		Err:   fmt.Errorf("%w: rank %d voted twice in a step", fwd.ErrLockstep, rank),
		Step:  step,
		Ranks: []int{rank},
	}
}

// enter puts this rank's vote into the open round. A late rank votes for the step that is open now,
// unless its Runner has been restarted: that one must learn where the group is.
func (m *member) enter(v fwd.Vote) {
	if m.late && v.Step >= m.lateFrom && v.Step <= m.step {
		v.Step = m.step + 1
	}
	m.vote, m.last, m.late = v, v.Step, false
	m.open.add(m.rank, v, m.lives())
	m.sendVote()
	m.endIfFull()
}

// sendVote sends this rank's vote to all.
func (m *member) sendVote() {
	msg := m.message(kindVote)
	msg.round, msg.vote, msg.lives = m.round+1, m.vote, m.open.lives[m.rank]
	msg.complete, msg.asks = m.complete, m.cut
	m.sent = msg.encode()
	m.send(toAll, m.sent)
}

// interrupted notes that the connection is lost or, if back is true, that it is there again. What
// the others said before may not hold any more: they may have given the round up, and others may
// have taken their places. So their votes count only if they are said again.
func (m *member) interrupted(back bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down, m.cut = !back, true
	for rank := range m.peers {
		if rank != m.rank {
			m.open.remove(rank)
			m.next.remove(rank)
		}
	}
	if back && m.waiting {
		m.stats.Resent++
		m.sendVote()
	}
}

// lives returns the number that stands for the lives that count for this rank.
func (m *member) lives() uint64 {
	return hashLives(func(yield func(uint64) bool) {
		for rank := range m.peers {
			epoch := m.peers[rank].epoch
			if rank == m.rank {
				epoch = m.epoch
			}
			if !yield(epoch) {
				return
			}
		}
	})
}

// missingVotes returns the ranks whose votes the open exchange waits for, or nil if none is open.
func (m *member) missingVotes() (ranks []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.waiting {
		return nil
	}
	return m.open.lacks(m.open.lives[m.rank])
}

// lastVote returns whose vote came last in the latest exchange that has ended, see lastRank.
func (m *member) lastVote() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lastRank
}

// again sends this rank's vote again, if it waits.
func (m *member) again() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting {
		m.stats.Resent++
		m.send(toAll, m.sent)
	}
}

// endIfFull ends the open round if the votes of all are there and count the same lives. All ranks
// come to the same end.
func (m *member) endIfFull() {
	if m.open.count < m.size || m.open.lacks(m.open.lives[m.rank]) != nil {
		return
	}
	votes, step := m.open.votes, m.last
	var err error
	for i := range votes {
		if votes[i].Step != step {
			_, err = fwd.Agree(votes, 0) // whose error says at which steps the ranks are
			break
		}
	}
	if rankErr := (*fwd.RankError)(nil); errors.As(err, &rankErr) {
		votes, step = nil, rankErr.Step
	}
	m.answer, m.lastRank = m.sent, m.open.last
	m.endRound(m.round+1, step)
	m.complete, m.last = true, step
	m.release(outcome{votes, err})
}

// endRound makes round the last one that has ended.
func (m *member) endRound(round, step uint64) {
	if round == m.round+1 {
		m.open, m.next = m.next, m.open
	} else {
		m.open.reset()
	}
	m.next.reset()
	m.round, m.step, m.cut = round, step, false
}

// release ends the wait of this rank.
func (m *member) release(o outcome) {
	m.waiting = false
	m.outcome <- o // never blocks: a rank waits once a round, and takes the outcome before it votes again
}

// breakRound ends the open round because this rank can't wait any longer. If the round has ended in
// the meantime, its outcome counts.
func (m *member) breakRound() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.waiting {
		return
	}
	msg := m.message(kindBroken)
	msg.round, msg.by, msg.lowest = m.round+1, m.rank, m.last
	msg.missing = m.open.lacks(m.open.lives[m.rank])
	msg.step = max(msg.step, m.open.highest()) // not below what a restarted rank may have missed
	for rank, here := range m.open.here {
		if here {
			msg.lowest = min(msg.lowest, m.open.votes[rank].Step)
		}
	}
	m.stats.Broken++
	m.sendMessage(toAll, msg)
	m.fail(&msg)
}

// fail ends the open round, in which this rank waits, without the votes of all.
func (m *member) fail(msg *message) {
	answer := *msg
	answer.rank, answer.epoch = m.rank, m.epoch
	m.answer = answer.encode()
	m.endRound(msg.round, msg.step)
	m.complete, m.last, m.lastRank = false, msg.step, -1
	m.log.Warn("a step is broken", "step", msg.step, "by", msg.by, "missing", msg.missing)
	m.release(outcome{err: &fwd.RankError{
		Err:   fmt.Errorf("%w: rank %d stopped waiting%s", fwd.ErrRankMissing, msg.by, m.resized(msg.missing)),
		Step:  msg.step,
		Ranks: msg.missing,
	}})
}

// resized says which of the ranks that are missing has gone on in a group of another size, if any
// has.
func (m *member) resized(missing []int) string {
	for _, rank := range missing {
		if p := &m.peers[rank]; p.gone && p.otherSize != 0 {
			return fmt.Sprintf("; rank %d has left, and says that the group has %d ranks now, not %d",
				rank, p.otherSize, m.size)
		}
	}
	return ""
}

// leftBehind notes that the group has ended rounds without this rank. If this rank waits, it votes
// again.
func (m *member) leftBehind(round, step, lowest uint64) {
	if !m.late {
		m.late, m.lateFrom = true, lowest
	}
	m.endRound(round, max(step, m.step))
	m.complete, m.answer = false, nil
	if m.waiting {
		m.enter(m.vote)
	}
}

// handle takes a message that came in on the subject of rank from. It is for this rank alone if
// direct, otherwise for all.
func (m *member) handle(from int, direct bool, data []byte) {
	msg, body, err := decodeHeader(data)
	if err == nil && msg.group == m.group && msg.size == m.size && msg.rank == from {
		err = msg.decodeBody(body)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil || m.down {
		return
	}
	switch {
	case err != nil:
		m.handleBad(from, err)
	case msg.group != m.group || msg.rank != from:
		m.stats.Foreign++
	case msg.size != m.size:
		m.handleOtherSize(&msg)
	case !m.credible(&msg):
		m.handleImplausible(&msg)
	case msg.rank == m.rank:
		m.handleOwnRank(&msg)
	case msg.kind == kindHello || msg.kind == kindClaim:
		m.handleHello(&msg)
	case msg.kind == kindBye:
		m.handleBye(&msg)
	case msg.kind == kindState && !msg.holds: // its sender may still have to give way to another process
		m.handleState(&m.peers[msg.rank], &msg)
	case msg.epoch < m.peers[msg.rank].epoch:
		m.stats.Stale++
		m.tellStale(&msg)
	default:
		m.handlePeer(&msg, direct)
	}
}

// credible reports whether an honest rank can send a message. The numbers of a group only grow, so
// one that is near their end would leave it none, even after the rank that said so is replaced.
//
// Rounds take longer than a microsecond. So a group can't have come further than the microseconds
// since 1970, and whoever pushes it there leaves it one for each microsecond to come. Epochs are
// nanoseconds since 1970. The clocks of hosts differ, by less than a day.
func (m *member) credible(msg *message) bool {
	return msg.round <= uint64(time.Now().Add(clocksDiffer).UnixMicro()) &&
		max(msg.step, msg.vote.Step) <= m.mostStep() &&
		max(msg.epoch, msg.holder) <= latestEpoch()
}

// handleImplausible counts a message that no honest rank can have sent, unless a clock is wrong:
// whoever joins with such a clock learns it.
func (m *member) handleImplausible(msg *message) {
	m.stats.Implausible++
	if msg.rank == m.rank || msg.epoch <= latestEpoch() {
		return
	}
	if (msg.kind == kindHello || msg.kind == kindClaim) && m.strangers.allow() {
		answer := m.message(kindState)
		answer.ahead, answer.asker = true, msg.epoch
		m.sendMessage(msg.rank, answer)
	}
	m.refuse("the clock of rank %d is more than %v behind that of rank %d; set the clocks",
		m.rank, clocksDiffer, msg.rank)
}

// foreign counts a message that has no sender.
func (m *member) foreign() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Foreign++
}

// clocksDiffer is the most by which the clocks of two hosts may differ.
const clocksDiffer = 24 * time.Hour

// latestEpoch returns the largest epoch that a life may have.
func latestEpoch() uint64 { return uint64(time.Now().Add(clocksDiffer).UnixNano()) }

// mostStep returns the highest step that a vote may be for, see maxJump. A rank that joins does not
// know yet where the group is.
func (m *member) mostStep() uint64 {
	if m.phase != joined {
		return maxCounter - maxCounter/maxJump
	}
	return m.step + (maxCounter-m.step)/maxJump
}

// handleOtherSize takes a message of a rank that has another size of the group in its configuration,
// or in whose group this one was left behind when it changed its size.
func (m *member) handleOtherSize(msg *message) {
	m.stats.Foreign++
	if msg.rank < m.size {
		m.peers[msg.rank].otherSize = msg.size
	}
	if msg.kind == kindBye { // of the group's last life, which had another size
		return
	}
	if (msg.kind == kindHello || msg.kind == kindClaim) && m.strangers.allow() {
		m.sendMessage(msg.rank, m.message(kindState)) // which tells it the size
	}
	m.refuse("rank %d says that the group has %d ranks, rank %d says %d; give all the same Config.Size",
		msg.rank, msg.size, m.rank, m.size)
}

func (m *member) handleBad(from int, err error) {
	if v := (versionError{}); errors.As(err, &v) {
		m.stats.Foreign++
		if v.asks && m.strangers.allow() {
			m.sendMessage(from, m.message(kindState)) // which tells it the version
		}
		m.refuse("rank %d sends %v", from, v)
		return
	}
	m.stats.Malformed++
}

// handlePeer takes a message of another rank.
func (m *member) handlePeer(msg *message, direct bool) {
	p := &m.peers[msg.rank]
	if msg.epoch > p.epoch {
		m.newLife(msg)
	}
	switch msg.kind {
	case kindVote:
		p.ended = max(p.ended, msg.round-1)
		m.handleVote(msg, direct)
	case kindBroken:
		p.ended = max(p.ended, msg.round)
		m.handleBroken(msg)
	case kindState:
		p.ended = max(p.ended, msg.round)
		m.handleState(p, msg)
	}
	m.signal()
}

// handleBye notes that a rank has left, or that a process which has asked for it gives up.
func (m *member) handleBye(msg *message) {
	p := &m.peers[msg.rank]
	if p.asked == msg.epoch {
		p.asked = 0
		p.heard = p.heard && p.epoch != 0 // from the process that has the rank
	}
	if p.epoch == msg.epoch {
		p.gone, p.heard = true, false
		m.log.Info("a rank has left", "other", msg.rank)
	}
	m.signal()
}

// tellStale tells a process that another has its rank now. The other process, which hears the same
// messages, tells it too, unless it has ended meanwhile.
func (m *member) tellStale(msg *message) {
	if m.phase != joined || !m.peers[msg.rank].answers.allow() {
		return
	}
	state := m.state()
	state.asker, state.holder = msg.epoch, m.peers[msg.rank].epoch
	m.sendMessage(msg.rank, state)
}

// newLife notes that a rank has been started again. The votes of its last life don't count any
// more: some ranks may have them, and others not. Nor can the rank vote in a round in which this
// rank waits: its last life may have had the votes of all there, with a vote of its own that came
// to nobody. So this rank gives that round up.
func (m *member) newLife(msg *message) {
	old := m.peers[msg.rank]
	life := peer{
		epoch: msg.epoch, asked: old.asked, taken: old.taken, step: old.step, answers: old.answers,
	}
	for i, g := range []*gathering{&m.open, &m.next} {
		voter := msg.rank
		if !g.here[voter] && old.epoch != 0 {
			voter = m.rank
		}
		if g.here[voter] {
			life.taken, life.step = m.round+1+uint64(i), g.votes[voter].Step
		}
		g.remove(msg.rank)
	}
	m.peers[msg.rank] = life
	m.log.Info("a rank is there", "other", msg.rank, "again", old.epoch != 0)
	if m.waiting {
		m.leftBehind(m.round+1, m.open.highest(), m.last)
	}
}

func (m *member) handleVote(msg *message, direct bool) {
	switch {
	case msg.round <= m.round:
		m.stats.Duplicates++
		// A direct vote is an answer itself. A process that still asks for its rank must not speak for
		// it.
		if !direct && m.phase != asking && m.peers[msg.rank].answers.allow() {
			m.answerLate(msg)
		}
	case msg.round == m.round+1:
		if msg.asks && !direct && m.waiting && m.peers[msg.rank].answers.allow() {
			m.stats.Resent++
			m.send(msg.rank, m.sent)
		}
		m.add(&m.open, msg)
	case msg.round == m.round+2 && msg.complete && m.waiting:
		// Another rank had all votes of the open round, so they come here too: this rank asks again for
		// those that got lost.
		m.add(&m.next, msg)
	default:
		m.leftBehind(msg.round-1, msg.step, m.step+1)
		m.add(&m.open, msg)
	}
}

func (m *member) add(g *gathering, msg *message) {
	if g.here[msg.rank] {
		m.stats.Duplicates++
		return
	}
	g.add(msg.rank, msg.vote, msg.lives)
	m.endIfFull()
}

// answerLate tells a rank that still waits in a round how that round has ended.
func (m *member) answerLate(msg *message) {
	switch {
	case msg.round == m.round && m.answer != nil:
		m.send(msg.rank, m.answer)
	case m.complete: // with its vote, so it has the earlier rounds behind it: the message is an old one
	default:
		over := m.message(kindBroken)
		over.by, over.lowest, over.missing = m.rank, msg.step+1, []int{msg.rank}
		m.sendMessage(msg.rank, over)
	}
}

func (m *member) handleBroken(msg *message) {
	switch {
	case msg.round <= m.round: // known already
	case m.waiting && msg.round == m.round+1 && !slices.Contains(msg.missing, m.rank):
		m.stats.Broken++
		m.fail(msg)
	case msg.round == m.round+1:
		m.leftBehind(msg.round, msg.step, msg.lowest)
	default: // this rank has not heard of the rounds before it, or not yet
		m.leftBehind(msg.round, msg.step, min(msg.lowest, m.step+1))
	}
}

// signal tells join or leave to look again, if they wait.
func (m *member) signal() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}
