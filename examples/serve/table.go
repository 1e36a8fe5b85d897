package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"
)

// print prints the report as a table that fits tableWidth columns, or as JSON.
func (r *report) print(w io.Writer, asJSON bool) error {
	if asJSON {
		out := json.NewEncoder(w)
		out.SetIndent("", "  ")
		return out.Encode(r)
	}
	for _, section := range []func(io.Writer){
		r.printCounts, r.printLadders, r.printWaiting, r.printHeldUp, r.printLowered, r.printSent, r.printSlowest,
	} {
		var text strings.Builder
		t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
		section(t)
		t.Flush() // to memory
		for line := range strings.Lines(text.String()) {
			if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
				return err
			}
		}
	}
	return nil
}

// tableWidth is how wide the table may be, and mostRanks how many ranks a section lists that names
// the worst of them.
const tableWidth, mostRanks = 60, 5

func (r *report) printCounts(t io.Writer) {
	interrupted := ""
	if r.Interrupted {
		interrupted = ", interrupted"
	}
	fmt.Fprintf(t, "requests\t%d\t%d finished%s\n", r.Requests, r.Finished, interrupted)
	if r.Resumed > 0 {
		fmt.Fprintf(t, "\t%d\tfinished by an earlier run\n", r.Resumed)
	}
	fmt.Fprintf(t, "steps\t%d\tin %v\n", r.Steps, seconds(r.Seconds))
	if r.FailedSteps > 0 {
		fmt.Fprintf(t, "\t%d\tmore failed, ranks were not there\n", r.FailedSteps)
	}
	fmt.Fprintf(t, "tokens\t%d\t%d prompt, %d generated\n", r.Tokens, r.PromptTokens, r.GeneratedTokens)
	fmt.Fprintf(t, "tokens/s\t%.0f\t\n", r.TokensPerSecond)
	total := 0
	for _, n := range r.Passes {
		total += n
	}
	fmt.Fprintf(t, "passes\t%d\t%d dummy, to keep step\n", total, r.DummyPasses)
	if r.SplitPasses > 0 {
		fmt.Fprintf(t, "\t%d\tof them split into microbatches\n", r.SplitPasses)
	}
	printMeanings(t, r.Modes, modeMeaning)
	fmt.Fprintf(t, "reasons\t\tfor the mode\n")
	printMeanings(t, r.Passes, reasonMeaning)
	when := "captured in"
	if r.LadderChanges > 0 {
		when = "captured, at first in"
	}
	fmt.Fprintf(t, "graphs\t%d\t%s %v\n", r.Graphs.Captures, when, seconds(r.Graphs.WarmUp))
	fmt.Fprintf(t, "\t%d\treplays\n", r.Graphs.Replays)
	if s := r.Speculation; s != nil {
		fmt.Fprintf(t, "guesses\t%d\t%d accepted\n", s.Proposed, s.Accepted)
		fmt.Fprintf(t, "\t%d\tpasses of the draft model\n", r.DraftPasses)
	}
	fmt.Fprintf(t, "padding\t%d\ttokens\n", r.Padding.Graph+r.Padding.DP)
	fmt.Fprintf(t, "  graph\t%d\tup to the size of a graph\n", r.Padding.Graph)
	fmt.Fprintf(t, "  dp\t%d\tup to the largest rank\n", r.Padding.DP)
}

// printLadders prints what each list of capture sizes was worth while it was in use, and the last one.
func (r *report) printLadders(t io.Writer) {
	if len(r.Ladders) == 0 {
		return
	}
	columns := make([][]string, 6)
	for i, title := range []string{"steps", "eager", "padding", "graphs", "memory", "captured"} {
		columns[i] = []string{title}
	}
	for _, l := range r.Ladders {
		for i, cell := range []string{
			fmt.Sprint(l.Steps), percent(l.Eager, l.Steps, 0), percent(l.Padding, l.Tokens, 1),
			fmt.Sprint(l.Graphs), megabytes(l.Bytes), fmt.Sprintf("%d in %v", l.Captured, short(l.Seconds)),
		} {
			columns[i] = append(columns[i], cell)
		}
	}
	for i := range columns {
		columns[i] = right(columns[i])
	}
	leftOut := r.LadderChanges + 1 - len(r.Ladders)
	for i := range len(r.Ladders) + 1 {
		name := "sizes"
		if i == 1 {
			name = "  1"
		} else if i > 1 {
			name = fmt.Sprintf("  %d", i+leftOut)
		}
		fmt.Fprintf(t, "%s", name)
		for _, column := range columns {
			fmt.Fprintf(t, "\t%s", column[i])
		}
		fmt.Fprintln(t)
	}
	last := r.Ladders[len(r.Ladders)-1].Sizes
	for line := range wrapped("  the last sizes: ", last) {
		fmt.Fprintln(t, line)
	}
}

// wrapped yields lines with a list that fit tableWidth columns.
func wrapped(title string, list []int) iter.Seq[string] {
	return func(yield func(string) bool) {
		line := title
		for i, n := range list {
			text := strconv.Itoa(n)
			if i < len(list)-1 {
				text += ","
			}
			if len(line)+len(text) > tableWidth {
				if !yield(line) {
					return
				}
				line = "  "
			}
			line += text
		}
		yield(line)
	}
}

// percent returns a share of all, with so many digits, or a dash if there are none.
func percent(n, all, digits int) string {
	if all == 0 {
		return "-"
	}
	return fmt.Sprintf("%.*f%%", digits, 100*float64(n)/float64(all))
}

// megabytes returns an amount of memory with two digits or more.
func megabytes(bytes int) string {
	mb := float64(bytes) / 1e6
	if mb < 10 {
		return fmt.Sprintf("%.1f MB", mb)
	}
	return fmt.Sprintf("%.0f MB", mb)
}

// short returns a time with three digits or more.
func short(s float64) time.Duration {
	if d := seconds(s); d < 10*time.Second {
		return d
	}
	return seconds(s).Round(100 * time.Millisecond)
}

// printMeanings prints counts, the largest first, with what each means.
func printMeanings(w io.Writer, counts map[string]int, meaning map[string]string) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b]-counts[a], strings.Compare(a, b))
	})
	for _, name := range names {
		fmt.Fprintf(w, "  %s\t%d\t%s\n", name, counts[name], meaning[name])
	}
}

var modeMeaning = map[string]string{
	"NONE":      "eager",
	"PIECEWISE": "graphs between attention calls",
	"FULL":      "one graph for the whole pass",
}

// reasonMeaning explains the reasons that this engine can have.
var reasonMeaning = map[string]string{
	"exact":         "full graph of a decode batch",
	"relaxed":       "graph for any batch of the size",
	"disabled":      "no graphs at all",
	"no_key":        "no graph for such a batch",
	"too_large":     "larger than any graph",
	"dp_rank":       "another rank had no such graph",
	"full_excluded": "idle, no full graphs in the step",
	"ubatch":        "split into microbatches",
}

// printWaiting prints how long each rank has waited, and how much of its exchanges of votes was hidden
// behind passes, if any was.
func (r *report) printWaiting(t io.Writer) {
	var votes, hidden, experts, forward []float64
	waited, behind := 0.0, 0.0
	for _, w := range r.Waiting {
		votes, hidden = append(votes, w.Votes), append(hidden, w.Hidden)
		experts, forward = append(experts, w.Experts), append(forward, w.Forward)
		waited, behind = waited+w.Votes, behind+w.Hidden
	}
	columns := [][]string{times("votes", votes)}
	if behind > 0 {
		columns = append(columns, times("hidden", hidden))
	}
	columns = append(columns, times("experts", experts), times("of passes", forward))
	for i := range len(r.Waiting) + 1 {
		line := "waiting"
		if i > 0 {
			line = fmt.Sprintf("  rank %d", r.Waiting[i-1].Rank)
		}
		for _, column := range columns {
			line += "\t" + column[i]
		}
		fmt.Fprintln(t, line)
	}
	if behind > 0 {
		fmt.Fprintf(t, "  %.0f %% of the time of exchanges is hidden behind passes\n", 100*behind/(waited+behind))
	}
}

// printHeldUp prints for which ranks the others have waited the longest, and how often.
func (r *report) printHeldUp(t io.Writer) {
	ranks := slices.Clone(r.HeldUp)
	slices.SortStableFunc(ranks, func(a, b heldUpReport) int {
		return cmp.Compare(b.Votes+b.Experts, a.Votes+a.Experts)
	})
	ranks = slices.DeleteFunc(ranks, func(h heldUpReport) bool { return h.VoteTimes+h.ExpertTimes == 0 })
	if len(ranks) == 0 {
		return
	}
	more := len(ranks) - mostRanks
	ranks = ranks[:min(mostRanks, len(ranks))]
	var votes, experts []float64
	var voteTimes, expertTimes []int
	for _, h := range ranks {
		votes, experts = append(votes, h.Votes), append(experts, h.Experts)
		voteTimes, expertTimes = append(voteTimes, h.VoteTimes), append(expertTimes, h.ExpertTimes)
	}
	columns := [][]string{
		times("votes", votes), numbers("times", voteTimes),
		times("experts", experts), numbers("times", expertTimes),
	}
	for i := range len(ranks) + 1 {
		name := "held up others"
		if i > 0 {
			name = fmt.Sprintf("  rank %d", ranks[i-1].Rank)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", name, columns[0][i], columns[1][i], columns[2][i], columns[3][i])
	}
	printMore(t, more)
}

// printLowered prints which ranks have most often made the others take a lower graph mode.
func (r *report) printLowered(t io.Writer) {
	var ranks []int
	for rank, steps := range r.Lowered {
		if steps > 0 {
			ranks = append(ranks, rank)
		}
	}
	if len(ranks) == 0 {
		return
	}
	slices.SortStableFunc(ranks, func(a, b int) int { return cmp.Compare(r.Lowered[b], r.Lowered[a]) })
	fmt.Fprintf(t, "lowered the mode\tsteps\n")
	for _, rank := range ranks[:min(mostRanks, len(ranks))] {
		fmt.Fprintf(t, "  rank %d\t%5d\n", rank, r.Lowered[rank])
	}
	printMore(t, len(ranks)-mostRanks)
}

// printSent prints how many rows went from rank to rank, if any did: all, if that fits, else where
// most went.
func (r *report) printSent(t io.Writer) {
	between := slices.DeleteFunc(slices.Clone(r.Sent), func(s sentReport) bool { return s.From == s.To })
	if len(between) == 0 {
		return
	}
	fmt.Fprintf(t, "rows sent to experts, from rank to rank\n")
	if table := r.sentTable(); fits(table) {
		for _, line := range table {
			fmt.Fprintln(t, line)
		}
		return
	}
	slices.SortStableFunc(between, func(a, b sentReport) int { return cmp.Compare(b.Rows, a.Rows) })
	for _, s := range between[:min(mostRanks, len(between))] {
		fmt.Fprintf(t, "  rank %d to %d\t%d\n", s.From, s.To, s.Rows)
	}
	if more := len(between) - mostRanks; more > 0 {
		fmt.Fprintf(t, "  and fewer between %d other pairs\n", more)
	}
}

// sentTable returns all rows that were sent, a line for each rank that sent some.
func (r *report) sentTable() []string {
	ranks := len(r.Waiting)
	columns := [][]string{make([]string, ranks+1)}
	for rank := range ranks {
		columns[0][rank+1] = fmt.Sprintf("  rank %-3d", rank)
	}
	for to := range ranks {
		rows := make([]int, ranks)
		for _, s := range r.Sent {
			if s.To == to {
				rows[s.From] = s.Rows
			}
		}
		columns = append(columns, numbers(fmt.Sprintf("to %d", to), rows))
	}
	lines := make([]string, ranks+1)
	for i := range lines {
		for c, column := range columns {
			if c > 0 {
				lines[i] += "  "
			}
			lines[i] += fmt.Sprintf("%-*s", utf8.RuneCountInString(columns[c][len(lines)-1]), column[i])
		}
	}
	return lines
}

func fits(lines []string) bool {
	return !slices.ContainsFunc(lines, func(l string) bool { return utf8.RuneCountInString(l) > tableWidth })
}

// printSlowest prints the slowest steps and why they were slow.
func (r *report) printSlowest(t io.Writer) {
	if len(r.Slowest) == 0 {
		return
	}
	var took []float64
	for _, s := range r.Slowest {
		took = append(took, s.Took)
	}
	column := times("took", took)
	fmt.Fprintf(t, "slowest steps\t%s\t\n", column[0])
	for i, s := range r.Slowest {
		why := fmt.Sprintf("rank %d: %s, %d tokens", s.Rank, s.Reason, s.Tokens)
		if s.late() {
			why = fmt.Sprintf("rank %d: its vote came last", s.LastRank)
		}
		fmt.Fprintf(t, "  %d\t%s\t%s\n", s.Step, column[i+1], why)
		if s.Trace != "" {
			fmt.Fprintf(t, "  trace\t%s\n", s.Trace)
		}
	}
}

func printMore(t io.Writer, ranks int) {
	if ranks > 0 {
		fmt.Fprintf(t, "  and %d more ranks\n", ranks)
	}
}

// times returns a column with a title and times below it, all in the unit that the longest calls for.
func times(title string, seconds []float64) []string {
	longest := slices.Max(append([]float64{0}, seconds...))
	unit, per, digits := "s", 1.0, 1
	switch {
	case longest < 0.01:
		unit, per, digits = "µs", 1e6, 0
	case longest < 10:
		unit, per, digits = "ms", 1e3, 0
	}
	column := []string{title}
	for _, s := range seconds {
		column = append(column, fmt.Sprintf("%.*f %s", digits, s*per, unit))
	}
	return right(column)
}

// numbers returns a column with a title and counts below it.
func numbers(title string, all []int) []string {
	column := []string{title}
	for _, n := range all {
		column = append(column, fmt.Sprint(n))
	}
	return right(column)
}

// right moves the lines of a column to its right side.
func right(column []string) []string {
	width := 0
	for _, line := range column {
		width = max(width, utf8.RuneCountInString(line))
	}
	for i, line := range column {
		column[i] = strings.Repeat(" ", width-utf8.RuneCountInString(line)) + line
	}
	return column
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond)
}
