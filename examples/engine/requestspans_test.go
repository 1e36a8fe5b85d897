// The spans of requests: their parts, their links, and which are sampled.

package engine

import (
	"math"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtrace"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// recordSpans serves requests and returns the spans, by id.
func recordSpans(
	t *testing.T, cfg Config, sampler sdktrace.Sampler, requests []Request,
) map[trace.SpanID]*span {
	t.Helper()
	recorder := tracetest.NewSpanRecorder()
	cfg.TracerProvider = sdktrace.NewTracerProvider(
		sdktrace.WithSpanProcessor(recorder), sdktrace.WithSampler(sampler))
	cfg.StepTrace = true
	serve(t, cfg, requests)
	if started, ended := len(recorder.Started()), len(recorder.Ended()); started != ended {
		t.Errorf("%d spans started, %d ended", started, ended)
	}
	spans := map[trace.SpanID]*span{}
	for _, s := range recorder.Ended() {
		spans[s.SpanContext().SpanID()] = newSpan(s)
	}
	return spans
}

func isPass(s *span) bool { return strings.HasPrefix(s.Name(), "fwd.forward ") }

// TestRequestSpans: a request is a server's span whose parts follow each other, and that links to
// its passes with the tokens that each of them computed.
func TestRequestSpans(t *testing.T) {
	t.Parallel()
	requests := newRequests(9, 300, 12)
	spans := recordSpans(t, Config{DataParallelSize: 3}, sdktrace.AlwaysSample(), requests)
	served := 0
	for _, s := range spans {
		if s.Name() != "request" {
			continue
		}
		served++
		r := requests[s.int("engine.request.id")]
		if s.SpanKind() != trace.SpanKindServer || s.Parent().IsValid() {
			t.Errorf("request %d: kind %v, parent %v", r.ID, s.SpanKind(), s.Parent())
		}
		checkParts(t, spans, s)
		tokens := 0
		for _, l := range s.Links() {
			pass := spans[l.SpanContext.SpanID()]
			if pass == nil || !isPass(pass) || pass.int("fwd.dp.rank") != r.ID%3 {
				t.Errorf("request %d links to something that is no pass of its rank", r.ID)
			}
			set := attribute.NewSet(l.Attributes...)
			n, _ := set.Value("engine.request.tokens")
			tokens += int(n.AsInt64())
		}
		want, passes := len(r.Prompt)+r.MaxTokens-1, s.int("engine.request.passes")
		if tokens != want || passes != len(s.Links()) {
			t.Errorf("request %d: %d tokens in %d linked of %d passes, want %d tokens",
				r.ID, tokens, len(s.Links()), passes, want)
		}
		if s.int("gen_ai.usage.prompt_tokens") != len(r.Prompt) ||
			s.int("gen_ai.usage.completion_tokens") != r.MaxTokens ||
			s.int("gen_ai.request.max_tokens") != r.MaxTokens || !s.bool("engine.request.finished") {
			t.Errorf("request %d with a prompt of %d and %d tokens has %v",
				r.ID, len(r.Prompt), r.MaxTokens, s.Attributes())
		}
	}
	if served != len(requests) {
		t.Errorf("%d spans for %d requests", served, len(requests))
	}
}

// checkParts: queue, prefill and decode are below the request and add up to it, and the latencies
// are sums of them.
func checkParts(t *testing.T, spans map[trace.SpanID]*span, request *span) {
	t.Helper()
	parts := map[string]*span{}
	for _, s := range spans {
		if s.isChildOf(request) {
			parts[s.Name()] = s
		}
	}
	queue, prefill, decode := parts["queue"], parts["prefill"], parts["decode"]
	if len(parts) != 3 || queue == nil || prefill == nil || decode == nil {
		t.Fatalf("the parts of a request are %v", parts)
	}
	if !queue.StartTime().Equal(request.StartTime()) || !prefill.StartTime().Equal(queue.EndTime()) ||
		!decode.StartTime().Equal(prefill.EndTime()) || !decode.EndTime().Equal(request.EndTime()) {
		t.Error("the parts of a request don't add up to it")
	}
	for key, ended := range map[attribute.Key]*span{
		"gen_ai.latency.time_in_queue":       queue,
		"gen_ai.latency.time_to_first_token": prefill,
		"gen_ai.latency.e2e":                 decode,
	} {
		value, _ := request.set.Value(key)
		want := ended.EndTime().Sub(request.StartTime()).Seconds()
		if got := value.AsFloat64(); math.Abs(got-want) > 1e-6 {
			t.Errorf("%s is %v, want %v: when %s ends", key, got, want, ended.Name())
		}
	}
}

// TestRequestLinksBounded: a request links to 128 passes, and says how many more it took part in.
func TestRequestLinksBounded(t *testing.T) {
	t.Parallel()
	for _, s := range recordSpans(t, Config{}, sdktrace.AlwaysSample(),
		[]Request{{Prompt: []int{1}, MaxTokens: 150}}) {
		if s.Name() != "request" {
			continue
		}
		if len(s.Links()) != 128 || s.DroppedLinks() != 0 || s.int("engine.request.passes") != 150 ||
			s.int("engine.passes.not_linked") != 22 {
			t.Errorf("%d links, %d dropped, with %v", len(s.Links()), s.DroppedLinks(), s.Attributes())
		}
		return
	}
	t.Error("there is no request")
}

// someRequests samples every fifth request, and nothing else.
type someRequests struct{ requests atomic.Int64 }

func (s *someRequests) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	if p.Name == "request" && s.requests.Add(1)%5 == 0 {
		return sdktrace.SamplingResult{Decision: sdktrace.RecordAndSample}
	}
	return sdktrace.SamplingResult{Decision: sdktrace.Drop}
}

func (s *someRequests) Description() string { return "someRequests" }

// TestSampledAlike: of requests that are sampled, every pass is recorded, and no link between
// requests and passes leads nowhere.
func TestSampledAlike(t *testing.T) {
	t.Parallel()
	requests := newRequests(60, 60, 12)
	spans := recordSpans(t, Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise},
		fwdtrace.SampleLinked(&someRequests{}), requests)
	sampled, between, below := 0, 0, 0
	for _, s := range spans {
		if s.Name() == "request" {
			sampled++
			if len(s.Links()) != s.int("engine.request.passes") {
				t.Errorf("request %d: %d of %d passes are recorded",
					s.int("engine.request.id"), len(s.Links()), s.int("engine.request.passes"))
			}
		} else if isPass(s) && s.int("fwd.dp.rank") == 0 && len(s.Links()) > 0 {
			if step := spans[s.Parent().SpanID()]; step == nil || !strings.HasPrefix(step.Name(), "fwd.step ") {
				t.Error("the step of a recorded pass of rank 0 is not recorded")
			}
			below++
		}
		for _, l := range s.Links() {
			between++
			if spans[l.SpanContext.SpanID()] == nil {
				t.Errorf("a link of %s leads nowhere", s.Name())
			}
		}
	}
	if sampled != 12 || between == 0 || below == 0 {
		t.Errorf("%d of %d requests are sampled, with %d links and %d passes of rank 0", sampled, len(requests),
			between, below)
	}
}

// TestWarmUpIsOneTrace: all passes of the warm-up are in the trace of rank 0's span.
func TestWarmUpIsOneTrace(t *testing.T) {
	t.Parallel()
	spans := recordSpans(t, Config{DataParallelSize: 3, GraphMode: fwd.GraphFull, NumSpeculativeTokens: 1},
		sdktrace.AlwaysSample(), newRequests(3, 10, 3))
	var warmUp *span
	for _, s := range spans {
		if s.Name() == "warm-up" {
			if warmUp != nil {
				t.Error("there are two spans of the warm-up")
			}
			warmUp = s
		}
	}
	if warmUp == nil {
		t.Fatal("there is no span of the warm-up")
	}
	ranks, draft := map[int]bool{}, false
	for _, s := range spans {
		if isPass(s) && s.text("fwd.phase") == warmUpPhase {
			ranks[s.int("fwd.dp.rank")] = true
			draft = draft || strings.HasPrefix(s.Name(), "fwd.forward draft ")
			if s.SpanContext().TraceID() != warmUp.SpanContext().TraceID() {
				t.Errorf("%s of rank %d is in another trace", s.Name(), s.int("fwd.dp.rank"))
			}
		}
	}
	if len(ranks) != 3 || !draft {
		t.Errorf("warm-up passes of ranks %v, of the draft model too: %t", ranks, draft)
	}
}
