// This file fuzzes a member with whatever may come in, in whatever order.

package natsdp

import (
	"context"
	"errors"
	"testing"

	"github.com/forwardctx/fwd"
)

// FuzzMember checks that a member neither panics nor hangs, and that its own votes end with their
// ctx. A script is a list of messages, each after two bytes: its length, and how it comes.
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
		m := newMember("sim", 0, 3, func(to int, data []byte) {
			if _, err := decode(data); err != nil || to < toAll {
				t.Errorf("sent %x to %d: %v", data, to, err)
			}
			sent++
		})
		if hasJoined {
			m.proceed()
			m.proceed()
		}
		received := 0
		for step := uint64(1); len(script) >= 2; step++ {
			n, how := int(script[0]), script[1]
			script = script[2:]
			data := script[:min(n, len(script))]
			script = script[len(data):]
			m.handle(int(how>>2), how&1 != 0, data)
			received++
			if how&2 != 0 {
				voteInVain(t, m, step)
			}
			checkGatherings(t, m)
		}
		if most := 4 * (received + 2); sent > most {
			t.Errorf("%d messages for %d that came in", sent, received)
		}
	})
}

// voteInVain lets the member vote with a ctx that has ended.
func voteInVain(t *testing.T, m *member, step uint64) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	votes, err := m.exchange(ended, fwd.Vote{Step: step, NumTokensPadded: 1})
	if err == nil && len(votes) == 3 {
		return
	}
	for _, known := range []error{fwd.ErrRankMissing, fwd.ErrLockstep, ErrRankTaken, fwd.ErrInvalid} {
		if errors.Is(err, known) {
			return
		}
	}
	t.Errorf("an exchange returned %v, %v", votes, err)
}

// checkGatherings checks that the counts of the votes are right, and that nobody waits whom nobody
// sees.
func checkGatherings(t *testing.T, m *member) {
	for _, g := range []*gathering{&m.open, &m.next} {
		count, full := 0, 0
		for _, by := range g.voters {
			if by.here {
				count++
			}
			if by.full {
				full++
			}
		}
		if count != g.count || full != g.full || count == 3 {
			t.Fatalf("a round of %d votes, %d of them full, has counts %d and %d", count, full, g.count, g.full)
		}
	}
	if m.waiting || len(m.outcome) > 0 || m.missingVotes() != nil {
		t.Fatal("somebody waits whom nobody sees")
	}
}
