package natsdp

import (
	"math/rand/v2"
	"time"
)

// In a group of hubFrom ranks or more, each rank sends its vote to one of them, the hub, which passes
// them on in bundles. So a round costs a number of messages that grows with the ranks, not with their
// square; its bytes still do, since each rank gets the votes of all. The protocol stays what it is:
// the hub carries messages of others and says nothing in their names. A bundle with the votes of all is
// taken as a whole, see table.
//
// The hub is no new single point of failure, since no round is complete without each rank. It passes
// on what it has while its own rank runs a pass. If it knows nothing of a rank, that rank has not
// spoken, or is not heard.
const (
	hubFrom = 16
	noHub   = -1
)

// These say when the hub passes on what is not all that it waits for: so long after the last message
// that came, or after the first. Votes that are not all complete no round: they only say who is missing,
// so they have time, and are passed on at most so many times a round.
const (
	greetQuiet = 5 * time.Millisecond
	greetMost  = 50 * time.Millisecond
	voteQuiet  = 100 * time.Millisecond
	voteMost   = 500 * time.Millisecond
	voteParts  = 2
)

// graceMost is how long a rank whose ctx has ended waits at most for the hub, which knows better who is
// missing. Ranks wait differently long, so that not all of them speak to all if the hub is gone.
const graceMost = 200 * time.Millisecond

func graceTime() time.Duration { return graceMost/2 + rand.N(graceMost/2) }

// relay is what the hub passes on.
type relay struct {
	greetings [][]byte // of ranks that join or leave, not passed on yet
	votes     [][]byte // of the open round, in the order in which they came
	passed    int      // of votes
	parts     int      // how often votes were passed on that were not all

	greet, vote pacer
}

// pacer says when it has been quiet for long enough.
type pacer struct {
	timer       *time.Timer // nil: nothing waits
	first, last time.Time   // when something came that waits
}

// note notes that something has come, and lets fire look when it may be due.
func (p *pacer) note(quiet time.Duration, fire func()) {
	p.last = time.Now()
	if p.timer == nil {
		p.first, p.timer = p.last, time.AfterFunc(quiet, fire)
	}
}

// due reports whether what waits is to be passed on now. If not, it looks again later.
func (p *pacer) due(quiet, most time.Duration) bool {
	if p.timer == nil {
		return false
	}
	now := time.Now()
	if rest := quiet - now.Sub(p.last); rest > 0 && now.Sub(p.first) < most {
		p.timer.Reset(rest)
		return false
	}
	return true
}

func (p *pacer) stop() {
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}

// forget drops the votes of a round that is over.
func (r *relay) forget() {
	r.votes, r.passed, r.parts = nil, 0, 0
	r.vote.stop()
}

// round returns the votes of the open round in messages.
func (r *relay) round(m *member) [][]byte { return bundles(m.message(kindBundle), r.votes, m.most) }

func (m *member) hasHub() bool { return m.hub != noHub }

func (m *member) isHub() bool { return m.rank == m.hub }

func (m *member) speaksThroughHub() bool { return m.hasHub() && !m.isHub() }

// publish sends a message to all, itself or through the hub.
func (m *member) publish(data []byte) {
	switch {
	case !m.hasHub() || !m.isHub() && m.peers[m.hub].gone:
		m.send(toAll, data)
	case m.isHub():
		m.greetLater(data)
	default:
		m.send(m.hub, data)
	}
}

// passGreeting passes on what a rank that joins or leaves says to all.
func (m *member) passGreeting(msg *message, direct bool) {
	if p := &m.peers[msg.rank]; m.isHub() && direct && p.greetings.allow() && !m.greetedBefore(p, msg) {
		m.greetLater(msg.raw)
	}
}

// greetLater passes on a greeting with others that come.
func (m *member) greetLater(data []byte) {
	m.relay.greetings = append(m.relay.greetings, data)
	m.relay.greet.note(greetQuiet, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.relay.greet.due(greetQuiet, greetMost) {
			m.passGreetings()
		}
	})
}

func (m *member) passGreetings() {
	m.pass(m.relay.greetings)
	m.relay.greetings = nil
	m.relay.greet.stop()
}

// pass sends messages of others to all.
func (m *member) pass(messages [][]byte) {
	for _, data := range bundles(m.message(kindBundle), messages, m.most) {
		m.send(toAll, data)
	}
}

// greetedBefore reports whether the hub of a group that begins has passed a greeting on already. Then it
// answers by itself, for all: its sender has lost something, or is slow.
func (m *member) greetedBefore(p *peer, msg *message) bool {
	switch {
	case msg.kind == kindHello && m.meets():
		m.tellHellos(msg.rank) // it may have come too late to hear what was passed on
		p.hello = msg.raw
		return p.asked == msg.epoch
	case msg.kind == kindReady && m.meets():
		if p.hello == nil {
			p.hello = msg.raw // which says who its rank is as well
		}
		return p.ready == msg.lives
	case msg.kind == kindReady:
		if m.epochs[msg.rank] == msg.epoch && m.peers[m.rank].ready == msg.lives {
			together := m.message(kindReady)
			together.lives, together.full = msg.lives, true
			m.sendMessage(msg.rank, together)
		}
		return true
	}
	return false
}

// tellHellos sends a rank the greetings of those that have asked.
func (m *member) tellHellos(to int) {
	hellos := [][]byte{m.greeting()}
	for rank := range m.peers {
		if hello := m.peers[rank].hello; hello != nil && rank != to {
			hellos = append(hellos, hello)
		}
	}
	for _, data := range bundles(m.message(kindBundle), hellos, m.most) {
		m.send(to, data)
	}
}

// isOldHello reports whether a hello that has come to this rank alone is one of those that the hub of a
// group that begins has told it. The group may have begun meanwhile, since what the hub says to all
// comes on another way. An answer would only tell others that have not begun yet that they are late.
func (m *member) isOldHello(msg *message) bool {
	return msg.kind == kindHello && m.phase == joined && m.speaksThroughHub() && msg.rank != m.hub &&
		msg.epoch == m.epochs[msg.rank]
}

func (m *member) greeting() []byte {
	hello := m.message(kindHello)
	return hello.encode()
}

// passVote passes on a vote of the open round: immediately if it was the last one.
func (m *member) passVote(msg *message) {
	if !m.isHub() {
		return
	}
	m.relay.votes = append(m.relay.votes, msg.raw)
	if g := &m.open; g.count == m.size && (g.full == 0 || g.full == m.size) {
		m.passVotes()
	} else if m.relay.parts < voteParts {
		m.relay.vote.note(voteQuiet, m.passSomeVotes)
	}
}

func (m *member) passSomeVotes() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.relay.vote.due(voteQuiet, voteMost) {
		m.relay.parts++
		m.passVotes()
	}
}

func (m *member) passVotes() {
	r := &m.relay
	m.pass(r.votes[r.passed:])
	r.passed = len(r.votes)
	r.vote.stop()
}

// ownReadyPassed notes that the hub has passed on that this rank is ready.
func (m *member) ownReadyPassed(msg *message) {
	if m.meeting.passed = msg.lives; m.meets() {
		m.beginTogether()
	}
}

// ownVotePassed notes that the hub has passed on this rank's own vote.
func (m *member) ownVotePassed(msg *message) {
	if m.speaksThroughHub() && m.waiting && msg.round == m.round+1 {
		m.asked = time.Time{} // the hub has answered
		own := *msg
		own.vote, own.lives, own.ending = m.vote, m.lives, m.ending
		m.add(&m.open, &own)
	}
}

// tellAll sends a rank that has lost votes all that are there in the open round, and asks for its own
// if that is not there.
func (m *member) tellAll(to int) {
	if len(m.relay.votes) > 0 {
		m.stats.Resent++
	}
	for _, data := range m.relay.round(m) {
		m.send(to, data)
	}
	if !m.open.voters[to].here {
		ask := m.message(kindAsk)
		ask.round = m.round + 1
		m.sendMessage(to, ask)
	}
}

// giveUp tells the hub that this rank can't wait any longer, and reports whether the hub will say how
// the round ends.
func (m *member) giveUp() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.waiting || !m.hasHub() || m.isHub() || m.down {
		return false
	}
	m.gaveUp = true
	m.sendMessage(m.hub, m.brokenMessage(m.rank))
	if m.asked.IsZero() {
		m.asked = time.Now()
	}
	return true
}

// hubHearsBroken takes a message of a rank that can't wait any longer. All are told, with the ranks
// that are missing here. If the round has ended meanwhile, that rank is told how.
func (m *member) hubHearsBroken(msg *message) {
	switch {
	case msg.round <= m.round && m.peers[msg.rank].answers.allow():
		m.answerLate(msg)
	case msg.round == m.round+1:
		over := m.brokenMessage(msg.by)
		m.sendMessage(toAll, over)
		msg.ending, msg.step, msg.lowest = over.ending, over.step, over.lowest
	}
}

// silentMost is how long the hub may take to answer.
const silentMost = graceMost / 4

// lackingThroughHub returns which of the ranks that a rank lacks may be to blame. If the hub has not
// answered, or lacks nothing but this rank's vote, it is the hub.
func (m *member) lackingThroughHub(ranks []int) []int {
	ranks = without(ranks, []int{m.rank})
	silent := !m.asked.IsZero() && time.Since(m.asked) >= silentMost
	if len(ranks) == 0 || silent {
		return []int{m.hub}
	}
	return ranks
}

// meeting is what a rank knows of a large group that begins. The ranks don't answer each other one by
// one: each says, once it has heard of a process of every rank, which processes these are. When all say
// the same, the group is together.
type meeting struct {
	over  bool // somebody is in the group already
	asked int  // ranks, other than this one, whose processes have asked
	same  int  // ranks, from 0, that are known to say what this one says

	// passed is what the hub has passed on for this rank. A rank begins no earlier: so the hub has begun
	// if any rank has, and can tell the others.
	passed uint64
}

// noteAsked notes which process of another rank has asked last; 0: none.
func (m *member) noteAsked(p *peer, epoch uint64) {
	if p.asked != 0 {
		m.meeting.asked--
	}
	if p.asked = epoch; epoch != 0 {
		m.meeting.asked++
	}
}

// meets reports whether this rank joins a group in which nobody is known to be yet.
func (m *member) meets() bool {
	return m.hasHub() && m.phase == asking && !m.meeting.over && m.round == 0 && m.dead == nil
}

// livesAsking returns the number that stands for the processes that have asked, and this one.
func (m *member) livesAsking() uint64 {
	lives := make([]uint64, m.size)
	for rank := range m.peers {
		lives[rank] = m.peers[rank].asked
	}
	lives[m.rank] = m.epoch
	return hashLives(lives)
}

// getReady says which processes this rank knows, if it knows one of each rank.
func (m *member) getReady() {
	if m.meeting.asked < m.size-1 {
		return
	}
	own, lives := &m.peers[m.rank].ready, m.livesAsking()
	if lives == *own {
		return
	}
	*own, m.meeting.same = lives, 0
	m.sayReady()
	m.beginTogether()
}

func (m *member) sayReady() {
	ready := m.message(kindReady)
	ready.lives = m.peers[m.rank].ready
	m.publish(ready.encode())
}

// greetAgain says once more to the hub what a rank that joins a new group has said last.
func (m *member) greetAgain() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.meets() && m.peers[m.rank].ready != 0 {
		m.sayReady()
	} else {
		m.askLocked(toAll)
	}
}

// handleReady notes which processes a rank of a new group knows.
func (m *member) handleReady(msg *message) {
	if p := &m.peers[msg.rank]; p.ready != msg.lives {
		p.ready, m.meeting.same = msg.lives, min(m.meeting.same, msg.rank)
	}
	if msg.full && msg.rank == m.hub {
		m.meeting.passed = msg.lives
		for rank := range m.peers {
			if rank != m.rank {
				m.peers[rank].ready = msg.lives
			}
		}
	}
	if !m.meets() {
		return
	}
	if p := &m.peers[msg.rank]; p.asked != msg.epoch { // what it has said before got lost
		m.noteAsked(p, msg.epoch)
		m.getReady()
	}
	m.beginTogether()
}

// beginTogether makes this rank a part of the group when all say that they know the same processes.
func (m *member) beginTogether() {
	own := m.peers[m.rank].ready
	if !m.isHub() && m.meeting.passed != own {
		return
	}
	for same := &m.meeting.same; *same < m.size; *same++ {
		if own == 0 || m.peers[*same].ready != own {
			return
		}
	}
	if m.livesAsking() != own { // another process has asked since
		return
	}
	for rank := range m.peers {
		if p := &m.peers[rank]; rank != m.rank {
			p.heard = true
			m.setEpoch(rank, p.asked)
		}
	}
	for rank := range m.peers {
		m.peers[rank].hello = nil
	}
	m.phase, m.meeting.over = joined, true
	m.signal()
}
