package integration

import (
	"cmp"
	"slices"
	"time"
)

// Step is what the trace of a step says about it.
type Step struct {
	// Ranks is what each rank did, the costliest first. See [RankTimes].
	Ranks []RankTime

	// Waits is who waited for whom, the longest first. See [Waits].
	Waits []Wait

	// Lowered says that LoweringRank kept others from the graph mode that they wanted, and that
	// LoweringReason was its own reason. See [LoweringRank].
	Lowered        bool
	LoweringRank   int
	LoweringReason string

	// Padding is what the ranks ran beside their tokens. See [PaddingOf].
	Padding Padding
}

// Explain answers from the spans of one trace who made whom wait and for how long, who lowered the
// graph mode, and how much was padding.
func Explain(step []Span) Step {
	s := Step{Ranks: RankTimes(step), Waits: Waits(step), Padding: PaddingOf(step)}
	s.LoweringRank, s.LoweringReason, s.Lowered = LoweringRank(step)
	return s
}

// Wait is how long one rank waited for another one in a step.
type Wait struct {
	Rank, For int

	// Votes is the time that Rank waited for the vote of For, which came last, and Passes the time
	// that it waited for For inside its passes.
	Votes, Passes time.Duration
}

// Time returns the whole wait.
func (w Wait) Time() time.Duration { return w.Votes + w.Passes }

// Waits returns who waited for whom in a step, the longest wait first: for the last vote, as the
// fwd.coordinate spans say, and inside passes, as the fwd.wait spans say. A wait below 100 µs has no span
// and is not among them; the attribute fwd.wait_time of a pass counts it.
func Waits(step []Span) []Wait {
	type pair struct{ rank, peer int }
	waits := map[pair]*Wait{}
	of := func(rank, peer int) *Wait {
		w := waits[pair{rank, peer}]
		if w == nil {
			w = &Wait{Rank: rank, For: peer}
			waits[pair{rank, peer}] = w
		}
		return w
	}
	byID := map[string]*Span{}
	for i := range step {
		byID[step[i].SpanID] = &step[i]
	}
	for i := range step {
		s := &step[i]
		rank, known := rankOf(s, byID)
		last, voted := s.int("fwd.dp.last_rank")
		peer, waited := s.int("fwd.dp.peer_rank")
		switch {
		case !known:
		case s.Operation() == "fwd.coordinate" && voted && last != rank:
			of(rank, last).Votes += s.Duration()
		case s.Operation() == "fwd.wait" && waited:
			of(rank, peer).Passes += s.Duration()
		}
	}
	var all []Wait
	for _, w := range waits {
		all = append(all, *w)
	}
	slices.SortFunc(all, func(a, b Wait) int {
		return cmp.Or(cmp.Compare(b.Time(), a.Time()), cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.For, b.For))
	})
	return all
}

// rankOf returns the rank that a span is of: its own, or that of the pass that it is in.
func rankOf(s *Span, byID map[string]*Span) (rank int, ok bool) {
	for range len(byID) { // parents could be in a circle, if the trace is damaged
		if s == nil {
			break
		}
		if rank, ok = s.Rank(); ok {
			return rank, true
		}
		s = byID[s.ParentSpanID]
	}
	return 0, false
}

// Padding is what the passes of a step run beside the tokens of requests, in tokens.
type Padding struct {
	Tokens int // all that run, those below included
	Graph  int // up to the size of a graph
	DP     int // up to what another rank runs
	Dummy  int // in dummy passes, with their padding
}

// Ratio returns the share of the tokens that no request needed.
func (p Padding) Ratio() float64 {
	if p.Tokens == 0 {
		return 0
	}
	return float64(p.Graph+p.DP+p.Dummy) / float64(p.Tokens)
}

// PaddingOf returns how much of a step was padding.
func PaddingOf(step []Span) (p Padding) {
	for i := range step {
		s := &step[i]
		if s.Operation() != "fwd.forward" {
			continue
		}
		tokens, _ := s.int("fwd.num_tokens")
		p.Tokens += tokens
		if dummy, _ := s.Attributes["fwd.dummy"].(bool); dummy {
			p.Dummy += tokens
			continue
		}
		graph, _ := s.int("fwd.padding.graph")
		dp, _ := s.int("fwd.padding.dp")
		p.Graph += graph
		p.DP += dp
	}
	return p
}

// RankTime is what one rank did in a step.
type RankTime struct {
	Rank int

	// Late is how much later than the first rank this one came to the vote.
	Late time.Duration

	// Own is the time that the rank computed in its passes: their duration without the waits for other
	// ranks.
	Own time.Duration

	// Wait is the time that the rank waited for other ranks: for their votes, and inside its passes.
	Wait time.Duration
}

// Cost is how long the others had to wait for this rank, or would have had to if none of them were
// as slow.
func (r RankTime) Cost() time.Duration { return r.Late + r.Own }

// RankTimes returns what each rank did in a step, the costliest first. The spans are those of the
// step's trace.
//
// Ranks wait for each other in two places. In the vote a slow rank comes last, when all others have
// started their fwd.coordinate spans. In a pass, the lengths of the fwd.forward spans don't show
// the slow rank if the model exchanges rows between the ranks: the passes then end together. But
// each pass says how long it has waited, in the attribute fwd.wait_time. It does so if the model
// tells fwd about its waits with [fwd.Waited], as the example engine does.
//
// The starts of spans are compared across ranks, so ranks on several hosts need synchronized
// clocks. Without them, fwd.dp.last_rank of the fwd.coordinate spans still says who came last to
// the vote.
//
// The longest pass of a rank counts. The passes of a draft model lie inside it.
func RankTimes(step []Span) []RankTime {
	passes, votes := longestPasses(step), firstVotes(step)
	var first time.Time
	for _, began := range votes {
		if first.IsZero() || began.Before(first) {
			first = began
		}
	}
	times := map[int64]*RankTime{}
	for rank, pass := range passes {
		times[rank] = &RankTime{Rank: int(rank), Own: pass.Duration()}
		if began, ok := votes[rank]; ok {
			times[rank].Late = began.Sub(first)
		}
	}
	for i := range step {
		s := &step[i]
		rank, _ := s.Attributes["fwd.dp.rank"].(int64)
		t := times[rank]
		switch {
		case t == nil:
		case s.Operation() == "fwd.forward":
			seconds, _ := s.Attributes["fwd.wait_time"].(float64)
			wait := time.Duration(seconds * float64(time.Second))
			t.Wait += wait
			t.Own = max(t.Own-wait, 0) // waits of microbatches overlap, and add up to more than the pass
		case s.Operation() == "fwd.coordinate":
			t.Wait += s.Duration()
		}
	}
	var ranks []RankTime
	for _, t := range times {
		ranks = append(ranks, *t)
	}
	slices.SortFunc(ranks, func(a, b RankTime) int {
		return cmp.Or(cmp.Compare(b.Cost(), a.Cost()), cmp.Compare(a.Rank, b.Rank))
	})
	return ranks
}

// longestPasses returns the longest pass of each rank.
func longestPasses(step []Span) map[int64]*Span {
	longest := map[int64]*Span{}
	for i := range step {
		s := &step[i]
		rank, ok := s.Attributes["fwd.dp.rank"].(int64)
		if !ok || s.Operation() != "fwd.forward" {
			continue
		}
		if l := longest[rank]; l == nil || s.Duration() > l.Duration() {
			longest[rank] = s
		}
	}
	return longest
}

// firstVotes returns when each rank began to wait for votes.
func firstVotes(step []Span) map[int64]time.Time {
	first := map[int64]time.Time{}
	for _, s := range step {
		rank, ok := s.Attributes["fwd.dp.rank"].(int64)
		if !ok || s.Operation() != "fwd.coordinate" {
			continue
		}
		if began, ok := first[rank]; !ok || s.Start.Before(began) {
			first[rank] = s.Start
		}
	}
	return first
}

// SlowestRank returns the rank that the others waited for in a step, and how much sooner the step
// would have ended if that rank had been as quick as the next slowest. It returns false if the
// trace has fewer than two ranks.
func SlowestRank(step []Span) (rank int, lost time.Duration, ok bool) {
	ranks := RankTimes(step)
	if len(ranks) < 2 {
		return 0, 0, false
	}
	return ranks[0].Rank, ranks[0].Cost() - ranks[1].Cost(), true
}

// LoweringRank returns the first rank that kept the others from the graph mode that they had wanted
// in a step, and that rank's own reason for not having it, a word of fwd.graph.reason. It returns
// false if no rank was lowered.
func LoweringRank(step []Span) (rank int, reason string, ok bool) {
	step = slices.DeleteFunc(slices.Clone(step), func(s Span) bool { return s.Operation() != "fwd.forward" })
	slices.SortStableFunc(step, func(a, b Span) int { return a.Start.Compare(b.Start) })

	// All ranks take the same passes in the same order, also those of a draft model. So the n-th pass
	// with a name on one rank goes with the n-th on another.
	type key struct{ name, rank any }
	keyOf := func(s *Span) key { return key{s.Attributes["fwd.name"], s.Attributes["fwd.dp.rank"]} }
	passes := map[key][]*Span{}
	for i := range step {
		k := keyOf(&step[i])
		passes[k] = append(passes[k], &step[i])
	}
	for i := range step {
		lowered := &step[i]
		if lowered.Attributes["fwd.graph.reason"] != "dp_rank" {
			continue
		}
		by, _ := lowered.Attributes["fwd.dp.lowest_mode_rank"].(int64)
		k := keyOf(lowered)
		n := slices.Index(passes[k], lowered)
		if others := passes[key{k.name, by}]; n < len(others) {
			reason, _ := others[n].Attributes["fwd.graph.reason"].(string)
			return int(by), reason, true
		}
	}
	return 0, "", false
}
