package natsdp

import (
	"bytes"
	"context"
	"errors"
	"math"
	"reflect"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
)

// samples are messages of every kind.
func samples() []message {
	state, _ := trace.ParseTraceState("vendor=value,other=1")
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1, 2}, SpanID: trace.SpanID{3}, TraceFlags: trace.FlagsSampled, TraceState: state, Remote: true})
	base := message{group: hashGroup("sim"), size: 3, rank: 1, epoch: 5, round: 7, step: 9}
	kinds := []message{
		{kind: kindHello}, {kind: kindClaim}, {kind: kindBye},
		{kind: kindState}, {kind: kindState, holds: true, asker: 4, holder: 3}, {kind: kindState, contested: true}, {kind: kindState, claimed: true}, {kind: kindState, holds: true, claimed: true},
		{kind: kindVote, vote: fwd.Vote{Step: 10, NumTokens: 1, NumTokensPadded: math.MaxInt32}},
		{kind: kindVote, vote: fwd.Vote{Step: maxCounter, UBatch: true, GraphMode: fwd.GraphFull, SpanContext: span}, complete: true},
		{kind: kindVote, vote: fwd.Vote{SpanContext: span.WithTraceState(trace.TraceState{})}},
		{kind: kindBroken, by: 2, lowest: 8, missing: []int{0, 2}}, {kind: kindBroken, missing: []int{1}},
	}
	for i, m := range kinds {
		full := base
		full.kind, full.vote, full.complete, full.by, full.lowest, full.missing = m.kind, m.vote, m.complete, m.by, m.lowest, m.missing
		full.holds, full.claimed, full.contested, full.asker, full.holder = m.holds, m.claimed, m.contested, m.asker, m.holder
		kinds[i] = full
	}
	return kinds
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
	small := message{kind: kindVote, size: 2}
	small.round = 1
	if n := len(small.encode()); n != 62 {
		t.Errorf("a vote has %d bytes, want 62", n)
	}
	large := message{kind: kindBroken, size: maxRanks, round: 1}
	for rank := range maxRanks - 1 {
		large.missing = append(large.missing, rank)
	}
	if b := large.encode(); len(b) > 1<<20 {
		t.Errorf("the largest message has %d bytes, which is more than servers take", len(b))
	} else if got, err := decode(b); err != nil || !reflect.DeepEqual(got, large) {
		t.Errorf("the largest message does not come back: %v", err)
	}
}

// What is read is what was written, bit by bit. Anything else is an error.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		f.Add(m.encode())
	}
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

// Whatever comes in, in whatever order, a member neither panics nor hangs, and its own votes end with its ctx.
func FuzzMember(f *testing.F) {
	var all []byte
	for _, m := range samples() {
		b := m.encode()
		f.Add(append([]byte{byte(len(b)), 0}, b...), true)
		all = append(append(all, byte(len(b)), 1), b...)
	}
	f.Add(all, false)
	f.Fuzz(func(t *testing.T, script []byte, hasJoined bool) {
		sent := 0
		var m *member
		m = newMember("sim", 0, 3, func(to int, data []byte) {
			// Counters that have come to their end take the group with them, in some billion years, or where a rank that may speak says so.
			spent := m.round >= maxCounter || m.epoch > maxCounter || m.step >= maxCounter
			if _, err := decode(data); err != nil && !spent || to < toAll {
				t.Errorf("sent %x to %d: %v", data, to, err)
			}
			sent++
		})
		if hasJoined {
			m.proceed()
			m.proceed()
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		received := 0
		for step := uint64(1); len(script) >= 2; step++ {
			n, how := int(script[0]), script[1]
			script = script[2:]
			data := script[:min(n, len(script))]
			script = script[len(data):]
			m.handle(int(how>>2), how&1 != 0, data)
			received++
			if how&2 != 0 {
				votes, err := m.exchange(ended, fwd.Vote{Step: step, NumTokensPadded: 1})
				if known := err == nil && len(votes) == 3 || errors.Is(err, fwd.ErrRankMissing) || errors.Is(err, fwd.ErrLockstep) || errors.Is(err, ErrRankTaken) || errors.Is(err, fwd.ErrInvalid); !known {
					t.Errorf("an exchange returned %v, %v", votes, err)
				}
			}
			for _, g := range []*gathering{&m.open, &m.next} {
				count := 0
				for _, here := range g.here {
					if here {
						count++
					}
				}
				if count != g.count || count == 3 {
					t.Fatalf("a round of %d votes has count %d", count, g.count)
				}
			}
			if m.waiting || len(m.outcome) > 0 {
				t.Fatal("somebody waits whom nobody sees")
			}
		}
		if most := 4 * (received + 2); sent > most {
			t.Errorf("%d messages for %d that came in", sent, received)
		}
	})
}
