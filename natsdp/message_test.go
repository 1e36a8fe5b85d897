// This file tests messages as bytes: what is written comes back, and nothing else is read.

package natsdp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
)

// sampleSpan is a span context that came from another process.
func sampleSpan() trace.SpanContext {
	state, _ := trace.ParseTraceState("vendor=value,other=1")
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1, 2}, SpanID: trace.SpanID{3},
		TraceFlags: trace.FlagsSampled, TraceState: state, Remote: true,
	})
}

// fullVote is a vote in which no field is zero.
func fullVote() fwd.Vote {
	return fwd.Vote{
		Step: maxCounter, NumTokens: 1, NumTokensPadded: math.MaxInt32, NumReqs: 2, NumActiveLoRAs: math.MaxInt32,
		Uniform: true, ExcludeFull: true, Eager: true, UBatch: true, Idle: true, WarmUp: true,
		GraphMode: fwd.GraphFull, Note: math.MaxUint64, Config: math.MaxUint64 - 1, SpanContext: sampleSpan(),
	}
}

// samples are messages of every kind.
func samples() []message {
	votes := []fwd.Vote{
		fullVote(),
		{Step: 10, NumReqs: math.MaxInt32, NumActiveLoRAs: 1},
		{SpanContext: sampleSpan().WithTraceState(trace.TraceState{})},
		{Uniform: true}, {ExcludeFull: true}, {Eager: true}, {UBatch: true}, {Idle: true}, {WarmUp: true},
		{GraphMode: fwd.GraphPiecewise}, {Note: 1}, {Config: 1 << 63},
	}
	samples := []message{
		{kind: kindHello}, {kind: kindClaim}, {kind: kindBye},
		{kind: kindState},
		{kind: kindState, holds: true, asker: 4, holder: 3},
		{kind: kindState, contested: true},
		{kind: kindState, ahead: true},
		{kind: kindState, claimed: true},
		{kind: kindState, holds: true, claimed: true},
		{kind: kindBroken, lowest: 8, ending: ending{broken: true, by: 2, missing: []int{0, 2}}},
		{kind: kindBroken, full: true, ending: ending{broken: true, missing: []int{1}}},
		{
			kind: kindVote, vote: fullVote(), lives: math.MaxUint64 - 2, full: true, asks: true,
			ending: ending{complete: true},
		},
		{kind: kindVote, vote: fullVote(), ending: ending{broken: true, by: 1, missing: []int{2}}},
		{kind: kindAsk}, {kind: kindReady, lives: math.MaxUint64 - 3}, {kind: kindReady, full: true},
	}
	for _, v := range votes {
		samples = append(samples, message{kind: kindVote, vote: v})
	}
	for i := range samples {
		m := &samples[i]
		m.group, m.size, m.rank, m.epoch, m.round, m.step = hashGroup("sim"), 3, 1, 5, 7, 9
	}
	return samples
}

// decode reads a whole message.
func decode(b []byte) (message, error) {
	var m message
	body, err := m.decodeHeader(b)
	if err == nil {
		err = m.decodeBody(body)
	}
	return m, err
}

func TestMessages(t *testing.T) {
	for _, want := range samples() {
		got, err := decode(want.encode())
		if err != nil {
			t.Errorf("%+v: %v", want, err)
		} else if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

// TestMessages shows that a fullVote comes back whole, so fullVote must have everything that a vote
// has.
func TestFullVote(t *testing.T) {
	v := reflect.ValueOf(fullVote())
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("fullVote has no %s", v.Type().Field(i).Name)
		}
	}
}

func TestMessageSizes(t *testing.T) {
	small := message{kind: kindVote, size: 2, round: 1}
	if n := len(small.encode()); n != 95 {
		t.Errorf("a vote has %d bytes, want 95", n)
	}
	large := message{kind: kindBroken, size: maxRanks, round: 1, ending: ending{broken: true}}
	for rank := range maxRanks - 1 {
		large.missing = append(large.missing, rank)
	}
	if b := large.encode(); len(b) > 1<<20 {
		t.Errorf("the largest message has %d bytes, which is more than servers take", len(b))
	} else if got, err := decode(b); err != nil || !reflect.DeepEqual(got, large) {
		t.Errorf("the largest message does not come back: %v", err)
	}
}

// longTraceState returns a trace state that is a little longer than a message takes.
func longTraceState() (state trace.TraceState) {
	for key := 'a'; key <= 'p'; key++ {
		state, _ = state.Insert(string(key), strings.Repeat("x", 256))
	}
	return state
}

// A trace state that is too long is left out, and the rest of the vote comes.
func TestLongTraceState(t *testing.T) {
	state := longTraceState()
	if n := len(state.String()); n <= maxTraceState || n > maxTraceState+100 {
		t.Fatalf("a trace state of %d bytes, want a few more than %d", n, maxTraceState)
	}
	m := message{kind: kindVote, size: 2, round: 1, vote: fullVote()}
	m.vote.SpanContext = m.vote.SpanContext.WithTraceState(state)
	got, err := decode(m.encode())
	if err != nil {
		t.Fatal(err)
	}
	m.vote.SpanContext = m.vote.SpanContext.WithTraceState(trace.TraceState{})
	if !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v, want %+v", got, m)
	}
}

// A large message costs a rank of another group, or of another size, next to nothing.
func TestBomb(t *testing.T) {
	bomb := message{kind: kindBroken, group: hashGroup("sim"), size: maxRanks, epoch: 1, round: 1}
	for rank := range maxRanks {
		bomb.missing = append(bomb.missing, rank)
	}
	m := newMember("sim", 1, 3, func(int, []byte) {})
	elsewhere := newMember("elsewhere", 1, maxRanks, func(int, []byte) {})
	const times = 100
	data := bomb.encode()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range times {
		m.handle(0, false, data)
		elsewhere.handle(0, false, data)
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / times; n > 4096 {
		t.Errorf("two ranks allocate %d bytes for a message of %d bytes of another group", n, len(data))
	}
}

// The kind and the size of a group bound the length of a message, before anything of its body is
// read.
func TestLengthIsChecked(t *testing.T) {
	for _, m := range samples() {
		if _, err := new(message).decodeHeader(append(m.encode(), make([]byte, 1<<13)...)); err == nil {
			t.Errorf("a header of kind %d is read with a body that is too long", m.kind)
		}
		if _, err := new(message).decodeHeader(m.encode()); err != nil {
			t.Errorf("kind %d: %v", m.kind, err)
		}
	}
}

// damaged are messages that differ a little from good ones.
func damaged() map[string][]byte {
	bad := make(map[string][]byte)
	for i, m := range samples() {
		good := m.encode()
		bad[fmt.Sprintf("sample %d, one byte less", i)] = good[:len(good)-1]
		bad[fmt.Sprintf("sample %d, one byte more", i)] = append(slices.Clone(good), 0)
		if m.kind == kindVote {
			good[44+49] |= 128 // the upper byte of the flags
			bad[fmt.Sprintf("sample %d, a flag that nobody knows", i)] = good
		}
	}
	for what, spoil := range map[string]func(m *message){
		"padded below tokens":   func(m *message) { m.vote.NumTokens = 2 },
		"too many requests":     func(m *message) { m.vote.NumReqs = -1 },
		"too many adapters":     func(m *message) { m.vote.NumActiveLoRAs = -1 },
		"a composite mode":      func(m *message) { m.vote.GraphMode = fwd.GraphFullAndPiecewise },
		"a step that overflows": func(m *message) { m.vote.Step = maxCounter + 1 },
		"no round":              func(m *message) { m.round = 0 },
		"a rank beyond size":    func(m *message) { m.rank = 3 },
	} {
		m := message{kind: kindVote, size: 3, round: 1, vote: fwd.Vote{NumTokens: 1, NumTokensPadded: 1}}
		spoil(&m)
		bad[what] = m.encode()
	}
	bad["a trace state that is too long"] = withLongTraceState()
	return bad
}

// withLongTraceState returns a vote with a trace state that encode leaves out.
func withLongTraceState() []byte {
	state := longTraceState().String()
	m := message{kind: kindVote, size: 3, round: 1, vote: fwd.Vote{SpanContext: sampleSpan()}}
	m.vote.SpanContext = m.vote.SpanContext.WithTraceState(trace.TraceState{})
	b := m.encode()
	b = binary.BigEndian.AppendUint16(b[:len(b)-2], uint16(len(state)))
	return append(b, state...)
}

func TestDamaged(t *testing.T) {
	for what, b := range damaged() {
		if m, err := decode(b); err == nil {
			t.Errorf("%s is read as %+v", what, m)
		}
	}
}

// version1 is the vote of rank 1 of 3 as the first version of the messages wrote it.
func version1(group string) []byte {
	m := message{kind: kindHello, group: hashGroup(group), size: 3, rank: 1, epoch: 1 << 61, round: 1, step: 0}
	b := m.encode()
	b[2], b[3] = 1, byte(kindVote)
	return append(b, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 8, 2, 1) // step, tokens, padded, mode, flags
}

// Messages of other versions are told apart from damaged ones.
func TestOtherVersions(t *testing.T) {
	for _, v := range []byte{0, 1, 2, 4, 255} {
		b := version1("sim")
		b[2] = v
		if _, err := decode(b); err != (versionError{version: v}) {
			t.Errorf("a message of version %d: %v", v, err)
		}
	}
	want := "messages of version 1, this one speaks version 3; run the same natsdp everywhere"
	if got := (versionError{version: 1}).Error(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// What is read is what was written, bit by bit. Anything else is an error.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		f.Add(m.encode())
	}
	for _, b := range damaged() {
		f.Add(b)
	}
	f.Add(version1("sim"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decode(data)
		if err != nil {
			return
		}
		if again := m.encode(); !bytes.Equal(again, data) {
			t.Errorf("%x is read as %+v, which is written %x", data, m, again)
		}
	})
}
