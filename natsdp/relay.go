package natsdp

import (
	"math/rand/v2"
	"time"
)

// In a group of hubFrom ranks or more, each rank sends its vote to one of them, the hub, which passes
// them on in bundles. So a round costs a number of messages that grows with the ranks, not with their
// square; its bytes still do, since each rank gets the votes of all. The protocol stays what it is:
// the hub carries messages of others and says nothing in their names.
//
// The hub is no new single point of failure, since no round is complete without each rank. It passes
// on what it has while its own rank runs a pass. If it knows nothing of a rank, that rank has not
// spoken, or is not heard.
const (
	hubFrom = 16
	noHub   = -1
)

// These say when the hub passes on what is not all that it waits for: so long after the last message
// that came, so long after the first, and so many times a round.
const (
	passQuiet = 5 * time.Millisecond
	passMost  = 50 * time.Millisecond
	passParts = 2
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

	timer       *time.Timer // nil: nothing waits
	first, last time.Time   // when something came that waits
}

// forget drops the votes of a round that is over.
func (r *relay) forget() { r.votes, r.passed, r.parts = nil, 0, 0 }

// round returns the votes of the open round in messages.
func (r *relay) round(m *member) [][]byte { return bundles(m.message(kindBundle), r.votes, m.most) }

func (m *member) hasHub() bool { return m.hub != noHub }

func (m *member) isHub() bool { return m.rank == m.hub }

// publish sends a message to all, itself or through the hub.
func (m *member) publish(data []byte) {
	switch {
	case !m.hasHub() || !m.isHub() && m.peers[m.hub].gone:
		m.send(toAll, data)
	case m.isHub():
		m.relay.greetings = append(m.relay.greetings, data)
		m.passLater()
	default:
		m.send(m.hub, data)
	}
}

// passGreeting passes on what a rank that joins or leaves says to all.
func (m *member) passGreeting(msg *message, direct bool) {
	if m.isHub() && direct && m.peers[msg.rank].greetings.allow() {
		m.relay.greetings = append(m.relay.greetings, msg.raw)
		m.passLater()
	}
}

// passVote passes on a vote of the open round: immediately if it was the last one.
func (m *member) passVote(msg *message) {
	if !m.isHub() {
		return
	}
	m.relay.votes = append(m.relay.votes, msg.raw)
	if g := &m.open; g.count == m.size && (g.full == 0 || g.full == m.size) {
		m.passOn()
	} else if m.relay.parts < passParts {
		m.passLater()
	}
}

// ownVotePassed notes that the hub has passed on this rank's own vote.
func (m *member) ownVotePassed(msg *message) {
	if m.hasHub() && !m.isHub() && m.waiting && msg.round == m.round+1 {
		m.asked = time.Time{} // the hub has answered
		msg.vote, msg.lives, msg.ending = m.vote, m.lives, m.ending
		m.add(&m.open, msg)
	}
}

func (m *member) passLater() {
	r := &m.relay
	r.last = time.Now()
	if r.timer == nil {
		r.first = r.last
		r.timer = time.AfterFunc(passQuiet, m.passWhenQuiet)
	}
}

func (m *member) passWhenQuiet() {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &m.relay
	if r.timer == nil {
		return
	}
	if now := time.Now(); m.dead == nil && now.Sub(r.last) < passQuiet && now.Sub(r.first) < passMost {
		r.timer.Reset(passQuiet - now.Sub(r.last))
		return
	}
	if r.passed < len(r.votes) {
		r.parts++
	}
	m.passOn()
}

// passOn passes on everything that waits.
func (m *member) passOn() {
	r := &m.relay
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	for _, data := range bundles(m.message(kindBundle), append(r.greetings, r.votes[r.passed:]...), m.most) {
		m.send(toAll, data)
	}
	r.greetings, r.passed = nil, len(r.votes)
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

// lackingThroughHub returns which of the ranks that a rank lacks may be to blame. If nothing has come
// from the hub, not even this rank's own vote or an answer, it is the hub.
func (m *member) lackingThroughHub(ranks []int) []int {
	ranks = without(ranks, []int{m.rank})
	silent := !m.asked.IsZero() && time.Since(m.asked) >= silentMost
	if m.open.count == 0 || len(ranks) == 0 || silent {
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
	return hashLives(func(yield func(uint64) bool) {
		for rank := range m.peers {
			epoch := m.peers[rank].asked
			if rank == m.rank {
				epoch = m.epoch
			}
			if !yield(epoch) {
				return
			}
		}
	})
}

// getReady says which processes this rank knows, if it knows one of each rank.
func (m *member) getReady() {
	if m.meeting.asked < m.size-1 {
		return
	}
	own, lives := &m.peers[m.rank].ready, m.livesAsking()
	if lives == *own && time.Since(m.lastAsked) < askInterval {
		return
	}
	*own, m.lastAsked, m.meeting.same = lives, time.Now(), 0
	ready := m.message(kindReady)
	ready.lives = lives
	m.publish(ready.encode())
	m.beginTogether()
}

// handleReady notes which processes a rank of a new group knows.
func (m *member) handleReady(msg *message) {
	if p := &m.peers[msg.rank]; p.ready != msg.lives {
		p.ready, m.meeting.same = msg.lives, min(m.meeting.same, msg.rank)
	}
	if m.meets() {
		m.beginTogether()
	}
}

// beginTogether makes this rank a part of the group when all say that they know the same processes.
func (m *member) beginTogether() {
	own := m.peers[m.rank].ready
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
			p.epoch, p.heard = p.asked, true
		}
	}
	m.phase, m.meeting.over = joined, true
	m.signal()
}
