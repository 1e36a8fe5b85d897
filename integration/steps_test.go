// Tests of the traces of steps: which spans they have, and how these hang together.
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

