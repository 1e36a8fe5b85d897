// What the spans of a run say of its steps, microbatches and figures.

package engine

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// checkSteps checks what the ranks of a step have agreed on, and that a step is one trace.
func (v *spanView) checkSteps() {
	for _, root := range v.ofKind("fwd.step") {
		v.checkRoot(root)
	}
	if v.dp == 1 {
		v.checkAlone()
		return
	}
	last := 0
	traces := map[trace.TraceID]int{}
	for at, s := range v.steps("") {
		if at.nth > 0 || slices.Contains(s.coordinate, nil) {
			v.Errorf("step %v lacks an exchange of some rank, or has one twice", at)
			continue
		}
		root := v.spans[s.coordinate[0].Parent().SpanID()]
		if root == nil || root.kind() != "fwd.step" || root.Parent().IsValid() {
			v.Errorf("step %v: rank 0's exchange is not in a step that has no parent", at)
			continue
		}
		if other, ok := traces[root.SpanContext().TraceID()]; ok {
			v.Errorf("steps %v and %d are one trace", at, other)
		}
		traces[root.SpanContext().TraceID()] = at.step
		if s.forward[0] == nil {
			last++ // all ranks were idle, and nothing was left
		} else if v.checkStep(at, s) {
			v.checkExchange(at, s)
		}
	}
	if last != 1 {
		v.Errorf("%d steps without passes, want the last one", last)
	}
	v.checkDrafts(len(traces) - last)
}

// checkRoot checks that a step is named by what its passes run and lasts as long as they do.
func (v *spanView) checkRoot(root *span) {
	name := "fwd.step IDLE"
	for _, s := range v.all {
		if !s.isChildOf(root) {
			continue
		}
		if s.EndTime().After(root.EndTime()) ||
			s.kind() == "fwd.forward" && s.StartTime().Before(root.StartTime()) {
			v.Errorf("%s is not within %s", s.Name(), root.Name())
		}
		switch {
		case s.kind() != "fwd.forward":
		case s.has("fwd.ubatches"): // which runs without the graph that the ranks agreed on
			name = root.Name()
		default:
			name = "fwd.step " + s.text("fwd.graph.mode")
		}
	}
	if root.Name() != name {
		v.Errorf("a step is named %q, want %q", root.Name(), name)
	}
}

// checkAlone checks the steps of a rank that is alone: each has one pass, and the passes of the draft are in
// that.
func (v *spanView) checkAlone() {
	if n := len(v.ofKind("fwd.coordinate")); n > 0 {
		v.Errorf("%d exchanges of a rank that is alone", n)
	}
	steps := 0
	for _, pass := range v.ofKind("fwd.forward") {
		parent := v.spans[pass.Parent().SpanID()]
		want := "fwd.step"
		if pass.text("fwd.name") == "draft" && !pass.warmUp {
			want = "fwd.forward"
		}
		if parent == nil || parent.kind() != want {
			v.Errorf("%s is not in a span %s", pass.Name(), want)
		} else if want == "fwd.step" {
			steps++
		}
	}
	if n := len(v.ofKind("fwd.step")); n != steps {
		v.Errorf("%d steps for %d passes", n, steps)
	}
}

// checkDrafts checks the passes of the draft model in so many steps. They are in the pass of their
// rank.
func (v *spanView) checkDrafts(steps int) {
	drafts := v.steps("draft")
	for at, s := range drafts {
		if !v.checkStep(at, s) {
			continue
		}
		for rank, pass := range s.forward {
			parent := v.spans[pass.Parent().SpanID()]
			if parent == nil || parent.kind() != "fwd.forward" || parent.text("fwd.name") != "" ||
				!pass.isChildOf(parent) || parent.int("fwd.dp.rank") != rank || parent.int("fwd.step") != at.step {
				v.Errorf("draft pass %v of rank %d is not under the pass of its target", at, rank)
			}
		}
	}
	if want := steps * v.engine.config.NumSpeculativeTokens; len(drafts) != want {
		v.Errorf("%d draft passes of each rank in %d steps, want %d", len(drafts), steps, want)
	}
}

// agreed is what follows from what the ranks have brought to a step. Those with something to run
// decide.
type agreed struct {
	largest, largestRank, fewest int  // tokens: after and before graph padding
	lowestRank                   int  // that lowered the mode of another; -1: none
	ubatches                     int  // 0: not split
	padded                       bool // to the largest
}

func (v *spanView) agree(s *step) agreed {
	a := agreed{largestRank: -1, lowestRank: -1}
	lowered, lowest := false, -1
	for rank, pass := range s.forward {
		if pass.bool("fwd.dummy") {
			continue
		}
		if a.largestRank < 0 {
			a.fewest = pass.int("fwd.num_tokens_unpadded")
		}
		if padded := pass.graphPadded(); padded > a.largest {
			a.largest, a.largestRank = padded, rank
		}
		a.fewest = min(a.fewest, pass.int("fwd.num_tokens_unpadded"))
		if pass.text("fwd.graph.reason") == "dp_rank" {
			lowered = true
		} else if lowest < 0 {
			lowest = rank
		}
	}
	if lowered {
		a.lowestRank = lowest
	}
	a.ubatches = v.agreedUBatches(s, a.largest, a.fewest)
	a.padded = a.ubatches > 0 || s.forward[0].text("fwd.graph.mode") != "NONE"
	if !a.padded {
		a.largest, a.largestRank = 0, 0
		for rank, pass := range s.forward {
			if padded := pass.graphPadded(); padded > a.largest {
				a.largest, a.largestRank = padded, rank
			}
		}
	}
	return a
}

// checkStep recomputes the agreement of a step from what each rank brought to it. It reports
// whether all ranks have a pass.
func (v *spanView) checkStep(at place, s *step) bool {
	if slices.Contains(s.forward, nil) {
		v.Errorf("step %v lacks a pass of some rank", at)
		return false
	}
	first, agreed := s.forward[0], v.agree(s)
	for rank, pass := range s.forward {
		bad := func(format string, args ...any) {
			v.Helper()
			v.Errorf(
				"step %v, rank %d of %v with %v: "+format,
				append([]any{at, rank, s.text(), pass.Attributes()}, args...)...)
		}
		if pass.text("fwd.graph.mode") != first.text("fwd.graph.mode") {
			bad("rank 0 runs in another mode")
		}
		want := pass.graphPadded()
		if agreed.padded {
			want = agreed.largest
		}
		if pass.int("fwd.num_tokens") != want {
			bad("want %d tokens", want)
		}
		if pass.int("fwd.ubatches") != agreed.ubatches {
			bad("want %d microbatches", agreed.ubatches)
		}
		if pass.int("fwd.dp.max_tokens") != agreed.largest {
			bad("want max_tokens %d", agreed.largest)
		}
		v.checkRanks(s, pass, agreed, bad)
	}
	return true
}

// checkRanks checks whom a span names. In a split pass the reasons don't say who lowered whose
// mode.
func (v *spanView) checkRanks(s *step, span *span, agreed agreed, bad func(format string, args ...any)) {
	if span.int("fwd.dp.max_tokens_rank") != agreed.largestRank {
		bad("%s: want max_tokens_rank %d", span.Name(), agreed.largestRank)
	}
	if slices.Contains(s.text(), "ubatch") {
		return
	}
	lowest := -1
	if span.has("fwd.dp.lowest_mode_rank") {
		lowest = span.int("fwd.dp.lowest_mode_rank")
	}
	if lowest != agreed.lowestRank {
		bad("%s: want lowest_mode_rank %d", span.Name(), agreed.lowestRank)
	}
}

// checkExchange checks the exchange of a step, and how its spans hang together.
func (v *spanView) checkExchange(at place, s *step) {
	agreed, root := v.agree(s), v.spans[s.coordinate[0].Parent().SpanID()]
	for rank, exchange := range s.coordinate {
		bad := func(format string, args ...any) {
			v.Helper()
			v.Errorf("step %v, rank %d: "+format, append([]any{at, rank}, args...)...)
		}
		v.checkRanks(s, exchange, agreed, bad)
		pass := s.forward[rank]
		if !pass.isChildOf(root) || !exchange.isChildOf(root) {
			bad("the spans are not under the step's")
		}
		if exchange.EndTime().After(pass.StartTime()) {
			bad("the pass started before the ranks had agreed")
		}
	}
}

// text says what the ranks of a step run.
func (s *step) text() (text []string) {
	for _, pass := range s.forward {
		text = append(text, pass.text("fwd.graph.reason"))
	}
	return text
}

// agreedUBatches returns into how many microbatches a step is split, 0 for none.
func (v *spanView) agreedUBatches(s *step, largest, fewest int) int {
	b, _ := v.blueprint(s.forward[0])
	n := b.parallel.NumUBatches
	if n < 2 {
		return 0
	}
	for _, pass := range s.forward {
		threshold := v.engine.config.PrefillUBatchThreshold
		if pass.text("fwd.phase") == "decode" {
			threshold = v.engine.config.DecodeUBatchThreshold
		}
		if !pass.bool("fwd.dummy") && pass.int("fwd.num_tokens_unpadded") < threshold {
			return 0
		}
	}
	if largest/n*(n-1) >= fewest {
		return 0
	}
	return n
}

// checkMicrobatches: the microbatches of a pass are its tokens, each once.
func (v *spanView) checkMicrobatches() {
	parts := map[trace.SpanID][]*span{}
	for _, u := range v.ofKind("fwd.ubatch") {
		pass := v.spans[u.Parent().SpanID()]
		if pass == nil || pass.kind() != "fwd.forward" || !u.isChildOf(pass) ||
			u.StartTime().Before(pass.StartTime()) || u.EndTime().After(pass.EndTime()) {
			v.Errorf("a microbatch with %v is not in a pass", u.Attributes())
			continue
		}
		parts[pass.id()] = append(parts[pass.id()], u)
	}
	split, overlapping := 0, 0
	for _, pass := range v.ofKind("fwd.forward") {
		split += min(len(parts[pass.id()]), 1)
		if overlap(parts[pass.id()]) {
			overlapping++
		}
		n, tokens, sum := pass.int("fwd.ubatches"), pass.int("fwd.num_tokens"), 0
		seen := map[int]bool{}
		for _, u := range parts[pass.id()] {
			index, own := u.int("fwd.ubatch.index"), u.int("fwd.num_tokens")
			want := tokens / n
			if index == n-1 {
				want = tokens - (n-1)*(tokens/n)
			}
			if seen[index] || index >= n || own != want {
				v.Errorf("microbatch %d of %d with %d of %d tokens, want %d", index, n, own, tokens, want)
			}
			seen[index] = true
			sum += own
		}
		if len(seen) != n || (n > 0 && sum != tokens) {
			v.Errorf("pass with %v has %d microbatches with %d tokens", pass.Attributes(), len(seen), sum)
		}
	}
	if split > 0 && overlapping == 0 {
		v.Errorf("the microbatches of %d split passes ran one after the other", split)
	}
}

// overlap reports whether two microbatches of a pass ran at the same time.
func overlap(parts []*span) bool {
	for i, u := range parts {
		for _, other := range parts[:i] {
			if u.StartTime().Before(other.EndTime()) && other.StartTime().Before(u.EndTime()) {
				return true
			}
		}
	}
	return false
}

// meeting is a recorder that holds the first microbatch that begins until another one of its pass has
// begun too: on a busy machine all may be too short to overlap. It gives up on those that run in turn.
type meeting struct {
	*tracetest.SpanRecorder
	met chan struct{} // closed by the other one

	mu   sync.Mutex
	pass trace.SpanID // of the one that is held; invalid: none has begun
	over bool         // met is closed
}

// OnStart implements [sdktrace.SpanProcessor].
func (m *meeting) OnStart(ctx context.Context, s sdktrace.ReadWriteSpan) {
	m.SpanRecorder.OnStart(ctx, s)
	if !strings.HasPrefix(s.Name(), "fwd.ubatch ") || !m.join(s.Parent().SpanID()) {
		return
	}
	select {
	case <-m.met:
	case <-time.After(30 * time.Second):
	}
}

// join notes that a microbatch of a pass begins, and reports whether it must wait for another one.
func (m *meeting) join(pass trace.SpanID) (wait bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.pass.IsValid() {
		m.pass = pass
		return true
	}
	if m.pass == pass && !m.over {
		m.over = true
		close(m.met)
	}
	return false
}

// checkFigures compares the spans with what the engine has counted.
func (v *spanView) checkFigures(stats *Stats) {
	got := Stats{Passes: map[fwd.Reason]int{}, Modes: map[fwd.GraphMode]int{}}
	warmUps := map[attribute.Distinct]int{}
	for _, s := range v.ofKind("fwd.forward") {
		b, _ := v.blueprint(s)
		var mode fwd.GraphMode
		if err := mode.UnmarshalText([]byte(s.text("fwd.graph.mode"))); err != nil {
			v.Error(err)
		}
		graphs := map[fwd.GraphMode]int{fwd.GraphFull: 1,
			fwd.GraphPiecewise: len(b.model.Weights().Layers) + 1}[mode]
		if s.int("fwd.ubatches") > 0 {
			graphs = 0
		}
		got.Replays += graphs
		switch {
		case s.warmUp:
			got.Captures += graphs
			warmUps[s.set.Equivalent()]++
		case s.text("fwd.name") == "draft":
			got.DraftPasses++
		default:
			got.Modes[mode]++
			for reason := fwd.ReasonUnknown; reason <= fwd.ReasonUBatch; reason++ {
				if reason.String() == s.text("fwd.graph.reason") {
					got.Passes[reason]++
				}
			}
			got.GraphPadding += s.int("fwd.padding.graph")
			got.DataPadding += s.int("fwd.padding.dp")
			if s.bool("fwd.dummy") {
				got.DummyPasses++
			}
			if s.int("fwd.ubatches") > 0 {
				got.SplitPasses++
			}
		}
	}
	for set, n := range warmUps {
		if n != 1 {
			v.Errorf("%d warm-up passes of one rank for the same graph: %v", n, set)
		}
	}
	if got.Captures != stats.Captures || got.Replays != stats.Replays || got.DraftPasses != stats.DraftPasses ||
		got.DummyPasses != stats.DummyPasses ||
		got.SplitPasses != stats.SplitPasses || got.GraphPadding != stats.GraphPadding ||
		got.DataPadding != stats.DataPadding || !equalCounts(got.Modes, stats.Modes) ||
		!equalCounts(got.Passes, stats.Passes) {
		v.Errorf("the spans say %+v, the figures %+v", got, *stats)
	}
	if passes := len(v.ofKind("fwd.forward")); passes == 0 || len(v.ofKind("request")) != stats.Requests {
		v.Errorf("%d passes, %d request spans for %d requests", passes, len(v.ofKind("request")), stats.Requests)
	}
}

func equalCounts[K comparable](a, b map[K]int) bool {
	for k, n := range a {
		if b[k] != n {
			return false
		}
	}
	return len(a) == len(b)
}
