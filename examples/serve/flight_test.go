// When the flight recorder writes its files, how many, and what is in them. A process has one
// recorder, so these tests don't run in parallel.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	xtrace "golang.org/x/exp/trace"
)

// clock is a clock that tests set.
type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(0, c.ns.Load()) }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

func flights(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i, file := range files {
		files[i] = filepath.Base(file)
	}
	return files
}

// TestFlight: a missing rank or a long step makes a file, at most one a minute, and old ones go.
func TestFlight(t *testing.T) {
	dir := t.TempDir()
	var log syncBuffer
	var c clock
	c.advance(time.Hour)
	f, err := startFlight(dir, "serve", time.Second, slog.New(slog.NewTextHandler(&log, nil)), c.now)
	if err != nil {
		t.Fatal(err)
	}
	written := 0
	observe := func(what string, rec fwd.Record, wants bool) {
		t.Helper()
		f.observe(t.Context(), &rec)
		if wants {
			written++
		}
		eventually(t, what+" is written", func() bool { return strings.Count(log.String(), "\n") >= written })
	}
	missing := fwd.Record{Step: 1, Rank: 2, Err: fmt.Errorf("%w: ranks [1]", fwd.ErrRankMissing)}
	long := fwd.Record{Step: 2, NumTokens: 1, Wait: 600 * time.Millisecond, Duration: 600 * time.Millisecond}
	draft, warmUp, short := long, long, long
	draft.Name, warmUp.Phase, short.Wait = "draft", "warmup", 0
	other := fwd.Record{Step: 3, Err: errors.New("other")}
	for name, rec := range map[string]fwd.Record{
		"draft": draft, "warm-up": warmUp, "short": short, "other": other,
	} {
		observe(name, rec, false)
	}
	observe("the first", missing, true)
	c.advance(time.Minute - 1)
	observe("one too early", long, false)
	c.advance(1)
	observe("the second", long, true)
	if files := flights(t, dir); len(files) != 2 || files[0] != "serve-19700101-010000.000-step-1-rank-2.trace" {
		t.Errorf("files %v", files)
	}
	for range maxFlights {
		c.advance(time.Hour)
		observe("another", missing, true)
	}
	f.stop()
	files := flights(t, dir)
	if len(files) != maxFlights || strings.HasPrefix(files[0], "serve-19700101-01") {
		t.Errorf("files %v, want the last %d", files, maxFlights)
	}
	lines := strings.Count(log.String(), "\n")
	if lines != written || strings.Count(log.String(), "the step took 1.2s") != 1 {
		t.Errorf("%d lines for %d files:\n%s", lines, written, &log)
	}
	f.observe(t.Context(), &missing) // too late, and no harm
}

// TestFlightFails: a directory that goes away is a warning, and leaves nothing half written.
func TestFlightFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "flights")
	var log syncBuffer
	f, err := startFlight(dir, "serve", 0, slog.New(slog.NewTextHandler(&log, nil)), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	f.observe(t.Context(), &fwd.Record{Err: fwd.ErrRankMissing})
	f.stop()
	if !strings.Contains(log.String(), "could not write its trace") || !strings.Contains(log.String(), dir) {
		t.Errorf("log %s", &log)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	exit, out, errs := runServe(t, "-flight", file)
	if exit != 1 || out != "" || !strings.HasPrefix(errs, "serve: -flight: ") {
		t.Errorf("a directory that is a file: exit %d, stdout %q, stderr %q", exit, out, errs)
	}
}

// TestFlightTrace: the file is a trace of Go's runtime, with a task for each step and pass.
func TestFlightTrace(t *testing.T) {
	dir := t.TempDir()
	exit, _, errs := runServe(t, "-requests", "40", "-dp", "2", "-flight", dir, "-flight-step", "1ns")
	files := flights(t, dir)
	if exit != 0 || len(files) != 1 || !strings.Contains(errs, filepath.Join(dir, files[0])) {
		t.Fatalf("exit %d, files %v, stderr %s", exit, files, errs)
	}
	data, err := os.ReadFile(filepath.Join(dir, files[0]))
	if err != nil {
		t.Fatal(err)
	}
	reader, err := xtrace.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	tasks := map[string]int{}
	for {
		event, err := reader.ReadEvent()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if event.Kind() == xtrace.EventTaskBegin {
			name, _, _ := strings.Cut(event.Task().Type, " ")
			tasks[name]++
		}
	}
	if tasks["fwd.step"] == 0 || tasks["fwd.forward"] == 0 || tasks["fwd.coordinate"] == 0 {
		t.Errorf("tasks %v", tasks)
	}
}
