// Mutants breaks the fwd package in many small ways, one at a time, and says who notices.
//
//	go -C examples run ./mutants
//
// A test that can't fail proves nothing. Each fault in faults_*.go changes one place of the package, or of
// the engine; the changed file stands in for the real one in a build (go build -overlay), and nothing in
// the repository is touched. Six detectors look at what is broken, until one of them notices:
//
//	unit       the package's own tests (go test -short .)
//	sdk        the package's tests with the OpenTelemetry SDK (go -C integration/sdk test -short .)
//	telemetry  the engine's tests of what it emits (go test -run TestTelemetry ./engine)
//	overlap    the engine's tests of steps that overlap (go test -run TestOverlap ./engine)
//	ladders    the engine's tests of capture sizes that change (go test -run TestReplan ./engine)
//	serve      cmd serve -check, over a few combinations of flags, until the first whose answers are wrong
//
// Faults of telemetry are shown to sdk first. Those of overlapped steps and of ladders are in the engine:
// they are shown to overlap and to ladders, which are asked about no others. A hang counts as noticed. Each
// detector first looks at the package without a fault, and must find nothing wrong with it. With -all every
// detector is asked about every fault. With -engine only serve and telemetry are asked, about the faults of
// arithmetic, coordination and microbatches, and must notice them: an engine whose answers don't depend on
// those would not need the package.
//
// It exits with 0 if every fault is noticed, with 1 if not, on an error and when it was interrupted, and
// with 2 for bad flags.
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
	"slices"
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
	who     who
	jobs    int
}

// who is asked about a fault.
type who int

const (
	untilNoticed who = iota // the detectors, until the first that notices
	everybody               // all detectors
	engineOnly              // those of the engine, about the faults that they must notice
)

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
	all := flags.Bool("all", false, "ask every detector, not only until one notices")
	engine := flags.Bool("engine", false, "ask only serve and telemetry, about the faults that they must notice")
	// One more than there are processors, since those that hang use none.
	flags.IntVar(&o.jobs, "j", runtime.NumCPU()+1, "`faults` at a time")
	if err := flags.Parse(args); err != nil {
		return o, err // flags has printed it
	}
	switch {
	case *engine:
		o.who = engineOnly
		o.faults = slices.DeleteFunc(slices.Clone(o.faults), func(f fault) bool { return !f.kind.carriesAnswers() })
	case *all:
		o.who = everybody
	}
	switch {
	case *all && *engine:
		err = errors.New("mutants: -all and -engine exclude each other")
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
	b := newBench(ctx, dirs, src, tmp, o.who)
	t := newTable(stdout, o)
	t.header()
	results := b.tryAll(ctx, o.faults, o.jobs, t.row)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return t.summary(results, time.Since(began))
}
