package engine

import (
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// span is a recorded span, easy to ask. What it does not have is zero.
type span struct {
	sdktrace.ReadOnlySpan
	set    attribute.Set
	warmUp bool
}

func newSpan(s sdktrace.ReadOnlySpan) *span {
	return &span{ReadOnlySpan: s, set: attribute.NewSet(s.Attributes()...)}
}

func (s *span) has(key attribute.Key) bool { return s.set.HasValue(key) }
func (s *span) int(key attribute.Key) int {
	value, _ := s.set.Value(key)
	return int(value.AsInt64())
}
func (s *span) text(key attribute.Key) string {
	value, _ := s.set.Value(key)
	return value.AsString()
}
func (s *span) bool(key attribute.Key) bool {
	value, _ := s.set.Value(key)
	return value.AsBool()
}
func (s *span) id() trace.SpanID { return s.SpanContext().SpanID() }

// isChildOf reports whether parent is the span's parent, in one trace.
func (s *span) isChildOf(parent *span) bool {
	return parent != nil && s.Parent().SpanID() == parent.id() && s.SpanContext().TraceID() == parent.SpanContext().TraceID()
}

// graphPadded is the token count after graph padding.
func (s *span) graphPadded() int {
	return s.int("fwd.num_tokens_unpadded") + s.int("fwd.padding.graph")
}

// spanView is the spans of a run.
type spanView struct {
	*testing.T
	engine       *Engine
	dp, adapters int
	all          []*span
	spans        map[trace.SpanID]*span
}

func (v *spanView) read(recorded []sdktrace.ReadOnlySpan) {
	for _, r := range recorded {
		s := newSpan(r)
		v.all = append(v.all, s)
		v.spans[s.id()] = s
	}
	for _, s := range v.all {
		parent := v.spans[s.Parent().SpanID()]
		s.warmUp = parent != nil && parent.Name() == "warm-up"
		if s.Parent().IsValid() && parent == nil {
			v.Errorf("%s has a parent that is not there", s.Name())
		}
		if s.Status().Code != codes.Unset || s.has("error.type") {
			v.Errorf("%s has status %v", s.Name(), s.Status())
		}
	}
}

func (v *spanView) named(name string) []*span {
	return slices.DeleteFunc(slices.Clone(v.all), func(s *span) bool { return s.Name() != name })
}

// blueprint returns the model that a pass is of, and its uniform decode query length.
func (v *spanView) blueprint(s *span) (b *blueprint, queryLen int) {
	if s.text("fwd.name") == "draft" {
		return v.engine.draft, 1
	}
	return v.engine.target, 1 + v.engine.config.NumSpeculativeTokens
}

// captureSize returns the size of the smallest graph that holds so many tokens; 0: there is none.
func captureSize(tokens, queryLen int) int {
	for _, size := range []int{1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64} {
		if size += (queryLen - size%queryLen) % queryLen; size >= tokens && size <= maxCapture {
			return size
		}
	}
	return 0
}

// checkPasses checks each pass for itself.
func (v *spanView) checkPasses() {
	for _, s := range v.named("fwd.forward") {
		if s.warmUp {
			if !s.bool("fwd.dummy") || s.text("fwd.graph.reason") != "unknown" || s.text("fwd.graph.mode") == "NONE" || s.has("fwd.step") {
				v.Errorf("a warm-up pass with %v", s.Attributes())
			}
			continue
		}
		bad := func(format string, args ...any) {
			v.Helper()
			v.Errorf("pass with %v: "+format, append([]any{s.Attributes()}, args...)...)
		}
		_, queryLen := v.blueprint(s)
		mode, reason := s.text("fwd.graph.mode"), s.text("fwd.graph.reason")
		unpadded, tokens := s.int("fwd.num_tokens_unpadded"), s.int("fwd.num_tokens")
		if unpadded < 1 || s.int("fwd.padding.graph") < 0 || s.int("fwd.padding.dp") < 0 || s.graphPadded()+s.int("fwd.padding.dp") != tokens {
			bad("the padding is not what is between %d and %d tokens", unpadded, tokens)
		}
		size := captureSize(unpadded, queryLen)
		switch reason {
		case "exact":
			if mode != "FULL" || s.graphPadded() != size || !s.bool("fwd.batch.uniform") || s.int("fwd.batch.num_reqs")*queryLen != tokens ||
				s.int("fwd.num_reqs")*queryLen != unpadded || !v.engine.config.GraphMode.SeparateRoutine() {
				bad("not a decode batch in the graph of %d tokens", size)
			}
		case "relaxed":
			if mode != v.engine.config.GraphMode.MixedMode().String() || mode == "NONE" || s.graphPadded() != size || s.bool("fwd.batch.uniform") || s.has("fwd.batch.num_reqs") {
				bad("not in the graph of %d tokens for any batch", size)
			}
		case "dp_rank":
			if mode == "FULL" || s.graphPadded() != size || v.dp == 1 {
				bad("lowered from a graph of %d tokens", size)
			}
		case "too_large":
			if mode != "NONE" || size != 0 || s.graphPadded() != unpadded {
				bad("there is a graph of %d tokens", size)
			}
		case "no_key":
			if mode != "NONE" || size == 0 || v.engine.config.GraphMode != fwd.GraphFullDecodeOnly || s.graphPadded() != unpadded {
				bad("there is a graph for such a batch")
			}
		case "disabled":
			if mode != "NONE" || v.engine.config.GraphMode != fwd.GraphNone || s.graphPadded() != unpadded {
				bad("graphs are not disabled")
			}
		default:
			bad("a reason that can't be")
		}
		if s.bool("fwd.dummy") && (s.int("fwd.num_reqs") != 1 || unpadded != queryLen || len(v.served(s)) != 0) {
			bad("a dummy pass is one request of %d tokens", queryLen)
		}
		if s.text("fwd.name") != "draft" && !s.bool("fwd.dummy") {
			v.checkServed(s, bad)
		}
	}
}

// served returns the ids of the requests that a pass is linked to.
func (v *spanView) served(s *span) (ids []int) {
	for _, l := range s.Links() {
		if request := v.spans[l.SpanContext.SpanID()]; request != nil && request.Name() == "request" {
			ids = append(ids, request.int("engine.request.id"))
		}
	}
	return ids
}

// checkServed checks a pass against the requests in it.
func (v *spanView) checkServed(s *span, bad func(format string, args ...any)) {
	ids := v.served(s)
	if len(ids) != s.int("fwd.num_reqs") || len(ids) == 0 {
		bad("linked to requests %v", ids)
	}
	active := map[int]bool{}
	for _, id := range ids {
		if adapter := id % (v.adapters + 1); adapter != 0 {
			active[adapter] = true
		}
	}
	want := len(active)
	for want != 0 && want&(want-1) != 0 && want < v.adapters+1 {
		want++ // graphs are for 1, 2, 4, ... and all adapters
	}
	if s.text("fwd.graph.mode") == "NONE" {
		want = 0
	}
	if got := s.int("fwd.batch.num_active_loras"); got != want {
		bad("the graph is for %d adapters, want %d for %d active ones", got, want, len(active))
	}
}

// step is the passes and the exchanges of all ranks, by rank, that belong together.
type step struct{ forward, coordinate []*span }

// steps returns the steps of a model by number.
func (v *spanView) steps(name string) map[int]*step {
	steps := map[int]*step{}
	add := func(s *span, list func(*step) []*span) {
		n, rank := s.int("fwd.step"), s.int("fwd.dp.rank")
		if steps[n] == nil {
			steps[n] = &step{make([]*span, v.dp), make([]*span, v.dp)}
		}
		if spans := list(steps[n]); n < 1 || s.int("fwd.dp.size") != v.dp || rank >= v.dp || spans[rank] != nil {
			v.Errorf("%s of rank %d of %d in step %d, or twice", s.Name(), rank, s.int("fwd.dp.size"), n)
		} else {
			spans[rank] = s
		}
	}
	for _, s := range v.all {
		switch {
		case s.warmUp:
		case s.Name() == "fwd.forward" && s.text("fwd.name") == name:
			add(s, func(s *step) []*span { return s.forward })
		case s.Name() == "fwd.coordinate" && v.isDraft(s) == (name == "draft"):
			add(s, func(s *step) []*span { return s.coordinate })
		}
	}
	for n, s := range steps {
		if slices.Contains(s.forward, nil) || slices.Contains(s.coordinate, nil) {
			v.Errorf("step %d of model %q lacks a pass or an exchange of some rank", n, name)
			delete(steps, n)
		}
	}
	return steps
}

// isDraft reports whether a coordinate span is of the draft model: it is under a pass.
func (v *spanView) isDraft(s *span) bool {
	for parent := v.spans[s.Parent().SpanID()]; parent != nil; parent = v.spans[parent.Parent().SpanID()] {
		if parent.Name() == "fwd.forward" {
			return true
		}
	}
	return false
}
