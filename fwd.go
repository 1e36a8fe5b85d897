package fwd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"
)

// ForwardContext is what one forward pass needs to know, everywhere in the model. Neither it nor the
// maps it holds may be modified once it is in a context: other goroutines, and errors formatted later,
// read them without locks.
type ForwardContext struct {
	// Layers holds layer objects by name, shared by all passes. See [Layer].
	Layers map[string]any

	// AttnMetadata holds attention metadata by layer: no map, one map, or one for each microbatch. The
	// entry "" serves every layer without its own.
	AttnMetadata []map[string]any

	// SlotMapping holds slot mappings by layer, in the same shape.
	SlotMapping []map[string]any

	NumTokens         int // of this rank, padding included
	NumTokensUnpadded int // of this rank, without padding
	VirtualEngine     int // index of the pipeline's engine

	// DP holds the token counts of the data-parallel ranks. It is nil for a rank that is alone and for
	// a dense model.
	DP *DPMetadata

	// GraphMode is a runtime mode. In a split pass and its microbatches it is GraphNone.
	GraphMode    GraphMode
	SkipCompiled bool // run the model's eager code even if a compiled one exists
	Dummy        bool // a warm-up pass, or an idle rank that keeps step

	// Batch is the key of the batch's graph; the zero value is none. A microbatch has that of its pass.
	Batch BatchDescriptor

	// UBatches are the microbatches of a split pass, in the padded form of SplitUBatches. A pass that
	// is not split, and a microbatch, have none.
	UBatches []UBatchSlice

	// Part says which requests and tokens of the batch this context covers, padding included: those of
	// the whole pass, or those of the microbatch.
	Part UBatchSlice
}

// contextKey is the key of the one value that this package has in a context, a *passContext.
type contextKey struct{}

// passContext is a context inside a pass. It overrides Value alone, so cancellation below it costs no
// goroutine. A passContext is never changed: one that differs in one thing is a copy. It is small,
// since every pass and every microbatch allocates one.
type passContext struct {
	context.Context
	fc          *ForwardContext // never nil
	run         *run            // nil: not in a Runner's pass
	sizes       *[]int          // local sizes; nil: none
	attn, slots metadata        // what fc has for this context
	ubatches    uint32          // how many microbatches there are; 0: it is in none
	ubatch      uint16          // the index of the microbatch, below maxUBatches
	inner       bool            // the forward function has been called with it, inside all middleware
}

// metadata is the metadata of a pass, or a microbatch, by layer, ready to be read fast.
type metadata struct {
	byLayer [1]map[string]any // nil: there is none here
	all     any               // the entry of every layer without its own
}

// readMetadata finds the metadata for a context of a pass, which has none if the pass is split.
func (c *passContext) readMetadata() {
	c.attn.read(c.fc, c.fc.AttnMetadata)
	c.slots.read(c.fc, c.fc.SlotMapping)
}

// read reads the maps of fc.
func (m *metadata) read(fc *ForwardContext, maps []map[string]any) {
	if len(maps) != 1 || len(fc.UBatches) > 0 {
		*m = metadata{}
		return
	}
	m.byLayer[0], m.all = maps[0], maps[0][""]
}

// keep is read, and returns a copy of the maps. That of a single one lies in m.
func (m *metadata) keep(fc *ForwardContext, maps []map[string]any) []map[string]any {
	if m.read(fc, maps); m.byLayer[0] != nil {
		return m.byLayer[:]
	}
	return slices.Clone(maps)
}

// Value returns c itself for the package's key, and leaves every other key to the parent.
func (c *passContext) Value(key any) any {
	if _, ok := key.(contextKey); ok {
		return c
	}
	return c.Context.Value(key)
}

// String names the parent and says that this is a pass.
func (c *passContext) String() string { return contextString(c.Context) }

// over returns c on top of ctx, which is derived from it, so that lookups stay fast below ctx.
func (c *passContext) over(ctx context.Context) *passContext {
	derived := *c
	derived.Context = ctx
	return &derived
}

// traced returns what the pass reports about itself. It is nil outside a Runner's pass, and if nobody
// listens.
func (c *passContext) traced() *traced {
	if c == nil || c.run == nil {
		return nil
	}
	return c.run.traced
}

// hiddenContext is a context outside all passes, whatever its parent is in.
type hiddenContext struct{ context.Context }

// Value returns nil for the package's key, whatever the parent has.
func (c *hiddenContext) Value(key any) any {
	if _, ok := key.(contextKey); ok {
		return nil
	}
	return c.Context.Value(key)
}

// String is like that of a pass.
func (c *hiddenContext) String() string { return contextString(c.Context) }

// contextString serves the String methods. They keep fmt from printing the fields, which would race
// with whoever writes what those point to.
func contextString(parent context.Context) string {
	if s, ok := parent.(fmt.Stringer); ok {
		return s.String() + ".fwd.Pass"
	}
	return reflect.TypeOf(parent).String() + ".fwd.Pass"
}

// lookup returns the innermost pass that ctx is in, or nil. The first case is the common one: model
// code is handed the pass's own context.
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

// NewContext returns a context that holds fc. It hides the pass that parent is in completely, with its
// local sizes and its microbatch. If fc is nil, it hides that pass and holds nothing. [Runner.Run] is
// the usual way to a forward context; NewContext is for tests and for callers with a life cycle of
// their own. It panics if parent is nil or if fc.GraphMode is not a runtime mode.
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
	c := &passContext{Context: parent, fc: fc}
	c.readMetadata()
	return c
}

// FromContext returns the forward context of the innermost pass, or microbatch, that ctx is in. Outside
// a pass ok is false.
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

// MustFromContext is [FromContext] for code that runs only in passes. Outside a pass it panics with
// ErrNoForwardContext.
func MustFromContext(ctx context.Context) *ForwardContext {
	fc, ok := FromContext(ctx)
	if !ok {
		panic(ErrNoForwardContext)
	}
	return fc
}

// AttnMetadata returns the attention metadata of a layer for the pass, or the microbatch, that ctx is
// in: the entry of that name, or else the entry "".
//
// The error wraps ErrNoForwardContext outside a pass, ErrNoMetadata if the pass has none, ErrLayer if
// there is no entry or if it is not a T, and ErrInvalid if the pass is split and ctx is in none of its
// microbatches.
func AttnMetadata[T any](ctx context.Context, layer string) (T, error) {
	c := lookup(ctx)
	if c != nil {
		entry, ok := c.attn.byLayer[0][layer]
		if !ok {
			entry = c.attn.all
		}
		if v, ok := entry.(T); ok {
			return v, nil
		}
	}
	return missing[T](c, whatAttn, layer)
}

// MustAttnMetadata is [AttnMetadata] for layers whose Forward returns no error. It panics with the
// error.
func MustAttnMetadata[T any](ctx context.Context, layer string) T {
	v, err := AttnMetadata[T](ctx, layer)
	if err != nil {
		panic(err)
	}
	return v
}

// SlotMapping returns the slot mapping of a layer. It treats names and errors as [AttnMetadata] does.
func SlotMapping[T any](ctx context.Context, layer string) (T, error) {
	c := lookup(ctx)
	if c != nil {
		entry, ok := c.slots.byLayer[0][layer]
		if !ok {
			entry = c.slots.all
		}
		if v, ok := entry.(T); ok {
			return v, nil
		}
	}
	return missing[T](c, whatSlots, layer)
}

// Layer returns the layer object of that name, from Config.Layers. The error wraps ErrNoForwardContext
// outside a pass, and ErrLayer if there is no such layer or if it is not a T.
func Layer[T any](ctx context.Context, name string) (T, error) {
	c := lookup(ctx)
	if c != nil {
		if v, ok := c.fc.Layers[name].(T); ok {
			return v, nil
		}
	}
	return missing[T](c, whatLayer, name)
}

// AllLayers returns metadata that serves every layer: {"": v}.
func AllLayers(v any) map[string]any { return map[string]any{"": v} }

// WithMetadata returns a context in which the pass, or the microbatch, that ctx is in has this metadata
// by layer. It is for code that knows the metadata only inside the pass. A nil map keeps what is there;
// everything else of the pass stays, its telemetry too, and ctx itself does not change. The maps must
// not be modified afterwards.
//
// It returns ErrNoForwardContext outside a pass, and an error that wraps ErrInvalid if the pass is split
// and ctx is in none of its microbatches.
func WithMetadata(ctx context.Context, attn, slots map[string]any) (context.Context, error) {
	c := lookup(ctx)
	if c == nil {
		return nil, ErrNoForwardContext
	}
	if n := len(c.fc.UBatches); n > 0 {
		return nil, invalidf("metadata for a pass that is split into %d microbatches; add it inside of each", n)
	}
	fc := *c.fc
	if attn != nil {
		fc.AttnMetadata = []map[string]any{attn}
	}
	if slots != nil {
		fc.SlotMapping = []map[string]any{slots}
	}
	derived := c.over(ctx)
	derived.fc = &fc
	derived.readMetadata()
	return derived, nil
}

// ForwardFunc is the forward pass of a model, or a part of it. ctx is the context of the pass.
type ForwardFunc func(ctx context.Context) error

// Middleware wraps what runs inside a pass, so [FromContext] works in it. It is composed once, in [New].
// It may call next more than once, with a context of the same pass. It can't run another pass of the
// same Runner around next.
type Middleware func(next ForwardFunc) ForwardFunc

// Chain returns the middleware that applies mw in order, the first outermost. It panics if one of them
// is nil, and the result panics if one of them returns nil.
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

// Config says what a [Runner] runs. The zero value is one rank alone, of a model without a name.
type Config struct {
	// Name is that of the model, such as "target" or "draft": fwd.name on spans and metrics. It may be
	// empty.
	Name string

	Parallel ParallelConfig

	// Layers holds layer objects by name, see [Layer]. New copies the map; all passes share the objects.
	Layers map[string]any
}

// config is what the options set. New turns it into a Runner.
type config struct {
	coordinator Coordinator
	timeout     time.Duration
	dispatcher  *Dispatcher
	middleware  []Middleware
	synchronize func(context.Context) error
	clock       func() time.Time
	queue       *Queue

	tracers    trace.TracerProvider
	meters     metric.MeterProvider
	stepTrace  bool
	stepRoot   bool
	observers  []func(context.Context, *Record)
	logger     *slog.Logger
	attributes []attribute.KeyValue
	peerName   func(rank int) string
}

// Option configures a [Runner] beyond its [Config].
type Option interface{ apply(*config) }

type optionFunc func(*config)

func (f optionFunc) apply(c *config) { f(c) }

// WithCoordinator sets the coordinator over which the Runner exchanges votes with the other ranks. Its
// rank and size must be the Runner's. nil means none.
func WithCoordinator(c Coordinator) Option {
	return optionFunc(func(cfg *config) { cfg.coordinator = c })
}

// WithExchangeTimeout bounds how long an exchange waits for the other ranks, in addition to the pass's
// own context. The default is 1 minute; 0 or less means no bound. One rank's timeout breaks the step
// for all, as the end of its context does.
func WithExchangeTimeout(d time.Duration) Option {
	return optionFunc(func(cfg *config) { cfg.timeout = d })
}

// WithDispatcher sets the dispatcher with which Plan chooses graphs; all ranks must configure theirs
// the same. The default, nil, plans eager passes.
func WithDispatcher(d *Dispatcher) Option {
	return optionFunc(func(cfg *config) { cfg.dispatcher = d })
}

// WithMiddleware wraps every forward function that Run is given, the first middleware outermost.
// Several of these options add up. It panics if a middleware is nil; [New] panics if one returns nil.
func WithMiddleware(mw ...Middleware) Option {
	chain := Chain(mw...)
	return optionFunc(func(cfg *config) { cfg.middleware = append(cfg.middleware, chain) })
}

// WithSynchronize calls f at the end of each pass, also of a failed one, before its time is taken: on a
// device that works asynchronously, f waits for it. f gets a context of the pass that is never
// cancelled, since the next pass uses the same buffers. An error of f fails the pass. nil means none.
func WithSynchronize(f func(context.Context) error) Option {
	return optionFunc(func(cfg *config) { cfg.synchronize = f })
}

// WithClock makes span times and durations follow now, for simulators. now may be called by several
// goroutines, and may begin at any time, also the zero time; but backends don't look for spans in 1970.
// A duration is never negative, even if the clock goes back. nil means the real time.
func WithClock(now func() time.Time) Option { return optionFunc(func(cfg *config) { cfg.clock = now }) }

// A Runner runs the forward passes of one rank of one model. Most callers need two of its methods:
// [Runner.Plan], then [Runner.Run], once per step. Run may be called from several goroutines. With a
// coordinator, Plan and Run exchange votes one at a time, in the same order on every rank. A nil
// *Runner runs passes as rank 0 of 1, without telemetry.
type Runner struct {
	name        string
	parallel    ParallelConfig
	layers      map[string]any
	stepTrace   bool
	coordinator Coordinator
	local       *localRank // the coordinator, if it is one of NewLocalGroup
	timeout     time.Duration
	dispatcher  *Dispatcher
	fingerprint uint64
	handler     ForwardFunc // the middleware around the forward function of the pass in ctx; nil: none
	synchronize func(context.Context) error
	clock       func() time.Time
	queue       *Queue
	telemetry   *telemetry // nil: nobody listens, ever

	timeoutCause error
	state        *state
}

// state is what changes in a Runner. One made by WithGraphs shares it.
type state struct {
	mu   sync.Mutex
	step uint64    // of the last exchange
	open *exchange // nil: none

	planned []*plan // with the step trace: whose passes have not begun

	activity activity
}

// nilRunner does what a nil *Runner does.
var nilRunner = &Runner{parallel: ParallelConfig{}.withDefaults(), state: new(state)}

// New returns a Runner. It returns an error that wraps ErrInvalid if a count in cfg is negative, if the
// rank is not below the size, if the coordinator is that of another rank or size, if the dispatcher has
// capture sizes that are not multiples of TokenMultiple, or if an option is nil. All that is wrong is
// reported together. An error of the meter provider is returned as it is. A missing coordinator is an
// error only when Plan or Run needs one.
func New(cfg Config, opts ...Option) (*Runner, error) {
	c := config{timeout: time.Minute}
	var p problems
	for i, opt := range opts {
		if opt == nil {
			p.addf("option %d of %d is nil", i, len(opts))
			continue
		}
		opt.apply(&c)
	}
	parallel := cfg.Parallel.ofCoordinator(c.coordinator)
	parallel.check(&p)
	r := &Runner{
		name:         cfg.Name,
		parallel:     parallel.withDefaults(),
		layers:       maps.Clone(cfg.Layers),
		stepTrace:    c.stepTrace,
		coordinator:  c.coordinator,
		timeout:      c.timeout,
		synchronize:  c.synchronize,
		clock:        c.clock,
		queue:        c.queue,
		timeoutCause: fmt.Errorf("no exchange within %v: %w", c.timeout, context.DeadlineExceeded),
		state:        new(state),
	}
	r.local, _ = c.coordinator.(*localRank)
	if c := c.coordinator; c != nil &&
		(c.Rank() != r.parallel.DataParallelRank || c.Size() != r.parallel.DataParallelSize) {
		p.addf("the coordinator is rank %d of %d, the Runner rank %d of %d",
			c.Rank(), c.Size(), r.parallel.DataParallelRank, r.parallel.DataParallelSize)
	}
	if c.queue != nil {
		c.queue.join(c.clock != nil, &p)
	}
	r.setDispatcher(c.dispatcher, &p)
	if len(c.middleware) > 0 {
		r.handler = Chain(c.middleware...)(r.runInnermost)
	}
	var err error
	r.telemetry, err = newTelemetry(r, &c)
	if err := errors.Join(p.err(), err); err != nil {
		return nil, err
	}
	return r, nil
}

// ofCoordinator returns c with the rank and the size of the coordinator, if c says neither.
func (c ParallelConfig) ofCoordinator(coordinator Coordinator) ParallelConfig {
	if coordinator != nil && c.DataParallelSize == 0 && c.DataParallelRank == 0 {
		c.DataParallelSize, c.DataParallelRank = coordinator.Size(), coordinator.Rank()
	}
	return c
}

// setDispatcher sets the dispatcher and the fingerprint that follows.
func (r *Runner) setDispatcher(d *Dispatcher, p *problems) {
	if d != nil {
		d.checkMultiple(r.parallel.TokenMultiple, p)
	}
	r.parallel.tooMany(p, d.queryLen(), "a uniform decode request")
	r.dispatcher = d
	r.fingerprint = r.newFingerprint()
}

// WithGraphs returns a Runner that goes on at r's step with another dispatcher; r must not be used any
// more. All ranks must change in the same step: otherwise their fingerprints differ, and every rank's
// next exchange returns ErrInvalid.
//
// It returns an error that wraps ErrInvalid if d has capture sizes that are not multiples of
// TokenMultiple, and one that wraps ErrLockstep if an exchange is open.
func (r *Runner) WithGraphs(d *Dispatcher) (*Runner, error) {
	if r == nil {
		r = &Runner{parallel: nilRunner.parallel, state: new(state)} // not nilRunner, whose state all would share
	}
	if e, _ := r.state.exchanging(); e != nil && e.waiting() {
		return nil, r.busy(e)
	}
	next := *r
	var p problems
	next.setDispatcher(d, &p)
	if err := p.err(); err != nil {
		return nil, err
	}
	return &next, nil
}

// Enabled reports whether anybody would see a pass: in spans, metrics, records or the log.
func (r *Runner) Enabled(ctx context.Context) bool {
	return r != nil && r.telemetry.listening(ctx) != 0
}

// Status is what a Runner is doing. See [Runner.Status].
type Status struct {
	// Step is that of the open exchange, or else of the last one; 0 means that there was none yet.
	Step uint64

	// Exchanging says that the Runner waits for votes.
	Exchanging bool

	// Waiting names the ranks whose votes have not come, if the coordinator knows them.
	Waiting []int

	// Active is the number of passes that are running.
	Active int

	// Since is when the open exchange began, or else the oldest running pass. It is zero if the Runner
	// is idle.
	Since time.Time
}

// Status returns what the Runner is doing. It may be called from any goroutine at any time, also while
// a pass hangs.
func (r *Runner) Status() Status {
	if r == nil {
		return Status{}
	}
	var s Status
	oldest, active := r.state.activity.running()
	if s.Active = active; active > 0 {
		s.Since = r.timeOf(oldest)
	}
	e, step := r.state.exchanging()
	if s.Step = step; e == nil {
		return s
	}
	s.Step = e.draft.vote.Step
	if e.waiting() {
		s.Exchanging, s.Since = true, r.timeOf(e.began)
		if c, ok := r.coordinator.(interface{ Missing() []int }); ok {
			s.Waiting = c.Missing()
		}
	}
	return s
}

// activity is which passes of a Runner are running. There is usually one at most, which one
// compare-and-swap notes.
type activity struct {
	one  atomic.Pointer[run]
	mu   sync.Mutex
	more map[*run]bool // those that began beside another
}

func (a *activity) add(x *run) {
	if a.one.CompareAndSwap(nil, x) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.more == nil {
		a.more = make(map[*run]bool)
	}
	a.more[x] = true
}

func (a *activity) remove(x *run) {
	if a.one.CompareAndSwap(x, nil) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.more, x)
}

// running returns how many passes run, and when the oldest of them began.
func (a *activity) running() (oldest instant, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if x := a.one.Load(); x != nil {
		oldest, n = x.began, 1
	}
	for x := range a.more {
		if n == 0 || x.began.until(oldest) > 0 {
			oldest = x.began
		}
		n++
	}
	return oldest, n
}

// Pass describes one forward pass. [Runner.Plan] makes one; a caller without Plan fills it in. After
// Plan the caller adds the fields of the first group, and the rest belongs to the plan: a split pass
// needs metadata for each microbatch (see [Pass.Parts]), a dummy pass needs none. Run copies the slices;
// the maps must not be modified afterwards.
//
// A planned pass belongs to the Runner that planned it and runs once, also if it is copied.
type Pass struct {
	// AttnMetadata and SlotMapping hold metadata by layer: no map, one map, or one for each part. The
	// entry "" serves every layer without its own, see [AllLayers].
	AttnMetadata, SlotMapping []map[string]any

	VirtualEngine int  // index of the pipeline's engine
	SkipCompiled  bool // run the model's eager code even if a compiled one exists

	// Links lead to the requests in this batch (see [trace.LinkFromContext]). A span keeps the first
	// 128, with the caller's own of a step trace among them.
	Links []trace.Link

	// Phase says what the pass is for, in one of few words. Plan says "decode" for a uniform decode
	// batch and "mixed" for any other, WarmUp says "warmup"; the caller may say "prefill", "verify" or
	// whatever it distinguishes.
	Phase string

	NumTokens         int // of this rank, padding included
	NumTokensUnpadded int // without padding; 0: NumTokens
	NumTokensGraph    int // after graph padding, before DP padding; 0: NumTokens
	NumReqs           int // scheduled requests; 0: not said

	// NumTokensAcrossDP holds the tokens of each rank and has length DataParallelSize. If it is nil,
	// the agreement's are taken, and without an agreement the coordinator is asked. A rank that is alone
	// and a dense model don't need it.
	NumTokensAcrossDP *mat.VecDense

	GraphMode GraphMode // a runtime mode; GraphNone for a split pass
	Batch     BatchDescriptor

	// UBatches are the microbatches in padded form: they tile [0, NumTokens). None: not split.
	UBatches []UBatchSlice

	Dummy     bool       // a warm-up pass, or an idle rank that keeps step
	Reason    Reason     // for GraphMode
	Agreement *Agreement // of the step whose votes Plan has exchanged

	plan *plan // nil: made by hand
}

// Parts returns what of the pass needs metadata, in order: its microbatches, or the whole pass as one.
// A dummy pass needs none. Each is the Part of the forward context that gets the metadata. The slice
// must not be modified.
func (p *Pass) Parts() []UBatchSlice {
	switch {
	case p.Dummy:
		return nil
	case len(p.UBatches) > 0:
		return p.UBatches
	}
	return []UBatchSlice{p.whole()}
}

// whole returns the requests and tokens of the whole pass, padding included.
func (p *Pass) whole() UBatchSlice {
	reqs := p.Batch.NumReqs
	if reqs == 0 {
		reqs = p.NumReqs
	}
	return UBatchSlice{Requests: Range{0, reqs}, Tokens: Range{0, p.NumTokens}}
}

// complete fills in the defaults and checks what can be checked without the other ranks.
func (p *Pass) complete(r *Runner) error {
	if p.NumTokensUnpadded == 0 {
		p.NumTokensUnpadded = p.NumTokens
	}
	if p.NumTokensGraph == 0 {
		p.NumTokensGraph = p.NumTokens
	}
	if p.Reason == ReasonUnknown && p.GraphMode == GraphNone && r.dispatcher == nil {
		p.Reason = ReasonDisabled
	}
	if !p.plain() {
		if err := p.check(); err != nil {
			return err
		}
	}
	if p.GraphMode == GraphNone {
		return nil
	}
	if p.Batch == (BatchDescriptor{}) {
		p.Batch.NumTokens = p.NumTokens
	}
	if len(p.UBatches) > 0 {
		p.GraphMode, p.Reason = GraphNone, ReasonUBatch
	}
	return nil
}

// plain reports whether nothing is wrong with a pass that is not split: check would find the same, and
// take longer.
func (p *Pass) plain() bool {
	return uint(p.NumTokens) <= maxCount && uint(p.NumReqs) <= maxCount && uint(p.VirtualEngine) <= maxCount &&
		0 <= p.NumTokensUnpadded && p.NumTokensUnpadded <= p.NumTokensGraph && p.NumTokensGraph <= p.NumTokens &&
		p.GraphMode <= GraphFull && int(p.Reason) < len(reasons) && p.Batch.plain() &&
		len(p.UBatches) == 0 && len(p.AttnMetadata) <= 1 && len(p.SlotMapping) <= 1
}

func (p *Pass) check() error {
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
	return bad.err()
}

// plan is what a planned pass and its copies share.
type plan struct {
	runner   *Runner
	byHand   bool // only the exchange is the Runner's
	stepDone bool // the Runner is done in the step; guarded by its state's mutex
	used     atomic.Bool
	wait     time.Duration // of the exchange
	lastRank int           // whose vote came last; -1: not known
	step     *stepSpan     // with the step trace, if the step's span is in this process
}

// belongs returns an error unless the pass is r's to run.
func (p *Pass) belongs(r *Runner) error {
	if p.plan == nil {
		return nil
	}
	if p.plan.runner != r {
		return invalidf("a pass that another Runner planned (%s); run it there", p.plan.runner)
	}
	if p.plan.used.Load() {
		return p.usedUp()
	}
	return nil
}

// use makes sure that a planned pass runs once.
func (p *Pass) use() error {
	if p.plan != nil && p.plan.used.Swap(true) {
		return p.usedUp()
	}
	return nil
}

func (p *Pass) usedUp() error {
	return invalidf("a planned pass of %d tokens runs a second time; plan another", p.NumTokens)
}

// idle reports whether no rank has anything to run.
func (p *Pass) idle() bool { return p.Agreement != nil && p.Agreement.Idle }

// String names the model and the rank.
func (r *Runner) String() string {
	if r == nil {
		r = nilRunner
	}
	return fmt.Sprintf("fwd.Runner %q, rank %d of %d",
		r.name, r.parallel.DataParallelRank, r.parallel.DataParallelSize)
}

// run is a pass while it runs: its context with the forward context beside it in one allocation, and
// what its end needs. It is never used again, since contexts outlive passes.
type run struct {
	passContext
	value   ForwardContext
	runner  *Runner
	began   instant
	wrapped *wrapped // nil: there is no middleware
	traced  *traced  // nil: nobody listens
	ended   atomic.Bool
}

// wrapped is what a run needs to get through the middleware.
type wrapped struct {
	forward ForwardFunc // nil: begun by Start
	within  passContext
}

// What a run points to lies beside it, as much as it needs. The less memory a pass takes, the faster
// it is.
type (
	wrappedRun struct {
		run
		wrapped wrapped
	}
	tracedRun struct {
		run
		traced traced
	}
	fullRun struct {
		run
		wrapped wrapped
		traced  traced
		record  Record
	}
)

// newRun allocates a run with what it needs beside it.
func (r *Runner) newRun(listening listeners) *run {
	switch {
	case listening == 0 && r.handler == nil:
		return new(run)
	case listening == 0:
		x := new(wrappedRun)
		x.run.wrapped = &x.wrapped
		return &x.run
	case listening&listenRecords == 0 && r.handler == nil:
		x := new(tracedRun)
		x.run.traced = &x.traced
		return &x.run
	}
	x := new(fullRun)
	x.run.wrapped, x.run.traced = &x.wrapped, &x.traced
	if listening&listenRecords != 0 {
		x.traced.record = &x.record
	}
	return &x.run
}

// begin does everything up to the forward function: checks, DP metadata, span, context. It wants a pass
// that belongs to r.
func (r *Runner) begin(ctx context.Context, p *Pass) (*run, error) {
	var dp *DPMetadata
	if r.parallel.coordinated() {
		var err error
		if dp, err = r.dpMetadata(ctx, p); err != nil {
			return nil, err
		}
	}
	if err := p.use(); err != nil {
		return nil, err
	}
	listening := r.telemetry.listening(ctx)
	x := r.newRun(listening)
	x.runner = r
	x.Context, x.fc, x.run = ctx, &x.value, x
	v := &x.value // set field by field: a literal would be built elsewhere and copied
	v.Layers = r.layers
	v.NumTokens, v.NumTokensUnpadded = p.NumTokens, p.NumTokensUnpadded
	v.VirtualEngine = p.VirtualEngine
	v.DP = dp
	v.GraphMode, v.Batch = p.GraphMode, p.Batch
	if len(p.UBatches) > 0 {
		v.UBatches = slices.Clone(p.UBatches)
	}
	v.Part = p.whole()
	v.SkipCompiled, v.Dummy = p.SkipCompiled, p.Dummy
	v.AttnMetadata = x.attn.keep(v, p.AttnMetadata)
	v.SlotMapping = x.slots.keep(v, p.SlotMapping)
	var clock time.Time
	x.began, clock = r.now()
	if listening != 0 {
		r.telemetry.startForward(x, p, listening, clock)
	}
	if r != nilRunner {
		r.state.activity.add(x)
	}
	return x, nil
}

// dpMetadata returns the DP metadata of a pass: from its own counts, from its agreement, or from the
// other ranks.
func (r *Runner) dpMetadata(ctx context.Context, p *Pass) (*DPMetadata, error) {
	if err := r.checkTokens(p); err != nil {
		return nil, err
	}
	if p.NumTokensAcrossDP == nil && p.Agreement == nil {
		if err := p.checkByHand(); err != nil {
			return nil, err
		}
		if err := r.exchangeByHand(ctx, p); err != nil {
			return nil, err
		}
	}
	m, err := NewDPMetadata(r.parallel, p.NumTokens, p.across())
	if err != nil || len(p.UBatches) == 0 {
		return m, err
	}
	var bad problems
	m.checkEqual(&bad)
	return m, bad.err()
}

// checkTokens refuses a pass without tokens, for which the other ranks would wait.
func (r *Runner) checkTokens(p *Pass) error {
	if p.NumTokens == 0 {
		return invalidf("rank %d of %d runs a pass without tokens; plan a dummy pass instead",
			r.parallel.DataParallelRank, r.parallel.DataParallelSize)
	}
	return nil
}

// checkByHand refuses a split pass for which the coordinator would have to be asked.
func (p *Pass) checkByHand() error {
	if n := len(p.UBatches); n > 0 {
		return invalidf("a pass split into %d microbatches without token counts across ranks or agreement", n)
	}
	return nil
}

// across returns the token counts that the pass brings.
func (p *Pass) across() *mat.VecDense {
	if p.NumTokensAcrossDP == nil && p.Agreement != nil {
		return p.Agreement.NumTokensAcrossDP
	}
	return p.NumTokensAcrossDP
}

// exchangeByHand exchanges the vote of a pass that nobody planned. Without graph or microbatches nothing
// is padded, so each rank keeps the tokens it has.
func (r *Runner) exchangeByHand(ctx context.Context, p *Pass) error {
	e := &exchange{plan: plan{byHand: true}}
	e.draft.vote = Vote{NumTokens: p.NumTokensUnpadded, NumTokensPadded: p.NumTokens, NumReqs: p.NumReqs}
	if err := r.exchange(ctx, e); err != nil {
		return err
	}
	p.Agreement, p.plan = e.agreement, &e.plan
	return nil
}

// Run runs one forward pass: it calls forward, inside the middleware, on the calling goroutine, and
// returns its error. forward gets a context that holds the pass's forward context and its span. A pass
// of a coordinated rank that was made by hand, without token counts and without an agreement, first
// asks the coordinator; most callers Plan, then Run.
//
// Once the ranks have agreed, the pass runs even if ctx has ended, since the other ranks count on it;
// forward sees the ended ctx. If the agreement of a planned pass says that every rank is idle, Run
// returns nil without calling anything.
//
// Before the pass starts, Run returns errors that wrap ErrInvalid if forward is nil, if p is
// contradictory, or if p was planned by another Runner or has run before; ErrTokenMismatch (see
// [NewDPMetadata]); and the errors of the exchange, ErrRankMissing and ErrLockstep. A planned pass that
// is refused can run later. An error of the synchronisation is joined to that of forward. A panic of
// forward passes through, and the span is ended and shows it.
func (r *Runner) Run(ctx context.Context, p Pass, forward ForwardFunc) error {
	if r == nil {
		r = nilRunner
	}
	if forward == nil {
		return invalidf("a pass of %d tokens without a forward function", p.NumTokens)
	}
	if err := r.accept(&p); err != nil {
		return err
	}
	if p.idle() {
		return p.use()
	}
	x, err := r.begin(ctx, &p)
	if err != nil {
		return err
	}
	if x.traced == nil {
		return x.do(forward)
	}
	return x.doTraced(forward)
}

// accept completes a pass and refuses one that r can't run.
func (r *Runner) accept(p *Pass) error {
	if err := p.complete(r); err != nil {
		return err
	}
	return p.belongs(r)
}

// do runs the forward function and ends the pass, whichever way that goes.
func (x *run) do(forward ForwardFunc) (err error) {
	err = errPanic
	defer func() { err = x.end(err) }()
	return x.call(forward)
}

// doTraced is do for a pass that somebody listens to. The span ends before the observers are told. It is
// ended directly by defer, so that the SDK notes a panic.
func (x *run) doTraced(forward ForwardFunc) (err error) {
	t := x.traced
	defer t.observe(x)
	defer t.span.End(t.span.endOptions()...)
	err = errPanic
	defer func() { err = x.end(err) }()
	return x.call(forward)
}

// call calls the forward function, inside the middleware.
func (x *run) call(forward ForwardFunc) error {
	handler := x.runner.handler
	if handler == nil {
		return forward(&x.passContext)
	}
	w := x.wrapped
	w.forward, w.within = forward, x.passContext
	w.within.inner = true
	return handler(&x.passContext)
}

// runInnermost is what the middleware wraps: it calls the forward function of the pass that ctx is in.
func (r *Runner) runInnermost(ctx context.Context) error {
	innermost := lookup(ctx)
	c := innermost
	for c != nil && !c.run.wraps(r) {
		c = lookup(c.Context) // a middleware may have put another Runner's pass around the rest
	}
	switch {
	case c == nil:
		return fmt.Errorf("%w: a middleware called next with a context from outside the pass", ErrNoForwardContext)
	case c.inner:
		return invalidf("a middleware ran another pass of the same Runner around next; " +
			"run it before or after, or with a Runner of its own")
	case ctx == context.Context(&c.run.passContext):
		return c.run.wrapped.forward(&c.run.wrapped.within)
	}
	within := c.over(ctx)
	within.inner = true
	if c != innermost {
		within = innermost.over(within) // the forward function is in that pass
	}
	return c.run.wrapped.forward(within)
}

// wraps reports whether x is a pass that r runs inside its middleware.
func (x *run) wraps(r *Runner) bool {
	return x != nil && x.runner.state == r.state && x.wrapped != nil && x.wrapped.forward != nil
}

// end waits for the device and notes how the pass ended. It does not end the span. Whatever happens in
// the synchronisation, the outcome is noted.
func (x *run) end(err error) error {
	if x.runner.synchronize == nil {
		x.note(err)
		return err
	}
	outcome := errPanic
	defer func() { x.note(outcome) }()
	ctx := context.Context(&x.passContext)
	if ctx.Done() != nil {
		ctx = context.WithoutCancel(ctx)
	}
	switch syncErr := x.runner.synchronize(ctx); {
	case syncErr == nil:
	case err == nil:
		err = syncErr
	default:
		err = errors.Join(err, syncErr)
	}
	outcome = err
	return err
}

// note notes how the pass ended.
func (x *run) note(outcome error) {
	if x.runner != nilRunner {
		x.runner.state.activity.remove(x)
	}
	if x.traced != nil {
		x.traced.endForward(x, outcome)
	}
}

// Start begins a pass that ends in another function or goroutine. It returns the pass's context, and
// end, which ends the pass with the error that failed it, or nil. A second call of end does nothing.
// There is no middleware. Every pass that was started must be ended.
//
// The errors are those of [Runner.Run], and ErrInvalid if the agreement of a planned pass says that
// every rank is idle: look at Agreement.Idle first. With an error Start returns ctx as it was and an end
// that does nothing, so end can be deferred before the error is looked at.
func (r *Runner) Start(ctx context.Context, p Pass) (_ context.Context, end func(error), err error) {
	if r == nil {
		r = nilRunner
	}
	err = r.accept(&p)
	if err == nil && p.idle() {
		err = invalidf("every rank is idle in step %d, so nobody runs a pass; look at Agreement.Idle before Start",
			p.Agreement.Step)
	}
	if err != nil {
		return ctx, func(error) {}, err
	}
	x, err := r.begin(ctx, &p)
	if err != nil {
		return ctx, func(error) {}, err
	}
	return &x.passContext, x.endStarted, nil
}

// endStarted is the end function of Start.
func (x *run) endStarted(err error) {
	if x.ended.Swap(true) {
		return
	}
	if t := x.traced; t != nil {
		defer t.observe(x)
		defer t.span.End(t.span.endOptions()...)
	}
	x.end(err)
}

// Call is [Runner.Run] for a forward function that returns something: it returns what forward returned
// last. If forward is not called, as in a pass of which the agreement says that every rank is idle, it
// returns the zero value. Middleware must not call next concurrently.
func Call[T any](
	ctx context.Context, r *Runner, p Pass, forward func(ctx context.Context) (T, error),
) (T, error) {
	var result T
	if forward == nil {
		return result, r.Run(ctx, p, nil)
	}
	err := r.Run(ctx, p, func(ctx context.Context) (err error) {
		result, err = forward(ctx)
		return err
	})
	return result, err
}

// Report reports a pass that ran elsewhere, as in a simulator, from began to ended and with the error
// that failed it, or nil: spans, metrics and records are those of Run. There is no context and no
// exchange. It costs nothing when nobody listens. A planned pass is used up as by Run; one whose
// agreement says that every rank is idle is not reported.
//
// Its error wraps ErrInvalid or ErrTokenMismatch if Run would refuse the pass. It is never err.
func (r *Runner) Report(ctx context.Context, p Pass, began, ended time.Time, err error) error {
	if r == nil {
		r = nilRunner
	}
	if err := r.accept(&p); err != nil {
		return err
	}
	if r.parallel.coordinated() {
		if err := r.checkReported(&p); err != nil {
			return err
		}
	}
	if err := p.use(); err != nil || p.idle() {
		return err
	}
	if listening := r.telemetry.listening(ctx); listening != 0 {
		r.telemetry.report(ctx, r, p, began, ended, err, listening)
	}
	return nil
}

// checkReported checks the counts of a pass of a coordinated rank as Run does, which would ask the
// coordinator if there are none.
func (r *Runner) checkReported(p *Pass) error {
	if err := r.checkTokens(p); err != nil {
		return err
	}
	if p.NumTokensAcrossDP == nil && p.Agreement == nil {
		return p.checkByHand()
	}
	if len(p.UBatches) == 0 {
		return checkAcross(r.parallel, p.NumTokens, p.across())
	}
	_, err := r.dpMetadata(context.Background(), p)
	return err
}

// exchange is one exchange of a Runner, from its vote to its outcome, with what its passes share.
type exchange struct {
	plan         // of the passes
	draft  draft // of the pass, with the vote
	ctx    context.Context
	span   *coordinateSpan // nil: nobody listens
	began  instant
	over   atomic.Bool   // the outcome is there
	joined atomic.Bool   // of a local one: its vote is in
	local  bool          // begun at a rank of a local group, which waits without a goroutine
	mu     sync.Mutex    // held while the outcome is fetched
	done   chan struct{} // closed when the goroutine that exchanges has the outcome; nil: there is none

	agreement *Agreement
	err       error
}

// open opens the Runner's next exchange, which must be settled. If it is to be begun, its caller does not
// wait for the votes.
func (r *Runner) open(ctx context.Context, e *exchange, begun bool) error {
	if r.coordinator == nil {
		return invalidf("rank %d of %d has no coordinator; use WithCoordinator",
			r.parallel.DataParallelRank, r.parallel.DataParallelSize)
	}
	e.runner, e.lastRank = r, -1
	var clock time.Time
	e.ctx = ctx
	e.began, clock = r.now()
	e.draft.vote.Config = r.fingerprint
	if e.local = begun && r.local != nil; begun && !e.local {
		e.done = make(chan struct{})
	}
	for other := r.state.openExchange(e); other != nil; other = r.state.openExchange(e) {
		if other.waiting() {
			return r.busy(other)
		}
		other.settle() // it is over, but nobody has asked for the outcome
	}
	e.span = r.telemetry.startCoordinate(ctx, e, clock)
	return nil
}

// openExchange makes e the open exchange, unless there is one, which it returns.
func (s *state) openExchange(e *exchange) *exchange {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = e
		e.draft.vote.Step = s.step + 1
		return nil
	}
	return s.open
}

// closeExchange notes that an exchange is over, and the step that the group has then behind it.
func (s *state) closeExchange(e *exchange, step uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == e {
		s.open, s.step = nil, step
	}
}

// exchanging returns the open exchange, or nil, and the step of the last one.
func (s *state) exchanging() (*exchange, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open, s.step
}

// busy is the error of an exchange that is begun while another is open.
func (r *Runner) busy(open *exchange) error {
	rank := r.parallel.DataParallelRank
	err := fmt.Errorf("%w: rank %d begins an exchange while another is open; wait for that one first",
		ErrLockstep, rank)
	return &RankError{err, open.draft.vote.Step, []int{rank}}
}

// exchange opens an exchange and waits for its outcome.
func (r *Runner) exchange(ctx context.Context, e *exchange) error {
	if err := r.open(ctx, e, false); err != nil {
		return err
	}
	return e.settle()
}

// begin starts the exchange without waiting for its outcome.
func (e *exchange) begin() {
	r := e.runner
	if e.local {
		r.local.begin(e.askCtx(), &e.draft.vote, e.deadline(), r.timeoutCause)
		e.joined.Store(true)
		return
	}
	go func() {
		defer close(e.done)
		returned := false
		defer func() {
			if value := recover(); value != nil {
				e.err = &panicked{value}
			} else if !returned {
				e.err = &panicked{"fwd: the coordinator's Exchange ended its goroutine"}
			}
		}()
		e.resolve()
		returned = true
	}()
}

// deadline returns when a local exchange that has just been opened runs out of time; 0: never.
func (e *exchange) deadline() time.Duration {
	switch r := e.runner; {
	case r.timeout <= 0:
		return 0
	case r.clock != nil:
		return now() + r.timeout
	default:
		return time.Duration(e.began) + r.timeout // the clock need not be read a second time
	}
}

// waiting reports whether votes are still missing.
func (e *exchange) waiting() bool {
	if e.local && e.joined.Load() {
		return e.runner.local.open()
	}
	return !e.over.Load()
}

// settle waits for the outcome. A panic of the coordinator comes out here.
func (e *exchange) settle() error {
	if e.done == nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		if !e.over.Load() {
			e.resolve()
		}
		return e.err
	}
	<-e.done
	if p, ok := e.err.(*panicked); ok {
		panic(p.value)
	}
	return e.err
}

// panicked is in the place of the error of an exchange that panicked in its goroutine, in the coordinator
// or in an observer.
type panicked struct{ value any }

// Error implements error. Nobody reads it.
func (*panicked) Error() string { return errPanic.Error() }

// resolve fetches the votes, agrees, and notes what came out.
func (e *exchange) resolve() {
	step := e.draft.vote.Step
	returned := false
	defer func() {
		if !returned {
			e.finish(step, nil, errPanic)
		}
	}()
	votes, err := e.ask()
	returned = true
	var a *Agreement
	switch {
	case err == nil:
		e.noteLast()
		a, err = e.agree(votes)
		if a != nil {
			step = max(step, a.Step) // later than voted if this rank came late to a broken step
		}
	case errors.Is(err, ErrInvalid):
		step-- // refused before anything was sent
	}
	if err != nil {
		step = brokenStep(err, step)
	}
	e.finish(step, a, err)
}

// brokenStep returns the step that an exchange's error names, or else step.
func brokenStep(err error, step uint64) uint64 {
	if e := (*RankError)(nil); errors.As(err, &e) && e != nil {
		return e.Step
	}
	return step
}

// noteLast notes whose vote came last, if the coordinator knows and somebody wants to.
func (e *exchange) noteLast() {
	if e.span == nil {
		return
	}
	if c, ok := e.runner.coordinator.(interface{ Last() int }); ok {
		if last := c.Last(); 0 <= last && last < e.runner.parallel.DataParallelSize {
			e.lastRank = last
		}
	}
}

// ask returns the votes of all ranks, from wherever the exchange was begun.
func (e *exchange) ask() ([]Vote, error) {
	r := e.runner
	if e.local {
		return r.local.await()
	}
	ctx := e.askCtx()
	if r.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, r.timeout, r.timeoutCause)
		defer cancel()
	}
	return r.coordinator.Exchange(ctx, e.draft.vote)
}

// askCtx returns the context of the exchange, with its span if that is open.
func (e *exchange) askCtx() context.Context {
	if e.span != nil {
		return e.span.ctx
	}
	return e.ctx
}

// agree checks that the votes are those of this step, and agrees. If a coordinator mixes rounds up, that
// must not go unnoticed: the ranks would run different passes.
func (e *exchange) agree(votes []Vote) (*Agreement, error) {
	r, vote := e.runner, &e.draft.vote
	size, rank := r.parallel.DataParallelSize, r.parallel.DataParallelRank
	if len(votes) != size {
		return nil, invalidf("the coordinator returned %d votes for %d ranks", len(votes), size)
	}
	if own := &votes[rank]; own.Step < vote.Step || !own.same(vote) {
		err := fmt.Errorf("%w: the coordinator returned %+v as the vote of rank %d, which voted %+v",
			ErrLockstep, *own, rank, *vote)
		return nil, &RankError{err, vote.Step, []int{rank}}
	}
	if r.local != nil {
		return r.local.agree(votes, r.parallel.NumUBatches)
	}
	a, err := Agree(votes, r.parallel.NumUBatches)
	if err != nil {
		return nil, err
	}
	return &a, nil
}

// finish notes the outcome and tells those who listen.
func (e *exchange) finish(step uint64, a *Agreement, err error) {
	r := e.runner
	e.agreement, e.err = a, err
	if e.span == nil {
		r.state.closeExchange(e, step)
		e.over.Store(true)
		return
	}
	ended, _ := r.now()
	if e.local && r.clock == nil {
		ended = instant(r.local.endedAt(time.Duration(e.began)))
	}
	e.wait = max(e.began.until(ended), 0)
	r.state.closeExchange(e, step)
	e.over.Store(true)
	e.span.end(e)
}

// Errors come last.

// The errors of this package, matched with errors.Is. Each has a method ErrorType() string behind it, a
// stable word for telemetry, found with errors.As.
var (
	// ErrNoForwardContext says that ctx is not in a pass.
	ErrNoForwardContext error = &sentinel{"no_forward_context", "no forward context"}

	// ErrNoMetadata says that the pass has no metadata; dummy passes usually have none.
	ErrNoMetadata error = &sentinel{"no_metadata", "no metadata"}

	// ErrLayer says that a layer is not known or has another type.
	ErrLayer error = &sentinel{"layer", "layer lookup"}

	// ErrNoDescriptor says that a graph cache has no key for the pass.
	ErrNoDescriptor error = &sentinel{"no_descriptor", "no batch descriptor"}

	// ErrInvalid says that an argument or a configuration is wrong.
	ErrInvalid error = &sentinel{"invalid", "invalid"}

	// ErrTokenMismatch says that a rank's tokens are not what the ranks have counted.
	ErrTokenMismatch error = &sentinel{"token_mismatch", "token counts differ"}

	// ErrLockstep says that ranks are out of step, see RankError.
	ErrLockstep error = &sentinel{"lockstep", "ranks out of step"}

	// ErrRankMissing says that a rank did not come, see RankError.
	ErrRankMissing error = &sentinel{"rank_missing", "rank missing"}

	// ErrCaptureClosed says that a graph is not known after warm-up.
	ErrCaptureClosed error = &sentinel{"capture_closed", "capture closed after warm-up"}
)

// errPanic stands for the outcome of a function that has not returned: it panicked, or ended its
// goroutine.
var errPanic error = &sentinel{"panic", "panic"}

// sentinel is an error to match with errors.Is.
type sentinel struct{ word, text string }

// Error returns the text, with the package's name before it.
func (e *sentinel) Error() string { return "fwd: " + e.text }

// ErrorType returns a stable word for telemetry, such as "token_mismatch".
func (e *sentinel) ErrorType() string { return e.word }

// RankError is the error of an exchange that did not come together.
type RankError struct {
	// Err is ErrRankMissing, ErrLockstep or ErrInvalid. It also wraps the cause of the context whose
	// end ended the wait.
	Err error

	// Step is the group's step. The next one is Step+1.
	Step uint64

	// Ranks are missing, out of step, or configured or warming up differently from most.
	Ranks []int
}

// Error returns the error, the step and the ranks.
func (e *RankError) Error() string {
	if e == nil {
		return "fwd: a nil *RankError"
	}
	what := "not like the others"
	switch {
	case errors.Is(e.Err, ErrRankMissing):
		what = "missing"
	case errors.Is(e.Err, ErrLockstep):
		what = "out of step"
	}
	return fmt.Sprintf("%v (step %d, %s: ranks %s)", e.Err, e.Step, what, abbreviate(e.Ranks))
}

// Unwrap returns Err.
func (e *RankError) Unwrap() error {
	if e == nil {
		return nil
	}
	return e.Err
}

// clone returns a copy that its receiver may change; nil for nil.
func (e *RankError) clone() *RankError {
	if e == nil {
		return nil
	}
	return &RankError{e.Err, e.Step, slices.Clone(e.Ranks)}
}

// addCause wraps why ctx ended, if it has and that may be why a rank did not come.
func (e *RankError) addCause(ctx context.Context) {
	if ctx.Err() != nil && errors.Is(e.Err, ErrRankMissing) {
		e.Err = fmt.Errorf("%w: %w", e.Err, context.Cause(ctx))
	}
}

// What can be looked up by name.
const (
	whatAttn  = "attention metadata"
	whatSlots = "slot mapping"
	whatLayer = "layer"
)

// missing returns the error of what is not there, or is of another type.
func missing[T any](c *passContext, what, name string) (T, error) {
	var zero T
	return zero, newLookupError(c, what, name, reflect.TypeFor[T]())
}

// lookupError is a miss. Hot code asks for what may not be there, so the text is put together only when
// it is read.
type lookupError struct {
	err        error
	what, name string
	from       map[string]any // where it was looked for
	want       reflect.Type
}

func newLookupError(c *passContext, what, name string, want reflect.Type) error {
	e := &lookupError{err: ErrLayer, what: what, name: name, want: want}
	if c == nil {
		e.err = ErrNoForwardContext
		return e
	}
	maps := c.fc.AttnMetadata
	switch what {
	case whatLayer:
		e.from = c.fc.Layers
		return e
	case whatSlots:
		maps = c.fc.SlotMapping
	}
	switch {
	case len(c.fc.UBatches) > 0 || len(maps) > 1:
		e.err = ErrInvalid
	case len(maps) == 0:
		e.err = ErrNoMetadata
	default:
		e.from = maps[0]
	}
	return e
}

// Unwrap returns the kind of miss.
func (e *lookupError) Unwrap() error { return e.err }

// Error puts the text together.
func (e *lookupError) Error() string {
	switch e.err {
	case ErrNoForwardContext, ErrNoMetadata:
		return fmt.Sprintf("%v: no %s for %q", e.err, e.what, e.name)
	case ErrInvalid:
		return fmt.Sprintf("%v: no %s for %q in a split pass outside its microbatches; use RunUBatches",
			e.err, e.what, e.name)
	}
	value, ok := e.from[e.name]
	if !ok && e.what != whatLayer {
		value, ok = e.from[""]
	}
	have := quoted(slices.Sorted(maps.Keys(e.from)))
	switch {
	case ok:
		return fmt.Sprintf("%v: the %s for %q has type %T, want %v", e.err, e.what, e.name, value, e.want)
	case e.what == whatLayer:
		return fmt.Sprintf("%v: no layer %q in Config.Layers (have %s)", e.err, e.name, have)
	}
	return fmt.Sprintf("%v: no %s for %q (have %s)", e.err, e.what, e.name, have)
}

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

// abbreviate returns the first few elements of a list, and how many there are if that is not all.
func abbreviate[T any](list []T) string {
	const most = 16
	if len(list) <= most {
		return fmt.Sprint(list)
	}
	return fmt.Sprintf("%v and %d more", list[:most], len(list)-most)
}

// quoted returns the first few names, quoted, or "none".
func quoted(names []string) string {
	const most = 16
	if len(names) == 0 {
		return "none"
	}
	var b strings.Builder
	for i, name := range names[:min(len(names), most)] {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%.64q", name)
	}
	if more := len(names) - most; more > 0 {
		fmt.Fprintf(&b, " and %d more", more)
	}
	return b.String()
}
