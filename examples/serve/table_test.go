// The table: what it says of slow steps and of ranks that hold up others, and how wide it is.

package main

import (
	"bytes"
	"strings"
	"testing"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
)

// checkWidth checks that a table fits.
func checkWidth(t *testing.T, table string) {
	t.Helper()
	for line := range strings.Lines(table) {
		if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > tableWidth {
			t.Errorf("wider than %d columns: %q", tableWidth, line)
		}
	}
}

// largeReport returns the report of many ranks with large figures.
func largeReport(ranks int) *report {
	r := &report{
		Requests: 1e6, Finished: 999_999, Resumed: 100_000, Interrupted: true, Seconds: 86_399.999,
		Steps: 10_000_000, FailedSteps: 1000,
		Tokens: 12_345_678, PromptTokens: 1_234_567, GeneratedTokens: 1_234_567,
		Passes: map[string]int{}, Modes: map[string]int{}, DummyPasses: 1_234_567, SplitPasses: 1, DraftPasses: 1,
		Graphs:        graphReport{WarmUp: 1234.567, Captures: 1000, Replays: 10_000_000},
		Speculation:   &specReport{1e7, 1e7},
		LadderChanges: 123,
	}
	for i := range 8 {
		r.Ladders = append(r.Ladders, ladderReport{
			Sizes: fwd.DefaultCaptureSizes(512), Graphs: 102, Captured: 102 - i, Bytes: 123_456_789, Seconds: 12.345,
			Steps: 1_234_567, Eager: 1_234_567, Tokens: 1_000_000, Padding: 234_567,
		})
	}
	for reason := range reasonMeaning {
		r.Passes[reason] = 1_234_567
	}
	for mode := range modeMeaning {
		r.Modes[mode] = 1_234_567
	}
	for rank := range ranks {
		r.Waiting = append(r.Waiting, rankReport{rank, 86_399, 86_399, 0.00001, 86_399})
		r.HeldUp = append(r.HeldUp, heldUpReport{rank, 86_399.1, 1_234_567, float64(rank), 12_345_678})
		r.Lowered = append(r.Lowered, 100*rank)
		for to := range ranks {
			r.Sent = append(r.Sent, sentReport{rank, to, 1_000_000*rank + to})
		}
	}
	for i := range uint64(numSlowest) {
		r.Slowest = append(r.Slowest, stepReport{Step: 10_000_000 + i, Rank: 63, Took: 4 - float64(i), LastRank: -1,
			Reason: "full_excluded", Tokens: 1024, Trace: "0af7651916cd43dd8448eb211c80319c"})
	}
	r.Slowest[1].LastRank, r.Slowest[1].Votes = 17, 2.5
	return r
}

// TestTableLarge: the table of many ranks names the worst of them, and fits.
func TestTableLarge(t *testing.T) {
	var out bytes.Buffer
	if err := largeReport(64).print(&out, false); err != nil {
		t.Fatal(err)
	}
	checkWidth(t, out.String())
	for _, want := range []string{
		"held up others      votes    times  experts     times\n" +
			"  rank 63       86399.1 s  1234567   63.0 s  12345678\n",
		"  rank 59       86399.1 s  1234567   59.0 s  12345678\n  and 59 more ranks\n",
		"lowered the mode  steps\n  rank 63          6300\n", "  rank 59          5900\n  and 58 more ranks\n",
		"  rank 63 to 62  63000062\n  rank 63 to 61  63000061\n", "  and fewer between 4027 other pairs\n",
		"sizes    steps  eager  padding  graphs  memory      captured\n" +
			"  1    1234567   100%    23.5%     102  123 MB  102 in 12.3s\n" +
			"  118  1234567   100%    23.5%     102  123 MB  101 in 12.3s\n",
		"  the last sizes: 1,2,4,8,16,24,32,40,48,56,64,72,80,88,96,\n  104,112,120,",
		"slowest steps     took\n  10000000     4000 ms  rank 63: full_excluded, 1024 tokens\n" +
			"  trace        0af7651916cd43dd8448eb211c80319c\n" +
			"  10000001     3000 ms  rank 17: its vote came last\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no\n%sin\n%s", want, &out)
		}
	}
}

// TestTableHidden: how much of the exchanges' time is hidden is said of each rank and of all, if any is.
func TestTableHidden(t *testing.T) {
	r := &report{Waiting: []rankReport{{0, 0.02, 0.13, 0.2, 2}, {1, 0.03, 0.02, 0.01, 1.5}}}
	var out strings.Builder
	print := func() string {
		out.Reset()
		w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
		r.printWaiting(w)
		w.Flush()
		return out.String()
	}
	want := `waiting   votes  hidden  experts  of passes
  rank 0  20 ms  130 ms   200 ms    2000 ms
  rank 1  30 ms   20 ms    10 ms    1500 ms
  75 % of the time of exchanges is hidden behind passes
`
	if diff := cmp.Diff(want, print()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	r.Waiting[0].Hidden, r.Waiting[1].Hidden = 0, 0
	if got := print(); strings.Contains(got, "hidden") {
		t.Errorf("nothing is hidden, but it prints\n%s", got)
	}
}

// TestTableSent: what few ranks have sent is shown in full; nothing is shown if rows stay in their rank.
func TestTableSent(t *testing.T) {
	table := func(sent ...sentReport) string {
		r := &report{Waiting: make([]rankReport, 2), Sent: sent}
		var out strings.Builder
		r.printSent(&out)
		return out.String()
	}
	const want = `rows sent to experts, from rank to rank
            to 0   to 1
  rank 0       5  12345
  rank 1      60      0
`
	got := table(sentReport{0, 1, 12345}, sentReport{0, 0, 5}, sentReport{1, 0, 60})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got := table(sentReport{0, 0, 5}, sentReport{1, 1, 6}); got != "" {
		t.Errorf("nothing was sent: %q", got)
	}
}

// TestSlowest: a step is as slow as on its slowest rank, and is shown of the rank that made it so.
func TestSlowest(t *testing.T) {
	got := slowestOf([]stepReport{
		{Step: 1, Rank: 0, Took: 5, Work: 1, LastRank: 1},
		{Step: 2, Rank: 0, Took: 9, Votes: 8, Work: 1, LastRank: 1},
		{Step: 3, Rank: 0, Took: 1},
		{Step: 4, Rank: 0, Took: 2},
		{Step: 1, Rank: 1, Took: 4, Work: 4, LastRank: 0},
		{Step: 2, Rank: 1, Took: 2, Work: 2, LastRank: -1},
	})
	want := []stepReport{
		{Step: 2, Rank: 0, Took: 9, Votes: 8, Work: 1, LastRank: 1},
		{Step: 1, Rank: 1, Took: 5, Work: 4, LastRank: 0},
		{Step: 4, Rank: 0, Took: 2},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestTimes: all times of a column have one unit.
func TestTimes(t *testing.T) {
	for _, c := range []struct {
		seconds []float64
		want    []string
	}{
		{nil, []string{"t"}},
		{[]float64{0, 0.0099}, []string{"      t", "   0 µs", "9900 µs"}},
		{[]float64{0.0001, 1.5}, []string{"      t", "   0 ms", "1500 ms"}},
		{[]float64{0.04, 10}, []string{"     t", " 0.0 s", "10.0 s"}},
	} {
		if diff := cmp.Diff(c.want, times("t", c.seconds)); diff != "" {
			t.Errorf("%v (-want +got)\n%s", c.seconds, diff)
		}
	}
}
