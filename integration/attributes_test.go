// Tests of the attributes of spans: what Jaeger holds is what follows from the schedules.

package integration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
)

type attrs = map[string]any

// with returns attributes with others added or replaced.
func with(base attrs, others ...attrs) attrs {
	all := maps.Clone(base)
	for _, o := range others {
		maps.Copy(all, o)
	}
	return all
}

// span is what TestAttributes compares.
type span struct {
	Name       string
	Kind       trace.SpanKind
	Attributes attrs
	Message    string
}

// described is a step, and the spans that it should have.
type described struct {
	step
	err    error
	common attrs         // of all passes and exchanges of the step
	mode   string        // that was agreed
	names  [ranks]string // of the passes
	passes []attrs
	failed map[int]string // the message of the passes that fail, by rank
	parts  []attrs        // of the microbatches of each rank
}

// newDescribed returns steps with everything that a span can say. The values are worked out by
// hand.
func newDescribed() []described {
	return []described{decodingStep(), loweredStep(), splitStep(), failingStep()}
}

// decodingStep is a step of decode batches, with an idle rank: there are full graphs, and all ranks
// run the size of the largest.
func decodingStep() described {
	all := attrs{
		"fwd.phase": "decode", "fwd.graph.mode": "FULL", "fwd.graph.reason": "exact",
		"fwd.num_tokens": int64(4), "fwd.dp.max_tokens": int64(4),
		"fwd.batch.num_reqs": int64(4), "fwd.batch.uniform": true, "fwd.idle_ranks": int64(1),
	}
	second := attrs{"fwd.virtual_engine": int64(1)}
	withAdapters := tokens(1, 1, 1)
	withAdapters.NumActiveLoRAs = 2
	return described{
		step: step{
			schedules: []fwd.Schedule{withAdapters, tokens(1, 1), tokens(1), {}},
			prepare:   func(rank int, p *fwd.Pass) { p.VirtualEngine = rank % 2 },
		},
		common: attrs{"fwd.step": int64(1), "fwd.dp.max_tokens_rank": int64(0)},
		mode:   "FULL",
		names:  onEach("fwd.forward target FULL"),
		passes: []attrs{
			with(all, batchOf(3, 3), padding(1, 0, 0.25), attrs{"fwd.batch.num_active_loras": int64(2)}),
			with(all, batchOf(2, 2), padding(0, 2, 0.5), second),
			with(all, batchOf(1, 1), padding(0, 3, 0.75)),
			with(all, batchOf(1, 1), padding(0, 3, 0.75), second, attrs{"fwd.dummy": true}),
		},
	}
}

// loweredStep is a step in which a prompt that no graph can hold takes the graphs away from all
// ranks.
func loweredStep() described {
	all := attrs{
		"fwd.phase": "decode", "fwd.graph.mode": "NONE", "fwd.graph.reason": "dp_rank",
		"fwd.num_tokens": int64(1), "fwd.dp.max_tokens": int64(40),
		"fwd.batch.uniform": false, "fwd.dp.lowest_mode_ranks": []any{int64(2)},
	}
	large := attrs{"fwd.num_tokens": int64(40), "fwd.phase": "mixed", "fwd.graph.reason": "too_large"}
	two := attrs{"fwd.num_tokens": int64(2)}
	return described{
		step: step{schedules: []fwd.Schedule{tokens(1), tokens(1), tokens(40), tokens(1, 1)}},
		common: attrs{
			"fwd.step": int64(2), "fwd.dp.max_tokens_rank": int64(2), "fwd.dp.lowest_mode_rank": int64(2),
		},
		mode: "NONE",
		names: [ranks]string{
			0: "fwd.forward target NONE dp_rank", 1: "fwd.forward target NONE dp_rank",
			2: "fwd.forward target NONE too_large", 3: "fwd.forward target NONE dp_rank",
		},
		passes: []attrs{
			with(all, batchOf(1, 1), padding(0, 0, 0)),
			with(all, batchOf(1, 1), padding(0, 0, 0)),
			with(all, batchOf(40, 1), padding(0, 0, 0), large),
			with(all, batchOf(2, 2), padding(0, 0, 0), two),
		},
	}
}

// splitStep is a step of prompts on all ranks, in two microbatches, which use no graphs.
func splitStep() described {
	all := attrs{
		"fwd.phase": "mixed", "fwd.graph.mode": "NONE", "fwd.graph.reason": "ubatch",
		"fwd.num_tokens": int64(32), "fwd.dp.max_tokens": int64(32),
		"fwd.batch.uniform": false, "fwd.ubatches": int64(2),
	}
	return described{
		step:   step{schedules: []fwd.Schedule{tokens(17, 3), tokens(20), tokens(18), tokens(9, 9, 9)}},
		common: attrs{"fwd.step": int64(3), "fwd.dp.max_tokens_rank": int64(0)},
		mode:   "PIECEWISE", // which the ranks agree on, and don't use in microbatches
		names:  onEach("fwd.forward target NONE ubatch"),
		passes: []attrs{
			with(all, batchOf(20, 2), padding(12, 0, 0.375)),
			with(all, batchOf(20, 1), padding(12, 0, 0.375)),
			with(all, batchOf(18, 1), padding(14, 0, 0.4375)),
			with(all, batchOf(27, 3), padding(5, 0, 0.15625)),
		},
		parts: []attrs{
			{"fwd.ubatch.index": int64(0), "fwd.num_tokens": int64(16)},
			{"fwd.ubatch.index": int64(1), "fwd.num_tokens": int64(16)},
		},
	}
}

// failingStep is a step in which a layer of rank 1 fails.
func failingStep() described {
	layer := &layerError{}
	one := with(attrs{
		"fwd.phase": "decode", "fwd.graph.mode": "FULL", "fwd.graph.reason": "exact",
		"fwd.num_tokens": int64(1), "fwd.dp.max_tokens": int64(1),
		"fwd.batch.num_reqs": int64(1), "fwd.batch.uniform": true,
	}, batchOf(1, 1), padding(0, 0, 0))
	return described{
		step: step{
			schedules: onAll(tokens(1)),
			forward: func(_ context.Context, rank int) error {
				if rank == 1 {
					return fmt.Errorf("layers.7.mlp: %w", layer)
				}
				return nil
			},
		},
		err:    layer,
		common: attrs{"fwd.step": int64(4), "fwd.dp.max_tokens_rank": int64(0)},
		mode:   "FULL",
		names:  onEach("fwd.forward target FULL"),
		passes: []attrs{one, with(one, attrs{"error.type": "not_a_number"}), one, one},
		failed: map[int]string{1: "layers.7.mlp: not a number"},
	}
}

func onEach(name string) [ranks]string { return [ranks]string{name, name, name, name} }

// batchOf returns the attributes of a pass with so many tokens of so many requests.
func batchOf(unpadded, reqs int) attrs {
	return attrs{
		"fwd.num_tokens_unpadded": int64(unpadded), "fwd.num_reqs": int64(reqs),
		"fwd.name": "target", "fwd.dummy": false,
	}
}

// padding returns the attributes of padding.
func padding(graph, dp int, ratio float64) attrs {
	return attrs{
		"fwd.padding.graph": int64(graph), "fwd.padding.dp": int64(dp), "fwd.padding.ratio": ratio,
	}
}

// spans returns the spans that the step should have. Names say what a person looks for first.
func (d *described) spans() (spans []span) {
	replica := attrs{"deployment": "blue"}
	spans = append(spans, span{"fwd.step " + d.mode, trace.SpanKindInternal, with(replica, attrs{
		"fwd.name": "target", "fwd.step": d.common["fwd.step"], "fwd.graph.mode": d.mode,
		"fwd.dp.rank": int64(0), "fwd.dp.size": int64(ranks),
	}), ""})
	for rank := range ranks {
		own := with(d.common, replica, attrs{"fwd.dp.rank": int64(rank), "fwd.dp.size": int64(ranks)})
		spans = append(spans,
			span{"fwd.coordinate", trace.SpanKindClient, own, ""},
			span{d.names[rank], trace.SpanKindInternal, with(d.passes[rank], own), d.failed[rank]})
		for _, part := range d.parts {
			name := fmt.Sprint("fwd.ubatch ", part["fwd.ubatch.index"])
			spans = append(spans, span{name, trace.SpanKindInternal, with(part, replica), ""})
		}
	}
	return spans
}

// TestAttributes: every span and attribute arrives with its name, its value and its type, by both
// protocols.
func TestAttributes(t *testing.T) {
	for protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			s := newService(t, protocol)
			g := newGroup(t, fwd.DispatcherConfig{
				Mode:         fwd.GraphFullAndPiecewise,
				CaptureSizes: []int{1, 2, 4, 8, 16, 32},
				MaxNumSeqs:   8,
				LoRA:         &fwd.LoRAConfig{MaxLoRAs: 2, SpecializeCount: true},
			}, fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 8, PrefillUBatchThreshold: 16},
				fwd.WithStepTrace(), fwd.WithAttributes(attribute.String("deployment", "blue")),
				fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(noop.NewMeterProvider()))
			var want []span
			for _, d := range newDescribed() {
				if err := g.take(t.Context(), d.step); !errors.Is(err, d.err) {
					t.Fatal(err)
				}
				want = append(want, d.spans()...)
			}
			spans := s.spans(t)
			checkLastRanks(t, spans)
			var got []span
			for _, s := range spans {
				if s.Scope != fwd.ScopeName || s.ScopeVersion != fwd.Version {
					t.Errorf("%s comes from %q %q", s.Name, s.Scope, s.ScopeVersion)
				}
				if s.Error != (s.Message != "") {
					t.Errorf("%s has the status error: %v, with the message %q", s.Name, s.Error, s.Message)
				}
				delete(s.Attributes, "fwd.dp.last_rank")
				delete(s.Attributes, "peer.service")
				got = append(got, span{s.Name, s.Kind, s.Attributes, s.Message})
			}
			inOrder := cmpopts.SortSlices(func(a, b span) bool { return fmt.Sprint(a) < fmt.Sprint(b) })
			if diff := cmp.Diff(want, got, inOrder); diff != "" {
				t.Errorf("spans (-want +got):\n%s", diff)
			}
		})
	}
}

// checkLastRanks checks that the exchanges of a step say which rank came last, all of them the same one,
// and that it is the peer of the others. Which one it is depends on time.
func checkLastRanks(t *testing.T, spans []Span) {
	t.Helper()
	last := map[any]any{}
	for _, s := range named(spans, "fwd.coordinate") {
		step := s.Attributes["fwd.step"]
		rank, ok := s.Attributes["fwd.dp.last_rank"].(int64)
		if !ok || rank < 0 || rank >= ranks {
			t.Errorf("rank %v, step %v: rank %v came last", s.Attributes["fwd.dp.rank"], step, rank)
		}
		if last[step] == nil {
			last[step] = rank
		}
		if last[step] != rank {
			t.Errorf("step %v: rank %v came last, or rank %v", step, last[step], rank)
		}
		want := any(fmt.Sprint("rank ", rank))
		if s.Attributes["fwd.dp.rank"] == rank {
			want = nil // nobody waits for itself
		}
		if peer := s.Attributes["peer.service"]; peer != want {
			t.Errorf("rank %v, step %v: the peer is %v, want %v", s.Attributes["fwd.dp.rank"], step, peer, want)
		}
	}
}

// TestMissingRanks: an exchange that fails says who did not come.
func TestMissingRanks(t *testing.T) {
	s := newService(t, "grpc")
	g := newTracedGroup(t, s, fwd.DispatcherConfig{}, fwd.ParallelConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	wait, err := g.runners[1].Begin(ctx, tokens(1))
	if err != nil {
		t.Fatal(err)
	}
	if status := g.runners[1].Status(); !cmp.Equal(status.Waiting, []int{0, 2, 3}) {
		t.Errorf("rank 1 waits for ranks %v", status.Waiting)
	}
	cancel()
	if _, err := wait(); !errors.Is(err, fwd.ErrRankMissing) {
		t.Fatal(err)
	}
	spans := s.spans(t)
	if len(spans) != 1 || !spans[0].Error {
		t.Fatalf("%+v, want one span that failed", spans)
	}
	want := attrs{
		"fwd.step": int64(1), "fwd.dp.rank": int64(1), "fwd.dp.size": int64(ranks), "error.type": "rank_missing",
		"fwd.dp.missing_ranks": []any{int64(0), int64(2), int64(3)},
	}
	if diff := cmp.Diff(want, spans[0].Attributes); diff != "" {
		t.Errorf("the failed exchange (-want +got):\n%s", diff)
	}
	if found := s.find(t, map[string]string{"error.type": "rank_missing"}); len(found) != 1 {
		t.Errorf("%d traces with the error", len(found))
	}
}
