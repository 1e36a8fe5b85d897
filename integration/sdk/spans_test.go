// This file tests the spans themselves: attributes, kind, parent, scope and links.

package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/forwardctx/fwd"
)

func TestForwardSpanNames(t *testing.T) {
	t.Parallel()
	type key struct {
		mode   fwd.GraphMode
		reason fwd.Reason
	}
	silent := []fwd.Reason{fwd.ReasonUnknown, fwd.ReasonExact, fwd.ReasonRelaxed, fwd.ReasonDisabled}
	for _, model := range []string{"", "draft", "a model"} {
		o, want := newTelemetry(), []string{}
		r := o.runner(t, fwd.Config{Name: model}, fwd.WithDispatcher(dispatcher(t, fwd.GraphFull)))
		var keys []key
		for mode := fwd.GraphNone; mode <= fwd.GraphFull; mode++ {
			for reason := fwd.ReasonUnknown; reason <= fwd.ReasonUBatch; reason++ {
				keys = append(keys, key{mode, reason})
			}
		}
		for _, k := range keys {
			run(t, r, fwd.Pass{NumTokens: 1, GraphMode: k.mode, Reason: k.reason}, nothing)
			name := "fwd.forward "
			if model != "" {
				name += model + " "
			}
			name += k.mode.String()
			if !slices.Contains(silent, k.reason) {
				name += " " + k.reason.String()
			}
			want = append(want, name)
		}
		var got []string
		for _, s := range o.spans.Ended() {
			got = append(got, s.Name())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("names of passes of %q (-want +got):\n%s", model, diff)
		}
	}
}

// The name of a span says what the pass does, not what was planned.
func TestForwardSpanNamesOfOtherPasses(t *testing.T) {
	t.Parallel()
	split := twoTokens()
	split.GraphMode, split.Reason = fwd.GraphFull, fwd.ReasonExact
	for want, pass := range map[string]fwd.Pass{
		"fwd.forward NONE ubatch": split,
		"fwd.forward NONE":        {NumTokens: 1},
		"fwd.forward FULL":        {NumTokens: 1, GraphMode: fwd.GraphFull, Dummy: true},
	} {
		o := newTelemetry()
		if err := o.run(t, pass, nothing); err != nil {
			t.Fatal(err)
		}
		if got := o.only(t, "fwd.forward").Name(); got != want {
			t.Errorf("the pass is named %q, want %q", got, want)
		}
	}
}

// forwardCase is a pass and the attributes of its span.
type forwardCase struct {
	name string
	cfg  fwd.Config
	pass fwd.Pass
	want attrs
}

func TestForwardSpanAttributes(t *testing.T) {
	t.Parallel()
	halves := []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 4}},
		{Requests: fwd.Range{Start: 1, Stop: 2}, Tokens: fwd.Range{Start: 4, Stop: 8}},
	}
	for _, test := range []forwardCase{
		{"nothing said", fwd.Config{}, fwd.Pass{NumTokens: 1}, plainForward},
		{
			"no tokens", fwd.Config{}, fwd.Pass{},
			with(plainForward, "fwd.num_tokens", 0, "fwd.num_tokens_unpadded", 0),
		},
		{"name", fwd.Config{Name: "draft"}, fwd.Pass{NumTokens: 1}, with(plainForward, "fwd.name", "draft")},
		{"dummy", fwd.Config{}, fwd.Pass{NumTokens: 1, Dummy: true}, with(plainForward, "fwd.dummy", true)},
		{
			"virtual engine", fwd.Config{}, fwd.Pass{NumTokens: 1, VirtualEngine: 3},
			with(plainForward, "fwd.virtual_engine", 3),
		},
		{
			"phase", fwd.Config{}, fwd.Pass{NumTokens: 1, Phase: "verify"},
			with(plainForward, "fwd.phase", "verify"),
		},
		{"requests", fwd.Config{}, fwd.Pass{NumTokens: 1, NumReqs: 1}, with(plainForward, "fwd.num_reqs", 1)},
		{
			"descriptor with adapters", fwd.Config{},
			fwd.Pass{
				NumTokens: 8, NumTokensUnpadded: 5, NumReqs: 5, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact,
				Batch: fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true, HasLoRA: true, NumActiveLoRAs: 2},
			},
			with(plainForward, "fwd.num_tokens", 8, "fwd.num_tokens_unpadded", 5, "fwd.num_reqs", 5,
				"fwd.padding.graph", 3, "fwd.padding.dp", 0, "fwd.padding.ratio", 0.375,
				"fwd.graph.mode", "FULL", "fwd.graph.reason", "exact",
				"fwd.batch.num_reqs", 8, "fwd.batch.uniform", true, "fwd.batch.num_active_loras", 2),
		},
		{
			"relaxed descriptor", fwd.Config{},
			fwd.Pass{
				NumTokens: 8, GraphMode: fwd.GraphPiecewise, Reason: fwd.ReasonRelaxed,
				Batch: fwd.BatchDescriptor{NumTokens: 8},
			},
			with(plainForward, "fwd.num_tokens", 8, "fwd.num_tokens_unpadded", 8,
				"fwd.graph.mode", "PIECEWISE", "fwd.graph.reason", "relaxed", "fwd.batch.uniform", false),
		},
		{
			"padding split", fwd.Config{},
			fwd.Pass{
				NumTokens: 24, NumTokensUnpadded: 5, NumTokensGraph: 8,
				GraphMode: fwd.GraphFull, Reason: fwd.ReasonRelaxed,
			},
			with(plainForward, "fwd.num_tokens", 24, "fwd.num_tokens_unpadded", 5,
				"fwd.padding.graph", 3, "fwd.padding.dp", 16, "fwd.padding.ratio", 19.0/24,
				"fwd.graph.mode", "FULL", "fwd.graph.reason", "relaxed", "fwd.batch.uniform", false),
		},
		{
			"microbatches", fwd.Config{}, fwd.Pass{NumTokens: 8, UBatches: halves},
			with(plainForward, "fwd.num_tokens", 8, "fwd.num_tokens_unpadded", 8, "fwd.ubatches", 2),
		},
		{
			"microbatches, which use no graph", fwd.Config{},
			fwd.Pass{NumTokens: 8, UBatches: halves, GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact},
			with(plainForward, "fwd.num_tokens", 8, "fwd.num_tokens_unpadded", 8, "fwd.ubatches", 2,
				"fwd.graph.reason", "ubatch", "fwd.batch.uniform", false),
		},
		{
			"graph of nobody's choice", fwd.Config{}, fwd.Pass{NumTokens: 1, GraphMode: fwd.GraphFull},
			with(plainForward, "fwd.graph.mode", "FULL", "fwd.graph.reason", "unplanned", "fwd.batch.uniform", false),
		},
	} {
		t.Run(test.name, func(t *testing.T) { t.Parallel(); checkForwardSpan(t, test) })
	}
}

func TestForwardSpanOfRank(t *testing.T) {
	t.Parallel()
	dense := ofTwo(1)
	dense.Parallel.Dense = true
	unsized := fwd.Config{Parallel: fwd.ParallelConfig{DataParallelRank: 7, Dense: true}}
	for _, test := range []forwardCase{
		{
			"counts across ranks", ofTwo(1), fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(7, 1)},
			with(plainForward, "fwd.dp.rank", 1, "fwd.dp.size", 2, "fwd.dp.max_tokens", 7),
		},
		{
			"agreement", ofTwo(1),
			fwd.Pass{
				NumTokens: 1, Reason: fwd.ReasonDPRank,
				Agreement: &fwd.Agreement{Step: 9, NumTokensAcrossDP: vec(7, 1), MaxTokensRank: 0, LowestModeRank: 1},
			},
			with(plainForward, "fwd.dp.rank", 1, "fwd.dp.size", 2, "fwd.dp.max_tokens", 7, "fwd.step", 9,
				"fwd.dp.max_tokens_rank", 0, "fwd.dp.lowest_mode_rank", 1, "fwd.graph.reason", "dp_rank"),
		},
		{
			"agreement that nobody lowered", ofTwo(1),
			fwd.Pass{
				NumTokens: 7,
				Agreement: &fwd.Agreement{Step: 9, NumTokensAcrossDP: vec(1, 7), MaxTokensRank: 1, LowestModeRank: -1},
			},
			with(plainForward, "fwd.num_tokens", 7, "fwd.num_tokens_unpadded", 7, "fwd.dp.rank", 1, "fwd.dp.size", 2,
				"fwd.dp.max_tokens", 7, "fwd.step", 9, "fwd.dp.max_tokens_rank", 1),
		},
		{
			"dense model of unknown size", unsized, fwd.Pass{NumTokens: 1},
			with(plainForward, "fwd.dp.rank", 7),
		},
		{
			"dense model", dense, fwd.Pass{NumTokens: 1},
			with(plainForward, "fwd.dp.rank", 1, "fwd.dp.size", 2),
		},
	} {
		t.Run(test.name, func(t *testing.T) { t.Parallel(); checkForwardSpan(t, test) })
	}
}

// checkForwardSpan runs the pass of a case under a caller's span and checks the span of the pass.
func checkForwardSpan(t *testing.T, test forwardCase) {
	o := newTelemetry()
	ctx, caller := o.tracer.Start(context.Background(), "caller")
	err := o.runner(t, test.cfg).Run(ctx, test.pass, func(ctx context.Context) error {
		if got := trace.SpanFromContext(ctx); got == caller || !got.IsRecording() {
			t.Errorf("the span in a pass is %v, want the pass's", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := o.only(t, "fwd.forward")
	wantAttrs(t, s, test.want)
	if s.SpanKind() != trace.SpanKindInternal {
		t.Errorf("kind %v, want internal", s.SpanKind())
	}
	if s.Parent().SpanID() != caller.SpanContext().SpanID() {
		t.Errorf("parent %v, want the caller's span", s.Parent().SpanID())
	}
	if s.Status() != (sdktrace.Status{}) || len(s.Events()) > 0 {
		t.Errorf("status %v, events %v, want none", s.Status(), s.Events())
	}
	if scope := s.InstrumentationScope(); scope.Name != scopeName || scope.Version != scopeVersion {
		t.Errorf("scope %q version %q", scope.Name, scope.Version)
	}
}

// twoSteps plans and runs two steps of two ranks. In the first the mode is FULL on both; in the
// second rank 0 is eager and so lowers it.
func twoSteps(t *testing.T) []*telemetry {
	t.Helper()
	group := localGroup(t, 2)
	os := []*telemetry{newTelemetry(), newTelemetry()}
	together(2, func(rank int) {
		cfg := ofTwo(rank)
		cfg.Name = "target"
		r := os[rank].runner(t, cfg,
			fwd.WithCoordinator(group[rank]), fwd.WithDispatcher(dispatcher(t, fwd.GraphFull)))
		for _, eager := range []bool{false, true} {
			pass, err := r.Plan(context.Background(), fwd.Schedule{
				NumScheduledTokens: [][]int{{3}, {5, 1}}[rank], Eager: eager && rank == 0,
			})
			if err != nil {
				t.Error(err)
				return
			}
			if err := r.Run(context.Background(), pass, nothing); err != nil {
				t.Error(err)
			}
		}
	})
	return os
}

func TestCoordinateSpan(t *testing.T) {
	t.Parallel()
	for rank, o := range twoSteps(t) {
		spans := o.ended("fwd.coordinate")
		if len(spans) != 2 {
			t.Fatalf("rank %d: %d coordinate spans, want 2", rank, len(spans))
		}
		for i, s := range spans {
			got := attrsOf(s.Attributes())
			if last := got["fwd.dp.last_rank"]; last != 0 && last != 1 { // whoever it was
				t.Errorf("rank %d: fwd.dp.last_rank is %v, want 0 or 1", rank, last)
			}
			want := attrs{
				"fwd.step": 1 + i, "fwd.dp.rank": rank, "fwd.dp.size": 2, "fwd.dp.max_tokens_rank": 1,
				"fwd.dp.last_rank": got["fwd.dp.last_rank"],
			}
			if i == 1 {
				want["fwd.dp.lowest_mode_rank"] = 0
			}
			if last := got["fwd.dp.last_rank"]; last != rank {
				want["peer.service"] = fmt.Sprint("rank ", last)
			}
			wantAttrs(t, s, want)
			if s.Name() != "fwd.coordinate" || s.SpanKind() != trace.SpanKindClient {
				t.Errorf("rank %d: %s is a span of kind %v, want fwd.coordinate of kind client",
					rank, s.Name(), s.SpanKind())
			}
			if scope := s.InstrumentationScope(); scope.Name != scopeName || scope.Version != scopeVersion {
				t.Errorf("rank %d: scope %v", rank, scope)
			}
		}
		got := o.onlyPoint(t, "fwd.coordinate.duration")
		want := attrs{"fwd.name": "target", "fwd.dp.rank": rank}
		if diff := cmp.Diff(want, got.Attrs); diff != "" || got.Count != 2 {
			t.Errorf("rank %d: fwd.coordinate.duration has %d values, want 2 (-want +got):\n%s", rank, got.Count, diff)
		}
	}
}

func TestForwardSpanOfPlan(t *testing.T) {
	t.Parallel()
	os := twoSteps(t)
	for rank, o := range os {
		forward := o.ended("fwd.forward")
		if len(forward) != 2 {
			t.Fatalf("rank %d: %d forward spans, want 2", rank, len(forward))
		}
		unpadded, graph := []int{3, 6}[rank], []int{4, 8}[rank]
		base := attrs{
			"fwd.name": "target", "fwd.phase": "mixed", "fwd.num_tokens": 8, "fwd.num_tokens_unpadded": unpadded,
			"fwd.num_reqs": rank + 1, "fwd.step": 1,
			"fwd.dp.rank": rank, "fwd.dp.size": 2, "fwd.dp.max_tokens": 8, "fwd.dp.max_tokens_rank": 1,
			"fwd.padding.graph": graph - unpadded, "fwd.padding.dp": 8 - graph,
			"fwd.padding.ratio": float64(8-unpadded) / 8,
			"fwd.graph.mode":    "FULL", "fwd.graph.reason": "relaxed", "fwd.batch.uniform": false, "fwd.dummy": false,
		}
		wantAttrs(t, forward[0], base)
		// Rank 0 is eager and has no padding. Rank 1 keeps the padding for the graph that it can't use
		// now.
		reason, eagerTokens := "disabled", 3
		if rank == 1 {
			reason, eagerTokens = "dp_rank", 8
		}
		wantAttrs(t, forward[1], with(base, "fwd.step", 2, "fwd.num_tokens", eagerTokens,
			"fwd.padding.graph", eagerTokens-unpadded, "fwd.padding.dp", 0,
			"fwd.padding.ratio", float64(eagerTokens-unpadded)/float64(eagerTokens),
			"fwd.graph.mode", "NONE", "fwd.graph.reason", reason,
			"fwd.dp.lowest_mode_rank", 0, "fwd.dp.lowest_mode_ranks", []int{0}))
	}
	kind := func(rank int, kind string, sum float64) point {
		return point{attrs{
			"fwd.name": "target", "fwd.dp.rank": rank, "fwd.dummy": false, "fwd.padding.kind": kind,
		}, 0, sum}
	}
	os[0].wantPoints(t, "fwd.padding", kind(0, "dp", 4), kind(0, "graph", 1))
	os[1].wantPoints(t, "fwd.padding", kind(1, "graph", 4))
}

// TestRanksOnForwardSpan has ten ranks of which nine lower the mode and others that are idle.
func TestRanksOnForwardSpan(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		votes  func(rank int) fwd.Vote
		idle   any
		lowest any
	}{
		{"all the same", func(int) fwd.Vote { return fwd.Vote{GraphMode: fwd.GraphFull} }, nil, nil},
		{
			"nine lower the mode", func(rank int) fwd.Vote {
				if rank == 3 {
					return fwd.Vote{GraphMode: fwd.GraphFull}
				}
				return fwd.Vote{}
			}, nil, []int{0, 1, 2, 4, 5, 6, 7, 8}, // the first eight of nine
		},
		{
			"idle ranks lower nothing", func(rank int) fwd.Vote {
				return fwd.Vote{GraphMode: fwd.GraphFull, Idle: rank > 3}
			}, 6, nil,
		},
		{
			"idle ranks in a lower mode", func(rank int) fwd.Vote {
				if rank == 0 {
					return fwd.Vote{GraphMode: fwd.GraphFull}
				}
				return fwd.Vote{Idle: rank > 1}
			}, 8, []int{1},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			votes := make([]fwd.Vote, 10)
			for rank := range votes {
				votes[rank] = test.votes(rank)
				votes[rank].NumTokens, votes[rank].NumTokensPadded = 4, 4
			}
			a, err := fwd.Agree(votes, 0)
			if err != nil {
				t.Fatal(err)
			}
			o := newTelemetry()
			cfg := fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 10}}
			pass := fwd.Pass{NumTokens: 4, GraphMode: a.GraphMode, Agreement: &a}
			if err := o.runner(t, cfg).Run(context.Background(), pass, nothing); err != nil {
				t.Fatal(err)
			}
			got := attrsOf(o.only(t, "fwd.forward").Attributes())
			if diff := cmp.Diff(test.idle, got["fwd.idle_ranks"]); diff != "" {
				t.Errorf("fwd.idle_ranks (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.lowest, got["fwd.dp.lowest_mode_ranks"]); diff != "" {
				t.Errorf("fwd.dp.lowest_mode_ranks (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUBatchSpans(t *testing.T) {
	t.Parallel()
	o, clock := newTelemetry(), newSimClock()
	r := o.runner(t, fwd.Config{}, fwd.WithClock(clock.Now))
	began := clock.Now()
	pass := fwd.Pass{NumTokens: 12, NumTokensUnpadded: 10, UBatches: []fwd.UBatchSlice{
		{Requests: fwd.Range{Start: 0, Stop: 1}, Tokens: fwd.Range{Start: 0, Stop: 4}},
		{Requests: fwd.Range{Start: 1, Stop: 3}, Tokens: fwd.Range{Start: 4, Stop: 12}},
	}}
	failed, started := fmt.Errorf("wrapped: %w", fwd.ErrLayer), make(chan struct{})
	err := r.Run(context.Background(), pass, func(ctx context.Context) error {
		return fwd.RunUBatches(ctx, func(ctx context.Context, i int) error {
			if i == 0 {
				close(started)
				<-ctx.Done()
				return nil
			}
			<-started
			clock.advance(time.Second)
			return failed
		})
	})
	if !errors.Is(err, fwd.ErrLayer) {
		t.Fatalf("%v, want ErrLayer", err)
	}
	forward := o.only(t, "fwd.forward")
	if got := attrsOf(forward.Attributes())["error.type"]; got != "layer" {
		t.Errorf("error.type of the pass is %v, want layer", got)
	}
	spans := o.ended("fwd.ubatch")
	if len(spans) != 2 {
		t.Fatalf("%d microbatch spans, want 2", len(spans))
	}
	if attrsOf(spans[0].Attributes())["fwd.ubatch.index"] == 1 {
		slices.Reverse(spans)
	}
	wantAttrs(t, spans[0], attrs{"fwd.ubatch.index": 0, "fwd.num_tokens": 4})
	wantAttrs(t, spans[1], attrs{"fwd.ubatch.index": 1, "fwd.num_tokens": 8, "error.type": "layer"})
	if spans[0].Status().Code != codes.Unset || spans[1].Status().Code != codes.Error {
		t.Errorf("status %v and %v, want none and an error", spans[0].Status(), spans[1].Status())
	}
	for i, s := range spans {
		if s.Parent().SpanID() != forward.SpanContext().SpanID() {
			t.Errorf("microbatch %d's parent is %v, want the pass", i, s.Parent().SpanID())
		}
		if s.Name() != fmt.Sprint("fwd.ubatch ", i) || s.SpanKind() != trace.SpanKindInternal {
			t.Errorf("microbatch %d is %q of kind %v, want fwd.ubatch %d of kind internal",
				i, s.Name(), s.SpanKind(), i)
		}
		if !s.EndTime().Equal(began.Add(time.Second)) {
			t.Errorf("microbatch %d ended at %v, want the clock's %v", i, s.EndTime(), began.Add(time.Second))
		}
	}
	if !spans[0].StartTime().Equal(began) {
		t.Errorf("microbatch 0 started at %v, want the clock's %v", spans[0].StartTime(), began)
	}
}

func TestLinks(t *testing.T) {
	t.Parallel()
	limits := sdktrace.NewSpanLimits()
	limits.LinkCountLimit = -1 // so that the bound is the library's
	links := make([]trace.Link, 200)
	for i := range links {
		links[i].SpanContext = trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1, byte(i)},
		})
		links[i].Attributes = []attribute.KeyValue{attribute.Int("request", i)}
	}
	root := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{9}, SpanID: trace.SpanID{9}, TraceFlags: trace.FlagsSampled,
	})
	for _, n := range []int{0, 3, 127, 128, 200} {
		for _, stepTrace := range []bool{false, true} {
			t.Run(fmt.Sprintf("links=%d/stepTrace=%t", n, stepTrace), func(t *testing.T) {
				t.Parallel()
				o := newTelemetry(sdktrace.WithRawSpanLimits(limits))
				ctx, caller := o.tracer.Start(context.Background(), "caller")
				pass := fwd.Pass{
					NumTokens: 1, Links: links[:n:n],
					Agreement: &fwd.Agreement{NumTokensAcrossDP: vec(1, 1), SpanContext: root},
				}
				var opts []fwd.Option
				var want []trace.SpanID
				if stepTrace {
					opts, want = []fwd.Option{fwd.WithStepTrace()}, []trace.SpanID{caller.SpanContext().SpanID()}
				}
				for i := 0; i < n && len(want) < 128; i++ {
					want = append(want, links[i].SpanContext.SpanID())
				}
				r := o.runner(t, ofTwo(0), opts...)
				if err := r.Run(ctx, pass, nothing); err != nil {
					t.Fatal(err)
				}
				var got []trace.SpanID
				for _, l := range o.only(t, "fwd.forward").Links() {
					got = append(got, l.SpanContext.SpanID())
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("links (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestNothingOutsideARunner has passes of no Runner inside a Runner's pass, and alone.
func TestNothingOutsideARunner(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	split := twoTokens().UBatches
	halves := func(ctx context.Context) error {
		return fwd.RunUBatches(ctx, func(context.Context, int) error { return nil })
	}
	var none *fwd.Runner
	inside := func(ctx context.Context) error {
		return errors.Join(
			none.Run(ctx, fwd.Pass{NumTokens: 2, UBatches: split}, halves),
			halves(fwd.NewContext(ctx, &fwd.ForwardContext{NumTokens: 2, UBatches: split})),
			halves(fwd.NewContext(ctx, &fwd.ForwardContext{NumTokens: 2})),
		)
	}
	if err := inside(context.Background()); err != nil {
		t.Error(err)
	}
	if n := len(o.spans.Started()) + len(o.scopes(t)); n > 0 {
		t.Errorf("%d spans and scopes without a Runner's pass, want none", n)
	}
	if err := o.runner(t, fwd.Config{}).Run(context.Background(), fwd.Pass{NumTokens: 1}, inside); err != nil {
		t.Error(err)
	}
	if n := len(o.spans.Started()); n != 1 {
		t.Errorf("%d spans, want the Runner's pass alone", n)
	}
	o.wantPoints(t, "fwd.graph.events", point{attrs{"fwd.graph.event": "eager"}, 0, 1})
}

func TestNilProvidersKeepTheOthers(t *testing.T) {
	t.Parallel()
	o := newTelemetry()
	r := o.runner(t, fwd.Config{}, fwd.WithTracerProvider(nil), fwd.WithMeterProvider(nil))
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Fatal(err)
	}
	if len(o.ended("fwd.forward")) != 1 || len(o.points(t, "fwd.forward.duration")) != 1 {
		t.Error("a nil provider took the place of one that was given")
	}
	r, err := fwd.New(fwd.Config{}, fwd.WithTracerProvider(nil), fwd.WithMeterProvider(nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(context.Background(), fwd.Pass{NumTokens: 1}, nothing); err != nil {
		t.Error(err)
	}
}
