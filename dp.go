package fwd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"sync"

	"go.opentelemetry.io/otel/trace"
	"gonum.org/v1/gonum/mat"
)

// ParallelConfig says how a rank stands among the data-parallel (DP) ranks of its model, and when batches are split into
// microbatches. The zero value is one rank alone, without microbatches.
type ParallelConfig struct {
	DataParallelSize int  // number of ranks; 0: 1
	DataParallelRank int  // of this Runner, below the size
	Dense            bool // not a mixture of experts: ranks are independent, nothing is exchanged
	NumUBatches      int  // microbatches of a split pass; 0 or 1: passes are not split

	// Unpadded tokens from which on a batch is worth splitting: DecodeUBatchThreshold for a uniform decode batch,
	// PrefillUBatchThreshold for any other. 0: 32 and 512.
	DecodeUBatchThreshold, PrefillUBatchThreshold int
}

// maxRanks bounds the number of DP ranks, so that sums over ranks of counts up to 2^31-1 are exact in a float64.
const maxRanks = 1 << 20

func (c ParallelConfig) withDefaults() ParallelConfig {
	c.DataParallelSize = max(c.DataParallelSize, 1)
	if c.DecodeUBatchThreshold == 0 {
		c.DecodeUBatchThreshold = 32
	}
	if c.PrefillUBatchThreshold == 0 {
		c.PrefillUBatchThreshold = 512
	}
	return c
}

func (c ParallelConfig) check(p *problems) {
	size := max(c.DataParallelSize, 1)
	if c.DataParallelSize < 0 || size > maxRanks {
		p.addf("DataParallelSize is %d, want 1 to %d", c.DataParallelSize, maxRanks)
	} else if c.DataParallelRank < 0 || c.DataParallelRank >= size {
		p.addf("DataParallelRank is %d, want 0 to %d for DataParallelSize %d", c.DataParallelRank, size-1, size)
	}
	if c.NumUBatches < 0 || c.NumUBatches > maxUBatches {
		p.addf("NumUBatches is %d, want 0 to %d", c.NumUBatches, maxUBatches)
	}
	p.count("DecodeUBatchThreshold", c.DecodeUBatchThreshold)
	p.count("PrefillUBatchThreshold", c.PrefillUBatchThreshold)
}

// coordinated reports whether the ranks of the model depend on each other. It wants the defaults filled in.
func (c ParallelConfig) coordinated() bool { return c.DataParallelSize > 1 && !c.Dense }

// DPMetadata holds how many tokens each data-parallel rank has in a pass, and the arithmetic on those counts that model
// code needs. It is immutable; any number of goroutines may use it. Make one with [NewDPMetadata]: the zero value has no
// ranks.
//
// T[d] are the tokens of rank d of D, and s is the sequence-parallel (SP) size: the number of ways in which the tokens of
// a rank are split. The arithmetic is that of vLLM's DPMetadata, and exact for counts up to 2^31-1. The methods panic if
// an SP size or a chunk size is below 1, a chunk index is negative, or D·s is above 2^24.
type DPMetadata struct {
	rank   int
	tokens []int
	max    int
}

// NewDPMetadata returns the DP metadata of a pass of numTokens tokens, padding included, on the rank that p names.
// across holds the tokens of every rank, length DataParallelSize, and is copied.
//
// It wraps ErrInvalid, for a bad p, a nil or empty across, one of another length, and a count that is not a whole number
// in 0 to 2^31-1; and ErrTokenMismatch where across[rank] is not numTokens, as when one is padded and the other is not.
func NewDPMetadata(p ParallelConfig, numTokens int, across *mat.VecDense) (*DPMetadata, error) {
	var bad problems
	p.check(&bad)
	if err := bad.err(); err != nil {
		return nil, err
	}
	p = p.withDefaults()
	if across == nil || across.Len() == 0 {
		return nil, invalidf("no token counts for the %d data-parallel ranks", p.DataParallelSize)
	}
	if across.Len() != p.DataParallelSize {
		return nil, invalidf("%d token counts for %d data-parallel ranks", across.Len(), p.DataParallelSize)
	}
	if own := across.AtVec(p.DataParallelRank); own != float64(numTokens) {
		return nil, fmt.Errorf("%w: rank %d runs %d tokens, and the counts across ranks say %v", ErrTokenMismatch, p.DataParallelRank, numTokens, own)
	}
	m := &DPMetadata{rank: p.DataParallelRank, tokens: make([]int, across.Len())}
	for d := range m.tokens {
		v := across.AtVec(d)
		if !(v >= 0 && v <= maxCount) || v != float64(int(v)) { // written so that NaN is refused too
			return nil, invalidf("rank %d has %v tokens, want a whole number in 0 to %d", d, v, maxCount)
		}
		m.tokens[d] = int(v)
		m.max = max(m.max, int(v))
	}
	return m, nil
}

// Size returns the number of DP ranks, D.
func (m *DPMetadata) Size() int { return len(m.tokens) }

// Rank returns the DP rank of this pass.
func (m *DPMetadata) Rank() int { return m.rank }

// NumTokens returns T[rank], padding included. It panics if there is no such rank.
func (m *DPMetadata) NumTokens(rank int) int {
	if rank < 0 || rank >= len(m.tokens) {
		panic(fmt.Sprintf("fwd: NumTokens of rank %d, want 0 to %d", rank, len(m.tokens)-1))
	}
	return m.tokens[rank]
}

// NumTokensAcrossDPTo stores T into dst, length D, and returns dst. A nil dst is allocated and an empty one takes the
// right size; it panics if dst has another length.
func (m *DPMetadata) NumTokensAcrossDPTo(dst *mat.VecDense) *mat.VecDense {
	dst, raw, inc := vecOfLen(dst, len(m.tokens))
	for d, n := range m.tokens {
		raw[d*inc] = float64(n)
	}
	return dst
}

// MaxTokensAcrossDP returns max T.
func (m *DPMetadata) MaxTokensAcrossDP() int { return m.max }

// CuTokensAcrossSPTo stores the inclusive running sum of the SP local sizes into dst, length D·sp without a leading zero,
// and returns dst. It treats dst as NumTokensAcrossDPTo does.
func (m *DPMetadata) CuTokensAcrossSPTo(dst *mat.VecDense, sp int) *mat.VecDense {
	dst, raw, inc := vecOfLen(dst, m.numLocal(sp))
	sum, i := 0.0, 0 // whole numbers below 2^53: exact
	for _, n := range m.tokens {
		local := float64(ceilDiv(n, sp))
		for range sp {
			sum += local
			raw[i] = sum
			i += inc
		}
	}
	return dst
}

// AppendSPLocalSizes appends the SP local sizes to dst: ceil(T[d]/sp), sp times in a row for each rank d (DP major, SP
// minor), D·sp numbers. Zero stays zero.
func (m *DPMetadata) AppendSPLocalSizes(dst []int, sp int) []int {
	dst = slices.Grow(dst, m.numLocal(sp))
	for _, n := range m.tokens {
		dst = appendRepeated(dst, ceilDiv(n, sp), sp)
	}
	return dst
}

// AppendChunkedSizes appends how many tokens each SP rank sends in chunk idx, D·sp numbers: with v its SP local size,
// min(maxChunk, v - maxChunk·idx), and 1 where that is not above 0. A rank that is done, or has no tokens, still sends
// one, so that all ranks stay in lockstep.
func (m *DPMetadata) AppendChunkedSizes(dst []int, sp, maxChunk, idx int) []int {
	if maxChunk < 1 || idx < 0 {
		panic(fmt.Sprintf("fwd: chunk %d of at most %d tokens", idx, maxChunk))
	}
	dst = slices.Grow(dst, m.numLocal(sp))
	for _, n := range m.tokens {
		local, size := ceilDiv(n, sp), 1
		if idx <= local/maxChunk { // else maxChunk·idx is above local, and might overflow
			size = max(min(maxChunk, local-maxChunk*idx), 1)
		}
		dst = appendRepeated(dst, size, sp)
	}
	return dst
}

// NumChunks returns in how many chunks of at most maxChunk tokens the ranks process their SP local sizes:
// ceil(max SP local size / maxChunk), 0 when nobody has tokens.
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
	return len(m.tokens) * sp
}

func (m *DPMetadata) checkSP(sp int) error {
	if len(m.tokens) == 0 {
		return invalidf("DP metadata without ranks")
	}
	if most := maxListed / len(m.tokens); sp < 1 || sp > most {
		return invalidf("SP size %d for %d data-parallel ranks, want 1 to %d", sp, len(m.tokens), most)
	}
	return nil
}

// checkEqual adds a problem where ranks have unequal counts, in which case they can't split at the same tokens.
func (m *DPMetadata) checkEqual(p *problems) {
	for d, n := range m.tokens {
		if n != m.max {
			p.addf("microbatches need equal token counts: rank %d has %d, another %d", d, n, m.max)
			return
		}
	}
}

// withEqual returns DP metadata of the same ranks in which each has n tokens.
func (m *DPMetadata) withEqual(n int) *DPMetadata {
	tokens := appendRepeated(make([]int, 0, len(m.tokens)), n, len(m.tokens))
	return &DPMetadata{rank: m.rank, tokens: tokens, max: n}
}

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

func appendRepeated(dst []int, v, n int) []int {
	for range n {
		dst = append(dst, v)
	}
	return dst
}

// ceilDiv returns ceil(a/b) for a >= 0 and b >= 1, without overflow.
func ceilDiv(a, b int) int {
	q := a / b
	if a%b != 0 {
		q++
	}
	return q
}

// rows returns the pass in ctx and the counts from which its local sizes follow: without DP metadata it counts as one
// rank.
func rows(ctx context.Context, sp int) (*passContext, DPMetadata, error) {
	c := lookup(ctx)
	if c == nil {
		return nil, DPMetadata{}, ErrNoForwardContext
	}
	if c.fc.DP != nil {
		return c, *c.fc.DP, c.fc.DP.checkSP(sp)
	}
	if n := c.fc.NumTokens; n < 0 || n > maxCount {
		return nil, DPMetadata{}, invalidf("a pass of %d tokens", n)
	}
	alone := DPMetadata{tokens: []int{c.fc.NumTokens}, max: c.fc.NumTokens}
	return c, alone, alone.checkSP(sp)
}

// withSizes returns a context derived from ctx, which c is in, in which sizes are the local sizes.
func (c *passContext) withSizes(ctx context.Context, sizes []int) context.Context {
	derived := *c
	derived.Context, derived.sizes = ctx, sizes
	return &derived
}

// WithSPLocalSizes returns a context in which [LocalSizes] gives the SP local sizes of the pass in ctx
// ([DPMetadata.AppendSPLocalSizes]); ctx itself is unchanged. Without DP metadata the pass counts as one rank with
// ForwardContext.NumTokens tokens. It wraps ErrNoForwardContext, and ErrInvalid: sp is below 1, or too large for a list
// of the sizes.
func WithSPLocalSizes(ctx context.Context, sp int) (context.Context, error) {
	c, m, err := rows(ctx, sp)
	if err != nil {
		return nil, err
	}
	return c.withSizes(ctx, m.AppendSPLocalSizes(nil, sp)), nil
}

// WithChunkedSizes is as [WithSPLocalSizes] for the sizes of one chunk ([DPMetadata.AppendChunkedSizes]). ErrInvalid
// also: maxChunk is below 1, idx is negative.
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

// LocalSizes returns the local sizes that ctx was derived with, one for each SP rank of each DP rank (DP major, SP
// minor), in tokens. They are read-only. ok is false where ctx was derived with none: a pass, and a microbatch, begins
// without.
func LocalSizes(ctx context.Context) (sizes []int, ok bool) {
	c := lookup(ctx)
	if c == nil || c.sizes == nil {
		return nil, false
	}
	return c.sizes, true
}

// Chunk is one round in which the ranks of a mixture-of-experts layer exchange a bounded number of rows each.
type Chunk struct {
	Index      int
	Start, End int  // this rank's rows to compute, of its SP local size; at least one
	Keep       bool // false: computed only to stay in lockstep
}

// Chunks returns the rounds of a layer that exchanges at most maxChunk rows of each rank at a time. Every rank gets the
// same number of rounds, [DPMetadata.NumChunks], and in each a context with the round's local sizes and the rows that are
// its own: with n its SP local size, M the largest, and c maxChunk, rows [i·c, min((i+1)·c, M)) clipped to
// [min(start, n-1), min(end, n)), and kept where start is below n. A rank without rows computes [0, 1), for which the
// caller supplies a padding row, and keeps nothing. When no rank has tokens there are no rounds.
//
// Rows count from the start of the caller's part of its rank's tokens, ceil(T/sp) long on each SP rank; where T is no multiple
// of sp the last of them has padding rows.
//
// The iterator can be used again. Chunks wraps ErrNoForwardContext, and ErrInvalid: sp or maxChunk is out of range.
func Chunks(ctx context.Context, sp, maxChunk int) (iter.Seq2[context.Context, Chunk], error) {
	c, m, err := rows(ctx, sp)
	if err == nil && maxChunk < 1 {
		err = invalidf("chunks of at most %d tokens", maxChunk)
	}
	if err != nil {
		return nil, err
	}
	return func(yield func(context.Context, Chunk) bool) {
		own, largest := ceilDiv(m.tokens[m.rank], sp), ceilDiv(m.max, sp)
		for i := range m.NumChunks(sp, maxChunk) {
			start := i * maxChunk
			end := start + min(maxChunk, largest-start) // not min(start+maxChunk, largest): the sum may overflow
			chunk := Chunk{Index: i, Start: max(min(start, own-1), 0), End: max(min(end, own), 1), Keep: start < own}
			if !yield(c.withSizes(ctx, m.AppendChunkedSizes(nil, sp, maxChunk, i)), chunk) {
				return
			}
		}
	}, nil
}

// Vote is what one rank says in one step.
type Vote struct {
	Step            uint64    // the Runner counts from 1
	NumTokens       int       // without padding
	NumTokensPadded int       // at least NumTokens
	UBatch          bool      // wants microbatches
	GraphMode       GraphMode // a runtime mode

	// SpanContext is rank 0's coordinate span, with the step trace; remote where it came from another process. It has no
	// exported fields: a coordinator that sends votes as bytes must send its parts and put it together again.
	SpanContext trace.SpanContext
}

// Validate returns what is wrong with the vote of a rank, or nil: ErrInvalid, for a negative count, one above 2^31-1, padded
// below unpadded, and a mode that is not a runtime mode. A [Coordinator] refuses such a vote before it sends anything.
func (v *Vote) Validate(rank int) error {
	if v.NumTokens >= 0 && v.NumTokens <= v.NumTokensPadded && v.NumTokensPadded <= maxCount && v.GraphMode.ValidRuntime() {
		return nil
	}
	var p problems
	if v.NumTokens < 0 || v.NumTokensPadded < v.NumTokens || v.NumTokensPadded > maxCount {
		p.addf("rank %d votes for %d tokens, %d with padding, want 0 <= tokens <= padded <= %d", rank, v.NumTokens, v.NumTokensPadded, maxCount)
	}
	if !v.GraphMode.ValidRuntime() {
		p.addf("rank %d votes for %v, which is not a runtime mode", rank, v.GraphMode)
	}
	return p.err()
}

// same reports whether two votes say the same, whatever their step. What a trace state loses on the way is not a
// difference.
func (v Vote) same(w Vote) bool {
	return v.NumTokens == w.NumTokens && v.NumTokensPadded == w.NumTokensPadded && v.UBatch == w.UBatch && v.GraphMode == w.GraphMode
}

// Agreement is what all ranks know once they have all votes of a step. It is read-only.
type Agreement struct {
	Step              uint64
	UBatch            bool
	GraphMode         GraphMode
	NumTokensAcrossDP *mat.VecDense     // the tokens that each rank will run, length DataParallelSize
	MaxTokensRank     int               // the first rank with the most padded tokens
	LowestModeRank    int               // the first at the agreed mode, where any rank voted higher; -1: nobody did
	SpanContext       trace.SpanContext // rank 0's
}

// Agree returns what follows from the votes of all ranks, in rank order; each rank computes the same. With u and p the
// tokens without and with padding and n = numUBatches (0 or 1: none):
//
//   - The graph mode is the lowest of all.
//   - Microbatches where all ranks want them, unless the last would be empty somewhere: floor(max p / n)·(n-1) >= min u.
//   - With graphs or microbatches all ranks run max p tokens, else each its own p.
//
// The source is vLLM's coordinate_batch_across_dp. Agree wraps ErrLockstep for votes of different steps, and ErrInvalid
// for no votes, a negative numUBatches and the votes that Exchange refuses.
func Agree(votes []Vote, numUBatches int) (Agreement, error) {
	if len(votes) == 0 || len(votes) > maxRanks || numUBatches < 0 || numUBatches > maxCount {
		return Agreement{}, invalidf("an agreement of %d votes on %d microbatches", len(votes), numUBatches)
	}
	first := votes[0]
	a := Agreement{Step: first.Step, UBatch: numUBatches > 1, GraphMode: first.GraphMode, LowestModeRank: -1, SpanContext: first.SpanContext}
	minTokens, highest, lowest := first.NumTokens, first.GraphMode, 0
	for rank := range votes {
		v := &votes[rank]
		if err := v.Validate(rank); err != nil {
			return Agreement{}, err
		}
		if v.Step != first.Step {
			return Agreement{}, lockstepError(votes)
		}
		a.UBatch = a.UBatch && v.UBatch
		minTokens = min(minTokens, v.NumTokens)
		highest = max(highest, v.GraphMode)
		if v.GraphMode < votes[lowest].GraphMode {
			lowest = rank
		}
		if v.NumTokensPadded > votes[a.MaxTokensRank].NumTokensPadded {
			a.MaxTokensRank = rank
		}
	}
	a.GraphMode = votes[lowest].GraphMode
	if highest > a.GraphMode {
		a.LowestModeRank = lowest
	}
	maxPadded := votes[a.MaxTokensRank].NumTokensPadded
	if a.UBatch && lastUBatchEmpty(minTokens, maxPadded, numUBatches) {
		a.UBatch = false
	}
	a.NumTokensAcrossDP = mat.NewVecDense(len(votes), nil)
	for rank, v := range votes {
		tokens := v.NumTokensPadded
		if a.UBatch || a.GraphMode != GraphNone {
			tokens = maxPadded
		}
		a.NumTokensAcrossDP.SetVec(rank, float64(tokens))
	}
	return a, nil
}

// lastUBatchEmpty reports whether a rank with that many tokens would have none for the last of n microbatches.
func lastUBatchEmpty(tokens, padded, n int) bool {
	return padded/n*(n-1) >= tokens
}

// A Coordinator is the one collective that a step needs: each rank gives a vote and gets all of them. One rank has one
// Coordinator, and its Runner alone uses it. [NewLocalGroup] makes those of ranks that are goroutines of one process.
//
// Exchange is called once per step by every rank and returns when all have come, with all votes in rank order. The caller
// owns the slice. What any implementation must hold:
//
//   - Every rank at the same step: all get all votes.
//   - All ranks there, but at different steps: all get a *[RankError] that is ErrLockstep, with the highest step.
//   - A rank's ctx ends first: at once all that wait get a *[RankError] that is ErrRankMissing and names those who had not
//     come; for the rank whose ctx ended it also wraps the cause. Its Step, which is broken, is the highest of those voted
//     and the group's own; the group goes on with the next. A rank that comes late votes at the group's step, which the votes
//     returned carry: late is a vote from the lowest step voted in the first round that was broken without the rank, up to the
//     group's. A vote below that is of a rank that was restarted, and out of step.
//   - A second call by the same rank in one step: ErrLockstep, and the round is not disturbed.
//   - A vote that [Vote.Validate] refuses: ErrInvalid, and nothing is sent.
type Coordinator interface {
	Rank() int
	Size() int
	Exchange(ctx context.Context, v Vote) ([]Vote, error)
}

// RankError is the error of an exchange that did not come together.
type RankError struct {
	Err   error  // is ErrRankMissing or ErrLockstep, and wraps the context's cause where that ended the wait
	Step  uint64 // the group's step; the next one is Step+1
	Ranks []int  // missing, or out of step
}

// Error returns the error, the step and the ranks.
func (e *RankError) Error() string {
	what := "out of step"
	if errors.Is(e.Err, ErrRankMissing) {
		what = "missing"
	}
	return fmt.Sprintf("%v (step %d, %s: ranks %s)", e.Err, e.Step, what, abbreviate(e.Ranks))
}

// Unwrap returns Err.
func (e *RankError) Unwrap() error { return e.Err }

// lockstepError says at which steps the ranks are.
func lockstepError(votes []Vote) *RankError {
	e := &RankError{}
	steps := make([]uint64, len(votes))
	for rank, v := range votes {
		steps[rank] = v.Step
		e.Step = max(e.Step, v.Step)
	}
	for rank, step := range steps {
		if step != e.Step {
			e.Ranks = append(e.Ranks, rank)
		}
	}
	e.Err = fmt.Errorf("%w: the steps of the ranks are %s", ErrLockstep, abbreviate(steps))
	return e
}

// NewLocalGroup returns the coordinators of size ranks that are goroutines of this process; element i is rank i's. There
// is nothing to close. A size below 1 or above 2^20 is ErrInvalid.
func NewLocalGroup(size int) ([]Coordinator, error) {
	if size < 1 || size > maxRanks {
		return nil, invalidf("a group of %d ranks, want 1 to %d", size, maxRanks)
	}
	g := &localGroup{ranks: make([]*localRank, size)}
	coordinators := make([]Coordinator, size)
	for rank := range g.ranks {
		g.ranks[rank] = &localRank{group: g, rank: rank, wake: make(chan *RankError, 1)}
		coordinators[rank] = g.ranks[rank]
	}
	return coordinators, nil
}

// localGroup is a rendezvous of goroutines.
type localGroup struct {
	mu    sync.Mutex
	ranks []*localRank
	here  int    // ranks in the open round
	step  uint64 // the group's: of the last round that has ended, whichever way
}

// localRank is one rank's Coordinator. What follows wake is guarded by the group's mutex.
type localRank struct {
	group *localGroup
	rank  int
	wake  chan *RankError // how the round ended, for the rank that waits; nil: complete

	votes    []Vote // those of all ranks in the open round, of which its own is there
	room     []Vote // for the votes of later rounds
	here     bool   // in the open round
	voted    bool   // ever
	last     uint64 // its step in the open round, else the group's in the last round that it was in
	late     bool   // rounds were broken since it was here,
	lateFrom uint64 // this one first
}

// Rank implements [Coordinator].
func (c *localRank) Rank() int { return c.rank }

// Size implements [Coordinator].
func (c *localRank) Size() int { return len(c.group.ranks) }

// Exchange implements [Coordinator].
func (c *localRank) Exchange(ctx context.Context, v Vote) ([]Vote, error) {
	if ctx == nil { // noticed later, it would leave a vote behind
		panic("fwd: Exchange with a nil context")
	}
	if err := v.Validate(c.rank); err != nil {
		return nil, err
	}
	votes, complete, err := c.group.join(c, &v)
	if err == nil && !complete {
		err = c.wait(ctx)
	}
	if err != nil {
		return nil, err
	}
	return votes, nil
}

func twice(rank int, step uint64) error {
	return &RankError{fmt.Errorf("%w: rank %d votes twice in step %d", ErrLockstep, rank, step), step, []int{rank}}
}

// join adds rank c's vote to the open round and, when it is the last, ends the round. It returns where the votes will be.
func (g *localGroup) join(c *localRank, v *Vote) (votes []Vote, complete bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	waits := c.here || len(c.wake) > 0 // the latter has yet to hear that its round has ended
	if waits || c.voted && v.Step == c.last {
		return nil, false, twice(c.rank, v.Step)
	}
	if c.late && v.Step >= c.lateFrom && v.Step <= g.step {
		v.Step = g.step + 1
	}
	c.here, c.voted, c.last, c.late = true, true, v.Step, false
	votes = c.takeRoom(len(g.ranks))
	votes[c.rank] = *v
	c.votes = votes
	if g.here++; g.here < len(g.ranks) {
		return votes, false, nil
	}
	g.deal()
	for i := range votes {
		if votes[i].Step != v.Step {
			lockstep := lockstepError(votes)
			g.end(c, lockstep.Step, lockstep)
			return nil, true, lockstep
		}
	}
	g.end(c, v.Step, nil)
	return votes, true, nil
}

// takeRoom returns room for n votes, which its caller will keep. Small groups take a quarter less time where room for some
// rounds is allocated at once.
func (c *localRank) takeRoom(n int) []Vote {
	const most = 16 // votes
	if len(c.room) == 0 {
		c.room = make([]Vote, n*max(most/n, 1))
	}
	votes := c.room[:n:n]
	c.room = c.room[n:]
	return votes
}

// deal gives each rank the votes of the others.
func (g *localGroup) deal() {
	for _, to := range g.ranks {
		for i, from := range g.ranks {
			if from != to {
				to.votes[i] = from.votes[i]
			}
		}
	}
}

// end ends the open round at step: everyone in it but self, who knows, is woken with a copy of err.
func (g *localGroup) end(self *localRank, step uint64, err *RankError) {
	for _, c := range g.ranks {
		if !c.here {
			continue
		}
		c.here, c.last, c.votes = false, step, nil
		if c != self {
			c.wake <- err.clone() // never blocks: a rank waits once a round, and the buffer holds one
		}
	}
	g.here, g.step = 0, step
}

// clone returns a copy that its receiver may change, nil for nil.
func (e *RankError) clone() *RankError {
	if e == nil {
		return nil
	}
	return &RankError{e.Err, e.Step, slices.Clone(e.Ranks)}
}

// wait waits for the end of the round that c has joined, and breaks it when ctx ends first.
func (c *localRank) wait(ctx context.Context) error {
	runtime.Gosched() // the others may be about to come, and to let them is cheaper than to sleep and be woken
	done := ctx.Done()
	var err *RankError
	if done == nil { // never ends; a plain receive is a good deal cheaper
		err = <-c.wake
	} else {
		select {
		case err = <-c.wake:
		case <-done:
			c.group.breakRound(c)
			err = <-c.wake
		}
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil && errors.Is(err.Err, ErrRankMissing) {
		err.Err = fmt.Errorf("%w: %w", err.Err, context.Cause(ctx))
	}
	return err
}

// breakRound ends the open round because c can't wait any longer, unless c's round has ended in the meantime: then that
// is what counts.
func (g *localGroup) breakRound(c *localRank) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !c.here {
		return
	}
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
	g.end(nil, missing.Step, missing)
}

// exchange takes part in the group's next step and returns the agreement.
func (r *Runner) exchange(ctx context.Context, v Vote) (*Agreement, error) {
	if r.coordinator == nil {
		return nil, invalidf("rank %d of %d has no coordinator to exchange votes with", r.parallel.DataParallelRank, r.parallel.DataParallelSize)
	}
	if !r.exchanging.TryLock() {
		return nil, &RankError{fmt.Errorf("%w: rank %d exchanges twice at once", ErrLockstep, r.parallel.DataParallelRank), r.step.Load(), []int{r.parallel.DataParallelRank}}
	}
	defer r.exchanging.Unlock()
	v.Step = r.step.Load() + 1
	span := r.telemetry.startCoordinate(ctx, r.parallel, &v)
	var a Agreement
	err := error(errPanic) // of the coordinator, until it returns
	defer func() { span.end(v.Step, &a, err) }()
	var step uint64
	a, step, err = r.agreeAt(span.ctx, v)
	r.step.Store(step)
	if err != nil {
		return nil, err
	}
	return &a, nil
}

// agreeAt exchanges the vote and agrees. step is the one that the group then has behind it, also after an error.
func (r *Runner) agreeAt(ctx context.Context, v Vote) (a Agreement, step uint64, err error) {
	votes, err := r.askCoordinator(ctx, v)
	step = v.Step
	switch {
	case errors.Is(err, ErrInvalid):
		step-- // refused before anything was sent
	case err == nil:
		a, err = r.agree(v, votes)
		step = max(step, a.Step) // later than v.Step where this rank came late to a broken step
	}
	if rankErr, ok := errors.AsType[*RankError](err); ok {
		step = rankErr.Step
	}
	return a, step, err
}

// askCoordinator waits for the other ranks, but not for ever.
func (r *Runner) askCoordinator(ctx context.Context, v Vote) ([]Vote, error) {
	if r.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, r.timeout, r.timeoutCause)
		defer cancel()
	}
	return r.coordinator.Exchange(ctx, v)
}

// agree checks that the votes are those of this step, and agrees. A coordinator that mixes rounds up must not go unnoticed:
// the ranks would run different passes.
func (r *Runner) agree(v Vote, votes []Vote) (Agreement, error) {
	size, rank := r.parallel.DataParallelSize, r.parallel.DataParallelRank
	if len(votes) != size {
		return Agreement{}, invalidf("the coordinator returned %d votes for %d ranks", len(votes), size)
	}
	if own := votes[rank]; own.Step < v.Step || !own.same(v) {
		return Agreement{}, &RankError{fmt.Errorf("%w: the coordinator returned %+v as the vote of rank %d, which voted %+v", ErrLockstep, own, rank, v), v.Step, []int{rank}}
	}
	return Agree(votes, r.parallel.NumUBatches)
}
