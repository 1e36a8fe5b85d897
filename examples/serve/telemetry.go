package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/forwardctx/fwd/fwdtrace"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	promexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// telemetryOptions are the flags that say what a run shows of itself.
type telemetryOptions struct {
	otlp       string
	sample     float64
	debug      string
	cpuProfile string
	flight     string
	flightStep time.Duration
}

func (o *telemetryOptions) define(flags *flag.FlagSet) {
	flags.StringVar(&o.otlp, "otlp", "",
		"send traces and metrics to this OTLP gRPC `endpoint`, host:port,\nwithout TLS")
	flags.Float64Var(&o.sample, "sample", 1,
		"record this `ratio` of the requests, from 0 to 1,\nand the steps that serve them")
	flags.StringVar(&o.debug, "debug", "",
		"show profiles, metrics, status and the last passes at this\n`address`, [host]:port; "+
			"without a host, on this machine alone;\n"+
			"with -processes, rank R has port+R")
	flags.StringVar(&o.cpuProfile, "cpuprofile", "",
		"write a CPU profile of the run to this `file`;\nwith -processes, rank R has file.R")
	flags.StringVar(&o.flight, "flight", "",
		"keep the last seconds of Go's execution trace, and write them\nto this `directory` if a rank is missing")
	flags.DurationVar(&o.flightStep, "flight-step", time.Second,
		"with -flight: also if a step takes longer (0: however long)")
}

func (o *telemetryOptions) validate(ranks int, values map[string]string, bad func(string, ...any)) {
	given := func(name string) bool { _, ok := values[name]; return ok }
	if o.otlp != "" {
		if host, port, err := net.SplitHostPort(o.otlp); err != nil || host == "" || port == "" {
			bad("-otlp is %q, want host:port", o.otlp)
		}
	}
	if o.sample < 0 || o.sample > 1 || math.IsNaN(o.sample) {
		bad("-sample is %v, want 0 to 1", o.sample)
	}
	if given("sample") && o.otlp == "" && o.debug == "" && o.flight == "" {
		bad("-sample is %s: it needs -otlp, -debug or -flight", values["sample"])
	}
	if o.debug != "" {
		if last, err := debugAddress(o.debug, ranks-1); err != nil {
			bad("-debug is %q, want [host]:port", o.debug)
		} else if _, port, _ := net.SplitHostPort(last); given("processes") && !isPort(port) {
			bad("-debug is %q: the last of -dp %d ranks would have port %s", o.debug, ranks, port)
		}
	}
	if given("flight-step") && o.flight == "" {
		bad("-flight-step is %s: it needs -flight", values["flight-step"])
	}
	if o.flightStep < 0 {
		bad("-flight-step is %v, want at least 0", o.flightStep)
	}
}

// ofRank returns the value of a flag for the process of one rank.
func (o *telemetryOptions) ofRank(name, value string, rank int) string {
	switch name {
	case "debug":
		value, _ = debugAddress(value, rank) // the flag is valid
	case "cpuprofile":
		value += "." + strconv.Itoa(rank)
	}
	return value
}

// records reports whether spans and metrics are made at all.
func (o *telemetryOptions) records() bool { return o.otlp != "" || o.debug != "" || o.flight != "" }

// shutdownTimeout bounds how long the program stays to deliver the last spans and metrics, to a
// collector that may not be there.
const (
	spansTimeout    = 5 * time.Second
	metricsTimeout  = 3 * time.Second
	shutdownTimeout = spansTimeout + metricsTimeout
)

// metricInterval is how often metrics are sent.
const metricInterval = 5 * time.Second

// telemetry is where the spans and metrics of the ranks in this process go. Each rank is a service of
// its own. They share one connection, and one queue of spans, which holds up no pass: what doesn't
// fit is dropped, and counted.
type telemetry struct {
	ranks     rankList    // of this process
	providers []providers // in their order
	services  []service   // of all ranks

	registry *prometheus.Registry // nil: nobody reads metrics here
	conn     *grpc.ClientConn     // nil: nothing is sent
	spans    *spanQueue
	points   *pointCounter
	problems problems
}

// providers are where the spans and metrics of a rank go.
type providers struct {
	traces  *sdktrace.TracerProvider
	metrics *sdkmetric.MeterProvider
}

// service is how a rank is known.
type service struct {
	resource *resource.Resource
	name     string // by which other ranks call it
}

// startTelemetry makes the providers of the ranks of this process.
func startTelemetry(ctx context.Context, o *options) (_ *telemetry, err error) {
	// Exporters connect when they have something to send. Their context must outlive an interrupted
	// run.
	ctx = context.WithoutCancel(ctx)
	t := &telemetry{ranks: o.ranks}
	defer func() {
		if err != nil {
			t.stop(io.Discard)
		}
	}()
	for rank := range o.dp {
		s, err := newService(ctx, o.group, rank)
		if err != nil {
			return nil, err
		}
		t.services = append(t.services, s)
	}
	if o.otlp != "" {
		if err := t.connect(ctx, o.otlp, len(o.ranks)); err != nil {
			return nil, fmt.Errorf("-otlp %s: %w", o.otlp, err)
		}
	}
	if o.debug != "" {
		t.registry = newRegistry()
	}
	for _, rank := range o.ranks {
		p, err := t.newProviders(t.services[rank].resource, o.sample)
		if err != nil {
			return nil, err
		}
		t.providers = append(t.providers, p)
	}
	// The default handler would print into the progress bar.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(t.problems.handle))
	return t, t.observeQueue(t.providers[0].metrics)
}

// connect makes what sends spans and metrics to an endpoint.
func (t *telemetry) connect(ctx context.Context, endpoint string, ranks int) (err error) {
	t.conn, err = grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	spans, err := otlptracegrpc.New(ctx, otlptracegrpc.WithGRPCConn(t.conn))
	if err != nil {
		return err
	}
	points, err := otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithGRPCConn(t.conn))
	if err != nil {
		return errors.Join(err, spans.Shutdown(ctx))
	}
	t.spans = newSpanQueue(spans, queueSize(ranks), &t.problems)
	t.points = &pointCounter{Exporter: points, problems: &t.problems}
	return nil
}

func (t *telemetry) newProviders(res *resource.Resource, sample float64) (p providers, err error) {
	traces := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(res),
		sdktrace.WithSampler(fwdtrace.SampleLinked(sdktrace.TraceIDRatioBased(sample))),
	}
	metrics := []sdkmetric.Option{sdkmetric.WithResource(res)}
	if t.conn != nil {
		traces = append(traces, sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(t.spans)))
		metrics = append(metrics, sdkmetric.WithReader(
			sdkmetric.NewPeriodicReader(t.points, sdkmetric.WithInterval(metricInterval))))
	}
	if t.registry != nil {
		reader, err := promexporter.New(promexporter.WithRegisterer(t.registry),
			promexporter.WithResourceAsConstantLabels(
				attribute.NewAllowKeysFilter("service.name", "service.instance.id")))
		if err != nil {
			return p, err
		}
		metrics = append(metrics, sdkmetric.WithReader(reader))
	}
	return providers{sdktrace.NewTracerProvider(traces...), sdkmetric.NewMeterProvider(metrics...)}, nil
}

// of returns the providers of a rank of this process.
func (t *telemetry) of(rank int) (trace.TracerProvider, metric.MeterProvider) {
	p := t.providers[slices.Index(t.ranks, rank)]
	return p.traces, p.metrics
}

// peerName returns the name by which the spans of other ranks call a rank.
func (t *telemetry) peerName(rank int) string { return t.services[rank].name }

// newService returns how a rank of a group is known. What OTEL_SERVICE_NAME and
// OTEL_RESOURCE_ATTRIBUTES say wins. If they give all ranks one name, service.instance.id tells them
// apart, also if that is given.
func newService(ctx context.Context, group string, rank int) (service, error) {
	name, instance := fmt.Sprintf("serve-rank-%d", rank), fmt.Sprintf("%s-%d", group, rank)
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(
			attribute.String("service.name", name),
			attribute.String("service.namespace", "serve"),
			attribute.String("service.instance.id", instance),
		),
		resource.WithFromEnv(),
	)
	if err != nil {
		return service{}, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	if valueOf(res, "service.name") == name {
		return service{res, name}, nil
	}
	if given := valueOf(res, "service.instance.id"); given != instance {
		instance = fmt.Sprintf("%s-%d", given, rank)
		own := resource.NewSchemaless(attribute.String("service.instance.id", instance))
		if res, err = resource.Merge(res, own); err != nil {
			return service{}, err
		}
	}
	return service{res, instance}, nil
}

func valueOf(res *resource.Resource, key attribute.Key) string {
	value, _ := res.Set().Value(key)
	return value.AsString()
}

// stop delivers what is left, and says what has been delivered.
func (t *telemetry) stop(stderr io.Writer) {
	if t.spans != nil {
		ctx, cancel := context.WithTimeout(context.Background(), spansTimeout)
		defer cancel()
		t.problems.handle(t.spans.Shutdown(ctx))
	}
	// The metrics come after the spans: they say what became of them.
	ctx, cancel := context.WithTimeout(context.Background(), metricsTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, p := range t.providers {
		wg.Go(func() { t.problems.handle(p.metrics.Shutdown(ctx)) })
	}
	wg.Wait()
	if t.conn == nil {
		return
	}
	if t.points != nil {
		t.report(stderr)
	}
	_ = t.conn.Close() // nothing is sent any more
}

// report says what became of the spans and metrics.
func (t *telemetry) report(stderr io.Writer) {
	spans, points := t.spans.counts.read(), t.points.counts.read()
	fmt.Fprintf(stderr, "serve: telemetry: %v; %v\n", spans.text("spans"), points.text("metric points"))
	if spans.ended > spans.sent || points.ended > points.sent {
		fmt.Fprintf(stderr, "serve: telemetry is incomplete: %d spans found the queue of %d full, %v\n",
			spans.refused, t.spans.size, t.problems.text())
	}
}

// problems are the errors of a run's telemetry.
type problems struct {
	mu   sync.Mutex
	n    int
	last error
}

// handle notes an error, if err is one.
func (p *problems) handle(err error) {
	if err == nil || errors.As(err, new(noted)) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n++
	p.last = err
}

// note notes the error of an export, and returns it marked, since OpenTelemetry hands it on to a
// handler that all runs of a process share.
func (p *problems) note(err error) error {
	if err == nil {
		return nil
	}
	p.handle(err)
	return noted{err}
}

type noted struct{ error }

func (e noted) Unwrap() error { return e.error }

func (p *problems) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == 0 {
		return "no export failed"
	}
	return fmt.Sprintf("%d exports failed, the last with: %v", p.n, p.last)
}
