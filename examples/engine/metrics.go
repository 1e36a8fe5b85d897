package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// The histograms' bounds in seconds, as OpenTelemetry's conventions for generative AI have them.
var (
	firstTokenBounds = []float64{
		.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10,
	}
	perTokenBounds = []float64{.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5}
	requestBounds  = []float64{.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92}
)

// load is what a rank holds at the moment. It may be read at any time.
type load struct {
	running, waiting, blocks atomic.Int64
	allBlocks                int64
}

// note reads the scheduler's figures.
func (l *load) note(s *scheduler, now time.Time) {
	l.running.Store(int64(len(s.running)))
	l.waiting.Store(int64(s.arrived(now)))
	l.blocks.Store(l.allBlocks - int64(len(s.blocks.free)))
}

// meters are the instruments of a rank. Their names are those that serving engines have, in
// OpenTelemetry's spelling.
type meters struct {
	attributes                     metric.MeasurementOption
	firstToken, perToken, request  metric.Float64Histogram
	promptTokens, generationTokens metric.Int64Counter
	running, waiting               metric.Int64Gauge
	blocksUsed, blocks             metric.Int64Gauge
}

func newMeters(provider metric.MeterProvider, rank int) (*meters, error) {
	m := &meters{attributes: metric.WithAttributeSet(attribute.NewSet(
		attribute.Int("fwd.dp.rank", rank),
		attribute.String("gen_ai.operation.name", "text_completion"),
		attribute.String("gen_ai.provider.name", "fwd"),
	))}
	meter := provider.Meter(scopeName)
	histogram := func(name string, bounds []float64, what string) (metric.Float64Histogram, error) {
		return meter.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(what),
			metric.WithExplicitBucketBoundaries(bounds...))
	}
	tokens := func(name, what string) (metric.Int64Counter, error) {
		return meter.Int64Counter(name, metric.WithUnit("{token}"), metric.WithDescription(what))
	}
	gauge := func(name, unit, what string) (metric.Int64Gauge, error) {
		return meter.Int64Gauge(name, metric.WithUnit(unit), metric.WithDescription(what))
	}
	var errs [9]error
	m.firstToken, errs[0] = histogram("gen_ai.server.time_to_first_token", firstTokenBounds,
		"Time from a request's arrival to its first token.")
	m.perToken, errs[1] = histogram("gen_ai.server.time_per_output_token", perTokenBounds,
		"Time per token after the first one, of finished requests.")
	m.request, errs[2] = histogram("gen_ai.server.request.duration", requestBounds,
		"Time from a request's arrival to its last token.")
	m.promptTokens, errs[3] = tokens("serve.prompt_tokens", "Tokens of prompts that were computed.")
	m.generationTokens, errs[4] = tokens("serve.generation_tokens", "Tokens that were generated.")
	m.running, errs[5] = gauge("serve.num_requests_running", "{request}", "Requests in the batch.")
	m.waiting, errs[6] = gauge("serve.num_requests_waiting", "{request}", "Requests that have arrived and wait.")
	m.blocksUsed, errs[7] = gauge("serve.kv_cache_blocks_used", "{block}",
		"Blocks of the KV cache that are in use.")
	m.blocks, errs[8] = gauge("serve.kv_cache_blocks", "{block}", "Blocks of the KV cache.")
	return m, errors.Join(errs[:]...)
}

// noteLoad records what the rank holds.
func (m *meters) noteLoad(ctx context.Context, l *load) {
	m.running.Record(ctx, l.running.Load(), m.attributes)
	m.waiting.Record(ctx, l.waiting.Load(), m.attributes)
	m.blocksUsed.Record(ctx, l.blocks.Load(), m.attributes)
	m.blocks.Record(ctx, l.allBlocks, m.attributes)
}

// countTokens counts what a pass has computed. ctx is the pass's, to which an exemplar leads.
func (m *meters) countTokens(ctx context.Context, prompt, generated int) {
	m.promptTokens.Add(ctx, int64(prompt), m.attributes)
	m.generationTokens.Add(ctx, int64(generated), m.attributes)
}

// sampled measures a request that has its first token.
func (m *meters) sampled(s *sequence) {
	m.firstToken.Record(s.context(), s.firstToken.Sub(s.arrived).Seconds(), m.attributes)
}

// finished measures a request that has its last token.
func (m *meters) finished(s *sequence, now time.Time) {
	ctx := s.context()
	m.request.Record(ctx, now.Sub(s.arrived).Seconds(), m.attributes)
	if rest := len(s.result.Tokens) - 1; rest > 0 {
		m.perToken.Record(ctx, now.Sub(s.firstToken).Seconds()/float64(rest), m.attributes)
	}
}

// context returns a context with the request's span, to which an exemplar leads.
func (s *sequence) context() context.Context {
	return trace.ContextWithSpan(context.Background(), s.span)
}
