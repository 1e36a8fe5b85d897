// Helpers: services in Jaeger under which tests keep their spans, and the engines whose spans these
// are.

package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

const ranks = 4

// protocols are the ways into Jaeger.
var protocols = map[string]func(ctx context.Context, p *process) (sdktrace.SpanExporter, error){
	"grpc": func(ctx context.Context, p *process) (sdktrace.SpanExporter, error) {
		return otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(p.grpc), otlptracegrpc.WithInsecure())
	},
	"http": func(ctx context.Context, p *process) (sdktrace.SpanExporter, error) {
		return otlptracehttp.New(ctx, otlptracehttp.WithEndpoint(p.http), otlptracehttp.WithInsecure())
	},
}

var services atomic.Int64

// service is a name under which one test keeps its spans in a Jaeger.
type service struct {
	*process
	name     string
	began    time.Time
	provider *sdktrace.TracerProvider
	exporter *countingExporter
}

// countingExporter counts the spans that an exporter delivered, and those that it could not
// deliver.
type countingExporter struct {
	sdktrace.SpanExporter
	delivered, failed atomic.Int64
}

func (e *countingExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	if err != nil {
		e.failed.Add(int64(len(spans)))
		return err
	}
	e.delivered.Add(int64(len(spans)))
	return nil
}

// newService returns a new service in the shared Jaeger, with the options and OpenTelemetry's
// defaults.
func newService(t *testing.T, protocol string, options ...sdktrace.TracerProviderOption) *service {
	t.Helper()
	return newServiceIn(t, shared, protocol, nil, options...)
}

func newServiceIn(
	t *testing.T, p *process, protocol string,
	batch []sdktrace.BatchSpanProcessorOption, options ...sdktrace.TracerProviderOption,
) *service {
	t.Helper()
	exporter, err := protocols[protocol](t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(t.Name(), "/")
	s := &service{
		process:  p,
		name:     fmt.Sprintf("%s-%d", name, services.Add(1)),
		began:    time.Now().Add(-time.Minute),
		exporter: &countingExporter{SpanExporter: exporter},
	}
	s.provider = sdktrace.NewTracerProvider(append([]sdktrace.TracerProviderOption{
		sdktrace.WithBatcher(s.exporter, batch...),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", s.name))),
	}, options...)...)
	t.Cleanup(func() { s.flush(t) })
	return s
}

// flush hands all spans over.
func (s *service) flush(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.provider.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}

// spans hands all spans over. It returns what Jaeger holds, as soon as that is as many as were
// exported.
func (s *service) spans(t *testing.T) []Span {
	t.Helper()
	s.flush(t)
	want := int(s.exporter.delivered.Load())
	if want == 0 {
		t.Fatal("nothing was exported")
	}
	var spans []Span
	eventually(t, func(ctx context.Context) (err error) {
		if spans, err = s.query.Spans(ctx, s.name, s.began, 100_000); err == nil && len(spans) != want {
			err = fmt.Errorf("jaeger holds %d spans of %s, %d were exported", len(spans), s.name, want)
		}
		return err
	})
	return spans
}

// find returns the ids of the traces with a span that has these attributes.
func (s *service) find(t *testing.T, tags map[string]string) []string {
	t.Helper()
	ids, err := s.query.Find(t.Context(), s.name, tags, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(ids)
	return ids
}

// trace returns a trace's spans.
func (s *service) trace(t *testing.T, id string) []Span {
	t.Helper()
	spans, err := s.query.Trace(t.Context(), id)
	if err != nil || len(spans) == 0 {
		t.Fatalf("trace %s: %d spans, %v", id, len(spans), err)
	}
	return spans
}

// byTrace returns spans by their trace.
func byTrace(spans []Span) map[string][]Span {
	traces := map[string][]Span{}
	for _, s := range spans {
		traces[s.TraceID] = append(traces[s.TraceID], s)
	}
	return traces
}

// named returns the spans whose name is that word or begins with it.
func named(spans []Span, operation string) []Span {
	return slices.DeleteFunc(slices.Clone(spans), func(s Span) bool { return s.Operation() != operation })
}

// steps returns the traces of steps in which passes ran. Other traces are those of requests, of the
// warm-up, and of exchanges after which nobody ran, since no rank had anything to do.
func steps(spans []Span) map[string][]Span {
	traces := byTrace(spans)
	for id, spans := range traces {
		if len(named(spans, "warm-up")) > 0 || len(named(spans, "fwd.forward")) == 0 {
			delete(traces, id)
		}
	}
	return traces
}

// counts are what OpenTelemetry's own metrics say about the spans of this process: how many a span
// processor dropped because its queue was full, how many were exported, and how many were not
// although an exporter had them.
type counts struct{ dropped, exported, failed int64 }

func (c counts) minus(d counts) counts {
	return counts{c.dropped - d.dropped, c.exported - d.exported, c.failed - d.failed}
}

var (
	ownMetrics  = sdkmetric.NewManualReader()
	ownRegistry = prometheus.NewRegistry() // has the same
)

// countDrops makes OpenTelemetry count what becomes of spans, as a program does that wants to know.
// It is the only use of a global provider here.
func countDrops() error {
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(ownRegistry))
	if err != nil {
		return err
	}
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(
		sdkmetric.WithReader(ownMetrics), sdkmetric.WithReader(exporter)))
	// Failed exports are counted. The default handler would print them too.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(error) {}))
	return os.Setenv("OTEL_GO_X_OBSERVABILITY", "true")
}

func readCounts(t *testing.T) counts {
	t.Helper()
	var data metricdata.ResourceMetrics
	if err := ownMetrics.Collect(context.Background(), &data); err != nil {
		t.Fatal(err)
	}
	var c counts
	for _, scope := range data.ScopeMetrics {
		for _, m := range scope.Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if !ok {
				continue
			}
			for _, point := range sum.DataPoints {
				c.add(m.Name, point.Value, point.Attributes.HasValue("error.type"))
			}
		}
	}
	return c
}

func (c *counts) add(name string, n int64, failed bool) {
	switch {
	case name == "otel.sdk.processor.span.processed" && failed:
		c.dropped += n
	case name == "otel.sdk.exporter.span.exported" && failed:
		c.failed += n
	case name == "otel.sdk.exporter.span.exported":
		c.exported += n
	}
}

// config returns the configuration of an engine that shows everything: graphs, microbatches, and
// steps across all ranks. It sends its spans to the service.
func (s *service) config() engine.Config { return config(s.provider) }

func config(provider trace.TracerProvider) engine.Config {
	return engine.Config{
		DataParallelSize: ranks,
		GraphMode:        fwd.GraphFullAndPiecewise,
		NumUBatches:      2,
		StepTrace:        true,
		TracerProvider:   provider,
		MeterProvider:    noop.NewMeterProvider(),
	}
}

// newEngine returns an engine with the small model.
func newEngine(t *testing.T, c engine.Config) *engine.Engine {
	t.Helper()
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(model.New(weights), c)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// serve runs requests to their end.
func serve(t *testing.T, c engine.Config, requests []engine.Request) ([]engine.Result, engine.Stats) {
	t.Helper()
	results, stats, err := newEngine(t, c).Run(t.Context(), requests)
	if err != nil {
		t.Fatal(err)
	}
	if stats.Finished != len(requests) {
		t.Fatalf("%d of %d requests finished", stats.Finished, len(requests))
	}
	return results, stats
}

// newRequests returns n requests with prompts of 1 to maxPrompt tokens and answers of 1 to
// maxAnswer.
func newRequests(n, maxPrompt, maxAnswer int) []engine.Request {
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	requests := make([]engine.Request, n)
	for i := range requests {
		prompt := make([]int, 1+rng.IntN(maxPrompt))
		requests[i] = engine.Request{ID: i, Prompt: prompt, MaxTokens: 1 + rng.IntN(maxAnswer)}
		for p := range prompt {
			prompt[p] = rng.IntN(256)
		}
	}
	return requests
}

// inRank returns middleware for one rank of an engine.
func inRank(rank int, middleware fwd.Middleware) func(int) []fwd.Middleware {
	return func(r int) []fwd.Middleware {
		if r != rank {
			return nil
		}
		return []fwd.Middleware{middleware}
	}
}

// nthPass is middleware that calls do instead of the model in the n-th pass that serves requests.
func nthPass(n int64, do func(ctx context.Context, next fwd.ForwardFunc) error) fwd.Middleware {
	var passes atomic.Int64
	return func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			if !fwd.MustFromContext(ctx).Dummy && passes.Add(1) == n {
				return do(ctx, next)
			}
			return next(ctx)
		}
	}
}
