package engine

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/forwardctx/fwd/examples/model"
)

// Check recomputes every finished request alone with [model.Generate] and compares. It calls done
// after each, from several goroutines, and returns an error for each request that differs; nil for
// those that agree and for unfinished ones.
func Check(ctx context.Context, w *model.Weights, requests []Request, results []Result, done func()) []error {
	errs := make([]error, len(requests))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(requests); i = int(next.Add(1)) - 1 {
				if results[i].Finished {
					errs[i] = compare(ctx, w, &requests[i], &results[i])
				}
				if done != nil {
					done()
				}
			}
		})
	}
	wg.Wait()
	return errs
}

// tolerance of the last logits, relative to the largest of them. Tokens must be the same.
const tolerance = 1e-9

func compare(ctx context.Context, w *model.Weights, r *Request, got *Result) error {
	tokens, logits, err := model.Generate(ctx, w, r.Adapter, r.Prompt, r.MaxTokens)
	if err != nil {
		return fmt.Errorf("request %d: %w", r.ID, err)
	}
	if !slices.Equal(got.Tokens, tokens) {
		at := 0
		for at < len(tokens) && at < len(got.Tokens) && got.Tokens[at] == tokens[at] {
			at++
		}
		return fmt.Errorf("request %d: served %d tokens, alone %d; the first %d are the same", r.ID,
			len(got.Tokens), len(tokens), at)
	}
	if len(got.Logits) != len(logits) {
		return fmt.Errorf("request %d: %d logits, alone %d", r.ID, len(got.Logits), len(logits))
	}
	largest, off := 0.0, 0.0
	for i, v := range logits {
		largest = max(largest, math.Abs(v))
		off = max(off, math.Abs(got.Logits[i]-v)) // NaN stays NaN
	}
	if !(off <= tolerance*largest) {
		return fmt.Errorf("request %d: the last logits are off by %.3g of %.3g, more than %.0e of it", r.ID, off,
			largest, tolerance)
	}
	return nil
}
