// What the program sends to a collector, and what it says about that.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
)

// received is a span with the service that has sent it.
type received struct {
	*tracepb.Span
	resource map[string]string
}

// text returns an attribute as text; "" if there is none.
func (s *received) text(key string) string { return texts(s.Attributes)[key] }

func texts(attrs []*commonpb.KeyValue) map[string]string {
	all := map[string]string{}
	for _, a := range attrs {
		switch v := a.Value.Value.(type) {
		case *commonpb.AnyValue_StringValue:
			all[a.Key] = v.StringValue
		case *commonpb.AnyValue_IntValue:
			all[a.Key] = strconv.FormatInt(v.IntValue, 10)
		}
	}
	return all
}

// collector is an OTLP receiver that keeps spans, and the names of metrics by service.
type collector struct {
	collectortrace.UnimplementedTraceServiceServer
	mu      sync.Mutex
	spans   []*received
	metrics map[string]map[string]bool // services by metric
	points  int
}

type metricsService struct {
	collectormetrics.UnimplementedMetricsServiceServer
	*collector
}

func (c *collector) Export(
	_ context.Context,
	in *collectortrace.ExportTraceServiceRequest,
) (*collectortrace.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range in.ResourceSpans {
		resource := texts(r.Resource.Attributes)
		for _, s := range r.ScopeSpans {
			for _, span := range s.Spans {
				c.spans = append(c.spans, &received{span, resource})
			}
		}
	}
	return &collectortrace.ExportTraceServiceResponse{}, nil
}

func (c metricsService) Export(
	_ context.Context,
	in *collectormetrics.ExportMetricsServiceRequest,
) (*collectormetrics.ExportMetricsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range in.ResourceMetrics {
		service := texts(r.Resource.Attributes)["service.name"]
		for _, s := range r.ScopeMetrics {
			for _, m := range s.Metrics {
				if c.metrics[m.Name] == nil {
					c.metrics[m.Name] = map[string]bool{}
				}
				c.metrics[m.Name][service] = true
				c.points += len(m.GetSum().GetDataPoints()) + len(m.GetGauge().GetDataPoints()) +
					len(m.GetHistogram().GetDataPoints())
			}
		}
	}
	return &collectormetrics.ExportMetricsServiceResponse{}, nil
}

// startCollector returns a collector, and where it listens.
func startCollector(t *testing.T) (*collector, string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{metrics: map[string]map[string]bool{}}
	server := grpc.NewServer()
	collectortrace.RegisterTraceServiceServer(server, c)
	collectormetrics.RegisterMetricsServiceServer(server, metricsService{collector: c})
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return c, listener.Addr().String()
}

// count returns how many spans have a name that begins like this.
func (c *collector) count(prefix string) (n int) {
	for _, s := range c.spans {
		if strings.HasPrefix(s.Name, prefix) {
			n++
		}
	}
	return n
}

// traces returns how many traces there are.
func (c *collector) traces() int {
	ids := map[string]bool{}
	for _, s := range c.spans {
		ids[string(s.TraceId)] = true
	}
	return len(ids)
}

// checkValues checks which values an attribute of the resources has.
func (c *collector) checkValues(t *testing.T, key string, want ...string) {
	t.Helper()
	values := map[string]bool{}
	for _, s := range c.spans {
		values[s.resource[key]] = true
	}
	if got := slices.Sorted(maps.Keys(values)); !slices.Equal(got, want) {
		t.Errorf("%s is %v, want %v", key, got, want)
	}
}

// checkLinks checks that every link leads to a span that was sent.
func (c *collector) checkLinks(t *testing.T) (links int) {
	t.Helper()
	ids := map[string]bool{}
	for _, s := range c.spans {
		ids[string(s.SpanId)] = true
	}
	for _, s := range c.spans {
		for _, l := range s.Links {
			links++
			if !ids[string(l.SpanId)] {
				t.Errorf("a link of %s leads nowhere", s.Name)
			}
		}
	}
	return links
}

// lastLine is what the program says about its telemetry when all went well.
var lastLine = regexp.MustCompile(
	`^serve: telemetry: (\d+) spans ended, (\d+) sent, (\d+) dropped; ` +
		`(\d+) metric points ended, (\d+) sent, 0 dropped\n$`)

// checkSent checks that the program says how much it has sent, and that the collector has it.
func (c *collector) checkSent(t *testing.T, stderr string) {
	t.Helper()
	said := lastLine.FindStringSubmatch(stderr)
	if said == nil {
		t.Fatalf("stderr %q", stderr)
	}
	spans, points := strconv.Itoa(len(c.spans)), strconv.Itoa(c.points)
	if diff := cmp.Diff([]string{spans, spans, "0", points, points}, said[1:]); diff != "" {
		t.Errorf("it says otherwise than the collector (-collector +said):\n%s", diff)
	}
}

// TestTelemetry: each rank is a service that sends its own spans and metrics, and waits for others by
// their names.
func TestTelemetry(t *testing.T) {
	c, endpoint := startCollector(t)
	exit, out, errs := runServe(t, "-requests", "5", "-max-context", "30", "-json", "-otlp", endpoint)
	var got report
	if err := json.Unmarshal([]byte(out), &got); exit != 0 || err != nil {
		t.Fatalf("exit %d, stderr %q, %v", exit, errs, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.checkSent(t, errs)
	passes := c.count("fwd.forward ") / 4
	if c.count("request") != 5 || c.count("warm-up") != 1 || passes <= got.Steps {
		t.Errorf("%d requests, %d warm-ups, %d passes of each rank in %d steps",
			c.count("request"), c.count("warm-up"), passes, got.Steps)
	}
	// Each pass has an exchange, those of the warm-up too, and one more ends the warm-up. That which
	// ends the run is of a step in which nobody ran.
	if exchanges, want := c.count("fwd.coordinate"), 4*(passes+1); exchanges != want {
		t.Errorf("%d exchanges of 4 ranks with %d passes each, want %d", exchanges, passes, want)
	}
	// The requests and the warm-up are traces of their own.
	if want := got.Steps + 5 + 1; c.traces() != want {
		t.Errorf("%d traces, want %d", c.traces(), want)
	}
	for _, s := range c.spans {
		name, rank := s.resource["service.name"], s.text("fwd.dp.rank")
		if rank != "" && name != "serve-rank-"+rank || s.resource["service.namespace"] != "serve" {
			t.Errorf("%s of rank %s is of %v", s.Name, rank, s.resource)
		}
		if peer := s.text("peer.service"); peer != "" && (!strings.HasPrefix(peer, "serve-rank-") || peer == name) {
			t.Errorf("%s of %s waits for %q", s.Name, name, peer)
		}
	}
	c.checkValues(t, "service.instance.id", "serve-0", "serve-1", "serve-2", "serve-3")
	c.checkLinks(t)
	for metric, services := range map[string]int{
		"fwd.forward.duration": 4, "serve.num_requests_running": 4, "serve.kv_cache_blocks_used": 4,
		"gen_ai.server.time_to_first_token": 4, "otel.sdk.exporter.span.exported": 1,
	} {
		if len(c.metrics[metric]) != services {
			t.Errorf("%s is of services %v, want %d", metric, c.metrics[metric], services)
		}
	}
}

// TestTelemetrySample: nothing is sent of a request that is not sampled, and no link leads nowhere.
func TestTelemetrySample(t *testing.T) {
	c, endpoint := startCollector(t)
	exit, _, errs := runServe(t, "-requests", "60", "-max-context", "30", "-otlp", endpoint, "-sample", "0.1")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.checkSent(t, errs)
	links := c.checkLinks(t)
	if n := c.count("request"); exit != 0 || n == 60 || n > 0 && links == 0 {
		t.Errorf("exit %d, %d of 60 requests, %d links", exit, n, links)
	}
}

// TestTelemetryMuch: with more spans than fit into a queue of the usual size, nothing is lost.
func TestTelemetryMuch(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes it too slow to fill the queue")
	}
	c, endpoint := startCollector(t)
	exit, _, errs := runServe(t, "-requests", "30", "-max-context", "60", "-dp", "16", "-spec", "4",
		"-ubatches", "2", "-otlp", endpoint)
	c.mu.Lock()
	defer c.mu.Unlock()
	if exit != 0 || len(c.spans) < 10_000 {
		t.Errorf("exit %d, %d spans", exit, len(c.spans))
	}
	c.checkSent(t, errs)
}

// TestTelemetryAbsent: a collector that isn't there, or never answers, costs a message and a
// bounded time.
func TestTelemetryAbsent(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, as the kernel does, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, endpoint := range []string{"127.0.0.1:1", silent.Addr().String()} {
		t.Run(endpoint, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			exit, out, errs := runServe(t, "-requests", "12", "-max-context", "20", "-dp", "2", "-check", "-otlp",
				endpoint)
			said := regexp.MustCompile(`(?s)telemetry: (\d+) spans ended, 0 sent, (\d+) dropped; .*` +
				`telemetry is incomplete: 0 spans found the queue of \d+ full, \d+ exports failed, the last with: `).
				FindStringSubmatch(errs)
			if exit != 0 || !strings.HasSuffix(out, "check: 12 of 12 requests agree with the reference\n") ||
				said == nil || said[1] != said[2] || said[1] == "0" {
				t.Errorf("exit %d, stderr %q, stdout %s", exit, errs, out)
			}
			if took := time.Since(began); took > shutdownTimeout+time.Minute {
				t.Errorf("took %v", took)
			}
		})
	}
}

// TestProcessesTelemetry: every process sends what it does, and the steps of all of them are traces
// in common.
func TestProcessesTelemetry(t *testing.T) {
	c, endpoint := startCollector(t)
	p := start(t, "-processes", "-dp", "3", "-requests", "5", "-max-context", "30", "-json", "-otlp", endpoint)
	exit := p.wait()
	var r report
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil || exit != 0 {
		t.Fatalf("exit %d, %v, stderr %s", exit, err, &p.stderr)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	passes := c.count("fwd.forward ") / 3
	if c.count("request") != 5 || c.count("warm-up") != 1 || passes <= r.Steps {
		t.Errorf("%d requests, %d warm-ups, %d passes of each of 3 ranks in %d steps", c.count("request"),
			c.count("warm-up"), passes, r.Steps)
	}
	if got, want := c.count("fwd.coordinate"), 3*(passes+1); got != want {
		t.Errorf("%d exchanges of 3 ranks with %d passes each, want %d", got, passes, want)
	}
	if want := r.Steps + 5 + 1; c.traces() != want {
		t.Errorf("%d traces, want %d", c.traces(), want)
	}
	c.checkValues(t, "service.name", "serve-rank-0", "serve-rank-1", "serve-rank-2")
	if n := strings.Count(p.stderr.String(), " sent, 0 dropped; "); n != 3 {
		t.Errorf("%d ranks say that all was sent: %s", n, &p.stderr)
	}
}

// TestServices: what the environment says of a service wins, and ranks are told apart all the same.
func TestServices(t *testing.T) {
	for name, c := range map[string]struct{ service, attributes, want string }{
		"nothing":            {"", "", "serve-rank-1 serve g-1, called serve-rank-1"},
		"a name":             {"llm", "", "llm serve g-1, called g-1"},
		"attributes":         {"", "service.namespace=prod,service.name=llm", "llm prod g-1, called g-1"},
		"name before":        {"llm", "service.name=other", "llm serve g-1, called g-1"},
		"an instance":        {"", "service.instance.id=pod", "serve-rank-1 serve pod, called serve-rank-1"},
		"name and instance":  {"llm", "service.instance.id=pod", "llm serve pod-1, called pod-1"},
		"something else too": {"", "host.name=h", "serve-rank-1 serve g-1, called serve-rank-1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("OTEL_SERVICE_NAME", c.service)
			t.Setenv("OTEL_RESOURCE_ATTRIBUTES", c.attributes)
			s, err := newService(t.Context(), "g", 1)
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprintf("%s %s %s, called %s", valueOf(s.resource, "service.name"),
				valueOf(s.resource, "service.namespace"), valueOf(s.resource, "service.instance.id"), s.name)
			if got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "nonsense")
	_, err := newService(t.Context(), "g", 1)
	if err == nil || !strings.Contains(err.Error(), "OTEL_RESOURCE_ATTRIBUTES") {
		t.Errorf("%v, want one that names OTEL_RESOURCE_ATTRIBUTES", err)
	}
}

// blocked is an exporter that exports when it may, and fails then.
type blocked struct{ may chan error }

func (b blocked) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error { return <-b.may }
func (b blocked) Shutdown(context.Context) error                             { return nil }

// TestSpanQueue: a queue holds so many spans, counts what it refuses, and shows all that as metrics.
func TestSpanQueue(t *testing.T) {
	t.Parallel()
	b := blocked{make(chan error)}
	tel := &telemetry{points: &pointCounter{}, conn: new(grpc.ClientConn)}
	tel.spans = newSpanQueue(b, 4, &tel.problems)
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(tel.spans)).Tracer("test")
	for range 10 {
		_, span := tracer.Start(t.Context(), "span")
		span.End()
	}
	if got := tel.spans.counts.read(); got != (tally{ended: 10, refused: 6}) || tel.spans.waiting.Load() != 4 {
		t.Errorf("%+v, %d waiting; want a queue of 4 full", got, tel.spans.waiting.Load())
	}
	failed := errors.New("the collector says no")
	go func() { b.may <- failed; close(b.may) }() // of two batches, the first fails
	if err := tel.spans.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if got := tel.spans.counts.read(); got != (tally{ended: 10, refused: 6, sent: 2, failed: 2}) {
		t.Errorf("%+v, want 2 sent, 2 failed", got)
	}
	if got, want := tel.problems.text(), "1 exports failed, the last with: the collector says no"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	checkQueueMetrics(t, tel, map[string]int64{
		"otel.sdk.processor.span.processed": 4, "otel.sdk.processor.span.processed queue_full": 6,
		"otel.sdk.exporter.span.exported": 2, "otel.sdk.exporter.span.exported _OTHER": 2,
		"otel.sdk.exporter.metric_data_point.exported": 0, "otel.sdk.exporter.metric_data_point.exported _OTHER": 0,
		"otel.sdk.processor.span.queue.size": 0,
	})
}

// checkQueueMetrics compares the metrics of a queue, with their error.type.
func checkQueueMetrics(t *testing.T, tel *telemetry, want map[string]int64) {
	t.Helper()
	reader := sdkmetric.NewManualReader()
	if err := tel.observeQueue(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))); err != nil {
		t.Fatal(err)
	}
	var data metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &data); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for _, m := range data.ScopeMetrics[0].Metrics {
		for _, p := range m.Data.(metricdata.Sum[int64]).DataPoints {
			word, _ := p.Attributes.Value(attribute.Key("error.type"))
			got[strings.TrimSpace(m.Name+" "+word.AsString())] = p.Value
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if n := countPoints(&data); n != int64(len(want)) {
		t.Errorf("%d data points are counted, want %d", n, len(want))
	}
}

func TestBadTelemetryFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-otlp nowhere", `serve: -otlp is "nowhere", want host:port`},
		{"-sample 1.5 -otlp h:1", "serve: -sample is 1.5, want 0 to 1"},
		{"-sample NaN -otlp h:1", "serve: -sample is NaN, want 0 to 1"},
		{"-sample 0.5", "serve: -sample is 0.5: it needs -otlp, -debug or -flight"},
		{"-debug 80", `serve: -debug is "80", want [host]:port`},
		{"-debug :http", `serve: -debug is ":http", want [host]:port`},
		{"-debug :65534 -processes", `serve: -debug is ":65534": the last of -dp 4 ranks would have port 65537`},
		{"-flight-step 1s", "serve: -flight-step is 1s: it needs -flight"},
		{"-flight d -flight-step -1s", "serve: -flight-step is -1s, want at least 0"},
	} {
		exit, out, errs := runServe(t, strings.Fields(c.args)...)
		if exit != 2 || out != "" || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q; want 2 and %q", c.args, exit, out, errs, c.want)
		}
	}
}

// TestTracesNotSent: passes are recorded for -debug, but a trace that nobody can look for is not named.
func TestTracesNotSent(t *testing.T) {
	exit, out, errs := runServe(t, "-requests", "5", "-max-context", "20", "-json", "-debug", "127.0.0.1:0")
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil || exit != 0 || len(r.Slowest) == 0 {
		t.Fatalf("exit %d, %v, stderr %q, %d slowest steps", exit, err, errs, len(r.Slowest))
	}
	for _, s := range r.Slowest {
		if s.Trace != "" {
			t.Errorf("step %d names the trace %s", s.Step, s.Trace)
		}
	}
}
