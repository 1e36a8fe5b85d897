package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// The detectors, as indices.
const (
	byUnit = iota
	bySDK
	byTelemetry
	byOverlap
	byLadders
	byServe
	numDetectors
)

// detector is a program made with the faulty package, and how to run it so that a fault shows.
type detector struct {
	module  string        // directory where it is built
	build   []string      // arguments of go, without -o and -overlay
	dir     string        // directory where it runs
	runs    []string      // arguments of the program: until the first run that fails
	timeout time.Duration // of a run: what takes so long hangs
	// blame says what has noticed the fault, from the arguments and the output of the failed run.
	blame func(args, output string) string
	// control returns what is wrong with the package without a fault; only the first call looks.
	control func() error
	// parts returns what the detector is linked from; only the first call looks.
	parts func() (*parts, error)
}

// servedCombinations are flags of serve under which its answers, or its own checks, depend on every part
// of the package. The first one has nearly everything, and most faults are noticed there.
var servedCombinations = []string{
	"-dp 3 -sp 2 -chunk 7 -ubatches 2 -loras 3",
	"-dp 3 -chunk 7 -spec 2",
	"-dp 4 -sp 2 -chunk 1 -graph NONE -ubatches 3",
	"-dp 2 -chunk 64 -graph PIECEWISE -ubatches 2",
	"-dp 1 -sp 2 -chunk 7 -graph FULL -ubatches 2 -loras 3",
	"-dp 2 -sp 2 -graph FULL_DECODE_ONLY -spec 2",
	"-dp 3 -graph FULL -ubatches 3 -spec 2 -loras 3",
	"-dp 3 -chunk 7 -ubatches 2 -loras 3 -overlap",
}

// servedRequests keeps a run to a fraction of a second. Their number is no multiple of a number of ranks,
// and their prompts stay long enough to be larger than any graph.
const servedRequests = " -requests 23 -max-context 150"

// slowTests take longer than all others together, and few faults need them. moduleTests look at modules
// and files, and run the go command; no fault shows there.
var (
	slowTests   = []string{"TestDPExact", "TestGroupSizes", "TestPlanRunRoundTrip"}
	moduleTests = []string{"TestLinkedModules", "TestRequirements", "TestNoSDK", "TestRootFiles"}
)

// names returns the pattern of tests with these names.
func names(lists ...[]string) string { return "^(" + strings.Join(slices.Concat(lists...), "|") + ")$" }

// newDetectors returns the detectors.
func newDetectors(m modules) [numDetectors]detector {
	test := []string{"test", "-c", "-ldflags=-s -w"}
	const flags = " -test.failfast -test.timeout 20s"
	const short = " -test.short" + flags
	unit := detector{
		module: m.root, dir: m.root, build: append(slices.Clone(test), "."),
		runs: []string{
			"-test.skip " + names(slowTests, moduleTests) + short,
			"-test.run " + names(slowTests) + short,
		},
		timeout: testTimeout, blame: blameTest,
	}
	sdk := unit
	sdk.module, sdk.dir, sdk.runs = m.sdk, m.sdk, []string{short}
	telemetry := detector{
		module: m.examples, dir: filepath.Join(m.examples, "engine"),
		build:   append(slices.Clone(test), "./engine"),
		runs:    []string{"-test.run ^TestTelemetry" + flags},
		timeout: testTimeout, blame: blameTest,
	}
	overlapped := telemetry
	overlapped.runs = []string{"-test.run ^TestOverlap" + flags}
	serve := detector{
		module: m.examples, dir: m.examples,
		build:   []string{"build", "-ldflags=-s -w", "./serve"},
		timeout: serveTimeout, blame: blameServe,
	}
	for _, flags := range servedCombinations {
		serve.runs = append(serve.runs, "-check "+flags+servedRequests)
	}
	ladders := telemetry
	ladders.runs = []string{
		"-test.run ^TestReplan -test.skip ^TestReplanCovering$ -test.failfast -test.timeout 90s",
	}
	ladders.timeout = ladderTimeout
	return [...]detector{
		byUnit: unit, bySDK: sdk, byTelemetry: telemetry, byOverlap: overlapped, byLadders: ladders, byServe: serve,
	}
}

// order returns the detectors to ask about a fault of this kind, the cheapest that is likely to notice
// first.
func (k kind) order() []int {
	switch k {
	case telemetry:
		return []int{bySDK, byUnit, byTelemetry, byServe}
	case overlap:
		return []int{byOverlap, byServe}
	case ladder:
		return []int{byLadders}
	}
	return []int{byUnit, bySDK, byTelemetry, byServe}
}

// engineOrder is the order when only the engine is asked.
var engineOrder = []int{byServe, byTelemetry}

const (
	buildTimeout = 5 * time.Minute
	serveTimeout = 20 * time.Second // a run takes a fraction of a second where it works
	testTimeout  = 30 * time.Second // above the timeout of the tests themselves, which say what hangs

	ladderTimeout = 100 * time.Second // these tests take longer
)

// verdict is what one detector says of one fault.
type verdict struct {
	asked   bool
	noticed bool
	by      string // the flags, or the test
	output  string // of the failed run
	took    time.Duration
	err     error // of the detector itself: it says nothing about the fault
}

// result is what the detectors say of one fault.
type result struct {
	fault    fault
	verdicts [numDetectors]verdict
}

// bench is where faults are tried.
type bench struct {
	modules   modules
	sources   sources
	tmp       string
	detectors [numDetectors]detector
	who       who
}

// newBench returns a bench whose detectors look at the package without a fault before they look at one.
func newBench(ctx context.Context, m modules, src sources, tmp string, w who) *bench {
	b := &bench{modules: m, sources: src, tmp: tmp, detectors: newDetectors(m), who: w}
	for i := range b.detectors {
		d := &b.detectors[i]
		d.control = sync.OnceValue(func() error {
			dir, overlay, err := b.prepare(&control)
			defer os.RemoveAll(dir)
			if err != nil {
				return err
			}
			return d.look(ctx, &control, dir, overlay).controlError(detectorNames[i])
		})
		d.parts = sync.OnceValues(func() (*parts, error) { return d.findParts(ctx) })
	}
	return b
}

// tryAll tries faults, some at a time, and calls done with each result in the order of faults, as soon as
// that is possible.
func (b *bench) tryAll(ctx context.Context, faults []fault, jobs int, done func(result)) []result {
	results := make([]result, len(faults))
	ready := make([]chan struct{}, len(faults))
	for i := range ready {
		ready[i] = make(chan struct{})
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range jobs {
		wg.Go(func() {
			for i := range next {
				results[i] = b.try(ctx, faults[i])
				close(ready[i])
			}
		})
	}
	wg.Go(func() {
		for i := range faults {
			<-ready[i]
			if ctx.Err() == nil {
				done(results[i])
			}
		}
	})
	for i := range faults {
		next <- i // once ctx has ended, a try ends immediately
	}
	close(next)
	wg.Wait()
	return results
}

// try shows one fault to the detectors, until one notices it or, if all are to be asked, to all.
func (b *bench) try(ctx context.Context, f fault) result {
	r := result{fault: f}
	order := f.kind.order()
	if b.who == engineOnly {
		order = engineOrder
	}
	dir, overlay, err := b.prepare(&f)
	defer os.RemoveAll(dir) // what is left goes with b.tmp
	for _, i := range order {
		d, v := &b.detectors[i], &r.verdicts[i]
		v.err = err
		if err == nil {
			v.err = d.control()
		}
		if v.err == nil {
			began := time.Now()
			*v = d.look(ctx, &f, dir, overlay)
			v.took = time.Since(began)
		}
		v.asked = true
		if v.err != nil || v.noticed && b.who != everybody {
			return r
		}
	}
	return r
}

// prepare makes a directory for a fault, with its overlay in it.
func (b *bench) prepare(f *fault) (dir, overlay string, err error) {
	dir, err = os.MkdirTemp(b.tmp, f.name+"-")
	if err != nil {
		return "", "", err
	}
	overlay, err = b.sources.overlay(f, b.modules.root, dir)
	return dir, overlay, err
}

// look builds the detector with an overlay, in dir, and runs it until it notices something.
func (d *detector) look(ctx context.Context, f *fault, dir, overlay string) verdict {
	program := filepath.Join(dir, "detector")
	if !d.relinked(ctx, f, dir, program) {
		if err := d.make(ctx, program, overlay); err != nil {
			return verdict{err: err}
		}
	}
	for _, run := range d.runs {
		if v := d.run(ctx, program, run); v.noticed || v.err != nil {
			return v
		}
	}
	return verdict{}
}

// relinked tries to make the detector in the quick way. A compiler's complaint comes out in the other way.
func (d *detector) relinked(ctx context.Context, f *fault, dir, program string) bool {
	if filepath.Base(f.file) != f.file || d.parts == nil { // it is in another package, or there is none
		return false
	}
	p, err := d.parts()
	return err == nil && p.relink(ctx, f, dir, program) == nil
}

// make builds the detector. Compilers live for seconds: leaving most of their garbage to their end saves a
// third of their time.
func (d *detector) make(ctx context.Context, program, overlay string) error {
	args := append([]string{d.build[0], "-o", program, "-overlay", overlay}, d.build[1:]...)
	env := append(tempEnv(filepath.Dir(program)), "GOGC=400")
	output, err := start(ctx,
		command{name: "go", args: args, dir: d.module, env: env, timeout: buildTimeout})
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(d.build, " "), err, output)
	}
	return nil
}

// run runs the detector once.
func (d *detector) run(ctx context.Context, program, args string) verdict {
	env := tempEnv(filepath.Dir(program))
	output, err := start(ctx,
		command{name: program, args: strings.Fields(args), dir: d.dir, env: env, timeout: d.timeout})
	switch {
	case ctx.Err() != nil:
		return verdict{err: ctx.Err()}
	case errors.Is(err, context.DeadlineExceeded):
		return verdict{noticed: true, by: d.blame(args, output) + ", which hangs", output: output}
	case err != nil && !isExit(err):
		return verdict{err: err}
	case err != nil:
		return verdict{noticed: true, by: d.blame(args, output), output: output}
	case strings.Contains(output, "no tests to run"):
		return verdict{err: fmt.Errorf("go %s: there are no tests for %s", strings.Join(d.build, " "), args)}
	}
	return verdict{}
}

func isExit(err error) bool {
	_, ok := errors.AsType[*exec.ExitError](err)
	return ok
}

// tempEnv keeps what commands leave behind, when they are stopped, in dir.
func tempEnv(dir string) []string { return []string{"TMPDIR=" + dir, "GOTMPDIR=" + dir} }

// command is a program to run, and where.
type command struct {
	name    string
	args    []string
	dir     string
	env     []string // beside this process's own
	timeout time.Duration
}

// start runs a command and returns what it printed, and what was wrong: an *exec.ExitError, or
// context.DeadlineExceeded when it was stopped after the timeout. The processes that it has started go
// with it.
func start(ctx context.Context, c command) (output string, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, c.name, c.args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.dir, &out, &out
	cmd.Env = append(cmd.Environ(), c.env...)
	cmd.WaitDelay = 5 * time.Second // for output pipes that a grandchild holds
	inGroup(cmd)
	err = cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return out.String(), err
}

// blameServe returns the flags that a run of serve was about.
func blameServe(args, _ string) string {
	return strings.TrimSuffix(strings.TrimPrefix(args, "-check "), servedRequests)
}

var (
	failedTest  = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)
	runningTest = regexp.MustCompile(`(?m)^\s*running tests:\s+(\S+)`)
	panicking   = regexp.MustCompile(`(?m)^(?:panic|fatal error): .*`)
)

// blameTest returns the name of the test that failed, or what ended the program.
func blameTest(_, output string) string {
	if m := runningTest.FindStringSubmatch(output); m != nil {
		return m[1] + ", which hangs"
	}
	var name string // the innermost of nested tests, which says most
	for _, m := range failedTest.FindAllStringSubmatch(output, -1) {
		if name != "" && !strings.HasPrefix(m[1], name+"/") {
			break
		}
		name = m[1]
	}
	return cmp.Or(name, panicking.FindString(output), "a test")
}
