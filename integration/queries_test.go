// Tests of the queries in the README: they are there, and have the right answers.

package integration

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

// queries are the questions of the README, in its order.
var queries = []struct{ question, query string }{
	{"how long does a batch of this size take",
		`histogram_quantile(0.5, sum by (fwd_batch_bucket, le) ` +
			`(rate(fwd_forward_duration_seconds_bucket{fwd_dummy="false"}[5m])))`},
	{"how much is padding, and of which kind",
		`sum by (fwd_padding_kind) (rate(fwd_padding_total{fwd_dummy="false"}[5m])) / ` +
			`scalar(sum(rate(fwd_forward_tokens_sum{fwd_dummy="false"}[5m])))`},
	{"how long do ranks wait for each other",
		`histogram_quantile(0.99, sum by (fwd_dp_rank, le) ` +
			`(rate(fwd_coordinate_duration_seconds_bucket[5m])))`},
	{"who is waited for",
		`sum by (fwd_dp_peer_rank, fwd_wait_kind) (rate(fwd_wait_time_seconds_total[5m]))`},
	{"how many graphs are replayed",
		`sum by (fwd_graph_event) (rate(fwd_graph_events_total[5m]))`},
	{"how many passes fail, on which rank",
		`sum by (fwd_dp_rank, error_type) (rate(fwd_forward_duration_seconds_count{error_type!=""}[5m]))`},
	{"how long do passes take, by rank",
		`histogram_quantile(0.5, sum by (fwd_graph_mode, fwd_dp_rank, le) ` +
			`(rate(fwd_forward_duration_seconds_bucket[5m])))`},
}

// TestReadme: the README asks these questions, with these queries.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| question | PromQL |\n|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var want []string
	for _, q := range queries {
		want = append(want, fmt.Sprintf("| %s | `%s` |", q.question, q.query))
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSpace(table), "\n")); diff != "" {
		t.Errorf("the table in README.md (-want +got):\n%s", diff)
	}
}

// checkQueries checks that the metrics and the labels of the queries exist.
func checkQueries(t *testing.T, samples []sample) {
	t.Helper()
	metric := regexp.MustCompile(`\bfwd_[a-z_]+[{[]`) // before a selector or a range
	label := regexp.MustCompile(`\b(?:fwd_[a-z_]+|le|error_type)\b`)
	for _, q := range queries {
		labels := map[string]bool{}
		for _, name := range metric.FindAllString(q.query, -1) {
			name = name[:len(name)-1]
			found := false
			for _, s := range samples {
				if s.name != name {
					continue
				}
				found = true
				for l := range s.labels {
					labels[l] = true
				}
			}
			if !found {
				t.Errorf("%s: there is no metric %s", q.question, name)
			}
		}
		for _, l := range label.FindAllString(metric.ReplaceAllString(q.query, ""), -1) {
			if !labels[l] {
				t.Errorf("%s: no sample has the label %s", q.question, l)
			}
		}
	}
}

// TestQueries: Prometheus's own engine answers the questions of the README correctly.
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
		ss.add(samples)
	}
	want := r.answers(float64(ss.n))
	for _, q := range queries {
		var by []string // the labels of the answer, in the order in which the query has them
		if m := regexp.MustCompile(`sum by \(([^)]*)\)`).FindStringSubmatch(q.query); m != nil {
			by = slices.DeleteFunc(strings.Split(m[1], ", "), func(l string) bool { return l == "le" })
		}
		if diff := cmp.Diff(want[q.question], ss.query(t, q.query, by...), approximately); diff != "" {
			t.Errorf("%s (-want +got):\n%s", q.question, diff)
		}
	}
}

// answers returns what the queries should answer after so many equal minutes.
//
// Each pass takes 3 ms, and so does each exchange. That is in the bucket from 2.56 to 5.12 ms,
// within which a quantile is interpolated.
func (r *longRun) answers(minutes float64) map[string]map[string]float64 {
	const from, width = 0.00256, 0.00256
	const median, p99 = from + 0.5*width, from + 0.99*width
	perSecond := func(n float64) float64 { return n / minutes / 60 }

	durations, byRank := map[string]float64{}, map[string]float64{}
	var served, failures float64
	for key, n := range r.passes {
		rank, mode, bucket, dummy := field(key, 0), field(key, 1), field(key, 3), field(key, 4)
		byRank[mode+" "+rank] = median
		if dummy == "false" {
			durations[bucket] = median
		}
		if strings.HasSuffix(key, "not_a_number") {
			failures += n
		}
	}
	for key, n := range r.tokens {
		if field(key, 1) == "false" {
			served += n
		}
	}
	events := map[string]float64{}
	for _, n := range r.eager {
		events["eager"] += perSecond(n)
	}
	return map[string]map[string]float64{
		"how long does a batch of this size take": durations,
		"how much is padding, and of which kind": {
			"graph": r.padding["graph false"] / served, "dp": r.padding["dp false"] / served,
		},
		"how long do ranks wait for each other": {"0": p99, "1": p99, "2": p99, "3": p99},
		"who is waited for": {
			strconv.Itoa(lastRank) + " coordinate": perSecond((ranks - 1) * r.exchanges * took.Seconds()),
		},
		"how many graphs are replayed":        events,
		"how many passes fail, on which rank": {"2 not_a_number": perSecond(failures)},
		"how long do passes take, by rank":    byRank,
	}
}

// field returns a field of a key of longRun.
func field(key string, i int) string { return strings.Split(key, " ")[i] }
