package integration

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

// scrapes are what Prometheus would have stored, a minute between one scrape and the next.
type scrapes [][]sample

func (ss scrapes) at(i int) time.Time { return time.Unix(0, 0).Add(time.Duration(i) * time.Minute) }

// Querier implements [storage.Queryable].
func (ss scrapes) Querier(int64, int64) (storage.Querier, error) {
	stored := map[string][]chunks.Sample{}
	of := map[string]labels.Labels{}
	for i, samples := range ss {
		for _, s := range samples {
			all := maps.Clone(s.labels)
			all[labels.MetricName] = s.name
			l := labels.FromMap(all)
			of[l.String()] = l
			stored[l.String()] = append(stored[l.String()], point{at: ss.at(i).UnixMilli(), value: s.value})
		}
	}
	return &storage.MockQuerier{SelectMockFunction: func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
		set := &seriesSet{at: -1}
		for _, key := range slices.Sorted(maps.Keys(stored)) {
			if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(of[key].Get(m.Name)) }) {
				set.series = append(set.series, storage.NewListSeries(of[key], stored[key]))
			}
		}
		return set
	}}, nil
}

// point implements [chunks.Sample] for a number.
type point struct {
	chunks.Sample // of other kinds: nil
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

// query returns what Prometheus's own engine answers at the last scrape, by the value of a label.
func (ss scrapes) query(t *testing.T, query, by string) map[string]float64 {
	t.Helper()
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: patience})
	q, err := engine.NewInstantQuery(context.Background(), ss, nil, query, ss.at(len(ss)-1))
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	vector, err := q.Exec(t.Context()).Vector()
	if err != nil {
		t.Fatal(err)
	}
	answer := map[string]float64{}
	for _, s := range vector {
		answer[s.Metric.Get(by)] = s.F
	}
	return answer
}

// TestQueries: the questions of the README have the right answers, by Prometheus's own engine.
func TestQueries(t *testing.T) {
	exporter, url := newPrometheus(t)
	r := newLongRun(t, sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter)))
	var ss scrapes
	for range 7 { // more than the five minutes of the queries
		r.everySize(t)
		samples, err := scrape(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		ss = append(ss, samples)
	}

	// Each pass takes 3 ms, and so does each exchange: in the bucket from 2 to 4 ms the median is in the middle.
	durations := map[string]float64{"1024": 0.003}
	for _, size := range fwd.DefaultCaptureSizes(maxCapture) {
		durations[strconv.Itoa(size)] = 0.003
	}
	tokens := float64(r.tokens)
	for question, want := range map[string]struct {
		by      string
		answers map[string]float64
	}{
		"how long does a batch of this size take": {"fwd_batch_bucket", durations},
		"how much is padding, and of which kind":  {"fwd_padding_kind", map[string]float64{"graph": float64(r.graphPadding) / tokens, "dp": float64(r.dpPadding) / tokens}},
		"how long do ranks wait for each other":   {"", map[string]float64{"": 0.002 + 0.99*0.002}},
		"how many graphs are replayed":            {"fwd_graph_event", map[string]float64{"eager": float64(r.eager) / 7 / 60}},
	} {
		got := ss.query(t, queries[question], want.by)
		if diff := cmp.Diff(want.answers, got, approximately); diff != "" {
			t.Errorf("%s (-want +got):\n%s", question, diff)
		}
	}
}
