package natsdp

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
)

// A message is a header and a body. All numbers are big-endian.
//
//	 0  magic "fw", version, kind
//	 4  group, the FNV-1a hash of its name           8 bytes
//	12  size, rank                                   4 bytes each
//	20  epoch: which life of the rank this is        8
//	28  round, step                                  8 each
//	44  body
const (
	magic      = "fw"
	version    = 1
	headerSize = 44
)

// kind says what a message is about.
type kind uint8

const (
	kindHello  kind = 1 + iota // asks for everyone's state. Body: none
	kindClaim                  // asks for it too, and to listen to no other life of this rank from now on. Body: none
	kindState                  // the answer. round and step: the last that have ended, and that whoever asked can't vote in. Body: flags, asker, holder (8 each)
	kindVote                   // round: the open one; step: of the last that has ended. Body: step (8), tokens, padded (4 each), mode, flags, span
	kindBroken                 // round and step: those that are over. Body: by (4), lowest (8), missing: a bit for each rank
	kindBye                    // round and step: the last that have ended. Body: none
)

// The flags of a vote and of a state.
const (
	flagUBatch   = 1 << iota // the rank wants microbatches
	flagComplete             // the round before this one ended with the votes of all
	flagSpan                 // a span context follows: trace id (16), span id (8), trace flags, length of the trace state (2), trace state

	flagHolds     = 1 // the rank is this process's: nobody has objected to its claim
	flagClaimed   = 2 // the answer to a claim
	flagContested = 4 // somebody else has, or wants, the rank that has asked
)

const (
	maxRanks      = 1 << 20 // of fwd
	maxCounter    = 1 << 62 // of rounds, steps and epochs: a larger one is damage, and would overflow
	maxTraceState = 4096    // bytes; what is longer is left out, as the W3C recommendation allows
)

// message is any message. Fields that its kind has no use for are zero.
type message struct {
	kind  kind
	group uint64
	size  int
	rank  int
	epoch uint64
	round uint64
	step  uint64 // the group's

	vote     fwd.Vote
	complete bool // see flagComplete

	by      int    // the rank that stopped waiting
	lowest  uint64 // the lowest step that was in the round
	missing []int  // ascending

	holds     bool
	claimed   bool
	contested bool
	asker     uint64 // epoch of who has asked; 0: nobody
	holder    uint64 // epoch of who has that one's rank, as far as is known; 0: nobody
}

// hashGroup returns what stands for the name of a group.
func hashGroup(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return h.Sum64()
}

// encode returns the message's bytes.
func (m *message) encode() []byte {
	b := make([]byte, 0, 64) // enough for a vote without a span
	b = append(b, magic...)
	b = append(b, version, byte(m.kind))
	b = binary.BigEndian.AppendUint64(b, m.group)
	b = binary.BigEndian.AppendUint32(b, uint32(m.size))
	b = binary.BigEndian.AppendUint32(b, uint32(m.rank))
	for _, n := range [...]uint64{m.epoch, m.round, m.step} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	switch m.kind {
	case kindVote:
		b = m.appendVote(b)
	case kindBroken:
		b = binary.BigEndian.AppendUint32(b, uint32(m.by))
		b = binary.BigEndian.AppendUint64(b, m.lowest)
		bits := len(b)
		b = append(b, make([]byte, (m.size+7)/8)...)
		for _, rank := range m.missing {
			b[bits+rank/8] |= 1 << (rank % 8)
		}
	case kindState:
		b = append(b, flag(m.holds, flagHolds)|flag(m.claimed, flagClaimed)|flag(m.contested, flagContested))
		b = binary.BigEndian.AppendUint64(b, m.asker)
		b = binary.BigEndian.AppendUint64(b, m.holder)
	}
	return b
}

func (m *message) appendVote(b []byte) []byte {
	v := &m.vote
	span := hasSpan(v.SpanContext)
	b = binary.BigEndian.AppendUint64(b, v.Step)
	b = binary.BigEndian.AppendUint32(b, uint32(v.NumTokens))
	b = binary.BigEndian.AppendUint32(b, uint32(v.NumTokensPadded))
	b = append(b, byte(v.GraphMode), flag(v.UBatch, flagUBatch)|flag(m.complete, flagComplete)|flag(span, flagSpan))
	if !span {
		return b
	}
	traceID, spanID := v.SpanContext.TraceID(), v.SpanContext.SpanID()
	b = append(b, traceID[:]...)
	b = append(b, spanID[:]...)
	b = append(b, byte(v.SpanContext.TraceFlags()))
	state := ""
	if v.SpanContext.TraceState().Len() > 0 {
		if state = v.SpanContext.TraceState().String(); len(state) > maxTraceState {
			state = ""
		}
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(state)))
	return append(b, state...)
}

// hasSpan reports whether there is anything in a span context, valid or not.
func hasSpan(sc trace.SpanContext) bool {
	return sc.HasTraceID() || sc.HasSpanID() || sc.TraceFlags() != 0 || sc.TraceState().Len() > 0
}

func flag(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

// decode reads a message. It accepts exactly what encode writes. What it does not understand is an error, and never a
// panic: anyone who may publish on the subject can send anything.
func decode(b []byte) (message, error) {
	var m message
	if len(b) < len(magic)+1 || string(b[:len(magic)]) != magic {
		return m, fmt.Errorf("%d bytes that are no message of a group", len(b))
	}
	if v := b[len(magic)]; v != version {
		return m, versionError(v)
	}
	r := reader{rest: b[len(magic)+1:]}
	m.kind = kind(r.uint8())
	m.group = r.uint64()
	m.size, m.rank = int(r.uint32()), int(r.uint32())
	m.epoch, m.round, m.step = r.counter(), r.counter(), r.counter()
	r.require(m.size >= 1 && m.size <= maxRanks && m.rank >= 0 && m.rank < m.size)
	switch m.kind {
	case kindHello, kindClaim, kindBye:
	case kindState:
		flags := r.uint8()
		r.require(flags&^(flagHolds|flagClaimed|flagContested) == 0)
		m.holds, m.claimed, m.contested = flags&flagHolds != 0, flags&flagClaimed != 0, flags&flagContested != 0
		m.asker, m.holder = r.counter(), r.counter()
	case kindVote:
		m.decodeVote(&r)
	case kindBroken:
		m.decodeBroken(&r)
	default:
		r.bad = true
	}
	if r.bad || len(r.rest) > 0 {
		return m, fmt.Errorf("a damaged message of %d bytes, kind %d", len(b), m.kind)
	}
	return m, nil
}

func (m *message) decodeVote(r *reader) {
	v := &m.vote
	v.Step = r.counter()
	v.NumTokens, v.NumTokensPadded = int(r.uint32()), int(r.uint32())
	v.GraphMode = fwd.GraphMode(r.uint8())
	flags := r.uint8()
	v.UBatch, m.complete = flags&flagUBatch != 0, flags&flagComplete != 0
	r.require(flags&^(flagUBatch|flagComplete|flagSpan) == 0 && m.round > 0)
	r.require(v.Validate(m.rank) == nil)
	if flags&flagSpan == 0 {
		return
	}
	config := trace.SpanContextConfig{Remote: true}
	copy(config.TraceID[:], r.bytes(len(config.TraceID)))
	copy(config.SpanID[:], r.bytes(len(config.SpanID)))
	config.TraceFlags = trace.TraceFlags(r.uint8())
	if state := r.bytes(int(r.uint16())); len(state) > 0 {
		var err error
		config.TraceState, err = trace.ParseTraceState(string(state))
		r.require(err == nil && config.TraceState.String() == string(state))
	}
	v.SpanContext = trace.NewSpanContext(config)
	r.require(hasSpan(v.SpanContext))
}

func (m *message) decodeBroken(r *reader) {
	m.by, m.lowest = int(r.uint32()), r.counter()
	for i, bits := range r.bytes((m.size + 7) / 8) {
		for bit := range 8 {
			if bits&(1<<bit) != 0 {
				m.missing = append(m.missing, 8*i+bit)
			}
		}
	}
	r.require(m.by >= 0 && m.by < m.size && m.round > 0 && len(m.missing) > 0)
	r.require(len(m.missing) == 0 || m.missing[len(m.missing)-1] < m.size)
}

// versionError is the version of a message that this package can't read.
type versionError uint8

func (v versionError) Error() string {
	return fmt.Sprintf("messages of version %d, this package speaks version %d", uint8(v), version)
}

// reader takes numbers off the front of rest, until it is bad.
type reader struct {
	rest []byte
	bad  bool
}

func (r *reader) require(ok bool) { r.bad = r.bad || !ok }

// bytes returns the next n bytes, none where there are fewer.
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

func (r *reader) uint16() uint16 {
	if b := r.bytes(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// counter is a number that goes up by one at a time.
func (r *reader) counter() uint64 {
	n := r.uint64()
	r.require(n <= maxCounter)
	return n
}
