package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// figures are what a turn has taken.
type figures struct {
	Joined     float64 // seconds until all ranks had joined
	P50, P99   float64 // of a round, in µs
	Deliveries float64 // by the server, for each rank and round
	Resent     uint64  // votes
}

func p50(f figures) float64        { return f.P50 }
func p99(f figures) float64        { return f.P99 }
func joined(f figures) float64     { return f.Joined }
func deliveries(f figures) float64 { return f.Deliveries }

// percentile returns a percentile of values in ascending order.
func percentile(values []float64, percent int) float64 {
	return values[min(len(values)*percent/100, len(values)-1)]
}

func middle(all []figures, of func(figures) float64) float64 {
	values := make([]float64, len(all))
	for i, f := range all {
		values[i] = of(f)
	}
	slices.Sort(values)
	return percentile(values, 50)
}

// ratio returns the middle one of the ratios of turns that followed each other: what else the
// machine did was about the same then.
func ratio(a, b []figures, of func(figures) float64) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = of(a[i]) / of(b[i])
	}
	slices.Sort(ratios)
	return percentile(ratios, 50)
}

func resent(all []figures) (n uint64) {
	for _, f := range all {
		n += f.Resent
	}
	return n
}

func printTable(w io.Writer, results []result) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ranks\tjoined\tnatsdp\tbaseline\tratio\tdelivered\tagain")
	for _, r := range results {
		fmt.Fprintf(table, "%s\t%.2f s\t%.0f, %.0f\t%s %.0f, %.0f\t%.2f, %.2f\t%.1f\t%d\n",
			r.group, middle(r.natsdp, joined), middle(r.natsdp, p50), middle(r.natsdp, p99),
			r.baselineName(), middle(r.baseline, p50), middle(r.baseline, p99),
			ratio(r.natsdp, r.baseline, p50), ratio(r.natsdp, r.baseline, p99),
			middle(r.natsdp, deliveries), resent(r.natsdp))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprint(w, `
joined: until all ranks had joined, from the start of the first one
natsdp, baseline: p50, p99 of an exchange in µs; ratio: of p50, p99
delivered: messages, for each rank and exchange; again: votes, in all turns
`)
	return err
}

// goal is a bound on what is measured in one run.
type goal struct {
	what          string
	measured, max float64
}

// goals returns those that the groups of a run can be held to.
func goals(results []result) []goal {
	var all []goal
	add := func(max, measured float64, format string, args ...any) {
		all = append(all, goal{fmt.Sprintf(format, args...), measured, max})
	}
	find := func(name string) *result {
		i := slices.IndexFunc(results, func(r result) bool { return r.group.String() == name })
		if i < 0 {
			return nil
		}
		return &results[i]
	}
	for i := range results {
		switch r := &results[i]; {
		case r.group.per == 1 && r.group.size() <= 8:
			add(1.25, ratio(r.natsdp, r.baseline, p50), "p50: %s ranks / bare", r.group)
		case r.group.size() >= hubFrom:
			add(4, middle(r.natsdp, deliveries), "delivered: %s ranks", r.group)
		}
	}
	if large, small := find("256"), find("16"); large != nil {
		if small != nil {
			add(24, ratio(large.natsdp, small.natsdp, p50), "p50: 256 ranks / 16 ranks")
		}
		add(1.5, ratio(large.natsdp, large.baseline, p50), "p50: 256 ranks / gather")
		add(10, middle(large.natsdp, joined), "joined: 256 ranks, seconds")
	}
	if many, few := find("32x8"), find("32"); many != nil && few != nil {
		add(1.5, ratio(many.natsdp, few.natsdp, p50), "p50: 32x8 ranks / 32 ranks")
	}
	return all
}

func printGoals(w io.Writer, results []result) error {
	all := goals(results)
	if len(all) == 0 {
		return nil
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\ngoal\tmeasured\tat most\t")
	either := 0
	for _, g := range all {
		verdict := "met"
		if g.measured > g.max {
			verdict = "missed"
		}
		if strings.HasPrefix(g.what, "p50: 256 ranks") {
			either++
		}
		fmt.Fprintf(table, "%s\t%.2f\t%g\t%s\n", g.what, g.measured, g.max, verdict)
	}
	if err := table.Flush(); err != nil || either < 2 {
		return err
	}
	_, err := fmt.Fprintln(w, "\nOne of the two goals for the p50 of 256 ranks is enough.")
	return err
}
