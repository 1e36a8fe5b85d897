// Tests that a trace shows which rank failed, was slow, or lowered the mode.

package integration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// TestFailingLayer: the step in which a layer failed is found by its error.type, and says which
// rank it was.
func TestFailingLayer(t *testing.T) {
	s := newService(t, "http")
	c := s.config()
	c.Middleware = inRank(2, nthPass(5, func(context.Context, fwd.ForwardFunc) error {
		return fmt.Errorf("layers.7.mlp: %w", &layerError{})
	}))
	_, stats, err := newEngine(t, c).Run(t.Context(), newRequests(20, 40, 20))
	if want := new(layerError); !errors.As(err, &want) {
		t.Fatal(err)
	}
	spans := s.spans(t)
	checkTrees(t, spans)
	found := s.find(t, map[string]string{"error.type": "not_a_number"})
	if len(found) != 1 {
		t.Fatalf("%d traces with the error, want the step's alone", len(found))
	}
	if n := len(steps(spans)); n != stats.Steps+1 {
		t.Errorf("%d steps, want one more than the %d that went well", n, stats.Steps)
	}
	step := s.trace(t, found[0])
	checkStep(t, step)
	for _, pass := range named(step, "fwd.forward") {
		rank := pass.Attributes["fwd.dp.rank"]
		if !pass.Error {
			t.Errorf("rank %v: want the step to have failed on all ranks", rank)
		}
		if culprit := pass.Message == "layers.7.mlp: not a number"; culprit != (rank == int64(2)) {
			t.Errorf("rank %v failed with %q", rank, pass.Message)
		}
	}
}

const (
	slow  = 2 // the rank that is slow
	delay = 300 * time.Millisecond
)

// mark makes a rank slow in its pass, and says so on the pass's span.
func mark(ctx context.Context, where string) {
	trace.SpanFromContext(ctx).SetAttributes(attribute.String("test.delayed", where))
	time.Sleep(delay)
}

// TestSlowestRank: which rank held up a step is found from its trace, wherever it lost the time.
func TestSlowestRank(t *testing.T) {
	s := newService(t, "grpc")
	for where, middleware := range map[string]fwd.Middleware{
		"before the model": nthPass(7, func(ctx context.Context, next fwd.ForwardFunc) error {
			mark(ctx, "before the model")
			return next(ctx)
		}),
		"after the model": nthPass(7, func(ctx context.Context, next fwd.ForwardFunc) error {
			defer mark(ctx, "after the model")
			return next(ctx)
		}),
	} {
		c := s.config()
		c.NumUBatches = 0                       // waits of microbatches overlap
		c.NumSpeculativeTokens = len(where) % 2 // one of them with a draft model
		c.Middleware = inRank(slow, middleware)
		serve(t, c, newRequests(20, 20, 20))
	}
	g := newTracedGroup(t, s, fwd.DispatcherConfig{}, fwd.ParallelConfig{})
	g.before = func(rank int) {
		if rank == slow {
			time.Sleep(delay)
		}
	}
	late := step{schedules: onAll(tokens(1)), forward: func(ctx context.Context, rank int) error {
		trace.SpanFromContext(ctx).SetAttributes(attribute.String("test.delayed", "late to the vote"))
		return nil
	}}
	if err := g.take(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	s.spans(t)
	for _, where := range []string{"before the model", "after the model", "late to the vote"} {
		found := s.find(t, map[string]string{"test.delayed": where})
		if len(found) != 1 {
			t.Fatalf("%s: %d traces", where, len(found))
		}
		step := s.trace(t, found[0])
		rank, lost, ok := SlowestRank(step)
		if !ok || rank != slow || lost < delay/2 || lost > 2*delay {
			t.Errorf("%s: rank %d with %v (%v), want rank %d with about %v: %+v",
				where, rank, lost, ok, slow, delay, RankTimes(step))
		}
		for _, vote := range named(step, "fwd.coordinate") {
			if last := vote.Attributes["fwd.dp.last_rank"]; where == "late to the vote" && last != int64(slow) {
				t.Errorf("rank %v came last to the vote, want rank %d", last, slow)
			}
		}
	}
}

// TestLoweringRank: which rank took the graphs from the others is found from the step's trace, also
// with a draft model beside it.
func TestLoweringRank(t *testing.T) {
	for name, guesses := range map[string]int{"target": 0, "target and draft": 1} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, "grpc")
			requests := newRequests(ranks, 1, 20)
			requests[1].Prompt = make([]int, 100) // on rank 1, for which there is no graph
			c := s.config()
			c.NumSpeculativeTokens = guesses
			serve(t, c, requests)
			s.spans(t)
			found := s.find(t, map[string]string{"fwd.graph.reason": "dp_rank"})
			if len(found) == 0 {
				t.Fatal("no rank was lowered")
			}
			seen := map[string]bool{}
			for _, id := range found {
				rank, reason, ok := LoweringRank(s.trace(t, id))
				if !ok || rank != 1 {
					t.Errorf("rank %d, %q, %v, want rank 1", rank, reason, ok)
				}
				seen[reason] = true
			}
			if !seen["too_large"] {
				t.Errorf("the reasons are %v, want the batch that is too large among them", seen)
			}
			for _, id := range s.find(t, map[string]string{"fwd.graph.mode": "FULL"}) {
				if slices.Contains(found, id) {
					continue // a pass of the draft model was lowered
				}
				if rank, reason, ok := LoweringRank(s.trace(t, id)); ok {
					t.Errorf("rank %d lowered a step of full graphs: %q", rank, reason)
				}
			}
		})
	}
}

// TestExplain: one trace says who made whom wait and for how long, who lowered the mode, and how much was
// padding.
func TestExplain(t *testing.T) {
	const wait = 20 * time.Millisecond
	s := newService(t, "grpc")
	g := newTracedGroup(t, s, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{4, 8}, MaxNumSeqs: 8,
	}, fwd.ParallelConfig{})
	g.before = func(rank int) {
		if rank == slow {
			time.Sleep(delay)
		}
	}
	for range 2 { // full graphs of 8 tokens; then a prompt of 9 on rank 1, for which there is none
		schedules := []fwd.Schedule{tokens(1, 1, 1, 1, 1), tokens(1), {}, tokens(1, 1)}
		if g.runners[1].Status().Step > 0 {
			schedules[1] = tokens(9)
		}
		err := g.take(t.Context(), step{schedules: schedules, forward: func(ctx context.Context, rank int) error {
			began := time.Now()
			if rank == 3 {
				time.Sleep(wait)
				fwd.Waited(ctx, 0, began)
				fwd.Waited(ctx, 0, time.Now()) // too short for a span
			}
			return nil
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range steps(s.spans(t)) {
		checkStep(t, step)
		checkExplained(t, Explain(step), named(step, "fwd.step")[0].Name, wait)
		for _, w := range named(step, "fwd.wait") {
			want := attrs{"peer.service": "rank 0", "fwd.dp.peer_rank": int64(0)}
			if diff := cmp.Diff(want, w.Attributes); diff != "" || w.Kind != trace.SpanKindClient {
				t.Errorf("fwd.wait is of kind %v (-want +got):\n%s", w.Kind, diff)
			}
		}
	}
}

// checkExplained checks what is said about one of the two steps of TestExplain.
func checkExplained(t *testing.T, got Step, name string, wait time.Duration) {
	t.Helper()
	waits := map[string]bool{}
	for _, w := range got.Waits {
		waits[fmt.Sprint(w.Rank, " for ", w.For)] = true
		ofPass := w.Rank == 3 && w.For == 0
		if ofPass && (w.Passes < wait || w.Votes != 0) || !ofPass && (w.For != slow || w.Passes != 0) {
			t.Errorf("%s: rank %d has waited for rank %d: %+v", name, w.Rank, w.For, w)
		}
	}
	want := map[string]bool{"0 for 2": true, "1 for 2": true, "3 for 2": true, "3 for 0": true}
	if diff := cmp.Diff(want, waits); diff != "" {
		t.Errorf("%s: who has waited (-want +got):\n%s", name, diff)
	}
	if got.Ranks[0].Rank != slow {
		t.Errorf("%s: %+v, want rank %d to cost most", name, got.Ranks, slow)
	}
	padding, lowered := Padding{Tokens: 4 * 8, Graph: 3 + 3 + 2, DP: 4 + 4, Dummy: 8}, false
	if name == "fwd.step NONE" {
		padding, lowered = Padding{Tokens: 8 + 9 + 4 + 4, Graph: 3 + 2, Dummy: 4}, true
	}
	if diff := cmp.Diff(padding, got.Padding); diff != "" {
		t.Errorf("%s: padding (-want +got):\n%s", name, diff)
	}
	if got.Lowered != lowered || lowered && (got.LoweringRank != 1 || got.LoweringReason != "too_large") {
		t.Errorf("%s: lowered %v, by rank %d: %s", name, got.Lowered, got.LoweringRank, got.LoweringReason)
	}
}

// TestRankTimes: waits inside a pass don't count as a rank's own time, and no time is negative.
func TestRankTimes(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	spanOf := func(name string, rank, from, to int, wait float64) Span {
		a := attrs{"fwd.dp.rank": int64(rank)}
		if wait > 0 {
			a["fwd.wait_time"] = wait
		}
		return Span{Name: name, Start: at(from), End: at(to), Attributes: a}
	}
	got := RankTimes([]Span{
		spanOf("fwd.coordinate", 0, 0, 10, 0), spanOf("fwd.forward", 0, 10, 50, 0.030),
		spanOf("fwd.coordinate", 1, 8, 10, 0), spanOf("fwd.forward", 1, 10, 50, 0),
		spanOf("fwd.coordinate", 2, 2, 10, 0), spanOf("fwd.forward", 2, 10, 50, 0.070),
	})
	want := []RankTime{
		{Rank: 1, Late: 8e6, Own: 40e6, Wait: 2e6},
		{Rank: 0, Own: 10e6, Wait: 40e6},
		{Rank: 2, Late: 2e6, Wait: 78e6},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("times (-want +got):\n%s", diff)
	}
}
