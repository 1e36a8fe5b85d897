package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/pprof"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
)

// watch is what shows a run from outside, as the flags want it.
type watch struct {
	telemetry *telemetry
	debug     *debugServer
	flight    *flight
	profile   *os.File
	sizes     *sizesFile
}

// startWatch starts what the flags want, and makes the engine tell of itself.
func startWatch(
	ctx context.Context, o *options, config *engine.Config, stderr io.Writer,
) (_ *watch, err error) {
	w := &watch{}
	defer func() {
		if err != nil {
			w.stop(io.Discard)
		}
	}()
	name := "serve"
	if o.nats != "" {
		name = fmt.Sprintf("serve-rank-%v", o.ranks)
	}
	if o.cpuProfile != "" {
		if w.profile, err = startProfile(o.cpuProfile); err != nil {
			return nil, fmt.Errorf("-cpuprofile: %w", err)
		}
	}
	if o.sizesOptions.sizes != "" {
		if w.sizes, err = startSizes(o.sizesOptions.sizes); err != nil {
			return nil, fmt.Errorf("-sizes: %w", err)
		}
	}
	if o.flight != "" {
		if w.flight, err = startFlight(o.flight, name, o.flightStep, config.Logger, time.Now); err != nil {
			return nil, fmt.Errorf("-flight: %w", err)
		}
	}
	if o.records() {
		if w.telemetry, err = startTelemetry(ctx, o); err != nil {
			return nil, err
		}
		config.Providers, config.PeerName, config.StepTrace = w.telemetry.of, w.telemetry.peerName, true
	}
	if o.debug != "" {
		if w.debug, err = startDebug(o.debug, w.telemetry.registry, o.ranks); err != nil {
			return nil, fmt.Errorf("-debug: %w", err)
		}
		fmt.Fprintf(stderr, "serve: -debug shows this run at %s\n", w.debug.url())
		config.Started = w.debug.engine.Store
	}
	config.Observe = w.observe
	config.Middleware = func(int) []fwd.Middleware { return []fwd.Middleware{fwd.ProfileLabels()} }
	return w, nil
}

// observe passes on what the ranks do.
func (w *watch) observe(ctx context.Context, rec *fwd.Record) {
	if w.debug != nil {
		w.debug.observe(ctx, rec)
	}
	if w.flight != nil {
		w.flight.observe(ctx, rec)
	}
	if w.sizes != nil && rec.Name == "" { // of the target; a draft model has graphs of its own
		w.sizes.sizes.Observe(ctx, rec)
	}
}

// runEnded ends what is there only while the engine runs.
func (w *watch) runEnded(stderr io.Writer) {
	if w.debug != nil {
		w.debug.stop()
	}
	if w.flight != nil {
		w.flight.stop()
	}
	if w.profile != nil {
		pprof.StopCPUProfile()
		if err := w.profile.Close(); err != nil {
			fmt.Fprintf(stderr, "serve: -cpuprofile: %v\n", err)
		}
	}
	if w.sizes != nil {
		if err := w.sizes.write(); err != nil {
			fmt.Fprintf(stderr, "serve: -sizes: %v\n", err)
		}
	}
	w.debug, w.flight, w.profile, w.sizes = nil, nil, nil, nil
}

// stop delivers the last spans and metrics.
func (w *watch) stop(stderr io.Writer) {
	w.runEnded(stderr)
	if w.telemetry != nil {
		w.telemetry.stop(stderr)
	}
}

// startProfile writes a CPU profile to a file from now on.
func startProfile(path string) (*os.File, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
