// Helpers: ranks of bare Runners that take steps together, without an engine or a model.

package integration

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
)

// group is ranks that take steps in lockstep.
type group struct {
	runners []*fwd.Runner
	tracer  trace.Tracer   // starts a span around each rank's step; nil: there is none
	before  func(rank int) // is called before each rank's step; nil: nothing is
}

func newGroup(
	t *testing.T, dispatch fwd.DispatcherConfig, parallel fwd.ParallelConfig, options ...fwd.Option,
) *group {
	t.Helper()
	return newGroupOf(t, dispatch, parallel, func() []fwd.Option { return options })
}

// newTracedGroup returns a group that sends its spans to a service, each step as one trace.
func newTracedGroup(
	t *testing.T, s *service, dispatch fwd.DispatcherConfig, parallel fwd.ParallelConfig,
) *group {
	t.Helper()
	return newGroup(t, dispatch, parallel, fwd.WithStepTrace(),
		fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
}

// newGroupOf returns a group in which each rank gets options of its own.
func newGroupOf(
	t *testing.T, dispatch fwd.DispatcherConfig, parallel fwd.ParallelConfig, options func() []fwd.Option,
) *group {
	t.Helper()
	dispatcher, err := fwd.NewDispatcher(dispatch)
	if err != nil {
		t.Fatal(err)
	}
	coordinators, err := fwd.NewLocalGroup(ranks)
	if err != nil {
		t.Fatal(err)
	}
	g := &group{}
	for _, coordinator := range coordinators {
		r, err := fwd.New(fwd.Config{Name: "target", Parallel: parallel},
			append(options(), fwd.WithDispatcher(dispatcher), fwd.WithCoordinator(coordinator))...)
		if err != nil {
			t.Fatal(err)
		}
		g.runners = append(g.runners, r)
	}
	return g
}

// step is a step of a group.
type step struct {
	schedules []fwd.Schedule // one for each rank

	// prepare is what a rank does between Plan and Run; nil: nothing.
	prepare func(rank int, p *fwd.Pass)

	// forward is the model; nil: it does nothing, in each microbatch.
	forward func(ctx context.Context, rank int) error
}

// take takes a step on all ranks concurrently.
func (g *group) take(ctx context.Context, s step) error {
	errs := make([]error, len(g.runners))
	var wg sync.WaitGroup
	for rank := range g.runners {
		wg.Go(func() { errs[rank] = g.takeOn(ctx, s, rank) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// takeOn takes a step on one rank.
func (g *group) takeOn(ctx context.Context, s step, rank int) error {
	if g.tracer != nil {
		var span trace.Span
		ctx, span = g.tracer.Start(ctx, "engine.step",
			trace.WithNewRoot(), trace.WithAttributes(attribute.Int("rank", rank)))
		defer span.End()
	}
	if g.before != nil {
		g.before(rank)
	}
	pass, err := g.runners[rank].Plan(ctx, s.schedules[rank])
	if err != nil {
		return err
	}
	if s.prepare != nil {
		s.prepare(rank, &pass)
	}
	return g.runners[rank].Run(ctx, pass, func(ctx context.Context) error {
		if s.forward != nil {
			return s.forward(ctx, rank)
		}
		return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
	})
}

// takeAll takes a step with these schedules, which must not fail.
func (g *group) takeAll(t *testing.T, schedules []fwd.Schedule) {
	t.Helper()
	if err := g.take(t.Context(), step{schedules: schedules}); err != nil {
		t.Fatal(err)
	}
}

// tokens returns a schedule of requests with so many tokens each.
func tokens(n ...int) fwd.Schedule {
	return fwd.Schedule{NumScheduledTokens: n, AllowUBatches: true}
}

// onAll returns the same schedule for all ranks.
func onAll(s fwd.Schedule) []fwd.Schedule { return []fwd.Schedule{s, s, s, s} }

// layerError is the error of a layer. It has a word for error.type.
type layerError struct{}

func (*layerError) Error() string     { return "not a number" }
func (*layerError) ErrorType() string { return "not_a_number" }
