package timeline

import (
	"fmt"
	"slices"
	"strings"
)

// explanation returns sentences about the step: what the ranks had to do for each other's sake.
func (st *step) explanation() (sentences []string) {
	add := func(format string, args ...any) { sentences = append(sentences, fmt.Sprintf(format, args...)) }
	if last := st.lastVote(); last != nil {
		if rank, ok := last.Int(Rank); ok {
			add("Rank %d votes last, and the others wait for its vote.", rank)
		}
	}
	if slices.ContainsFunc(st.spans, func(s Span) bool { return s.Waited() > 0 }) {
		if w := st.longestWait(); w.time > 0 {
			add("Inside their passes ranks wait for each other too, rank %d longest: %s for rank %d.",
				w.rank, milliseconds(w.time), w.peer)
		} else {
			add("Inside their passes the ranks wait for each other too.")
		}
	}
	var lowered, padded *Span
	var idle []int // ranks
	for _, s := range st.ofKind(Forward) {
		if s.Text(Reason) == "dp_rank" {
			lowered = s
		}
		if n, _ := s.Int(DPPadding); n > 0 {
			padded = s
		}
		if rank, ok := s.Int(Rank); ok && s.IsDummy() {
			idle = append(idle, rank)
		}
	}
	if lowered != nil {
		if by, ok := lowered.Int(LowestModeRank); ok {
			add("Rank %d's batch allows no better graph mode than %s, so others are lowered to it (%s).",
				by, lowered.Text(Mode), lowered.Text(Reason))
		}
	}
	if padded != nil {
		if by, ok := padded.Int(MaxTokensRank); ok {
			tokens, _ := padded.Int(Tokens)
			add("Rank %d has the most tokens, so all ranks are padded to %d.", by, tokens)
		}
	}
	switch len(idle) {
	case 0:
	case 1:
		add("Rank %d is idle and keeps step with a dummy pass.", idle[0])
	default:
		add("%d ranks are idle and keep step with dummy passes.", len(idle))
	}
	return sentences
}

// wait is how long a rank waits for another one inside its passes, in microseconds.
type wait struct {
	rank, peer int
	time       float64
}

// longestWait returns who waits longest for whom, from the spans of the waits.
func (st *step) longestWait() (longest wait) {
	sums := map[[2]int]float64{}
	for _, g := range st.groups {
		for _, r := range g.rows {
			for _, s := range r.spans {
				if peer, ok := s.Int(PeerRank); ok && s.Kind() == Wait {
					pair := [2]int{g.rank, peer}
					sums[pair] += s.Duration()
					if sums[pair] > longest.time {
						longest = wait{g.rank, peer, sums[pair]}
					}
				}
			}
		}
	}
	return longest
}

// title returns what the picture is of.
func (st *step) title() string {
	ranks := 0
	for _, g := range st.groups {
		if g.rank != noRank {
			ranks++
		}
	}
	title := fmt.Sprintf("%s on %s", milliseconds(st.end-st.start), plural(ranks, "rank"))
	for i := range st.spans {
		if n, ok := st.spans[i].Int(Step); ok {
			return fmt.Sprintf("Step %d: %s", n, title)
		}
	}
	return "A step: " + title
}

// description returns the whole picture in words, for those who can't see it.
func (st *step) description() string {
	sentences := st.explanation()
	for _, g := range st.groups {
		var does []string
		for _, r := range g.rows {
			for _, s := range r.spans {
				if r.thin || s.Kind() == Wait { // the pass says how long it has waited in all
					continue
				}
				label := strings.ReplaceAll(labels(s)[0], gap, ", ")
				if s.Kind() != Coordinate {
					label += ", " + durations(s)[0]
				}
				does = append(does, label)
			}
		}
		if g.rank != noRank && does != nil {
			sentences = append(sentences, fmt.Sprintf("Rank %d: %s.", g.rank, strings.Join(does, "; ")))
		}
	}
	return strings.Join(sentences, " ")
}

// gap separates the parts of a label.
const gap = "   "

// labels returns what is to be written about a span, the longest text first.
func labels(s *Span) []string {
	switch s.Kind() {
	case Coordinate:
		wait := milliseconds(s.Duration())
		return []string{"waits " + wait + " for votes", wait}
	case Forward:
		mode := strings.TrimSpace(s.Text(Mode) + " " + s.Text(Reason))
		return []string{mode + gap + tokens(s), mode, s.Text(Mode)}
	case Wait:
		peer, _ := s.Int(PeerRank)
		return []string{fmt.Sprintf("for rank %d", peer), fmt.Sprintf("for %d", peer)}
	case UBatch:
		index, _ := s.Int(UBatchIndex)
		n, _ := s.Int(Tokens)
		name := fmt.Sprintf("microbatch %d", index)
		return []string{name + gap + plural(n, "token"), name}
	}
	return []string{s.Name}
}

// tokens returns the counts of a pass.
func tokens(s *Span) string {
	n, _ := s.Int(Unpadded)
	text := plural(n, "token")
	if s.IsDummy() {
		text = "idle: " + plural(n, "dummy token")
	}
	graph, _ := s.Int(GraphPadding)
	dp, _ := s.Int(DPPadding)
	if graph+dp > 0 {
		text += fmt.Sprintf(", %d padding", graph+dp)
	}
	return text
}

// durations returns what is to be written about the time that a span took, the longest text first.
func durations(s *Span) []string {
	all := milliseconds(s.Duration())
	if waited := s.Waited(); waited > 0 {
		wait := milliseconds(waited)
		return []string{all + ", " + wait + " of it waiting for rows", all + ", " + wait + " waiting", all}
	}
	return []string{all}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// milliseconds writes microseconds as people read them.
func milliseconds(us float64) string {
	switch {
	case us < 100:
		return fmt.Sprintf("%.0f µs", us)
	case us < 10_000:
		return fmt.Sprintf("%.2f ms", us/1000)
	}
	return fmt.Sprintf("%.1f ms", us/1000)
}
