package fwd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// GraphMode says which captured graphs (CUDA graphs, compiled plans) a pass or an engine uses. The zero
// value is GraphNone. Three modes are runtime modes, ordered GraphNone < GraphPiecewise < GraphFull. The
// other two are composite: they pair a runtime mode for pure decode batches with one for mixed batches,
// and only configure a [Dispatcher].
type GraphMode uint8

// The graph modes. Their values and text forms are vLLM's CUDAGraphMode.
const (
	// GraphNone is eager execution, without a graph.
	GraphNone GraphMode = iota

	// GraphPiecewise has graphs for the parts between attention calls.
	GraphPiecewise

	// GraphFull has one graph for the whole forward pass.
	GraphFull

	// GraphFullDecodeOnly is composite: GraphFull for decode batches, GraphNone for mixed ones.
	GraphFullDecodeOnly

	// GraphFullAndPiecewise is composite: GraphFull for decode batches, GraphPiecewise for mixed ones.
	GraphFullAndPiecewise
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

// DecodeMode returns the runtime mode for pure decode batches, which is m itself unless m is composite.
// An unknown mode has no graphs: all its parts are GraphNone.
func (m GraphMode) DecodeMode() GraphMode {
	if !m.known() {
		return GraphNone
	}
	return graphModes[m].decode
}

// MixedMode returns the runtime mode for batches that hold prefill, which is m itself unless m is
// composite.
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

// HasPiecewiseGraphs reports whether some batches run piecewise, which needs a model that is compiled in
// pieces.
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

// MarshalText returns the name of m. For an unknown mode the error wraps ErrInvalid.
func (m GraphMode) MarshalText() ([]byte, error) {
	if !m.known() {
		return nil, invalidf("%v is not a graph mode", m)
	}
	return []byte(m.String()), nil
}

// UnmarshalText sets m to the mode that text names, as [ParseGraphMode] does. An error leaves m as it is.
func (m *GraphMode) UnmarshalText(text []byte) error {
	parsed, err := ParseGraphMode(string(text))
	if err == nil {
		*m = parsed
	}
	return err
}

// ParseGraphMode returns the mode with that name; case does not matter. For other text the error wraps
// ErrInvalid.
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

// Reason says why a batch runs in the mode it runs in. The zero value is ReasonUnknown.
type Reason uint8

// The reasons, each with the word that telemetry shows.
const (
	// ReasonUnknown, "unplanned", is that of a pass that nobody dispatched.
	ReasonUnknown Reason = iota

	// ReasonExact, "exact": there is a full graph of exactly this padded batch.
	ReasonExact

	// ReasonRelaxed, "relaxed": there is a graph for any batch with this padded token count.
	ReasonRelaxed

	// ReasonDisabled, "disabled": the mode is NONE, there is no dispatcher, or the batch is to run eagerly.
	ReasonDisabled

	// ReasonTooLarge, "too_large": the batch has more tokens than the largest capture size, or more
	// requests than MaxNumSeqs.
	ReasonTooLarge

	// ReasonFullExcluded, "full_excluded": there is a full graph, but it was excluded.
	ReasonFullExcluded

	// ReasonNoKey, "no_key": no graph is captured for such a batch.
	ReasonNoKey

	// ReasonLoRA, "lora": there is no graph for this number of adapters, but for another.
	ReasonLoRA

	// ReasonDPRank, "dp_rank": another data-parallel rank lowered the mode, Agreement.LowestModeRank.
	ReasonDPRank

	// ReasonUBatch, "ubatch": the mode was lowered because the pass is split into microbatches.
	ReasonUBatch
)

var reasons = [...]string{
	ReasonUnknown:      "unplanned",
	ReasonExact:        "exact",
	ReasonRelaxed:      "relaxed",
	ReasonDisabled:     "disabled",
	ReasonTooLarge:     "too_large",
	ReasonFullExcluded: "full_excluded",
	ReasonNoKey:        "no_key",
	ReasonLoRA:         "lora",
	ReasonDPRank:       "dp_rank",
	ReasonUBatch:       "ubatch",
}

// String returns the reason's word, such as "too_large", or "Reason(99)" for an unknown value.
func (r Reason) String() string {
	if int(r) >= len(reasons) {
		return fmt.Sprintf("Reason(%d)", uint8(r))
	}
	return reasons[r]
}

// MarshalText returns the reason's word. For an unknown value the error wraps ErrInvalid.
func (r Reason) MarshalText() ([]byte, error) {
	if int(r) >= len(reasons) {
		return nil, invalidf("%v is not a reason", r)
	}
	return []byte(r.String()), nil
}

// UnmarshalText sets r to the reason with that word. For other text the error wraps ErrInvalid and r
// stays as it is.
func (r *Reason) UnmarshalText(text []byte) error {
	i := slices.Index(reasons[:], string(text))
	if i < 0 {
		return invalidf("reason %.40q is none of %s", text, strings.Join(reasons[:], ", "))
	}
	*r = Reason(i)
	return nil
}

// LoRAConfig says for which numbers of active LoRA adapters graphs are captured. By default there are
// graphs without adapters, and graphs that serve any number of them.
type LoRAConfig struct {
	// MaxLoRAs is the most adapters that are active in a batch, at least 1. A batch with more has no
	// graph. Graphs for MaxLoRAs+1 serve any number up to MaxLoRAs.
	MaxLoRAs int

	// Unspecialized says that there are graphs only with adapters. A batch without any runs without a
	// graph.
	Unspecialized bool

	// SpecializeCount says that there is a graph each for 1, 2, 4, ... and MaxLoRAs+1 active adapters.
	SpecializeCount bool
}

// DispatcherConfig configures a [Dispatcher]. The zero value is a dispatcher that uses no graph.
type DispatcherConfig struct {
	// Mode may be composite.
	Mode GraphMode

	// CaptureSizes are the token counts for which graphs are captured: ascending, unique, at least 1.
	// They are needed unless Mode is GraphNone. See [DefaultCaptureSizes] and [Dispatcher.Gaps].
	CaptureSizes []int

	// MaxNumSeqs is the most requests in a batch that a full graph has room for: at least 1 unless Mode
	// is GraphNone.
	MaxNumSeqs int

	// UniformDecodeQueryLen is the number of tokens of each request in a uniform decode batch: 1 + the
	// speculative tokens. 0 means 1.
	UniformDecodeQueryLen int

	// LoRA is nil if there are no adapters.
	LoRA *LoRAConfig
}

// A Dispatcher chooses the captured graph that a batch can use, and says why. Make one with
// [NewDispatcher]. It is immutable, so any number of goroutines may use it. A nil *Dispatcher has no
// graphs.
//
// Graphs exist for every capture size combined with every adapter count, so Dispatch looks the two up
// separately instead of searching a set of keys. The rules are those of vLLM's CudagraphDispatcher.
type Dispatcher struct {
	mode      GraphMode
	mixed     GraphMode // of mode
	sizes     []int     // ascending
	padded    []int32   // by token count, the capture size; short: see maxPadded
	q         int       // uniform decode query length
	maxSeqs   int
	maxDecode int64 // tokens of the largest batch with a full graph for uniform decode; 0: there is none
	loraCases []int // adapter counts with graphs of their own, ascending
	lora      LoRAConfig
}

// maxPadded bounds the table of padded counts; beyond it the sizes are searched.
const maxPadded = 1 << 13

// NewDispatcher returns the dispatcher of a configuration, which it copies. It returns an error that
// wraps ErrInvalid if a count is negative, if capture sizes are missing, not ascending or below 1, or if
// Mode has full graphs and sizes are not multiples of the uniform decode query length
// ([RoundCaptureSizes] mends those).
func NewDispatcher(cfg DispatcherConfig) (*Dispatcher, error) {
	d := &Dispatcher{
		mode:    cfg.Mode,
		mixed:   cfg.Mode.MixedMode(),
		sizes:   slices.Clone(cfg.CaptureSizes),
		q:       max(cfg.UniformDecodeQueryLen, 1),
		maxSeqs: cfg.MaxNumSeqs,
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
	for i, size := range cfg.CaptureSizes {
		if size < 1 || size > maxCount {
			p.addf("capture size %d at index %d is not in 1 to %d", size, i, maxCount)
		}
		if i > 0 && size <= cfg.CaptureSizes[i-1] {
			p.addf("capture sizes are not ascending: %d follows %d at index %d", size, cfg.CaptureSizes[i-1], i)
		}
	}
	if cfg.Mode.HasFullGraphs() {
		checkMultiples(&p, cfg.CaptureSizes, q, "the uniform decode query length")
	}
	return p.err()
}

// checkMultiples adds a problem if sizes are not multiples of n.
func checkMultiples(p *problems, sizes []int, n int, what string) {
	var odd []int
	for _, size := range sizes {
		if size%n != 0 {
			odd = append(odd, size)
		}
	}
	if len(odd) > 0 {
		p.addf("capture sizes %s are not multiples of %s %d; see RoundCaptureSizes", abbreviate(odd), what, n)
	}
}

// checkMultiple adds a problem if padding to a capture size would lose the multiple.
func (d *Dispatcher) checkMultiple(n int, p *problems) {
	if d.mode != GraphNone && n > 1 {
		checkMultiples(p, d.sizes, n, "TokenMultiple")
	}
}

// addTo adds the whole configuration to a fingerprint. No dispatcher counts as one without graphs.
func (d *Dispatcher) addTo(f *fingerprint) {
	if d == nil {
		d = noGraphs
	}
	f.ints(int(d.mode), d.q, d.maxSeqs)
	f.ints(d.lora.MaxLoRAs, toInt(d.lora.Unspecialized), toInt(d.lora.SpecializeCount))
	f.ints(len(d.sizes))
	f.ints(d.sizes...)
}

// noGraphs does what a nil *Dispatcher does.
var noGraphs = &Dispatcher{q: 1, loraCases: []int{0}}

// cases returns the adapter counts with graphs of their own, ascending; the zero LoRAConfig is "no
// adapters".
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
	NumReqs        int  // scheduled requests; 0: not said
	UniformDecode  bool // each request has the uniform decode query length
	NumActiveLoRAs int  // distinct adapters in the batch
	ExcludeFull    bool // a full graph can't be used, as with cascade attention
}

// Dispatch returns the runtime mode for a batch, the descriptor that is the key of the graph to replay,
// and the reason. Without a graph the mode is GraphNone and the descriptor holds only the token count,
// unpadded. A batch of more than MaxNumSeqs requests gets no full graph, and one with more than MaxLoRAs
// active adapters gets no graph. Dispatch panics if NumTokens, NumReqs or NumActiveLoRAs is negative. It
// allocates nothing.
func (d *Dispatcher) Dispatch(q DispatchQuery) (GraphMode, BatchDescriptor, Reason) {
	if q.NumTokens < 0 || q.NumReqs < 0 || q.NumActiveLoRAs < 0 {
		panic(fmt.Sprintf("fwd: Dispatch of %d tokens of %d requests with %d adapters",
			q.NumTokens, q.NumReqs, q.NumActiveLoRAs))
	}
	if d == nil {
		d = noGraphs
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
	excluded := ReasonFullExcluded
	if !q.ExcludeFull && q.NumReqs > d.maxSeqs {
		q.ExcludeFull, excluded = true, ReasonTooLarge
	}
	switch {
	case full && !q.ExcludeFull && exact:
		key.NumReqs, key.Uniform = padded/d.q, true
		return GraphFull, key, ReasonExact
	case full && !q.ExcludeFull:
		return GraphFull, key, ReasonRelaxed
	case d.mixed == GraphPiecewise && full:
		return GraphPiecewise, key, excluded
	case d.mixed == GraphPiecewise:
		return GraphPiecewise, key, ReasonRelaxed
	}
	return GraphNone, eager, excluded
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

// adapters returns the adapter count whose graphs serve k active adapters, and whether such graphs
// exist.
func (d *Dispatcher) adapters(k int) (int, bool) {
	if k == 0 {
		return 0, d.loraCases[0] == 0
	}
	if k > d.lora.MaxLoRAs { // also without adapters
		return k, false
	}
	if !d.lora.SpecializeCount {
		return d.lora.MaxLoRAs + 1, true
	}
	i, _ := slices.BinarySearch(d.loraCases, k)
	return d.loraCases[i], true
}

// fewestLoRAs returns the smallest number of active adapters that has graphs.
func (d *Dispatcher) fewestLoRAs() int {
	if d == nil {
		return 0
	}
	return min(d.loraCases[0], 1)
}

// Capture is a graph that warm-up captures: a runtime mode and the key of the batch.
type Capture struct {
	Mode  GraphMode
	Batch BatchDescriptor
}

// Captures returns every graph that Dispatch can answer with, in the order in which to capture them:
// piecewise before full, and the largest first, so that the smaller ones fit into the memory that the
// larger ones have claimed.
func (d *Dispatcher) Captures() []Capture {
	if d == nil {
		return nil
	}
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

// Gap is a range of token counts for which a batch gets less than the configured mode promises.
type Gap struct {
	// Tokens holds the token counts of the batches, without padding. Of uniform decode batches only the
	// multiples of the query length count.
	Tokens Range

	// Decode says that these are uniform decode batches; otherwise they are mixed ones.
	Decode bool

	// Mode is what such a batch gets, and Reason why.
	Mode   GraphMode
	Reason Reason
}

// String returns the gap as "uniform decode batches of 41 to 42 tokens run in NONE: too_large".
func (g Gap) String() string {
	kind := "mixed"
	if g.Decode {
		kind = "uniform decode"
	}
	return fmt.Sprintf("%s batches of %d to %d tokens run in %v: %v",
		kind, g.Tokens.Start, g.Tokens.Stop-1, g.Mode, g.Reason)
}

// Gaps returns where a batch gets less than the configured mode promises, so that an engine can tell at
// its start. First come uniform decode batches of q, 2q, ... q·MaxNumSeqs tokens, with q the query
// length, which are promised the mode's decode mode; then mixed ones of 1 to the larger of q·MaxNumSeqs
// and the largest capture size, which are promised its mixed mode. All have the fewest active adapters
// that have graphs. Neighbours with the same mode and reason are one range.
func (d *Dispatcher) Gaps() []Gap {
	if d == nil || d.mode == GraphNone {
		return nil
	}
	largest := int(min(int64(d.q)*int64(d.maxSeqs), maxCount))
	return append(d.gaps(true, d.q, largest), d.gaps(false, 1, max(largest, d.sizes[len(d.sizes)-1]))...)
}

// gaps returns the gaps among batches of step, 2·step, ... tokens up to largest. Batches that pad to the
// same size get the same answer, so one of them is asked for all.
func (d *Dispatcher) gaps(decode bool, step, largest int) (gaps []Gap) {
	promised := d.mixed
	if decode {
		promised = d.mode.DecodeMode()
	}
	next := step // the smallest batch not looked at yet
	for _, size := range append(slices.Clone(d.sizes), largest) {
		last := min(size, largest) / step * step
		if last < next {
			continue
		}
		query := DispatchQuery{NumTokens: last, UniformDecode: decode, NumActiveLoRAs: d.fewestLoRAs()}
		mode, _, reason := d.Dispatch(query)
		if mode < promised {
			gap := Gap{Range{next, last + 1}, decode, mode, reason}
			if n := len(gaps); n > 0 && gaps[n-1].Mode == mode && gaps[n-1].Reason == reason &&
				gaps[n-1].Tokens.Stop-1+step == next {
				gaps[n-1].Tokens.Stop = gap.Tokens.Stop
			} else {
				gaps = append(gaps, gap)
			}
		}
		next = last + step
	}
	return gaps
}

// queryLen returns the uniform decode query length; 1 without a dispatcher.
func (d *Dispatcher) queryLen() int {
	if d == nil {
		return 1
	}
	return d.q
}

// DefaultCaptureSizes returns vLLM's capture sizes up to max tokens, and max itself: 1, 2, 4, then every
// 8th below 256, then every 16th. If max is below 1, there are none. It panics if max is above 2^24,
// which no batch reaches: the list would fill the memory.
func DefaultCaptureSizes(max int) []int {
	if max > maxListed {
		panic(fmt.Sprintf("fwd: DefaultCaptureSizes(%d): more than %d tokens", max, maxListed))
	}
	var sizes []int
	for size := 1; size < max; {
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
	if max >= 1 {
		sizes = append(sizes, max)
	}
	return sizes
}

// RoundCaptureSizes returns sizes rounded up to multiples, ascending and unique. Those that would be
// above the largest of sizes are left out; sizes itself does not change. It returns an error that wraps
// ErrInvalid if multiple or a size is below 1, or if no size is left. No sizes stay no sizes.
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

// A GraphCache gives one forward function graphs for one runtime mode: the first pass with a key
// captures, later ones replay. Make one with [NewGraphCache]. It may be used by any number of goroutines.
// Passes that meet an unknown key concurrently capture it once. A graph stays for the life of the cache,
// one for each key; [GraphCache.CloseCapture] after warm-up bounds their number.
//
// Passes that replay the same graph concurrently take turns, because they share its buffers: as with
// CUDA graphs, inputs and outputs lie in buffers that outlive a pass, which the caller fills and reads.
// A replay that enters its own graph again would wait for itself, so it must not.
//
// Caches nest: an engine with both modes has a full cache around its whole forward function, which calls
// piecewise caches around its parts. In a pass of one mode the caches of the other just call their
// function.
type GraphCache struct {
	mode    GraphMode
	forward ForwardFunc
	capture func(ctx context.Context, key BatchDescriptor) (ForwardFunc, error)

	mu        sync.RWMutex
	graphs    map[BatchDescriptor]*graph
	capturing map[BatchDescriptor]*capturing
	closed    bool
}

// graph is a captured graph.
type graph struct {
	replay ForwardFunc
	turn   chan struct{} // holds a value while a pass replays
}

// capturing is a capture in progress. Its result is there once done is closed.
type capturing struct {
	within *capturing // the capture, by the same cache, inside of which this one happens; nil: none
	done   chan struct{}
	graph  *graph
	err    error
	retry  bool // it failed because the capturing pass was cancelled, which says nothing to the others
}

// captureKey is the context key of a cache's innermost capture.
type captureKey struct{ cache *GraphCache }

// NewGraphCache returns an empty cache for passes in mode. forward is what runs without a graph. capture
// captures it for the batches that key describes, and returns what replays it for the pass in ctx: a
// CUDA graph, a compiled plan. It may call forward any number of times with its ctx.
//
// NewGraphCache returns an error that wraps ErrInvalid if mode is not GraphPiecewise or GraphFull, or if
// a function is nil.
func NewGraphCache(
	mode GraphMode, forward ForwardFunc,
	capture func(ctx context.Context, key BatchDescriptor) (replay ForwardFunc, err error),
) (*GraphCache, error) {
	var p problems
	if mode == GraphNone || !mode.ValidRuntime() {
		p.addf("a graph cache for mode %v, want PIECEWISE or FULL", mode)
	}
	if forward == nil || capture == nil {
		p.addf("a graph cache without forward function (nil: %t) or capture function (nil: %t)",
			forward == nil, capture == nil)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return &GraphCache{
		mode: mode, forward: forward, capture: capture,
		graphs: make(map[BatchDescriptor]*graph), capturing: make(map[BatchDescriptor]*capturing),
	}, nil
}

// Forward runs the pass in ctx. It calls the forward function if there is no pass, if the pass's graph
// mode is not the cache's, if the pass is split into microbatches, or if it has SkipCompiled. Otherwise
// it replays the graph of the pass's descriptor, and captures it before that if it is not known yet.
//
// It returns the errors of the forward function, the capture and the replay. It also returns errors that
// wrap ErrNoDescriptor if the pass has no descriptor; ErrCaptureClosed if the key is unknown after
// CloseCapture; ErrInvalid if the descriptor's HasLoRA and NumActiveLoRAs disagree, if the capture
// returned no replay function, or if a capture asks for the key that it captures; and the cause of ctx
// if it ends while another pass captures or replays the graph.
func (c *GraphCache) Forward(ctx context.Context) error {
	pass := lookup(ctx)
	if pass == nil || pass.fc.GraphMode != c.mode || len(pass.fc.UBatches) > 0 || pass.fc.SkipCompiled {
		return c.forward(ctx)
	}
	key := pass.fc.Batch
	if key == (BatchDescriptor{}) {
		return fmt.Errorf("%w: a pass of %d tokens in graph mode %v", ErrNoDescriptor, pass.fc.NumTokens, c.mode)
	}
	c.mu.RLock()
	g := c.graphs[key]
	c.mu.RUnlock()
	if g == nil {
		var err error
		if g, err = c.captured(ctx, pass, key); err != nil {
			return err
		}
	}
	if err := g.take(ctx); err != nil {
		return fmt.Errorf("fwd: waiting for another pass to replay %+v: %w", key, err)
	}
	defer g.giveBack()
	pass.traced().event(ctx, eventReplay)
	return g.replay(ctx)
}

// take waits for this pass's turn. A pass that needs not wait runs whatever its ctx says.
func (g *graph) take(ctx context.Context) error {
	select {
	case g.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case g.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *graph) giveBack() { <-g.turn }

// captured returns the graph of a key that was not known a moment ago: by capturing it, or by waiting
// for the pass that does.
func (c *GraphCache) captured(ctx context.Context, pass *passContext, key BatchDescriptor) (*graph, error) {
	var bad problems
	if key.check(&bad); len(bad) > 0 {
		return nil, bad.err()
	}
	within, _ := ctx.Value(captureKey{c}).(*capturing)
	for {
		g, flight, ours, err := c.join(key, within)
		switch {
		case g != nil:
			return g, nil
		case err != nil:
			pass.traced().captureRefused(ctx, err)
			return nil, err
		case ours:
			c.fly(ctx, pass, key, flight)
			return flight.graph, flight.err
		}
		for outer := within; outer != nil; outer = outer.within {
			if outer == flight {
				return nil, invalidf("the capture of %+v asks its own cache for the same key", key)
			}
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

// join returns the graph of a key if it is known by now, or else the capture that is in progress, or
// else a new one, which is ours.
func (c *GraphCache) join(
	key BatchDescriptor, within *capturing,
) (g *graph, flight *capturing, ours bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if g := c.graphs[key]; g != nil {
		return g, nil, false, nil
	}
	if flight := c.capturing[key]; flight != nil {
		return nil, flight, false, nil
	}
	if c.closed {
		return nil, nil, false, fmt.Errorf("%w: graph mode %v, key %+v", ErrCaptureClosed, c.mode, key)
	}
	flight = &capturing{within: within, done: make(chan struct{})}
	c.capturing[key] = flight
	return nil, flight, true, nil
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
	replay, err := c.capture(pass.over(context.WithValue(ctx, captureKey{c}, flight)), key)
	if err == nil && replay == nil {
		err = invalidf("the capture of %+v returned no replay function", key)
	}
	if flight.err = err; err != nil {
		flight.retry = ctx.Err() != nil
		return
	}
	flight.graph = &graph{replay: replay, turn: make(chan struct{}, 1)}
	pass.traced().event(ctx, eventCapture)
}

// CloseCapture ends warm-up: from now on an unknown key is ErrCaptureClosed, since a capture in the
// middle of serving would stall the pass and, on real devices, every stream. A capture that is in
// progress ends normally.
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
