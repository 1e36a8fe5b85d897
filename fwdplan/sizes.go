package fwdplan

import (
	"context"
	"sync/atomic"

	"github.com/forwardctx/fwd"
)

// Sizes counts the passes of a Runner by exact size. Give its Observe to [fwd.WithObserver]. The zero
// value is ready. It may be used by any number of goroutines, and must not be copied.
//
// The size of a pass is the number that decides the graph: the largest count of tokens, without padding,
// among the busy ranks of the step, which the votes say. A pass without votes has its own count. So every
// rank counts every step, and one rank's snapshot says as much as the snapshots of all ranks together.
//
// A Sizes has a fixed size, about 1 MB, whatever comes. What it has no place for is counted in
// [LeftOut].
type Sizes struct {
	runner  atomic.Pointer[runner]
	leftOut struct{ failed, noBatch, noGraph, other, beyond atomic.Uint64 }
	table   [tableSize]counter
}

// runner names the Runner whose passes are counted: that of the first record.
type runner struct {
	name  string
	ranks int
}

// counter counts the passes with one key, which never changes once it is set. 0 is none.
type counter struct{ key, passes, dummies, nanos atomic.Uint64 }

const (
	tableBits = 15
	tableSize = 1 << tableBits

	// maxProbes bounds the search of a key. A table that is half full never needs as many.
	maxProbes = 128
)

// Observe counts a pass. It allocates nothing, takes no lock, and keeps nothing of the record but the
// name of the first one.
func (s *Sizes) Observe(_ context.Context, rec *fwd.Record) {
	if !s.owns(rec) {
		s.leftOut.other.Add(1)
		return
	}
	if rec.Err != nil {
		s.leftOut.failed.Add(1)
		return
	}
	b := batchOf(rec)
	switch {
	case b.tokens == 0:
		s.leftOut.noBatch.Add(1)
		return
	case b.noGraph:
		s.leftOut.noGraph.Add(1)
		return
	}
	c := s.counter(b.key())
	if c == nil {
		s.leftOut.beyond.Add(1)
		return
	}
	c.nanos.Add(uint64(max(rec.Duration, 0)))
	if rec.Dummy {
		c.dummies.Add(1)
	} else {
		c.passes.Add(1)
	}
}

// owns reports whether the record is of the Runner whose passes are counted.
func (s *Sizes) owns(rec *fwd.Record) bool {
	r := s.runner.Load()
	if r == nil {
		s.runner.CompareAndSwap(nil, &runner{rec.Name, max(rec.Size, 1)})
		r = s.runner.Load()
	}
	return r.name == rec.Name && r.ranks == max(rec.Size, 1)
}

// batch is what all ranks have to run in one step.
type batch struct {
	tokens   int // that decide the graph; 0: no rank has anything of its own to run
	uniform  bool
	adapters int
	captured int  // the capture size; 0: the pass ran without a graph
	noGraph  bool // it would run without a graph whatever the capture sizes are
}

func batchOf(rec *fwd.Record) batch {
	b := batch{uniform: true, adapters: rec.Batch.NumActiveLoRAs, noGraph: rec.UBatches > 0}
	excluded := rec.Reason == fwd.ReasonFullExcluded || rec.Reason == fwd.ReasonLoRA
	for i := range rec.Votes {
		v := &rec.Votes[i]
		if v.Idle || v.WarmUp {
			continue
		}
		b.tokens = max(b.tokens, v.NumTokens)
		b.uniform = b.uniform && v.Uniform
		excluded = excluded || v.Eager || v.ExcludeFull
	}
	if len(rec.Votes) == 0 && !rec.Dummy {
		b.tokens = rec.NumTokensUnpadded
		b.uniform = rec.Batch.Uniform || rec.Phase == "decode"
	}
	if rec.GraphMode != fwd.GraphNone {
		b.captured = max(rec.Batch.NumTokens, b.tokens)
		return b
	}
	b.noGraph = b.noGraph || excluded
	if uint(rec.Rank) < uint(len(rec.Votes)) {
		b.adapters = rec.Votes[rec.Rank].NumActiveLoRAs
	}
	return b
}

// A key holds tokens and capture size, adapters and kind of a batch, and is not 0.
const (
	maxTokens   = 1<<23 - 1
	maxAdapters = 1<<16 - 1
)

// key returns 0 for a batch that does not fit.
func (b *batch) key() uint64 {
	if uint(b.tokens) > maxTokens || uint(b.captured) > maxTokens || uint(b.adapters) > maxAdapters {
		return 0
	}
	key := uint64(b.tokens)<<41 | uint64(b.captured)<<18 | uint64(b.adapters)<<2 | 1
	if b.uniform {
		key |= 2
	}
	return key
}

func rowOf(key uint64) Row {
	return Row{
		Tokens: int(key >> 41), Captured: int(key >> 18 & maxTokens),
		Adapters: int(key >> 2 & maxAdapters), Uniform: key&2 != 0,
	}
}

// counter returns the counter of a key, a new one if need be, or nil if there is no place for it.
func (s *Sizes) counter(key uint64) *counter {
	if key == 0 {
		return nil
	}
	at := key * 0x9e3779b97f4a7c15 >> (64 - tableBits) // multiplied by 2^64 / the golden ratio
	for i := range uint64(maxProbes) {
		c := &s.table[(at+i)%tableSize]
		known := c.key.Load()
		if known == 0 && c.key.CompareAndSwap(0, key) {
			return c
		}
		if known == key || known == 0 && c.key.Load() == key { // another goroutine may have just set it
			return c
		}
	}
	return nil
}

// Snapshot returns what was counted so far. A pass that is counted concurrently may be in it with its
// time and not yet with its count.
func (s *Sizes) Snapshot() Snapshot {
	var snap Snapshot
	if r := s.runner.Load(); r != nil {
		snap.Name, snap.Ranks = r.name, r.ranks
	}
	for i := range s.table {
		c := &s.table[i]
		key := c.key.Load()
		if key == 0 {
			continue
		}
		row := rowOf(key)
		row.Passes, row.Dummies = c.passes.Load(), c.dummies.Load()
		row.Nanoseconds = c.nanos.Load()
		if row.Passes+row.Dummies > 0 {
			snap.Rows = append(snap.Rows, row)
		}
	}
	snap.LeftOut = LeftOut{
		Failed: s.leftOut.failed.Load(), NoBatch: s.leftOut.noBatch.Load(), NoGraph: s.leftOut.noGraph.Load(),
		Other: s.leftOut.other.Load(), Beyond: s.leftOut.beyond.Load(),
	}
	sortRows(snap.Rows)
	return snap
}
