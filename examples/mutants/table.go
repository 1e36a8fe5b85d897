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
	name    int // width of the first column
}

func newTable(w io.Writer, o options) *table {
	t := &table{w: w, verbose: o.verbose, name: len(control.name)}
	for _, f := range o.faults {
		t.name = max(t.name, len(f.name))
	}
	return t
}

func (t *table) header() {
	t.line("fault", "kind", [numDetectors]string{"serve -check", "telemetry", "unit tests", "tests with the SDK"})
}

// line prints the columns of a row. What does not fit into one is cut: -v prints more.
func (t *table) line(name, kind string, cells [numDetectors]string) {
	line := fmt.Sprintf("%-*s  %-12s  %s  %s  %s  %s", t.name, name, kind,
		fit(cells[byServe], 56), fit(cells[byTelemetry], 40), fit(cells[byUnit], 60), fit(cells[bySDK], 60))
	fmt.Fprintln(t.w, strings.TrimRight(line, " "))
}

// fit cuts or fills text to width characters.
func fit(text string, width int) string {
	runes := []rune(text)
	if len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return text + strings.Repeat(" ", width-len(runes))
}

func (t *table) row(r result) {
	var cells [numDetectors]string
	for i, v := range r.verdicts {
		cells[i] = v.String()
	}
	t.line(r.fault.name, string(r.fault.kind), cells)
	if !t.verbose {
		return
	}
	fmt.Fprintf(t.w, "    %s\n", r.fault.what)
	for i, v := range r.verdicts {
		if !v.skipped {
			fmt.Fprintf(t.w, "    %s, %v\n", detectorNames[i], v.took.Round(10*time.Millisecond))
		}
		if v.noticed {
			fmt.Fprintln(t.w, indent(v.by+"\n"+firstLines(v.output, 12), "    | "))
		}
	}
}

var detectorNames = [...]string{byServe: "serve", byTelemetry: "telemetry", byUnit: "unit", bySDK: "sdk"}

func firstLines(text string, most int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[:min(most, len(lines))], "\n")
}

func (v verdict) String() string {
	switch {
	case v.err != nil:
		return "error"
	case v.skipped:
		return ""
	case v.noticed:
		return v.by
	}
	return "-"
}

// controlError returns why nothing can be learnt: a detector that finds something wrong with the package as it is.
func (r result) controlError() error {
	var errs []error
	for i, v := range r.verdicts {
		switch {
		case v.err != nil:
			errs = append(errs, fmt.Errorf("without a fault: %w", v.err))
		case v.noticed:
			errs = append(errs, fmt.Errorf("without a fault, %s fails (%s):\n%s", detectorNames[i], v.by, v.output))
		}
	}
	return errors.Join(errs...)
}

// problem returns what is not as it should be with a fault, nil if nothing is.
func (r result) problem() error {
	for _, v := range r.verdicts {
		if v.err != nil {
			return fmt.Errorf("%s: %w", r.fault.name, v.err)
		}
	}
	shows := r.verdicts[byServe].noticed || r.verdicts[byTelemetry].noticed
	tested := r.verdicts[byUnit].noticed || r.verdicts[bySDK].noticed
	switch {
	case !shows && !tested && !r.verdicts[byUnit].skipped:
		return fmt.Errorf("%s is not noticed: %s", r.fault.name, r.fault.what)
	case !shows && r.fault.kind.carriesAnswers():
		return fmt.Errorf("%s (%s) is not noticed by serve or telemetry: %s", r.fault.name, r.fault.kind, r.fault.what)
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
		if err := r.problem(); err != nil {
			problems = append(problems, err)
		}
	}
	fmt.Fprintf(t.w, "%d faults in %v: serve -check notices %d, telemetry %d, unit tests %d, tests with the SDK %d\n",
		len(results), took.Round(time.Second),
		noticed[byServe], noticed[byTelemetry], noticed[byUnit], noticed[bySDK])
	if len(problems) == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d faults:\n%w", len(problems), len(results), errors.Join(problems...))
}
