package engine

import (
	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
)

// scheduleOf returns what fwd must know about a step to plan its pass.
func scheduleOf(step []scheduled) fwd.Schedule {
	s := fwd.Schedule{NumActiveLoRAs: activeAdapters(step), AllowUBatches: true}
	for _, part := range step {
		s.NumScheduledTokens = append(s.NumScheduledTokens, part.count)
		// The last tokens of a prompt may be as many as a decoding request has, but a decode graph is
		// not for them.
		s.Prefill = s.Prefill || part.first < len(part.seq.request.Prompt)
	}
	return s
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

// batch is what a pass needs beside its plan: the input tokens, and what attention must know about
// them.
type batch struct {
	tokens []int
	slots  []int
	meta   *model.AttnMeta
}

// newBatch lays a step out in rows: the scheduled tokens of each sequence, one sequence after the
// other, and padding up to rows. A padding row is token 0, belongs to no sequence and is written
// nowhere, but it takes its way through the experts. The row of a position has the token that comes
// so many positions ahead of it, which is 0 for the target model.
func newBatch(step []scheduled, rows, blockSize, ahead int) *batch {
	b := &batch{
		tokens: make([]int, rows),
		slots:  make([]int, rows),
		meta:   &model.AttnMeta{Positions: make([]int, rows), ActiveAdapters: activeAdapters(step)},
	}
	if b.meta.ActiveAdapters > 0 {
		b.meta.Adapters = make([]int, rows)
	}
	row := 0
	for _, s := range step {
		b.meta.Seqs = append(b.meta.Seqs, model.SeqMeta{
			Rows:       fwd.Range{Start: row, Stop: row + s.count},
			BlockTable: s.seq.blockTable,
		})
		for position := s.first; position < s.first+s.count; position++ {
			b.put(row, s, position, blockSize, ahead)
			row++
		}
	}
	for ; row < rows; row++ {
		b.slots[row] = model.NoSlot
	}
	return b
}

// put fills in the row of one position of a sequence.
func (b *batch) put(row int, s scheduled, position, blockSize, ahead int) {
	b.meta.Positions[row] = position
	if b.meta.Adapters != nil {
		b.meta.Adapters[row] = s.seq.request.Adapter
	}
	if s.still {
		b.slots[row] = model.NoSlot
		return
	}
	b.tokens[row] = s.seq.token(position + ahead)
	b.slots[row] = s.seq.blockTable[position/blockSize]*blockSize + position%blockSize
}

// addTo adds to a pass what attention must know, for each part of it. A dummy pass has tokens, so
// that every exchange finds this rank, but no part needs metadata: the tokens belong to no request.
func (b *batch) addTo(pass *fwd.Pass, layers int) {
	order := make([]chan struct{}, layers)
	for _, part := range pass.Parts() {
		attn := fwd.AllLayers(b.part(part))
		if len(pass.UBatches) > 0 {
			attn = inOrder(b.part(part), order)
		}
		pass.AttnMetadata = append(pass.AttnMetadata, attn)
		pass.SlotMapping = append(pass.SlotMapping, fwd.AllLayers(b.slots[part.Tokens.Start:part.Tokens.Stop]))
	}
}

// inOrder returns the metadata of a microbatch by layer. In each layer it comes after the
// microbatch before, because a request that the split cuts is in both, with some of its rows in
// each. written holds what the last microbatch of each layer closes, and is updated.
func inOrder(meta *model.AttnMeta, written []chan struct{}) map[string]any {
	byLayer := map[string]any{}
	for l := range written {
		own := *meta
		own.After, written[l] = written[l], make(chan struct{})
		own.Written = written[l]
		byLayer[model.AttentionName(l)] = &own
	}
	return byLayer
}

// part returns the metadata of a part of the pass. Its rows count from its own first token.
func (b *batch) part(p fwd.UBatchSlice) *model.AttnMeta {
	part := &model.AttnMeta{
		Positions:      b.meta.Positions[p.Tokens.Start:p.Tokens.Stop],
		ActiveAdapters: b.meta.ActiveAdapters,
	}
	if b.meta.Adapters != nil {
		part.Adapters = b.meta.Adapters[p.Tokens.Start:p.Tokens.Stop]
	}
	// The last part has the padding too, which is of requests that don't exist.
	for _, seq := range b.meta.Seqs[p.Requests.Start:min(p.Requests.Stop, len(b.meta.Seqs))] {
		seq.Rows.Start = max(seq.Rows.Start, p.Tokens.Start) - p.Tokens.Start
		seq.Rows.Stop = min(seq.Rows.Stop, p.Tokens.Stop) - p.Tokens.Start
		part.Seqs = append(part.Seqs, seq)
	}
	return part
}

// sampled says after which rows of a batch tokens of a sequence are to be sampled.
type sampled struct {
	seq  *sequence
	rows fwd.Range
}

// toVerify returns the rows from which the target model's next tokens come: those of the last known
// token of each sequence, and of each guess after it. A sequence in the middle of its prompt has
// none.
func (b *batch) toVerify(step []scheduled) (sample []sampled) {
	for i, s := range step {
		rows := b.meta.Seqs[i].Rows
		if skip := s.seq.known() - 1 - s.first; skip > 0 {
			rows.Start += skip
		}
		if rows.Len() > 0 {
			sample = append(sample, sampled{s.seq, rows})
		}
	}
	return sample
}
