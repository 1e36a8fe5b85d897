package fwdtest

import (
	"context"
	"testing"

	"github.com/forwardctx/fwd"
)

// invalidVote checks that a vote which can't be right is refused before anything is sent: the rank
// has not come, and its next vote is its first.
func (s suite) invalidVote(t *testing.T, size int) {
	g := s.group(t, size)
	peers := g.begin(t.Context(), g.except(0)...)
	most := 1<<31 - 1 // a variable, so that most + 1 compiles on every machine
	for _, v := range []fwd.Vote{
		{Step: 1, NumTokens: 5, NumTokensPadded: 4},
		{Step: 1, NumTokens: -1, NumTokensPadded: 4},
		{Step: 1, NumTokens: -2, NumTokensPadded: -1},
		{Step: 1, NumTokens: 1, NumTokensPadded: most + 1}, // negative if an int has 32 bits
		{Step: 1, NumTokens: most + 1, NumTokensPadded: most + 1},
		{Step: 1, NumReqs: -1},
		{Step: 1, NumReqs: most + 1},
		{Step: 1, NumActiveLoRAs: -1},
		{Step: 1, NumActiveLoRAs: most + 1},
		{Step: 1, GraphMode: fwd.GraphFullDecodeOnly},
		{Step: 1, GraphMode: fwd.GraphFullAndPiecewise},
		{Step: 1, GraphMode: 77},
	} {
		g.send(t.Context(), 0, v).refused(fwd.ErrInvalid)
	}
	g.waiting(peers)
	g.agree(append(peers, g.begin(t.Context(), 0)...))
	g.together()
}

// again checks that a second call of rank 0 is refused, whatever it votes for.
func (g *group) again(step uint64) {
	g.Helper()
	other := g.vote(0, step)
	other.NumTokensPadded++
	other.UBatch = true
	for _, v := range []fwd.Vote{g.vote(0, step), other} {
		g.send(g.Context(), 0, v).refused(fwd.ErrLockstep)
	}
}

// secondCall checks that a rank which calls again while it waits is refused, and that the round is
// not disturbed.
func (s suite) secondCall(t *testing.T, size int) {
	g := s.group(t, size)
	for range 3 {
		calls := g.begin(t.Context(), 0)
		g.pause()
		g.again(g.step + 1)
		g.again(g.step + 2)
		last := size - 1
		calls = append(calls, g.begin(t.Context(), g.except(0, last)...)...)
		g.pause()
		g.again(g.step + 1)
		g.waiting(calls)
		g.agree(append(calls, g.begin(t.Context(), last)...))
	}
}

// secondCallAfterTheRound checks that a rank which votes again for a complete step is refused.
func (s suite) secondCallAfterTheRound(t *testing.T, size int) {
	g := s.group(t, size)
	for range 3 {
		g.together()
		g.again(g.step)
		calls := g.begin(t.Context(), g.except(0)...) // the next round has begun
		g.pause()
		g.again(g.step)
		g.waiting(calls)
		g.agree(append(calls, g.begin(t.Context(), 0)...))
	}
}

// secondCallAfterABrokenRound checks that a rank which votes again for a broken step is refused.
func (s suite) secondCallAfterABrokenRound(t *testing.T, size int) {
	g := s.group(t, size)
	for range 3 {
		g.together()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		g.fail(g.begin(ctx, 0), fwd.ErrRankMissing, g.except(0)...)
		g.again(g.step)
		g.together()
	}
}
