// Tests of the metrics that Jaeger's binary computes from spans, with the configuration to copy.

package integration

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
)

// TestSpanMetrics: the configuration gives rates, errors and durations by graph mode and rank.
func TestSpanMetrics(t *testing.T) {
	const decodes, prompts, failures = 5, 3, 2
	s := newService(t, "grpc")
	g := newTracedGroup(t, s, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4}, MaxNumSeqs: 4,
	}, fwd.ParallelConfig{})
	for range decodes {
		g.takeAll(t, onAll(tokens(1)))
	}
	for range prompts {
		g.takeAll(t, onAll(tokens(9)))
	}
	layer := &layerError{}
	failing := step{schedules: onAll(tokens(9)), forward: func(_ context.Context, rank int) error {
		if rank == 3 {
			return layer
		}
		return nil
	}}
	for range failures {
		if err := g.take(t.Context(), failing); !errors.Is(err, layer) {
			t.Fatal(err)
		}
	}
	seconds := map[string]float64{}
	for _, pass := range named(s.spans(t), "fwd.forward") {
		key := fmt.Sprint(pass.Attributes["fwd.graph.mode"], " ", pass.Attributes["fwd.dp.rank"])
		seconds[key] += pass.Duration().Seconds()
	}

	passes := map[string]string{"service_name": s.name, "span_name": "fwd.forward"}
	failed := map[string]string{
		"service_name": s.name, "span_name": "fwd.forward",
		"status_code": "STATUS_CODE_ERROR", "error_type": "not_a_number",
	}
	rates := map[string]float64{}
	for rank := range ranks {
		rates[fmt.Sprint("FULL ", rank)] = decodes
		rates[fmt.Sprint("NONE ", rank)] = prompts + failures
	}
	const calls, durations = "traces_span_metrics_calls_total", "traces_span_metrics_duration_seconds"
	eventually(t, func(ctx context.Context) error {
		samples, err := scrape(ctx, s.metrics)
		if err != nil {
			return err
		}
		by := []string{"fwd_graph_mode", "fwd_dp_rank"}
		diff := cmp.Diff(rates, sum(samples, calls, passes, by...)) +
			cmp.Diff(map[string]float64{"NONE 3": failures}, sum(samples, calls, failed, by...)) +
			cmp.Diff(rates, sum(samples, durations+"_count", passes, by...)) +
			cmp.Diff(seconds, sum(samples, durations+"_sum", passes, by...), approximately) +
			cmp.Diff(map[string]float64{"decode": decodes * ranks, "mixed": (prompts + failures) * ranks},
				sum(samples, calls, passes, "fwd_phase"))
		if diff != "" {
			return fmt.Errorf("span metrics (-want +got):\n%s", diff)
		}
		return nil
	})
}
