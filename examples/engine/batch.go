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

// sampled is rows of a sequence after which a token is to be sampled: that of its last known token, and of each guess.
type sampled struct {
	seq  *sequence
	rows fwd.Range
}

// newBatch lays a step out in rows: the scheduled tokens of each sequence, one sequence after the other, and padding up to
// rows. A padding row is token 0, belongs to no sequence and is written nowhere, but it takes its way through the experts.
// adapters is how many different ones the step has.
func newBatch(step []scheduled, rows, blockSize, adapters int) *batch {
	b := &batch{
		tokens: make([]int, rows),
		slots:  make([]int, rows),
		meta:   &model.AttnMeta{Positions: make([]int, rows), ActiveAdapters: adapters},
	}
	if adapters > 0 {
		b.meta.Adapters = make([]int, rows)
	}
	row := 0
	for _, s := range step {
		b.meta.Seqs = append(b.meta.Seqs, model.SeqMeta{
			Rows:       fwd.Range{Start: row, Stop: row + s.count},
			BlockTable: s.seq.blockTable,
		})
		for position := s.first; position < s.first+s.count; position++ {
			b.tokens[row] = s.seq.token(position)
			b.meta.Positions[row] = position
			b.slots[row] = s.seq.blockTable[position/blockSize]*blockSize + position%blockSize
			if adapters > 0 {
				b.meta.Adapters[row] = s.seq.request.Adapter
			}
			row++
		}
		if n := s.first + s.count - max(s.first, s.seq.known()-1); n > 0 {
			b.sample = append(b.sample, sampled{s.seq, fwd.Range{Start: row - n, Stop: row}})
		}
	}
	for ; row < rows; row++ {
		b.slots[row] = model.NoSlot
	}
	return b
}

// metadata returns what attention must know, for each microbatch of a split pass, or for the pass. A request that the split
// cuts is in both microbatches, with some of its rows in each.
func (b *batch) metadata(slices []fwd.UBatchSlice, layers int) (meta, slots []map[string]any) {
	if len(slices) == 0 {
		return []map[string]any{{"": b.meta}}, []map[string]any{{"": b.slots}} // "": all layers have the same
	}
	written := make([]chan struct{}, layers) // by layer, of the last microbatch so far
	for _, s := range slices {
		part := b.slice(s)
		byLayer := map[string]any{}
		for l := range layers {
			own := *part
			own.After, written[l] = written[l], make(chan struct{})
			own.Written = written[l]
			byLayer[model.AttentionName(l)] = &own
		}
		meta = append(meta, byLayer)
		slots = append(slots, map[string]any{"": b.slots[s.Tokens.Start:s.Tokens.Stop]})
	}
	return meta, slots
}

// slice returns the metadata of a microbatch. Its rows count from its own first token.
func (b *batch) slice(s fwd.UBatchSlice) *model.AttnMeta {
	part := &model.AttnMeta{Positions: b.meta.Positions[s.Tokens.Start:s.Tokens.Stop], ActiveAdapters: b.meta.ActiveAdapters}
	if b.meta.Adapters != nil {
		part.Adapters = b.meta.Adapters[s.Tokens.Start:s.Tokens.Stop]
	}
	// The last microbatch has the padding too, which is of requests that don't exist.
	for _, seq := range b.meta.Seqs[s.Requests.Start:min(s.Requests.Stop, len(b.meta.Seqs))] {
		seq.Rows.Start = max(seq.Rows.Start, s.Tokens.Start) - s.Tokens.Start
		seq.Rows.Stop = min(seq.Rows.Stop, s.Tokens.Stop) - s.Tokens.Start
		part.Seqs = append(part.Seqs, seq)
	}
	return part
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
