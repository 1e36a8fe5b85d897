package natsdp

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// link is the connection of a process with its group, for one or more ranks.
//
// A connection may keep its user waiting: for a name server, a server that does not answer, or room
// in a socket. No caller must wait for that, so a goroutine speaks on it, and those of its
// subscriptions listen.
type link struct {
	conn    *nats.Conn
	owned   bool
	base    string // of subjects: PREFIX.GROUP
	self    *speaker
	size    int
	members []*member // by rank
	byRank  map[int]*member

	out   chan outgoing
	subs  []*nats.Subscription
	down  atomic.Bool   // the connection is being made again: what is sent is lost
	done  chan struct{} // closed to make speak end
	ended chan struct{} // closed when it has ended

	open          atomic.Int32 // ranks that have not left
	speakers      sync.Map     // of *speaker, by token
	speakersKnown atomic.Int32

	troubles chan chan<- error // see trouble

	// For speak alone.
	refused error // why the last message could not be sent; nil: it could
	known   error // of the server, when findTrouble has looked last
	lost    int   // messages for which there was no room, likewise
}

// outgoing is a message to a rank, or to all.
type outgoing struct {
	from *member
	to   int
	data []byte
}

func newLink(cfg Config, o *options, conn *nats.Conn) *link {
	l := &link{
		conn: conn, owned: o.connect != nil,
		base:   o.prefix + "." + cfg.Group,
		self:   newSpeaker(cfg.Ranks),
		size:   cfg.Size,
		byRank: make(map[int]*member, len(cfg.Ranks)),
		out:    make(chan outgoing, queueRoom(cfg.Size)),
		done:   make(chan struct{}),
		ended:  make(chan struct{}),

		troubles: make(chan chan<- error),
	}
	for _, rank := range slices.Sorted(slices.Values(cfg.Ranks)) {
		m := newMember(cfg.Group, rank, cfg.Size, nil)
		m.send = func(to int, data []byte) { l.send(outgoing{m, to, data}) }
		m.log = o.log.With("group", cfg.Group, "rank", rank)
		m.trouble = l.trouble
		l.byRank[rank] = m
		l.members = append(l.members, m)
	}
	l.open.Store(int32(len(l.members)))
	return l
}

// join makes all ranks of the link a part of the group, or none.
func (l *link) join(ctx context.Context) error {
	errs := make([]error, len(l.members))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i, m := range l.members {
		wg.Go(func() {
			if errs[i] = m.join(ctx); errs[i] != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("rank %d can't join: %w", m.rank, errs[i]))
			}
		})
	}
	wg.Wait()
	err := errors.Join(errs...)
	if err == nil {
		return nil
	}
	for _, m := range l.members {
		m.goodbye()
	}
	l.release()
	if cause := context.Cause(ctx); len(l.members) > 1 && cause != nil && !errors.Is(err, cause) {
		return cause
	}
	if len(l.members) == 1 {
		return errs[0]
	}
	return err
}

// leave lets go of the connection when the last rank has left.
func (l *link) leave() {
	if l.open.Add(-1) == 0 {
		l.release()
	}
}

// release lets go of the connection. It waits until that is done, though not for long.
func (l *link) release() {
	deaf.Delete(deafConn{l.conn, l.base})
	close(l.done)
	select {
	case <-l.ended:
	case <-time.After(lingerMost):
	}
}

// deaf are the connections with nats.NoEcho that groups use, by the subjects of the group.
var deaf sync.Map // of deafConn

type deafConn struct {
	conn *nats.Conn
	base string
}

// claimConn refuses a connection with nats.NoEcho that other ranks of the group have.
func (l *link) claimConn() error {
	if l.owned || !l.conn.Opts.NoEcho {
		return nil
	}
	if other, taken := deaf.LoadOrStore(deafConn{l.conn, l.base}, l.self.token); taken {
		return invalidf("ranks %s and %s of a group share a connection with nats.NoEcho, and would not "+
			"hear each other; connect without it", other, l.self.token)
	}
	return nil
}

// queueRoom returns how many messages a queue holds: those of several rounds. What does not fit is
// dropped, and asked for again.
func queueRoom(size int) int { return min(1024+16*size, 1<<16) }

// queueBytes is how many bytes a queue of messages that have come in holds, since anyone who may
// publish to a rank can send large ones. There is room for a vote with the longest trace state of
// each of 1,000 ranks.
const queueBytes = 4 << 20

// send leaves a message to speak. It drops it if there is no room.
func (l *link) send(o outgoing) {
	select {
	case l.out <- o:
	default:
	}
}

// speak does everything that is done on the connection, from first to last.
func (l *link) speak() {
	defer close(l.ended)
	if l.owned {
		defer l.hangUp()
	}
	before := l.conn.LastError()
	status := l.conn.StatusChanged(nats.RECONNECTING, nats.CONNECTED, nats.CLOSED)
	defer l.conn.RemoveStatusListener(status)
	l.down.Store(!l.conn.IsConnected())
	l.measure()
	if err := l.subscribe(); err != nil {
		l.each(func(m *member) { m.lose(fmt.Errorf("natsdp: %w", err)) })
	}
	defer l.unsubscribe()
	select {
	case <-l.done: // Join has given up already, and nobody has heard of it
		return
	default:
	}
	var watching sync.WaitGroup
	watching.Go(func() { l.watch(status) })
	l.publish(before)
	watching.Wait()
}

func (l *link) each(do func(m *member)) {
	for _, m := range l.members {
		do(m)
	}
}

// measure tells the members how large a message may be.
func (l *link) measure() {
	if n := l.conn.MaxPayload(); n > 0 {
		l.each(func(m *member) { m.setMost(int(n)) })
	}
}

func (l *link) subscribe() error {
	err := l.subscribeTo("all", toAll)
	for _, m := range l.members {
		if err == nil {
			err = l.subscribeTo(strconv.Itoa(m.rank), m.rank)
		}
	}
	return err
}

// subscribeTo hands the members what comes in for an address. Its queue has bounds.
func (l *link) subscribeTo(address string, to int) error {
	sub, err := l.conn.Subscribe(l.base+"."+address+".*", func(msg *nats.Msg) { l.receive(to, msg) })
	if err != nil {
		return err
	}
	l.subs = append(l.subs, sub)
	return sub.SetPendingLimits(queueRoom(l.size), queueBytes)
}

// unsubscribe ends the subscriptions. An error says that the connection has ended.
func (l *link) unsubscribe() {
	for _, sub := range l.subs {
		_ = sub.Unsubscribe()
	}
}

// hangUp closes the connection after the goodbye is on its way.
func (l *link) hangUp() {
	if l.conn.IsConnected() {
		_ = l.conn.FlushTimeout(lingerMost)
	}
	l.conn.Close()
}

// receive hands a message to the rank that it is for, or to all. A bundle holds several.
func (l *link) receive(to int, msg *nats.Msg) {
	from, ok := l.speaker(msg.Subject)
	targets := l.members
	if to != toAll {
		targets = []*member{l.byRank[to]}
	}
	if !ok {
		for range unbundle(msg.Data) {
			for _, m := range targets {
				m.foreign()
			}
		}
		return
	}
	if from == l.self && l.said(msg.Data) {
		return // an echo
	}
	hear(targets, from, to != toAll, msg.Data)
}

// said reports whether a message is one of this process.
func (l *link) said(data []byte) bool {
	rank, ok := sayer(data)
	m := l.byRank[rank]
	return ok && m != nil && m.isEpoch(sayerEpoch(data))
}

// publish publishes what the members send, unless the connection is down. A member has no use for an
// error: what is lost is asked for, and the status of the connection tells when it ends. While ranks
// join, publish also looks for a refusal of the server, other than the error that was there before.
func (l *link) publish(before error) {
	look := time.NewTicker(resendFirst / 2)
	defer look.Stop()
	var b batch
	hold := time.NewTimer(time.Hour)
	defer hold.Stop()
	for {
		select {
		case o := <-l.out:
			l.take(&b, o)
			part := b.partOfVotes(len(l.members))
			if part && len(l.out) == 0 {
				runtime.Gosched() // ranks whose round ended together vote together, if they are let
			}
			if len(l.out) > 0 {
				continue
			}
			if !part {
				l.flush(&b)
				hold.Stop()
			} else if !b.held {
				b.held = true
				hold.Reset(holdMost)
			}
		case <-hold.C:
			l.flush(&b)
		case <-look.C:
			if !l.findRefusal(before) {
				look.Stop()
			}
		case answer := <-l.troubles:
			answer <- l.findTrouble()
		case <-l.done:
			for range len(l.out) { // the goodbye is the last
				l.take(&b, <-l.out)
			}
			l.flush(&b)
			return
		}
	}
}

// batch is messages to the same address that go out as one.
type batch struct {
	from *member // of the first
	to   int
	data [][]byte
	held bool // until holdMost is over
}

// holdMost is how long the vote of a rank waits for those of others in its process.
const holdMost = time.Millisecond

// partOfVotes reports whether a batch holds votes and nothing else, of fewer than all ranks of a process.
func (b *batch) partOfVotes(ranks int) bool {
	return len(b.data) > 0 && len(b.data) < ranks &&
		!slices.ContainsFunc(b.data, func(data []byte) bool { return kind(data[3]) != kindVote })
}

// take hands a message to the ranks of this process that it is for, and keeps it for the others.
func (l *link) take(b *batch, o outgoing) {
	if local := l.byRank[o.to]; local != nil && local != o.from {
		hear([]*member{local}, l.self, true, o.data)
		return
	}
	if o.to == toAll {
		if others := l.others(o.from); len(others) > 0 {
			hear(others, l.self, false, o.data)
		}
		if len(l.members) == l.size && kind(o.data[3]) == kindVote {
			return // nobody else votes
		}
	}
	if len(b.data) > 0 && b.to != o.to {
		l.flush(b)
	}
	if len(b.data) == 0 {
		b.from, b.to = o.from, o.to
	}
	b.data = append(b.data, o.data)
}

// others returns the other ranks of this process.
func (l *link) others(m *member) []*member {
	return slices.DeleteFunc(slices.Clone(l.members), func(other *member) bool { return other == m })
}

// flush publishes a batch.
func (l *link) flush(b *batch) {
	if len(b.data) == 0 {
		return
	}
	address := "all"
	if b.to != toAll {
		address = strconv.Itoa(b.to)
	}
	subject := l.base + "." + address + "." + l.self.token
	for _, data := range b.from.pack(b.data) {
		if !l.down.Load() {
			l.noteRefused(l.conn.Publish(subject, data))
		}
	}
	b.data, b.held = nil, false
}

// noteRefused notes why a message could not be sent, if it is too large.
func (l *link) noteRefused(err error) {
	if !errors.Is(err, nats.ErrMaxPayload) {
		err = nil
	}
	if l.refused == nil && err != nil {
		l.members[0].log.Error("a message can't be sent", "error", err)
	}
	l.refused = err
}

// findRefusal ends joining if the server has refused something that the ranks need. It reports whether
// ranks still join.
func (l *link) findRefusal(before error) (joining bool) {
	err := l.conn.LastError()
	refused := err != before && l.isRefusal(err)
	for _, m := range l.members {
		if !m.hasJoined() {
			if joining = true; refused {
				m.failJoin(fmt.Errorf("natsdp: %w", err))
			}
		}
	}
	return joining
}

// isRefusal reports whether an error is that of a server which does not let the ranks have their
// subjects in the group.
func (l *link) isRefusal(err error) bool {
	if errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
		return true
	}
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return false
	}
	_, subject, ok := strings.Cut(err.Error(), `"`+l.base+".")
	subject, _, _ = strings.Cut(subject, `"`)
	to, from, _ := strings.Cut(subject, ".")
	if from == "*" && to != "all" {
		rank, err := strconv.Atoi(to)
		return ok && err == nil && l.byRank[rank] != nil
	}
	return ok && (from == "*" || from == l.self.token)
}

// troubleMost is how long a rank waits to hear what is wrong with its connection, which may hang.
const troubleMost = 100 * time.Millisecond

// trouble returns what has kept messages from going out or coming in since it was called last, or nil.
func (l *link) trouble() error {
	answer, late := make(chan error, 1), time.After(troubleMost)
	select {
	case l.troubles <- answer:
	case <-late:
		return nil
	}
	select {
	case err := <-answer:
		return err
	case <-late:
		return nil
	}
}

func (l *link) findTrouble() error {
	lost := 0
	for _, sub := range l.subs {
		n, _ := sub.Dropped()
		lost += n
	}
	before, known := l.lost, l.known
	l.lost, l.known = lost, l.conn.LastError()
	switch {
	case l.refused != nil:
		return l.refused
	case l.known != known && l.isRefusal(l.known):
		return l.known
	case lost > before:
		return fmt.Errorf("%w: this process had no room for %d messages", nats.ErrSlowConsumer, lost-before)
	}
	return nil
}

// watch tells the members when the connection is lost, is there again, and has ended.
func (l *link) watch(status <-chan nats.Status) {
	for {
		select {
		case s := <-status:
			l.down.Store(s != nats.CONNECTED)
			l.members[0].log.Warn("the connection has changed", "status", s.String())
			if s == nats.CLOSED {
				l.each(func(m *member) { m.lose(l.closedError(m.rank)) })
				continue
			}
			if s == nats.CONNECTED {
				l.measure()
			}
			l.each(func(m *member) { m.interrupted(s == nats.CONNECTED) })
		case <-l.done:
			return
		}
	}
}

// closedError says that the connection has ended, and why if that is known.
func (l *link) closedError(rank int) error {
	if err := l.conn.LastError(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		return fmt.Errorf("natsdp: rank %d: %w: %w", rank, nats.ErrConnectionClosed, err)
	}
	return fmt.Errorf("natsdp: rank %d: %w", rank, nats.ErrConnectionClosed)
}

// speaker is a process that speaks for ranks, by the last token of its subjects: "5", or "0-3_8" for
// several.
type speaker struct {
	token string
	runs  []run // ascending, with other ranks between them
}

// run is ranks in a row.
type run struct{ first, last int }

// newSpeaker returns who speaks for these ranks.
func newSpeaker(ranks []int) *speaker {
	var runs []run
	for _, rank := range slices.Sorted(slices.Values(ranks)) {
		if n := len(runs); n > 0 && runs[n-1].last+1 == rank {
			runs[n-1].last = rank
		} else {
			runs = append(runs, run{rank, rank})
		}
	}
	return &speaker{token(runs), runs}
}

// token returns how runs are written.
func token(runs []run) string {
	var b []byte
	for i, r := range runs {
		if i > 0 {
			b = append(b, '_')
		}
		b = strconv.AppendInt(b, int64(r.first), 10)
		if r.last > r.first {
			b = append(b, '-')
			b = strconv.AppendInt(b, int64(r.last), 10)
		}
	}
	return string(b)
}

func (s *speaker) has(rank int) bool {
	return slices.ContainsFunc(s.runs, func(r run) bool { return r.first <= rank && rank <= r.last })
}

// speaker returns who speaks on a subject.
func (l *link) speaker(subject string) (*speaker, bool) {
	token := subject[strings.LastIndexByte(subject, '.')+1:]
	if token == l.self.token {
		return l.self, true
	}
	if s, ok := l.speakers.Load(token); ok {
		return s.(*speaker), true
	}
	s, ok := parseSpeaker(token)
	if ok && l.speakersKnown.Add(1) <= int32(l.size) { // honest processes are not more
		l.speakers.Store(token, s)
	}
	return s, ok
}

// parseSpeaker returns who speaks with a token. Tokens such as 01, +1 and 0-1_2 are nobody's: a server
// knows them as other subjects than 1 and 0-2, with other permissions.
func parseSpeaker(text string) (*speaker, bool) {
	var runs []run
	before := -2 // two below the next rank that may begin a run
	for part := range strings.SplitSeq(text, "_") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err := strconv.Atoi(from)
		last, err2 := strconv.Atoi(to)
		if err != nil || err2 != nil || first < before+2 || last < first || last >= maxRanks {
			return nil, false
		}
		runs, before = append(runs, run{first, last}), last
	}
	return &speaker{text, runs}, token(runs) == text
}
