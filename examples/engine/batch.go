package engine

import (
	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
)

// batch is what a pass needs beside its plan: the input tokens, and what attention must know about them.
type batch struct {
	tokens []int
	slots  []int
	meta   *model.AttnMeta
	sample []sampled
}

// sampled is a row from whose hidden state the next token of a sequence comes.
type sampled struct {
	seq *sequence
	row int
}

// newBatch lays a step out in rows: the scheduled tokens of each sequence, one sequence after the other, and padding up to
// rows. A padding row is token 0, belongs to no sequence and is written nowhere, but it takes its way through the experts.
func newBatch(step []scheduled, rows, blockSize int) *batch {
	b := &batch{
		tokens: make([]int, rows),
		slots:  make([]int, rows),
		meta:   &model.AttnMeta{Positions: make([]int, rows), ActiveAdapters: activeAdapters(step)},
	}
	row := 0
	for _, s := range step {
		b.meta.Seqs = append(b.meta.Seqs, model.SeqMeta{
			Rows:       fwd.Range{Start: row, Stop: row + s.count},
			BlockTable: s.seq.blockTable,
		})
		adapter := s.seq.request.Adapter
		if adapter != model.NoAdapter && b.meta.Adapters == nil {
			b.meta.Adapters = make([]int, rows)
		}
		for position := s.seq.computed; position < s.seq.computed+s.count; position++ {
			b.tokens[row] = s.seq.token(position)
			b.meta.Positions[row] = position
			b.slots[row] = s.seq.blockTable[position/blockSize]*blockSize + position%blockSize
			if adapter != model.NoAdapter {
				b.meta.Adapters[row] = adapter
			}
			row++
		}
		if s.count == s.seq.pending() {
			b.sample = append(b.sample, sampled{s.seq, row - 1})
		}
	}
	for ; row < rows; row++ {
		b.slots[row] = model.NoSlot
	}
	return b
}

// activeAdapters returns how many different adapters the requests of a step use.
func activeAdapters(step []scheduled) int {
	active := map[int]bool{}
	for _, s := range step {
		if s.seq.request.Adapter != model.NoAdapter {
			active[s.seq.request.Adapter] = true
		}
	}
	return len(active)
}
