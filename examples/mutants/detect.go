package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// The detectors, as indices.
const (
	byServe = iota
	byTelemetry
	byUnit
	numDetectors
)

// detector is a program made with the faulty package, and how to run it so that a fault shows.
type detector struct {
	name   string
	module string   // directory where it is built
	build  []string // arguments of go, without -o and -overlay
	dir    string   // directory where it runs
	runs   []string // arguments of the program: until the first run that fails
	// blame says from its output what about a failed run went wrong.
	blame func(args, output string) string
}

// servedCombinations are flags of serve under which its answers, or its own checks, depend on every part of the package. The
// first one has nearly everything at once, and most faults are noticed there.
var servedCombinations = []string{
	"-dp 3 -sp 2 -chunk 7 -loras 3",
	"-dp 4 -sp 1 -chunk 1",
	"-dp 2 -sp 2 -chunk 64",
	"-dp 1 -sp 2 -chunk 7 -loras 3",
}

// servedRequests keeps a run to a fraction of a second. Their number is no multiple of a number of ranks, and their prompts
// stay long enough to be larger than any graph.
const servedRequests = " -requests 23 -max-context 150"

func detectors(m modules) [numDetectors]detector {
	serve := detector{
		name: "serve", module: m.examples, dir: m.examples,
		build: []string{"build", "-ldflags=-s -w", "./serve"},
		blame: blameServe,
	}
	for _, flags := range servedCombinations {
		serve.runs = append(serve.runs, "-check "+flags+servedRequests)
	}
	const tests = "-test.failfast -test.timeout 40s"
	return [...]detector{
		byServe: serve,
		byTelemetry: {
			name: "telemetry", module: m.examples, dir: filepath.Join(m.examples, "engine"),
			build: []string{"test", "-c", "-ldflags=-s -w", "./engine"},
			runs:  []string{"-test.run ^TestTelemetry " + tests},
			blame: blameTest,
		},
		byUnit: {
			name: "unit", module: m.root, dir: m.root,
			build: []string{"test", "-c", "-ldflags=-s -w", "."},
			runs:  []string{"-test.short " + tests},
			blame: blameTest,
		},
	}
}

// runTimeout bounds one run of a detector, above the tests' own timeout: what takes so long hangs.
const runTimeout = 45 * time.Second

// serveTimeout bounds one run of serve, which takes a fraction of a second where it works.
const serveTimeout = 15 * time.Second

// verdict is what one detector says of one fault.
type verdict struct {
	noticed bool
	by      string // the flags, or the test
	output  string // of the failed run
	took    time.Duration
	err     error // of the detector itself: it says nothing about the fault
}

// result is what all detectors say of one fault.
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
}

// tryAll tries faults, some at a time, and calls done with each result in the order of faults, as soon as that is possible.
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
		next <- i // once ctx has ended, a try ends at once
	}
	close(next)
	wg.Wait()
	return results
}

// try shows one fault to all detectors.
func (b *bench) try(ctx context.Context, f fault) result {
	r := result{fault: f}
	dir, err := os.MkdirTemp(b.tmp, f.name+"-")
	if err == nil {
		defer os.RemoveAll(dir) // what is left goes with b.tmp
		var overlay string
		if overlay, err = b.sources.overlay(&f, b.modules.root, dir); err == nil {
			for i := range b.detectors {
				began := time.Now()
				r.verdicts[i] = b.detectors[i].look(ctx, dir, overlay)
				r.verdicts[i].took = time.Since(began)
			}
			return r
		}
	}
	for i := range r.verdicts {
		r.verdicts[i].err = err
	}
	return r
}

// look builds the detector with an overlay, in dir, and runs it until it notices something.
func (d *detector) look(ctx context.Context, dir, overlay string) verdict {
	program := filepath.Join(dir, d.name)
	verb, rest := d.build[0], d.build[1:]
	args := append([]string{verb, "-o", program, "-overlay", overlay}, rest...)
	if output, err := start(ctx, d.module, 5*time.Minute, "go", args...); err != nil {
		return verdict{err: fmt.Errorf("%s does not build: %w\n%s", d.name, err, output)}
	}
	defer os.Remove(program)
	for _, run := range d.runs {
		timeout := runTimeout
		if d.name == "serve" {
			timeout = serveTimeout
		}
		output, err := start(ctx, d.dir, timeout, program, strings.Fields(run)...)
		switch {
		case ctx.Err() != nil:
			return verdict{err: ctx.Err()}
		case errors.Is(err, context.DeadlineExceeded):
			return verdict{noticed: true, by: "hang: " + d.blame(run, output), output: output}
		case err != nil && !isExit(err):
			return verdict{err: err}
		case err != nil:
			return verdict{noticed: true, by: d.blame(run, output), output: output}
		case strings.Contains(output, "no tests to run"):
			return verdict{err: fmt.Errorf("%s has no tests for %q", d.name, run)}
		}
	}
	return verdict{}
}

func isExit(err error) bool {
	_, ok := errors.AsType[*exec.ExitError](err)
	return ok
}

// start runs a program and returns what it printed, and what was wrong: an *exec.ExitError, or context.DeadlineExceeded when
// it was stopped after the timeout. With it go the processes that it has started.
func start(ctx context.Context, dir string, timeout time.Duration, name string, args ...string) (output string, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
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
	runningTest = regexp.MustCompile(`(?m)^running tests:\n\t(\S+)`)
	panicking   = regexp.MustCompile(`(?m)^github\.com/forwardctx/fwd\S*\.(Test\w+|Fuzz\w+|Example\w*)`)
)

// blameTest returns the name of the test that failed.
func blameTest(_, output string) string {
	if m := runningTest.FindStringSubmatch(output); m != nil {
		return "hang: " + m[1]
	}
	// The last of a run of nested failures is the innermost, and says most.
	var name string
	for _, m := range failedTest.FindAllStringSubmatch(output, -1) {
		if name != "" && !strings.HasPrefix(m[1], name+"/") {
			break
		}
		name = m[1]
	}
	if name != "" {
		return name
	}
	if m := panicking.FindStringSubmatch(output); m != nil {
		return "panic: " + m[1]
	}
	return "a crash"
}
