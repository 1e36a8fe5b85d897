// Tests that a trace shows which rank failed, was slow, or lowered the mode.
package integration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
)

// TestFailingLayer: the step in which a layer failed is found by its error.type, and says which rank it was.
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
	checkTrees(t, s.spans(t))
	found := s.find(t, map[string]string{"error.type": "not_a_number"})
	if len(found) != 1 {
		t.Fatalf("%d traces with the error, want the step's alone", len(found))
	}
	step := s.trace(t, found[0])
	checkStep(t, step)
	for _, pass := range named(step, "fwd.forward") {
		if pass.Attributes["fwd.step"] != int64(stats.Steps+1) || !pass.Error {
			t.Errorf("rank %v: step %v, error %v, want step %d to have failed on all ranks",
				pass.Attributes["fwd.dp.rank"], pass.Attributes["fwd.step"], pass.Error, stats.Steps+1)
		}
		if culprit := pass.Message == "layers.7.mlp: not a number"; culprit != (pass.Attributes["fwd.dp.rank"] == int64(2)) {
			t.Errorf("rank %v failed with %q", pass.Attributes["fwd.dp.rank"], pass.Message)
		}
	}
}

// TestSlowestRank: which rank held up a step is found from its trace, wherever it lost the time.
func TestSlowestRank(t *testing.T) {
	const slow, delay = 2, 300 * time.Millisecond
	s := newService(t, "grpc")
	mark := func(ctx context.Context, where string) {
		trace.SpanFromContext(ctx).SetAttributes(attribute.String("test.delayed", where))
		time.Sleep(delay)
	}
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
		c.NumSpeculativeTokens = len(where) % 2 // one of them with a draft model
		c.Middleware = inRank(slow, middleware)
		serve(t, c, newRequests(20, 20, 20))
	}
	g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{}, fwd.WithStepTrace(), fwd.WithTracerProvider(s.provider))
	g.before = func(rank int) {
		if rank == slow {
			time.Sleep(delay)
		}
	}
	if err := g.step(t.Context(), make([]fwd.Schedule, ranks), nil, func(ctx context.Context, rank int) error {
		trace.SpanFromContext(ctx).SetAttributes(attribute.String("test.delayed", "late to the vote"))
		return nil
	}); err != nil {
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
			t.Errorf("%s: rank %d with %v (%v), want rank %d with about %v: %+v", where, rank, lost, ok, slow, delay, RankTimes(step))
		}
	}
}

// TestLoweringRank: which rank took the graphs from the others is found from the step's trace.
func TestLoweringRank(t *testing.T) {
	s := newService(t, "grpc")
	requests := newRequests(ranks, 1, 20)
	requests[1].Prompt = make([]int, 100) // on rank 1, for which there is no graph
	serve(t, s.config(), requests)
	s.spans(t)
	found := s.find(t, map[string]string{"fwd.graph.reason": "dp_rank"})
	if len(found) == 0 {
		t.Fatal("no rank was lowered")
	}
	for _, id := range found {
		if rank, reason, ok := LoweringRank(s.trace(t, id)); !ok || rank != 1 || reason != "too_large" {
			t.Errorf("rank %d, %q, %v, want rank 1 for a batch too large", rank, reason, ok)
		}
	}
	for _, id := range s.find(t, map[string]string{"fwd.graph.mode": "FULL"}) {
		if rank, reason, ok := LoweringRank(s.trace(t, id)); ok {
			t.Errorf("rank %d lowered a step of full graphs: %q", rank, reason)
		}
	}
}
