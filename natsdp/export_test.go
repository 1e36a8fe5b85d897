// This file gives tests what the package keeps to itself.

package natsdp

import "github.com/forwardctx/fwd"

// LaterEpoch returns the epoch of a life that would count, if its rank said so.
func LaterEpoch() uint64 { return latestEpoch() - 1<<40 }

// ForgeVote returns the message of a vote, as somebody could make it up.
func ForgeVote(group string, size, rank int, epoch, round uint64, v fwd.Vote) []byte {
	m := message{
		kind: kindVote, group: hashGroup(group), size: size, rank: rank, epoch: epoch,
		round: round, step: round - 1, vote: v, ending: ending{complete: true},
	}
	return m.encode()
}

// ForgeBroken returns the message that a round is over.
func ForgeBroken(group string, size, rank int, epoch, round uint64, missing ...int) []byte {
	m := message{
		kind: kindBroken, group: hashGroup(group), size: size, rank: rank, epoch: epoch,
		round: round, step: round, ending: ending{broken: true, missing: missing},
	}
	return m.encode()
}

// Pause keeps a rank from handling messages until resume is called.
func Pause(c *Coordinator) (resume func()) {
	c.member.mu.Lock()
	return c.member.mu.Unlock
}

// Dropped returns how many messages for all there was no room for.
func Dropped(c *Coordinator) int {
	n, _ := c.link.subs[0].Dropped()
	return n
}
