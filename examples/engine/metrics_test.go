// The engine's own metrics and its status, against what was served.

package engine

import (
	"context"
	"maps"
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	otelmetric "go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// collectOwn returns the engine's own metrics, summed over their attributes: the values, and of a
// histogram how many there are.
func collectOwn(t *testing.T, reader metric.Reader) (values map[string]int64, exemplars int) {
	t.Helper()
	var got metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &got); err != nil {
		t.Error(err)
	}
	values = map[string]int64{}
	for _, scope := range got.ScopeMetrics {
		if scope.Scope.Name != scopeName {
			continue
		}
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Gauge[int64]:
				for _, p := range data.DataPoints {
					values[m.Name] += p.Value
				}
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					values[m.Name] += p.Value
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					values[m.Name] += int64(p.Count)
					exemplars += len(p.Exemplars)
				}
			default:
				t.Errorf("%s is a %T", m.Name, data)
			}
		}
	}
	return values, exemplars
}

// TestOwnMetrics: in the middle of a run the metrics show what the ranks hold, and so does the
// status; after two runs they add up to what both have served, and nothing is held any more.
func TestOwnMetrics(t *testing.T) {
	t.Parallel()
	reader := metric.NewManualReader()
	requests := newRequests(12, 30, 9)
	for i := range requests {
		requests[i].MaxTokens++ // each has a time per token after the first
	}
	var e *Engine
	var during map[string]int64
	var status []RankStatus
	e = newEngine(t, Config{
		DataParallelSize: 2, MaxNumSeqs: 2, NumBlocks: 100,
		MeterProvider:  metric.NewMeterProvider(metric.WithReader(reader)),
		TracerProvider: sdktrace.NewTracerProvider(),
		Observe: func(_ context.Context, rec *fwd.Record) {
			if rec.Rank == 0 && rec.Step == 2 && during == nil {
				during, _ = collectOwn(t, reader)
				status = e.Status()
			}
		},
	})
	if s := e.Status(); s != nil {
		t.Errorf("status %+v before the first run", s)
	}
	for range 2 {
		if _, _, err := e.Run(t.Context(), requests); err != nil {
			t.Fatal(err)
		}
	}
	if during["serve.num_requests_running"] != 4 || during["serve.num_requests_waiting"] != 8 ||
		during["serve.kv_cache_blocks_used"] < 4 || during["serve.kv_cache_blocks"] != 200 {
		t.Errorf("in step 2: %v", during)
	}
	if len(status) != 2 || status[1].Rank != 1 || status[0].Running != 2 || status[0].Waiting != 4 ||
		status[0].Blocks != 100 || status[0].BlocksUsed < 2 || status[0].Target.Step != 2 ||
		status[0].Draft != nil {
		t.Errorf("status in step 2: %+v", status)
	}
	if s := e.Status(); s[0].Running != 0 || s[0].Waiting != 0 || s[0].BlocksUsed != 0 {
		t.Errorf("status after the run: %+v", s)
	}
	want := map[string]int64{
		"gen_ai.server.time_to_first_token": 24, "gen_ai.server.time_per_output_token": 24,
		"gen_ai.server.request.duration": 24, "serve.kv_cache_blocks": 200, "serve.kv_cache_blocks_used": 0,
		"serve.num_requests_running": 0, "serve.num_requests_waiting": 0,
	}
	for _, r := range requests {
		want["serve.prompt_tokens"] += 2 * int64(len(r.Prompt))
		want["serve.generation_tokens"] += 2 * int64(r.MaxTokens)
	}
	got, exemplars := collectOwn(t, reader)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after two runs (-want +got)\n%s", diff)
	}
	if exemplars == 0 {
		t.Error("no exemplar leads to a request")
	}
}

// TestProviders: each rank's spans and metrics go to its own providers, and the spans that wait for
// it have its name.
func TestProviders(t *testing.T) {
	t.Parallel()
	readers := []*metric.ManualReader{metric.NewManualReader(), metric.NewManualReader()}
	names := make([]map[string]int, 2)
	var spans [2]*sdktrace.TracerProvider
	var recorders [2]*ranked
	for rank := range 2 {
		names[rank] = map[string]int{}
		recorders[rank] = &ranked{peers: names[rank]}
		spans[rank] = sdktrace.NewTracerProvider(sdktrace.WithSyncer(recorders[rank]))
	}
	meters := []*metric.MeterProvider{
		metric.NewMeterProvider(metric.WithReader(readers[0])),
		metric.NewMeterProvider(metric.WithReader(readers[1])),
	}
	serve(t, Config{
		DataParallelSize: 2, StepTrace: true,
		Providers: func(rank int) (trace.TracerProvider, otelmetric.MeterProvider) {
			return spans[rank], meters[rank]
		},
		PeerName: func(rank int) string { return [...]string{"zero", "one"}[rank] },
	}, newRequests(8, 30, 9))
	for rank := range 2 {
		if got := slices.Sorted(maps.Keys(recorders[rank].ranks)); !slices.Equal(got, []int{rank}) {
			t.Errorf("the spans of rank %d's provider are of ranks %v", rank, got)
		}
		own := [...]string{"zero", "one"}
		if len(names[rank]) != 1 || names[rank][own[1-rank]] == 0 {
			t.Errorf("rank %d waits for %v, want only %s", rank, names[rank], own[1-rank])
		}
		values, _ := collectOwn(t, readers[rank])
		if values["gen_ai.server.request.duration"] != 4 {
			t.Errorf("rank %d's metrics: %v, want 4 requests", rank, values)
		}
	}
}

// ranked notes which ranks spans are of, and whom they wait for.
type ranked struct {
	ranks map[int]bool
	peers map[string]int
}

func (r *ranked) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	for _, exported := range spans {
		s := newSpan(exported)
		if r.ranks == nil {
			r.ranks = map[int]bool{}
		}
		if s.has("fwd.dp.rank") {
			r.ranks[s.int("fwd.dp.rank")] = true
		}
		if s.has("peer.service") {
			r.peers[s.text("peer.service")]++
		}
	}
	return nil
}

func (r *ranked) Shutdown(context.Context) error { return nil }
