package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// table prints results, a line for each as it comes.
type table struct {
	w       io.Writer
	verbose bool
	who     who
	name    int // width of the first column
}

func newTable(w io.Writer, o options) *table {
	t := &table{w: w, verbose: o.verbose, who: o.who, name: len(control.name)}
	for _, f := range o.faults {
		t.name = max(t.name, len(f.name))
	}
	return t
}

func (t *table) header() { t.line("fault", "kind", "noticed by") }

func (t *table) line(name, kind, rest string) {
	fmt.Fprintf(t.w, "%-*s  %-12s  %s\n", t.name, name, kind, rest)
}

// row prints what the detectors that were asked say of a fault.
func (t *table) row(r result) {
	var cells []string
	for i, v := range r.verdicts {
		if v.asked {
			cells = append(cells, detectorNames[i]+": "+v.String())
		}
	}
	t.line(r.fault.name, string(r.fault.kind), strings.Join(cells, "; "))
	if !t.verbose {
		return
	}
	fmt.Fprintf(t.w, "    %s\n", r.fault.what)
	for i, v := range r.verdicts {
		if v.asked {
			fmt.Fprintf(t.w, "    %s, %v\n", detectorNames[i], v.took.Round(10*time.Millisecond))
		}
		if v.noticed {
			fmt.Fprintln(t.w, indent(firstLines(v.output, 12), "    | "))
		}
	}
}

var detectorNames = [...]string{
	byUnit: "unit", bySDK: "sdk", byTelemetry: "telemetry", byOverlap: "overlap", byLadders: "ladders",
	byServe: "serve",
}

func firstLines(text string, most int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[:min(most, len(lines))], "\n")
}

func (v verdict) String() string {
	switch {
	case v.err != nil:
		return "error"
	case v.noticed:
		return v.by
	}
	return "-"
}

// controlError returns why a detector can teach nothing: it finds something wrong with the package as it
// is.
func (v verdict) controlError(detector string) error {
	switch {
	case v.err != nil:
		return fmt.Errorf("without a fault: %w", v.err)
	case v.noticed:
		return fmt.Errorf("without a fault, %s fails (%s):\n%s", detector, v.by, v.output)
	}
	return nil
}

// problem returns what is not as it should be with a fault, nil if nothing is.
func (r result) problem(w who) error {
	noticed := false
	for _, v := range r.verdicts {
		if v.err != nil {
			return fmt.Errorf("%s: %w", r.fault.name, v.err)
		}
		noticed = noticed || v.noticed
	}
	switch shows := r.verdicts[byServe].noticed || r.verdicts[byTelemetry].noticed; {
	case !noticed:
		return fmt.Errorf("%s is not noticed: %s", r.fault.name, r.fault.what)
	case w == everybody && r.fault.kind.carriesAnswers() && !shows:
		return fmt.Errorf("%s (%s) is not noticed by serve or telemetry: %s",
			r.fault.name, r.fault.kind, r.fault.what)
	}
	return nil
}

// summary prints the figures and returns the problems.
func (t *table) summary(results []result, took time.Duration) error {
	var noticed [numDetectors]int
	var problems []error
	for _, r := range results {
		for i, v := range r.verdicts {
			if v.noticed {
				noticed[i]++
			}
		}
		if err := r.problem(t.who); err != nil {
			problems = append(problems, err)
		}
	}
	fmt.Fprintf(t.w, "%d faults in %v", len(results), took.Round(time.Second))
	for i, n := range noticed {
		fmt.Fprintf(t.w, ", %s noticed %d", detectorNames[i], n)
	}
	fmt.Fprintln(t.w)
	if len(problems) == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d faults:\n%w", len(problems), len(results), errors.Join(problems...))
}
