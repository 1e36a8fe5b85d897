package integration

import (
	"cmp"
	"slices"
	"time"
)

// RankTime is what one rank did in a step.
type RankTime struct {
	Rank int
	Late time.Duration // how much later than the first rank it came to the vote
	Own  time.Duration // computing in its passes: all but waiting for other ranks
	Wait time.Duration // for other ranks: for their votes, and for their rows in the passes
}

// Cost is how long the others had to wait for this rank, or would have had to if none of them were as slow.
func (r RankTime) Cost() time.Duration { return r.Late + r.Own }

// RankTimes returns what each rank did in a step, the costliest first. The spans are those of the step's trace.
//
// Ranks wait for each other in two places. In the vote a slow rank shows by coming last, after all others have started
// their fwd.coordinate spans. In a pass it can't be seen from the length of the fwd.forward spans, where the model exchanges
// rows between the ranks: they then end together. What tells them apart is how much of it each rank waited, and that the
// engine says in the attribute engine.experts.wait_time, in seconds.
//
// A rank's outermost pass is its longest. The passes and votes of a draft model lie inside it.
func RankTimes(step []Span) []RankTime {
	outermost := map[int64]*Span{}
	began := map[int64]time.Time{}
	var first time.Time
	for i := range step {
		s := &step[i]
		rank, ok := s.Attributes["fwd.dp.rank"].(int64)
		switch {
		case !ok:
		case s.Name == "fwd.forward":
			if o := outermost[rank]; o == nil || s.Duration() > o.Duration() {
				outermost[rank] = s
			}
		case s.Name == "fwd.coordinate":
			if b, ok := began[rank]; !ok || s.Start.Before(b) {
				began[rank] = s.Start
			}
			if first.IsZero() || s.Start.Before(first) {
				first = s.Start
			}
		}
	}
	times := map[int64]*RankTime{}
	for rank, pass := range outermost {
		times[rank] = &RankTime{Rank: int(rank), Own: pass.Duration()}
		if b, ok := began[rank]; ok {
			times[rank].Late = b.Sub(first)
		}
	}
	for i := range step {
		s := &step[i]
		rank, _ := s.Attributes["fwd.dp.rank"].(int64)
		t := times[rank]
		if t == nil {
			continue
		}
		switch s.Name {
		case "fwd.forward":
			seconds, _ := s.Attributes["engine.experts.wait_time"].(float64)
			wait := time.Duration(seconds * float64(time.Second))
			t.Wait += wait
			t.Own -= wait
		case "fwd.coordinate":
			t.Wait += s.Duration()
			if s.Start.After(outermost[rank].Start) {
				t.Own -= s.Duration()
			}
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

// SlowestRank returns the rank that the others waited for in a step, and how much sooner the step would have been over if
// that rank had been as quick as the next slowest. It returns false where the trace has less than two ranks.
func SlowestRank(step []Span) (rank int, lost time.Duration, ok bool) {
	ranks := RankTimes(step)
	if len(ranks) < 2 {
		return 0, 0, false
	}
	return ranks[0].Rank, ranks[0].Cost() - ranks[1].Cost(), true
}

// LoweringRank returns the rank that kept the others from the graph mode that they had wanted in a step, with its own
// reason for not having it, a word of fwd.graph.reason. It returns false where no rank was lowered.
func LoweringRank(step []Span) (rank int, reason string, ok bool) {
	for _, lowered := range step {
		if lowered.Name != "fwd.forward" || lowered.Attributes["fwd.graph.reason"] != "dp_rank" {
			continue
		}
		by, _ := lowered.Attributes["fwd.dp.lowest_mode_rank"].(int64)
		for _, s := range step {
			if s.Name == "fwd.forward" && s.Attributes["fwd.dp.rank"] == by && s.ParentSpanID == lowered.ParentSpanID {
				reason, _ := s.Attributes["fwd.graph.reason"].(string)
				return int(by), reason, true
			}
		}
	}
	return 0, "", false
}
