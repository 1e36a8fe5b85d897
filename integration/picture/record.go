package main

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
	"github.com/forwardctx/fwd/integration/picture/timeline"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	oteltrace "go.opentelemetry.io/otel/trace"
)

// ranks is how many ranks the engine has.
const ranks = 4

// runEngine serves requests as examples/serve does, with a step trace into provider. The last rank
// gets short requests, so that it is idle while the others still serve.
func runEngine(ctx context.Context, provider oteltrace.TracerProvider) error {
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		return err
	}
	e, err := engine.New(model.New(weights), engine.Config{
		DataParallelSize: ranks,
		MaxNumSeqs:       4, // so that prompts come into steps one after another, beside decoding requests
		GraphMode:        fwd.GraphFullAndPiecewise,
		StepTrace:        true,
		TracerProvider:   provider,
	})
	if err != nil {
		return err
	}
	requests := trace.Requests(trace.Default()[:200], 60)
	for i := ranks - 1; i < len(requests); i += ranks {
		requests[i].MaxTokens = 1
	}
	_, _, err = e.Run(ctx, requests)
	return err
}

// record runs the engine and returns the step that shows the most.
func record(ctx context.Context) ([]timeline.Span, error) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	if err := runEngine(ctx, provider); err != nil {
		return nil, err
	}
	traces := map[oteltrace.TraceID][]sdktrace.ReadOnlySpan{}
	for _, s := range recorder.Ended() {
		id := s.SpanContext().TraceID()
		traces[id] = append(traces[id], s)
	}
	var best []timeline.Span
	bestScore := math.Inf(-1)
	for _, recorded := range traces {
		spans := plain(recorded)
		if score := clarity(spans); showsAll(spans) && score > bestScore {
			best, bestScore = spans, score
		}
	}
	if best == nil {
		return nil, errors.New("no step has an idle rank, lowered modes and both kinds of padding")
	}
	return best, nil
}

// plain turns the spans of a trace into those of a picture: sorted by start, with times that count
// from the first start, and with short ids.
func plain(recorded []sdktrace.ReadOnlySpan) []timeline.Span {
	slices.SortFunc(recorded, func(a, b sdktrace.ReadOnlySpan) int {
		return a.StartTime().Compare(b.StartTime())
	})
	began := recorded[0].StartTime()
	since := func(t time.Time) float64 { return math.Round(t.Sub(began).Seconds()*1e7) / 10 }
	ids := map[oteltrace.SpanID]string{}
	for i, s := range recorded {
		ids[s.SpanContext().SpanID()] = strconv.Itoa(i + 1)
	}
	spans := make([]timeline.Span, len(recorded))
	for i, s := range recorded {
		spans[i] = timeline.Span{
			ID:         ids[s.SpanContext().SpanID()],
			Parent:     ids[s.Parent().SpanID()],
			Name:       s.Name(),
			Start:      since(s.StartTime()),
			End:        since(s.EndTime()),
			Attributes: map[string]any{},
		}
		for _, a := range s.Attributes() {
			if slices.Contains(timeline.Attributes(), string(a.Key)) {
				spans[i].Attributes[string(a.Key)] = a.Value.AsInterface()
			}
		}
	}
	return spans
}

// showsAll reports whether a step has everything that the picture should show: all ranks, one of
// them idle, some of them lowered by another one, and padding of both kinds. Nothing of this
// depends on time, so every run has such steps.
func showsAll(spans []timeline.Span) bool {
	count := map[string]int{}
	for i := range spans {
		s := &spans[i]
		count[s.Kind()]++
		if s.Kind() != timeline.Forward {
			continue
		}
		count[s.Text(timeline.Reason)]++
		if s.IsDummy() {
			count["dummy"]++
		}
		if n, _ := s.Int(timeline.Tokens); n >= 32 {
			count["large"]++
		}
		for _, kind := range []string{timeline.GraphPadding, timeline.DPPadding} {
			if n, _ := s.Int(kind); n > 0 {
				count[kind]++
			}
		}
	}
	return count[timeline.Forward] == ranks && count[timeline.Coordinate] == ranks &&
		count["dummy"] == 1 && count["large"] == ranks && count["dp_rank"] > 1 && count["relaxed"] > 0 &&
		count[timeline.GraphPadding] > 0 && count[timeline.DPPadding] > 1
}

// clarity rises with the share of a step in which ranks waited for the last vote, and for each other's
// rows, as long as there is room in the picture to write on the passes. It falls with the time that
// ranks waited after the last vote: by then they only waited for a processor. A rank that is idle
// should not be the last one.
func clarity(spans []timeline.Span) float64 {
	var last, end, shortest, waits float64
	by := -1 // the rank that votes last
	for i := range spans {
		if rank, ok := spans[i].Int(timeline.LastRank); ok {
			by = rank
		}
	}
	idle := false // the last rank is
	for i := range spans {
		s := &spans[i]
		end = max(end, s.End)
		switch {
		case s.Kind() == timeline.Coordinate:
			last = max(last, s.Start)
		case s.Kind() == timeline.Forward:
			if d := s.Duration(); shortest == 0 || d < shortest {
				shortest = d
			}
			rank, _ := s.Int(timeline.Rank)
			idle = idle || s.IsDummy() && rank == by
		case s.Kind() == timeline.Wait:
			waits += s.Duration()
		}
	}
	score := waits / 4
	for i := range spans {
		if s := &spans[i]; s.Kind() == timeline.Coordinate {
			score += (last - s.Start) - 2*(s.End-last)
		}
	}
	score -= 4 * ranks * max(0.6*end-shortest, 0)
	if idle {
		score -= end
	}
	return score / end
}
