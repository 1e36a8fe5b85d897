// Tests that a step is drawn right: nothing of it ends after its root, and Jaeger's critical path, which
// its page draws into the bars, goes through the whole step.

package integration

import (
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/metric/noop"
)

// criticalPath returns how much of the root's time is on the critical path as Jaeger's page computes it: it
// goes back from the end of the root, each time to the child that ended last before that point, and
// from the start of that child back to its parent. A child that hangs over its parent is cut off. Spans
// outside of their parent count for nothing.
func criticalPath(spans []Span) time.Duration {
	children := map[string][]*Span{}
	var root *Span
	for i := range spans {
		if s := spans[i]; s.ParentSpanID == "" {
			root = &s
		} else {
			children[s.ParentSpanID] = append(children[s.ParentSpanID], &s)
		}
	}
	if root == nil {
		return 0
	}
	cutOff(root, children)
	var sum time.Duration
	var walk func(s *Span, until time.Time)
	walk = func(s *Span, until time.Time) {
		for {
			last := lastBefore(children[s.SpanID], until)
			if last == nil {
				sum += until.Sub(s.Start)
				return
			}
			sum += until.Sub(last.End)
			walk(last, last.End)
			until = last.Start
		}
	}
	walk(root, root.End)
	return sum
}

// cutOff cuts what hangs over a span's parent off, below s, and drops what is outside of it.
func cutOff(s *Span, children map[string][]*Span) {
	var inside []*Span
	for _, child := range children[s.SpanID] {
		if !child.Start.Before(s.End) || !child.End.After(s.Start) {
			continue
		}
		if child.Start.Before(s.Start) {
			child.Start = s.Start
		}
		if child.End.After(s.End) {
			child.End = s.End
		}
		inside = append(inside, child)
		cutOff(child, children)
	}
	children[s.SpanID] = inside
}

// lastBefore returns the span that ends last, but not after until.
func lastBefore(spans []*Span, until time.Time) (last *Span) {
	for _, s := range spans {
		if !s.End.After(until) && (last == nil || s.End.After(last.End)) && s.Start.Before(until) {
			last = s
		}
	}
	return last
}

// TestCriticalPath: the critical path of a step goes from the begin of its root to the end of the last
// rank's pass. If the root ended before its children, it would not.
func TestCriticalPath(t *testing.T) {
	s := newService(t, "grpc")
	c := s.config()
	c.NumSpeculativeTokens = 1
	serve(t, c, newRequests(20, 40, 10))
	all := steps(s.spans(t))
	for _, step := range all {
		root := rootOf(t, step)
		last := root.End
		for _, s := range step {
			if s.End.After(last) {
				last = s.End
			}
		}
		whole := last.Sub(root.Start)
		if path := criticalPath(step); path < whole*95/100 {
			t.Errorf("%s of trace %s: the critical path covers %v of %v", root.Name, root.TraceID, path, whole)
		}
	}
	if len(all) < 5 {
		t.Errorf("%d steps", len(all))
	}
}

// TestStepRoot: with WithStepRoot, the steps of a loop that runs inside one span are traces of their own,
// with links to that span; without it they are in that span's trace.
func TestStepRoot(t *testing.T) {
	for name, test := range map[string]struct {
		options []fwd.Option
		traces  int
	}{
		"in the caller's trace": {nil, 1},
		"traces of their own":   {[]fwd.Option{fwd.WithStepRoot()}, 1 + 3},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, "grpc")
			g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{}, append(test.options, fwd.WithStepTrace(),
				fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))...)
			ctx, loop := s.provider.Tracer("engine").Start(t.Context(), "engine.loop")
			for range 3 {
				if err := g.take(ctx, step{schedules: onAll(tokens(1))}); err != nil {
					t.Fatal(err)
				}
			}
			loop.End()
			spans := s.spans(t)
			checkTrees(t, spans)
			if n := len(byTrace(spans)); n != test.traces {
				t.Errorf("%d traces, want %d", n, test.traces)
			}
			for _, root := range named(spans, "fwd.step") {
				caller := root.ParentSpanID
				if test.options != nil && len(root.Links) == 1 && caller == "" {
					caller = root.Links[0].SpanID
				}
				if caller != loop.SpanContext().SpanID().String() {
					t.Errorf("%s has parent %q and links %v, want the loop's span", root.Name, root.ParentSpanID, root.Links)
				}
			}
		})
	}
}
