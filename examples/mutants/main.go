// Mutants breaks the fwd package in many small ways, one at a time, and says who notices.
//
//	go -C examples run ./mutants
//
// A test that can't fail proves nothing. Each fault in faults.go changes one place of the package; the changed file stands in
// for the real one in a build (go build -overlay), and nothing in the repository is touched. Four detectors then look at the
// broken package:
//
//	serve      cmd serve -check, over a few combinations of flags, until the first whose answers are wrong
//	telemetry  the engine's tests of what it emits (go test -run TestTelemetry ./engine)
//	unit       the package's own tests (go test -short .)
//	sdk        the package's tests with the OpenTelemetry SDK (go -C integration/sdk test -short .)
//
// A hang counts as noticed. Each fault must be noticed by one of them, and a fault of arithmetic, coordination or microbatches
// by serve or telemetry: an engine whose answers don't depend on those would not need the package. A control without a fault
// comes first and must pass everything.
//
// It exits with 0 if all is so, with 1 if not, on an error and when it was interrupted, and with 2 for bad flags.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the next signal kills
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags.
type options struct {
	faults  []fault
	list    bool
	verbose bool
	short   bool
	jobs    int
}

func parseFlags(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	flags.SetOutput(stderr)
	o.faults = faults
	flags.Func("run", "only the faults whose name matches this `regexp`", func(s string) error {
		only, err := regexp.Compile(s)
		o.faults = matching(faults, only)
		return err
	})
	flags.BoolVar(&o.list, "list", false, "print the faults and run nothing; with -v, their changes")
	flags.BoolVar(&o.verbose, "v", false, "print what each detector saw, and how long it took")
	flags.BoolVar(&o.short, "short", false, "leave out unit and sdk, and only ask for what serve and telemetry must notice")
	flags.IntVar(&o.jobs, "j", runtime.NumCPU(), "`faults` at a time")
	if err := flags.Parse(args); err != nil {
		return o, err // flags has printed it
	}
	switch {
	case flags.NArg() > 0:
		err = fmt.Errorf("mutants: unexpected arguments %q: there are only flags", flags.Args())
	case o.jobs < 1:
		err = fmt.Errorf("mutants: -j is %d, want at least 1", o.jobs)
	case len(o.faults) == 0:
		err = errors.New("mutants: no fault has such a name")
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
	}
	return o, err
}

func matching(all []fault, only *regexp.Regexp) []fault {
	if only == nil {
		return nil
	}
	var matched []fault
	for _, f := range all {
		if only.MatchString(f.name) {
			matched = append(matched, f)
		}
	}
	return matched
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (exit int) {
	o, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	err = mutants(ctx, o, stdout)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintf(stderr, "mutants: %v\n", err)
		return 1
	}
	return 0
}

func mutants(ctx context.Context, o options, stdout io.Writer) (err error) {
	dirs, err := findModules(ctx)
	if err != nil {
		return err
	}
	src, err := readSources(dirs.root)
	if err != nil {
		return err
	}
	if o.list {
		return list(stdout, src, o.faults, o.verbose)
	}
	// A fault that no longer applies must come out before minutes are spent on the others.
	if err := src.checkAll(o.faults); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "mutants-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()

	began := time.Now()
	b := &bench{modules: dirs, sources: src, tmp: tmp, detectors: detectors(dirs, o.short)}
	t := newTable(stdout, o)
	t.header()
	control := b.try(ctx, control)
	t.row(control)
	if err := control.controlError(); err != nil {
		return err
	}
	results := b.tryAll(ctx, o.faults, o.jobs, t.row)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return t.summary(results, time.Since(began))
}
