package fwd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"
)

// sentinel is an error to match with errors.Is. Its word stands in error.type on spans and metrics.
type sentinel struct{ word, text string }

// Error returns the text, with the package's name before it.
func (e *sentinel) Error() string { return "fwd: " + e.text }

// ErrorType returns a stable word for telemetry, such as "token_mismatch".
func (e *sentinel) ErrorType() string { return e.word }

// The errors of this package, matched with errors.Is. Each has a method ErrorType() string, a stable word for telemetry.
var (
	ErrNoForwardContext = &sentinel{"no_forward_context", "no forward context"}       // ctx is not in a pass
	ErrNoMetadata       = &sentinel{"no_metadata", "no metadata"}                     // the pass has none; dummy passes usually have none
	ErrLayer            = &sentinel{"layer", "layer lookup"}                          // an unknown name, or another type
	ErrNoDescriptor     = &sentinel{"no_descriptor", "no batch descriptor"}           // a graph cache has no key
	ErrInvalid          = &sentinel{"invalid", "invalid"}                             // an argument, a configuration
	ErrTokenMismatch    = &sentinel{"token_mismatch", "token counts differ"}          // a rank's tokens are not its entry in the counts across ranks
	ErrLockstep         = &sentinel{"lockstep", "ranks out of step"}                  // see RankError
	ErrRankMissing      = &sentinel{"rank_missing", "rank missing"}                   // see RankError
	ErrCaptureClosed    = &sentinel{"capture_closed", "capture closed after warm-up"} // an unknown key
)

// errPanic stands for the outcome of a function that has not returned: it panicked, or ended its goroutine.
var errPanic = &sentinel{"panic", "panic"}

func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// problems collects what is wrong with an argument, so that one error names all of it.
type problems []error

// addf adds a problem, unless there are so many that nobody would read it.
func (p *problems) addf(format string, args ...any) {
	if len(*p) < 16 {
		*p = append(*p, invalidf(format, args...))
	}
}

// count adds a problem if n is no count.
func (p *problems) count(name string, n int) {
	if n < 0 || n > maxCount {
		p.addf("%s is %d, want 0 to %d", name, n, maxCount)
	}
}

func (p problems) err() error { return errors.Join(p...) }

// bare returns the text of an error that goes into another of this package, whose name must stand once.
func bare(err error) string { return strings.TrimPrefix(err.Error(), "fwd: ") }

// abbreviate returns the first few elements of a list, and how many there are where that is not all.
func abbreviate[T any](list []T) string {
	const most = 16
	if len(list) <= most {
		return fmt.Sprint(list)
	}
	return fmt.Sprintf("%v and %d more", list[:most], len(list)-most)
}

// ForwardContext is what one forward pass needs to know, everywhere in the model. It is read-only once it is in a
// context: other goroutines read it without locks, and errors that name what is there read it later. So are the maps it
// holds.
type ForwardContext struct {
	NoCompileLayers   map[string]any   // layer objects by name, shared by all passes
	AttnMetadata      []map[string]any // attention metadata by layer: none, one map, or one per microbatch; the entry "" serves every layer without its own
	SlotMapping       []map[string]any // the same shape
	NumTokens         int              // of this rank, padding included
	NumTokensUnpadded int              // without padding; 0 is 0 here, defaults are a Pass's
	VirtualEngine     int              // index of the pipeline's engine
	DP                *DPMetadata      // nil: one rank alone, or a dense model
	GraphMode         GraphMode        // a runtime mode; in a microbatch GraphNone
	Batch             BatchDescriptor  // zero: none; in a microbatch that of the whole pass
	UBatches          []UBatchSlice    // padded form, see SplitUBatches; none: not split
	SkipCompiled      bool             // run the model's eager code though a compiled one exists
	Dummy             bool             // warm-up, or an idle rank keeping step
}

// contextKey is the key of the one value that this package has in a context, a *passContext.
type contextKey struct{}

// passContext is a context inside a pass. It overrides Value alone, so that cancellation below it costs no goroutine. A
// context that differs in one thing is a copy: none is changed once it is made.
type passContext struct {
	context.Context
	fc               *ForwardContext // never nil
	sizes            []int           // local sizes; nil: none
	ubatch, ubatches int             // index and count of the microbatch; count 0: in none
	run              *run            // nil: not in a Runner's pass
}

// Value returns c itself for the package's key, and leaves every other to the parent.
func (c *passContext) Value(key any) any {
	if _, ok := key.(contextKey); ok {
		return c
	}
	return c.Context.Value(key)
}

// String names the parent and that this is a pass.
func (c *passContext) String() string { return contextString(c.Context) }

// hiddenContext is a context outside all passes, whatever its parent is in.
type hiddenContext struct{ context.Context }

// Value returns nil for the package's key, whatever the parent has.
func (c *hiddenContext) Value(key any) any {
	if _, ok := key.(contextKey); ok {
		return nil
	}
	return c.Context.Value(key)
}

// String is as that of a pass.
func (c *hiddenContext) String() string { return contextString(c.Context) }

// contextString is for String methods. They keep fmt from printing the fields, which would race with whoever writes what
// those point to.
func contextString(parent context.Context) string {
	if s, ok := parent.(fmt.Stringer); ok {
		return s.String() + ".fwd.Pass"
	}
	return reflect.TypeOf(parent).String() + ".fwd.Pass"
}

// telemetry returns the pass's; nil, which emits nothing, outside a Runner's pass.
func (c *passContext) telemetry() *telemetry {
	if c == nil || c.run == nil {
		return nil
	}
	return c.run.runner.telemetry
}

// lookup returns the innermost pass that ctx is in, or nil. The first case is the common one: model code is handed the
// pass's own context.
func lookup(ctx context.Context) *passContext {
	if c, ok := ctx.(*passContext); ok {
		return c
	}
	return lookupOuter(ctx)
}

func lookupOuter(ctx context.Context) *passContext {
	c, _ := ctx.Value(contextKey{}).(*passContext)
	return c
}

// NewContext returns a context that holds fc and hides whatever pass parent is in, with its local sizes and its
// microbatch. A nil fc hides it too and holds nothing. [Runner.Run] is the usual way to a forward context; this one is for
// tests and for callers with a life cycle of their own. It panics if parent is nil or fc.GraphMode is not a runtime mode.
func NewContext(parent context.Context, fc *ForwardContext) context.Context {
	if parent == nil {
		panic("fwd: NewContext with a nil parent")
	}
	if fc == nil {
		return &hiddenContext{parent}
	}
	if !fc.GraphMode.ValidRuntime() {
		panic(fmt.Sprintf("fwd: NewContext in graph mode %v, which is not a runtime mode", fc.GraphMode))
	}
	return &passContext{Context: parent, fc: fc}
}

// FromContext returns the forward context of the innermost pass, or microbatch, that ctx is in. ok is false outside a
// pass.
func FromContext(ctx context.Context) (fc *ForwardContext, ok bool) {
	c, direct := ctx.(*passContext) // not lookup, and written so that it is just small enough to be inlined
	if !direct {
		fc, ok = fromOuter(ctx)
		return
	}
	return c.fc, true
}

func fromOuter(ctx context.Context) (*ForwardContext, bool) {
	if c := lookupOuter(ctx); c != nil {
		return c.fc, true
	}
	return nil, false
}

// MustFromContext is [FromContext] for code that runs in passes alone. It panics with ErrNoForwardContext outside one.
func MustFromContext(ctx context.Context) *ForwardContext {
	fc, ok := FromContext(ctx)
	if !ok {
		panic(ErrNoForwardContext)
	}
	return fc
}

// AttnMetadata returns the attention metadata of a layer for the pass, or the microbatch, that ctx is in: the entry of
// that name, else the entry "". The error is ErrNoForwardContext; ErrNoMetadata, the pass has none; ErrLayer, there is no
// entry or it is not a T; or ErrInvalid, the pass is split and ctx is in none of its microbatches.
func AttnMetadata[T any](ctx context.Context, layer string) (T, error) {
	fc, ok := FromContext(ctx)
	if !ok {
		return notFound[T](ErrNoForwardContext, "attention metadata", layer)
	}
	return perLayer[T](fc, fc.AttnMetadata, "attention metadata", layer)
}

// SlotMapping returns the slot mapping of a layer, as [AttnMetadata] does the attention metadata.
func SlotMapping[T any](ctx context.Context, layer string) (T, error) {
	fc, ok := FromContext(ctx)
	if !ok {
		return notFound[T](ErrNoForwardContext, "slot mapping", layer)
	}
	return perLayer[T](fc, fc.SlotMapping, "slot mapping", layer)
}

// Layer returns the layer object of that name, from Config.NoCompileLayers. The error is ErrNoForwardContext, or ErrLayer:
// there is none or it is not a T.
func Layer[T any](ctx context.Context, name string) (T, error) {
	fc, ok := FromContext(ctx)
	if !ok {
		return notFound[T](ErrNoForwardContext, "layer object", name)
	}
	value, found := fc.NoCompileLayers[name]
	return typed[T](fc.NoCompileLayers, "layer object", name, value, found)
}

func perLayer[T any](fc *ForwardContext, maps []map[string]any, what, layer string) (T, error) {
	switch {
	case len(fc.UBatches) > 0 || len(maps) > 1:
		return notFound[T](ErrInvalid, what, layer)
	case len(maps) == 0:
		return notFound[T](ErrNoMetadata, what, layer)
	}
	value, ok := maps[0][layer]
	if !ok {
		value, ok = maps[0][""]
	}
	return typed[T](maps[0], what, layer, value, ok)
}

func typed[T any](from map[string]any, what, layer string, value any, found bool) (T, error) {
	if v, ok := value.(T); ok {
		return v, nil
	}
	var zero T
	return zero, &layerError{ErrLayer, what, layer, from, value, found, reflect.TypeFor[T]()}
}

func notFound[T any](err *sentinel, what, layer string) (T, error) {
	var zero T
	return zero, &layerError{err: err, what: what, layer: layer}
}

// layerError is a miss. Hot code asks for what may not be there, so the text is put together when it is read.
type layerError struct {
	err         *sentinel
	what, layer string
	from        map[string]any // where it was looked for
	value       any
	found       bool // value is what was found
	want        reflect.Type
}

// Unwrap returns the sentinel.
func (e *layerError) Unwrap() error { return e.err }

// Error puts the text together.
func (e *layerError) Error() string {
	text := fmt.Sprintf("%v: %s of layer %q", e.err, e.what, e.layer)
	switch {
	case e.err == ErrInvalid:
		return text + ": the pass is split, and ctx is in none of its microbatches"
	case e.err != ErrLayer:
		return text
	case e.found:
		return fmt.Sprintf("%s is a %T, want %v", text, e.value, e.want)
	}
	return fmt.Sprintf("%s is not among %s", text, abbreviate(slices.Sorted(maps.Keys(e.from))))
}

// ForwardFunc is the forward pass of a model, or a part of it. ctx is the pass's.
type ForwardFunc func(ctx context.Context) error

// Middleware wraps what runs inside a pass: [FromContext] works in it. It is composed once, in [New]; next may be called
// more than once, with a context of the same pass.
type Middleware func(next ForwardFunc) ForwardFunc

// Chain returns the middleware that applies mw in order, the first outermost. It panics if one is nil, and what it returns
// panics if one returns nil.
func Chain(mw ...Middleware) Middleware {
	for i, m := range mw {
		if m == nil {
			panic(fmt.Sprintf("fwd: middleware %d of %d is nil", i, len(mw)))
		}
	}
	mw = slices.Clone(mw)
	return func(next ForwardFunc) ForwardFunc {
		for i, m := range slices.Backward(mw) {
			if next = m(next); next == nil {
				panic(fmt.Sprintf("fwd: middleware %d of %d returned nil", i, len(mw)))
			}
		}
		return next
	}
}

// Config says what a [Runner] runs. The zero value is one rank alone of a model without a name.
type Config struct {
	Name            string // of the model ("target", "draft"): fwd.name on spans and metrics; may be empty
	Parallel        ParallelConfig
	NoCompileLayers map[string]any // copied by New; the layers themselves are shared by all passes
}

// Option configures a [Runner] beyond its [Config].
type Option interface{ apply(*Runner) }

type optionFunc func(*Runner)

func (f optionFunc) apply(r *Runner) { f(r) }

// WithCoordinator gives the Runner the coordinator over which it exchanges votes with the other ranks. Its rank and size
// must be the Runner's. nil is none.
func WithCoordinator(c Coordinator) Option { return optionFunc(func(r *Runner) { r.coordinator = c }) }

// WithExchangeTimeout bounds how long an exchange waits for the other ranks, besides the pass's own context. The default
// is 1 minute; 0 or less is no bound. One rank's timeout breaks the step for all, as the end of its context does.
func WithExchangeTimeout(d time.Duration) Option {
	return optionFunc(func(r *Runner) { r.timeout = d })
}

// WithDispatcher gives Plan the dispatcher that chooses graphs; those of all ranks must be configured the same. nil, the
// default, plans eager passes.
func WithDispatcher(d *Dispatcher) Option { return optionFunc(func(r *Runner) { r.dispatcher = d }) }

// WithMiddleware wraps every forward function that Run is given, the first middleware outermost; several of these options
// add up. It panics if a middleware is nil; [New] does if one returns nil.
func WithMiddleware(mw ...Middleware) Option {
	chain := Chain(mw...)
	return optionFunc(func(r *Runner) { r.middleware = append(r.middleware, chain) })
}

// WithSynchronize calls f at the end of each pass, also of a failed one, before its time is taken: on a device that works
// asynchronously, f waits for it. An error of f fails the pass. nil is none.
func WithSynchronize(f func(context.Context) error) Option {
	return optionFunc(func(r *Runner) { r.synchronize = f })
}

// WithClock makes span times and durations follow now, for simulators. nil is the real time.
func WithClock(now func() time.Time) Option { return optionFunc(func(r *Runner) { r.clock = now }) }

// A Runner runs the forward passes of one rank of one model. Run may be called from several goroutines; with a
// coordinator, Plan and Run exchange votes one at a time, in the same order on every rank. A nil *Runner runs passes as
// rank 0 of 1, without telemetry.
type Runner struct {
	name        string
	parallel    ParallelConfig
	layers      map[string]any
	coordinator Coordinator
	timeout     time.Duration
	dispatcher  *Dispatcher
	middleware  []Middleware
	synchronize func(context.Context) error
	clock       func() time.Time

	tracerProvider trace.TracerProvider
	meterProvider  metric.MeterProvider
	stepTrace      bool
	telemetry      *telemetry

	handler      ForwardFunc // the middleware around the forward function of the pass in ctx; nil: no middleware
	timeoutCause error
	exchanging   sync.Mutex
	step         atomic.Uint64 // the last exchange's; written by its holder of exchanging
}

// nilRunner does what a nil *Runner does.
var nilRunner = &Runner{parallel: ParallelConfig{}.withDefaults()}

// New returns a Runner. ErrInvalid: a negative count, a rank that is not below the size, a coordinator of another rank or
// size, a nil option. An error of the meter provider is returned as it is. All that is wrong is reported at once. A missing
// coordinator is an error only where Plan or Run needs one.
func New(cfg Config, opts ...Option) (*Runner, error) {
	r := &Runner{
		name:     cfg.Name,
		parallel: cfg.Parallel.withDefaults(),
		layers:   maps.Clone(cfg.NoCompileLayers),
		timeout:  time.Minute,
	}
	var p problems
	cfg.Parallel.check(&p)
	for i, opt := range opts {
		if opt == nil {
			p.addf("option %d of %d is nil", i, len(opts))
			continue
		}
		opt.apply(r)
	}
	if c := r.coordinator; c != nil && (c.Rank() != r.parallel.DataParallelRank || c.Size() != r.parallel.DataParallelSize) {
		p.addf("the coordinator is rank %d of %d, the Runner rank %d of %d", c.Rank(), c.Size(), r.parallel.DataParallelRank, r.parallel.DataParallelSize)
	}
	r.timeoutCause = fmt.Errorf("no exchange within %v: %w", r.timeout, context.DeadlineExceeded)
	if len(r.middleware) > 0 {
		r.handler = Chain(r.middleware...)(r.runInnermost)
	}
	var err error
	r.telemetry, err = newTelemetry(r)
	if err := errors.Join(p.err(), err); err != nil {
		return nil, err
	}
	return r, nil
}

// Pass describes one forward pass. A caller fills it in, or [Runner.Plan] prepares it; after Plan the caller adds the
// metadata, VirtualEngine, SkipCompiled and Links, and the rest belongs to the plan: a split pass needs metadata for each
// microbatch, a dummy pass none. Run copies the slices; the maps must not be modified afterwards.
//
// A warm-up pass for a [Capture] c is Pass{NumTokens: c.Batch.NumTokens, GraphMode: c.Mode, Batch: c.Batch, Dummy: true}. On a
// coordinated rank it exchanges votes like any other, so all ranks warm up in the same order.
type Pass struct {
	NumTokens         int              // of this rank, padding included
	NumTokensUnpadded int              // 0: NumTokens
	NumTokensGraph    int              // after graph padding, before DP padding; 0: NumTokens
	NumReqs           int              // scheduled requests, for telemetry; 0: not said
	AttnMetadata      []map[string]any // none, one map, or one per microbatch
	SlotMapping       []map[string]any // the same shape
	VirtualEngine     int
	NumTokensAcrossDP *mat.VecDense // tokens of each rank, length DataParallelSize; nil: the agreement's, else ask the coordinator; unused by a rank alone or of a dense model
	GraphMode         GraphMode     // a runtime mode
	Reason            Reason        // for GraphMode
	Batch             BatchDescriptor
	UBatches          []UBatchSlice // padded form: they tile [0, NumTokens)
	SkipCompiled      bool
	Dummy             bool         // warm-up, or an idle rank keeping step
	Links             []trace.Link // the requests in this batch; a span has the first 128, the caller's of a step trace among them
	Agreement         *Agreement   // of the step that Plan has exchanged votes in
}

// complete fills in the defaults and checks what can be checked without the other ranks.
func (p *Pass) complete() error {
	if p.NumTokensUnpadded == 0 {
		p.NumTokensUnpadded = p.NumTokens
	}
	if p.NumTokensGraph == 0 {
		p.NumTokensGraph = p.NumTokens
	}
	var bad problems
	bad.count("NumTokens", p.NumTokens)
	bad.count("NumReqs", p.NumReqs)
	bad.count("VirtualEngine", p.VirtualEngine)
	if p.NumTokensUnpadded < 0 || p.NumTokensUnpadded > p.NumTokensGraph || p.NumTokensGraph > p.NumTokens {
		bad.addf("tokens must not decrease with padding: %d unpadded, %d after graph padding, %d in the pass",
			p.NumTokensUnpadded, p.NumTokensGraph, p.NumTokens)
	}
	if !p.GraphMode.ValidRuntime() {
		bad.addf("a pass in graph mode %v, which is not a runtime mode", p.GraphMode)
	}
	if int(p.Reason) >= len(reasons) {
		bad.addf("unknown reason %v", p.Reason)
	}
	p.Batch.check(&bad)
	checkUBatches(&bad, p.UBatches, p.NumTokens)
	checkPerUBatch(&bad, "AttnMetadata", p.AttnMetadata, len(p.UBatches))
	checkPerUBatch(&bad, "SlotMapping", p.SlotMapping, len(p.UBatches))
	if p.GraphMode != GraphNone && p.Batch == (BatchDescriptor{}) {
		p.Batch.NumTokens = p.NumTokens
	}
	return bad.err()
}

// run is a pass while it runs: its context with the forward context beside it in one allocation, and what its end needs.
// It is never used again, since contexts outlive passes.
type run struct {
	passContext
	value   ForwardContext
	maps    [2]map[string]any // the metadata of a pass that is not split
	runner  *Runner
	forward ForwardFunc // nil: begun by Start
	span    timedSpan
	measure measure
	ended   atomic.Bool
}

// begin does everything up to the forward function: checks, DP metadata, span, context.
func (r *Runner) begin(ctx context.Context, p *Pass) (*run, error) {
	if err := p.complete(); err != nil {
		return nil, err
	}
	var dp *DPMetadata
	if r.parallel.coordinated() {
		var err error
		if dp, err = r.dpMetadata(ctx, p); err != nil {
			return nil, err
		}
	}
	x := &run{runner: r}
	x.value = ForwardContext{
		NoCompileLayers:   r.layers,
		AttnMetadata:      copyMaps(p.AttnMetadata, x.maps[0:1]),
		SlotMapping:       copyMaps(p.SlotMapping, x.maps[1:2]),
		NumTokens:         p.NumTokens,
		NumTokensUnpadded: p.NumTokensUnpadded,
		VirtualEngine:     p.VirtualEngine,
		DP:                dp,
		GraphMode:         p.GraphMode,
		Batch:             p.Batch,
		UBatches:          slices.Clone(p.UBatches),
		SkipCompiled:      p.SkipCompiled,
		Dummy:             p.Dummy,
	}
	x.passContext = passContext{Context: ctx, fc: &x.value, run: x}
	r.telemetry.startForward(x, p)
	return x, nil
}

// copyMaps copies a slice of maps, into room where that is enough.
func copyMaps(maps, room []map[string]any) []map[string]any {
	if len(maps) == 0 {
		return nil
	}
	return append(room[:0:len(room)], maps...)
}

// dpMetadata returns the DP metadata of a pass, from its own counts, from its agreement, or by asking the other ranks.
func (r *Runner) dpMetadata(ctx context.Context, p *Pass) (*DPMetadata, error) {
	if p.NumTokens == 0 {
		return nil, invalidf("a data-parallel pass without tokens, for which rank %d's %d peers would wait: an idle rank runs a dummy pass",
			r.parallel.DataParallelRank, r.parallel.DataParallelSize-1)
	}
	if p.NumTokensAcrossDP == nil && p.Agreement == nil {
		if len(p.UBatches) > 0 {
			return nil, invalidf("a pass split into %d microbatches without token counts across ranks or agreement", len(p.UBatches))
		}
		// Without graph or microbatches nothing is padded: each rank keeps the tokens it has.
		a, err := r.exchange(ctx, Vote{NumTokens: p.NumTokensUnpadded, NumTokensPadded: p.NumTokens})
		if err != nil {
			return nil, err
		}
		p.Agreement = a
	}
	across := p.NumTokensAcrossDP
	if across == nil {
		across = p.Agreement.NumTokensAcrossDP
	}
	m, err := NewDPMetadata(r.parallel, p.NumTokens, across)
	if err != nil || len(p.UBatches) == 0 {
		return m, err
	}
	var bad problems
	m.checkEqual(&bad)
	return m, bad.err()
}

// Run runs one forward pass: forward gets a context in which the pass's forward context and its span are. It calls forward,
// inside the middleware, on the calling goroutine, and returns its error.
//
// A pass of a coordinated rank that has neither token counts nor an agreement exchanges votes first; [Runner.Plan] does so
// with better ones. Once that is done the pass runs even if ctx has ended, since the other ranks count on it: forward sees
// the ended ctx.
//
// Before the pass starts, Run wraps ErrInvalid, ErrTokenMismatch ([NewDPMetadata]), and the errors of the exchange,
// ErrRankMissing and ErrLockstep. An error of the synchronisation is joined to that of forward. A panic of forward passes
// through; the span is ended and shows it.
func (r *Runner) Run(ctx context.Context, p Pass, forward ForwardFunc) error {
	if r == nil {
		r = nilRunner
	}
	if forward == nil {
		return invalidf("a pass of %d tokens without a forward function", p.NumTokens)
	}
	x, err := r.begin(ctx, &p)
	if err != nil {
		return err
	}
	x.forward = forward
	return x.do()
}

// do runs the forward function and ends the pass, whichever way that goes.
func (x *run) do() (err error) {
	defer x.span.End(x.span.options...) // directly, so that the SDK notes a panic
	err = errPanic
	defer func() { err = x.end(err) }()
	if handler := x.runner.handler; handler != nil {
		err = handler(&x.passContext)
	} else {
		err = x.forward(&x.passContext)
	}
	return err
}

// runInnermost is what the middleware wraps: it runs the forward function of the pass that ctx is in. That is this Runner's
// innermost pass: a middleware may have put another Runner's pass around the rest.
func (r *Runner) runInnermost(ctx context.Context) error {
	for c := lookup(ctx); c != nil; c = lookup(c.Context) {
		if x := c.run; x != nil && x.runner == r && x.forward != nil {
			return x.forward(ctx)
		}
	}
	return fmt.Errorf("%w: a middleware called next with a context from outside the pass", ErrNoForwardContext)
}

// end waits for the device and notes how the pass ended. It does not end the span. Nothing that happens in the
// synchronisation keeps the outcome from being noted.
func (x *run) end(err error) error {
	outcome := err
	defer func() { x.runner.telemetry.endForward(x, outcome) }()
	if synchronize := x.runner.synchronize; synchronize != nil {
		outcome = errPanic
		switch syncErr := synchronize(&x.passContext); {
		case syncErr == nil:
		case err == nil:
			err = syncErr
		default:
			err = errors.Join(err, syncErr)
		}
		outcome = err
	}
	return err
}

// Start begins a pass that ends in another function or goroutine: it returns the pass's context, and end, which ends it
// with the error that failed it, or nil. A second call of end does nothing. There is no middleware. Each started pass must
// be ended. The errors are those of [Runner.Run]; with one, the context and end are nil.
func (r *Runner) Start(ctx context.Context, p Pass) (_ context.Context, end func(error), err error) {
	if r == nil {
		r = nilRunner
	}
	x, err := r.begin(ctx, &p)
	if err != nil {
		return nil, nil, err
	}
	return &x.passContext, func(err error) {
		if x.ended.Swap(true) {
			return
		}
		defer x.span.End(x.span.options...)
		x.end(err)
	}, nil
}

// Schedule is what the scheduler decided for one step, before any padding.
type Schedule struct {
	NumScheduledTokens []int // per request; none: this rank is idle
	NumActiveLoRAs     int   // distinct adapters
	AllowUBatches      bool  // the model can run this batch as microbatches
	ExcludeFull        bool  // attention that a full graph can't hold
	Eager              bool  // no graph at all
}

// Plan prepares a pass: it dispatches the batch to a graph, agrees with the other ranks on the graph mode, on microbatches
// and on the padding that follows, and splits the batch. All ranks of a model must call it once per step; an idle rank plans
// a dummy pass of one decode request, since the others can't run without it. A rank that is alone, or of a dense model,
// decides for itself by the same rules.
//
// It wraps ErrInvalid: negative counts, nothing scheduled on a rank that nobody waits for, no coordinator, ranks that are
// configured differently; ErrRankMissing and ErrLockstep from the exchange, after which the next Plan is in step again.
func (r *Runner) Plan(ctx context.Context, s Schedule) (Pass, error) {
	if r == nil {
		r = nilRunner
	}
	dummy := len(s.NumScheduledTokens) == 0
	if dummy {
		if !r.parallel.coordinated() {
			return Pass{}, invalidf("nothing is scheduled, and no other rank waits for a dummy pass")
		}
		s.NumScheduledTokens, s.NumActiveLoRAs = []int{r.dispatcher.queryLen()}, 0
	}
	query, err := r.query(s)
	if err != nil {
		return Pass{}, err
	}
	mode, batch, reason := GraphNone, BatchDescriptor{NumTokens: query.NumTokens}, ReasonDisabled
	if r.dispatcher != nil && !s.Eager {
		mode, batch, reason = r.dispatcher.Dispatch(query)
	}
	pass := Pass{
		NumTokensUnpadded: query.NumTokens,
		NumTokensGraph:    batch.NumTokens,
		NumReqs:           len(s.NumScheduledTokens),
		Reason:            reason,
		Dummy:             dummy,
	}
	vote := Vote{NumTokens: query.NumTokens, NumTokensPadded: batch.NumTokens, UBatch: r.wantsUBatches(s, query), GraphMode: mode}
	agreed, err := r.agreed(ctx, vote, &pass)
	if err != nil {
		return Pass{}, err
	}
	if err := r.applyGraph(&pass, query, mode, agreed.GraphMode); err != nil {
		return Pass{}, err
	}
	// All ranks see the same votes, so either all split or none does.
	if n := r.parallel.NumUBatches; agreed.UBatch && pass.NumTokens >= n {
		reqs := max(pass.Batch.NumReqs, pass.NumReqs)
		if _, pass.UBatches, err = SplitUBatches(s.NumScheduledTokens, pass.NumTokens, reqs, n, 0); err != nil {
			return Pass{}, err
		}
	}
	return pass, nil
}

// query checks a schedule and returns what the dispatcher is asked about it.
func (r *Runner) query(s Schedule) (DispatchQuery, error) {
	var p problems
	p.count("NumActiveLoRAs", s.NumActiveLoRAs)
	sum, err := sumScheduled(s.NumScheduledTokens)
	if err != nil {
		p = append(p, err)
	} else if sum == 0 {
		p.addf("%d requests are scheduled without any tokens", len(s.NumScheduledTokens))
	}
	q := r.dispatcher.queryLen()
	return DispatchQuery{
		NumTokens:      sum,
		UniformDecode:  !slices.ContainsFunc(s.NumScheduledTokens, func(n int) bool { return n != q }),
		NumActiveLoRAs: s.NumActiveLoRAs,
		ExcludeFull:    s.ExcludeFull,
	}, p.err()
}

func (r *Runner) wantsUBatches(s Schedule, q DispatchQuery) bool {
	threshold := r.parallel.PrefillUBatchThreshold
	if q.UniformDecode {
		threshold = r.parallel.DecodeUBatchThreshold
	}
	return s.AllowUBatches && r.parallel.NumUBatches > 1 && q.NumTokens >= threshold
}

// agreed returns what the ranks agree on, and puts this rank's share of it into the pass. A rank that nobody depends on
// agrees with itself.
func (r *Runner) agreed(ctx context.Context, vote Vote, pass *Pass) (*Agreement, error) {
	if !r.parallel.coordinated() {
		a, err := Agree([]Vote{vote}, r.parallel.NumUBatches)
		if err != nil {
			return nil, err
		}
		pass.NumTokens = int(a.NumTokensAcrossDP.AtVec(0))
		return &a, nil
	}
	a, err := r.exchange(ctx, vote)
	if err != nil {
		return nil, err
	}
	pass.Agreement = a
	pass.NumTokens = int(a.NumTokensAcrossDP.AtVec(r.parallel.DataParallelRank))
	return a, nil
}

// applyGraph gives the pass the agreed mode and the key of the graph for its final token count, which the other ranks may
// have raised. own is the mode that this rank voted for.
func (r *Runner) applyGraph(pass *Pass, query DispatchQuery, own, agreed GraphMode) error {
	pass.GraphMode = agreed
	if agreed < own {
		pass.Reason = ReasonDPRank
	}
	if agreed == GraphNone {
		pass.Batch = BatchDescriptor{NumTokens: pass.NumTokens}
		return nil
	}
	query.NumTokens = pass.NumTokens
	query.ExcludeFull = query.ExcludeFull || agreed < GraphFull
	mode, batch, reason := r.dispatcher.Dispatch(query)
	if mode != agreed || batch.NumTokens != pass.NumTokens {
		return invalidf("the ranks agreed on %v with %d tokens, for which rank %d dispatches %v with %d tokens (%v): the ranks are configured differently",
			agreed, pass.NumTokens, r.parallel.DataParallelRank, mode, batch.NumTokens, reason)
	}
	pass.Batch = batch
	return nil
}
