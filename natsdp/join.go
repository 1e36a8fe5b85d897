package natsdp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
)

// These are how long a rank that joins waits before it asks again: at first, and after some times.
const (
	resendFirst = 50 * time.Millisecond
	resendMost  = time.Second
)

const (
	// claimWait is how long a rank that joins waits for an objection, if it has been told of another
	// process with its rank. That process answers, or it is dead.
	claimWait = time.Second

	// lingerMost is how long a rank that leaves waits for those who may lack its last vote, and then
	// for its connection.
	lingerMost = time.Second
)

// phase is how far a rank is in joining its group.
type phase uint8

const (
	asking   phase = iota // it asks where the others are, and who else has this rank
	claiming              // nobody objected: it asks the others to listen to no other life of this rank
	joined
)

// join makes the rank a part of the group. First it hears from all others. They say at which round
// they are, and whether they know another process with its rank; it waits for an objection of that
// process. Then it claims the rank. The answers to the claim say in which rounds the rank can't
// vote, because some of the others may count the vote of an earlier life there. After an error the
// caller says goodbye, so that the next process of this rank need not wait for an objection of this
// one.
func (m *member) join(ctx context.Context) error {
	var objections <-chan time.Time // nil: nobody else is known
	quiet := true
	interval, most := resendFirst, resendMost
	if m.hasHub() {
		interval, most = resendMost, 2*resendMost
	}
	said := time.Now()
	again := time.NewTimer(interval)
	defer again.Stop()
	m.ask(toAll)
	for {
		missing, contested, err := m.unheard()
		if err != nil {
			return err
		}
		if contested && objections == nil {
			objections, quiet = time.After(claimWait), false
		}
		if len(missing) == 0 && quiet {
			if m.proceed() {
				return nil
			}
			continue
		}
		select {
		case <-m.changed:
		case <-objections:
			quiet = true
		case <-again.C:
			if now := time.Now(); now.Sub(said) >= time.Second {
				said = now
				m.log.Warn("waiting for ranks", "missing", missing)
			}
			if m.hasHub() {
				m.greetAgain()
			} else {
				m.ask(append(missing, m.rank)...) // another process may have its own rank too
			}
			interval = min(2*interval, most)
			again.Reset(interval)
		case <-ctx.Done():
			return m.joinError(context.Cause(ctx), missing)
		}
	}
}

// ask asks ranks, or all, where they are.
func (m *member) ask(ranks ...int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, rank := range ranks {
		m.askLocked(rank)
	}
}

func (m *member) askLocked(to int) {
	k := kindHello
	if m.phase == claiming {
		k = kindClaim
	}
	msg := m.message(k)
	if to == toAll {
		m.publish(msg.encode())
	} else {
		m.sendMessage(to, msg)
	}
}

// unheard returns which ranks have not answered yet, and whether another process may have this
// rank.
func (m *member) unheard() (missing []int, contested bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for rank := range m.peers {
		if rank != m.rank && !m.peers[rank].heard {
			missing = append(missing, rank)
		}
	}
	if m.speaksThroughHub() && !m.peers[m.hub].heard && m.peers[m.hub].asked == 0 {
		missing = []int{m.hub} // without which nobody can be heard
	}
	return missing, m.contested, m.dead
}

// proceed goes on to the next phase when all have answered in this one. It reports whether the rank
// has joined.
func (m *member) proceed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil { // meanwhile
		return false
	}
	if m.phase == joined { // together with all others
		m.log.Info("joined", "size", m.size, "step", m.step)
		return true
	}
	m.phase++
	if m.phase == claiming {
		for rank := range m.peers {
			m.peers[rank].heard = false
		}
		m.askLocked(toAll)
		return false
	}
	// The Runner counts from 1, and the group may be anywhere: the first vote is for the step that is
	// open.
	m.late, m.lateFrom = m.round > 0, 0
	if !m.hasHub() {
		m.sendMessage(toAll, m.state())
	}
	m.log.Info("joined", "size", m.size, "step", m.step)
	return true
}

func (m *member) joinError(cause error, missing []int) error {
	if len(missing) == 0 {
		return fmt.Errorf("natsdp: rank %d of %d waits for another process that may have its rank; "+
			"give Join more time: %w", m.rank, m.size, cause)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return &fwd.RankError{
		Err: fmt.Errorf("%w: rank %d of %d has not heard from all others: %w",
			fwd.ErrRankMissing, m.rank, m.size, cause),
		Step:  m.step,
		Ranks: missing,
	}
}

// handleHello answers a rank that asks.
func (m *member) handleHello(msg *message) {
	p := &m.peers[msg.rank]
	state := m.state()
	state.claimed, state.asker = msg.kind == kindClaim, msg.epoch
	epoch := m.epochs[msg.rank]
	held := epoch != 0 && epoch != msg.epoch && !p.gone
	wanted, heardBefore := p.asked != 0 && p.asked != msg.epoch, p.asked == msg.epoch
	state.contested, state.holder = held || wanted, epoch
	m.noteAsked(p, msg.epoch)
	if msg.kind == kindClaim && msg.epoch > epoch {
		m.newLife(msg)
	}
	if p.taken > state.round {
		state.round, state.step = p.taken, max(state.step, p.step)
	}
	if m.hasHub() && msg.rank == m.hub && m.waiting && msg.round > m.round {
		m.askForVotes()
	}
	if !p.answers.allow() {
		return
	}
	if m.meets() {
		if msg.rank == m.hub && !heardBefore { // it has not been there when this rank asked
			m.askLocked(toAll)
		}
		m.getReady()
		return
	}
	m.sendMessage(msg.rank, state)
	if m.phase != joined && !p.heard {
		m.askLocked(msg.rank) // it may not have been there when this rank asked all
	}
}

// handleState takes the answer of a rank, unless it is for an earlier life of this one.
func (m *member) handleState(p *peer, msg *message) {
	if msg.asker != m.epoch {
		return
	}
	if m.phase == joined {
		if msg.holds && msg.holder > m.epoch {
			m.dieReplaced()
		}
		return
	}
	if msg.ahead {
		m.refuse("the clock of rank %d was more than %v ahead of that of rank %d when it began; set the clocks",
			m.rank, clocksDiffer, msg.rank)
		return
	}
	m.contested = m.contested || msg.contested
	switch {
	case m.phase == claiming && !msg.claimed: // late: it was for the phase before
		return
	case m.phase == claiming && msg.holder > m.epoch: // another process has claimed it meanwhile
		m.die(fmt.Errorf("%w: rank %d of %d", ErrRankTaken, m.rank, m.size))
		return
	case m.phase == claiming && !msg.holds: // its sender may have to give way to a process that votes
		return
	case msg.holder > m.epoch: // the clock of its host was ahead
		m.former = append(m.former, m.epoch)
		m.epoch = msg.holder + 1 + rand.Uint64N(1<<32) // another process that does the same gets another one
		m.knownLives = 0
	}
	p.heard = true
	if msg.round > m.round {
		m.leftBehind(ending{}, msg.round, msg.step, 0)
	} else if msg.round == m.round {
		m.step = max(m.step, msg.step) // a round may end at a higher step for ranks that had all votes
	}
	m.signal()
}

// handleOwnRank takes a message of another process with this rank. A process that asks gives way to
// the one that holds the rank. If two ask, the one that began later gives way, unless the other has
// taken a new epoch meanwhile: then their claims decide. Two hold the rank if one did not answer in
// time when the other asked, and for a moment after such claims; the others listen to the later
// epoch.
func (m *member) handleOwnRank(msg *message) {
	switch {
	case msg.epoch == m.epoch && msg.kind == kindVote:
		m.ownVotePassed(msg)
		return
	case msg.epoch == m.epoch && msg.kind == kindReady:
		m.ownReadyPassed(msg)
		return
	}
	if msg.epoch == m.epoch || slices.Contains(m.former, msg.epoch) {
		return // an echo
	}
	m.stats.Foreign++
	if m.hasHub() && msg.kind == kindVote { // the hub has passed it on, so its process may have ended since
		return
	}
	asks := msg.kind == kindHello || msg.kind == kindState && !msg.holds
	switch {
	case msg.kind == kindBye:
	case m.phase == asking && !(asks && msg.epoch > m.began()):
		m.die(fmt.Errorf("%w: rank %d of %d", ErrRankTaken, m.rank, m.size))
	case m.phase != asking && !asks && msg.epoch > m.epoch:
		m.dieReplaced()
	case m.phase == asking && msg.kind == kindState: // both ask, and answers to answers would never end
	case m.strangers.allow():
		m.sendMessage(m.rank, m.state())
	}
}

// began returns the first epoch of this life.
func (m *member) began() uint64 {
	if len(m.former) > 0 {
		return m.former[0]
	}
	return m.epoch
}

// state returns this rank's answer to a rank that asks.
func (m *member) state() message {
	state := m.message(kindState)
	state.holds = m.phase != asking
	return state
}

// refuse ends joining, because the ranks are configured differently. A group that is together
// ignores that.
func (m *member) refuse(format string, args ...any) {
	if m.phase != joined {
		m.die(invalidf(format, args...))
	}
}

// failJoin ends joining, unless the rank has joined.
func (m *member) failJoin(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != joined {
		m.die(err)
	}
}

func (m *member) hasJoined() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.phase == joined
}

// die ends this rank's part for good.
func (m *member) die(err error) {
	if m.dead != nil {
		return
	}
	m.dead = err
	if !errors.Is(err, ErrClosed) {
		m.log.Error("this rank takes no further part", "error", err)
	}
	if m.waiting {
		m.lastRank = -1
		m.release(outcome{err: err})
	}
	m.signal()
}

// dieReplaced ends the part of a process whose rank another has now.
func (m *member) dieReplaced() {
	m.die(fmt.Errorf("%w: it became rank %d of %d while this one did not answer", ErrRankTaken, m.rank, m.size))
}

// lose ends this rank's part because its connection has ended.
func (m *member) lose(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.die(err)
}

// leave says goodbye when nobody needs this rank's last vote any more.
func (m *member) leave() {
	m.mu.Lock()
	m.leaving = true
	m.mu.Unlock()
	close(m.closing)
	m.breakRound()
	m.linger()
	m.goodbye()
}

// goodbye ends this rank's part, and tells the others.
func (m *member) goodbye() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil && !errors.Is(m.dead, ErrRankTaken) { // a process that gave way has asked, too
		return
	}
	for _, epoch := range append(m.former, m.epoch) {
		bye := m.message(kindBye)
		bye.epoch = epoch
		m.publish(bye.encode())
	}
	if m.isHub() {
		m.passGreetings() // nobody else does
	}
	m.die(ErrClosed)
}

// linger waits until the other ranks have what they need from this one, though not for long: they
// may be dead.
func (m *member) linger() {
	over := time.After(lingerMost)
	interval := resendFirst
	if m.hasHub() {
		interval = lingerMost / 4
	}
	again := time.NewTicker(interval)
	defer again.Stop()
	for help := !m.hasHub(); m.needed(help); {
		select {
		case <-m.changed:
			help = false
		case <-again.C:
			help = true
		case <-over:
			return
		}
	}
}

// needed reports whether a rank may still wait for this one's vote in the last round. If help is
// true, it sends that vote to the rank and asks whether it has it.
func (m *member) needed(help bool) (needed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil || m.phase != joined || !m.ending.complete || m.speaksThroughHub() {
		return false
	}
	for rank := range m.peers {
		if p := &m.peers[rank]; rank == m.rank || p.gone || p.ended >= m.round {
			continue
		}
		needed = true
		if help && !m.hasHub() {
			m.send(rank, m.answer[0])
		}
		if help {
			m.askLocked(rank)
		}
	}
	return needed
}
