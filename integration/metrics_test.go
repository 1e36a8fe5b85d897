// Tests of the library's own metrics: what Prometheus reads is what ran, and the number of series
// is bounded.

package integration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// longRun takes steps with batches of every size, over and over. Ranks 0 and 1 have the same
// batches, rank 2 has half as much, and rank 3 is idle and always comes last. Each pass and each
// exchange takes 3 ms by the Runners' clocks. What longRun counts is what the metrics should say,
// in their own labels.
type longRun struct {
	group     *group
	passes    map[string]float64 // by "RANK MODE REASON BUCKET DUMMY PHASE ERROR"
	tokens    map[string]float64 // by "RANK DUMMY"
	padding   map[string]float64 // by "KIND DUMMY"
	eager     map[string]float64 // by rank
	exchanges float64            // of each rank
}

const (
	maxTokens  = 700
	maxCapture = 512
	maxSeqs    = 64
	took       = 3 * time.Millisecond
	lastRank   = ranks - 1
)

// The labels of fwd.forward.duration, in the order of the keys of longRun.passes.
var passLabels = []string{
	"fwd_dp_rank", "fwd_graph_mode", "fwd_graph_reason", "fwd_batch_bucket", "fwd_dummy", "fwd_phase",
	"error_type",
}

var captureSizes = fwd.DefaultCaptureSizes(maxCapture)

func newLongRun(t *testing.T, provider *sdkmetric.MeterProvider) *longRun {
	t.Helper()
	start := time.Now()
	clock := func() func() time.Time { // of one rank
		var mu sync.Mutex
		var calls time.Duration
		return func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			calls++
			return start.Add(calls * took)
		}
	}
	g := newGroupOf(t, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: captureSizes, MaxNumSeqs: maxSeqs,
	}, fwd.ParallelConfig{}, func() []fwd.Option {
		return []fwd.Option{
			fwd.WithMeterProvider(provider), fwd.WithTracerProvider(tracenoop.NewTracerProvider()),
			fwd.WithClock(clock()),
		}
	})
	return &longRun{
		group: g, passes: map[string]float64{}, tokens: map[string]float64{},
		padding: map[string]float64{}, eager: map[string]float64{},
	}
}

// take takes a step in which ranks 0 and 1 have n tokens and rank 2 has half as many. If fail is not
// nil, the pass of rank 2 fails with it.
func (r *longRun) take(t *testing.T, n int, decode bool, fail error) {
	t.Helper()
	half := max(n/2, 2)
	schedules := []fwd.Schedule{tokens(n), tokens(n), tokens(half), {}}
	if decode {
		half = max(n/2, 1)
		schedules = []fwd.Schedule{sequences(n), sequences(n), sequences(half), {}}
	}
	forward := func(_ context.Context, rank int) error {
		if rank == 2 {
			return fail
		}
		return nil
	}
	if err := r.group.takeInOrder(t.Context(), schedules, forward); !errors.Is(err, fail) {
		t.Fatal(err)
	}
	r.exchanges++
	for rank, own := range []int{n, n, half, 1} {
		r.count(rank, own, n, decode, fail)
	}
}

// sequences returns a schedule of n requests that decode.
func sequences(n int) fwd.Schedule { return tokens(slices.Repeat([]int{1}, n)...) }

// takeInOrder takes a step in one goroutine: the ranks vote in their order, then run their passes.
func (g *group) takeInOrder(
	ctx context.Context, schedules []fwd.Schedule, forward func(ctx context.Context, rank int) error,
) error {
	waits := make([]func() (fwd.Pass, error), len(g.runners))
	for rank, r := range g.runners {
		if g.before != nil {
			g.before(rank)
		}
		var err error
		if waits[rank], err = r.Begin(ctx, schedules[rank]); err != nil {
			return err
		}
	}
	passes := make([]fwd.Pass, len(waits))
	for rank, wait := range waits {
		var err error
		if passes[rank], err = wait(); err != nil {
			return err
		}
	}
	var errs []error
	for rank, r := range g.runners {
		errs = append(errs, r.Run(ctx, passes[rank], func(ctx context.Context) error { return forward(ctx, rank) }))
	}
	return errors.Join(errs...)
}

// count counts the pass of a rank that has own tokens, in a step in which the largest rank has
// most.
func (r *longRun) count(rank, own, most int, decode bool, fail error) {
	mode, reason, phase := "PIECEWISE", "relaxed", "mixed"
	if decode {
		mode, reason = "FULL", "exact"
	}
	dummy := rank == lastRank
	if decode || dummy {
		phase = "decode"
	}
	padded, bucket := padTo(own), padTo(most)
	if dummy && !decode && bucket <= maxSeqs {
		reason = "full_excluded" // its batch of one decoding request could have a full graph
	}
	if most > maxCapture {
		mode, reason, bucket = "NONE", "dp_rank", 1<<bits.Len(uint(padded-1))
		if own > maxCapture {
			reason = "too_large"
		}
		r.eager[fmt.Sprint(rank)]++
	} else {
		r.padding[fmt.Sprint("dp ", dummy)] += float64(padTo(most) - padded)
	}
	word := ""
	if rank == 2 && fail != nil {
		word = "not_a_number"
	}
	r.padding[fmt.Sprint("graph ", dummy)] += float64(padded - own)
	r.tokens[fmt.Sprint(rank, " ", dummy)] += float64(own)
	r.passes[fmt.Sprint(rank, " ", mode, " ", reason, " ", bucket, " ", dummy, " ", phase, " ", word)]++
}

// padTo returns the capture size for so many tokens, or n if it has no graph.
func padTo(n int) int {
	if at, _ := slices.BinarySearch(captureSizes, n); at < len(captureSizes) {
		return captureSizes[at]
	}
	return n
}

func (r *longRun) everySize(t *testing.T) {
	t.Helper()
	for n := 2; n <= maxTokens; n++ {
		r.take(t, n, false, nil)
	}
	for n := 1; n <= maxSeqs; n++ {
		r.take(t, n, true, nil)
	}
	r.take(t, maxTokens, false, &layerError{})
}

// check compares what Prometheus scrapes with what ran.
func (r *longRun) check(samples []sample, job map[string]string) error {
	want, got := map[string]map[string]float64{}, map[string]map[string]float64{}
	compare := func(w map[string]float64, name string, by ...string) {
		for key, v := range w {
			if v == 0 { // never counted
				delete(w, key)
			}
		}
		want[name], got[name] = w, sum(samples, name, job, by...)
	}
	var passes float64
	for _, n := range r.passes {
		passes += n
	}
	all := func(v float64) map[string]float64 { return map[string]float64{"": v} }
	each := func(v float64) map[string]float64 {
		return map[string]float64{"0": v, "1": v, "2": v, "3": v}
	}
	compare(maps.Clone(r.passes), "fwd_forward_duration_seconds_count", passLabels...)
	compare(all(passes*took.Seconds()), "fwd_forward_duration_seconds_sum")
	compare(maps.Clone(r.tokens), "fwd_forward_tokens_sum", "fwd_dp_rank", "fwd_dummy")
	compare(all(passes), "fwd_forward_tokens_count")
	compare(maps.Clone(r.padding), "fwd_padding_total", "fwd_padding_kind", "fwd_dummy")
	compare(maps.Clone(r.eager), "fwd_graph_events_total", "fwd_dp_rank")
	compare(each(r.exchanges), "fwd_coordinate_duration_seconds_count", "fwd_dp_rank")
	compare(each(r.exchanges*took.Seconds()), "fwd_coordinate_duration_seconds_sum", "fwd_dp_rank")
	// The last rank waits for nobody, and all others wait for it.
	compare(map[string]float64{fmt.Sprint(lastRank, " coordinate"): (ranks - 1) * r.exchanges * took.Seconds()},
		"fwd_wait_time_seconds_total", "fwd_dp_peer_rank", "fwd_wait_kind")
	for _, name := range []string{"fwd_forward_duration_seconds_sum", "fwd_wait_time_seconds_total"} {
		names := sum(samples, name, job, "fwd_name")
		want["names in "+name], got["names in "+name] = map[string]float64{"target": names["target"]}, names
	}
	got["active"] = sum(samples, "fwd_forward_active", job, "fwd_dp_rank") // all passes have ended
	want["active"] = each(0)
	want["series"], got["series"] = map[string]float64{
		"fwd_forward_duration_seconds_count":    float64(len(r.passes)),
		"fwd_forward_tokens_count":              3 * ranks, // modes
		"fwd_coordinate_duration_seconds_count": ranks,
	}, numSeries(samples, job)
	if diff := cmp.Diff(want, got, approximately); diff != "" {
		return fmt.Errorf("metrics (-want +got):\n%s", diff)
	}
	return nil
}

// numSeries returns how many series each histogram has.
func numSeries(samples []sample, job map[string]string) map[string]float64 {
	series := map[string]float64{}
	for _, s := range samples {
		if len(sum([]sample{s}, s.name, job)) > 0 && strings.HasSuffix(s.name, "_count") {
			series[s.name]++
		}
	}
	return series
}

// TestPrometheus: the metrics through OpenTelemetry's Prometheus exporter, after a run with every
// batch size. Their number is bounded: twice the run has the same series.
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
	}
}

// TestMetricsOverOTLP: the same metrics through the collector in Jaeger's binary, which gives them
// to Prometheus.
func TestMetricsOverOTLP(t *testing.T) {
	exporter, err := otlpmetricgrpc.New(t.Context(),
		otlpmetricgrpc.WithEndpoint(shared.grpc), otlpmetricgrpc.WithInsecure())
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
	checkQueries(t, samples)
}
