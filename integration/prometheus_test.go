// Helpers: what Prometheus scrapes, and what its query engine answers.

package integration

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
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
			samples = appendSamples(samples, name, m)
		}
	}
	return samples, nil
}

// appendSamples appends the lines of a metric.
func appendSamples(samples []sample, name string, m *dto.Metric) []sample {
	labels := map[string]string{}
	for _, l := range m.Label {
		labels[l.GetName()] = l.GetValue()
	}
	switch {
	case m.Counter != nil:
		samples = append(samples, sample{name, labels, m.Counter.GetValue()})
	case m.Gauge != nil:
		samples = append(samples, sample{name, labels, m.Gauge.GetValue()})
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
	return samples
}

// sum adds up the samples of a name that have these labels. Its keys are the values of the labels
// in by, separated by spaces.
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

// approximately compares numbers that differ by rounding.
var approximately = cmp.Comparer(func(a, b float64) bool {
	return math.Abs(a-b) <= 1e-9*max(math.Abs(a), math.Abs(b))
})

// newPrometheus returns OpenTelemetry's Prometheus exporter, and the URL at which Prometheus would
// scrape it until the test ends.
func newPrometheus(t *testing.T) (_ *otelprometheus.Exporter, url string) {
	t.Helper()
	registry := prometheus.NewRegistry()
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry))
	if err != nil {
		t.Fatal(err)
	}
	return exporter, serveMetrics(t, registry)
}

// serveMetrics returns the URL of a registry's metrics, until the test ends.
func serveMetrics(t *testing.T, registry *prometheus.Registry) string {
	t.Helper()
	server := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	t.Cleanup(server.Close)
	return server.URL
}

// scrapes are what Prometheus would have stored of a scrape each minute. It implements
// [storage.Queryable].
type scrapes struct {
	n      int
	labels map[string]labels.Labels   // of each series, by what String returns
	stored map[string][]chunks.Sample // by the same key
}

// add stores the next scrape.
func (ss *scrapes) add(samples []sample) {
	ss.n++
	for _, s := range samples {
		all := maps.Clone(s.labels)
		all[labels.MetricName] = s.name
		ss.store(labels.FromMap(all), s.value)
	}
}

// store stores a sample at the last scrape.
func (ss *scrapes) store(l labels.Labels, value float64) {
	if ss.stored == nil {
		ss.labels, ss.stored = map[string]labels.Labels{}, map[string][]chunks.Sample{}
	}
	key := l.String()
	ss.labels[key] = l
	ss.stored[key] = append(ss.stored[key], point{at: minute(ss.n - 1).UnixMilli(), value: value})
}

func minute(n int) time.Time { return time.Unix(0, 0).Add(time.Duration(n) * time.Minute) }

// Querier implements [storage.Queryable].
func (ss *scrapes) Querier(int64, int64) (storage.Querier, error) {
	matching := func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
		set := &seriesSet{at: -1}
		for _, key := range slices.Sorted(maps.Keys(ss.stored)) {
			if matchesAll(ss.labels[key], matchers) {
				set.series = append(set.series, storage.NewListSeries(ss.labels[key], ss.stored[key]))
			}
		}
		return set
	}
	return &storage.MockQuerier{SelectMockFunction: matching}, nil
}

func matchesAll(l labels.Labels, matchers []*labels.Matcher) bool {
	return !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(l.Get(m.Name)) })
}

// point implements [chunks.Sample] for a number.
type point struct {
	chunks.Sample // nil; it has the methods for other kinds of samples
	at            int64
	value         float64
}

func (p point) T() int64                 { return p.at }
func (p point) F() float64               { return p.value }
func (p point) Type() chunkenc.ValueType { return chunkenc.ValFloat }
func (p point) Copy() chunks.Sample      { return p }

// seriesSet implements [storage.SeriesSet].
type seriesSet struct {
	series []storage.Series
	at     int
}

func (s *seriesSet) Next() bool                      { s.at++; return s.at < len(s.series) }
func (s *seriesSet) At() storage.Series              { return s.series[s.at] }
func (*seriesSet) Err() error                        { return nil }
func (*seriesSet) Warnings() annotations.Annotations { return nil }

// query returns what Prometheus's own engine answers at the last scrape. Its keys are the values of
// the labels in by, separated by spaces.
func (ss *scrapes) query(t *testing.T, query string, by ...string) map[string]float64 {
	t.Helper()
	return valuesBy(ss.vector(t, query, ss.n-1), by...)
}

// vector returns what Prometheus's own engine answers at a scrape.
func (ss *scrapes) vector(t *testing.T, query string, scrape int) promql.Vector {
	t.Helper()
	q, err := queryEngine.NewInstantQuery(context.Background(), ss, nil, query, minute(scrape))
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	vector, err := q.Exec(t.Context()).Vector()
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return slices.Clone(vector) // Close takes it back
}

var queryEngine = promql.NewEngine(promql.EngineOpts{MaxSamples: 1e7, Timeout: patience})

// valuesBy returns the values of a vector by those of the labels in by, separated by spaces.
func valuesBy(vector promql.Vector, by ...string) map[string]float64 {
	answer := map[string]float64{}
	for _, s := range vector {
		var values []string
		for _, label := range by {
			values = append(values, s.Metric.Get(label))
		}
		answer[strings.Join(values, " ")] = s.F
	}
	return answer
}
