// Tests of the traces of steps: which spans they have, how these hang together, and how they are
// found.

package integration

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/google/go-cmp/cmp"
)

// insideOf says inside of which spans a span must lie. A fwd.coordinate span may begin before the step
// that it belongs to: if rank 0 is late, the others already wait.
var insideOf = map[string][]string{
	"fwd.forward": {"fwd.step", "fwd.forward", "warm-up"}, // a draft model's is in its target's
	"fwd.ubatch":  {"fwd.forward"},
	"fwd.wait":    {"fwd.forward", "fwd.ubatch"},
}

// checkTrees checks that every span has ended, not before it began, that its parent is there, and
// that it lies inside of its parent, as far as it should. If the system sets its clock by a little while
// a step runs, a span moves: one in many may end so much too late.
func checkTrees(t *testing.T, spans []Span) {
	t.Helper()
	const clockStep = time.Millisecond
	moved := len(spans) < 100 // else one may
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
		case parent.Operation() == "fwd.step" && s.End.After(parent.End):
			t.Errorf("%s ends %v after %s", s.Name, s.End.Sub(parent.End), parent.Name)
		case insideOf[s.Operation()] == nil:
		case !slices.Contains(insideOf[s.Operation()], parent.Operation()) ||
			s.Start.Before(parent.Start) || s.End.After(parent.End):
			child := slices.Contains(insideOf[s.Operation()], parent.Operation())
			if child && !moved && parent.Start.Sub(s.Start) < clockStep && s.End.Sub(parent.End) < clockStep {
				moved = true
				t.Logf("%s ends %v after %s: has the clock been set?", s.Name, s.End.Sub(parent.End), parent.Name)
				continue
			}
			t.Errorf("%s from %v to %v is not inside of %s from %v to %v",
				s.Name, s.Start, s.End, parent.Name, parent.Start, parent.End)
		}
	}
}

// checkStep checks that a trace without callers' spans is a step of all ranks: fwd.step is the root, and
// the exchanges and the passes of all ranks are its children.
func checkStep(t *testing.T, spans []Span) {
	t.Helper()
	checkChildren(t, spans, "fwd.coordinate", "fwd.forward")
}

// checkChildren checks that a trace has one fwd.step as its root, and as the root's children one span of
// each rank with each of these names.
func checkChildren(t *testing.T, spans []Span, names ...string) {
	t.Helper()
	root := rootOf(t, spans)
	found := map[string]int{}
	for _, s := range spans {
		if s.ParentSpanID == root.SpanID {
			found[fmt.Sprint(s.Operation(), " ", s.Attributes["fwd.dp.rank"])]++
		}
	}
	want := map[string]int{}
	for rank := range ranks {
		for _, name := range names {
			want[fmt.Sprint(name, " ", rank)] = 1
		}
	}
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("children of %s in trace %s (-want +got):\n%s", root.Name, root.TraceID, diff)
	}
}

// rootOf returns the root of a step's trace, which rank 0 has.
func rootOf(t *testing.T, spans []Span) Span {
	t.Helper()
	var roots []Span
	for _, s := range spans {
		if s.ParentSpanID == "" {
			roots = append(roots, s)
		}
	}
	if len(roots) != 1 || roots[0].Operation() != "fwd.step" || roots[0].Attributes["fwd.dp.rank"] != int64(0) {
		t.Fatalf("the roots are %+v, want one fwd.step of rank 0", roots)
	}
	return roots[0]
}

// TestNesting: with the callers' spans, a step is below rank 0's caller, and each rank's spans are
// linked to that of their own caller.
func TestNesting(t *testing.T) {
	s := newService(t, "grpc")
	g := newTracedGroup(t, s, fwd.DispatcherConfig{},
		fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 2})
	g.tracer = s.provider.Tracer("engine")
	g.takeAll(t, onAll(tokens(8)))
	spans := s.spans(t)
	checkTrees(t, spans)
	names := map[string]string{} // by id
	for _, s := range spans {
		rank, ok := s.Attributes["fwd.dp.rank"]
		if !ok {
			rank = s.Attributes["rank"] // of engine.step; a microbatch has none
		}
		names[s.SpanID] = fmt.Sprint(s.Operation(), " ", rank)
	}
	got := map[string][]string{} // what a span's parent and links are
	for _, s := range spans {
		place := names[s.ParentSpanID]
		for _, l := range s.Links {
			place += " linked to " + names[l.SpanID]
		}
		got[names[s.SpanID]] = append(got[names[s.SpanID]], place)
	}
	want := map[string][]string{"fwd.step 0": {"engine.step 0"}, "fwd.ubatch <nil>": nil}
	for rank := range ranks {
		linked := fmt.Sprint("fwd.step 0 linked to engine.step ", rank)
		pass := fmt.Sprint("fwd.forward ", rank)
		want[fmt.Sprint("engine.step ", rank)] = []string{""}
		want[pass] = []string{linked}
		want[fmt.Sprint("fwd.coordinate ", rank)] = []string{linked}
		want["fwd.ubatch <nil>"] = append(want["fwd.ubatch <nil>"], pass, pass)
	}
	slices.Sort(got["fwd.ubatch <nil>"])
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parents and links (-want +got):\n%s", diff)
	}
	if n := len(byTrace(spans)); n != ranks {
		t.Errorf("%d traces, want the step's, and those of %d other callers", n, ranks-1)
	}
}

// TestIdle: where every rank is idle, there is an exchange and nobody runs.
func TestIdle(t *testing.T) {
	s := newService(t, "grpc")
	g := newTracedGroup(t, s, fwd.DispatcherConfig{}, fwd.ParallelConfig{})
	g.takeAll(t, make([]fwd.Schedule, ranks))
	g.takeAll(t, onAll(tokens(1)))
	traces := byTrace(s.spans(t))
	if len(traces) != 2 {
		t.Errorf("%d traces of 2 steps", len(traces))
	}
	var names []string
	for _, spans := range traces {
		root := rootOf(t, spans)
		names = append(names, root.Name)
		if root.Name == "fwd.step IDLE" {
			checkChildren(t, spans, "fwd.coordinate")
		} else {
			checkStep(t, spans)
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"fwd.step IDLE", "fwd.step NONE"}, names); diff != "" {
		t.Errorf("roots (-want +got):\n%s", diff)
	}
}

// passCounts are how many passes of the target model there were.
type passCounts struct {
	Steps, Split, Dummies int
	Modes, Reasons        map[string]int
}

// countPasses counts the passes in the traces of steps, and checks their microbatches and how many
// ranks they say are idle.
func countPasses(t *testing.T, steps map[string][]Span) passCounts {
	t.Helper()
	counts := passCounts{Modes: map[string]int{}, Reasons: map[string]int{}, Steps: len(steps)}
	for _, step := range steps {
		checkStep(t, step)
		dummies := 0
		passes := named(step, "fwd.forward")
		for _, pass := range passes {
			counts.Modes[pass.Attributes["fwd.graph.mode"].(string)]++
			counts.Reasons[pass.Attributes["fwd.graph.reason"].(string)]++
			if pass.Attributes["fwd.dummy"].(bool) {
				dummies++
			}
			if _, ok := pass.Attributes["fwd.ubatches"]; ok {
				counts.Split++
			}
			checkMicrobatches(t, &pass, step)
		}
		counts.Dummies += dummies
		for _, pass := range passes {
			if idle, _ := pass.Attributes["fwd.idle_ranks"].(int64); int(idle) != dummies {
				t.Errorf("step %v has %d dummy passes, rank %v says that %d ranks are idle",
					pass.Attributes["fwd.step"], dummies, pass.Attributes["fwd.dp.rank"], idle)
			}
		}
	}
	return counts
}

// checkMicrobatches checks that a pass has the microbatches that it says.
func checkMicrobatches(t *testing.T, pass *Span, step []Span) {
	t.Helper()
	parts := slices.DeleteFunc(named(step, "fwd.ubatch"), func(u Span) bool {
		return u.ParentSpanID != pass.SpanID
	})
	switch n, split := pass.Attributes["fwd.ubatches"].(int64); {
	case !split && len(parts) > 0:
		t.Errorf("a pass that is not split has the spans of %d microbatches", len(parts))
	case split && (n != 2 || len(parts) == 0 || len(parts)%2 != 0):
		t.Errorf("a pass of %d microbatches has the spans of %d", n, len(parts))
	case split && pass.Attributes["fwd.graph.mode"] != "NONE":
		t.Errorf("a split pass says that it uses a graph: %v", pass.Attributes)
	}
}

// countStats returns what the engine says about its passes.
func countStats(stats *engine.Stats) passCounts {
	counts := passCounts{
		Modes: map[string]int{}, Reasons: map[string]int{},
		Steps: stats.Steps, Split: stats.SplitPasses, Dummies: stats.DummyPasses,
	}
	for m, n := range stats.Modes {
		counts.Modes[m.String()] = n
	}
	for r, n := range stats.Passes {
		counts.Reasons[r.String()] = n
	}
	return counts
}

// TestSteps: what an engine does is in Jaeger, step by step: each is a trace of its own, and
// nothing is missing or left open.
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
			steps := steps(spans)
			if diff := cmp.Diff(countStats(&stats), countPasses(t, steps)); diff != "" {
				t.Errorf("passes (-engine +jaeger):\n%s", diff)
			}
			linked := 0
			kinds := map[string]int{}
			for id, trace := range byTrace(spans) {
				for _, s := range trace {
					linked += len(s.Links)
					if steps[id] == nil && s.ParentSpanID == "" {
						kinds[s.Name]++
					}
				}
				if steps[id] == nil && len(named(trace, "fwd.forward")) == 0 && len(named(trace, "fwd.step")) > 0 {
					checkChildren(t, trace, "fwd.coordinate")
				}
			}
			if linked == 0 {
				t.Error("no pass is linked to a request")
			}
			if kinds["fwd.step IDLE"] == 0 {
				t.Error("there is no exchange in which the ranks see that all is done")
			}
			delete(kinds, "fwd.step IDLE")
			if diff := cmp.Diff(map[string]int{"request": len(requests), "warm-up": 1}, kinds); diff != "" {
				t.Errorf("traces that are no steps (-want +got):\n%s", diff)
			}
		})
	}
}

// TestFind: passes are found by their mode, reason, name and phase, and by whether they are
// dummies, with a search for one tag.
func TestFind(t *testing.T) {
	s := newService(t, "grpc")
	c := s.config()
	c.NumSpeculativeTokens = 1 // by a draft model, which has a name
	serve(t, c, newRequests(30, 90, 10))
	spans := s.spans(t)
	checkTrees(t, spans)
	for key, values := range map[string][]string{
		"fwd.graph.mode":   {"NONE", "PIECEWISE", "FULL"},
		"fwd.graph.reason": {"exact", "relaxed", "too_large", "dp_rank", "ubatch"},
		"fwd.name":         {"draft"},
		"fwd.phase":        {"warmup", "decode", "mixed"},
		"fwd.dummy":        {"true", "false"},
	} {
		for _, value := range values {
			var want []string
			for _, s := range spans {
				if fmt.Sprint(s.Attributes[key]) == value { // a step has its mode too
					want = append(want, s.TraceID)
				}
			}
			slices.Sort(want)
			want = slices.Compact(want)
			found := s.find(t, map[string]string{key: value})
			if diff := cmp.Diff(want, found); diff != "" || len(want) == 0 {
				t.Errorf("%s=%s: %d traces have such a span; the search (-want +got):\n%s",
					key, value, len(want), diff)
			}
		}
	}
	if found := s.find(t, map[string]string{"fwd.graph.mode": "FULL", "fwd.dp.rank": "7"}); len(found) > 0 {
		t.Errorf("%d traces of a rank that there isn't", len(found))
	}
}
