package integration

import (
	"cmp"
	"slices"
	"time"
)

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
		case s.Name == "fwd.forward":
			seconds, _ := s.Attributes["fwd.wait_time"].(float64)
			wait := time.Duration(seconds * float64(time.Second))
			t.Wait += wait
			t.Own = max(t.Own-wait, 0) // waits of microbatches overlap, and add up to more than the pass
		case s.Name == "fwd.coordinate":
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
		if !ok || s.Name != "fwd.forward" {
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
		if !ok || s.Name != "fwd.coordinate" {
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
	step = slices.DeleteFunc(slices.Clone(step), func(s Span) bool { return s.Name != "fwd.forward" })
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
