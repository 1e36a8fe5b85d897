package fwd

import (
	"context"
	"fmt"
	"iter"
	"math/bits"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"
)

// Chapter 1: how a rank stands among the others.

// ParallelConfig says which of the data-parallel (DP) ranks of a model a [Runner] is, and when
// batches are split into microbatches. The zero value is one rank alone, without microbatches.
type ParallelConfig struct {
	// DataParallelSize is the number of ranks; 0 means 1. DataParallelRank is this one, from 0. If
	// both are 0 and the Runner has a coordinator, [New] takes them from the coordinator.
	DataParallelSize, DataParallelRank int

	// Dense says that the model is not a mixture of experts. The ranks of a dense model are
	// independent and exchange nothing. A dense rank may leave the size at 0 if it does not know it.
	Dense bool

	// NumUBatches is the number of microbatches of a split pass; 0 and 1 mean that no pass is split.
	NumUBatches int

	// A batch is worth splitting if it has at least so many tokens without padding:
	// DecodeUBatchThreshold for a uniform decode batch, PrefillUBatchThreshold for any other. 0 means
	// 32 and 512.
	DecodeUBatchThreshold, PrefillUBatchThreshold int

	// TokenMultiple: the token count of a batch is rounded up to a multiple of it before dispatch, as
	// a sequence-parallel pass needs it; 0 means 1.
	TokenMultiple int
}

// maxRanks bounds the number of DP ranks, so that sums over ranks of counts up to 2^31-1 are exact in
// a float64.
const maxRanks = 1 << 20

func (c ParallelConfig) withDefaults() ParallelConfig {
	if !c.sizeUnknown() {
		c.DataParallelSize = max(c.DataParallelSize, 1)
	}
	if c.DecodeUBatchThreshold == 0 {
		c.DecodeUBatchThreshold = 32
	}
	if c.PrefillUBatchThreshold == 0 {
		c.PrefillUBatchThreshold = 512
	}
	c.NumUBatches = max(c.NumUBatches, 1)
	c.TokenMultiple = max(c.TokenMultiple, 1)
	return c
}

// sizeUnknown reports whether this is a dense rank that does not know how many others there are.
func (c ParallelConfig) sizeUnknown() bool {
	return c.Dense && c.DataParallelSize == 0 && c.DataParallelRank > 0
}

func (c ParallelConfig) check(p *problems) {
	size := max(c.DataParallelSize, 1)
	switch {
	case c.DataParallelSize < 0 || size > maxRanks:
		p.addf("DataParallelSize is %d, want 1 to %d", c.DataParallelSize, maxRanks)
	case c.sizeUnknown() && c.DataParallelRank < maxRanks:
	case c.DataParallelRank < 0 || c.DataParallelRank >= size:
		p.addf("DataParallelRank is %d, want 0 to %d for DataParallelSize %d",
			c.DataParallelRank, size-1, size)
	}
	if c.NumUBatches < 0 || c.NumUBatches > maxUBatches {
		p.addf("NumUBatches is %d, want 0 to %d", c.NumUBatches, maxUBatches)
	}
	p.count("DecodeUBatchThreshold", c.DecodeUBatchThreshold)
	p.count("PrefillUBatchThreshold", c.PrefillUBatchThreshold)
	p.count("TokenMultiple", c.TokenMultiple)
}

// coordinated reports whether the ranks of the model depend on each other. The defaults must be
// filled in.
func (c ParallelConfig) coordinated() bool { return c.DataParallelSize > 1 && !c.Dense }

// roundUp returns n rounded up to TokenMultiple; ok is false if that is more than any count. The defaults
// must be filled in.
func (c *ParallelConfig) roundUp(n int) (rounded int, ok bool) {
	if c.TokenMultiple == 1 { // usually
		return n, true
	}
	return c.roundUpTo(n)
}

func (c *ParallelConfig) roundUpTo(n int) (rounded int, ok bool) {
	rest := n % c.TokenMultiple
	switch {
	case rest == 0:
		return n, true
	case n > maxCount-(c.TokenMultiple-rest): // an int may have 32 bits
		return n, false
	}
	return n + c.TokenMultiple - rest, true
}

// tooMany adds a problem if so many tokens can't be rounded up.
func (c *ParallelConfig) tooMany(p *problems, n int, whose string) {
	if _, ok := c.roundUp(n); !ok {
		p.addf("%d tokens of %s rounded up to a multiple of %d are more than %d",
			n, whose, c.TokenMultiple, maxCount)
	}
}

// Chapter 2: token counts across the ranks.

// DPMetadata holds how many tokens each data-parallel rank has in a pass, and does the arithmetic on
// those counts that model code needs. It is immutable, so any number of goroutines may use it. Make
// one with [NewDPMetadata]; the zero value has no ranks.
//
// In the formulas below, T[d] is the number of tokens of rank d of D, and s is the sequence-parallel
// (SP) size: the number of ways in which the tokens of a rank are split. The arithmetic is that of
// vLLM's DPMetadata, and it is exact for counts up to 2^31-1. The methods panic if an SP size or a
// chunk size is below 1, if a chunk index is negative, or if D·s is above 2^24.
type DPMetadata struct {
	rank, size int
	tokens     []int // by rank; nil: every rank has max
	max        int
}

// NewDPMetadata returns the DP metadata of a pass of numTokens tokens, padding included, on the rank
// that p names. across holds the tokens of every rank and has length DataParallelSize; it is copied.
//
// It returns an error that wraps ErrInvalid if p is invalid, if across is nil, empty or of another
// length, or if a count is not a whole number from 0 to 2^31-1. It returns one that wraps
// ErrTokenMismatch if across[rank] is not numTokens, as when one is padded and the other is not.
func NewDPMetadata(p ParallelConfig, numTokens int, across *mat.VecDense) (*DPMetadata, error) {
	var bad problems
	p.check(&bad)
	if err := bad.err(); err != nil {
		return nil, err
	}
	p = p.withDefaults()
	if err := checkAcross(p, numTokens, across); err != nil {
		return nil, err
	}
	m := &DPMetadata{rank: p.DataParallelRank, size: p.DataParallelSize, tokens: make([]int, across.Len())}
	for d := range m.tokens {
		m.tokens[d] = int(across.AtVec(d))
		m.max = max(m.max, m.tokens[d])
	}
	return m, nil
}

// checkAcross checks the counts of a pass across ranks. The defaults of p must be filled in.
func checkAcross(p ParallelConfig, numTokens int, across *mat.VecDense) error {
	if across == nil || across.Len() == 0 {
		return invalidf("no token counts for the %d data-parallel ranks", p.DataParallelSize)
	}
	if across.Len() != p.DataParallelSize {
		return invalidf("%d token counts for %d data-parallel ranks", across.Len(), p.DataParallelSize)
	}
	if own := across.AtVec(p.DataParallelRank); own != float64(numTokens) {
		return fmt.Errorf("%w: rank %d runs %d tokens, but the counts across ranks say %v; both include padding",
			ErrTokenMismatch, p.DataParallelRank, numTokens, own)
	}
	for d := range across.Len() {
		v := across.AtVec(d)
		if !(v >= 0 && v <= maxCount) || v != float64(int(v)) { // written so that NaN is refused too
			return invalidf("rank %d has %v tokens, want a whole number from 0 to %d", d, v, maxCount)
		}
	}
	return nil
}

// Size returns the number of DP ranks, D.
func (m *DPMetadata) Size() int { return m.size }

// Rank returns the DP rank of this pass.
func (m *DPMetadata) Rank() int { return m.rank }

// NumTokens returns T[rank], padding included. It panics if there is no such rank.
func (m *DPMetadata) NumTokens(rank int) int {
	if rank < 0 || rank >= m.size {
		panic(fmt.Sprintf("fwd: NumTokens of rank %d, want 0 to %d", rank, m.size-1))
	}
	if m.tokens == nil {
		return m.max
	}
	return m.tokens[rank]
}

// NumTokensAcrossDPTo stores T into dst and returns dst, which has length D. If dst is nil, a vector
// is allocated; if it is empty, it takes the right size. It panics if dst has another length.
func (m *DPMetadata) NumTokensAcrossDPTo(dst *mat.VecDense) *mat.VecDense {
	dst, raw, inc := vecOfLen(dst, m.size)
	if m.tokens == nil {
		for d := range m.size {
			raw[d*inc] = float64(m.max)
		}
		return dst
	}
	for d, n := range m.tokens {
		raw[d*inc] = float64(n)
	}
	return dst
}

// MaxTokensAcrossDP returns max T.
func (m *DPMetadata) MaxTokensAcrossDP() int { return m.max }

// CuTokensAcrossSPTo stores the inclusive running sum of the SP local sizes into dst and returns dst.
// It has length D·sp and no leading zero. dst is treated as by NumTokensAcrossDPTo.
func (m *DPMetadata) CuTokensAcrossSPTo(dst *mat.VecDense, sp int) *mat.VecDense {
	dst, raw, inc := vecOfLen(dst, m.numLocal(sp))
	sum := int64(0) // below 2^53, so it is exact as a float64
	switch {
	case m.tokens == nil:
		local := int64(ceilDiv(m.max, sp))
		for k := range m.size * sp {
			sum += local
			raw[k*inc] = float64(sum)
		}
	case sp == 1 && inc == 1:
		raw = raw[:len(m.tokens)]
		for d, n := range m.tokens {
			sum += int64(n)
			raw[d] = float64(sum)
		}
	default:
		div, i := newDivider(sp), 0
		for _, n := range m.tokens {
			local := int64(div.ceil(n))
			for end := i + sp*inc; i < end; i += inc {
				sum += local
				raw[i] = float64(sum)
			}
		}
	}
	return dst
}

// AppendSPLocalSizes appends the SP local sizes to dst and returns the extended slice: for each rank d
// ceil(T[d]/sp), sp times in a row (DP major, SP minor), D·sp numbers in all. Zero stays zero.
func (m *DPMetadata) AppendSPLocalSizes(dst []int, sp int) []int {
	dst, out := extend(dst, m.numLocal(sp))
	switch {
	case m.tokens == nil:
		fill(out, ceilDiv(m.max, sp))
	case sp == 1:
		copy(out, m.tokens)
	default:
		div, i := newDivider(sp), 0
		for _, n := range m.tokens {
			local := div.ceil(n)
			for end := i + sp; i < end; i++ {
				out[i] = local
			}
		}
	}
	return dst
}

// AppendChunkedSizes appends how many tokens each SP rank sends in chunk idx, D·sp numbers, and
// returns the extended slice. With v its SP local size, a rank sends min(maxChunk, v - maxChunk·idx)
// tokens, or 1 if that is not above 0: a rank that is done, or has no tokens, still sends one, so that
// all ranks stay in lockstep.
func (m *DPMetadata) AppendChunkedSizes(dst []int, sp, maxChunk, idx int) []int {
	if maxChunk < 1 || idx < 0 {
		panic(fmt.Sprintf("fwd: chunk %d of at most %d tokens", idx, maxChunk))
	}
	dst, out := extend(dst, m.numLocal(sp))
	start := maxCount // no local size is above it
	if idx <= maxCount/maxChunk {
		start = maxChunk * idx
	}
	switch {
	case m.tokens == nil:
		fill(out, chunkSize(ceilDiv(m.max, sp), start, maxChunk))
	case sp == 1:
		out = out[:len(m.tokens)]
		for d, n := range m.tokens {
			out[d] = chunkSize(n, start, maxChunk)
		}
	default:
		div, i := newDivider(sp), 0
		for _, n := range m.tokens {
			size := chunkSize(div.ceil(n), start, maxChunk)
			for end := i + sp; i < end; i++ {
				out[i] = size
			}
		}
	}
	return dst
}

// chunkSize returns how many of local tokens are in the chunk that begins at start.
func chunkSize(local, start, maxChunk int) int { return max(min(maxChunk, local-start), 1) }

// NumChunks returns in how many chunks of at most maxChunk tokens the ranks process their SP local
// sizes: ceil(max SP local size / maxChunk), which is 0 if no rank has tokens.
func (m *DPMetadata) NumChunks(sp, maxChunk int) int {
	if maxChunk < 1 {
		panic(fmt.Sprintf("fwd: chunks of at most %d tokens", maxChunk))
	}
	m.numLocal(sp)
	return ceilDiv(ceilDiv(m.max, sp), maxChunk)
}

// numLocal returns D·sp, the number of SP local sizes. It panics if sp is out of range.
func (m *DPMetadata) numLocal(sp int) int {
	if err := m.checkSP(sp); err != nil {
		panic(err.Error())
	}
	return m.size * sp
}

func (m *DPMetadata) checkSP(sp int) error {
	if m.size == 0 {
		return invalidf("DP metadata without ranks")
	}
	if most := maxListed / m.size; sp < 1 || sp > most {
		return invalidf("SP size %d for %d data-parallel ranks, want 1 to %d", sp, m.size, most)
	}
	return nil
}

// checkEqual adds a problem if ranks have unequal counts, since then they can't split at the same
// tokens.
func (m *DPMetadata) checkEqual(p *problems) {
	for d, n := range m.tokens {
		if n != m.max {
			p.addf("microbatches need equal token counts: rank %d has %d, another %d", d, n, m.max)
			return
		}
	}
}

// equal returns DP metadata of the same ranks in which each has n tokens.
func (m *DPMetadata) equal(n int) DPMetadata { return DPMetadata{rank: m.rank, size: m.size, max: n} }

// vecOfLen returns dst with length n, its data and their increment.
func vecOfLen(dst *mat.VecDense, n int) (_ *mat.VecDense, raw []float64, inc int) {
	if n == 0 {
		panic("fwd: DP metadata without ranks")
	}
	if dst == nil {
		dst = new(mat.VecDense)
	}
	if dst.IsEmpty() {
		dst.ReuseAsVec(n)
	}
	if dst.Len() != n {
		panic(fmt.Sprintf("fwd: dst has length %d, want %d", dst.Len(), n))
	}
	vec := dst.RawVector()
	return dst, vec.Data, vec.Inc
}

// extend returns dst with room for n more numbers at its end, and that room.
func extend(dst []int, n int) (all, room []int) {
	all = slices.Grow(dst, n)[:len(dst)+n]
	return all, all[len(dst):]
}

func fill(dst []int, v int) {
	for i := range dst {
		dst[i] = v
	}
}

// ceilDiv returns ceil(a/b) for a >= 0 and b >= 1, without overflow.
func ceilDiv(a, b int) int {
	q := a / b
	if a%b != 0 {
		q++
	}
	return q
}

// A divider divides counts by the same number again and again, by multiplication: a division takes
// some ten times as long.
type divider struct {
	factor uint64
	shift  uint
}

// newDivider returns the divider by d, from 1 to 2^24. With l = ceil(log2 d) its factor is
// ceil(2^(31+l)/d), which makes floor(n·factor / 2^(31+l)) = floor(n/d) for all n below 2^31 (Granlund
// and Montgomery, "Division by invariant integers using multiplication").
func newDivider(d int) divider {
	shift := uint(31 + bits.Len(uint(d-1)))
	return divider{factor: (1<<shift + uint64(d) - 1) / uint64(d), shift: shift}
}

// ceil returns ceil(n/d) for a count n.
func (v divider) ceil(n int) int {
	if n == 0 {
		return 0
	}
	return int(uint64(n-1)*v.factor>>v.shift) + 1
}

// Chapter 3: local sizes, in contexts derived from the pass's.

// rows returns the pass in ctx and the counts from which its local sizes follow. Without DP metadata
// the pass counts as one rank.
func rows(ctx context.Context, sp int) (*passContext, DPMetadata, error) {
	c := lookup(ctx)
	if c == nil {
		return nil, DPMetadata{}, ErrNoForwardContext
	}
	if c.fc.DP != nil {
		return c, *c.fc.DP, c.fc.DP.checkSP(sp)
	}
	if n := c.fc.NumTokens; n < 0 || n > maxCount {
		return nil, DPMetadata{}, invalidf("the pass has %d tokens, want 0 to %d", n, maxCount)
	}
	alone := DPMetadata{size: 1, max: c.fc.NumTokens}
	return c, alone, alone.checkSP(sp)
}

// withSizes returns a context derived from ctx, which c is in, in which sizes are the local sizes.
func (c *passContext) withSizes(ctx context.Context, sizes []int) context.Context {
	derived := &struct {
		passContext
		list []int
	}{*c, sizes}
	derived.Context, derived.sizes = ctx, &derived.list
	return &derived.passContext
}

// WithSPLocalSizes returns a context in which [LocalSizes] returns the SP local sizes of the pass in
// ctx (see [DPMetadata.AppendSPLocalSizes]); ctx itself does not change. A pass without DP metadata
// counts as one rank with ForwardContext.NumTokens tokens.
//
// It returns ErrNoForwardContext outside a pass, and an error that wraps ErrInvalid if sp is below 1
// or too large for a list of the sizes.
func WithSPLocalSizes(ctx context.Context, sp int) (context.Context, error) {
	c, m, err := rows(ctx, sp)
	if err != nil {
		return nil, err
	}
	return c.withSizes(ctx, m.AppendSPLocalSizes(nil, sp)), nil
}

// WithChunkedSizes does the same as [WithSPLocalSizes] with the sizes of one chunk (see
// [DPMetadata.AppendChunkedSizes]). It also returns an error that wraps ErrInvalid if maxChunk is
// below 1 or idx is negative.
func WithChunkedSizes(ctx context.Context, sp, maxChunk, idx int) (context.Context, error) {
	c, m, err := rows(ctx, sp)
	if err == nil && (maxChunk < 1 || idx < 0) {
		err = invalidf("chunk %d of at most %d tokens", idx, maxChunk)
	}
	if err != nil {
		return nil, err
	}
	return c.withSizes(ctx, m.AppendChunkedSizes(nil, sp, maxChunk, idx)), nil
}

// LocalSizes returns the local sizes that ctx was derived with, in tokens: one for each SP rank of
// each DP rank (DP major, SP minor). They must not be modified. If ctx was derived with none, ok is
// false; a pass and a microbatch begin without.
func LocalSizes(ctx context.Context) (sizes []int, ok bool) {
	c := lookup(ctx)
	if c == nil || c.sizes == nil {
		return nil, false
	}
	return *c.sizes, true
}

// Chunk is one round in which the ranks of a mixture-of-experts layer exchange a bounded number of
// rows each.
type Chunk struct {
	Index int

	// Rows are the rows that this rank computes, of its SP local size: at least one.
	Rows Range

	// Keep is false if the rows are computed only to stay in lockstep.
	Keep bool

	// Sizes is what [LocalSizes] returns in the round's context. It must not be modified.
	Sizes []int
}

// Chunks returns the rounds of a layer that exchanges at most maxChunk rows of each rank at a time.
// Every rank gets the same number of rounds, [DPMetadata.NumChunks]. Each round has a context with the
// round's local sizes, and the rows that this rank computes in it. With n this rank's SP local size, M
// the largest of all ranks and c maxChunk, round i covers the rows from start = i·c to
// end = min((i+1)·c, M). This rank computes its rows from min(start, n-1) to min(end, n), and keeps the
// result if start is below n. A rank
// without rows computes [0, 1), for which the caller supplies a padding row, and keeps nothing. If no
// rank has tokens, there are no rounds.
//
// Rows count from the start of the caller's own part of its rank's tokens. Each SP rank has ceil(T/sp)
// rows, so the last SP ranks have padding rows if T is not a multiple of sp.
//
// The iterator can be used again. Chunks returns ErrNoForwardContext outside a pass, and an error that
// wraps ErrInvalid if sp or maxChunk is out of range.
func Chunks(ctx context.Context, sp, maxChunk int) (iter.Seq2[context.Context, Chunk], error) {
	c, m, err := rows(ctx, sp)
	if err == nil && maxChunk < 1 {
		err = invalidf("chunks of at most %d tokens", maxChunk)
	}
	if err != nil {
		return nil, err
	}
	return func(yield func(context.Context, Chunk) bool) {
		own, largest := ceilDiv(m.NumTokens(m.rank), sp), ceilDiv(m.max, sp)
		for i := range m.NumChunks(sp, maxChunk) {
			start := i * maxChunk
			end := start + min(maxChunk, largest-start) // not min(start+maxChunk, largest): the sum may overflow
			chunk := Chunk{
				Index: i,
				Rows:  Range{max(min(start, own-1), 0), max(min(end, own), 1)},
				Keep:  start < own,
				Sizes: m.AppendChunkedSizes(nil, sp, maxChunk, i),
			}
			if !yield(c.withSizes(ctx, chunk.Sizes), chunk) {
				return
			}
		}
	}, nil
}

// Chapter 4: votes, agreements and the in-process group.

// Vote is what one rank says in one step.
type Vote struct {
	// Step numbers the exchanges of a Runner, from 1.
	Step uint64

	NumTokens       int // scheduled, without padding
	NumTokensPadded int // padded for this rank's graph, at least NumTokens
	NumReqs         int // scheduled requests that have tokens; 0: not said
	NumActiveLoRAs  int // distinct adapters in the batch

	Uniform     bool // a uniform decode batch
	ExcludeFull bool // see Schedule
	Eager       bool // see Schedule
	UBatch      bool // wants microbatches
	Idle        bool // has nothing of its own to run: NumTokens are those of a dummy batch
	WarmUp      bool // a pass of Runner.WarmUp

	// GraphMode is the runtime mode to which this rank dispatched its batch.
	GraphMode GraphMode

	// Note is the engine's own word, from Schedule.Note.
	Note uint64

	// Config is a fingerprint of the configuration that must be equal on all ranks; 0: not said.
	Config uint64

	// SpanContext is that of rank 0's span, with the step trace; it is remote if it came from another
	// process. It has no exported fields, so a coordinator that sends votes as bytes must send its
	// parts and put it together again.
	SpanContext trace.SpanContext
}

// Validate returns nil or what is wrong with the vote of the given rank. It returns an error that
// wraps ErrInvalid if a count is negative or above 2^31-1, if NumTokensPadded is below NumTokens, or
// if GraphMode is not a runtime mode. A [Coordinator] refuses such a vote before it sends anything.
func (v *Vote) Validate(rank int) error {
	if uint(v.NumTokens) <= uint(v.NumTokensPadded) && uint(v.NumTokensPadded) <= maxCount &&
		uint(v.NumReqs) <= maxCount && uint(v.NumActiveLoRAs) <= maxCount && v.GraphMode.ValidRuntime() {
		return nil
	}
	var p problems
	if v.NumTokens < 0 || v.NumTokensPadded < v.NumTokens || v.NumTokensPadded > maxCount {
		p.addf("rank %d votes for %d tokens, %d with padding, want 0 <= tokens <= padded <= %d",
			rank, v.NumTokens, v.NumTokensPadded, maxCount)
	}
	p.count(fmt.Sprintf("NumReqs of rank %d's vote", rank), v.NumReqs)
	p.count(fmt.Sprintf("NumActiveLoRAs of rank %d's vote", rank), v.NumActiveLoRAs)
	if !v.GraphMode.ValidRuntime() {
		p.addf("rank %d votes for %v, which is not a runtime mode", rank, v.GraphMode)
	}
	return p.err()
}

// same reports whether two votes say the same, whatever their steps are. A trace state that got lost
// on the way makes no difference.
func (v *Vote) same(w *Vote) bool {
	return v.NumTokens == w.NumTokens && v.NumTokensPadded == w.NumTokensPadded &&
		v.NumReqs == w.NumReqs && v.NumActiveLoRAs == w.NumActiveLoRAs &&
		v.Uniform == w.Uniform && v.ExcludeFull == w.ExcludeFull && v.Eager == w.Eager &&
		v.UBatch == w.UBatch && v.Idle == w.Idle && v.WarmUp == w.WarmUp &&
		v.GraphMode == w.GraphMode && v.Note == w.Note && v.Config == w.Config
}

// newFingerprint returns a number that stands for what must be equal on all ranks: FNV-1a over its
// parts, each as 8 bytes, so that it is the same in every process and on every architecture.
func (r *Runner) newFingerprint() uint64 {
	f := fingerprint(14695981039346656037)
	f.text(r.name)
	c := r.parallel
	f.ints(c.DataParallelSize, toInt(c.Dense), c.NumUBatches, c.DecodeUBatchThreshold,
		c.PrefillUBatchThreshold, c.TokenMultiple, toInt(r.stepTrace))
	r.dispatcher.addTo(&f)
	return max(uint64(f), 1) // 0 means that nothing is said
}

type fingerprint uint64

func (f *fingerprint) ints(list ...int) {
	for _, n := range list {
		for i := range 8 {
			*f = (*f ^ fingerprint(byte(int64(n)>>(8*i)))) * 1099511628211
		}
	}
}

func (f *fingerprint) text(s string) {
	f.ints(len(s))
	for _, b := range []byte(s) {
		f.ints(int(b))
	}
}

func toInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// warmUpGraph identifies the graph that a vote warms up; the zero value is none.
type warmUpGraph struct {
	warmUp              bool
	tokens, reqs, loras int
	uniform             bool
	mode                GraphMode
}

func (v *Vote) warmUpGraph() warmUpGraph {
	if !v.WarmUp {
		return warmUpGraph{}
	}
	return warmUpGraph{true, v.NumTokens, v.NumReqs, v.NumActiveLoRAs, v.Uniform, v.GraphMode}
}

// Agreement is what all ranks know once they have all votes of a step. Neither it nor what it holds may
// be modified.
type Agreement struct {
	Step      uint64
	UBatch    bool // all busy ranks split their batch
	Idle      bool // every rank is idle, so nobody runs a pass
	GraphMode GraphMode

	// NumTokensAcrossDP holds the tokens that each rank runs, and has length DataParallelSize.
	NumTokensAcrossDP *mat.VecDense

	// MaxTokensRank is the first rank with the most padded tokens; idle ranks don't count if the
	// others are padded.
	MaxTokensRank int

	// LowestModeRank is the first busy rank that voted for GraphMode, if another voted for a higher
	// mode. It is -1 if nobody lowered the mode.
	LowestModeRank int

	// Votes are those of all ranks, in rank order.
	Votes []Vote

	// SpanContext is that of rank 0's vote.
	SpanContext trace.SpanContext
}

// Agree returns what follows from the votes of all ranks, which are in rank order; every rank computes
// the same. Let u be the tokens of a rank without padding, p those with padding, and n = numUBatches,
// of which 0 and 1 mean no microbatches. Idle ranks are left out of the first two rules, and of max p
// and min u:
//
//   - The graph mode is the lowest of all.
//   - The ranks run microbatches if all want them, unless the last microbatch would be empty
//     somewhere: floor(max p / n)·(n-1) >= min u.
//   - With graphs or microbatches all ranks run max p tokens, otherwise each runs its own p.
//
// If every rank is idle, the agreement says so, in mode NONE and without microbatches. The source is
// vLLM's coordinate_batch_across_dp; idle ranks are an addition. The agreement keeps votes, which must
// not be modified afterwards.
//
// Agree returns an error that wraps ErrInvalid if there are no votes, if numUBatches is negative, or
// if a vote is one that [Vote.Validate] refuses. It returns a *[RankError] that is ErrLockstep if the
// votes have different steps, if some ranks warm up and others don't, or if ranks warm up different
// graphs; and one that is ErrInvalid if ranks have different fingerprints of their configuration. The
// last two name the ranks that differ from most; if equally many differ, from the first.
func Agree(votes []Vote, numUBatches int) (Agreement, error) {
	if len(votes) == 0 || len(votes) > maxRanks || numUBatches < 0 || numUBatches > maxCount {
		return Agreement{}, invalidf("%d votes on %d microbatches, want 1 to %d votes and at least 0 microbatches",
			len(votes), numUBatches, maxRanks)
	}
	if err := checkVotes(votes); err != nil {
		return Agreement{}, err
	}
	a := Agreement{
		Step: votes[0].Step, Idle: true, UBatch: numUBatches > 1, LowestModeRank: -1,
		Votes: votes, SpanContext: votes[0].SpanContext,
	}
	minTokens, maxPadded, highest, lowest := 0, 0, GraphNone, 0
	for rank := range votes {
		v := &votes[rank]
		if v.Idle {
			continue
		}
		if a.Idle { // the first that is busy
			a.Idle, a.MaxTokensRank, lowest = false, rank, rank
			minTokens, maxPadded, highest = v.NumTokens, v.NumTokensPadded, v.GraphMode
		}
		a.UBatch = a.UBatch && v.UBatch
		minTokens = min(minTokens, v.NumTokens)
		highest = max(highest, v.GraphMode)
		if v.GraphMode < votes[lowest].GraphMode {
			lowest = rank
		}
		if v.NumTokensPadded > maxPadded {
			maxPadded, a.MaxTokensRank = v.NumTokensPadded, rank
		}
	}
	if !a.Idle {
		a.GraphMode = votes[lowest].GraphMode
	}
	if highest > a.GraphMode {
		a.LowestModeRank = lowest
	}
	a.UBatch = a.UBatch && !a.Idle && !lastUBatchEmpty(minTokens, maxPadded, numUBatches)
	a.pad(maxPadded)
	return a, nil
}

// pad sets how many tokens each rank runs. maxPadded is the most that a busy rank voted for.
func (a *Agreement) pad(maxPadded int) {
	across := make([]float64, len(a.Votes))
	a.NumTokensAcrossDP = mat.NewVecDense(len(across), across)
	if a.UBatch || a.GraphMode != GraphNone {
		for rank := range across {
			across[rank] = float64(maxPadded)
		}
		return
	}
	a.MaxTokensRank = 0
	for rank := range across {
		across[rank] = float64(a.Votes[rank].NumTokensPadded)
		if across[rank] > across[a.MaxTokensRank] {
			a.MaxTokensRank = rank
		}
	}
}

// checkVotes returns an error unless the votes are valid, of one step, of one configuration and of one
// kind.
func checkVotes(votes []Vote) error {
	first := &votes[0]
	steps, configs, kinds := true, true, true // each is the same on all ranks
	config := uint64(0)
	for rank := range votes {
		v := &votes[rank]
		if err := v.Validate(rank); err != nil {
			return err
		}
		steps = steps && v.Step == first.Step
		if v.Config != 0 {
			configs = configs && (config == 0 || v.Config == config)
			config = v.Config
		}
		kinds = kinds && v.WarmUp == first.WarmUp && (!v.WarmUp || v.warmUpGraph() == first.warmUpGraph())
	}
	switch {
	case !steps:
		return lockstepError(votes)
	case !configs:
		odd := minority(votes, func(v *Vote) (uint64, bool) { return v.Config, v.Config != 0 })
		return &RankError{errConfigured, first.Step, odd}
	case !kinds:
		odd := minority(votes, func(v *Vote) (warmUpGraph, bool) { return v.warmUpGraph(), true })
		return &RankError{errWarmUp, first.Step, odd}
	}
	return nil
}

var (
	errConfigured = fmt.Errorf("%w: the ranks are configured differently; configure all the same", ErrInvalid)
	errWarmUp     = fmt.Errorf("%w: not all ranks warm up the same graph; warm up together", ErrLockstep)
)

// minority returns the ranks whose key is not the most frequent one; if several are equally frequent,
// the first of them counts. Ranks for which key returns false have none.
func minority[K comparable](votes []Vote, key func(*Vote) (K, bool)) (ranks []int) {
	counts := make(map[K]int)
	for rank := range votes {
		if k, ok := key(&votes[rank]); ok {
			counts[k]++
		}
	}
	var most K
	times := 0 // not counts[most]: the zero K may be a key too
	for rank := range votes {
		if k, ok := key(&votes[rank]); ok && counts[k] > times {
			most, times = k, counts[k]
		}
	}
	for rank := range votes {
		if k, ok := key(&votes[rank]); ok && k != most {
			ranks = append(ranks, rank)
		}
	}
	return ranks
}

// lockstepError says at which steps the ranks are.
func lockstepError(votes []Vote) *RankError {
	e := &RankError{}
	steps := make([]uint64, len(votes))
	for rank := range votes {
		steps[rank] = votes[rank].Step
		e.Step = max(e.Step, votes[rank].Step)
	}
	for rank, step := range steps {
		if step != e.Step {
			e.Ranks = append(e.Ranks, rank)
		}
	}
	e.Err = fmt.Errorf("%w: the ranks voted steps %s", ErrLockstep, abbreviate(steps))
	return e
}

// lastUBatchEmpty reports whether a rank with that many tokens would have none for the last of n
// microbatches.
func lastUBatchEmpty(tokens, padded, n int) bool {
	return padded/n*(n-1) >= tokens
}

// A Coordinator is the one collective that a step needs: each rank gives a vote and gets the votes of
// all. Every rank has its own Coordinator, and only its [Runner] uses it. [NewLocalGroup] makes those
// of ranks that are goroutines of one process. The module fwdtest checks any implementation; it must
// hold all of this:
//
//   - If every rank votes for the same step, all get all votes.
//   - If all ranks come, but with different steps, all get a *[RankError] that is ErrLockstep and has
//     the highest step.
//   - If a rank's ctx ends first, all that wait get a *[RankError] immediately. It is ErrRankMissing
//     and names the ranks that had not come. For the rank whose ctx ended, it also wraps the cause. Its
//     Step is the broken one: the highest that was voted, or the group's if that is higher. The group
//     goes on with the next step.
//   - A rank that comes late to a broken step gets no error: its vote counts for the group's next step,
//     and the votes returned carry that step. A vote is late if its step is at least the lowest one
//     that was voted in the first round that was broken without the rank, and at most the group's. A
//     lower one comes from a rank that was restarted, which is out of step.
//   - A rank that hears the others and is not heard by one of them may complete the step in which that
//     began, and no later one: its exchanges return ErrRankMissing within their deadline, and name the
//     ranks that do not hear it, until it is heard again.
//   - If a rank votes twice in a step, the second call returns ErrLockstep and does not disturb the
//     round.
//   - A vote that [Vote.Validate] refuses returns ErrInvalid, and nothing is sent.
//
// A Coordinator may have two more methods, which the ones of this project have. Missing() []int
// returns the ranks whose votes its open Exchange still waits for, or nil if none is open; it answers
// at any time, from any goroutine, and lets [Runner.Status] name them. Last() int returns the rank whose
// vote came last in the latest Exchange that has ended, or -1 if that did not get all votes; it lets
// spans, metrics and records say who was waited for.
type Coordinator interface {
	// Rank returns this rank, from 0. It never changes.
	Rank() int

	// Size returns the number of ranks. It never changes.
	Size() int

	// Exchange votes and returns the votes of all ranks, in rank order. Each rank calls it once per
	// step. The votes must not be modified, since ranks of one process may share the slice.
	Exchange(ctx context.Context, v Vote) ([]Vote, error)
}

// maxLocalRanks bounds the ranks of one process.
const maxLocalRanks = 1 << 16

// NewLocalGroup returns the coordinators of size ranks that are goroutines of this process; element i
// is that of rank i. There is nothing to close. It returns an error that wraps ErrInvalid if size is
// below 1 or above 2^16.
func NewLocalGroup(size int) ([]Coordinator, error) {
	if size < 1 || size > maxLocalRanks {
		return nil, invalidf("a group of %d ranks, want 1 to %d", size, maxLocalRanks)
	}
	g := &localGroup{ranks: make([]*localRank, size)}
	coordinators := make([]Coordinator, size)
	for rank := range g.ranks {
		g.ranks[rank] = &localRank{group: g, rank: rank, lastRank: -1, wake: make(chan *RankError, 1)}
		coordinators[rank] = g.ranks[rank]
	}
	return coordinators, nil
}

// localGroup is a rendezvous of goroutines.
type localGroup struct {
	mu    sync.Mutex
	ranks []*localRank
	votes []Vote // of the open round, by rank; all who are in it share them once it is complete
	room  []Vote // for the votes of later rounds
	here  int    // ranks in the open round
	step  uint64 // the group's: of the last round that has ended, whichever way

	agreement *Agreement // of the latest complete round, for all who were in it; nil: not computed yet
	ubatches  int        // the number of microbatches that it is on

	steps []*stepSpan // the latest of the step trace

	timer *time.Timer   // for the deadlines of begun exchanges; nil: never needed yet
	armed time.Duration // when it fires; 0: it does not
}

// localRank is one rank's Coordinator. What follows inSteps is guarded by the group's mutex.
type localRank struct {
	group *localGroup
	rank  int
	wake  chan *RankError // how the round ended, for the rank that waits; nil: complete

	inSteps atomic.Bool // its passes are spans of the step trace

	votes    []Vote // of the round that it is in, or was in last
	round    uint64 // counts the rounds that it was in
	here     bool   // in the open round
	voted    bool   // ever
	last     uint64 // its step in the open round, or else the group's in the last round that it was in
	lastRank int    // whose vote came last in its latest round
	late     bool   // rounds were broken since it was here,
	lateFrom uint64 // this one first
	begun    begun
}

// begun is what a rank that does not wait in Exchange needs, so that its round ends all the same.
type begun struct {
	ctx      context.Context
	refused  error         // how its exchange ended if it was over when it began; nil: complete
	waits    bool          // its round is open,
	blocked  bool          // and it sleeps until the end
	unheard  bool          // its round has ended, and it has not asked how
	broken   *RankError    // how its round ended; nil: complete
	ended    time.Duration // when its round ended; 0: when it began
	stop     func() bool   // of what follows the end of ctx; nil: ctx never ends
	deadline time.Duration // 0: none
	cause    error         // of the deadline
	expired  bool
}

// Rank implements [Coordinator].
func (c *localRank) Rank() int { return c.rank }

// Size implements [Coordinator].
func (c *localRank) Size() int { return len(c.group.ranks) }

// Missing returns the ranks whose votes the open Exchange waits for, or nil if none is open.
func (c *localRank) Missing() (ranks []int) {
	c.group.mu.Lock()
	defer c.group.mu.Unlock()
	if !c.here {
		return nil
	}
	for _, other := range c.group.ranks {
		if !other.here {
			ranks = append(ranks, other.rank)
		}
	}
	return ranks
}

// Last returns the rank whose vote came last in the latest Exchange that has ended, or -1 if that did not
// have all votes, or if there was none yet.
func (c *localRank) Last() int {
	c.group.mu.Lock()
	defer c.group.mu.Unlock()
	return c.lastRank
}

// Exchange implements [Coordinator].
func (c *localRank) Exchange(ctx context.Context, v Vote) ([]Vote, error) {
	if ctx == nil { // noticed later, it would leave a vote behind
		panic("fwd: Exchange with a nil context")
	}
	if err := v.Validate(c.rank); err != nil {
		return nil, err
	}
	c.group.mu.Lock()
	votes, complete, err := c.group.join(c, &v)
	round := c.round
	c.group.mu.Unlock()
	if err == nil && !complete {
		err = c.wait(ctx, round)
	}
	if err != nil {
		return nil, err
	}
	return votes, nil
}

// begin is the first half of an Exchange whose second half, await, may come whenever it likes: the
// round also ends with ctx, and at the deadline if that is not 0, with that cause. No goroutine is
// started. The vote must be valid.
func (c *localRank) begin(ctx context.Context, v *Vote, deadline time.Duration, cause error) {
	g := c.group
	g.mu.Lock()
	defer g.mu.Unlock()
	_, complete, err := g.join(c, v)
	c.begun = begun{ctx: ctx, cause: cause, refused: err, waits: !complete && err == nil}
	if !c.begun.waits {
		return
	}
	if deadline != 0 {
		c.begun.deadline = deadline
		g.arm(deadline)
	}
	if ctx.Done() != nil {
		round := c.round
		c.begun.stop = context.AfterFunc(ctx, func() { g.breakRound(c, round) })
	}
}

// open reports whether the round of the latest Exchange has not ended yet.
func (c *localRank) open() bool {
	c.group.mu.Lock()
	defer c.group.mu.Unlock()
	return c.here
}

// await is the second half of a begun Exchange. It reads what has been written on this rank's behalf until
// its round has ended.
func (c *localRank) await() ([]Vote, error) {
	b := &c.begun
	c.group.mu.Lock()
	b.blocked, b.unheard = b.waits, false
	c.group.mu.Unlock()
	if b.blocked {
		<-c.wake
	}
	if b.stop != nil {
		b.stop()
	}
	switch err := b.broken; {
	case b.refused != nil:
		return nil, b.refused
	case err == nil:
		return c.votes, nil
	case b.expired:
		err.Err = fmt.Errorf("%w: %w", err.Err, b.cause)
		return nil, err
	default:
		err.addCause(b.ctx)
		return nil, err
	}
}

// endedAt returns when the round of the latest Exchange, which began then, ended.
func (c *localRank) endedAt(began time.Duration) time.Duration {
	c.group.mu.Lock()
	defer c.group.mu.Unlock()
	if c.begun.ended == 0 {
		return began
	}
	return c.begun.ended
}

// agree is Agree for the votes of a round of this group: the first rank of a round that asks computes
// the agreement, and the others share it.
func (c *localRank) agree(votes []Vote, numUBatches int) (*Agreement, error) {
	g := c.group
	g.mu.Lock()
	defer g.mu.Unlock()
	if a := g.agreement; a != nil && &a.Votes[0] == &votes[0] && g.ubatches == numUBatches {
		return a, nil
	}
	a, err := Agree(votes, numUBatches)
	if err != nil {
		return nil, err
	}
	g.agreement, g.ubatches = &a, numUBatches
	return g.agreement, nil
}

// arm makes sure that the group looks after its deadlines at t. It usually does already: the timer is
// not stopped when a round ends, because most steps are shorter than a timeout by far.
func (g *localGroup) arm(t time.Duration) {
	if g.armed != 0 && g.armed <= t {
		return
	}
	g.armed = t
	if wait := t - now(); g.timer == nil {
		g.timer = time.AfterFunc(wait, g.expire)
	} else {
		g.timer.Reset(wait)
	}
}

// expire breaks the open round if a deadline is over, and looks after the next one.
func (g *localGroup) expire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed = 0
	next := time.Duration(0)
	for _, c := range g.ranks {
		switch d := c.begun.deadline; {
		case !c.here || d == 0:
		case d <= now():
			c.begun.expired = true
			g.breakOpen(c)
			return
		case next == 0 || d < next:
			next = d
		}
	}
	if next != 0 {
		g.arm(next)
	}
}

func twice(rank int, step uint64) error {
	return &RankError{fmt.Errorf("%w: rank %d voted twice in a step", ErrLockstep, rank), step, []int{rank}}
}

// join adds rank c's vote to the open round. The last to join ends the round. join returns where the
// votes will be. It wants the group locked.
func (g *localGroup) join(c *localRank, v *Vote) (votes []Vote, complete bool, err error) {
	waits := c.here || c.begun.unheard || len(c.wake) > 0 // these two have yet to hear how their round ended
	if waits || c.voted && v.Step == c.last {
		return nil, false, twice(c.rank, v.Step)
	}
	step := v.Step
	if c.late && step >= c.lateFrom && step <= g.step {
		step = g.step + 1
	}
	if g.votes == nil {
		g.votes = g.takeRoom()
	}
	c.here, c.voted, c.last, c.late = true, true, step, false
	c.round++
	c.votes = g.votes
	c.votes[c.rank] = *v
	c.votes[c.rank].Step = step
	if g.here++; g.here < len(g.ranks) {
		return c.votes, false, nil
	}
	for i := range c.votes {
		if c.votes[i].Step != step {
			lockstep := lockstepError(c.votes)
			g.end(c, c.rank, lockstep.Step, lockstep)
			return nil, true, lockstep
		}
	}
	g.end(c, c.rank, step, nil)
	g.votes = nil // they belong to those who were in the round
	return c.votes, true, nil
}

// takeRoom returns room for the votes of a round. Small groups are faster if room for some rounds is
// allocated together.
func (g *localGroup) takeRoom() []Vote {
	const most = 16 // votes
	n := len(g.ranks)
	if len(g.room) == 0 {
		g.room = make([]Vote, n*max(most/n, 1))
	}
	votes := g.room[:n:n]
	g.room = g.room[n:]
	return votes
}

// end ends the open round at step. Everyone in it is woken with a copy of err, except self, who knows.
// last is the rank whose vote came last, or -1.
func (g *localGroup) end(self *localRank, last int, step uint64, err *RankError) {
	ended := time.Duration(0)
	for _, c := range g.ranks {
		if !c.here {
			continue
		}
		c.here, c.last, c.lastRank = false, step, last
		b := &c.begun
		if b.waits { // it may ask later than the round ends
			if ended == 0 {
				ended = now()
			}
			b.waits, b.unheard, b.broken, b.ended, b.deadline = false, !b.blocked, err.clone(), ended, 0
		}
		if c != self && !b.unheard {
			c.wake <- err.clone() // never blocks: a rank waits once a round, and the buffer holds one
		}
	}
	g.here, g.step = 0, step
}

// wait waits for the end of the round that c has joined, and breaks it when ctx ends first.
func (c *localRank) wait(ctx context.Context, round uint64) error {
	runtime.Gosched() // the others may be about to come, and to let them is cheaper than to sleep and be woken
	done := ctx.Done()
	var err *RankError
	if done == nil { // never ends; a plain receive is a good deal cheaper
		err = <-c.wake
	} else {
		select {
		case err = <-c.wake:
		case <-done:
			c.group.breakRound(c, round)
			err = <-c.wake
		}
	}
	if err == nil {
		return nil
	}
	err.addCause(ctx)
	return err
}

// breakRound ends the open round because c can't wait any longer. If that round of c's has ended in
// the meantime, its outcome counts.
func (g *localGroup) breakRound(c *localRank, round uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.here && c.round == round {
		g.breakOpen(c)
	}
}

func (g *localGroup) breakOpen(c *localRank) {
	missing := &RankError{Step: g.step} // not below what a restarted rank may have missed
	lowest := c.last
	for _, other := range g.ranks {
		if !other.here {
			missing.Ranks = append(missing.Ranks, other.rank)
			continue
		}
		missing.Step = max(missing.Step, other.last)
		lowest = min(lowest, other.last)
	}
	for _, rank := range missing.Ranks {
		if other := g.ranks[rank]; !other.late {
			other.late, other.lateFrom = true, lowest
		}
	}
	missing.Err = fmt.Errorf("%w: rank %d stopped waiting", ErrRankMissing, c.rank)
	g.end(nil, -1, missing.Step, missing)
}
