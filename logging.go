package fwd

import (
	"context"
	"errors"
	"math/bits"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// ScopeName is the instrumentation scope of this package's tracer and meter.
const ScopeName = "github.com/forwardctx/fwd"

// Version is the version of this module, and of the instrumentation scope.
const Version = "0.1.0"

// WithTracerProvider sets where spans go. The default, also for nil, is the global provider.
func WithTracerProvider(p trace.TracerProvider) Option {
	return optionFunc(func(r *Runner) {
		if p != nil {
			r.tracerProvider = p
		}
	})
}

// WithMeterProvider sets where metrics go. The default, also for nil, is the global provider.
func WithMeterProvider(p metric.MeterProvider) Option {
	return optionFunc(func(r *Runner) {
		if p != nil {
			r.meterProvider = p
		}
	})
}

// WithStepTrace puts a step into one trace across all DP ranks, which must all have this option: the step hangs on the
// fwd.coordinate span of rank 0, itself under rank 0's caller. The other ranks' coordinate spans and all forward spans
// are its children, each with a link to its own caller's span. Rank 0's sampling decides for all. Where rank 0 has no valid
// span, or the exchange fails, each span stays in its caller's trace.
func WithStepTrace() Option { return optionFunc(func(r *Runner) { r.stepTrace = true }) }

// Attribute keys, on spans and metrics.
const (
	keyName           = attribute.Key("fwd.name")
	keyNumTokens      = attribute.Key("fwd.num_tokens")
	keyUnpadded       = attribute.Key("fwd.num_tokens_unpadded")
	keyNumReqs        = attribute.Key("fwd.num_reqs")
	keyBatchReqs      = attribute.Key("fwd.batch.num_reqs")
	keyBatchLoRAs     = attribute.Key("fwd.batch.num_active_loras")
	keyBatchUniform   = attribute.Key("fwd.batch.uniform")
	keyBatchBucket    = attribute.Key("fwd.batch.bucket")
	keyVirtualEngine  = attribute.Key("fwd.virtual_engine")
	keyUBatches       = attribute.Key("fwd.ubatches")
	keyUBatchIndex    = attribute.Key("fwd.ubatch.index")
	keyStep           = attribute.Key("fwd.step")
	keyRank           = attribute.Key("fwd.dp.rank")
	keySize           = attribute.Key("fwd.dp.size")
	keyMaxTokens      = attribute.Key("fwd.dp.max_tokens")
	keyMaxTokensRank  = attribute.Key("fwd.dp.max_tokens_rank")
	keyLowestModeRank = attribute.Key("fwd.dp.lowest_mode_rank")
	keyPaddingGraph   = attribute.Key("fwd.padding.graph")
	keyPaddingDP      = attribute.Key("fwd.padding.dp")
	keyPaddingKind    = attribute.Key("fwd.padding.kind")
	keyGraphMode      = attribute.Key("fwd.graph.mode")
	keyGraphReason    = attribute.Key("fwd.graph.reason")
	keyGraphEvent     = attribute.Key("fwd.graph.event")
	keyDummy          = attribute.Key("fwd.dummy")
)

// What a graph event counts.
const (
	eventCapture = iota
	eventReplay
	eventEager
)

const (
	maxLinks      = 128 // on a span: a batch has many parents
	maxErrorTypes = 64  // words of error.type on one Runner, so that no attribute set grows without bound
)

// telemetry is a Runner's tracer and instruments. All options of metrics are made once for each attribute set, so that
// recording allocates nothing. A nil *telemetry emits nothing.
type telemetry struct {
	tracer    trace.Tracer
	clock     func() time.Time // nil: the real time, which spans take themselves
	stepTrace bool

	duration, coordinate metric.Float64Histogram
	tokens               metric.Int64Histogram
	padding, events      metric.Int64Counter

	durations    optionCache[durationKey]
	waits        optionCache[string]
	tokenOptions [GraphFull + 1][2][]metric.RecordOption // by mode and dummy
	paddingGraph []metric.AddOption
	paddingDP    []metric.AddOption
	eventOptions [3][]metric.AddOption

	mu         sync.Mutex
	errorTypes map[string]bool
}

// durationKey is the attribute set of fwd.forward.duration. Token counts enter it by their bucket alone.
type durationKey struct {
	mode      GraphMode
	reason    Reason
	dummy     bool
	bucket    int64
	errorType string // empty: none
}

func newTelemetry(r *Runner) (*telemetry, error) {
	tracers, meters := r.tracerProvider, r.meterProvider
	if tracers == nil {
		tracers = otel.GetTracerProvider()
	}
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	t := &telemetry{
		tracer:     tracers.Tracer(ScopeName, trace.WithInstrumentationVersion(Version)),
		clock:      r.clock,
		stepTrace:  r.stepTrace,
		errorTypes: make(map[string]bool),
	}
	t.durations.attributes = func(k durationKey) []attribute.KeyValue { return k.attributes(r.name) }
	t.waits.attributes = errorTypeAttributes
	for mode := range t.tokenOptions {
		for dummy := range t.tokenOptions[mode] {
			t.tokenOptions[mode][dummy] = recordOptions(keyGraphMode.String(GraphMode(mode).String()), keyDummy.Bool(dummy == 1))
		}
	}
	t.paddingGraph, t.paddingDP = addOptions(keyPaddingKind.String("graph")), addOptions(keyPaddingKind.String("dp"))
	for event, word := range [...]string{eventCapture: "capture", eventReplay: "replay", eventEager: "eager"} {
		t.eventOptions[event] = addOptions(keyGraphEvent.String(word))
	}
	return t, t.makeInstruments(meters.Meter(ScopeName, metric.WithInstrumentationVersion(Version)))
}

func (t *telemetry) makeInstruments(meter metric.Meter) error {
	seconds := metric.WithExplicitBucketBoundaries(doublings(0.0005, 14)...)
	var errs [5]error
	t.duration, errs[0] = meter.Float64Histogram("fwd.forward.duration", metric.WithUnit("s"), seconds,
		metric.WithDescription("Duration of forward passes, without waiting for other ranks."))
	t.tokens, errs[1] = meter.Int64Histogram("fwd.forward.tokens", metric.WithUnit("{token}"),
		metric.WithExplicitBucketBoundaries(doublings(1, 17)...),
		metric.WithDescription("Tokens of forward passes, without padding."))
	t.padding, errs[2] = meter.Int64Counter("fwd.padding", metric.WithUnit("{token}"),
		metric.WithDescription("Tokens computed for nothing but the shape of the batch."))
	t.coordinate, errs[3] = meter.Float64Histogram("fwd.coordinate.duration", metric.WithUnit("s"), seconds,
		metric.WithDescription("Duration of exchanges: waiting for other ranks."))
	t.events, errs[4] = meter.Int64Counter("fwd.graph.events", metric.WithUnit("{event}"),
		metric.WithDescription("Graphs captured and replayed, and passes without one."))
	return errors.Join(errs[:]...)
}

// doublings returns first·2^k for k = 0..n-1.
func doublings(first float64, n int) []float64 {
	bounds := make([]float64, n)
	for k := range bounds {
		bounds[k] = first
		first *= 2
	}
	return bounds
}

func recordOptions(attrs ...attribute.KeyValue) []metric.RecordOption {
	return []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(attrs...))}
}

func addOptions(attrs ...attribute.KeyValue) []metric.AddOption {
	return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attrs...))}
}

// optionCache makes the record options of an attribute set once.
type optionCache[K comparable] struct {
	attributes func(K) []attribute.KeyValue

	mu      sync.RWMutex
	options map[K][]metric.RecordOption
}

func (c *optionCache[K]) get(key K) []metric.RecordOption {
	c.mu.RLock()
	options, ok := c.options[key]
	c.mu.RUnlock()
	if ok {
		return options
	}
	options = recordOptions(c.attributes(key)...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.options == nil {
		c.options = make(map[K][]metric.RecordOption)
	}
	c.options[key] = options
	return options
}

func (k durationKey) attributes(name string) []attribute.KeyValue {
	attrs := append(errorTypeAttributes(k.errorType),
		keyGraphMode.String(k.mode.String()),
		keyGraphReason.String(k.reason.String()),
		keyBatchBucket.Int64(k.bucket),
		keyDummy.Bool(k.dummy),
	)
	if name != "" {
		attrs = append(attrs, keyName.String(name))
	}
	return attrs
}

func errorTypeAttributes(word string) []attribute.KeyValue {
	if word == "" {
		return nil
	}
	return []attribute.KeyValue{semconv.ErrorTypeKey.String(word)}
}

// errorType returns the word for error.type: that of an ErrorType method where err has one, else the type of err. It is
// empty for nil, and one word stands for all beyond the first few.
func (t *telemetry) errorType(err error) string {
	if t == nil || err == nil {
		return ""
	}
	word := semconv.ErrorType(err).Value.AsString()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.errorTypes[word] {
		if len(t.errorTypes) == maxErrorTypes {
			return semconv.ErrorTypeOther.Value.AsString()
		}
		t.errorTypes[word] = true
	}
	return word
}

func (t *telemetry) now() time.Time {
	if t.clock != nil {
		return t.clock()
	}
	return time.Now()
}

// timedSpan is a span whose end follows the clock. It is ended by span.End(span.options...), deferred directly, since the
// SDK sees a panic only there.
type timedSpan struct {
	trace.Span
	clock   func() time.Time
	options []trace.SpanEndOption // nil: the span takes the real time; else one, set by finish
}

// start starts a span. began is its start where that is not now; the zero time is now.
func (t *telemetry) start(ctx context.Context, name string, began time.Time, options ...trace.SpanStartOption) (context.Context, timedSpan) {
	if t == nil {
		return ctx, timedSpan{Span: noop.Span{}}
	}
	span := timedSpan{clock: t.clock}
	if t.clock != nil {
		if began.IsZero() {
			began = t.clock()
		}
		span.options = []trace.SpanEndOption{trace.WithTimestamp(began)}
	}
	if !began.IsZero() {
		options = append(options, trace.WithTimestamp(began))
	}
	ctx, span.Span = t.tracer.Start(ctx, name, options...)
	return ctx, span
}

// finish takes the end time and shows the outcome; word is err's error.type. It returns the end time where a clock is set,
// so that it is read once.
func (s *timedSpan) finish(err error, word string) (ended time.Time) {
	if s.clock != nil {
		ended = s.clock()
		s.options[0] = trace.WithTimestamp(ended)
	}
	if err != nil && s.IsRecording() {
		s.SetAttributes(semconv.ErrorTypeKey.String(word))
		s.SetStatus(codes.Error, err.Error())
	}
	return ended
}

// record records the seconds since began. ended is what finish returned.
func (t *telemetry) record(ctx context.Context, h metric.Float64Histogram, began, ended time.Time, options []metric.RecordOption) {
	if ended.IsZero() {
		ended = time.Now()
	}
	h.Record(ctx, ended.Sub(began).Seconds(), options...)
}

// recordable returns a context to record with: the measurements of a pass whose context has ended count too.
func recordable(ctx context.Context) context.Context {
	if ctx.Err() != nil {
		return context.WithoutCancel(ctx)
	}
	return ctx
}

// measure is what of a pass goes into metrics at its end.
type measure struct {
	began                             time.Time
	key                               durationKey
	unpadded, paddingGraph, paddingDP int64
}

// startForward starts the span of a pass, with the forward context's values, and puts it into the pass's context.
func (t *telemetry) startForward(x *run, p *Pass) {
	if t == nil {
		x.span = timedSpan{Span: noop.Span{}}
		return
	}
	x.measure = measure{
		key:          durationKey{mode: p.GraphMode, reason: p.Reason, dummy: p.Dummy, bucket: x.runner.bucket(p)},
		unpadded:     int64(p.NumTokensUnpadded),
		paddingGraph: int64(p.NumTokensGraph - p.NumTokensUnpadded),
		paddingDP:    int64(p.NumTokens - p.NumTokensGraph),
	}
	var began time.Time // of the span: it takes the real time itself
	if t.clock != nil {
		began = t.clock()
		x.measure.began = began
	} else if t.duration.Enabled(x.passContext.Context) {
		x.measure.began = time.Now()
	}
	ctx, links := t.stepParent(x.passContext.Context, p.Agreement)
	if len(p.Links) > 0 {
		links = append(links, p.Links[:min(len(p.Links), maxLinks-len(links))]...)
	}
	var options []trace.SpanStartOption
	if len(links) > 0 {
		options = []trace.SpanStartOption{trace.WithLinks(links...)}
	}
	x.passContext.Context, x.span = t.start(ctx, "fwd.forward", began, options...)
	if x.span.IsRecording() {
		x.span.SetAttributes(x.attributes(p)...)
	}
}

// stepParent returns the context under which a span of the step belongs: that of rank 0's coordinate span, with a link to
// the caller's own span, or else ctx itself.
func (t *telemetry) stepParent(ctx context.Context, a *Agreement) (context.Context, []trace.Link) {
	if !t.stepTrace || a == nil || !a.SpanContext.IsValid() {
		return ctx, nil
	}
	var links []trace.Link
	if caller := trace.SpanContextFromContext(ctx); caller.IsValid() {
		links = []trace.Link{{SpanContext: caller}}
	}
	return trace.ContextWithSpanContext(ctx, a.SpanContext), links
}

// attributes returns those of the fwd.forward span. What does not apply is left out.
func (x *run) attributes(p *Pass) []attribute.KeyValue {
	attrs := make([]attribute.KeyValue, 0, 24)
	attrs = append(attrs,
		keyNumTokens.Int(p.NumTokens),
		keyUnpadded.Int(p.NumTokensUnpadded),
		keyVirtualEngine.Int(p.VirtualEngine),
		keyPaddingGraph.Int64(x.measure.paddingGraph),
		keyPaddingDP.Int64(x.measure.paddingDP),
		keyGraphMode.String(p.GraphMode.String()),
		keyGraphReason.String(p.Reason.String()),
		keyDummy.Bool(p.Dummy),
	)
	if x.runner.name != "" {
		attrs = append(attrs, keyName.String(x.runner.name))
	}
	if p.NumReqs > 0 {
		attrs = append(attrs, keyNumReqs.Int(p.NumReqs))
	}
	if p.Batch != (BatchDescriptor{}) {
		attrs = append(attrs, keyBatchUniform.Bool(p.Batch.Uniform))
	}
	if p.Batch.NumReqs > 0 {
		attrs = append(attrs, keyBatchReqs.Int(p.Batch.NumReqs))
	}
	if p.Batch.HasLoRA || p.Batch.NumActiveLoRAs > 0 {
		attrs = append(attrs, keyBatchLoRAs.Int(p.Batch.NumActiveLoRAs))
	}
	if n := len(p.UBatches); n > 0 {
		attrs = append(attrs, keyUBatches.Int(n))
	}
	attrs = x.runner.parallel.appendAttributes(attrs)
	if dp := x.value.DP; dp != nil {
		attrs = append(attrs, keyMaxTokens.Int(dp.MaxTokensAcrossDP()))
	}
	if a := p.Agreement; a != nil {
		attrs = append(attrs, keyStep.Int64(int64(a.Step)))
		attrs = a.appendAttributes(attrs)
	}
	return attrs
}

func (c ParallelConfig) appendAttributes(attrs []attribute.KeyValue) []attribute.KeyValue {
	if c.DataParallelSize > 1 {
		attrs = append(attrs, keyRank.Int(c.DataParallelRank), keySize.Int(c.DataParallelSize))
	}
	return attrs
}

func (a *Agreement) appendAttributes(attrs []attribute.KeyValue) []attribute.KeyValue {
	attrs = append(attrs, keyMaxTokensRank.Int(a.MaxTokensRank))
	if a.LowestModeRank >= 0 {
		attrs = append(attrs, keyLowestModeRank.Int(a.LowestModeRank))
	}
	return attrs
}

// bucket returns the batch size of a pass for metrics: the capture size where Plan dispatched it to a graph, else the next
// power of two. So there are few.
func (r *Runner) bucket(p *Pass) int64 {
	if p.GraphMode != GraphNone && p.Reason != ReasonUnknown && r.dispatcher != nil {
		if _, ok := slices.BinarySearch(r.dispatcher.sizes, p.Batch.NumTokens); ok {
			return int64(p.Batch.NumTokens)
		}
	}
	if p.NumTokens < 2 {
		return int64(p.NumTokens)
	}
	return 1 << bits.Len64(uint64(p.NumTokens-1))
}

// endForward records the end of a pass. It does not end the span.
func (t *telemetry) endForward(x *run, err error) {
	if t == nil {
		return
	}
	word := t.errorType(err)
	ended := x.span.finish(err, word)
	ctx := recordable(&x.passContext)
	m := &x.measure
	if !m.began.IsZero() && t.duration.Enabled(ctx) {
		m.key.errorType = word
		t.record(ctx, t.duration, m.began, ended, t.durations.get(m.key))
	}
	if t.tokens.Enabled(ctx) {
		dummy := 0
		if m.key.dummy {
			dummy = 1
		}
		t.tokens.Record(ctx, m.unpadded, t.tokenOptions[m.key.mode][dummy]...)
	}
	if m.paddingGraph > 0 {
		t.padding.Add(ctx, m.paddingGraph, t.paddingGraph...)
	}
	if m.paddingDP > 0 {
		t.padding.Add(ctx, m.paddingDP, t.paddingDP...)
	}
	if m.key.mode == GraphNone {
		t.event(ctx, eventEager)
	}
}

// event counts a graph event.
func (t *telemetry) event(ctx context.Context, event int) {
	if t == nil {
		return
	}
	t.events.Add(recordable(ctx), 1, t.eventOptions[event]...)
}

// startUBatch starts the span of a microbatch.
func (t *telemetry) startUBatch(ctx context.Context, i, numTokens int) (context.Context, timedSpan) {
	ctx, span := t.start(ctx, "fwd.ubatch", time.Time{})
	if span.IsRecording() {
		span.SetAttributes(keyUBatchIndex.Int(i), keyNumTokens.Int(numTokens))
	}
	return ctx, span
}

// coordinateSpan is the span of an exchange. With the step trace the ranks other than 0 learn only from the votes under
// which span theirs belongs, and open it then.
type coordinateSpan struct {
	t        *telemetry
	parallel ParallelConfig
	ctx      context.Context // the exchange's
	span     timedSpan       // zero: not open yet
	began    time.Time
}

// startCoordinate starts the span of an exchange, and gives the others its context where they hang their spans on it.
func (t *telemetry) startCoordinate(ctx context.Context, parallel ParallelConfig, v *Vote) coordinateSpan {
	if t == nil {
		return coordinateSpan{ctx: ctx}
	}
	s := coordinateSpan{t: t, parallel: parallel, ctx: ctx, began: t.now()}
	if t.stepTrace && parallel.DataParallelRank != 0 {
		return s
	}
	s.ctx, s.span = t.start(ctx, "fwd.coordinate", s.began)
	if t.stepTrace {
		v.SpanContext = s.span.SpanContext()
	}
	return s
}

// end ends the span of an exchange at that step, which gave the agreement or failed.
func (s *coordinateSpan) end(step uint64, a *Agreement, err error) {
	if s.t == nil {
		return
	}
	if s.span.Span == nil {
		ctx, links := s.t.stepParent(s.ctx, a) // without an agreement: the caller's
		s.ctx, s.span = s.t.start(ctx, "fwd.coordinate", s.began, trace.WithLinks(links...))
	}
	if s.span.IsRecording() {
		if err == nil {
			step = a.Step
		}
		attrs := s.parallel.appendAttributes([]attribute.KeyValue{keyStep.Int64(int64(step))})
		if err == nil {
			attrs = a.appendAttributes(attrs)
		}
		s.span.SetAttributes(attrs...)
	}
	word := s.t.errorType(err)
	ended := s.span.finish(err, word)
	s.span.End(s.span.options...)
	if ctx := recordable(s.ctx); s.t.coordinate.Enabled(ctx) {
		s.t.record(ctx, s.t.coordinate, s.began, ended, s.t.waits.get(word))
	}
}
