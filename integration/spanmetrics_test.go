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
	// The name of a span says the mode, and the reason where it is worth a word.
	full, none := "fwd.forward target FULL FULL", "fwd.forward target NONE too_large NONE"
	seconds := map[string]float64{}
	spans := s.spans(t)
	for _, s := range append(named(spans, "fwd.forward"), named(spans, "fwd.step")...) {
		key := fmt.Sprint(s.Name, " ", s.Attributes["fwd.graph.mode"], " ", s.Attributes["fwd.dp.rank"])
		seconds[key] += s.Duration().Seconds()
	}
	target := map[string]string{"service_name": s.name, "fwd_name": "target"}
	failed := map[string]string{
		"service_name": s.name, "status_code": "STATUS_CODE_ERROR", "error_type": "not_a_number",
	}
	rates := map[string]float64{"fwd.step FULL FULL 0": decodes, "fwd.step NONE NONE 0": prompts + failures}
	for rank := range ranks {
		rates[fmt.Sprint(full, " ", rank)] = decodes
		rates[fmt.Sprint(none, " ", rank)] = prompts + failures
	}
	const calls, durations = "traces_span_metrics_calls_total", "traces_span_metrics_duration_seconds"
	eventually(t, func(ctx context.Context) error {
		samples, err := scrape(ctx, s.metrics)
		if err != nil {
			return err
		}
		by := []string{"span_name", "fwd_graph_mode", "fwd_dp_rank"}
		diff := cmp.Diff(rates, sum(samples, calls, target, by...)) +
			cmp.Diff(map[string]float64{none + " 3": failures}, sum(samples, calls, failed, by...)) +
			cmp.Diff(rates, sum(samples, durations+"_count", target, by...)) +
			cmp.Diff(seconds, sum(samples, durations+"_sum", target, by...), approximately) +
			cmp.Diff(map[string]float64{
				"": decodes + prompts + failures, "decode": decodes * ranks, "mixed": (prompts + failures) * ranks,
			}, sum(samples, calls, target, "fwd_phase"))
		if diff != "" {
			return fmt.Errorf("span metrics (-want +got):\n%s", diff)
		}
		return nil
	})
}
