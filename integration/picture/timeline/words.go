package timeline

import (
	"fmt"
	"strings"
)

// explanation returns sentences about the step: what the ranks had to do for each other's sake.
func (st *step) explanation() (sentences []string) {
	if last := st.lastVote(); last != nil {
		if rank, ok := last.Int(Rank); ok {
			sentences = append(sentences, fmt.Sprintf("Rank %d votes last; until then the others wait.", rank))
		}
	}
	var lowered, padded *Span
	for _, s := range st.ofKind(Forward) {
		if s.Text(Reason) == "dp_rank" {
			lowered = s
		}
		if n, _ := s.Int(DPPadding); n > 0 {
			padded = s
		}
	}
	if lowered != nil {
		if by, ok := lowered.Int(LowestModeRank); ok {
			sentences = append(sentences,
				fmt.Sprintf("Rank %d's batch allows no better graph mode than %s, so the others are lowered to it (dp_rank).",
					by, lowered.Text(Mode)))
		}
	}
	if padded != nil {
		if by, ok := padded.Int(MaxTokensRank); ok {
			tokens, _ := padded.Int(Tokens)
			sentences = append(sentences, fmt.Sprintf("Rank %d has the most tokens, so all ranks are padded to %d.", by, tokens))
		}
	}
	for _, s := range st.ofKind(Forward) {
		if rank, ok := s.Int(Rank); ok && s.IsDummy() {
			sentences = append(sentences, fmt.Sprintf("Rank %d is idle and keeps step by a dummy pass.", rank))
		}
	}
	return sentences
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
				if label := labels(s)[0]; label != "" && !r.thin {
					does = append(does, fmt.Sprintf("%s (%s)", label, milliseconds(s.Duration())))
				}
			}
		}
		if g.rank != noRank && does != nil {
			sentences = append(sentences, fmt.Sprintf("Rank %d: %s.", g.rank, strings.Join(does, "; ")))
		}
	}
	return strings.Join(sentences, " ")
}

// labels returns what is to be written about a span, the longest text first.
func labels(s *Span) []string {
	switch s.Kind() {
	case Coordinate:
		wait := milliseconds(s.Duration())
		return []string{"waits " + wait + " for votes", wait}
	case Forward:
		mode := strings.TrimSpace(s.Text(Mode) + " " + s.Text(Reason))
		return []string{mode + "   " + tokens(s), mode, s.Text(Mode)}
	case UBatch:
		index, _ := s.Int(UBatchIndex)
		n, _ := s.Int(Tokens)
		return []string{fmt.Sprintf("microbatch %d   %s", index, plural(n, "token")), fmt.Sprintf("microbatch %d", index)}
	}
	return []string{s.Name}
}

// tokens returns the counts of a pass.
func tokens(s *Span) string {
	n, _ := s.Int(Unpadded)
	text := plural(n, "token")
	if s.IsDummy() {
		text = fmt.Sprintf("idle: %d dummy token", n)
		if n != 1 {
			text += "s"
		}
	}
	graph, _ := s.Int(GraphPadding)
	dp, _ := s.Int(DPPadding)
	if graph+dp > 0 {
		text += fmt.Sprintf(", %d padding", graph+dp)
	}
	return text
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
