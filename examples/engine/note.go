package engine

import (
	"time"

	"github.com/forwardctx/fwd"
)

// note is what a rank tells the others with each vote, beside what fwd needs: whether it has
// anything left to do, and when. All ranks see the notes of all, so all of them decide the same
// about the step: to run it, to sleep before the next one, or to stop. No exchange of their own is
// needed for that.
//
// This is what the word Vote.Note means in this engine:
//
//	bit  0        stop: this rank was interrupted
//	bit  1        unfinished: this rank has requests that are waiting or running
//	bits 2 to 14  idle: for how many milliseconds from now this rank has nothing to do, rounded up
//	bits 15 to 62 sizes: a hash of the capture sizes that this rank has chosen; 0: none yet
//	bit  63       greeting: this rank does not serve yet, and the other bits are a hash of how it was
//	              started ([rank.greet])
type note struct {
	stop       bool
	unfinished bool
	idle       time.Duration // at most longestSleep
	sizes      uint64
}

const (
	idleBits  = 13
	sizesBits = 48
)

// greeting is the bit of a note that is none of a step.
const greeting = 1 << 63

// word returns the note as it is sent.
func (n note) word() uint64 {
	word := uint64((n.idle+time.Millisecond-1)/time.Millisecond)<<2 | n.sizes<<(2+idleBits)
	if n.stop {
		word |= 1
	}
	if n.unfinished {
		word |= 2
	}
	return word
}

// readNote is the reverse of word.
func readNote(word uint64) note {
	return note{
		stop:       word&1 != 0,
		unfinished: word&2 != 0,
		idle:       time.Duration(word>>2%(1<<idleBits)) * time.Millisecond,
		sizes:      word >> (2 + idleBits) % (1 << sizesBits),
	}
}

// notes are those of all ranks, in rank order.
type notes []note

// notesOf returns the notes of the ranks that have agreed on a step. A rank that is alone has no
// agreement, and its own note is the only one.
func notesOf(a *fwd.Agreement, own note) notes {
	if a == nil {
		return notes{own}
	}
	all := make(notes, len(a.Votes))
	for rank, v := range a.Votes {
		all[rank] = readNote(v.Note)
	}
	return all
}

// stopping returns the first rank that was interrupted, or -1.
func (all notes) stopping() int {
	for rank, n := range all {
		if n.stop {
			return rank
		}
	}
	return -1
}

// unfinished reports whether any rank has requests left.
func (all notes) unfinished() bool {
	for _, n := range all {
		if n.unfinished {
			return true
		}
	}
	return false
}

// idle returns for how long no rank has anything to do.
func (all notes) idle() time.Duration {
	least := all[0].idle
	for _, n := range all {
		least = min(least, n.idle)
	}
	return least
}
