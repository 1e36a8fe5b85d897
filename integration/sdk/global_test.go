// This file tests Runners that use the global providers. These can be set once in a process, so
// each test runs a process of its own.

package sdk_test

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

// childVariable says, in its environment, that a process is one of those that the tests here start.
const childVariable = "FWD_TEST_GLOBAL_PROVIDERS"

// alone reports whether this process is one that runs just this test. If not, it runs the test in
// such a process.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(childVariable) != "" {
		return true
	}
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childVariable+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
	return false
}

// Until an SDK is set nothing is emitted, and a pass costs what it costs without telemetry. From
// then on everything is emitted by Runners that were made before.
func TestGlobalProviders(t *testing.T) {
	if !alone(t) {
		return
	}
	ctx, pass := context.Background(), fwd.Pass{NumTokens: 1}
	clock := newSimClock()
	for name, opts := range map[string][]fwd.Option{"": nil, " with a clock": {fwd.WithClock(clock.Now)}} {
		r, err := fwd.New(fwd.Config{Name: "target"}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		if r.Enabled(ctx) {
			t.Errorf("without SDK a Runner%s is enabled", name)
		}
		if raceEnabled {
			continue
		}
		if n := testing.AllocsPerRun(100, func() { r.Run(ctx, pass, nothing) }); n > 2 {
			t.Errorf("without SDK a pass%s allocates %v times, want at most 2", name, n)
		}
	}
	r, err := fwd.New(fwd.Config{Name: "target"})
	if err != nil {
		t.Fatal(err)
	}
	spans, reader := tracetest.NewSpanRecorder(), sdkmetric.NewManualReader()
	o := &telemetry{spans: spans, reader: reader}
	running := func(want bool) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			if got := trace.SpanFromContext(ctx).IsRecording(); got != want {
				t.Errorf("in the pass a span is recorded: %t, want %t", got, want)
			}
			return nil
		}
	}
	run := func(want bool) {
		t.Helper()
		if err := r.Run(ctx, pass, running(want)); err != nil {
			t.Fatal(err)
		}
	}
	run(false)
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)))
	run(true)
	if len(o.ended("fwd.forward")) != 1 || !r.Enabled(ctx) {
		t.Errorf("%d spans have ended, enabled %t; want 1, true", len(o.ended("fwd.forward")), r.Enabled(ctx))
	}
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	run(true)
	if p := o.onlyPoint(t, "fwd.forward.duration"); p.Count != 1 {
		t.Errorf("fwd.forward.duration %v, want the pass since the SDK was set", p)
	}
	if p := o.onlyPoint(t, "fwd.forward.active"); p.Sum != 0 {
		t.Errorf("fwd.forward.active %v, want 0", p)
	}
	o.onlyPoint(t, "fwd.forward.tokens")
	o.onlyPoint(t, "fwd.graph.events")
	if err := r.Report(ctx, pass, time.Unix(1, 0), time.Unix(2, 0), nil); err != nil {
		t.Fatal(err)
	}
	if len(o.ended("fwd.forward")) != 3 {
		t.Errorf("%d spans have ended, want 3", len(o.ended("fwd.forward")))
	}
}

// A Runner that is made after the SDK was set uses it.
func TestGlobalProvidersSetBefore(t *testing.T) {
	if !alone(t) {
		return
	}
	spans, reader := tracetest.NewSpanRecorder(), sdkmetric.NewManualReader()
	o := &telemetry{spans: spans, reader: reader}
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)))
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	r, err := fwd.New(fwd.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Fatal(err)
	}
	o.only(t, "fwd.forward")
	o.onlyPoint(t, "fwd.forward.duration")
}
