package natsdp

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"math/bits"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
)

// A message is a header and a body. All numbers are big-endian. In every version the first four bytes
// mean the same, and so do the kinds that ask: so a rank of any version can be told which one the
// group speaks.
//
//	 0  magic "fw"                                   2 bytes
//	 2  version, kind                                1 each
//	 4  group: the FNV-1a hash of its name           8
//	12  size, rank                                   4 each
//	20  epoch: which life of the rank this is        8
//	28  round, step                                  8 each
//	44  body
const (
	magic   = "fw"
	version = 3
)

// kind says what a message is about.
type kind uint8

const (
	// kindHello asks all ranks for their state. It has no body.
	kindHello kind = 1 + iota

	// kindClaim asks for it too, and asks the others to listen to no other life of this rank from now
	// on. It has no body.
	kindClaim

	// kindState is the answer. Round and step are the last that have ended, and that the rank which
	// asked can't vote in. Body: flags (1), asker, holder (8 each).
	kindState

	// kindVote is a vote in the open round; its step in the header is that of the last round that has
	// ended. Body: see appendVote.
	kindVote

	// kindBroken says that a round and a step are over. Body: lowest (8), 1 if its rank has the votes of
	// all (1), then see ending.append.
	kindBroken

	// kindBye says that a rank leaves. Round and step are the last that have ended. It has no body.
	kindBye

	// kindAsk asks for a vote in a round that its rank has not got, or how that round has ended. It has
	// no body.
	kindAsk

	// kindReady says that its rank knows a process of each rank that joins a new group. Body: the hash
	// of their epochs, see hashLives (8), 1 if all ranks have said so (1).
	kindReady

	// kindBundle holds messages, each behind its length (4), of ranks that its rank speaks for.
	kindBundle
)

// The flags of a vote.
const (
	flagUniform = 1 << iota
	flagExcludeFull
	flagEager
	flagUBatch
	flagIdle
	flagWarmUp
	flagSpan     // a span context follows
	flagComplete // the round before this one ended with the votes of all
	flagBroken   // the round before this one was broken for its rank: who broke it and who was missing follows
	flagFull     // its rank has the votes of all in this round
	flagAsks     // its rank has not got the receiver's vote in this round: whoever waits in it sends that again

	flagsOfVote = 1<<iota - 1
)

// The flags of a state.
const (
	flagHolds     = 1 << iota // the rank is this process's: nobody has objected to its claim
	flagClaimed               // this answers a claim
	flagContested             // another process has, or wants, the rank that has asked
	flagAhead                 // the epoch of the asker is too far ahead of the clock here

	flagsOfState = 1<<iota - 1
)

const (
	maxRanks = 1 << 20 // that of fwd

	// maxCounter bounds rounds, steps and epochs: a larger one is damaged, and would overflow.
	maxCounter = 1 << 62

	// maxJump is the part of the steps that are left up to maxCounter which one message, or one vote
	// of this rank, may skip. So nothing that anybody says uses all of them up.
	maxJump = 64

	// maxTraceState bounds the bytes of a trace state. A longer one is left out, as the W3C
	// recommendation on trace context allows.
	maxTraceState = 4096
)

var be = binary.BigEndian

// These are the sizes of bodies in bytes.
const (
	headerSize = 44
	stateSize  = 1 + 8 + 8
	voteSize   = 51             // of a vote after a complete round, without a span
	spanSize   = 16 + 8 + 1 + 2 // without the trace state
	endingSize = 4              // without the bits of the missing ranks
	readySize  = 8 + 1
)

// message is any message. Fields that its kind does not use are zero.
type message struct {
	kind  kind
	group uint64
	size  int
	rank  int
	epoch uint64
	round uint64
	step  uint64    // the group's
	raw   []byte    // the message, in the bytes that came or go
	at    time.Time // when it came

	// Of a vote.
	vote  fwd.Vote
	lives uint64 // see hashLives; also that of kindReady
	asks  bool   // see flagAsks

	full bool // see flagFull; also of kindBroken and kindReady

	// Of a vote and of kindBroken.
	ending

	// Of kindBroken.
	lowest uint64 // the lowest step that was voted in the round

	// Of a state.
	holds     bool
	claimed   bool
	contested bool
	ahead     bool
	asker     uint64 // the epoch of the life that has asked; 0: nobody
	holder    uint64 // the epoch of the life that has that rank, as far as is known; 0: nobody
}

// ending is how a round has ended for a rank. The zero value says nothing, since its rank has just
// begun, or was left behind.
type ending struct {
	complete bool // the votes of all were there, and agreed on the round before
	broken   bool

	// Of a broken round.
	by      int   // the rank that stopped waiting
	missing []int // ascending
}

// hashGroup returns the number that stands for the name of a group.
func hashGroup(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return h.Sum64()
}

// hashLives returns the number that stands for the lives of all ranks that a rank counts: the FNV-1a
// hash of their epochs, in rank order.
func hashLives(epochs []uint64) uint64 {
	h := fnv.New64a()
	var b [8]byte
	for _, epoch := range epochs {
		be.PutUint64(b[:], epoch)
		h.Write(b[:])
	}
	return h.Sum64()
}

// encode returns the message's bytes.
func (m *message) encode() []byte {
	b := make([]byte, 0, 96) // enough for a vote without a span
	b = append(b, magic...)
	b = append(b, version, byte(m.kind))
	b = be.AppendUint64(b, m.group)
	b = be.AppendUint32(b, uint32(m.size))
	b = be.AppendUint32(b, uint32(m.rank))
	for _, n := range [...]uint64{m.epoch, m.round, m.step} {
		b = be.AppendUint64(b, n)
	}
	switch m.kind {
	case kindVote:
		b = m.appendVote(b)
	case kindBroken:
		b = be.AppendUint64(b, m.lowest)
		b = append(b, byte(flag(m.full, 1)))
		b = m.ending.append(b, m.size)
	case kindState:
		b = append(b, byte(flag(m.holds, flagHolds)|flag(m.claimed, flagClaimed)|
			flag(m.contested, flagContested)|flag(m.ahead, flagAhead)))
		b = be.AppendUint64(b, m.asker)
		b = be.AppendUint64(b, m.holder)
	case kindReady:
		b = be.AppendUint64(b, m.lives)
		b = append(b, byte(flag(m.full, 1)))
	}
	return b
}

// append appends who broke a round (4 bytes), and a bit for each rank that was missing.
func (e *ending) append(b []byte, size int) []byte {
	b = be.AppendUint32(b, uint32(e.by))
	bits := len(b)
	b = append(b, make([]byte, (size+7)/8)...)
	for _, rank := range e.missing {
		b[bits+rank/8] |= 1 << (rank % 8)
	}
	return b
}

// appendVote appends a vote:
//
//	 0  step                                         8 bytes
//	 8  tokens, padded tokens, requests, adapters    4 each
//	24  note, fingerprint of the configuration       8 each
//	40  lives that its rank counts, see hashLives    8
//	48  graph mode                                   1
//	49  flags                                        2
//	51  after a broken round: see ending.append
//	..  span context, see appendSpan
func (m *message) appendVote(b []byte) []byte {
	v := &m.vote
	b = be.AppendUint64(b, v.Step)
	for _, n := range [...]int{v.NumTokens, v.NumTokensPadded, v.NumReqs, v.NumActiveLoRAs} {
		b = be.AppendUint32(b, uint32(n))
	}
	b = be.AppendUint64(b, v.Note)
	b = be.AppendUint64(b, v.Config)
	b = be.AppendUint64(b, m.lives)
	b = append(b, byte(v.GraphMode))
	span := hasSpan(v.SpanContext)
	b = be.AppendUint16(b, flag(v.Uniform, flagUniform)|flag(v.ExcludeFull, flagExcludeFull)|
		flag(v.Eager, flagEager)|flag(v.UBatch, flagUBatch)|flag(v.Idle, flagIdle)|flag(v.WarmUp, flagWarmUp)|
		flag(span, flagSpan)|flag(m.complete, flagComplete)|flag(m.broken, flagBroken)|flag(m.full, flagFull)|
		flag(m.asks, flagAsks))
	if m.broken {
		b = m.ending.append(b, m.size)
	}
	if span {
		b = appendSpan(b, v.SpanContext)
	}
	return b
}

// appendSpan appends a span context: its trace (16 bytes), its span (8), its flags (1), the length
// of its trace state (2), and the trace state.
func appendSpan(b []byte, sc trace.SpanContext) []byte {
	traceID, spanID := sc.TraceID(), sc.SpanID()
	b = append(b, traceID[:]...)
	b = append(b, spanID[:]...)
	b = append(b, byte(sc.TraceFlags()))
	state := ""
	if sc.TraceState().Len() > 0 {
		if state = sc.TraceState().String(); len(state) > maxTraceState {
			state = ""
		}
	}
	b = be.AppendUint16(b, uint16(len(state)))
	return append(b, state...)
}

// hasSpan reports whether a span context holds anything, valid or not.
func hasSpan(sc trace.SpanContext) bool {
	return sc.HasTraceID() || sc.HasSpanID() || sc.TraceFlags() != 0 || sc.TraceState().Len() > 0
}

func flag(set bool, bit uint16) uint16 {
	if set {
		return bit
	}
	return 0
}

// decodeHeader reads the header of a message into m, and returns the body for decodeBody. Bodies of other
// groups, and of other sizes, are not worth the memory that they may need. It never panics: anyone
// who may publish on the subject can send anything.
func (m *message) decodeHeader(b []byte) (body []byte, err error) {
	if len(b) < len(magic)+1 || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%d bytes that are no message of a group", len(b))
	}
	if v := b[len(magic)]; v != version {
		asks := len(b) > 3 && (kind(b[3]) == kindHello || kind(b[3]) == kindClaim)
		return nil, versionError{v, asks}
	}
	if len(b) > len(magic)+1 {
		m.kind = kind(b[len(magic)+1])
	}
	if len(b) < headerSize {
		return nil, m.damaged()
	}
	m.group, m.size, m.rank = be.Uint64(b[4:]), int(be.Uint32(b[12:])), int(be.Uint32(b[16:]))
	m.epoch, m.round, m.step = be.Uint64(b[20:]), be.Uint64(b[28:]), be.Uint64(b[36:])
	body = b[headerSize:]
	least, most := m.bodySize()
	if m.size < 1 || m.size > maxRanks || m.rank < 0 || m.rank >= m.size ||
		max(m.epoch, m.round, m.step) > maxCounter || len(body) < least || len(body) > most {
		return nil, m.damaged()
	}
	return body, nil
}

// bodySize returns how many bytes a body of this kind has, or none that fit if there is no such
// kind.
func (m *message) bodySize() (least, most int) {
	switch m.kind {
	case kindHello, kindClaim, kindBye, kindAsk:
		return 0, 0
	case kindState:
		return stateSize, stateSize
	case kindVote:
		return voteSize, voteSize + endingSize + (m.size+7)/8 + spanSize + maxTraceState
	case kindBroken:
		n := 8 + 1 + endingSize + (m.size+7)/8
		return n, n
	case kindReady:
		return readySize, readySize
	case kindBundle: // whose messages are looked at one by one
		return 4 + headerSize, math.MaxInt
	}
	return 1, 0
}

// decodeBody reads what follows the header. It accepts exactly what encode writes, and returns an
// error for anything else.
func (m *message) decodeBody(body []byte) error {
	r := reader{rest: body}
	switch m.kind {
	case kindState:
		m.decodeState(&r)
	case kindVote:
		m.decodeVote(&r)
	case kindBroken:
		m.lowest = r.counter()
		m.full, m.broken = r.bool(), true
		m.decodeEnding(&r)
	case kindReady:
		m.lives, m.full = r.uint64(), r.bool()
	}
	if r.bad || len(r.rest) > 0 {
		return m.damaged()
	}
	return nil
}

func (m *message) damaged() error { return fmt.Errorf("a damaged message of kind %d", m.kind) }

func (m *message) decodeState(r *reader) {
	flags := r.uint8()
	r.require(flags&^flagsOfState == 0)
	m.holds, m.claimed, m.contested = flags&flagHolds != 0, flags&flagClaimed != 0, flags&flagContested != 0
	m.ahead = flags&flagAhead != 0
	m.asker, m.holder = r.counter(), r.counter()
}

func (m *message) decodeVote(r *reader) {
	b := r.bytes(voteSize)
	if b == nil {
		return
	}
	v := &m.vote
	v.Step = be.Uint64(b[0:])
	v.NumTokens, v.NumTokensPadded = int(be.Uint32(b[8:])), int(be.Uint32(b[12:]))
	v.NumReqs, v.NumActiveLoRAs = int(be.Uint32(b[16:])), int(be.Uint32(b[20:]))
	v.Note, v.Config, m.lives = be.Uint64(b[24:]), be.Uint64(b[32:]), be.Uint64(b[40:])
	v.GraphMode = fwd.GraphMode(b[48])
	flags := be.Uint16(b[49:])
	v.Uniform, v.ExcludeFull, v.Eager = flags&flagUniform != 0, flags&flagExcludeFull != 0, flags&flagEager != 0
	v.UBatch, v.Idle, v.WarmUp = flags&flagUBatch != 0, flags&flagIdle != 0, flags&flagWarmUp != 0
	m.complete, m.broken = flags&flagComplete != 0, flags&flagBroken != 0
	m.full, m.asks = flags&flagFull != 0, flags&flagAsks != 0
	r.require(flags&^flagsOfVote == 0 && m.round > 0 && !(m.complete && m.broken) && v.Step <= maxCounter)
	r.require(v.Validate(m.rank) == nil)
	if m.broken {
		m.decodeEnding(r)
	}
	if flags&flagSpan != 0 {
		v.SpanContext = r.span()
	}
}

func (m *message) decodeEnding(r *reader) {
	m.by = int(r.uint32())
	missing := r.bytes((m.size + 7) / 8)
	count := 0
	for _, b := range missing {
		count += bits.OnesCount8(b)
	}
	m.missing = make([]int, 0, count)
	for i, b := range missing {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				m.missing = append(m.missing, 8*i+bit)
			}
		}
	}
	r.require(m.by >= 0 && m.by < m.size && m.round > 0 && len(m.missing) > 0)
	r.require(len(m.missing) == 0 || m.missing[len(m.missing)-1] < m.size)
}

// sayer returns the rank that a message says it comes from.
func sayer(data []byte) (rank int, ok bool) {
	if len(data) < 20 {
		return 0, false
	}
	return int(be.Uint32(data[16:])), true
}

// sayerEpoch returns the epoch in a message whose sayer is known.
func sayerEpoch(data []byte) uint64 {
	if len(data) < 28 {
		return 0
	}
	return be.Uint64(data[20:])
}

// versionError is about a message of a version that this package can't read.
type versionError struct {
	version uint8
	asks    bool // its sender asks where the group is
}

// Error says which version this package speaks.
func (v versionError) Error() string {
	return fmt.Sprintf("messages of version %d, this one speaks version %d; run the same natsdp everywhere",
		v.version, version)
}

// reader takes numbers off the front of rest, until something is bad.
type reader struct {
	rest []byte
	bad  bool
}

func (r *reader) require(ok bool) { r.bad = r.bad || !ok }

// bytes returns the next n bytes, or none if there are fewer.
func (r *reader) bytes(n int) []byte {
	if r.bad || len(r.rest) < n {
		r.bad = true
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) uint8() uint8 {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) bool() bool {
	b := r.uint8()
	r.require(b <= 1)
	return b == 1
}

func (r *reader) uint16() uint16 {
	if b := r.bytes(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.bytes(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.bytes(8); b != nil {
		return be.Uint64(b)
	}
	return 0
}

// counter returns a round, a step or an epoch.
func (r *reader) counter() uint64 {
	n := r.uint64()
	r.require(n <= maxCounter)
	return n
}

// span returns a span context that appendSpan has written.
func (r *reader) span() trace.SpanContext {
	config := trace.SpanContextConfig{Remote: true}
	copy(config.TraceID[:], r.bytes(len(config.TraceID)))
	copy(config.SpanID[:], r.bytes(len(config.SpanID)))
	config.TraceFlags = trace.TraceFlags(r.uint8())
	if state := r.bytes(int(r.uint16())); len(state) > 0 {
		r.require(len(state) <= maxTraceState)
		var err error
		config.TraceState, err = trace.ParseTraceState(string(state))
		r.require(err == nil && config.TraceState.String() == string(state))
	}
	sc := trace.NewSpanContext(config)
	r.require(hasSpan(sc))
	return sc
}
