package engine

import (
	"context"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"gonum.org/v1/gonum/mat"
)

// propose lets the draft model guess the next tokens of each sequence in the step, for the next
// step to verify together (Leviathan et al., "Fast Inference from Transformers via Speculative
// Decoding", 2023). A guess costs a pass of a smaller model; if it is right, the target has one
// token more from a pass that it takes anyway. A wrong one costs nothing but its place in the
// batch.
//
// The first pass of the draft has the rows of the target's pass, and each row has the token after
// its own: so the token that was just sampled is in it, and its KV cache never lags behind. Each
// further pass has one token of every request. Both are batches that the ranks have agreed on
// already, so nothing is exchanged again: agreed is reused. All ranks take the same number of
// passes, idle ranks as dummy passes.
//
// The passes of the draft are nested: ctx is in the target's pass, and they hide it.
func (r *rank) propose(ctx context.Context, step []scheduled, agreed *fwd.Agreement) error {
	for k := range r.engine.config.NumSpeculativeTokens {
		if k > 0 {
			step = nextGuesses(step)
		}
		schedule := scheduleOf(step)
		schedule.Reuse, schedule.OneTokenPerRequest = agreed, k > 0
		pass, err := r.draft.runner.Plan(ctx, schedule)
		if err != nil {
			return err
		}
		if err := r.guess(ctx, pass, step); err != nil {
			return err
		}
	}
	return nil
}

// ahead is how far the draft model's tokens are ahead of their rows: it sees each sequence without
// its first token, so that it has as many rows as the target.
const ahead = 1

// nextGuesses returns the step of the draft's next pass: the guess of the pass before, of each
// request. A request that has nothing to guess keeps a row, since the ranks have counted it, but
// that is written nowhere.
func nextGuesses(step []scheduled) (next []scheduled) {
	for _, s := range step {
		if s.seq.guesses() {
			next = append(next, scheduled{seq: s.seq, first: s.seq.known() + len(s.seq.drafts) - 1 - ahead, count: 1})
		} else {
			next = append(next, scheduled{seq: s.seq, count: 1, still: true})
		}
	}
	return next
}

// guesses reports whether the draft model has all it needs to guess the next token: the target has
// caught up with the sequence, and there is more to come.
func (s *sequence) guesses() bool { return !s.result.Finished && s.computed == s.known()-1 }

// guess takes one pass of the draft model, and the next guess of each sequence.
func (r *rank) guess(ctx context.Context, pass fwd.Pass, step []scheduled) error {
	batch := r.draft.newBatch(&pass, step)
	hidden, err := r.draft.forward(ctx, pass, batch.tokens)
	if err != nil {
		return err
	}
	sample := batch.toGuess(step)
	logits := r.draft.logits(sample, hidden)
	for i, s := range sample {
		s.seq.drafts = append(s.seq.drafts, model.Argmax(logits.RawRowView(i)))
	}
	return nil
}

// toGuess returns the rows from which the draft model's guesses come: those of the last token of
// each sequence, known or guessed. What rows there are after it had guesses that turned out wrong.
func (b *batch) toGuess(step []scheduled) (sample []sampled) {
	for i, s := range step {
		if s.seq.guesses() {
			last := s.seq.known() + len(s.seq.drafts) - 1 - ahead
			row := b.meta.Seqs[i].Rows.Start + last - s.first
			sample = append(sample, sampled{s.seq, fwd.Range{Start: row, Stop: row + 1}})
		}
	}
	return sample
}

// verify takes the tokens that the target samples after the last known token and after each guess:
// the first is what comes next, and as long as the guess is that token, so is the one after. So the
// tokens are those of greedy sampling without guesses. rows are the target's logits, one for the
// last known token and for each guess in the batch.
//
// What the wrong guesses left in the KV caches is overwritten: both models compute these positions
// again, with other tokens.
func (r *rank) verify(seq *sequence, rows *mat.Dense) {
	sampled := 0
	count, _ := rows.Dims()
	for i := range count {
		logits := rows.RawRowView(i)
		token := model.Argmax(logits)
		seq.result.Tokens = append(seq.result.Tokens, token)
		seq.result.Logits = append(seq.result.Logits[:0], logits...)
		sampled++
		if len(seq.result.Tokens) == seq.request.MaxTokens || i == count-1 || seq.drafts[i] != token {
			break
		}
	}
	r.figures.generated += sampled
	r.figures.accepted += sampled - 1
	r.figures.proposed += count - 1
	r.engine.generated.Add(int64(sampled))
	seq.computed = seq.known() - 1
	seq.drafts = seq.drafts[:0]
}
