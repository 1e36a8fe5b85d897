// Helpers: a group of ranks that plan and run steps, and the names of the spans that came of them.

package fwdtrace_test

import (
	"context"
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtrace"
	"go.opentelemetry.io/otel/metric/noop"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// group are the Runners of two ranks, with a graph for 4 tokens and the step trace.
type group struct {
	*testing.T
	ranks []*fwd.Runner
}

func newGroup(t *testing.T, provider trace.TracerProvider) *group {
	t.Helper()
	coordinators, err := fwd.NewLocalGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	g := &group{T: t}
	for _, c := range coordinators {
		d, err := fwd.NewDispatcher(fwd.DispatcherConfig{
			Mode: fwd.GraphFull, CaptureSizes: []int{4}, MaxNumSeqs: 4,
		})
		if err != nil {
			t.Fatal(err)
		}
		r, err := fwd.New(fwd.Config{Name: "model"}, fwd.WithCoordinator(c), fwd.WithDispatcher(d),
			fwd.WithStepTrace(), fwd.WithTracerProvider(provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
		if err != nil {
			t.Fatal(err)
		}
		g.ranks = append(g.ranks, r)
	}
	return g
}

// each does the same on all ranks concurrently, as the exchanges need it.
func (g *group) each(do func(rank int, r *fwd.Runner) error) {
	g.Helper()
	var wg sync.WaitGroup
	for rank, r := range g.ranks {
		wg.Go(func() {
			if err := do(rank, r); err != nil {
				g.Errorf("rank %d: %v", rank, err)
			}
		})
	}
	wg.Wait()
}

// take takes one step in which each rank serves requests, with links from its pass to these. A rank
// without requests is idle.
func (g *group) take(requests ...[]trace.Link) {
	g.Helper()
	g.each(func(rank int, r *fwd.Runner) error {
		links := requests[rank]
		var s fwd.Schedule
		for range links {
			s.NumScheduledTokens = append(s.NumScheduledTokens, 1)
		}
		pass, err := r.Plan(fwdtrace.ContextWithLinks(g.Context(), links...), s)
		if err != nil {
			return err
		}
		pass.Links = links
		return r.Run(g.Context(), pass, func(context.Context) error { return nil })
	})
}

func (g *group) warmUp() {
	g.Helper()
	g.each(func(_ int, r *fwd.Runner) error {
		for pass, err := range r.WarmUp(g.Context()) {
			if err != nil {
				return err
			}
			if err := r.Run(g.Context(), pass, func(context.Context) error { return nil }); err != nil {
				return err
			}
		}
		return nil
	})
}

// count counts spans by name.
func count(spans []sdktrace.ReadOnlySpan) map[string]int {
	names := map[string]int{}
	for _, s := range spans {
		names[s.Name()]++
	}
	return names
}
