package engine

import (
	"context"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"gonum.org/v1/gonum/mat"
)

// propose lets the draft model guess the next tokens of each sequence in the step, for the next step to verify all at once
// (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023). A guess costs a pass of a smaller
// model; where it is right, the target has a token more from a pass that it takes anyway. A wrong one costs nothing but its
// place in the batch.
//
// The passes of the draft are nested: ctx is in the target's pass, and they hide it. All ranks take the same number of them,
// idle ranks and those with nothing to guess as dummy passes. Where a rank is missing in one of them, the guesses end there:
// the target's pass needs none, and the draft model catches up in the next step.
func (r *rank) propose(ctx context.Context, step []scheduled) error {
	for k := range r.engine.config.NumSpeculativeTokens {
		var guess []scheduled
		for _, s := range step {
			if s.seq.result.Finished {
				continue
			}
			// The first pass catches up with what the target has computed, and with the token that was sampled last; the
			// others take the guess of the one before.
			end := s.seq.computed
			if s.seq.computed == s.seq.known()-1 {
				end = s.seq.known() + len(s.seq.drafts)
			} else if k > 0 {
				continue // in the middle of its prompt
			}
			guess = append(guess, scheduled{s.seq, s.seq.drafted, end - s.seq.drafted})
		}
		if len(guess) == 0 && r.engine.config.DataParallelSize == 1 {
			return nil
		}
		pass, batch, err := r.draft.plan(ctx, guess, r.engine.config.BlockSize)
		if err != nil {
			return r.missed(ctx, err)
		}
		if err := r.guess(ctx, pass, batch, guess); err != nil {
			return err
		}
	}
	return nil
}

// guess takes one pass of the draft model, and the next guess of each sequence that it has caught up with.
func (r *rank) guess(ctx context.Context, pass fwd.Pass, batch *batch, guess []scheduled) error {
	var hidden *mat.Dense
	err := r.draft.runner.Run(ctx, pass, func(ctx context.Context) (err error) {
		hidden, err = r.draft.executor.Forward(ctx, batch.tokens)
		return err
	})
	if err != nil {
		return err
	}
	r.figures.draftPasses++
	for _, s := range guess {
		s.seq.drafted += s.count
	}
	logits := r.draft.logits(batch.sample, hidden)
	for i, s := range batch.sample {
		s.seq.drafts = append(s.seq.drafts, model.Argmax(logits.RawRowView(i)))
	}
	return nil
}

// verify takes the tokens that the target samples after the last known token and after each guess: the first is what comes
// next, and as long as the guess is that token, so is the one after. So the tokens are those of greedy sampling without
// guesses. rows are the target's logits, one for the last known token and for each guess in the batch.
//
// What the wrong guesses left in the KV caches is overwritten: both models compute these positions again, with other tokens.
func (r *rank) verify(seq *sequence, rows *mat.Dense) {
	known, sampled := seq.known(), 0
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
	seq.drafted = min(seq.drafted, known+sampled-1)
	seq.drafts = seq.drafts[:0]
}
