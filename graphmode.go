package fwd

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
)

// GraphMode says which captured graphs (CUDA graphs, compiled plans) a pass or an engine uses. The zero value is
// GraphNone. Three modes are runtime modes, ordered GraphNone < GraphPiecewise < GraphFull; the other two are
// composite: they pair a runtime mode for pure decode batches with one for mixed batches, and only configure a
// [Dispatcher].
type GraphMode uint8

// The graph modes. Their values and text forms are vLLM's CUDAGraphMode.
const (
	GraphNone             GraphMode = iota // no graph: eager execution
	GraphPiecewise                         // graphs for the parts between attention calls
	GraphFull                              // one graph for the whole forward pass
	GraphFullDecodeOnly                    // composite: GraphFull for decode batches, GraphNone for mixed ones
	GraphFullAndPiecewise                  // composite: GraphFull for decode batches, GraphPiecewise for mixed ones
)

// graphModes says of every mode its name and its two parts. A runtime mode is both of its parts.
var graphModes = [...]struct {
	name          string
	decode, mixed GraphMode
}{
	GraphNone:             {"NONE", GraphNone, GraphNone},
	GraphPiecewise:        {"PIECEWISE", GraphPiecewise, GraphPiecewise},
	GraphFull:             {"FULL", GraphFull, GraphFull},
	GraphFullDecodeOnly:   {"FULL_DECODE_ONLY", GraphFull, GraphNone},
	GraphFullAndPiecewise: {"FULL_AND_PIECEWISE", GraphFull, GraphPiecewise},
}

func (m GraphMode) known() bool { return int(m) < len(graphModes) }

// DecodeMode returns the runtime mode for pure decode batches; m itself unless m is composite. An unknown mode has
// no graphs: all its parts are GraphNone.
func (m GraphMode) DecodeMode() GraphMode {
	if !m.known() {
		return GraphNone
	}
	return graphModes[m].decode
}

// MixedMode returns the runtime mode for batches that hold prefill; m itself unless m is composite.
func (m GraphMode) MixedMode() GraphMode {
	if !m.known() {
		return GraphNone
	}
	return graphModes[m].mixed
}

// MaxMode returns the higher of DecodeMode and MixedMode.
func (m GraphMode) MaxMode() GraphMode { return max(m.DecodeMode(), m.MixedMode()) }

// SeparateRoutine reports whether m is composite: decode batches are treated apart.
func (m GraphMode) SeparateRoutine() bool { return m.DecodeMode() != m.MixedMode() }

// HasFullGraphs reports whether some batches run as one graph.
func (m GraphMode) HasFullGraphs() bool { return m.MaxMode() == GraphFull }

// HasPiecewiseGraphs reports whether some batches run piecewise, which asks for a model compiled in pieces.
func (m GraphMode) HasPiecewiseGraphs() bool { return m.HasMode(GraphPiecewise) }

// ValidRuntime reports whether a pass can run in m: m is known and not composite.
func (m GraphMode) ValidRuntime() bool { return m <= GraphFull }

// HasMode reports whether the runtime mode is one of m's parts. It panics if mode is not a runtime mode.
func (m GraphMode) HasMode(mode GraphMode) bool {
	if !mode.ValidRuntime() {
		panic(fmt.Sprintf("fwd: HasMode(%v): not a runtime mode", mode))
	}
	return m.known() && (m.DecodeMode() == mode || m.MixedMode() == mode)
}

// String returns the upper-case name, such as "FULL_AND_PIECEWISE", or "GraphMode(9)" for an unknown value.
func (m GraphMode) String() string {
	if !m.known() {
		return fmt.Sprintf("GraphMode(%d)", uint8(m))
	}
	return graphModes[m].name
}

// MarshalText returns the name of m. An unknown mode is ErrInvalid.
func (m GraphMode) MarshalText() ([]byte, error) {
	if !m.known() {
		return nil, invalidf("%v is not a graph mode", m)
	}
	return []byte(m.String()), nil
}

// UnmarshalText sets m to the mode that text names, as [ParseGraphMode] does; m is untouched by an error.
func (m *GraphMode) UnmarshalText(text []byte) error {
	parsed, err := ParseGraphMode(string(text))
	if err == nil {
		*m = parsed
	}
	return err
}

// ParseGraphMode returns the mode with that name; case does not matter. Other text is ErrInvalid.
func ParseGraphMode(s string) (GraphMode, error) {
	var names []string
	for m, mode := range graphModes {
		if strings.EqualFold(s, mode.name) {
			return GraphMode(m), nil
		}
		names = append(names, mode.name)
	}
	return GraphNone, invalidf("graph mode %.40q is none of %s", s, strings.Join(names, ", "))
}

// Reason says why a batch runs in the mode it runs in. The zero value is ReasonUnknown: nobody dispatched it.
type Reason uint8

// The reasons of a dispatch, each with the word that telemetry shows.
const (
	ReasonUnknown      Reason = iota // "unknown": not dispatched
	ReasonExact                      // "exact": a full graph of exactly this padded batch
	ReasonRelaxed                    // "relaxed": a graph for any batch with this padded token count
	ReasonDisabled                   // "disabled": graph mode NONE, no dispatcher, or eager execution was asked for
	ReasonTooLarge                   // "too_large": more tokens than the largest capture size
	ReasonFullExcluded               // "full_excluded": a full graph existed, and was excluded
	ReasonNoKey                      // "no_key": no graph is captured for such a batch
	ReasonLoRA                       // "lora": no graph for this number of adapters, though there is one for another number
	ReasonDPRank                     // "dp_rank": lowered by a data-parallel rank, Agreement.LowestModeRank
)

var reasons = [...]string{"unknown", "exact", "relaxed", "disabled", "too_large", "full_excluded", "no_key", "lora", "dp_rank"}

// String returns the reason's word, such as "too_large".
func (r Reason) String() string {
	if int(r) >= len(reasons) {
		return fmt.Sprintf("Reason(%d)", uint8(r))
	}
	return reasons[r]
}

// LoRAConfig says for which numbers of active LoRA adapters graphs are captured. By default there are graphs without
// adapters, and graphs that serve any number of them.
type LoRAConfig struct {
	MaxLoRAs        int  // the most adapters active at once, at least 1; graphs for MaxLoRAs+1 serve any number
	Unspecialized   bool // graphs only with adapters: batches without any use none
	SpecializeCount bool // a graph each for 1, 2, 4, ... and MaxLoRAs+1 active adapters
}

// DispatcherConfig configures a [Dispatcher]. The zero value is a dispatcher that uses no graph.
type DispatcherConfig struct {
	Mode                  GraphMode   // may be composite
	CaptureSizes          []int       // in tokens: ascending, unique, at least 1; needed unless Mode is GraphNone
	MaxNumSeqs            int         // the most requests in a batch; at least 1 unless Mode is GraphNone
	UniformDecodeQueryLen int         // tokens of each request in a decode batch: 1 + speculative tokens; 0: 1
	LoRA                  *LoRAConfig // nil: no adapters
}

// A Dispatcher chooses the captured graph that a batch can use, and says why. Make one with [NewDispatcher]. It is
// immutable: any number of goroutines may use it.
//
// Its keys are a product: every capture size up to a bound, times every adapter count. So a dispatch looks for a size
// and a count and never for a key. The rules are those of vLLM's CudagraphDispatcher.
type Dispatcher struct {
	mode      GraphMode
	mixed     GraphMode // of mode
	sizes     []int     // ascending
	padded    []int32   // by token count, the capture size; short: see maxPadded
	q         int       // uniform decode query length
	maxDecode int64     // tokens of the largest batch with a full graph for uniform decode; 0: there is none
	loraCases []int     // adapter counts with graphs of their own, ascending
	lora      LoRAConfig
}

// maxPadded bounds the table of padded counts; beyond it the sizes are searched.
const maxPadded = 1 << 13

// NewDispatcher returns the dispatcher of a configuration, which it copies. ErrInvalid: a negative count, capture
// sizes that are missing, not ascending or below 1, and sizes that are no multiple of the uniform decode query length
// although Mode has full graphs ([RoundCaptureSizes] mends those).
func NewDispatcher(cfg DispatcherConfig) (*Dispatcher, error) {
	d := &Dispatcher{
		mode:  cfg.Mode,
		mixed: cfg.Mode.MixedMode(),
		sizes: slices.Clone(cfg.CaptureSizes),
		q:     max(cfg.UniformDecodeQueryLen, 1),
	}
	if err := cfg.check(d.q); err != nil {
		return nil, err
	}
	if cfg.LoRA != nil {
		d.lora = *cfg.LoRA
	}
	d.loraCases = d.lora.cases()
	if d.mode.SeparateRoutine() && d.mode.DecodeMode() == GraphFull {
		d.maxDecode = int64(d.q) * int64(cfg.MaxNumSeqs)
	}
	for _, size := range d.sizes {
		for len(d.padded) <= min(size, maxPadded) {
			d.padded = append(d.padded, int32(size))
		}
	}
	return d, nil
}

func (cfg *DispatcherConfig) check(q int) error {
	var p problems
	if !cfg.Mode.known() {
		p.addf("%v is not a graph mode", cfg.Mode)
	}
	p.count("MaxNumSeqs", cfg.MaxNumSeqs)
	p.count("UniformDecodeQueryLen", cfg.UniformDecodeQueryLen)
	if cfg.LoRA != nil && (cfg.LoRA.MaxLoRAs < 1 || cfg.LoRA.MaxLoRAs >= maxCount) {
		p.addf("MaxLoRAs is %d, want 1 to %d", cfg.LoRA.MaxLoRAs, maxCount-1)
	}
	if cfg.Mode != GraphNone && len(cfg.CaptureSizes) == 0 {
		p.addf("graph mode %v without capture sizes", cfg.Mode)
	}
	if cfg.Mode != GraphNone && cfg.MaxNumSeqs == 0 {
		p.addf("graph mode %v with MaxNumSeqs 0", cfg.Mode)
	}
	var odd []int
	for i, size := range cfg.CaptureSizes {
		if size < 1 || size > maxCount {
			p.addf("capture size %d at index %d is not in 1 to %d", size, i, maxCount)
		}
		if i > 0 && size <= cfg.CaptureSizes[i-1] {
			p.addf("capture sizes are not ascending: %d follows %d at index %d", size, cfg.CaptureSizes[i-1], i)
		}
		if size%q != 0 {
			odd = append(odd, size)
		}
	}
	if len(odd) > 0 && cfg.Mode.HasFullGraphs() {
		p.addf("capture sizes %s are no multiples of the uniform decode query length %d", abbreviate(odd), q)
	}
	return p.err()
}

// cases returns the adapter counts with graphs of their own, ascending; the zero LoRAConfig is "no adapters".
func (l LoRAConfig) cases() []int {
	if l.MaxLoRAs == 0 {
		return []int{0}
	}
	if l.Unspecialized {
		return []int{l.MaxLoRAs + 1}
	}
	cases := []int{0}
	if l.SpecializeCount {
		for k := int64(1); k <= int64(l.MaxLoRAs); k *= 2 { // an int may have 32 bits
			cases = append(cases, int(k))
		}
	}
	return append(cases, l.MaxLoRAs+1)
}

// DispatchQuery describes a batch before any padding.
type DispatchQuery struct {
	NumTokens      int  // scheduled, all requests together
	UniformDecode  bool // each request has the uniform decode query length
	NumActiveLoRAs int  // distinct adapters in the batch
	ExcludeFull    bool // a full graph can't be used, as with cascade attention
}

// Dispatch returns the runtime mode for a batch, the descriptor that is the key of the graph to replay, and the
// reason. Without a graph the mode is GraphNone and the descriptor holds the token count alone, unpadded. It panics
// if NumTokens or NumActiveLoRAs is negative. It allocates nothing.
func (d *Dispatcher) Dispatch(q DispatchQuery) (GraphMode, BatchDescriptor, Reason) {
	if q.NumTokens < 0 || q.NumActiveLoRAs < 0 {
		panic(fmt.Sprintf("fwd: Dispatch of %d tokens with %d adapters", q.NumTokens, q.NumActiveLoRAs))
	}
	eager := BatchDescriptor{NumTokens: q.NumTokens}
	if d.mode == GraphNone {
		return GraphNone, eager, ReasonDisabled
	}
	padded, ok := d.pad(q.NumTokens)
	if !ok {
		return GraphNone, eager, ReasonTooLarge
	}
	exact := q.UniformDecode && d.hasDecodeKey(padded)
	full := exact || d.mixed == GraphFull
	if q.NumTokens == 0 || !full && d.mixed == GraphNone {
		return GraphNone, eager, ReasonNoKey
	}
	loras, ok := d.adapters(q.NumActiveLoRAs)
	if !ok {
		return GraphNone, eager, ReasonLoRA
	}
	key := BatchDescriptor{NumTokens: padded, HasLoRA: loras > 0, NumActiveLoRAs: loras}
	switch {
	case full && !q.ExcludeFull && exact:
		key.NumReqs, key.Uniform = padded/d.q, true
		return GraphFull, key, ReasonExact
	case full && !q.ExcludeFull:
		return GraphFull, key, ReasonRelaxed
	case d.mixed == GraphPiecewise && full:
		return GraphPiecewise, key, ReasonFullExcluded
	case d.mixed == GraphPiecewise:
		return GraphPiecewise, key, ReasonRelaxed
	}
	return GraphNone, eager, ReasonFullExcluded
}

// pad returns the smallest capture size that holds n tokens, if one does.
func (d *Dispatcher) pad(n int) (int, bool) {
	if n < len(d.padded) {
		return int(d.padded[n]), true
	}
	i, _ := slices.BinarySearch(d.sizes, n)
	if i == len(d.sizes) {
		return 0, false
	}
	return d.sizes[i], true
}

// hasDecodeKey reports whether full graphs of uniform decode batches are captured for this size.
func (d *Dispatcher) hasDecodeKey(size int) bool { return size >= d.q && int64(size) <= d.maxDecode }

// adapters returns the adapter count whose graphs serve k active adapters, and whether such graphs exist.
func (d *Dispatcher) adapters(k int) (int, bool) {
	if k == 0 {
		return 0, d.loraCases[0] == 0
	}
	if !d.lora.SpecializeCount && d.lora.MaxLoRAs > 0 {
		return d.lora.MaxLoRAs + 1, true
	}
	i, _ := slices.BinarySearch(d.loraCases, k)
	if i == len(d.loraCases) {
		return k, false
	}
	return d.loraCases[i], true
}

// Capture is a graph that warm-up captures: a runtime mode and the key of the batch.
type Capture struct {
	Mode  GraphMode
	Batch BatchDescriptor
}

// Captures returns every graph that Dispatch can answer with, in the order in which to capture them: piecewise before
// full, and the largest first, so that the smaller ones fit into the memory that the larger ones have claimed.
func (d *Dispatcher) Captures() []Capture {
	var captures []Capture
	for _, mode := range []GraphMode{GraphPiecewise, GraphFull} {
		for _, size := range slices.Backward(d.sizes) {
			for _, loras := range d.loraCases {
				key := BatchDescriptor{NumTokens: size, HasLoRA: loras > 0, NumActiveLoRAs: loras}
				if d.mixed == mode {
					captures = append(captures, Capture{mode, key})
				}
				if mode == GraphFull && d.hasDecodeKey(size) {
					key.NumReqs, key.Uniform = size/d.q, true
					captures = append(captures, Capture{mode, key})
				}
			}
		}
	}
	return captures
}

// queryLen returns the uniform decode query length; 1 without a dispatcher.
func (d *Dispatcher) queryLen() int {
	if d == nil {
		return 1
	}
	return d.q
}

// DefaultCaptureSizes returns vLLM's capture sizes up to max tokens: 1, 2, 4, then every 8th below 256, then every
// 16th. A max below 1 has none, and a max between two sizes is not itself one. It panics if max is above 2^24, which no batch reaches: the list would fill the memory.
func DefaultCaptureSizes(max int) []int {
	if max > maxListed {
		panic(fmt.Sprintf("fwd: DefaultCaptureSizes(%d): more than %d tokens", max, maxListed))
	}
	var sizes []int
	for size := 1; size <= max; {
		sizes = append(sizes, size)
		switch {
		case size < 8:
			size *= 2
		case size < 256:
			size += 8
		default:
			size += 16
		}
	}
	return sizes
}

// RoundCaptureSizes returns sizes rounded up to multiples: ascending, unique and none above the largest of sizes, which
// it leaves unchanged. ErrInvalid: a multiple or size below 1, and sizes of which none is left. No sizes stay no sizes.
func RoundCaptureSizes(sizes []int, multiple int) ([]int, error) {
	if multiple < 1 {
		return nil, invalidf("multiple is %d, want at least 1", multiple)
	}
	if len(sizes) == 0 {
		return nil, nil
	}
	largest := slices.Max(sizes)
	var rounded []int
	for i, size := range sizes {
		if size < 1 {
			return nil, invalidf("capture size %d at index %d is below 1", size, i)
		}
		add := (multiple - size%multiple) % multiple
		if add <= largest-size { // not size+add <= largest: the sum may overflow
			rounded = append(rounded, size+add)
		}
	}
	if len(rounded) == 0 {
		return nil, invalidf("no multiple of %d is left up to the largest capture size %d", multiple, largest)
	}
	slices.Sort(rounded)
	return slices.Compact(rounded), nil
}

// Graph is something captured that can run again: a CUDA graph, a compiled plan. Replay runs it for the pass in ctx.
// As with CUDA graphs, inputs and outputs lie in buffers that outlive a pass; the caller fills and reads them.
type Graph interface {
	Replay(ctx context.Context) error
}

// CaptureFunc captures forward for the batches that key describes. It may call forward any number of times with ctx.
type CaptureFunc func(ctx context.Context, key BatchDescriptor, forward ForwardFunc) (Graph, error)

// A GraphCache gives one forward function graphs for one runtime mode: the first pass with a key captures, the later
// ones replay. Make one with [NewGraphCache]. It may be used by any number of goroutines; passes that meet an unknown key at once capture it once.
// A graph stays for the life of the cache, one for each key; [GraphCache.CloseCapture] after warm-up bounds their number.
//
// Caches nest: an engine with both modes has a full cache around its whole forward function, which calls piecewise caches
// around its parts; in a pass of one mode the caches of the other just call their function. What a graph reads and writes
// lies in buffers of the caller's, and passes that replay the same graph at once share them.
type GraphCache struct {
	mode    GraphMode
	forward ForwardFunc
	capture CaptureFunc

	mu        sync.RWMutex
	graphs    map[BatchDescriptor]Graph
	capturing map[BatchDescriptor]*capturing
	closed    bool
}

// capturing is a capture in progress. Its result is there once done is closed.
type capturing struct {
	done  chan struct{}
	graph Graph
	err   error
	retry bool // it failed because the capturing pass was cancelled, which says nothing to the others
}

// NewGraphCache returns an empty cache for passes in mode. ErrInvalid: a mode that is not GraphPiecewise or GraphFull, a
// nil function.
func NewGraphCache(mode GraphMode, forward ForwardFunc, capture CaptureFunc) (*GraphCache, error) {
	var p problems
	if mode == GraphNone || !mode.ValidRuntime() {
		p.addf("a graph cache for mode %v, want PIECEWISE or FULL", mode)
	}
	if forward == nil || capture == nil {
		p.addf("a graph cache without forward function (nil: %t) or capture function (nil: %t)", forward == nil, capture == nil)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return &GraphCache{
		mode: mode, forward: forward, capture: capture,
		graphs: make(map[BatchDescriptor]Graph), capturing: make(map[BatchDescriptor]*capturing),
	}, nil
}

// Forward runs the pass in ctx. It calls the forward function where the pass's graph mode is not the cache's, where
// the pass is split into microbatches and where there is no pass. Else it replays the graph of the pass's descriptor,
// capturing it before that if it is not known yet.
//
// It returns the errors of the forward function, the capture and the replay, and wraps: ErrNoDescriptor, the pass has
// none; ErrCaptureClosed, the key is unknown after CloseCapture; ErrInvalid, the capture returned no graph; the cause
// of ctx, which ended while another pass captured the key.
func (c *GraphCache) Forward(ctx context.Context) error {
	pass := lookup(ctx)
	if pass == nil || pass.fc.GraphMode != c.mode || len(pass.fc.UBatches) > 0 {
		return c.forward(ctx)
	}
	key := pass.fc.Batch
	if key == (BatchDescriptor{}) {
		return fmt.Errorf("%w: a pass of %d tokens in graph mode %v", ErrNoDescriptor, pass.fc.NumTokens, c.mode)
	}
	c.mu.RLock()
	graph := c.graphs[key]
	c.mu.RUnlock()
	if graph == nil {
		var err error
		if graph, err = c.captured(ctx, pass, key); err != nil {
			return err
		}
	}
	pass.telemetry().event(ctx, eventReplay)
	return graph.Replay(ctx)
}

// captured returns the graph of a key that was not known a moment ago: by capturing it, or by waiting for the pass that
// does.
func (c *GraphCache) captured(ctx context.Context, pass *passContext, key BatchDescriptor) (Graph, error) {
	for {
		c.mu.Lock()
		if graph := c.graphs[key]; graph != nil {
			c.mu.Unlock()
			return graph, nil
		}
		flight, ok := c.capturing[key]
		if !ok && c.closed {
			c.mu.Unlock()
			return nil, fmt.Errorf("%w: graph mode %v, key %+v", ErrCaptureClosed, c.mode, key)
		}
		if !ok {
			flight = &capturing{done: make(chan struct{})}
			c.capturing[key] = flight
		}
		c.mu.Unlock()

		if !ok {
			c.fly(ctx, pass, key, flight)
			return flight.graph, flight.err
		}
		select {
		case <-flight.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("fwd: waiting for the capture of %+v: %w", key, context.Cause(ctx))
		}
		if !flight.retry {
			return flight.graph, flight.err
		}
	}
}

// fly captures key and settles flight. A panic of the capture goes on; those who wait get an error.
func (c *GraphCache) fly(ctx context.Context, pass *passContext, key BatchDescriptor, flight *capturing) {
	flight.err = invalidf("the capture of %+v did not return", key)
	defer func() {
		c.mu.Lock()
		if flight.err == nil {
			c.graphs[key] = flight.graph
		}
		delete(c.capturing, key)
		c.mu.Unlock()
		close(flight.done)
	}()
	flight.graph, flight.err = c.capture(ctx, key, c.forward)
	if flight.err == nil && flight.graph == nil {
		flight.err = invalidf("the capture of %+v returned no graph", key)
	}
	if flight.err != nil {
		flight.graph, flight.retry = nil, ctx.Err() != nil
		return
	}
	pass.telemetry().event(ctx, eventCapture)
}

// CloseCapture ends warm-up: from now on an unknown key is ErrCaptureClosed, since a capture in the middle of serving
// would stall the pass and, on real devices, every stream. A capture that is in progress ends normally.
func (c *GraphCache) CloseCapture() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// Len returns how many graphs are captured.
func (c *GraphCache) Len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.graphs)
}

const (
	// maxCount is the largest count of tokens, requests and the like: what a rank of the reference system can say.
	maxCount = math.MaxInt32
	// maxListed bounds the lists that are made on request, so that a wrong argument can't exhaust the memory.
	maxListed = 1 << 24
)
