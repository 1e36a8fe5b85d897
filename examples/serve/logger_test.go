// What the log says when something goes wrong, and that it says nothing otherwise.

package main

import (
	"context"
	"errors"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/metric/noop"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// logged are ranks of one process that log as serve does.
type logged struct {
	*testing.T
	log          syncBuffer
	coordinators []fwd.Coordinator
	ranks        []*fwd.Runner
}

func newLogged(t *testing.T) *logged {
	t.Helper()
	l := &logged{T: t}
	var err error
	if l.coordinators, err = fwd.NewLocalGroup(2); err != nil {
		t.Fatal(err)
	}
	for rank := range l.coordinators {
		l.ranks = append(l.ranks, l.newRank(rank))
	}
	return l
}

func (l *logged) newRank(rank int) *fwd.Runner {
	l.Helper()
	r, err := fwd.New(fwd.Config{}, fwd.WithCoordinator(l.coordinators[rank]),
		fwd.WithLogger(newLogger(&l.log).With("replica", "a")),
		fwd.WithTracerProvider(sdktrace.NewTracerProvider()), fwd.WithMeterProvider(noop.NewMeterProvider()),
		fwd.WithStepTrace())
	if err != nil {
		l.Fatal(err)
	}
	return r
}

// plan plans a step on both ranks, and returns their errors.
func (l *logged) plan() (errs [2]error) {
	var wg sync.WaitGroup
	for rank, r := range l.ranks {
		wg.Go(func() { _, errs[rank] = r.Plan(l.Context(), fwd.Schedule{NumScheduledTokens: []int{1}}) })
	}
	wg.Wait()
	return errs
}

// lines returns what has been logged since the last call.
func (l *logged) lines() []string {
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	text := l.log.buffer.String()
	l.log.buffer.Reset()
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}

// check checks that a line has all of that.
func (l *logged) check(line string, want ...string) {
	l.Helper()
	for _, w := range want {
		if !regexp.MustCompile(w).MatchString(line) {
			l.Errorf("no %s in %s", w, line)
		}
	}
}

const inATrace = `trace_id=[0-9a-f]{32} span_id=[0-9a-f]{16}`

// TestLogMissing: a rank that waits in vain says for whom, in which step and in which trace.
func TestLogMissing(t *testing.T) {
	t.Parallel()
	l := newLogged(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.ranks[0].Plan(ctx, fwd.Schedule{}); !errors.Is(err, fwd.ErrRankMissing) {
		t.Fatal(err)
	}
	lines := l.lines()
	if len(lines) != 1 {
		t.Fatalf("%q, want one line", lines)
	}
	l.check(lines[0], "level=WARN", `msg="exchange of votes failed"`, "fwd.step=1", "fwd.dp.rank=0", `\[1\]`,
		"replica=a", "error.type=rank_missing", inATrace)
}

// TestLogRestart: if a rank is started anew, both say so in one line each.
func TestLogRestart(t *testing.T) {
	t.Parallel()
	l := newLogged(t)
	for range 3 {
		if errs := l.plan(); errs != [2]error{} {
			t.Fatal(errs)
		}
	}
	l.ranks[1] = l.newRank(1)
	if errs := l.plan(); !errors.Is(errs[0], fwd.ErrLockstep) || !errors.Is(errs[1], fwd.ErrLockstep) {
		t.Fatal(errs)
	}
	lines := l.lines()
	if len(lines) != 2 {
		t.Fatalf("%q, want a line of each rank", lines)
	}
	for _, line := range lines {
		l.check(line, "level=WARN", `msg="exchange of votes failed"`, "fwd.step=4", `fwd.dp.rank=[01]`, `\[1\]`,
			"error.type=lockstep", inATrace)
	}
	if errs := l.plan(); errs != [2]error{} {
		t.Error(errs)
	}
}

// TestLogLateCapture: a capture after the warm-up is refused, which the log says.
func TestLogLateCapture(t *testing.T) {
	t.Parallel()
	l := newLogged(t)
	forward := func(context.Context) error { return nil }
	cache, err := fwd.NewGraphCache(fwd.GraphFull, forward,
		func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return forward, nil })
	if err != nil {
		t.Fatal(err)
	}
	cache.CloseCapture()
	runner, err := fwd.New(fwd.Config{}, fwd.WithLogger(newLogger(&l.log)),
		fwd.WithMeterProvider(noop.NewMeterProvider()), fwd.WithTracerProvider(sdktrace.NewTracerProvider()))
	if err != nil {
		t.Fatal(err)
	}
	pass := fwd.Pass{NumTokens: 4, NumTokensUnpadded: 4, GraphMode: fwd.GraphFull}
	if err := runner.Run(t.Context(), pass, cache.Forward); !errors.Is(err, fwd.ErrCaptureClosed) {
		t.Fatal(err)
	}
	lines := l.lines()
	if len(lines) != 2 { // the capture, and the pass that failed for it
		t.Fatalf("%q, want two lines", lines)
	}
	l.check(lines[0], "level=WARN", `msg="capture after warm-up refused"`, "fwd.num_tokens=4", inATrace)
	l.check(lines[1], "level=WARN", `msg="forward pass failed"`, "error.type=capture_closed", inATrace)
}

// TestLogWithoutTrace: without spans a line names no trace, and groups and attributes stay.
func TestLogWithoutTrace(t *testing.T) {
	t.Parallel()
	var log syncBuffer
	newLogger(&log).With("a", 1).WithGroup("g").WarnContext(t.Context(), "message", "b", 2)
	if got := log.String(); !strings.HasSuffix(got, "level=WARN msg=message a=1 g.b=2\n") {
		t.Errorf("%q", got)
	}
}

// TestProcessKilled: if a rank is killed, the one that is left says so in one line, and the flight
// recorder writes what went before.
func TestProcessKilled(t *testing.T) {
	t.Parallel()
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer nats.Shutdown()
	dir := t.TempDir()
	var ranks [2]*program
	for rank := range ranks {
		own := strconv.Itoa(rank)
		ranks[rank] = start(t, "-nats", nats.ClientURL(), "-dp", "2", "-rank", own, "-speed", "1",
			"-exchange-timeout", "2s", "-results", filepath.Join(dir, "results."+own),
			"-flight", filepath.Join(dir, "flights"), "-flight-step", "0")
	}
	eventually(t, "a result of rank 1", hasResults(filepath.Join(dir, "results.1"), 1))
	ranks[1].signal(syscall.SIGKILL)
	ranks[1].wait()
	if exit := ranks[0].wait(); exit != 1 {
		t.Errorf("exit %d, want 1", exit)
	}
	stderr := ranks[0].stderr.String()
	want := regexp.MustCompile(
		`level=WARN msg="exchange of votes failed" fwd.step=\d+ fwd.dp.rank=0 .*\[1\].* ` + inATrace)
	if n := strings.Count(stderr, "exchange of votes failed"); n != 1 || !want.MatchString(stderr) {
		t.Errorf("%d lines of an exchange that failed, want one:\n%s", n, stderr)
	}
	if files := flights(t, filepath.Join(dir, "flights")); len(files) != 1 ||
		!strings.HasPrefix(files[0], "serve-rank-0-") || !strings.Contains(stderr, files[0]) {
		t.Errorf("files %v, stderr %s", files, stderr)
	}
}
