package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	collector "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/grpc"
)

// sample is one line of what Prometheus scrapes.
type sample struct {
	name   string // with _bucket, _sum, _count
	labels map[string]string
	value  float64
}

// scrape returns what Prometheus would read at url.
func scrape(ctx context.Context, url string) ([]sample, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(response.Body)
		return nil, fmt.Errorf("%s: %s: %s", url, response.Status, body)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(response.Body)
	if err != nil {
		return nil, err
	}
	var samples []sample
	for name, family := range families {
		for _, m := range family.Metric {
			labels := map[string]string{}
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			switch {
			case m.Counter != nil:
				samples = append(samples, sample{name, labels, m.Counter.GetValue()})
			case m.Histogram != nil:
				samples = append(samples,
					sample{name + "_count", labels, float64(m.Histogram.GetSampleCount())},
					sample{name + "_sum", labels, m.Histogram.GetSampleSum()})
				for _, b := range m.Histogram.Bucket {
					le := maps.Clone(labels)
					le["le"] = strconv.FormatFloat(b.GetUpperBound(), 'g', -1, 64)
					samples = append(samples, sample{name + "_bucket", le, float64(b.GetCumulativeCount())})
				}
			}
		}
	}
	return samples, nil
}

// sum adds up the samples of a name that have these labels, by the values of the labels in by.
func sum(samples []sample, name string, labels map[string]string, by ...string) map[string]float64 {
	sums := map[string]float64{}
	for _, s := range samples {
		matches := s.name == name
		for k, v := range labels {
			matches = matches && s.labels[k] == v
		}
		if !matches {
			continue
		}
		var group []string
		for _, label := range by {
			group = append(group, s.labels[label])
		}
		sums[strings.Join(group, " ")] += s.value
	}
	return sums
}

// TestSpanMetrics: the configuration that users copy gives rates, errors and durations by graph mode and rank.
func TestSpanMetrics(t *testing.T) {
	const decodes, prompts, failures = 5, 3, 2
	s := newService(t, "grpc")
	g := newGroup(t, fwd.DispatcherConfig{Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4}, MaxNumSeqs: 4}, fwd.ParallelConfig{},
		fwd.WithStepTrace(), fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
	large := []fwd.Schedule{tokens(9), tokens(9), tokens(9), tokens(9)}
	fail := func(_ context.Context, rank int) error {
		if rank == 3 {
			return &layerError{}
		}
		return nil
	}
	for range decodes {
		if err := g.step(t.Context(), decoding(), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range prompts {
		if err := g.step(t.Context(), large, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range failures {
		if want := new(layerError); !errors.As(g.step(t.Context(), large, nil, fail), &want) {
			t.Fatal("no rank failed")
		}
	}
	seconds := map[string]float64{}
	for _, pass := range named(s.spans(t), "fwd.forward") {
		seconds[fmt.Sprint(pass.Attributes["fwd.graph.mode"], " ", pass.Attributes["fwd.dp.rank"])] += pass.Duration().Seconds()
	}

	passes := map[string]string{"service_name": s.name, "span_name": "fwd.forward"}
	failed := map[string]string{"service_name": s.name, "span_name": "fwd.forward", "status_code": "STATUS_CODE_ERROR", "error_type": "not_a_number"}
	rates := map[string]float64{}
	for rank := range ranks {
		rates[fmt.Sprint("FULL ", rank)] = decodes
		rates[fmt.Sprint("NONE ", rank)] = prompts + failures
	}
	eventually(t, func(ctx context.Context) error {
		samples, err := scrape(ctx, s.metrics)
		if err != nil {
			return err
		}
		by := []string{"fwd_graph_mode", "fwd_dp_rank"}
		diff := cmp.Diff(rates, sum(samples, "traces_span_metrics_calls_total", passes, by...)) +
			cmp.Diff(map[string]float64{"NONE 3": failures}, sum(samples, "traces_span_metrics_calls_total", failed, by...)) +
			cmp.Diff(rates, sum(samples, "traces_span_metrics_duration_seconds_count", passes, by...)) +
			cmp.Diff(seconds, sum(samples, "traces_span_metrics_duration_seconds_sum", passes, by...), approximately)
		if diff != "" {
			return fmt.Errorf("span metrics (-want +got):\n%s", diff)
		}
		return nil
	})
}

var approximately = cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) <= 1e-9*math.Max(math.Abs(a), math.Abs(b)) })

// longRun is passes of every batch size, over and over, on all ranks, one of which is idle. Each pass and each exchange takes
// 3 ms, by the Runners' clocks.
type longRun struct {
	group                                                   *group
	passes, dummies, exchanges, tokens, graphPadding, eager int
	dpPadding                                               int
}

const (
	maxTokens  = 700
	maxCapture = 512
	maxSeqs    = 64
)

func newLongRun(t *testing.T, provider *sdkmetric.MeterProvider) *longRun {
	t.Helper()
	start := time.Now()
	clock := func() func() time.Time { // each rank's own
		var mu sync.Mutex
		var calls time.Duration
		return func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			calls++
			return start.Add(calls * 3 * time.Millisecond)
		}
	}
	return &longRun{group: newGroupOf(t, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: fwd.DefaultCaptureSizes(maxCapture), MaxNumSeqs: maxSeqs,
	}, fwd.ParallelConfig{}, func() []fwd.Option {
		return []fwd.Option{fwd.WithMeterProvider(provider), fwd.WithTracerProvider(tracenoop.NewTracerProvider()), fwd.WithClock(clock())}
	})}
}

func (r *longRun) step(t *testing.T, n int, s fwd.Schedule) {
	t.Helper()
	if err := r.group.step(t.Context(), []fwd.Schedule{s, s, s, {}}, nil, nil); err != nil {
		t.Fatal(err)
	}
	r.passes += ranks - 1
	r.dummies++
	r.exchanges += ranks
	r.tokens += (ranks-1)*n + 1
	if n > maxCapture {
		r.eager += ranks
		return
	}
	sizes := fwd.DefaultCaptureSizes(maxCapture)
	at, _ := slices.BinarySearch(sizes, n)
	r.graphPadding += (ranks - 1) * (sizes[at] - n)
	r.dpPadding += sizes[at] - 1 // of the idle rank
}

func (r *longRun) everySize(t *testing.T) {
	t.Helper()
	for n := 2; n <= maxTokens; n++ {
		r.step(t, n, tokens(n))
	}
	for n := 1; n <= maxSeqs; n++ {
		r.step(t, n, tokens(slices.Repeat([]int{1}, n)...))
	}
}

// numSeries is how many attribute sets fwd.forward.duration has after that: for each size of a mixed batch that has a
// graph (a batch of one token is a decode batch), for each size of a decode batch, and one for all that are too large; and as
// many for the dummy passes beside them.
func numSeries() int {
	mixed := len(fwd.DefaultCaptureSizes(maxCapture)) - 1
	decode := len(fwd.DefaultCaptureSizes(maxSeqs))
	return 2 * (mixed + decode + 1)
}

// check compares what Prometheus scrapes with what ran.
func (r *longRun) check(samples []sample, job map[string]string) error {
	one := func(name string, by ...string) map[string]float64 { return sum(samples, name, job, by...) }
	all := float64(r.passes + r.dummies)
	want, got := map[string]any{}, map[string]any{}
	compare := func(name string, w, g map[string]float64) { want[name], got[name] = w, g }
	compare("passes", map[string]float64{"false": float64(r.passes), "true": float64(r.dummies)}, one("fwd_forward_duration_seconds_count", "fwd_dummy"))
	compare("seconds", map[string]float64{"": all * 0.003}, one("fwd_forward_duration_seconds_sum"))
	compare("at most 2 and 4 ms", map[string]float64{"0.002": 0, "0.004": all}, pick(one("fwd_forward_duration_seconds_bucket", "le"), "0.002", "0.004"))
	compare("tokens", map[string]float64{"": float64(r.tokens)}, one("fwd_forward_tokens_sum"))
	compare("passes with tokens", map[string]float64{"": all}, one("fwd_forward_tokens_count"))
	compare("padding", map[string]float64{"graph": float64(r.graphPadding), "dp": float64(r.dpPadding)}, one("fwd_padding_total", "fwd_padding_kind"))
	compare("exchanges", map[string]float64{"": float64(r.exchanges)}, one("fwd_coordinate_duration_seconds_count"))
	compare("waiting", map[string]float64{"": float64(r.exchanges) * 0.003}, one("fwd_coordinate_duration_seconds_sum"))
	compare("events", map[string]float64{"eager": float64(r.eager)}, one("fwd_graph_events_total", "fwd_graph_event"))
	series := map[string]float64{}
	for _, s := range samples {
		if _, other := sum([]sample{s}, s.name, job)[""]; other && strings.HasSuffix(s.name, "_count") {
			series[s.name]++
		}
	}
	compare("series", map[string]float64{
		"fwd_forward_duration_seconds_count":    float64(numSeries()),
		"fwd_forward_tokens_count":              6, // three modes, dummies or not
		"fwd_coordinate_duration_seconds_count": 1,
	}, series)
	if diff := cmp.Diff(want, got, approximately); diff != "" {
		return fmt.Errorf("metrics (-want +got):\n%s", diff)
	}
	return nil
}

func pick(m map[string]float64, keys ...string) map[string]float64 {
	picked := map[string]float64{}
	for _, k := range keys {
		picked[k] = m[k]
	}
	return picked
}

// The questions of the README, as queries of the metrics and as queries of the spans' metrics. TestQueries has their answers.
var queries = map[string]string{
	"how long does a batch of this size take": `histogram_quantile(0.5, sum by (fwd_batch_bucket, le) (rate(fwd_forward_duration_seconds_bucket{fwd_dummy="false"}[5m])))`,
	"how much is padding, and of which kind":  `sum by (fwd_padding_kind) (rate(fwd_padding_total[5m])) / scalar(sum(rate(fwd_forward_tokens_sum[5m])))`,
	"how long do ranks wait for each other":   `histogram_quantile(0.99, sum by (le) (rate(fwd_coordinate_duration_seconds_bucket[5m])))`,
	"how many graphs are replayed":            `sum by (fwd_graph_event) (rate(fwd_graph_events_total[5m]))`,
}

var spanQueries = map[string]string{
	"how many passes fail, on which rank": `sum by (fwd_graph_mode, fwd_dp_rank) (rate(traces_span_metrics_calls_total{span_name="fwd.forward",status_code="STATUS_CODE_ERROR"}[5m]))`,
	"how long do passes take, by rank":    `histogram_quantile(0.5, sum by (fwd_graph_mode, fwd_dp_rank, le) (rate(traces_span_metrics_duration_seconds_bucket{span_name="fwd.forward"}[5m])))`,
}

// checkQueries checks that the metrics and labels of queries exist.
func checkQueries(t *testing.T, queries map[string]string, samples []sample) {
	t.Helper()
	metric := regexp.MustCompile(`\b(?:fwd|traces)_[a-z_]+[{[]`) // before a selector or a range
	label := regexp.MustCompile(`\b(?:fwd_[a-z_]+|le|span_name|status_code)\b`)
	for question, query := range queries {
		names := metric.FindAllString(query, -1)
		for i := range names {
			names[i] = names[i][:len(names[i])-1]
		}
		if len(names) == 0 {
			t.Errorf("%s: no metric in %s", question, query)
		}
		labels := map[string]bool{}
		for _, s := range samples {
			if slices.Contains(names, s.name) {
				for l := range s.labels {
					labels[l] = true
				}
			}
		}
		for _, name := range names {
			if len(sum(samples, name, nil)) == 0 {
				t.Errorf("%s: there is no metric %s", question, name)
			}
		}
		for _, l := range label.FindAllString(metric.ReplaceAllString(query, ""), -1) {
			if !labels[l] {
				t.Errorf("%s: no sample has the label %s", question, l)
			}
		}
	}
}

// newPrometheus returns OpenTelemetry's Prometheus exporter, and where Prometheus would scrape it until the test ends.
func newPrometheus(t *testing.T) (_ *otelprometheus.Exporter, url string) {
	t.Helper()
	registry := prometheus.NewRegistry()
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	t.Cleanup(server.Close)
	return exporter, server.URL
}

// TestPrometheus: the metrics through OpenTelemetry's Prometheus exporter, after a long run with every batch size. Their number
// is bounded: twice the run has the same series.
func TestPrometheus(t *testing.T) {
	exporter, url := newPrometheus(t)
	r := newLongRun(t, sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter)))
	for range 2 {
		r.everySize(t)
		samples, err := scrape(t.Context(), url)
		if err == nil {
			err = r.check(samples, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		checkQueries(t, queries, samples)
	}
}

// TestMetricsOverOTLP: the same metrics through the collector in Jaeger's binary, which gives them to Prometheus.
func TestMetricsOverOTLP(t *testing.T) {
	exporter, err := otlpmetricgrpc.New(t.Context(), otlpmetricgrpc.WithEndpoint(shared.grpc), otlpmetricgrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	provider := sdkmetric.NewMeterProvider(
		sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(time.Hour))),
		sdkmetric.WithResource(resource.NewSchemaless(attribute.String("service.name", t.Name()))))
	r := newLongRun(t, provider)
	r.everySize(t)
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	var samples []sample
	eventually(t, func(ctx context.Context) (err error) {
		if samples, err = scrape(ctx, shared.metrics); err != nil {
			return err
		}
		return r.check(samples, map[string]string{"job": t.Name()})
	})
	checkQueries(t, queries, samples)
	// Some spans, for the queries of their metrics.
	s := newService(t, "grpc")
	g := newGroup(t, fwd.DispatcherConfig{}, fwd.ParallelConfig{}, fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
	if err := g.step(t.Context(), decoding(), nil, nil); err != nil {
		t.Fatal(err)
	}
	s.spans(t)
	eventually(t, func(ctx context.Context) (err error) {
		if samples, err = scrape(ctx, shared.metrics); err == nil && len(sum(samples, "traces_span_metrics_calls_total", map[string]string{"service_name": s.name})) == 0 {
			err = errors.New("no span metrics")
		}
		return err
	})
	checkQueries(t, spanQueries, samples)
}

// TestGraphEvents: captures, replays and passes without a graph are as many as the engine says.
func TestGraphEvents(t *testing.T) {
	exporter, url := newPrometheus(t)
	c := (&service{provider: nil}).config()
	c.TracerProvider, c.MeterProvider = tracenoop.NewTracerProvider(), sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	c.NumUBatches = 0 // microbatches run without their pass's graph
	_, stats := serve(t, c, newRequests(30, 90, 10))
	samples, err := scrape(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]float64{"capture": float64(stats.Captures), "replay": float64(stats.Replays), "eager": float64(stats.Modes[fwd.GraphNone])}
	if diff := cmp.Diff(want, sum(samples, "fwd_graph_events_total", nil, "fwd_graph_event")); diff != "" || stats.Replays == 0 {
		t.Errorf("graph events (-want +got):\n%s", diff)
	}
}

// receiver keeps the last metrics that came over OTLP.
type receiver struct {
	collector.UnimplementedMetricsServiceServer
	mu   sync.Mutex
	last *collector.ExportMetricsServiceRequest
}

func (r *receiver) Export(_ context.Context, in *collector.ExportMetricsServiceRequest) (*collector.ExportMetricsServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = in
	return &collector.ExportMetricsServiceResponse{}, nil
}

// TestInstruments: names, kinds, units and buckets, as they go over OTLP.
func TestInstruments(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in, server := &receiver{}, grpc.NewServer()
	collector.RegisterMetricsServiceServer(server, in)
	go func() { _ = server.Serve(listener) }() // until it is stopped
	defer server.Stop()
	exporter, err := otlpmetricgrpc.New(t.Context(), otlpmetricgrpc.WithEndpoint(listener.Addr().String()), otlpmetricgrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(time.Hour))))
	r := newLongRun(t, provider)
	r.step(t, 3, tokens(3))
	r.step(t, 600, tokens(600))
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	type instrument struct {
		Kind, Unit string
		Bounds     []float64
	}
	got := map[string]instrument{}
	for _, r := range in.last.GetResourceMetrics() {
		for _, scope := range r.ScopeMetrics {
			if scope.Scope.Name != fwd.ScopeName || scope.Scope.Version != fwd.Version {
				t.Errorf("scope %q, version %q", scope.Scope.Name, scope.Scope.Version)
			}
			for _, m := range scope.Metrics {
				switch data := m.Data.(type) {
				case *metrics.Metric_Histogram:
					got[m.Name] = instrument{"histogram", m.Unit, data.Histogram.DataPoints[0].ExplicitBounds}
				case *metrics.Metric_Sum:
					got[m.Name] = instrument{fmt.Sprint("counter, monotonic: ", data.Sum.IsMonotonic), m.Unit, nil}
				}
				if m.Description == "" {
					t.Errorf("%s has no description", m.Name)
				}
			}
		}
	}
	seconds := []float64{0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096}
	sizes := []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
	want := map[string]instrument{
		"fwd.forward.duration":    {"histogram", "s", seconds},
		"fwd.forward.tokens":      {"histogram", "{token}", sizes},
		"fwd.padding":             {"counter, monotonic: true", "{token}", nil},
		"fwd.coordinate.duration": {"histogram", "s", seconds},
		"fwd.graph.events":        {"counter, monotonic: true", "{event}", nil},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("instruments (-want +got):\n%s", diff)
	}
}
