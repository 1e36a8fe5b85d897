package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	rtrace "runtime/trace"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
)

const (
	flightPause = time.Minute // between two files
	maxFlights  = 10          // files of a process in the directory; the oldest goes
	flightAge   = 10 * time.Second
	flightBytes = 16 << 20
)

// flight keeps the last seconds of Go's execution trace in memory, and writes them to a file when
// something has gone wrong.
type flight struct {
	dir, prefix string
	step        time.Duration // a step that takes longer has gone wrong; 0: none has
	now         func() time.Time
	logger      *slog.Logger
	recorder    *rtrace.FlightRecorder

	mu      sync.Mutex
	last    time.Time // a file was asked for
	stopped bool

	requests chan flightRequest
	written  chan struct{} // closed when the last request has been served
}

// flightRequest asks for a file.
type flightRequest struct {
	at     time.Time
	step   uint64
	rank   int
	reason string
}

// startFlight starts to record. The files' names begin with prefix. There can be one recorder in a
// process.
func startFlight(dir, prefix string, step time.Duration, logger *slog.Logger, now func() time.Time) (
	*flight, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	config := rtrace.FlightRecorderConfig{MinAge: max(flightAge, 2*step), MaxBytes: flightBytes}
	f := &flight{
		dir: dir, prefix: prefix, step: step, now: now, logger: logger,
		recorder: rtrace.NewFlightRecorder(config),
		requests: make(chan flightRequest, 1),
		written:  make(chan struct{}),
	}
	if err := f.recorder.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(f.written)
		for r := range f.requests {
			f.serve(r)
		}
	}()
	return f, nil
}

// stop waits for a file that is being written.
func (f *flight) stop() {
	f.mu.Lock()
	f.stopped = true
	close(f.requests)
	f.mu.Unlock()
	<-f.written
	f.recorder.Stop()
}

// observe asks for a file if a record says that a rank was missing, or that a step took too long.
// The pass goes on while it is written.
func (f *flight) observe(_ context.Context, rec *fwd.Record) {
	switch took := rec.Wait + rec.Duration; {
	case errors.Is(rec.Err, fwd.ErrRankMissing):
		f.request(rec, fmt.Sprint(rec.Err))
	case f.step > 0 && took > f.step && rec.Name == "" && rec.Phase != "warmup":
		f.request(rec, fmt.Sprintf("the step took %v, more than %v", took.Round(time.Millisecond), f.step))
	}
}

// request asks for a file, unless there was one within the last minute.
func (f *flight) request(rec *fwd.Record, reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	if f.stopped || !f.last.IsZero() && now.Sub(f.last) < flightPause {
		return
	}
	select {
	case f.requests <- flightRequest{now, rec.Step, rec.Rank, reason}:
		f.last = now
	default: // the one before is still being written
	}
}

// serve writes a file, and says so.
func (f *flight) serve(r flightRequest) {
	path := filepath.Join(f.dir, fmt.Sprintf("%s-%s-step-%d-rank-%d.trace",
		f.prefix, r.at.UTC().Format("20060102-150405.000"), r.step, r.rank))
	if err := cmp.Or(f.write(path), f.prune()); err != nil {
		f.logger.Warn("the flight recorder could not write its trace", "file", path, "error", err.Error())
		return
	}
	f.logger.Warn("the flight recorder wrote a trace; look at it with go tool trace",
		"file", path, "reason", r.reason)
}

// write writes what is recorded to a file, whole or not at all.
func (f *flight) write(path string) (err error) {
	file, err := os.CreateTemp(f.dir, ".flight-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	_, err = f.recorder.WriteTo(file)
	if err := errors.Join(err, file.Chmod(0o644), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

// prune removes the oldest files of this process.
func (f *flight) prune() error {
	files, err := filepath.Glob(filepath.Join(f.dir, f.prefix+"-*-step-*.trace"))
	if err != nil {
		return err
	}
	slices.Sort(files) // by time
	var errs []error
	for _, file := range files[:max(len(files)-maxFlights, 0)] {
		errs = append(errs, os.Remove(file))
	}
	return errors.Join(errs...)
}
