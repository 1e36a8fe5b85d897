package fwd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/bits"
	"reflect"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"gonum.org/v1/gonum/mat"
)

// ScopeName is the instrumentation scope of this package's tracer and meter.
const ScopeName = "github.com/forwardctx/fwd"

// Version is the version of this module and of the instrumentation scope.
const Version = "0.1.0-dev"

// WithTracerProvider sets where spans go. The default, also for nil, is the global provider; nothing is
// emitted until that has an SDK behind it.
func WithTracerProvider(p trace.TracerProvider) Option {
	return optionFunc(func(cfg *config) {
		if p != nil {
			cfg.tracers = p
		}
	})
}

// WithMeterProvider sets where metrics go. The default, also for nil, is the global provider; nothing is
// recorded until that has an SDK behind it.
func WithMeterProvider(p metric.MeterProvider) Option {
	return optionFunc(func(cfg *config) {
		if p != nil {
			cfg.meters = p
		}
	})
}

// WithStepTrace puts a step into one trace across all DP ranks, which must all have this option. Rank 0,
// or a rank that is alone, opens the span fwd.step before it votes, under its caller's span. It ends with
// rank 0's pass, or with the last pass of the ranks that are in the same [NewLocalGroup]. All spans of the
// step become children of it, each with a link to its own caller's span, and rank 0's sampling decides for
// all. A rank that waited for a late rank 0 has a fwd.coordinate span that began before the root did.
//
// If the exchange fails, the root has an error, and the other ranks' spans stay in their callers'
// traces, as they do if rank 0 has no valid span.
func WithStepTrace() Option { return optionFunc(func(cfg *config) { cfg.stepTrace = true }) }

// WithStepRoot makes each step a trace of its own, with a link to the caller's span. It is for engines
// whose loop runs inside one long span: all their steps would otherwise be one trace. It does nothing
// without [WithStepTrace], and nothing on ranks other than 0.
func WithStepRoot() Option { return optionFunc(func(cfg *config) { cfg.stepRoot = true }) }

// WithObserver calls f after each pass and after each failed exchange. It runs on the goroutine that ran
// the pass or that exchanged, after the span has ended, also if the pass panics; its own panic passes
// through like that of the forward function. f may keep a copy of the Record, not the pointer. Several
// of these options add up; nil means none.
func WithObserver(f func(context.Context, *Record)) Option {
	return optionFunc(func(cfg *config) {
		if f != nil {
			cfg.observers = append(cfg.observers, f)
		}
	})
}

// WithLogger logs failed passes, failed exchanges, late returns to the group and refused captures at
// level Warn, and every pass at Debug. The default, nil, logs nothing.
func WithLogger(l *slog.Logger) Option { return optionFunc(func(cfg *config) { cfg.logger = l }) }

// WithAttributes adds attributes to all spans and metrics of the Runner, such as which replica it is.
// The package's own attributes win over one of the same name. Several of these options add up.
func WithAttributes(attrs ...attribute.KeyValue) Option {
	attrs = slices.Clone(attrs)
	return optionFunc(func(cfg *config) { cfg.attributes = append(cfg.attributes, attrs...) })
}

// WithPeerName says under which service.name a rank is known, for spans that wait for it. The default,
// also for nil, is "rank N".
func WithPeerName(name func(rank int) string) Option {
	return optionFunc(func(cfg *config) { cfg.peerName = name })
}

// WithQueue sets the device that runs the passes, one after the other. See [Queue]. nil means none.
func WithQueue(q *Queue) Option { return optionFunc(func(cfg *config) { cfg.queue = q }) }

// A Queue is a device that runs passes in the order in which they begin, however early they are begun.
// Durations of passes on Runners that share a Queue count from the later of their own start and the end
// of the pass before, so the durations of pipelined passes sum to the time that went by. Spans keep
// their own start. The zero value is ready to use, by any number of goroutines. The Runners must share
// a clock too: [New] refuses one with [WithClock] beside one without.
type Queue struct {
	mu    sync.Mutex
	clock queueClock
	last  instant // the end of the last pass
	used  bool    // last is set
}

type queueClock uint8

const (
	queueUnknown queueClock = iota
	queueReal
	queueSimulated
)

// join refuses a Runner whose clock can't be that of the others.
func (q *Queue) join(simulated bool, p *problems) {
	q.mu.Lock()
	defer q.mu.Unlock()
	clock := queueReal
	if simulated {
		clock = queueSimulated
	}
	if q.clock != queueUnknown && q.clock != clock {
		p.addf("the Queue is shared by Runners with and without WithClock; give all the same clock")
		return
	}
	q.clock = clock
}

// duration returns how long the device took for a pass.
func (q *Queue) duration(began, ended instant) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used && began.until(q.last) > 0 {
		began = q.last
	}
	d := began.until(ended)
	if d > 0 || !q.used {
		q.last, q.used = ended, true
	}
	return max(d, 0)
}

// Attribute keys, on spans, metrics, records and profiles.
const (
	keyName            = attribute.Key("fwd.name")
	keyPhase           = attribute.Key("fwd.phase")
	keyNumTokens       = attribute.Key("fwd.num_tokens")
	keyUnpadded        = attribute.Key("fwd.num_tokens_unpadded")
	keyNumReqs         = attribute.Key("fwd.num_reqs")
	keyBatchReqs       = attribute.Key("fwd.batch.num_reqs")
	keyBatchLoRAs      = attribute.Key("fwd.batch.num_active_loras")
	keyBatchUniform    = attribute.Key("fwd.batch.uniform")
	keyBatchBucket     = attribute.Key("fwd.batch.bucket")
	keyVirtualEngine   = attribute.Key("fwd.virtual_engine")
	keyUBatches        = attribute.Key("fwd.ubatches")
	keyUBatchIndex     = attribute.Key("fwd.ubatch.index")
	keyStep            = attribute.Key("fwd.step")
	keyRank            = attribute.Key("fwd.dp.rank")
	keySize            = attribute.Key("fwd.dp.size")
	keyPeerRank        = attribute.Key("fwd.dp.peer_rank")
	keyLastRank        = attribute.Key("fwd.dp.last_rank")
	keyMissingRanks    = attribute.Key("fwd.dp.missing_ranks")
	keyMaxTokens       = attribute.Key("fwd.dp.max_tokens")
	keyMaxTokensRank   = attribute.Key("fwd.dp.max_tokens_rank")
	keyLowestModeRank  = attribute.Key("fwd.dp.lowest_mode_rank")
	keyLowestModeRanks = attribute.Key("fwd.dp.lowest_mode_ranks")
	keyIdleRanks       = attribute.Key("fwd.idle_ranks")
	keyPaddingGraph    = attribute.Key("fwd.padding.graph")
	keyPaddingDP       = attribute.Key("fwd.padding.dp")
	keyPaddingRatio    = attribute.Key("fwd.padding.ratio")
	keyPaddingKind     = attribute.Key("fwd.padding.kind")
	keyGraphMode       = attribute.Key("fwd.graph.mode")
	keyGraphReason     = attribute.Key("fwd.graph.reason")
	keyGraphEvent      = attribute.Key("fwd.graph.event")
	keyDummy           = attribute.Key("fwd.dummy")
	keyWaitTime        = attribute.Key("fwd.wait_time")
	keyWaitKind        = attribute.Key("fwd.wait.kind")
	keyErrorType       = attribute.Key("error.type")

	// keyPeerService is written by hand: newer conventions have another name, and pages draw this one.
	keyPeerService = attribute.Key("peer.service")
)

// other is the word for what is beyond a bound.
const other = "_OTHER"

// What a graph event counts.
const (
	eventCapture = iota
	eventReplay
	eventEager
)

// Bounds, so that no attribute set grows without one. Together they keep an instrument below 1,500
// attribute sets; the SDK keeps 2,000.
const (
	maxLinks       = 128  // on a span: a batch has many parents
	maxErrorTypes  = 64   // words of the callers for error.type
	maxPhases      = 8    // words of the callers for fwd.phase
	maxBuckets     = 64   // capture sizes that are buckets of their own
	maxOptions     = 1024 // attribute sets with all attributes, of one instrument
	maxListedRanks = 8    // in fwd.dp.lowest_mode_ranks
	maxWaits       = 256  // fwd.wait spans of a pass
)

// listeners says who wants to know about a pass.
type listeners uint8

const (
	listenSpans listeners = 1 << iota
	listenMetrics
	listenRecords
)

// telemetry is a Runner's tracer, instruments and observers. All options of metrics are made once for
// each attribute set, so that recording allocates nothing. A nil *telemetry has no listeners.
type telemetry struct {
	name      string
	parallel  ParallelConfig
	clock     func() time.Time // nil: the real time, which spans take themselves
	stepTrace bool
	stepRoot  bool
	peerName  func(rank int) string
	names     [GraphFull + 1][len(reasons)]string // of fwd.forward spans, by mode and reason
	observers []func(context.Context, *Record)
	logger    *slog.Logger
	common    []attribute.KeyValue // on all spans
	own       []attribute.KeyValue // those, and which model and which rank it is

	tracer trace.Tracer // nil: none
	meters bool         // there are instruments

	// The global providers of which it was not yet known, in New, whether an SDK comes behind them.
	// Nothing is emitted while they are still the global ones.
	pendingTracers trace.TracerProvider
	pendingMeters  metric.MeterProvider

	duration, coordinate metric.Float64Histogram
	tokens               metric.Int64Histogram
	padding, events      metric.Int64Counter
	waitTime             metric.Float64Counter

	durations      optionCache[durationKey]
	waits          optionCache[string]
	waitTimes      optionCache[waitKey]
	tokenOptions   [GraphFull + 1][2][]metric.RecordOption // by mode and dummy
	paddingOptions [2][2][]metric.AddOption                // by kind (graph, dp) and dummy
	eventOptions   [3][]metric.AddOption

	errorTypes, phases words
}

// newTelemetry returns the telemetry of a Runner, or nil if there will never be a listener.
func newTelemetry(r *Runner, cfg *config) (*telemetry, error) {
	t := &telemetry{
		name: r.name, parallel: r.parallel, clock: r.clock,
		stepTrace: cfg.stepTrace, stepRoot: cfg.stepRoot,
		observers: cfg.observers, logger: cfg.logger, common: cfg.attributes, peerName: cfg.peerName,
	}
	t.own = slices.Clone(t.common)
	if t.name != "" {
		t.own = append(t.own, keyName.String(t.name))
	}
	t.own = t.parallel.appendAttributes(t.own)
	t.errorTypes.most, t.phases.most = maxErrorTypes, maxPhases
	t.makeNames()
	if t.peerName == nil {
		t.peerName = func(rank int) string { return "rank " + strconv.Itoa(rank) }
	}
	tracers, meters := cfg.tracers, cfg.meters
	if tracers == nil {
		tracers = otel.GetTracerProvider()
	}
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	if _, none := tracers.(noop.TracerProvider); !none {
		t.tracer = tracers.Tracer(ScopeName, trace.WithInstrumentationVersion(Version))
		if isPending(tracers) {
			t.pendingTracers = tracers
		}
	}
	if _, none := meters.(metricnoop.MeterProvider); !none {
		t.meters = true
		if isPending(meters) {
			t.pendingMeters = meters
		}
		meter := meters.Meter(ScopeName, metric.WithInstrumentationVersion(Version))
		if err := t.makeInstruments(r, meter); err != nil {
			return nil, err
		}
	}
	if t.tracer == nil && !t.meters && len(t.observers) == 0 && t.logger == nil {
		return nil, nil
	}
	return t, nil
}

// makeNames makes the names of all fwd.forward spans: the model, the mode, and the reason unless that is
// the expected one. They are made once, so that a pass only looks its name up.
func (t *telemetry) makeNames() {
	for mode := range t.names {
		for reason := range t.names[mode] {
			words := []string{"fwd.forward", t.name, GraphMode(mode).String(), reasons[reason]}
			switch Reason(reason) {
			case ReasonUnknown, ReasonExact, ReasonRelaxed, ReasonDisabled:
				words = words[:3]
			}
			words = slices.DeleteFunc(words, func(word string) bool { return word == "" })
			t.names[mode][reason] = strings.Join(words, " ")
		}
	}
}

// isPending reports whether a provider is OpenTelemetry's global one, which passes everything on to the
// SDK that the program sets later, if it does.
func isPending(provider any) bool {
	t := reflect.TypeOf(provider)
	return t.Kind() == reflect.Pointer && t.Elem().PkgPath() == "go.opentelemetry.io/otel/internal/global"
}

// listening says who wants to know about a pass in ctx.
func (t *telemetry) listening(ctx context.Context) (l listeners) {
	if t == nil {
		return 0
	}
	if t.tracer != nil && (t.pendingTracers == nil || otel.GetTracerProvider() != t.pendingTracers) {
		l |= listenSpans
	}
	if t.meters && (t.pendingMeters == nil || otel.GetMeterProvider() != t.pendingMeters) &&
		(t.duration.Enabled(ctx) || t.tokens.Enabled(ctx) || t.padding.Enabled(ctx) || t.events.Enabled(ctx) ||
			t.coordinate.Enabled(ctx) || t.waitTime.Enabled(ctx)) {
		l |= listenMetrics
	}
	if len(t.observers) > 0 || t.logger != nil && t.logger.Enabled(ctx, slog.LevelWarn) {
		l |= listenRecords
	}
	return l
}

func (t *telemetry) makeInstruments(r *Runner, meter metric.Meter) error {
	seconds := metric.WithExplicitBucketBoundaries(doublings(0.00001, 24)...)
	var active metric.Int64ObservableUpDownCounter
	var errs [7]error
	t.duration, errs[0] = meter.Float64Histogram("fwd.forward.duration", metric.WithUnit("s"), seconds,
		metric.WithDescription("Duration of forward passes, without the exchange of votes."))
	t.tokens, errs[1] = meter.Int64Histogram("fwd.forward.tokens", metric.WithUnit("{token}"),
		metric.WithExplicitBucketBoundaries(doublings(1, 21)...),
		metric.WithDescription("Tokens of forward passes, without padding."))
	t.padding, errs[2] = meter.Int64Counter("fwd.padding", metric.WithUnit("{token}"),
		metric.WithDescription("Tokens computed only for the shape of the batch."))
	t.coordinate, errs[3] = meter.Float64Histogram("fwd.coordinate.duration", metric.WithUnit("s"), seconds,
		metric.WithDescription("Duration of exchanges: waiting for the votes of other ranks."))
	t.events, errs[4] = meter.Int64Counter("fwd.graph.events", metric.WithUnit("{event}"),
		metric.WithDescription("Graphs captured and replayed, and passes without one."))
	t.waitTime, errs[5] = meter.Float64Counter("fwd.wait.time", metric.WithUnit("s"),
		metric.WithDescription("Time spent waiting for a rank, in exchanges and inside passes."))
	active, errs[6] = meter.Int64ObservableUpDownCounter("fwd.forward.active", metric.WithUnit("{pass}"),
		metric.WithDescription("Forward passes that are running."))
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	t.makeOptions()
	return t.observeActive(r, meter, active)
}

// makeOptions makes the options of all attribute sets that are known beforehand.
func (t *telemetry) makeOptions() {
	named, ranked := t.metricAttributes()
	set := func(base []attribute.KeyValue, attrs ...attribute.KeyValue) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(slices.Concat(base, attrs)...))
	}
	t.durations.make = func(k durationKey) metric.MeasurementOption { return set(ranked, k.attributes()...) }
	t.waits.make = func(w string) metric.MeasurementOption { return set(ranked, errorTypeAttributes(w)...) }
	t.waitTimes.make = func(k waitKey) metric.MeasurementOption { return set(named, k.attributes()...) }
	for mode := range t.tokenOptions {
		for dummy := range 2 {
			t.tokenOptions[mode][dummy] = []metric.RecordOption{
				set(ranked, keyGraphMode.String(GraphMode(mode).String()), keyDummy.Bool(dummy == 1))}
		}
	}
	for kind, word := range []string{"graph", "dp"} {
		for dummy := range 2 {
			t.paddingOptions[kind][dummy] = []metric.AddOption{
				set(ranked, keyPaddingKind.String(word), keyDummy.Bool(dummy == 1))}
		}
	}
	for event, word := range [...]string{eventCapture: "capture", eventReplay: "replay", eventEager: "eager"} {
		t.eventOptions[event] = []metric.AddOption{set(ranked, keyGraphEvent.String(word))}
	}
}

// metricAttributes returns what all metrics have: the model's name, and, but for fwd.wait.time, the rank.
func (t *telemetry) metricAttributes() (named, ranked []attribute.KeyValue) {
	named = slices.Clone(t.common)
	if t.name != "" {
		named = append(named, keyName.String(t.name))
	}
	ranked = slices.Clone(named)
	if t.parallel.DataParallelSize != 1 {
		ranked = append(ranked, keyRank.Int(t.parallel.DataParallelRank))
	}
	return named, ranked
}

// observeActive registers the callback that counts running passes. It holds the Runner's state weakly,
// and is unregistered once nobody else holds it.
func (t *telemetry) observeActive(r *Runner, meter metric.Meter, active metric.Int64Observable) error {
	_, ranked := t.metricAttributes()
	option := metric.WithAttributeSet(attribute.NewSet(ranked...))
	state := weak.Make(r.state)
	registration, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		if state := state.Value(); state != nil {
			_, n := state.activity.running()
			o.ObserveInt64(active, int64(n), option)
		}
		return nil
	}, active)
	if err != nil {
		return err
	}
	runtime.AddCleanup(r.state, func(r metric.Registration) { _ = r.Unregister() }, registration)
	return nil
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

// durationKey is the attribute set of fwd.forward.duration. Token counts enter it by their bucket alone.
type durationKey struct {
	phase     string
	mode      GraphMode
	reason    Reason
	dummy     bool
	bucket    int64 // below 0: none
	errorType string
}

// coarse returns the key that stands for k once there are too many.
func (k durationKey) coarse() durationKey {
	k.phase, k.bucket = other, -1
	return k
}

func (k durationKey) attributes() []attribute.KeyValue {
	attrs := append(errorTypeAttributes(k.errorType),
		keyGraphMode.String(k.mode.String()),
		keyGraphReason.String(k.reason.String()),
		keyDummy.Bool(k.dummy),
	)
	if k.bucket >= 0 {
		attrs = append(attrs, keyBatchBucket.Int64(k.bucket))
	}
	if k.phase != "" {
		attrs = append(attrs, keyPhase.String(k.phase))
	}
	return attrs
}

// waitKey is the attribute set of fwd.wait.time.
type waitKey struct {
	rank    int // below 0: too many to tell apart
	forward bool
}

// Kinds of waits.
const (
	waitCoordinate = "coordinate"
	waitForward    = "forward"
)

func (k waitKey) attributes() []attribute.KeyValue {
	kind := waitCoordinate
	if k.forward {
		kind = waitForward
	}
	attrs := []attribute.KeyValue{keyWaitKind.String(kind)}
	if k.rank >= 0 {
		attrs = append(attrs, keyPeerRank.Int(k.rank))
	}
	return attrs
}

func errorTypeAttributes(word string) []attribute.KeyValue {
	if word == "" {
		return nil
	}
	return []attribute.KeyValue{keyErrorType.String(word)}
}

// optionCache makes the options of an attribute set once, for a bounded number of sets.
type optionCache[K comparable] struct {
	make func(K) metric.MeasurementOption

	last    atomic.Pointer[measurementOptions[K]] // asked for last; nil: none
	mu      sync.RWMutex
	options map[K]*measurementOptions[K]
}

// measurementOptions are the same attribute set as an option of both kinds of instruments.
type measurementOptions[K comparable] struct {
	key    K
	record []metric.RecordOption
	add    []metric.AddOption
}

// get returns the options of a key. If there are too many keys, it returns those of coarse, a key of a
// small set.
func (c *optionCache[K]) get(key, coarse K) *measurementOptions[K] {
	if last := c.last.Load(); last != nil && last.key == key {
		return last
	}
	options := c.find(key, coarse)
	c.last.Store(options)
	return options
}

func (c *optionCache[K]) find(key, coarse K) *measurementOptions[K] {
	c.mu.RLock()
	options, ok := c.options[key]
	full := len(c.options) >= maxOptions
	if !ok && full {
		options, ok = c.options[coarse]
	}
	c.mu.RUnlock()
	if ok {
		return options
	}
	if full {
		key = coarse
	}
	option := c.make(key)
	options = &measurementOptions[K]{key, []metric.RecordOption{option}, []metric.AddOption{option}}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.options == nil {
		c.options = make(map[K]*measurementOptions[K])
	}
	c.options[key] = options
	return options
}

// words is a bounded set of words.
type words struct {
	most int

	mu    sync.Mutex
	known map[string]bool
}

// bound returns word, or the one word for all that come after the first few.
func (w *words) bound(word string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known[word] {
		return word
	}
	if len(w.known) >= w.most {
		return other
	}
	if w.known == nil {
		w.known = make(map[string]bool)
	}
	w.known[word] = true
	return word
}

// ownErrorTypes always have their place, whatever words the callers have.
var ownErrorTypes = func() map[string]bool {
	own := make(map[string]bool)
	for _, err := range []error{
		ErrNoForwardContext, ErrNoMetadata, ErrLayer, ErrNoDescriptor, ErrInvalid, ErrTokenMismatch,
		ErrLockstep, ErrRankMissing, ErrCaptureClosed, errPanic, context.Canceled, context.DeadlineExceeded,
	} {
		own[errorWord(err)] = true
	}
	return own
}()

// errorType returns the word for error.type, which is empty for nil.
func (t *telemetry) errorType(err error) string {
	if err == nil {
		return ""
	}
	word := errorWord(err)
	if ownErrorTypes[word] {
		return word
	}
	return t.errorTypes.bound(word)
}

// errorWord returns what an ErrorType method says if err has one, or else the type of err; what fmt.Errorf
// wraps says more than its wrapper, so that counts. A nil pointer in an error, whose methods may panic, is
// a type too.
func errorWord(err error) (word string) {
	defer func() {
		if recover() != nil {
			word = fmt.Sprintf("%T", err)
		}
	}()
	var typed interface{ ErrorType() string }
	if errors.As(err, &typed) {
		if word := typed.ErrorType(); word != "" {
			return word
		}
	}
	for reflect.TypeOf(err) == wrapError {
		err = errors.Unwrap(err)
	}
	return fmt.Sprintf("%T", err)
}

// wrapError is the type of an error that wraps one other with fmt.Errorf.
var wrapError = reflect.TypeOf(fmt.Errorf("%w", errPanic))

// phase returns the bounded word for a phase.
func (t *telemetry) phase(word string) string {
	switch word {
	case "", phaseDecode, phaseMixed, phaseWarmUp:
		return word
	}
	return t.phases.bound(word)
}

// timedSpan is a span whose times may be given. It is ended by span.End(span.endOptions()...), deferred
// directly, since the SDK sees a panic only there.
type timedSpan struct {
	trace.Span
	times *spanTimes // nil: the span takes the real time
}

type spanTimes struct {
	began   time.Time
	options [1]trace.SpanEndOption // the end, which finish sets
}

// endOptions returns the options of the span's end, which may be set later.
func (s *timedSpan) endOptions() []trace.SpanEndOption {
	if s.times == nil {
		return nil
	}
	return s.times.options[:]
}

// noSpan stands for a span that nobody wants.
var noSpan = timedSpan{Span: noop.Span{}}

// start starts a span. began is its start if that is not now; the zero time means now. If there is a
// clock, or timed is set, the end must be given to finish.
func (t *telemetry) start(ctx context.Context, name string, began time.Time, timed bool,
	options ...trace.SpanStartOption) (context.Context, timedSpan) {
	var span timedSpan
	if timed {
		span.times = &spanTimes{began, [1]trace.SpanEndOption{at(began)}}
		options = append(options, at(began))
	}
	ctx, span.Span = t.tracer.Start(ctx, name, options...)
	return ctx, span
}

// at returns the option of a span that starts or ends at a time. A span that is given the zero time
// takes the real time, so a clock that begins there is a nanosecond late.
func at(now time.Time) trace.SpanEventOption {
	if now.IsZero() {
		now = now.Add(1)
	}
	return trace.WithTimestamp(now)
}

// finish sets the end time, if the span is timed, and shows the outcome; word is err's error.type. If the
// clock has gone back, the span ends when it began.
func (s *timedSpan) finish(ended time.Time, err error, word string) {
	if s.times != nil {
		if ended.Before(s.times.began) {
			ended = s.times.began
		}
		s.times.options[0] = at(ended)
	}
	if err != nil && s.IsRecording() {
		s.SetAttributes(keyErrorType.String(word))
		s.SetStatus(codes.Error, fmt.Sprint(err)) // not err.Error(), which may panic
	}
}

// recordable returns a context to record with: the measurements of a pass whose context has ended count
// too.
func recordable(ctx context.Context) context.Context {
	if ctx.Err() != nil {
		return context.WithoutCancel(ctx)
	}
	return ctx
}

// instant is a point in time on the clock of a Runner: nanoseconds since 1970 if it has one of its own, or
// else since the start of the process, which is cheaper to read than the time of day. It wraps around, since
// a clock may begin at any time; so only differences count.
type instant int64

var processStart = time.Now()

// now returns the time on the process's monotonic clock.
func now() time.Duration { return time.Since(processStart) }

// now returns the time, also as the clock of the Runner says it, if it has one.
func (r *Runner) now() (instant, time.Time) {
	if r.clock == nil {
		return instant(now()), time.Time{}
	}
	t := r.clock()
	return nanoseconds(t), t
}

// nanoseconds returns those since 1970.
func nanoseconds(t time.Time) instant {
	return instant(t.Unix()*int64(time.Second) + int64(t.Nanosecond()))
}

// until returns the time from i to j, which is negative if j is earlier.
func (i instant) until(j instant) time.Duration { return time.Duration(j - i) }

// instantOf returns a time that a caller has given, for comparison with those that the Runner has read.
func (r *Runner) instantOf(t time.Time) instant {
	if r.clock != nil {
		return nanoseconds(t)
	}
	d := t.Sub(processStart) // exact, also if the system's clock was set in the meantime
	if d == math.MinInt64 || d == math.MaxInt64 {
		return nanoseconds(t) - nanoseconds(processStart)
	}
	return instant(d)
}

// now returns the time on the Runner's clock, for spans.
func (t *telemetry) now() time.Time {
	if t != nil && t.clock != nil {
		return t.clock()
	}
	return time.Now()
}

// timeOf returns the time of day.
func (r *Runner) timeOf(i instant) time.Time {
	if r.clock != nil {
		t := r.clock()
		return t.Add(nanoseconds(t).until(i))
	}
	return time.Now().Add(time.Duration(i) - now())
}

// traced is what a pass reports about itself.
type traced struct {
	telemetry *telemetry
	record    *Record // nil: nobody wants it
	plan      *plan   // of a pass in a step whose span is in this process; else nil
	span      timedSpan
	waited    atomic.Int64 // ns
	waits     atomic.Int64 // spans of them

	// What the metrics need of the pass.
	tokens, unpadded, graph int // as in Pass
	bucket                  int64
	phase                   string
	mode                    GraphMode
	reason                  Reason
	dummy                   bool

	planned, spans, metrics bool
}

// startForward starts the span of a pass, with the forward context's values, and puts it into the pass's
// context. Without a clock there is no began: spans take the real time themselves.
func (t *telemetry) startForward(x *run, p *Pass, l listeners, began time.Time) {
	maxTokens := -1
	if x.value.DP != nil {
		maxTokens = x.value.DP.MaxTokensAcrossDP()
	}
	x.Context = x.traced.start(x.Context, t, x.runner, p, l, began, t.clock != nil, maxTokens)
	if rec := x.traced.record; rec != nil && t.clock == nil {
		rec.Began = x.runner.timeOf(x.began)
	}
}

// start fills in the record of a pass and starts its span. maxTokens is the most that a rank runs, or -1.
func (x *traced) start(ctx context.Context, t *telemetry, r *Runner, p *Pass, l listeners,
	began time.Time, timed bool, maxTokens int) context.Context {
	x.telemetry, x.spans, x.metrics = t, l&listenSpans != 0, l&listenMetrics != 0
	x.planned = p.plan != nil && !p.plan.byHand
	x.tokens, x.unpadded, x.graph = p.NumTokens, p.NumTokensUnpadded, p.NumTokensGraph
	x.bucket, x.phase = r.bucket(p), p.Phase
	x.mode, x.reason, x.dummy = p.GraphMode, p.Reason, p.Dummy
	if x.record != nil {
		x.record.fill(r, p)
		x.record.Began = began
	}
	x.span = noSpan
	if !x.spans {
		return ctx
	}
	if p.plan != nil && p.plan.step != nil {
		x.plan = p.plan
		now := began
		if !timed {
			now = time.Now()
		}
		r.state.beginStep(p.plan, now)
	}
	parent, links := t.stepParent(ctx, p.stepContext())
	if len(p.Links) > 0 {
		links = append(links, p.Links[:min(len(p.Links), maxLinks-len(links))]...)
	}
	var options []trace.SpanStartOption
	if len(links) > 0 {
		options = []trace.SpanStartOption{trace.WithLinks(links...)}
	}
	ctx, x.span = t.start(parent, t.names[p.GraphMode][p.Reason], began, timed, options...)
	if x.span.IsRecording() {
		x.span.SetAttributes(x.attributes(p, maxTokens)...)
	}
	return ctx
}

// stepContext returns the context of the span of the pass's step, which is invalid if there is none.
func (p *Pass) stepContext() trace.SpanContext {
	switch {
	case p.Agreement != nil:
		return p.Agreement.SpanContext
	case p.plan != nil && p.plan.step != nil:
		return p.plan.step.span.SpanContext()
	}
	return trace.SpanContext{}
}

// stepParent returns the context under which a span of the step belongs: that of the step, with a link
// to the caller's own span, or else ctx itself.
func (t *telemetry) stepParent(ctx context.Context, step trace.SpanContext) (context.Context, []trace.Link) {
	if !t.stepTrace || !step.IsValid() {
		return ctx, nil
	}
	var links []trace.Link
	if caller := trace.SpanContextFromContext(ctx); caller.IsValid() {
		links = []trace.Link{{SpanContext: caller}}
	}
	return trace.ContextWithSpanContext(ctx, step), links
}

// attributes returns those of the fwd.forward span. What does not apply is left out.
func (x *traced) attributes(p *Pass, maxTokens int) []attribute.KeyValue {
	t, a := x.telemetry, p.Agreement
	most := 11 + toInt(p.Phase != "") // of a pass that is alone
	if p.VirtualEngine > 0 || len(p.UBatches) > 0 || p.Batch.HasLoRA {
		most += 3
	}
	if maxTokens >= 0 {
		most++
	}
	if a != nil {
		most += 5
	}
	attrs := append(make([]attribute.KeyValue, 0, len(t.own)+most), t.own...)
	attrs = append(attrs, keyNumTokens.Int(p.NumTokens)) // one by one, which is faster than several
	attrs = append(attrs, keyUnpadded.Int(p.NumTokensUnpadded))
	attrs = append(attrs, keyGraphMode.String(p.GraphMode.String()))
	attrs = append(attrs, keyGraphReason.String(p.Reason.String()))
	attrs = append(attrs, keyDummy.Bool(p.Dummy))
	if p.Phase != "" {
		attrs = append(attrs, keyPhase.String(p.Phase))
	}
	if p.VirtualEngine > 0 {
		attrs = append(attrs, keyVirtualEngine.Int(p.VirtualEngine))
	}
	if p.NumReqs > 0 {
		attrs = append(attrs, keyNumReqs.Int(p.NumReqs))
	}
	attrs = p.Batch.appendAttributes(attrs)
	if n := len(p.UBatches); n > 0 {
		attrs = append(attrs, keyUBatches.Int(n))
	}
	if x.planned || p.NumTokens > p.NumTokensUnpadded {
		ratio := float64(p.NumTokens-p.NumTokensUnpadded) / float64(max(p.NumTokens, 1))
		attrs = append(attrs, keyPaddingGraph.Int(p.NumTokensGraph-p.NumTokensUnpadded))
		attrs = append(attrs, keyPaddingDP.Int(p.NumTokens-p.NumTokensGraph))
		attrs = append(attrs, keyPaddingRatio.Float64(ratio))
	}
	if maxTokens >= 0 {
		attrs = append(attrs, keyMaxTokens.Int(maxTokens))
	}
	if a != nil {
		attrs = append(attrs, keyStep.Int64(int64(a.Step)))
		attrs = a.appendAttributes(attrs)
		attrs = a.appendRanks(attrs)
	}
	return attrs
}

func (d *BatchDescriptor) appendAttributes(attrs []attribute.KeyValue) []attribute.KeyValue {
	if *d == (BatchDescriptor{}) {
		return attrs
	}
	attrs = append(attrs, keyBatchUniform.Bool(d.Uniform))
	if d.NumReqs > 0 {
		attrs = append(attrs, keyBatchReqs.Int(d.NumReqs))
	}
	if d.HasLoRA {
		attrs = append(attrs, keyBatchLoRAs.Int(d.NumActiveLoRAs))
	}
	return attrs
}

func (c ParallelConfig) appendAttributes(attrs []attribute.KeyValue) []attribute.KeyValue {
	if c.DataParallelSize != 1 {
		attrs = append(attrs, keyRank.Int(c.DataParallelRank))
	}
	if c.DataParallelSize > 1 {
		attrs = append(attrs, keySize.Int(c.DataParallelSize))
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

// appendIdle adds that all ranks are idle. Whoever keeps spans need not look at the whole step to see that
// nobody ran in it.
func (a *Agreement) appendIdle(attrs []attribute.KeyValue) []attribute.KeyValue {
	if a.Idle {
		attrs = append(attrs, keyIdleRanks.Int(len(a.Votes)))
	}
	return attrs
}

// appendRanks adds how many ranks are idle, and the first few that lowered the mode.
func (a *Agreement) appendRanks(attrs []attribute.KeyValue) []attribute.KeyValue {
	idle := 0
	var lowest []int
	for rank := range a.Votes {
		v := &a.Votes[rank]
		if v.Idle {
			idle++
		} else if a.LowestModeRank >= 0 && v.GraphMode == a.GraphMode && len(lowest) < maxListedRanks {
			lowest = append(lowest, rank)
		}
	}
	if idle > 0 {
		attrs = append(attrs, keyIdleRanks.Int(idle))
	}
	if len(lowest) > 0 {
		attrs = append(attrs, keyLowestModeRanks.IntSlice(lowest))
	}
	return attrs
}

// bucket returns the batch size of a pass for metrics, one of few: the capture size if Plan
// dispatched the pass to a graph and there are not too many, or else the next power of two.
func (r *Runner) bucket(p *Pass) int64 {
	planned := p.GraphMode != GraphNone && p.Reason != ReasonUnknown
	if d := r.dispatcher; planned && d != nil && len(d.sizes) <= maxBuckets {
		if _, ok := slices.BinarySearch(d.sizes, p.Batch.NumTokens); ok {
			return int64(p.Batch.NumTokens)
		}
	}
	if p.NumTokens < 2 {
		return int64(p.NumTokens)
	}
	return 1 << bits.Len64(uint64(p.NumTokens-1))
}

// endForward notes the end of a pass. It does not end the span.
func (x *traced) endForward(run *run, err error) {
	r := run.runner
	ended, clock := r.now()
	duration := max(run.began.until(ended), 0)
	if r.queue != nil {
		duration = r.queue.duration(run.began, ended)
	}
	x.end(recordable(&run.passContext), clock, duration, err)
}

// end notes the end of a pass that took so long. ended is for a timed span.
func (x *traced) end(ctx context.Context, ended time.Time, duration time.Duration, err error) {
	waited, word := time.Duration(x.waited.Load()), x.telemetry.errorType(err)
	if x.record != nil {
		x.record.Duration, x.record.Err, x.record.Waited = duration, err, waited
	}
	if x.spans {
		if waited > 0 && x.span.IsRecording() {
			x.span.SetAttributes(keyWaitTime.Float64(waited.Seconds()))
		}
		x.span.finish(ended, err, word)
	}
	if x.metrics {
		x.measure(ctx, duration, word)
	}
}

// measure records the metrics of a pass.
func (x *traced) measure(ctx context.Context, duration time.Duration, errorType string) {
	t, dummy := x.telemetry, toInt(x.dummy)
	if t.duration.Enabled(ctx) {
		key := durationKey{t.phase(x.phase), x.mode, x.reason, x.dummy, x.bucket, errorType}
		t.duration.Record(ctx, duration.Seconds(), t.durations.get(key, key.coarse()).record...)
	}
	if t.tokens.Enabled(ctx) {
		t.tokens.Record(ctx, int64(x.unpadded), t.tokenOptions[x.mode][dummy]...)
	}
	if n := x.graph - x.unpadded; n > 0 {
		t.padding.Add(ctx, int64(n), t.paddingOptions[0][dummy]...)
	}
	if n := x.tokens - x.graph; n > 0 {
		t.padding.Add(ctx, int64(n), t.paddingOptions[1][dummy]...)
	}
	if x.mode == GraphNone {
		x.event(ctx, eventEager)
	}
}

// event counts a graph event.
func (x *traced) event(ctx context.Context, event int) {
	if x != nil && x.metrics {
		x.telemetry.events.Add(recordable(ctx), 1, x.telemetry.eventOptions[event]...)
	}
}

// captureRefused logs that a pass would have captured after warm-up.
func (x *traced) captureRefused(ctx context.Context, err error) {
	if x != nil && x.record != nil && x.telemetry.logger != nil {
		x.telemetry.logger.LogAttrs(ctx, slog.LevelWarn, "capture after warm-up refused",
			slog.String("error", err.Error()), slog.Attr{Value: x.record.LogValue()})
	}
}

// observe tells the observers and the log how a pass ended.
func (x *traced) observe(run *run) {
	if x.plan != nil { // the step's span ends after that of the pass
		run.runner.state.endStep(x.plan, x.telemetry.now())
	}
	x.tell(&run.passContext)
}

// tell tells the observers and the log how the pass ended.
func (x *traced) tell(ctx context.Context) {
	if x.record != nil {
		x.telemetry.tell(ctx, x.record, "forward pass", "forward pass failed")
	}
}

// tell tells the observers and the log.
func (t *telemetry) tell(ctx context.Context, rec *Record, well, failed string) {
	if t.logger != nil {
		level, message := slog.LevelDebug, well
		if rec.Err != nil {
			level, message = slog.LevelWarn, failed
		}
		if t.logger.Enabled(ctx, level) {
			attrs := []slog.Attr{{Value: rec.LogValue()}}
			if rec.Err != nil {
				attrs = append(attrs, slog.String("error", fmt.Sprint(rec.Err)))
			}
			t.logger.LogAttrs(ctx, level, message, attrs...)
		}
	}
	for _, f := range t.observers {
		f(ctx, rec)
	}
}

// report reports a pass that ran elsewhere.
func (t *telemetry) report(
	ctx context.Context, r *Runner, p Pass, began, ended time.Time, err error, l listeners,
) {
	x := new(traced)
	if l&listenRecords != 0 {
		x.record = new(Record)
	}
	maxTokens := -1
	if r.parallel.coordinated() && p.across() != nil {
		maxTokens = int(mat.Max(p.across()))
	}
	ctx = x.start(ctx, t, r, &p, l, began, true, maxTokens)
	duration := max(ended.Sub(began), 0)
	if r.queue != nil {
		duration = r.queue.duration(r.instantOf(began), r.instantOf(ended))
	}
	x.end(recordable(ctx), ended, duration, err)
	x.span.End(x.span.endOptions()...)
	if x.plan != nil {
		r.state.endStep(x.plan, ended)
	}
	x.tell(ctx)
}

// startUBatch starts the span of a microbatch.
func (t *telemetry) startUBatch(ctx context.Context, i, numTokens int) (context.Context, timedSpan) {
	var began time.Time
	if t.clock != nil {
		began = t.clock()
	}
	ctx, span := t.start(ctx, "fwd.ubatch "+strconv.Itoa(i), began, t.clock != nil)
	if span.IsRecording() {
		span.SetAttributes(t.common...)
		span.SetAttributes(keyUBatchIndex.Int(i), keyNumTokens.Int(numTokens))
	}
	return ctx, span
}

// endUBatch shows the outcome of a microbatch on its span, and sets its end if there is a clock.
func (t *telemetry) endUBatch(span *timedSpan, err error) {
	var ended time.Time
	if t.clock != nil {
		ended = t.clock()
	}
	span.finish(ended, err, t.errorType(err))
}

// coordinateSpan is the span of an exchange. With the step trace it is opened when the votes are known:
// only they say under which span that of another rank belongs.
type coordinateSpan struct {
	telemetry *telemetry
	listeners listeners
	clock     time.Time // when the exchange began, on the Runner's clock if it has one
	caller    context.Context
	ctx       context.Context // the exchange's
	span      timedSpan       // zero: not open yet
}

// startCoordinate starts the span of an exchange, if anybody listens. With the step trace, rank 0 starts
// that of the step, whose context is in its vote.
func (t *telemetry) startCoordinate(ctx context.Context, e *exchange, clock time.Time) *coordinateSpan {
	l := t.listening(ctx)
	if t != nil && t.stepTrace && e.runner.local != nil {
		e.runner.local.inSteps.Store(l&listenSpans != 0)
	}
	if l == 0 {
		return nil
	}
	s := &coordinateSpan{telemetry: t, listeners: l, clock: clock, caller: ctx, ctx: ctx}
	switch {
	case l&listenSpans == 0:
	case !t.stepTrace:
		s.ctx, s.span = t.start(ctx, "fwd.coordinate", s.began(e), true, clientKind)
	case t.parallel.DataParallelRank == 0:
		s.ctx, e.step = t.startStep(ctx, e.runner, s.began(e))
		e.draft.vote.SpanContext = e.step.span.SpanContext()
	}
	return s
}

// began returns the time of day at which the exchange began. Without a clock that takes two looks at the
// time, which are spared if only metrics are wanted.
func (s *coordinateSpan) began(e *exchange) time.Time {
	if e.runner.clock != nil {
		return s.clock
	}
	return e.runner.timeOf(e.began)
}

var clientKind = trace.WithSpanKind(trace.SpanKindClient)

// end ends the span of an exchange, measures it, and tells of one that failed.
func (s *coordinateSpan) end(e *exchange) {
	t := s.telemetry
	word := t.errorType(e.err)
	if s.listeners&listenSpans != 0 {
		s.endSpan(e, word)
		e.joinStep(s.span.times.began.Add(e.wait), word)
	}
	if s.listeners&listenMetrics != 0 {
		ctx := recordable(s.ctx)
		t.coordinate.Record(ctx, e.wait.Seconds(), t.waits.get(word, word).record...)
		if e.err == nil && e.lastRank >= 0 && e.lastRank != t.parallel.DataParallelRank {
			t.countWait(ctx, e.lastRank, false, e.wait)
		}
	}
	if s.listeners&listenRecords != 0 {
		s.tell(e)
	}
}

func (s *coordinateSpan) endSpan(e *exchange, word string) {
	t := s.telemetry
	if s.span.Span == nil {
		var step trace.SpanContext
		began := s.began(e)
		if e.agreement != nil {
			step = e.agreement.SpanContext
		}
		if e.step != nil { // this rank has opened it, at that time
			step, began = e.step.span.SpanContext(), e.step.span.times.began
		}
		ctx, links := t.stepParent(s.caller, step) // without a step: the caller's
		s.ctx, s.span = t.start(ctx, "fwd.coordinate", began, true, clientKind, trace.WithLinks(links...))
	}
	defer func() { s.span.End(s.span.endOptions()...) }()
	s.span.finish(s.span.times.began.Add(e.wait), e.err, word) // not by another look at the time of day
	if !s.span.IsRecording() {
		return
	}
	attrs := append(slices.Clone(t.common), keyStep.Int64(int64(e.stepNumber())))
	attrs = t.parallel.appendAttributes(attrs)
	if e.agreement != nil {
		attrs = e.agreement.appendAttributes(attrs)
		attrs = e.agreement.appendIdle(attrs)
	}
	if e.lastRank >= 0 {
		attrs = append(attrs, keyLastRank.Int(e.lastRank))
		if e.lastRank != t.parallel.DataParallelRank {
			attrs = append(attrs, keyPeerService.String(t.peerName(e.lastRank)))
		}
	}
	var rankErr *RankError
	if errors.Is(e.err, ErrRankMissing) && errors.As(e.err, &rankErr) {
		attrs = append(attrs, keyMissingRanks.IntSlice(rankErr.Ranks))
	}
	s.span.SetAttributes(attrs...)
}

// stepSpan is the span of a step while it is open, which rank 0's Runner has opened. It ends when each rank
// that is in this process has run its pass of the step, or will not run it.
type stepSpan struct {
	telemetry *telemetry
	span      timedSpan

	mu      sync.Mutex
	waiting int       // ranks that are not done yet
	until   time.Time // when the last of the others was done; zero: none is
	ended   bool
}

// maxOpenSteps bounds the steps of a group that are open, and those of a Runner whose passes have not begun.
const maxOpenSteps = 16

// startStep starts the span of a step. All ranks of a group in this process belong to it.
func (t *telemetry) startStep(ctx context.Context, r *Runner, began time.Time) (context.Context, *stepSpan) {
	var options []trace.SpanStartOption
	if t.stepRoot {
		options = append(options, trace.WithNewRoot())
		if caller := trace.SpanContextFromContext(ctx); caller.IsValid() {
			options = append(options, trace.WithLinks(trace.Link{SpanContext: caller}))
		}
	}
	s := &stepSpan{telemetry: t, waiting: 1}
	ctx, s.span = t.start(ctx, "fwd.step", began, true, options...)
	if s.span.IsRecording() {
		s.span.SetAttributes(t.own...)
	}
	if r.local != nil && r.parallel.coordinated() && s.span.SpanContext().IsValid() {
		s.waiting = r.parallel.DataParallelSize
		r.local.group.addStep(s)
	}
	return ctx, s
}

// stepAlone makes a planned pass of a rank that nobody depends on a step of its own, if there is a step
// trace. A pass that is planned inside another one, as a draft model's, belongs to that one.
func (r *Runner) stepAlone(ctx context.Context, p *Pass, mode GraphMode, began time.Time) {
	t := r.telemetry
	if t == nil || !t.stepTrace || t.listening(ctx)&listenSpans == 0 || lookup(ctx) != nil {
		return
	}
	_, p.plan.step = t.startStep(ctx, r, began)
	p.plan.step.show(mode.String(), 0, p.Phase == phaseWarmUp)
	r.state.joinStep(p.plan, t.now())
}

// joinStep finds the step that the passes of an exchange belong to, and shows on its span what came out.
func (e *exchange) joinStep(ended time.Time, word string) {
	a, r, vote := e.agreement, e.runner, &e.draft.vote
	opened := e.step != nil
	switch {
	case a == nil && opened:
		e.step.show("", e.stepNumber(), vote.WarmUp)
		e.step.end(ended, e.err, word)
		return
	case a == nil:
		return
	case !opened && r.local != nil:
		e.step = r.local.group.stepOf(a.SpanContext)
	}
	if e.step == nil {
		return
	}
	nobody := a.Idle || vote.WarmUp && vote.NumTokens == 0 // the latter ends the warm-up
	if opened {
		mode := a.GraphMode.String()
		if nobody {
			mode = stepIdle
		}
		e.step.show(mode, e.stepNumber(), vote.WarmUp)
		e.step.span.SetAttributes(a.appendIdle(nil)...)
		for range r.local.strangers() {
			e.step.rankDone(ended)
		}
	}
	if nobody {
		e.step.rankDone(ended)
	} else {
		r.state.joinStep(&e.plan, ended)
	}
}

// stepIdle stands in the place of the mode if nobody runs a pass.
const stepIdle = "IDLE"

// show names the span by the mode, if the ranks have agreed, and adds what is known of the step. A rank
// that is alone does not number its steps.
func (s *stepSpan) show(mode string, step uint64, warmUp bool) {
	if !s.span.IsRecording() {
		return
	}
	var attrs []attribute.KeyValue
	if mode != "" {
		s.span.SetName("fwd.step " + mode)
	}
	if mode != "" && mode != stepIdle {
		attrs = append(attrs, keyGraphMode.String(mode))
	}
	if step > 0 {
		attrs = append(attrs, keyStep.Int64(int64(step)))
	}
	if warmUp {
		attrs = append(attrs, keyPhase.String(phaseWarmUp))
	}
	s.span.SetAttributes(attrs...)
}

// rankDone notes that a rank has nothing more to do in the step, and ends the span with the last.
func (s *stepSpan) rankDone(ended time.Time) {
	s.mu.Lock()
	s.waiting--
	if ended.After(s.until) {
		s.until = ended
	}
	last, until := s.waiting == 0, s.until
	s.mu.Unlock()
	if last {
		s.end(until, nil, "")
	}
}

// giveUp ends the span although ranks may not be done, when the last of the others was.
func (s *stepSpan) giveUp() {
	s.mu.Lock()
	until := s.until
	s.mu.Unlock()
	if until.IsZero() {
		until = s.telemetry.now()
	}
	s.end(until, nil, "")
}

// end ends the span, unless it has ended.
func (s *stepSpan) end(ended time.Time, err error, word string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	s.span.finish(ended, err, word)
	s.span.End(s.span.endOptions()...)
}

// addStep lets the ranks of the group find a step. One that is still open many steps later, since a rank
// was started anew, ends.
func (g *localGroup) addStep(s *stepSpan) {
	g.mu.Lock()
	var oldest *stepSpan
	if g.steps = append(g.steps, s); len(g.steps) > maxOpenSteps {
		oldest = g.steps[0]
		g.steps = slices.Delete(g.steps, 0, 1)
	}
	g.mu.Unlock()
	if oldest != nil {
		oldest.giveUp()
	}
}

// stepOf returns the step with that span, or nil if that is not one of the latest.
func (g *localGroup) stepOf(c trace.SpanContext) *stepSpan {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.steps {
		own := s.span.SpanContext()
		if own.SpanID() == c.SpanID() && own.TraceID() == c.TraceID() {
			return s
		}
	}
	return nil
}

// strangers returns how many ranks of the group take no part in the span of a step: nobody records their
// spans, or their coordinator is one that hides that of the group.
func (c *localRank) strangers() (n int) {
	if c == nil {
		return 0
	}
	for _, other := range c.group.ranks {
		n += toInt(!other.inSteps.Load())
	}
	return n
}

// joinStep notes that the Runner will run a pass of a step.
func (s *state) joinStep(p *plan, now time.Time) {
	s.mu.Lock()
	var oldest *plan
	if s.planned = append(s.planned, p); len(s.planned) > maxOpenSteps {
		oldest = s.planned[0]
		s.planned = slices.Delete(s.planned, 0, 1)
	}
	s.mu.Unlock()
	if oldest != nil {
		s.endStep(oldest, now)
	}
}

// beginStep notes that the Runner runs its pass of a step. Earlier ones that it has not begun are taken
// for passes that it will never run.
func (s *state) beginStep(p *plan, now time.Time) {
	s.mu.Lock()
	var never []*plan
	if i := slices.Index(s.planned, p); i >= 0 {
		never = slices.Clone(s.planned[:i])
		s.planned = slices.Delete(s.planned, 0, i+1)
	}
	s.mu.Unlock()
	for _, earlier := range never {
		s.endStep(earlier, now)
	}
}

// endStep notes that the Runner is done in a step, once.
func (s *state) endStep(p *plan, now time.Time) {
	s.mu.Lock()
	done := p.stepDone
	p.stepDone = true
	s.mu.Unlock()
	if !done {
		p.step.rankDone(now)
	}
}

// stepNumber returns the step of an exchange that is over: the group's, if that is known.
func (e *exchange) stepNumber() uint64 {
	if e.agreement != nil {
		return e.agreement.Step
	}
	if rankErr := (*RankError)(nil); errors.As(e.err, &rankErr) && rankErr != nil {
		return rankErr.Step
	}
	return e.draft.vote.Step
}

// tell tells of an exchange that failed, or that was late.
func (s *coordinateSpan) tell(e *exchange) {
	t := s.telemetry
	if e.err != nil {
		rec := Record{
			Name: t.name, Rank: t.parallel.DataParallelRank, Size: t.parallel.DataParallelSize,
			Step: e.stepNumber(), Began: s.began(e), Wait: e.wait, LastRank: -1, Err: e.err,
		}
		t.tell(s.ctx, &rec, "", "exchange of votes failed")
	} else if t.logger != nil && e.agreement.Step > e.draft.vote.Step {
		t.logger.LogAttrs(s.ctx, slog.LevelWarn, "rank came late and goes on at the group's step",
			slog.Int(string(keyRank), t.parallel.DataParallelRank),
			slog.Uint64(string(keyStep), e.agreement.Step))
	}
}

// countWait counts the time that was spent waiting for a rank.
func (t *telemetry) countWait(ctx context.Context, rank int, forward bool, d time.Duration) {
	if d > 0 {
		t.waitTime.Add(ctx, d.Seconds(), t.waitTimes.get(waitKey{rank, forward}, waitKey{-1, forward}).add...)
	}
}

// minWait is the shortest wait that has a span of its own.
const minWait = 100 * time.Microsecond

// Waited says that the pass in ctx has waited for a rank since began, inside its forward function, as
// for the rows of that rank's experts. began must come from the clock of the Runner, which is time.Now
// without [WithClock]. A wait of 100 µs or more is a span, fwd.wait; a pass has at most 256 of them. All
// waits of a pass add up, also those that overlap, in Record.Waited, in the attribute fwd.wait_time and
// in the metric fwd.wait.time. Waited does nothing outside a Runner's pass. It may be called by several
// goroutines.
func Waited(ctx context.Context, rank int, began time.Time) {
	x := lookup(ctx).traced()
	if x == nil {
		return
	}
	t := x.telemetry
	now := t.now()
	d := max(now.Sub(began), 0)
	x.waited.Add(int64(d))
	if x.metrics {
		t.countWait(recordable(ctx), rank, true, d)
	}
	if d < minWait || !x.spans || !x.span.IsRecording() || x.waits.Add(1) > maxWaits {
		return
	}
	_, span := t.start(ctx, "fwd.wait", began, true, clientKind)
	span.SetAttributes(t.common...)
	span.SetAttributes(keyPeerService.String(t.peerName(rank)), keyPeerRank.Int(rank))
	span.finish(now, nil, "")
	span.End(span.endOptions()...)
}

// Record is one pass, or one failed exchange, for logs, statistics and planners that want no collector.
// It holds no metadata. The record of a failed exchange has only Name, Rank, Size, Step, Began, Wait and
// Err. A call that is refused before it votes, and a pass that is refused before it starts, has none.
type Record struct {
	Name       string // Config.Name
	Rank, Size int    // data-parallel
	Step       uint64 // 0: the pass has no agreement

	NumTokens, NumTokensUnpadded, NumTokensGraph, NumReqs int

	GraphMode GraphMode
	Reason    Reason
	Batch     BatchDescriptor
	UBatches  int // 0: not split
	Dummy     bool
	Phase     string

	// Began is the start of the pass, or of the failed exchange.
	Began time.Time

	// Wait is the duration of the exchange, Duration that of the pass, and Waited how much of the pass
	// was spent in waits that were told to the function Waited.
	Wait, Duration, Waited time.Duration

	// LastRank is the rank whose vote came last, or -1 if that is not known.
	LastRank int

	// Votes are those of the pass's agreement, nil if it has none. They must not be modified.
	Votes []Vote

	// Err is what failed the pass or the exchange. A pass that panicked has an error too.
	Err error
}

// fill sets what is known of a pass when it begins.
func (rec *Record) fill(r *Runner, p *Pass) {
	rec.Name, rec.Rank, rec.Size = r.name, r.parallel.DataParallelRank, r.parallel.DataParallelSize
	rec.NumTokens, rec.NumTokensUnpadded = p.NumTokens, p.NumTokensUnpadded
	rec.NumTokensGraph, rec.NumReqs = p.NumTokensGraph, p.NumReqs
	rec.GraphMode, rec.Reason, rec.Batch = p.GraphMode, p.Reason, p.Batch
	rec.UBatches, rec.Dummy, rec.Phase = len(p.UBatches), p.Dummy, p.Phase
	rec.LastRank = -1
	if p.plan != nil {
		rec.Wait, rec.LastRank = p.plan.wait, p.plan.lastRank
	}
	if p.Agreement != nil {
		rec.Step, rec.Votes = p.Agreement.Step, p.Agreement.Votes
	}
}

// LogValue returns a group of the attributes that apply, under the names that they have on spans, and
// error.type if it failed. The durations are fwd.wait and fwd.duration.
func (rec *Record) LogValue() slog.Value {
	attrs := make([]slog.Attr, 0, 20)
	number := func(key attribute.Key, n int, applies bool) {
		if applies {
			attrs = append(attrs, slog.Int(string(key), n))
		}
	}
	word := func(key attribute.Key, s string) {
		if s != "" {
			attrs = append(attrs, slog.String(string(key), s))
		}
	}
	word(keyName, rec.Name)
	if rec.Step > 0 {
		attrs = append(attrs, slog.Uint64(string(keyStep), rec.Step))
	}
	number(keyRank, rec.Rank, rec.Size != 1)
	number(keySize, rec.Size, rec.Size > 1)
	if pass := rec.NumTokens > 0 || rec.Duration > 0; pass {
		word(keyPhase, rec.Phase)
		number(keyNumTokens, rec.NumTokens, true)
		number(keyUnpadded, rec.NumTokensUnpadded, true)
		number(keyNumReqs, rec.NumReqs, rec.NumReqs > 0)
		word(keyGraphMode, rec.GraphMode.String())
		word(keyGraphReason, rec.Reason.String())
		if b := &rec.Batch; *b != (BatchDescriptor{}) {
			attrs = append(attrs, slog.Bool(string(keyBatchUniform), b.Uniform))
			number(keyBatchReqs, b.NumReqs, b.NumReqs > 0)
			number(keyBatchLoRAs, b.NumActiveLoRAs, b.HasLoRA)
		}
		if padding := rec.NumTokens - rec.NumTokensUnpadded; padding > 0 {
			number(keyPaddingGraph, rec.NumTokensGraph-rec.NumTokensUnpadded, true)
			number(keyPaddingDP, rec.NumTokens-rec.NumTokensGraph, true)
			attrs = append(attrs, slog.Float64(string(keyPaddingRatio), float64(padding)/float64(rec.NumTokens)))
		}
		number(keyUBatches, rec.UBatches, rec.UBatches > 0)
		attrs = append(attrs, slog.Bool(string(keyDummy), rec.Dummy), slog.Duration("fwd.duration", rec.Duration))
	}
	number(keyLastRank, rec.LastRank, rec.LastRank >= 0)
	if rec.Wait > 0 {
		attrs = append(attrs, slog.Duration("fwd.wait", rec.Wait))
	}
	if rec.Waited > 0 {
		attrs = append(attrs, slog.Float64(string(keyWaitTime), rec.Waited.Seconds()))
	}
	if rec.Err != nil {
		word(keyErrorType, errorWord(rec.Err))
	}
	return slog.GroupValue(attrs...)
}

// A Recorder keeps the latest records: what a rank did before the ranks parted. Make one with
// [NewRecorder] and give its Observe to [WithObserver]. It may be used by any number of goroutines.
type Recorder struct {
	mu      sync.Mutex
	records []Record // a ring
	next    int      // where the next one goes
	full    bool
}

// NewRecorder returns a Recorder of the last n records. It panics if n is below 1.
func NewRecorder(n int) *Recorder {
	if n < 1 {
		panic(fmt.Sprintf("fwd: NewRecorder(%d): want at least 1", n))
	}
	return &Recorder{records: make([]Record, n)}
}

// Observe keeps a copy of rec.
func (r *Recorder) Observe(_ context.Context, rec *Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records[r.next] = *rec
	if r.next++; r.next == len(r.records) {
		r.next, r.full = 0, true
	}
}

// Recent returns the records, oldest first.
func (r *Recorder) Recent() []Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.full {
		return slices.Clone(r.records[:r.next])
	}
	return slices.Concat(r.records[r.next:], r.records[:r.next])
}

// ProfileLabels returns a middleware that sets the labels fwd.name, fwd.graph.mode, fwd.dp.rank and
// fwd.dummy of runtime/pprof for what runs inside a pass, goroutines that start there included. So a
// CPU profile splits by rank and mode.
func ProfileLabels() Middleware {
	return func(next ForwardFunc) ForwardFunc {
		return func(ctx context.Context) (err error) {
			c := lookup(ctx)
			if c == nil {
				return next(ctx)
			}
			pprof.Do(ctx, c.profileLabels(), func(labelled context.Context) { err = next(c.over(labelled)) })
			return err
		}
	}
}

func (c *passContext) profileLabels() pprof.LabelSet {
	rank, name := 0, ""
	if c.run != nil {
		rank, name = c.run.runner.parallel.DataParallelRank, c.run.runner.name
	} else if c.fc.DP != nil {
		rank = c.fc.DP.Rank()
	}
	return pprof.Labels(
		string(keyName), name,
		string(keyGraphMode), c.fc.GraphMode.String(),
		string(keyRank), strconv.Itoa(rank),
		string(keyDummy), strconv.FormatBool(c.fc.Dummy),
	)
}
