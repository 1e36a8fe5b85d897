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
	"go.opentelemetry.io/otel/trace"
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
// Messages get lost. A rank that waits asks for the votes that it lacks from time to time, and whoever
// has given one in that round sends it again. A rank that has that round behind it answers how the
// round ended: with its own vote if the votes of all were there, otherwise with the news that the
// round is broken. A rank that finds out that it has been left behind votes again, in the round that
// is open now.
//
// A rank may hear the others and not be heard. So a vote also says how the round before ended for its
// rank. If it was complete for some and broken for others, nobody completes this one. If it was broken,
// the votes alone don't complete this one either: each rank says that it has the votes of all, and the
// round is complete when all have said so.
//
// In a large group the ranks speak through one of them, the hub, see relay.
type member struct {
	group uint64 // see hashGroup
	rank  int
	size  int

	// send sends to a rank, or toAll. It never waits, and it keeps the message.
	send func(to int, message []byte)
	most int // bytes of a message

	hub     int // the rank through which all speak, or noHub
	relay   relay
	meeting meeting

	log *slog.Logger // says what happens to the group; nothing that happens in each step

	trouble func() error // what has kept messages from going out or coming in, or nil

	busy    atomic.Bool // in exchange
	outcome chan outcome
	askTime *time.Timer
	closing chan struct{} // closed when the rank leaves

	mu    sync.Mutex
	epoch uint64 // of this life of the rank
	stats Stats
	peers []peer // by rank

	// epochs are those of the lives that count, by rank; 0: none. There is none for this rank itself.
	// knownLives is what livesKnown has returned for them; 0: they have changed since.
	epochs     []uint64
	knownLives uint64

	// The last round that has ended, as far as this rank knows.
	round  uint64
	step   uint64 // the group's
	ending ending
	answer [][]byte // to a rank that is still in that round; nil: only that it is over

	// The votes of rounds round+1 and round+2. Another rank may have the next round behind it already
	// when its vote in the one after comes.
	open, next gathering

	// down says that there is no connection: what still comes in was said before. cut says that it was
	// lost while the round was open, so that votes may be missing.
	down, cut bool

	// This rank's vote in the open round.
	waiting bool
	vote    fwd.Vote
	lives   uint64    // that its vote counts, see hashLives
	said    []byte    // the message of it
	full    bool      // it has said that it has the votes of all
	asked   time.Time // when it has asked for votes, and not been answered by the hub since
	gaveUp  bool      // it has told the hub that it can't wait any longer

	lastAsked time.Time

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
	asked uint64 // epoch of the life that has asked last
	heard bool   // it has answered, see join
	gone  bool   // it has left
	ended uint64 // the last round that it knows to have ended

	// Rounds up to taken may have votes of an earlier life of the rank. They ended at most at step.
	taken, step uint64

	otherSize int    // that it has said last, see handleOtherSize; 0: none
	answers   limit  // of answers to it
	greetings limit  // of what it says to all through the hub
	hello     []byte // what it has said to the hub of a group that begins
	ready     uint64 // the lives that it knows while a group begins through a hub; 0: not all
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
	votes  []fwd.Vote // nil: none has come
	voters []voter
	count  int // of votes that are here
	full   int // of voters that have the votes of all
	last   int // the rank whose vote came last
}

// voter is what the vote of a rank says beside the vote.
type voter struct {
	here   bool
	full   bool   // see flagFull
	lives  uint64 // see hashLives
	before ending // of the round before
}

func newGathering(size int) gathering {
	return gathering{voters: make([]voter, size)}
}

func (g *gathering) add(rank int, v fwd.Vote, by voter) {
	if g.votes == nil {
		g.votes = make([]fwd.Vote, len(g.voters))
	}
	by.here = true
	g.votes[rank], g.voters[rank], g.last = v, by, rank
	if g.count++; by.full {
		g.full++
	}
}

// lacks returns the ranks whose votes are not there, or that count other lives than these. They vote
// again when they have heard of the others' lives, or this rank does.
func (g *gathering) lacks(lives uint64) (ranks []int) {
	for rank := range g.voters {
		if by := &g.voters[rank]; !by.here || by.lives != lives {
			ranks = append(ranks, rank)
		}
	}
	return ranks
}

// unsure returns the ranks that have not said that they have the votes of all.
func (g *gathering) unsure() (ranks []int) {
	for rank := range g.voters {
		if !g.voters[rank].full {
			ranks = append(ranks, rank)
		}
	}
	return ranks
}

// before returns how the round before ended for those whose votes are there: complete for some,
// broken for some, or both.
func (g *gathering) before() (complete, broken bool) {
	for rank := range g.voters {
		complete = complete || g.voters[rank].here && g.voters[rank].before.complete
		broken = broken || g.voters[rank].here && g.voters[rank].before.broken
	}
	return complete, broken
}

func (g *gathering) remove(rank int) {
	if by := &g.voters[rank]; by.here {
		if g.count--; by.full {
			g.full--
		}
		*by = voter{}
	}
}

// highest returns the highest step of a vote, or 0 if none is there.
func (g *gathering) highest() (step uint64) {
	for rank := range g.voters {
		if g.voters[rank].here {
			step = max(step, g.votes[rank].Step)
		}
	}
	return step
}

// reset empties a gathering. It lets go of the votes, since a caller may have been given them.
func (g *gathering) reset() {
	if g.votes != nil {
		clear(g.voters)
		g.votes, g.count, g.full = nil, 0, 0
	}
}

// outcome is how a round ended for the rank that waits.
type outcome struct {
	votes []fwd.Vote
	err   error
}

func newMember(group string, rank, size int, send func(to int, message []byte)) *member {
	m := &member{
		group: hashGroup(group), rank: rank, size: size, send: send,
		epoch:   newEpoch(),
		peers:   make([]peer, size),
		epochs:  make([]uint64, size),
		open:    newGathering(size),
		next:    newGathering(size),
		outcome: make(chan outcome, 1),
		askTime: time.NewTimer(time.Hour),
		most:    defaultPayload,
		trouble: func() error { return nil },
		hub:     noHub,
		closing: make(chan struct{}),
		log:     slog.New(slog.DiscardHandler),
		changed: make(chan struct{}, 1),

		contested: size == 1, // no other rank could tell
		lastRank:  -1,
	}
	if size >= hubFrom {
		m.hub = 0
	}
	return m
}

// defaultPayload is how many bytes a message may have, unless a server says otherwise.
const defaultPayload = 1 << 20

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
	interval := m.askFirst()
	m.askTime.Reset(interval)
	defer m.askTime.Stop()
	done, closing := ctx.Done(), m.closing
	var grace <-chan time.Time
	for {
		select {
		case o := <-m.outcome:
			return o.votes, withCause(o.err, m.cause(ctx), m.trouble)
		case <-m.askTime.C:
			m.again()
			interval = m.askNext(interval)
			m.askTime.Reset(interval)
			continue
		case <-done:
		case <-closing:
		case <-grace:
		}
		done, closing = nil, nil
		if grace == nil && m.giveUp() {
			grace = time.After(graceTime())
		} else {
			m.breakRound() // which leaves the outcome there
		}
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

// withCause adds the cause that ended this rank's own wait, if any, to the error of a broken round, and
// what is wrong with its connection.
func withCause(err, cause error, trouble func() error) error {
	rankErr, ok := err.(*fwd.RankError)
	if !ok || !errors.Is(rankErr.Err, fwd.ErrRankMissing) {
		return err
	}
	for _, more := range []error{cause, trouble()} {
		if more != nil {
			rankErr.Err = fmt.Errorf("%w: %w", rankErr.Err, more)
		}
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
	m.vote, m.last, m.late, m.lives, m.full = v, v.Step, false, m.livesKnown(), false
	msg := m.voteMessage(m.cut)
	m.giveVote(&msg)
}

// giveVote gives this rank's vote to all. In a group with a hub the vote is there when the hub has
// passed it on, so that all ranks know who was last.
func (m *member) giveVote(msg *message) {
	if m.said = msg.raw; !m.isHub() {
		m.publish(msg.raw)
	}
	if !m.speaksThroughHub() {
		m.add(&m.open, msg)
	}
}

// voteMessage returns the message of this rank's vote in the open round. If asks is true, it asks for
// those of its receivers.
func (m *member) voteMessage(asks bool) message {
	msg := m.message(kindVote)
	msg.round, msg.vote, msg.lives, msg.full = m.round+1, m.vote, m.lives, m.full
	msg.ending, msg.asks = m.ending, asks
	if msg.raw = msg.encode(); len(msg.raw) > m.most {
		msg.vote.SpanContext = msg.vote.SpanContext.WithTraceState(trace.TraceState{})
		msg.raw = msg.encode()
	}
	return msg
}

// setMost sets how many bytes a message may have.
func (m *member) setMost(bytes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.most = bytes
}

// pack returns messages as one, or as few as are not too large.
func (m *member) pack(messages [][]byte) [][]byte {
	if len(messages) == 1 {
		return messages
	}
	var single [][]byte // a bundle holds no bundles
	for _, data := range messages {
		single = slices.AppendSeq(single, unbundle(data))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return bundles(m.message(kindBundle), single, m.most)
}

// isEpoch reports whether this life of the rank has or had an epoch.
func (m *member) isEpoch(epoch uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return epoch == m.epoch || slices.Contains(m.former, epoch)
}

// sendVoteAgain sends this rank's vote to a rank that has asked for it.
func (m *member) sendVoteAgain(to int) {
	m.stats.Resent++
	msg := m.voteMessage(to != m.hub && !m.open.voters[to].here)
	m.send(to, msg.raw)
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
	m.relay.forget()
	if back && m.waiting {
		m.askForVotes()
	}
}

// livesKnown returns the number that stands for the lives that count for this rank.
func (m *member) livesKnown() uint64 {
	if m.knownLives == 0 {
		lives := slices.Clone(m.epochs)
		lives[m.rank] = m.epoch
		m.knownLives = hashLives(lives)
	}
	return m.knownLives
}

// setEpoch notes which life of another rank counts.
func (m *member) setEpoch(rank int, epoch uint64) { m.epochs[rank], m.knownLives = epoch, 0 }

// missingVotes returns the ranks whose votes the open exchange waits for, or nil if none is open.
func (m *member) missingVotes() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.waiting {
		return nil
	}
	if m.speaksThroughHub() && time.Since(m.lastAsked) >= askInterval {
		m.askForVotes() // the hub may know more by now, and the next call too
	}
	return m.lacking()
}

// lacking returns the ranks for which the open round waits. If votes are there that don't complete it
// alone, these are the ranks that have not said that they have all of them.
func (m *member) lacking() []int {
	lives := m.lives
	if !m.waiting {
		lives = m.livesKnown()
	}
	ranks := m.open.lacks(lives)
	if len(ranks) == 0 {
		ranks = m.open.unsure()
	}
	if m.speaksThroughHub() {
		return m.lackingThroughHub(ranks)
	}
	return ranks
}

// lastVote returns whose vote came last in the latest exchange that has ended, see lastRank.
func (m *member) lastVote() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lastRank
}

// These are how long a rank waits before it asks for votes, for the first time and then. What ranks
// of a large group hear of each other costs more, so they ask later each time.
const (
	askInterval = 500 * time.Millisecond
	askMost     = 4 * time.Second
)

func (m *member) askFirst() time.Duration {
	if m.hasHub() {
		return 2 * askInterval
	}
	return askInterval
}

func (m *member) askNext(last time.Duration) time.Duration {
	if m.hasHub() {
		return min(2*last, askMost)
	}
	return askInterval
}

// again asks for the votes that this rank lacks, if it waits.
func (m *member) again() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting {
		m.askForVotes()
	}
}

// askForVotes asks the ranks for which the open round waits, or the hub.
func (m *member) askForVotes() {
	m.lastAsked = time.Now()
	ask := m.message(kindAsk)
	ask.round = m.round + 1
	if m.speaksThroughHub() {
		if m.asked.IsZero() {
			m.asked = m.lastAsked
		}
		m.sendMessage(m.hub, ask)
		return
	}
	for _, rank := range m.lacking() {
		if rank != m.rank {
			m.sendMessage(rank, ask)
		}
	}
}

// handleAsk answers a rank that lacks a vote.
func (m *member) handleAsk(msg *message) {
	if msg.round > m.round+1 || m.phase == asking || !m.peers[msg.rank].answers.allow() {
		return
	}
	switch {
	case msg.round <= m.round:
		m.answerLate(msg)
	case m.isHub():
		m.tellAll(msg.rank)
	case m.waiting:
		m.sendVoteAgain(msg.rank)
	}
}

// endIfFull ends the open round if the votes of all are there, count the same lives, and say that the
// round before has ended in one way. All ranks come to the same end.
func (m *member) endIfFull() {
	if m.open.count < m.size || m.open.lacks(m.lives) != nil {
		return
	}
	votes, step := m.open.votes, m.last
	for i := range votes {
		if votes[i].Step != step {
			_, err := fwd.Agree(votes, 0) // whose error says at which steps the ranks are
			rankErr := (*fwd.RankError)(nil)
			errors.As(err, &rankErr)
			m.end(ending{complete: true}, rankErr.Step, outcome{err: err})
			return
		}
	}
	switch complete, broken := m.open.before(); {
	case complete && broken:
		m.endDivided(step)
	case broken && m.open.full < m.size:
		m.confirm()
	default:
		m.end(ending{complete: true}, step, outcome{votes: votes})
	}
}

// confirm says that this rank has the votes of all.
func (m *member) confirm() {
	if m.full {
		return
	}
	m.full = true
	msg := m.voteMessage(false)
	m.giveVote(&msg)
}

// endDivided ends a round in which the votes of all are there, but the round before was complete for
// some and broken for others: those may not hear the ranks that were missing there, which would go on
// without them.
func (m *member) endDivided(step uint64) {
	var by, deaf, missing []int // who broke it; of these, who did not hear this rank; who was missing
	for rank := range m.open.voters {
		before := &m.open.voters[rank].before
		if !before.broken {
			continue
		}
		by, missing = append(by, before.by), append(missing, before.missing...)
		if rank != m.rank && slices.Contains(before.missing, m.rank) {
			deaf = append(deaf, before.by)
		}
	}
	how := ending{broken: true, by: by[0], missing: without(missing, nil)}
	err := &fwd.RankError{Step: step, Ranks: without(deaf, []int{m.rank})}
	if len(err.Ranks) > 0 {
		err.Err = fmt.Errorf("%w: ranks %v did not hear rank %d in the step before, which was complete for others",
			fwd.ErrRankMissing, err.Ranks, m.rank)
	} else {
		err.Err = fmt.Errorf("%w: the step before was complete for some, and rank %d stopped waiting in it",
			fwd.ErrRankMissing, how.by)
		if err.Ranks = without(missing, []int{m.rank}); len(err.Ranks) == 0 {
			err.Ranks = without(append(by, m.hub), []int{m.rank, noHub})
		}
	}
	m.stats.Broken++
	m.end(how, step, outcome{err: err})
	m.log.Warn("a step was complete for some ranks and broken for others", "step", step-1,
		"by", how.by, "missing", how.missing)
}

// end ends the open round with the votes of all.
func (m *member) end(how ending, step uint64, o outcome) {
	m.answer, m.lastRank = m.allVotes(), m.open.last
	if how.broken {
		m.lastRank = -1
	}
	m.endRound(m.round+1, step)
	m.ending, m.last = how, step
	m.release(o)
}

// allVotes returns what a rank needs that is still in the open round, which ends here: this rank's
// vote, or through a hub the votes of all.
func (m *member) allVotes() [][]byte {
	if m.isHub() {
		return m.relay.round(m)
	}
	return [][]byte{m.said}
}

// endRound makes round the last one that has ended.
func (m *member) endRound(round, step uint64) {
	if round == m.round+1 {
		m.open, m.next = m.next, m.open
	} else {
		m.open.reset()
	}
	m.next.reset()
	m.relay.forget()
	m.round, m.step, m.cut, m.gaveUp, m.asked = round, step, false, false, time.Time{}
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
	msg := m.brokenMessage(m.rank)
	m.sendMessage(toAll, msg)
	m.stats.Broken++
	m.fail(&msg)
}

// brokenMessage returns the message that a rank has broken the open round.
func (m *member) brokenMessage(by int) message {
	msg := m.message(kindBroken)
	msg.round, msg.lowest = m.round+1, m.last
	msg.ending = ending{broken: true, by: by, missing: m.lacking()}
	msg.full = m.full
	msg.step = max(msg.step, m.open.highest()) // not below what a restarted rank may have missed
	if m.waiting {
		msg.step = max(msg.step, m.vote.Step)
	}
	for rank := range m.open.voters {
		if m.open.voters[rank].here {
			msg.lowest = min(msg.lowest, m.open.votes[rank].Step)
		}
	}
	return msg
}

// fail ends the open round, in which this rank waits, without the votes of all.
func (m *member) fail(msg *message) {
	missing, err := m.blame(msg)
	how := msg.ending
	if !m.hasHub() { // and what this rank lacks itself, so that whoever it does not hear learns of that
		how.missing = without(append(how.missing, without(m.open.lacks(m.lives), []int{m.rank})...), nil)
	}
	m.answer = m.repeated(msg)
	m.endRound(msg.round, msg.step)
	m.ending, m.last, m.lastRank = how, msg.step, -1
	m.log.Warn("a step is broken", "step", msg.step, "by", msg.by, "missing", msg.missing)
	m.release(outcome{err: &fwd.RankError{Err: err, Step: msg.step, Ranks: missing}})
}

// repeated returns a message as this rank's own.
func (m *member) repeated(msg *message) [][]byte {
	own := *msg
	own.rank, own.epoch = m.rank, m.epoch
	return [][]byte{own.encode()}
}

// blame returns the ranks that the open round lacks for this rank, and the error that says so.
func (m *member) blame(msg *message) (missing []int, err error) {
	if !slices.Contains(msg.missing, m.rank) {
		return msg.missing, fmt.Errorf("%w: rank %d stopped waiting%s",
			fwd.ErrRankMissing, msg.by, m.resized(msg.missing))
	}
	if missing = without(m.open.lacks(m.lives), []int{m.rank}); msg.full && len(missing) > 0 && !m.hasHub() {
		return missing, fmt.Errorf("%w: rank %d stopped waiting, and rank %d does not hear ranks %v",
			fwd.ErrRankMissing, msg.by, m.rank, missing)
	}
	deaf := msg.by
	if deaf == m.rank {
		deaf = m.hub
	}
	m.log.Warn("this rank is not heard", "by", deaf)
	return []int{deaf}, fmt.Errorf("%w: rank %d does not hear rank %d", fwd.ErrRankMissing, deaf, m.rank)
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

// leftBehind notes that the group has ended rounds without this rank, and how the last of them ended. If
// this rank waits, it votes again.
func (m *member) leftBehind(how ending, round, step, lowest uint64) {
	if !m.late {
		m.late, m.lateFrom = true, lowest
	}
	m.endRound(round, max(step, m.step))
	if m.ending.broken { // what this rank knows of an earlier break holds
		by := m.ending.by
		if how.broken {
			by = how.by
		}
		how = ending{broken: true, by: by, missing: without(append(how.missing, m.ending.missing...), nil)}
	}
	m.ending, m.answer = how, nil
	if m.waiting {
		m.enter(m.vote)
	}
}

// read reads a message that came in on the subject of rank from. What is of another group or size is
// not read whole.
func (m *message) read(group uint64, size, from int) error {
	body, err := m.decodeHeader(m.raw)
	if err == nil && m.group == group && m.size == size && m.rank == from {
		err = m.decodeBody(body)
	}
	return err
}

// take takes a message that came in on the subject of rank from and has been read, or could not be. It
// is for this rank alone if direct, otherwise for all. It keeps nothing of it but raw, which nobody
// changes, and changes nothing in it, since other ranks of the process take it too.
func (m *member) take(from int, direct bool, msg *message, err error) {
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
		m.handleOtherSize(msg)
	case !m.credible(msg):
		m.handleImplausible(msg)
	case msg.rank == m.rank:
		m.handleOwnRank(msg)
	case direct && m.isOldHello(msg): // which needs no answer
	case msg.kind == kindHello || msg.kind == kindClaim:
		m.passGreeting(msg, direct)
		m.handleHello(msg)
	case msg.kind == kindReady:
		m.passGreeting(msg, direct)
		m.handleReady(msg)
	case msg.kind == kindBye:
		m.passGreeting(msg, direct)
		m.handleBye(msg)
	case msg.kind == kindState && !msg.holds: // its sender may still have to give way to another process
		m.handleState(&m.peers[msg.rank], msg)
	case msg.epoch < m.epochs[msg.rank]:
		m.stats.Stale++
		m.tellStale(msg)
	default:
		m.handlePeer(msg, direct)
	}
}

// credible reports whether an honest rank can send a message. The numbers of a group only grow, so
// one that is near their end would leave it none, even after the rank that said so is replaced.
//
// Rounds take longer than a microsecond. So a group can't have come further than the microseconds
// since 1970, and whoever pushes it there leaves it one for each microsecond to come. Epochs are
// nanoseconds since 1970. The clocks of hosts differ, by less than a day.
func (m *member) credible(msg *message) bool {
	latest := msg.at.Add(clocksDiffer)
	return msg.round <= uint64(latest.UnixMicro()) && max(msg.step, msg.vote.Step) <= m.mostStep() &&
		max(msg.epoch, msg.holder) <= uint64(latest.UnixNano())
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
	if msg.epoch > m.epochs[msg.rank] {
		m.newLife(msg)
	}
	switch msg.kind {
	case kindVote:
		p.ended = max(p.ended, msg.round-1)
		m.handleVote(msg, direct)
	case kindAsk:
		p.ended = max(p.ended, msg.round-1)
		m.handleAsk(msg)
	case kindBroken:
		m.handleBroken(msg, direct)
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
		m.noteAsked(p, 0)
		p.heard = p.heard && m.epochs[msg.rank] != 0 // from the process that has the rank
	}
	if m.epochs[msg.rank] == msg.epoch {
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
	state.asker, state.holder = msg.epoch, m.epochs[msg.rank]
	m.sendMessage(msg.rank, state)
}

// newLife notes that a rank has been started again. The votes of its last life don't count any
// more: some ranks may have them, and others not. Nor can the rank vote in a round in which this
// rank waits: its last life may have had the votes of all there, with a vote of its own that came
// to nobody. So this rank gives that round up.
func (m *member) newLife(msg *message) {
	old, again := m.peers[msg.rank], m.epochs[msg.rank] != 0
	life := peer{
		asked: old.asked, taken: old.taken, step: old.step, answers: old.answers, greetings: old.greetings,
	}
	for i, g := range []*gathering{&m.open, &m.next} {
		voter := msg.rank
		if !g.voters[voter].here && again {
			voter = m.rank
		}
		if g.voters[voter].here {
			life.taken, life.step = m.round+1+uint64(i), g.votes[voter].Step
		}
		g.remove(msg.rank)
	}
	m.peers[msg.rank], m.meeting.over = life, true
	m.setEpoch(msg.rank, msg.epoch)
	m.log.Info("a rank is there", "other", msg.rank, "again", again)
	if m.waiting {
		m.leftBehind(ending{}, m.round+1, max(m.open.highest(), m.vote.Step), m.last)
	}
}

func (m *member) handleVote(msg *message, direct bool) {
	switch {
	case msg.round <= m.round:
		m.stats.Duplicates++
		// A direct vote is an answer itself, unless it is for the hub. A process that still asks for its
		// rank must not speak for it.
		if answers := direct == m.isHub(); answers && m.phase != asking && m.peers[msg.rank].answers.allow() {
			m.answerLate(msg)
		}
	case msg.round == m.round+1:
		round := m.round
		m.add(&m.open, msg)
		if msg.asks && m.phase != asking && m.peers[msg.rank].answers.allow() {
			m.answerAsks(msg, round)
		}
	case msg.round == m.round+2 && msg.complete && m.waiting:
		// Another rank had all votes of the open round, so they come here too: this rank asks again for
		// those that got lost.
		m.add(&m.next, msg)
	default:
		m.leftBehind(ending{}, msg.round-1, msg.step, m.step+1)
		m.add(&m.open, msg)
	}
}

// answerAsks answers a vote of a rank that has lost others, which may have ended the round here.
func (m *member) answerAsks(msg *message, before uint64) {
	if m.round != before {
		m.answerLate(msg)
	} else if m.isHub() {
		m.tellAll(msg.rank)
	} else if m.waiting && !m.hasHub() {
		m.sendVoteAgain(msg.rank)
	}
}

// add takes a vote, or that its rank has the votes of all.
func (m *member) add(g *gathering, msg *message) {
	switch by := &g.voters[msg.rank]; {
	case !by.here:
		g.add(msg.rank, msg.vote, voter{full: msg.full, lives: msg.lives, before: msg.ending})
	case msg.full && !by.full && msg.lives == by.lives:
		by.full = true
		g.full++
	default:
		m.stats.Duplicates++
		return
	}
	if g == &m.open {
		m.passVote(msg)
		m.endIfFull()
	}
}

// answerLate tells a rank that still waits in a round how that round has ended.
func (m *member) answerLate(msg *message) {
	switch {
	case msg.round == m.round && m.answer != nil:
		for _, data := range m.answer {
			m.send(msg.rank, data)
		}
	case m.ending.complete: // with its vote, so it has the earlier rounds behind it: the message is an old one
	default:
		over := m.message(kindBroken)
		over.lowest, over.ending = msg.step+1, ending{broken: true, by: m.rank, missing: []int{msg.rank}}
		m.sendMessage(msg.rank, over)
	}
}

func (m *member) handleBroken(msg *message, direct bool) {
	if m.isHub() && direct && m.phase != asking {
		own := *msg
		msg = &own
		if m.hubHearsBroken(msg); msg.round <= m.round {
			return
		}
	} else {
		m.peers[msg.rank].ended = max(m.peers[msg.rank].ended, msg.round)
	}
	switch {
	case msg.round <= m.round: // known already
	case m.waiting && msg.round == m.round+1 &&
		(!slices.Contains(msg.missing, m.rank) || m.gaveUp || !direct && m.notHeardBy(msg.by)):
		m.stats.Broken++
		m.fail(msg)
	case msg.round == m.round+1:
		m.leftBehind(msg.ending, msg.round, msg.step, msg.lowest)
	default: // this rank has not heard of the rounds before it, or not yet
		m.leftBehind(msg.ending, msg.round, msg.step, min(msg.lowest, m.step+1))
	}
	if msg.round == m.round && m.answer == nil {
		m.answer = m.repeated(msg)
	}
}

// notHeardBy reports whether this rank, which waits and is missing for another, is more than late: the
// other has missed it in the round before too, and does not just answer a vote that came too late.
func (m *member) notHeardBy(by int) bool {
	voter := &m.open.voters[by]
	return voter.here && voter.before.broken && slices.Contains(voter.before.missing, m.rank)
}

// without returns ranks in ascending order, each once, and none of those that are left out.
func without(ranks, leftOut []int) []int {
	ranks = slices.DeleteFunc(slices.Clone(ranks), func(rank int) bool { return slices.Contains(leftOut, rank) })
	slices.Sort(ranks)
	return slices.Compact(ranks)
}

// signal tells join or leave to look again, if they wait.
func (m *member) signal() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}
