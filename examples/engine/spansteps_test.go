package engine

import (
	"slices"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// checkSteps checks what the ranks of a step have agreed on, and that a step is one trace.
func (v *spanView) checkSteps() {
	if v.dp == 1 {
		if n := len(v.named("fwd.coordinate")); n > 0 {
			v.Errorf("%d exchanges of a rank that is alone", n)
		}
		return
	}
	traces := map[trace.TraceID]int{}
	for n, s := range v.steps("") {
		root := s.coordinate[0]
		if root.Parent().IsValid() {
			v.Errorf("step %d: rank 0's exchange is under another span", n)
		}
		if other, ok := traces[root.SpanContext().TraceID()]; ok {
			v.Errorf("steps %d and %d are one trace", n, other)
		}
		traces[root.SpanContext().TraceID()] = n
		v.checkStep(n, s)
	}
	drafts := v.steps("draft")
	for n, s := range drafts {
		parent := v.spans[s.coordinate[0].Parent().SpanID()]
		if parent == nil || parent.Name() != "fwd.forward" || parent.text("fwd.name") != "" || parent.int("fwd.dp.rank") != 0 || !s.coordinate[0].isChildOf(parent) {
			v.Errorf("draft step %d is not under a pass of rank 0's target", n)
		}
		v.checkStep(n, s)
	}
	if want := len(traces) * v.engine.config.NumSpeculativeTokens; len(drafts) != want {
		v.Errorf("%d draft steps in %d steps, want %d", len(drafts), len(traces), want)
	}
}

// checkStep recomputes the agreement of a step from what each rank brought to it.
func (v *spanView) checkStep(n int, s *step) {
	first := s.forward[0]
	largest, largestRank, fewest := 0, 0, first.int("fwd.num_tokens_unpadded")
	lowered, lowest := false, -1
	for rank, pass := range s.forward {
		if padded := pass.graphPadded(); padded > largest {
			largest, largestRank = padded, rank
		}
		fewest = min(fewest, pass.int("fwd.num_tokens_unpadded"))
		if pass.text("fwd.graph.reason") == "dp_rank" {
			lowered = true
		} else if lowest < 0 {
			lowest = rank
		}
	}
	if !lowered {
		lowest = -1
	}
	ubatches, padded := v.agreedUBatches(s, largest, fewest)
	for rank, pass := range s.forward {
		bad := func(format string, args ...any) {
			v.Helper()
			v.Errorf("step %d, rank %d of %v with %v: "+format, append([]any{n, rank, s.text(), pass.Attributes()}, args...)...)
		}
		if pass.text("fwd.graph.mode") != first.text("fwd.graph.mode") {
			bad("rank 0 runs in another mode")
		}
		want := pass.graphPadded()
		if padded || pass.text("fwd.graph.mode") != "NONE" {
			want = largest
		}
		if pass.int("fwd.num_tokens") != want {
			bad("want %d tokens", want)
		}
		if pass.int("fwd.ubatches") != ubatches {
			bad("want %d microbatches", ubatches)
		}
		for _, span := range []*span{pass, s.coordinate[rank]} {
			if span.int("fwd.dp.max_tokens_rank") != largestRank || span.has("fwd.dp.lowest_mode_rank") != lowered || (lowered && span.int("fwd.dp.lowest_mode_rank") != lowest) {
				bad("%s: want max_tokens_rank %d, lowest_mode_rank %d", span.Name(), largestRank, lowest)
			}
		}
		if !pass.isChildOf(s.coordinate[0]) || (rank > 0 && !s.coordinate[rank].isChildOf(s.coordinate[0])) {
			bad("the spans are not under rank 0's exchange")
		}
		if s.coordinate[rank].EndTime().After(pass.StartTime()) {
			bad("the pass started before the ranks had agreed")
		}
	}
	tokens := make([]int, v.dp)
	for rank, pass := range s.forward {
		tokens[rank] = pass.int("fwd.num_tokens")
	}
	for _, pass := range s.forward {
		if pass.int("fwd.dp.max_tokens") != slices.Max(tokens) {
			v.Errorf("step %d: max_tokens is %d of %v", n, pass.int("fwd.dp.max_tokens"), tokens)
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

// agreedUBatches returns into how many microbatches a step is split, 0 for none, and whether the ranks are padded for it.
// Where a decoding request brings guesses, the spans don't tell which batches are uniform: then it follows the first pass.
func (v *spanView) agreedUBatches(s *step, largest, fewest int) (n int, padded bool) {
	b, queryLen := v.blueprint(s.forward[0])
	n = b.parallel.NumUBatches
	if n < 2 {
		return 0, false
	}
	if queryLen > 1 {
		n = s.forward[0].int("fwd.ubatches")
		return n, n > 0
	}
	for _, pass := range s.forward {
		threshold, tokens := v.engine.config.PrefillUBatchThreshold, pass.int("fwd.num_tokens_unpadded")
		if tokens == pass.int("fwd.num_reqs") {
			threshold = v.engine.config.DecodeUBatchThreshold
		}
		if tokens < threshold {
			return 0, false
		}
	}
	if largest/n*(n-1) >= fewest {
		return 0, false
	}
	return n, true
}

// checkMicrobatches: the microbatches of a pass are its tokens, each once.
func (v *spanView) checkMicrobatches() {
	parts := map[trace.SpanID][]*span{}
	for _, u := range v.named("fwd.ubatch") {
		pass := v.spans[u.Parent().SpanID()]
		if pass == nil || pass.Name() != "fwd.forward" || !u.isChildOf(pass) || u.StartTime().Before(pass.StartTime()) || u.EndTime().After(pass.EndTime()) {
			v.Errorf("a microbatch with %v is not in a pass", u.Attributes())
			continue
		}
		parts[pass.id()] = append(parts[pass.id()], u)
	}
	split, overlapping := 0, 0
	for _, pass := range v.named("fwd.forward") {
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

// checkFigures compares the spans with what the engine has counted.
func (v *spanView) checkFigures(stats *Stats) {
	got := Stats{Passes: map[fwd.Reason]int{}, Modes: map[fwd.GraphMode]int{}}
	warmUps := map[attribute.Distinct]int{}
	for _, s := range v.named("fwd.forward") {
		b, _ := v.blueprint(s)
		var mode fwd.GraphMode
		if err := mode.UnmarshalText([]byte(s.text("fwd.graph.mode"))); err != nil {
			v.Error(err)
		}
		graphs := map[fwd.GraphMode]int{fwd.GraphFull: 1, fwd.GraphPiecewise: len(b.model.Weights().Layers) + 1}[mode]
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
			for reason := fwd.ReasonUnknown; reason <= fwd.ReasonDPRank; reason++ {
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
	if got.Captures != stats.Captures || got.Replays != stats.Replays || got.DraftPasses != stats.DraftPasses || got.DummyPasses != stats.DummyPasses ||
		got.SplitPasses != stats.SplitPasses || got.GraphPadding != stats.GraphPadding || got.DataPadding != stats.DataPadding ||
		!equalCounts(got.Modes, stats.Modes) || !equalCounts(got.Passes, stats.Passes) {
		v.Errorf("the spans say %+v, the figures %+v", got, *stats)
	}
	if passes := len(v.named("fwd.forward")); passes == 0 || len(v.named("request")) != stats.Requests {
		v.Errorf("%d passes, %d request spans for %d requests", passes, len(v.named("request")), stats.Requests)
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
