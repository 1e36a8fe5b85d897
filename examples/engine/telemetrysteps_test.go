// Spans of steps that are rare: at the thresholds, and with votes of another step.

package engine

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// TestTelemetryThresholds: both ranks decode 6 requests, then rank 0 has 5, which are enough to
// split, and then 4, which are not, though rank 1 would.
func TestTelemetryThresholds(t *testing.T) {
	var requests []Request
	for i := range 12 {
		requests = append(requests, Request{ID: i, Prompt: []int{i}, MaxTokens: 12})
	}
	requests[0].MaxTokens, requests[2].MaxTokens = 4, 8
	checkTelemetryOf(t,
		Config{DataParallelSize: 2, NumUBatches: 2, DecodeUBatchThreshold: 5, PrefillUBatchThreshold: 1000}, 0,
		requests)
}

// confused is a coordinator that mixes up steps: once, when two steps in a row have the same
// votes, it changes those of the later one.
type confused struct {
	fwd.Coordinator
	mix    func(votes, before []fwd.Vote)
	before []fwd.Vote
	done   bool
}

func (c *confused) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := c.Coordinator.Exchange(ctx, v)
	same := slices.EqualFunc(votes, c.before, func(v, w fwd.Vote) bool {
		return v.NumTokens == w.NumTokens && v.NumTokensPadded == w.NumTokensPadded && v.UBatch == w.UBatch &&
			v.GraphMode == w.GraphMode
	})
	votes = slices.Clone(votes) // the other ranks read what the group gave
	before := c.before
	c.before = slices.Clone(votes)
	if err == nil && same && !c.done {
		c.done = true
		c.mix(votes, before)
	}
	return votes, err
}

// TestTelemetryLockstep: a rank that is given votes of another step, or one that it has not cast,
// stops there, and its span says why. The answers would not show it: what was agreed is the same.
func TestTelemetryLockstep(t *testing.T) {
	const rank = 1
	for name, mix := range map[string]func(votes, before []fwd.Vote){
		"all votes of the step before":     func(votes, before []fwd.Vote) { copy(votes, before) },
		"one vote of the step before":      func(votes, before []fwd.Vote) { votes[0] = before[0] },
		"another vote in place of its own": func(votes, _ []fwd.Vote) { votes[rank].UBatch = !votes[rank].UBatch },
	} {
		t.Run(name, func(t *testing.T) {
			group, err := fwd.NewLocalGroup(3)
			if err != nil {
				t.Fatal(err)
			}
			group[rank] = &confused{Coordinator: group[rank], mix: mix}
			recorder := tracetest.NewSpanRecorder()
			provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
			e := newEngine(t, Config{DataParallelSize: 3, Coordinators: group, TracerProvider: provider})
			if _, _, err := e.Run(t.Context(), newRequests(6, 10, 9)); !errors.Is(err, fwd.ErrLockstep) {
				t.Errorf("%v, want ErrLockstep", err)
			}
			failed := slices.ContainsFunc(recorder.Ended(), func(r sdktrace.ReadOnlySpan) bool {
				s := newSpan(r)
				return s.kind() == "fwd.coordinate" && s.int("fwd.dp.rank") == rank && s.Status().Code == codes.Error &&
					s.text("error.type") == "lockstep"
			})
			if !failed {
				t.Error("no exchange of the rank failed with lockstep")
			}
		})
	}
}
