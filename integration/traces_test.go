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

// group is ranks that take steps in lockstep.
type group struct {
	runners []*fwd.Runner
	tracer  trace.Tracer   // of a span around each rank's step; nil: none
	before  func(rank int) // each step; nil: nothing
}

func newGroup(t *testing.T, dispatch fwd.DispatcherConfig, parallel fwd.ParallelConfig, options ...fwd.Option) *group {
	t.Helper()
	return newGroupOf(t, dispatch, parallel, func() []fwd.Option { return options })
}

// newGroupOf returns a group in which each rank gets options of its own.
func newGroupOf(t *testing.T, dispatch fwd.DispatcherConfig, parallel fwd.ParallelConfig, options func() []fwd.Option) *group {
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
	for rank, coordinator := range coordinators {
		parallel.DataParallelSize, parallel.DataParallelRank = ranks, rank
		r, err := fwd.New(fwd.Config{Name: "target", Parallel: parallel},
			append(options(), fwd.WithDispatcher(dispatcher), fwd.WithCoordinator(coordinator))...)
		if err != nil {
			t.Fatal(err)
		}
		g.runners = append(g.runners, r)
	}
	return g
}

// step takes a step on all ranks at once. forward is the model, and prepare what a rank does between plan and pass; both may
// be nil.
func (g *group) step(ctx context.Context, schedules []fwd.Schedule, prepare func(rank int, p *fwd.Pass), forward func(ctx context.Context, rank int) error) error {
	errs := make([]error, len(g.runners))
	var wg sync.WaitGroup
	for rank, r := range g.runners {
		wg.Go(func() {
			ctx := ctx
			if g.tracer != nil {
				var span trace.Span
				ctx, span = g.tracer.Start(ctx, "engine.step", trace.WithNewRoot(), trace.WithAttributes(attribute.Int("rank", rank)))
				defer span.End()
			}
			if g.before != nil {
				g.before(rank)
			}
			pass, err := r.Plan(ctx, schedules[rank])
			if err != nil {
				errs[rank] = err
				return
			}
			if prepare != nil {
				prepare(rank, &pass)
			}
			errs[rank] = r.Run(ctx, pass, func(ctx context.Context) error {
				if forward == nil {
					return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
				}
				return forward(ctx, rank)
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// tokens is a schedule of requests with that many tokens.
func tokens(n ...int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: n, AllowUBatches: true} }

type attrs = map[string]any

// with returns attributes with others added or replaced.
func with(base attrs, others ...attrs) attrs {
	all := maps.Clone(base)
	for _, o := range others {
		maps.Copy(all, o)
	}
	return all
}

// TestAttributes: every span and attribute arrives under its name, with its value and type, by both protocols. The values
// are worked out by hand from the schedules.
func TestAttributes(t *testing.T) {
	for protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			s := newService(t, protocol)
			g := newGroup(t, fwd.DispatcherConfig{
				Mode:         fwd.GraphFullAndPiecewise,
				CaptureSizes: []int{1, 2, 4, 8, 16, 32},
				MaxNumSeqs:   8,
				LoRA:         &fwd.LoRAConfig{MaxLoRAs: 2, SpecializeCount: true},
			}, fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 8, PrefillUBatchThreshold: 16},
				fwd.WithStepTrace(), fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
			layer := &layerError{}
			for _, step := range []struct {
				schedules []fwd.Schedule
				prepare   func(rank int, p *fwd.Pass)
				forward   func(ctx context.Context, rank int) error
				err       error
			}{
				// Decoding, an idle rank among it: full graphs, the largest rank's size for all.
				{schedules: []fwd.Schedule{
					{NumScheduledTokens: []int{1, 1, 1}, NumActiveLoRAs: 2}, tokens(1, 1), tokens(1), {},
				}, prepare: func(rank int, p *fwd.Pass) { p.VirtualEngine = rank % 2 }},
				// A prompt that no graph holds takes the graphs from all.
				{schedules: []fwd.Schedule{tokens(1), tokens(1), tokens(40), tokens(1, 1)}},
				// Prompts on all ranks, in two microbatches.
				{schedules: []fwd.Schedule{tokens(17, 3), tokens(20), tokens(18), tokens(9, 9, 9)}},
				// A layer that fails.
				{
					schedules: []fwd.Schedule{tokens(1), tokens(1), tokens(1), tokens(1)},
					forward: func(_ context.Context, rank int) error {
						if rank == 1 {
							return fmt.Errorf("layers.7.mlp: %w", layer)
						}
						return nil
					},
					err: layer,
				},
			} {
				if err := g.step(t.Context(), step.schedules, step.prepare, step.forward); !errors.Is(err, step.err) {
					t.Fatal(err)
				}
			}

			// The same at all ranks in a step.
			steps := []attrs{
				{"fwd.step": int64(1), "fwd.dp.max_tokens_rank": int64(0)},
				{"fwd.step": int64(2), "fwd.dp.max_tokens_rank": int64(2), "fwd.dp.lowest_mode_rank": int64(2)},
				{"fwd.step": int64(3), "fwd.dp.max_tokens_rank": int64(0)},
				{"fwd.step": int64(4), "fwd.dp.max_tokens_rank": int64(0)},
			}
			pass := func(step, rank, padded, unpadded, reqs, graphPadding, dpPadding int, mode, reason string, uniform bool, others attrs) attrs {
				return with(steps[step-1], rankOf(rank), attrs{
					"fwd.name":                "target",
					"fwd.num_tokens":          int64(padded),
					"fwd.num_tokens_unpadded": int64(unpadded),
					"fwd.num_reqs":            int64(reqs),
					"fwd.padding.graph":       int64(graphPadding),
					"fwd.padding.dp":          int64(dpPadding),
					"fwd.graph.mode":          mode,
					"fwd.graph.reason":        reason,
					"fwd.batch.uniform":       uniform,
					"fwd.virtual_engine":      int64(0),
					"fwd.dummy":               false,
				}, others)
			}
			four := attrs{"fwd.dp.max_tokens": int64(4), "fwd.batch.num_reqs": int64(4)}
			forty := attrs{"fwd.dp.max_tokens": int64(40)}
			split := attrs{"fwd.dp.max_tokens": int64(32), "fwd.ubatches": int64(2)}
			one := attrs{"fwd.dp.max_tokens": int64(1), "fwd.batch.num_reqs": int64(1)}
			virtual := attrs{"fwd.virtual_engine": int64(1)}
			want := []span{
				{"fwd.forward", pass(1, 0, 4, 3, 3, 1, 0, "FULL", "exact", true, with(four, attrs{"fwd.batch.num_active_loras": int64(2)})), ""},
				{"fwd.forward", pass(1, 1, 4, 2, 2, 0, 2, "FULL", "exact", true, with(four, virtual)), ""},
				{"fwd.forward", pass(1, 2, 4, 1, 1, 0, 3, "FULL", "exact", true, four), ""},
				{"fwd.forward", pass(1, 3, 4, 1, 1, 0, 3, "FULL", "exact", true, with(four, virtual, attrs{"fwd.dummy": true})), ""},

				{"fwd.forward", pass(2, 0, 1, 1, 1, 0, 0, "NONE", "dp_rank", false, forty), ""},
				{"fwd.forward", pass(2, 1, 1, 1, 1, 0, 0, "NONE", "dp_rank", false, forty), ""},
				{"fwd.forward", pass(2, 2, 40, 40, 1, 0, 0, "NONE", "too_large", false, forty), ""},
				{"fwd.forward", pass(2, 3, 2, 2, 2, 0, 0, "NONE", "dp_rank", false, forty), ""},

				{"fwd.forward", pass(3, 0, 32, 20, 2, 12, 0, "PIECEWISE", "relaxed", false, split), ""},
				{"fwd.forward", pass(3, 1, 32, 20, 1, 12, 0, "PIECEWISE", "relaxed", false, split), ""},
				{"fwd.forward", pass(3, 2, 32, 18, 1, 14, 0, "PIECEWISE", "relaxed", false, split), ""},
				{"fwd.forward", pass(3, 3, 32, 27, 3, 5, 0, "PIECEWISE", "relaxed", false, split), ""},

				{"fwd.forward", pass(4, 0, 1, 1, 1, 0, 0, "FULL", "exact", true, one), ""},
				{"fwd.forward", pass(4, 1, 1, 1, 1, 0, 0, "FULL", "exact", true, with(one, attrs{"error.type": "not_a_number"})), "layers.7.mlp: not a number"},
				{"fwd.forward", pass(4, 2, 1, 1, 1, 0, 0, "FULL", "exact", true, one), ""},
				{"fwd.forward", pass(4, 3, 1, 1, 1, 0, 0, "FULL", "exact", true, one), ""},
			}
			for _, step := range steps {
				for rank := range ranks {
					want = append(want, span{"fwd.coordinate", with(step, rankOf(rank)), ""})
				}
			}
			for range ranks {
				for i := range 2 {
					want = append(want, span{"fwd.ubatch", attrs{"fwd.ubatch.index": int64(i), "fwd.num_tokens": int64(16)}, ""})
				}
			}
			var got []span
			for _, s := range s.spans(t) {
				if s.Scope != fwd.ScopeName || s.ScopeVersion != fwd.Version {
					t.Errorf("%s comes from %q %q", s.Name, s.Scope, s.ScopeVersion)
				}
				if s.Error != (s.Message != "") {
					t.Errorf("%s has the status error: %v, with the message %q", s.Name, s.Error, s.Message)
				}
				got = append(got, span{s.Name, s.Attributes, s.Message})
			}
			inOrder := cmpopts.SortSlices(func(a, b span) bool { return fmt.Sprint(a) < fmt.Sprint(b) })
			if diff := cmp.Diff(want, got, inOrder); diff != "" {
				t.Errorf("spans (-want +got):\n%s", diff)
			}
		})
	}
}

// span is what TestAttributes compares.
type span struct {
	Name       string
	Attributes attrs
	Message    string
}

func rankOf(rank int) attrs {
	return attrs{"fwd.dp.rank": int64(rank), "fwd.dp.size": int64(ranks)}
}

type layerError struct{}

func (*layerError) Error() string     { return "not a number" }
func (*layerError) ErrorType() string { return "not_a_number" }

// checkTrees checks that every span has ended, not before it began, that its parent is there, and that a microbatch lies in
// its pass.
func checkTrees(t *testing.T, spans []Span) {
	t.Helper()
	byID := map[string]*Span{}
	for i := range spans {
		byID[spans[i].SpanID] = &spans[i]
	}
	if len(byID) != len(spans) {
		t.Errorf("%d spans have %d ids", len(spans), len(byID))
	}
	for _, s := range spans {
		parent := byID[s.ParentSpanID]
		switch {
		case s.Start.IsZero() || s.End.Before(s.Start):
			t.Errorf("%s lasts from %v to %v", s.Name, s.Start, s.End)
		case s.ParentSpanID == "":
		case parent == nil || parent.TraceID != s.TraceID:
			t.Errorf("%s has no parent %s in its trace", s.Name, s.ParentSpanID)
		case s.Name == "fwd.ubatch" && (parent.Name != "fwd.forward" || s.Start.Before(parent.Start) || s.End.After(parent.End)):
			t.Errorf("%s from %v to %v is not inside of %s from %v to %v", s.Name, s.Start, s.End, parent.Name, parent.Start, parent.End)
		}
	}
}

// checkStep checks that a trace without callers' spans is a step of all ranks: rank 0's fwd.coordinate is the root, and the
// other ranks' and all passes are its children.
func checkStep(t *testing.T, spans []Span) {
	t.Helper()
	var root string
	for _, s := range spans {
		if s.ParentSpanID == "" {
			if root != "" || s.Name != "fwd.coordinate" || s.Attributes["fwd.dp.rank"] != int64(0) {
				t.Errorf("trace %s has the root %s of rank %v, beside %q", s.TraceID, s.Name, s.Attributes["fwd.dp.rank"], root)
			}
			root = s.SpanID
		}
	}
	found := map[string]int{}
	for _, s := range spans {
		if s.ParentSpanID == root || s.SpanID == root {
			found[fmt.Sprint(s.Name, " ", s.Attributes["fwd.dp.rank"])]++
		}
	}
	want := map[string]int{}
	for rank := range ranks {
		want[fmt.Sprint("fwd.coordinate ", rank)] = 1
		want[fmt.Sprint("fwd.forward ", rank)] = 1
	}
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("rank 0's coordinate span and its children in trace %s (-want +got):\n%s", spans[0].TraceID, diff)
	}
}

// TestNesting: with the callers' spans, a step hangs below rank 0's caller, and each rank's spans are linked to their own
// caller's.
func TestNesting(t *testing.T) {
	s := newService(t, "grpc")
	g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 2},
		fwd.WithStepTrace(), fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
	g.tracer = s.provider.Tracer("engine")
	schedules := []fwd.Schedule{tokens(8), tokens(8), tokens(8), tokens(8)}
	if err := g.step(t.Context(), schedules, nil, nil); err != nil {
		t.Fatal(err)
	}
	spans := s.spans(t)
	checkTrees(t, spans)
	callers := map[string]int64{}
	for _, s := range named(spans, "engine.step") {
		callers[s.SpanID] = s.Attributes["rank"].(int64)
	}
	// place says what a span's parent and links are.
	names := map[string]string{}
	for _, s := range spans {
		rank := s.Attributes["fwd.dp.rank"]
		if r, ok := callers[s.SpanID]; ok {
			rank = r
		}
		names[s.SpanID] = fmt.Sprint(s.Name, " ", rank)
	}
	got := map[string][]string{}
	for _, s := range spans {
		place := names[s.ParentSpanID]
		for _, l := range s.Links {
			place += " linked to " + names[l.SpanID]
		}
		got[names[s.SpanID]] = append(got[names[s.SpanID]], place)
	}
	want := map[string][]string{
		"fwd.coordinate 0": {"engine.step 0"},
		"fwd.ubatch <nil>": nil,
	}
	for rank := range ranks {
		want[fmt.Sprint("engine.step ", rank)] = []string{""}
		want[fmt.Sprint("fwd.forward ", rank)] = []string{fmt.Sprint("fwd.coordinate 0 linked to engine.step ", rank)}
		if rank > 0 {
			want[fmt.Sprint("fwd.coordinate ", rank)] = []string{fmt.Sprint("fwd.coordinate 0 linked to engine.step ", rank)}
		}
		place := fmt.Sprint("fwd.forward ", rank)
		want["fwd.ubatch <nil>"] = append(want["fwd.ubatch <nil>"], place, place)
	}
	slices.Sort(got["fwd.ubatch <nil>"])
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parents and links (-want +got):\n%s", diff)
	}
	if n := len(byTrace(spans)); n != ranks {
		t.Errorf("%d traces, want the step's, and those of %d other callers", n, ranks-1)
	}
}

// TestSteps: what an engine does is in Jaeger, step by step: each is a trace of its own, and nothing is missing or left open.
func TestSteps(t *testing.T) {
	for protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			s := newService(t, protocol)
			requests := newRequests(40, 60, 10)
			_, stats := serve(t, s.config(), requests)
			spans := s.spans(t)
			checkTrees(t, spans)
			if stats.SplitPasses == 0 || stats.DummyPasses == 0 {
				t.Errorf("%+v: the requests should make some microbatches and dummy passes", stats)
			}

			// Count what is not a step, and compare the steps with the engine's own figures.
			var split, dummies, linked int
			modes, reasons := map[string]int{}, map[string]int{}
			all := byTrace(spans)
			steps := steps(spans)
			for _, step := range steps {
				checkStep(t, step)
				for _, pass := range named(step, "fwd.forward") {
					modes[pass.Attributes["fwd.graph.mode"].(string)]++
					reasons[pass.Attributes["fwd.graph.reason"].(string)]++
					if pass.Attributes["fwd.dummy"].(bool) {
						dummies++
					}
					linked += len(pass.Links)
					parts := slices.DeleteFunc(named(step, "fwd.ubatch"), func(u Span) bool { return u.ParentSpanID != pass.SpanID })
					if n, ok := pass.Attributes["fwd.ubatches"].(int64); ok {
						split++
						if n != 2 || len(parts) == 0 || len(parts)%2 != 0 {
							t.Errorf("a pass of %d microbatches has the spans of %d", n, len(parts))
						}
					} else if len(parts) > 0 {
						t.Errorf("a pass that is not split has the spans of %d microbatches", len(parts))
					}
				}
			}
			if len(steps) != stats.Steps || split != stats.SplitPasses || dummies != stats.DummyPasses {
				t.Errorf("%d steps, %d split passes, %d dummy passes in Jaeger; the engine says %d, %d, %d",
					len(steps), split, dummies, stats.Steps, stats.SplitPasses, stats.DummyPasses)
			}
			wantModes, wantReasons := map[string]int{}, map[string]int{}
			for m, n := range stats.Modes {
				wantModes[m.String()] = n
			}
			for r, n := range stats.Passes {
				wantReasons[r.String()] = n
			}
			if diff := cmp.Diff(wantModes, modes) + cmp.Diff(wantReasons, reasons); diff != "" {
				t.Errorf("passes by mode and reason (-engine +jaeger):\n%s", diff)
			}
			if linked == 0 {
				t.Error("no pass is linked to a request")
			}
			kinds := map[string]int{}
			for id, trace := range all {
				if steps[id] != nil {
					continue
				}
				for _, s := range trace {
					if s.ParentSpanID == "" {
						kinds[s.Name]++
					}
				}
			}
			if diff := cmp.Diff(map[string]int{"request": len(requests), "warm-up": ranks}, kinds); diff != "" {
				t.Errorf("traces that are no steps (-want +got):\n%s", diff)
			}
		})
	}
}

// TestFind: passes are found by their mode, reason, name, and whether they are dummies, by a search for one tag.
func TestFind(t *testing.T) {
	s := newService(t, "grpc")
	c := s.config()
	c.NumSpeculativeTokens = 1 // by a draft model, which has a name
	serve(t, c, newRequests(30, 90, 10))
	spans := s.spans(t)
	checkTrees(t, spans)
	for key, values := range map[string][]string{
		"fwd.graph.mode":   {"NONE", "PIECEWISE", "FULL"},
		"fwd.graph.reason": {"exact", "relaxed", "too_large", "dp_rank"},
		"fwd.name":         {"draft"},
		"fwd.dummy":        {"true", "false"},
	} {
		for _, value := range values {
			var want []string
			for _, s := range spans {
				if s.Name == "fwd.forward" && fmt.Sprint(s.Attributes[key]) == value {
					want = append(want, s.TraceID)
				}
			}
			slices.Sort(want)
			want = slices.Compact(want)
			if diff := cmp.Diff(want, s.find(t, map[string]string{key: value})); diff != "" || len(want) == 0 {
				t.Errorf("%s=%s: %d traces have such a pass; the search (-want +got):\n%s", key, value, len(want), diff)
			}
		}
	}
	if found := s.find(t, map[string]string{"fwd.graph.mode": "FULL", "fwd.dp.rank": "7"}); len(found) > 0 {
		t.Errorf("%d traces of a rank that there isn't", len(found))
	}
}

// nthPass is middleware that calls do in the n-th pass that serves requests, with what runs the model.
func nthPass(n int64, do func(ctx context.Context, next fwd.ForwardFunc) error) fwd.Middleware {
	var passes atomic.Int64
	return func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			if !fwd.MustFromContext(ctx).Dummy && passes.Add(1) == n {
				return do(ctx, next)
			}
			return next(ctx)
		}
	}
}

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
