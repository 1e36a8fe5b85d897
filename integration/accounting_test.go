// Tests that spans are accounted for: what ran is in Jaeger, or counted as dropped, or not sampled;
// and requests are linked to the passes that served them.

package integration

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/google/go-cmp/cmp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// ended counts the spans that end, before anything can be lost.
type ended struct{ n atomic.Int64 }

func (*ended) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (e *ended) OnEnd(sdktrace.ReadOnlySpan)                   { e.n.Add(1) }
func (*ended) Shutdown(context.Context) error                  { return nil }
func (*ended) ForceFlush(context.Context) error                { return nil }

// TestNothingLost: at a pace that leaves the exporter some time, every span of every rank of 2,000
// steps is in Jaeger, with OpenTelemetry's default queue.
func TestNothingLost(t *testing.T) {
	const numSteps = 2000
	before := readCounts(t)
	var ran ended
	s := newService(t, "grpc", sdktrace.WithSpanProcessor(&ran))
	requests := make([]engine.Request, ranks)
	for i := range requests {
		requests[i] = engine.Request{ID: i, Prompt: []int{i}, MaxTokens: numSteps}
	}
	c := s.config()
	c.Middleware = inRank(0, func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			time.Sleep(time.Millisecond) // a step of a large model takes many
			return next(ctx)
		}
	})
	_, stats := serve(t, c, requests)
	spans := s.spans(t)
	counted := readCounts(t).minus(before)
	if want := (counts{exported: ran.n.Load()}); counted != want || int64(len(spans)) != ran.n.Load() {
		t.Errorf("Jaeger holds %d spans, OpenTelemetry counted %+v, want %+v", len(spans), counted, want)
	}
	steps := steps(spans)
	if len(steps) != stats.Steps || len(steps) < numSteps {
		t.Errorf("%d steps in Jaeger, %d in the engine, want at least %d", len(steps), stats.Steps, numSteps)
	}
	for _, step := range steps {
		checkStep(t, step)
	}
	checkTrees(t, spans)
}

// slowExporter takes its time.
type slowExporter struct{ sdktrace.SpanExporter }

func (e slowExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	time.Sleep(20 * time.Millisecond)
	return e.SpanExporter.ExportSpans(ctx, spans)
}

// TestDropsCounted: if the exporter is too slow and the queue short, what Jaeger holds and what was
// counted as dropped add up to what ran.
func TestDropsCounted(t *testing.T) {
	const numSteps = 2000
	before := readCounts(t)
	var ran ended
	short := []sdktrace.BatchSpanProcessorOption{
		sdktrace.WithMaxQueueSize(64), sdktrace.WithMaxExportBatchSize(32),
	}
	s := newServiceIn(t, shared, "http", short, sdktrace.WithSpanProcessor(&ran))
	s.exporter.SpanExporter = slowExporter{s.exporter.SpanExporter}
	g := newTracedGroup(t, s, fwd.DispatcherConfig{}, fwd.ParallelConfig{})
	for range numSteps {
		g.takeAll(t, onAll(tokens(1)))
	}
	held := int64(len(s.spans(t)))
	counted := readCounts(t).minus(before)
	const want = numSteps * (1 + 2*ranks) // the step, and an exchange and a pass of each rank
	if ran := ran.n.Load(); ran != want || held+counted.dropped != ran || counted.failed != 0 {
		t.Errorf("%d spans ran, want %d; Jaeger holds %d of them, OpenTelemetry counted %+v",
			ran, want, held, counted)
	}
	if counted.dropped == 0 || held == 0 {
		t.Errorf("%d spans held, %d dropped: want some of each", held, counted.dropped)
	}
}

// TestSampling: with a parent-based sampler a step is recorded whole, on all ranks, or not at all,
// whatever the ranks' callers are.
func TestSampling(t *testing.T) {
	for name, callers := range map[string]bool{"without callers": false, "with callers": true} {
		t.Run(name, func(t *testing.T) { testSampling(t, callers) })
	}
}

func testSampling(t *testing.T, callers bool) {
	const numSteps, fraction = 3000, 0.01
	s := newService(t, "grpc", sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(fraction))))
	g := newTracedGroup(t, s, fwd.DispatcherConfig{},
		fwd.ParallelConfig{NumUBatches: 2, DecodeUBatchThreshold: 2})
	if callers {
		g.tracer = s.provider.Tracer("engine")
	}
	for range numSteps {
		g.takeAll(t, onAll(tokens(1, 1)))
	}
	spans := s.spans(t)
	checkTrees(t, spans)
	want := map[string]int{
		"fwd.step": 1, "fwd.coordinate": ranks, "fwd.forward": ranks, "fwd.ubatch": 2 * ranks,
	}
	if callers {
		want["engine.step"] = 1 // rank 0's; those of other ranks are traces of their own
	}
	whole := 0
	for id, trace := range byTrace(spans) {
		got := map[string]int{}
		for _, s := range trace {
			got[s.Operation()]++
		}
		if callers && cmp.Equal(got, map[string]int{"engine.step": 1}) {
			continue
		}
		whole++
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("trace %s is not a whole step (-want +got):\n%s", id, diff)
		}
	}
	// 30 are expected. Fewer than 5 or more than 80 come once in 10⁸ runs.
	if whole < 5 || whole > 80 {
		t.Errorf("%d of %d steps are recorded, want about 1 %%", whole, numSteps)
	}
}

// TestRequests: a request's own trace says how long it waited and how long its answer took, and the
// passes that served it are linked to it.
func TestRequests(t *testing.T) {
	s := newService(t, "grpc")
	requests := newRequests(12, 200, 8)
	for i := range requests {
		requests[i].Arrival = time.Duration(i) * 10 * time.Millisecond
	}
	c := s.config()
	c.Speed = 1
	serve(t, c, requests)
	spans := s.spans(t)
	links := map[string]int{} // passes by the span that they are linked to
	for _, pass := range named(spans, "fwd.forward") {
		for _, l := range pass.Links {
			links[l.TraceID+l.SpanID]++
		}
	}
	served := named(spans, "request")
	if len(served) != len(requests) {
		t.Errorf("%d request spans for %d requests", len(served), len(requests))
	}
	for _, s := range served {
		r := &requests[s.Attributes["engine.request.id"].(int64)]
		checkRequest(t, &s, r)
		// There is a pass for each token, and one more for each part of the prompt beyond a step's
		// budget.
		if n := links[s.TraceID+s.SpanID]; n < r.MaxTokens || n > r.MaxTokens+(len(r.Prompt)-1)/8 {
			t.Errorf("request %d: %d passes are linked to it for %d tokens and a prompt of %d",
				r.ID, n, r.MaxTokens, len(r.Prompt))
		}
	}
}

// checkRequest checks the span of a request.
func checkRequest(t *testing.T, s *Span, r *engine.Request) {
	t.Helper()
	queue, _ := s.Attributes["gen_ai.latency.time_in_queue"].(float64)
	first, _ := s.Attributes["gen_ai.latency.time_to_first_token"].(float64)
	last, _ := s.Attributes["gen_ai.latency.e2e"].(float64)
	if queue < 0 || first <= queue || last < first || last > patience.Seconds() {
		t.Errorf("request %d: %vs in the queue, first token after %vs, last after %vs", r.ID, queue, first, last)
	}
	for _, latency := range []string{"time_in_queue", "time_to_first_token", "e2e"} {
		delete(s.Attributes, "gen_ai.latency."+latency)
	}
	want := attrs{
		"engine.request.id":              int64(r.ID),
		"engine.request.rank":            int64(r.ID % ranks),
		"engine.request.passes":          int64(len(s.Links)),
		"engine.request.finished":        true,
		"gen_ai.request.id":              strconv.Itoa(r.ID),
		"gen_ai.request.max_tokens":      int64(r.MaxTokens),
		"gen_ai.usage.prompt_tokens":     int64(len(r.Prompt)),
		"gen_ai.usage.completion_tokens": int64(r.MaxTokens),
	}
	if diff := cmp.Diff(want, s.Attributes); diff != "" || s.ParentSpanID != "" {
		t.Errorf("request %d, parent %q (-want +got):\n%s", r.ID, s.ParentSpanID, diff)
	}
}

// TestManyRequests: a pass is linked to at most 128 requests, and says how many more it has.
func TestManyRequests(t *testing.T) {
	for name, caller := range map[string]bool{"alone": false, "with a caller": true} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, "grpc")
			c := s.config()
			c.MaxNumSeqs, c.MaxNumBatchedTokens = 200, 200
			ctx := t.Context()
			one := "150 128 22"
			if caller { // the pass is linked to it as well
				var span trace.Span
				ctx, span = s.provider.Tracer("engine").Start(ctx, "engine.run")
				defer span.End()
				one = "150 128 23"
			}
			requests := make([]engine.Request, 150*ranks)
			for i := range requests {
				requests[i] = engine.Request{ID: i, Prompt: []int{1}, MaxTokens: 2}
			}
			if _, _, err := newEngine(t, c).Run(ctx, requests); err != nil {
				t.Fatal(err)
			}
			var got []string // of each rank's first pass
			first := map[any]bool{}
			passes := named(s.spans(t), "fwd.forward")
			slices.SortFunc(passes, func(a, b Span) int { return a.Start.Compare(b.Start) })
			for _, pass := range passes {
				rank := pass.Attributes["fwd.dp.rank"]
				if pass.Attributes["fwd.phase"] != "warmup" && !first[rank] {
					first[rank] = true
					got = append(got, fmt.Sprint(pass.Attributes["fwd.num_reqs"], " ", len(pass.Links), " ",
						pass.Attributes["engine.requests.not_linked"]))
				}
			}
			if diff := cmp.Diff([]string{one, one, one, one}, got); diff != "" {
				t.Errorf("requests, links and what is left out, of each rank (-want +got):\n%s", diff)
			}
		})
	}
}
