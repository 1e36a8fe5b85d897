// Recorded spans that are easy to ask, and what each pass must say of itself.

package engine

import (
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// kindOf returns the word of a span's name that says what it covers, as fwd.forward. What follows in the
// names of fwd's spans is of each span.
func kindOf(s sdktrace.ReadOnlySpan) string {
	kind, _, _ := strings.Cut(s.Name(), " ")
	return kind
}

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
func (s *span) kind() string     { return kindOf(s.ReadOnlySpan) }
func (s *span) id() trace.SpanID { return s.SpanContext().SpanID() }

// isChildOf reports whether parent is the span's parent, in one trace.
func (s *span) isChildOf(parent *span) bool {
	return parent != nil && s.Parent().SpanID() == parent.id() &&
		s.SpanContext().TraceID() == parent.SpanContext().TraceID()
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
		s.warmUp = v.isUnder(s, "warm-up")
		if s.Parent().IsValid() && parent == nil {
			v.Errorf("%s has a parent that is not there", s.Name())
		}
		if s.Status().Code != codes.Unset || s.has("error.type") {
			v.Errorf("%s has status %v", s.Name(), s.Status())
		}
	}
}

// ofKind returns the spans of that kind.
func (v *spanView) ofKind(kind string) []*span {
	return slices.DeleteFunc(slices.Clone(v.all), func(s *span) bool { return s.kind() != kind })
}

// blueprint returns the model that a pass is of, and its uniform decode query length.
func (v *spanView) blueprint(s *span) (b *blueprint, queryLen int) {
	if s.text("fwd.name") == "draft" {
		return v.engine.draft, 1
	}
	return v.engine.target, 1 + v.engine.config.NumSpeculativeTokens
}

// captureSize returns the size of the smallest graph that holds so many tokens; 0: there is none.
func (v *spanView) captureSize(tokens, queryLen int) int {
	largest := max(maxCapture, (1+v.engine.config.NumSpeculativeTokens)*v.engine.config.MaxNumSeqs)
	for _, size := range []int{1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64} {
		if size += (queryLen - size%queryLen) % queryLen; size >= tokens && size <= largest {
			return size
		}
	}
	return 0
}

// checkPasses checks each pass for itself.
func (v *spanView) checkPasses() {
	for _, s := range v.ofKind("fwd.forward") {
		if s.warmUp {
			if !s.bool("fwd.dummy") || s.text("fwd.phase") != warmUpPhase || s.text("fwd.graph.mode") == "NONE" ||
				s.has("fwd.step") != (v.dp > 1) {
				v.Errorf("a warm-up pass with %v", s.Attributes())
			}
			continue
		}
		bad := func(format string, args ...any) {
			v.Helper()
			v.Errorf("pass with %v: "+format, append([]any{s.Attributes()}, args...)...)
		}
		_, queryLen := v.blueprint(s)
		unpadded, tokens := s.int("fwd.num_tokens_unpadded"), s.int("fwd.num_tokens")
		if unpadded < 1 || s.int("fwd.padding.graph") < 0 || s.int("fwd.padding.dp") < 0 ||
			s.graphPadded()+s.int("fwd.padding.dp") != tokens {
			bad("the padding is not what is between %d and %d tokens", unpadded, tokens)
		}
		v.checkReason(s, queryLen, bad)
		if s.bool("fwd.dummy") && (s.int("fwd.num_reqs") != 1 || unpadded != queryLen || len(v.served(s)) != 0) {
			bad("a dummy pass is one request of %d tokens", queryLen)
		}
		if s.text("fwd.name") != "draft" && !s.bool("fwd.dummy") {
			v.checkServed(s, bad)
		}
	}
}

// checkReason checks that the reason of a pass for its graph mode can be.
func (v *spanView) checkReason(s *span, queryLen int, bad func(format string, args ...any)) {
	configured, mode := v.engine.config.GraphMode, s.text("fwd.graph.mode")
	unpadded, tokens := s.int("fwd.num_tokens_unpadded"), s.int("fwd.num_tokens")
	size, uniform := v.captureSize(unpadded, queryLen), s.bool("fwd.batch.uniform")
	switch s.text("fwd.graph.reason") {
	case "exact":
		if mode != "FULL" || s.graphPadded() != size || !uniform || !configured.SeparateRoutine() ||
			s.int("fwd.batch.num_reqs")*queryLen != tokens || s.int("fwd.num_reqs")*queryLen != unpadded {
			bad("not a decode batch in the graph of %d tokens", size)
		}
	case "relaxed":
		if mode != configured.MixedMode().String() || mode == "NONE" || s.graphPadded() != size || uniform ||
			s.has("fwd.batch.num_reqs") {
			bad("not in the graph of %d tokens for any batch", size)
		}
	case "dp_rank":
		if mode == "FULL" || s.graphPadded() != size || v.dp == 1 {
			bad("lowered from a graph of %d tokens", size)
		}
	case "full_excluded":
		if mode != "PIECEWISE" || !s.bool("fwd.dummy") || uniform {
			bad("an idle rank that did not follow the others")
		}
	case "ubatch":
		if mode != "NONE" || s.graphPadded() != size || s.int("fwd.ubatches") == 0 {
			bad("not split instead of a graph of %d tokens", size)
		}
	case "too_large":
		if mode != "NONE" || size != 0 || s.graphPadded() != unpadded {
			bad("there is a graph of %d tokens", size)
		}
	case "no_key":
		if mode != "NONE" || size == 0 || configured != fwd.GraphFullDecodeOnly || s.graphPadded() != unpadded {
			bad("there is a graph for such a batch")
		}
	case "disabled":
		if mode != "NONE" || configured != fwd.GraphNone || s.graphPadded() != unpadded {
			bad("graphs are not disabled")
		}
	default:
		bad("a reason that can't be")
	}
}

// served returns the ids of the requests that a pass is linked to.
func (v *spanView) served(s *span) (ids []int) {
	for _, l := range s.Links() {
		if request := v.spans[l.SpanContext.SpanID()]; request != nil && request.kind() == "request" {
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
	if s.text("fwd.graph.mode") == "NONE" && s.text("fwd.graph.reason") != "ubatch" {
		want = 0
	}
	if got := s.int("fwd.batch.num_active_loras"); got != want {
		bad("the graph is for %d adapters, want %d for %d active ones", got, want, len(active))
	}
}

// step is the passes and the exchanges of all ranks, by rank, that belong together. A pass of the
// draft has no exchange of its own.
type step struct{ forward, coordinate []*span }

// place says which of the passes of a step one is: the first, but for those of the draft.
type place struct{ step, nth int }

// steps returns the steps of a model.
func (v *spanView) steps(name string) map[place]*step {
	steps := map[place]*step{}
	for _, s := range v.all {
		switch {
		case s.warmUp:
		case s.kind() == "fwd.forward" && s.text("fwd.name") == name:
			v.add(steps, s, func(s *step) []*span { return s.forward })
		case s.kind() == "fwd.coordinate" && name == "":
			v.add(steps, s, func(s *step) []*span { return s.coordinate })
		}
	}
	return steps
}

// add adds a span to the first place in which its rank has none.
func (v *spanView) add(steps map[place]*step, s *span, list func(*step) []*span) {
	rank := s.int("fwd.dp.rank")
	at := place{step: s.int("fwd.step")}
	if at.step < 1 || s.int("fwd.dp.size") != v.dp || rank >= v.dp {
		v.Errorf("%s of rank %d of %d in step %d", s.Name(), rank, s.int("fwd.dp.size"), at.step)
		return
	}
	for steps[at] != nil && list(steps[at])[rank] != nil {
		at.nth++
	}
	if steps[at] == nil {
		steps[at] = &step{make([]*span, v.dp), make([]*span, v.dp)}
	}
	list(steps[at])[rank] = s
}

// isUnder reports whether a span is inside another of that name.
func (v *spanView) isUnder(s *span, name string) bool {
	for parent := v.spans[s.Parent().SpanID()]; parent != nil; parent = v.spans[parent.Parent().SpanID()] {
		if parent.Name() == name {
			return true
		}
	}
	return false
}
