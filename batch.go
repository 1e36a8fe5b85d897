package fwd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"
)

// Schedule is what the scheduler decided for one step, before any padding.
type Schedule struct {
	// NumScheduledTokens holds the tokens of each request. Requests without tokens don't count. If
	// there are none with tokens, this rank is idle.
	NumScheduledTokens []int

	// NumActiveLoRAs is the number of distinct adapters in the batch.
	NumActiveLoRAs int

	// Prefill says that some request is still in its prompt. Such a batch is never a uniform decode
	// batch, even if all lengths look like one.
	Prefill bool

	AllowUBatches bool // the model can run this batch as microbatches
	ExcludeFull   bool // the batch needs attention that a full graph can't hold, as cascade attention
	Eager         bool // use no graph at all

	// Note is the engine's own word. All ranks get it unread, in Agreement.Votes.
	Note uint64

	// Reuse plans a further pass over the batch of that agreement, as of a draft model, without
	// exchanging votes again. See [Runner.Plan].
	Reuse *Agreement

	// OneTokenPerRequest says, together with Reuse, that every request of the batch has one token now,
	// on every rank. Otherwise the batch is the same again.
	OneTokenPerRequest bool
}

// What Plan and WarmUp say in Pass.Phase.
const (
	phaseDecode = "decode"
	phaseMixed  = "mixed"
	phaseWarmUp = "warmup"
)

// Plan prepares a pass: it dispatches the batch to a graph, agrees with the other ranks on the graph
// mode, on microbatches and on the padding that follows, and splits the batch. All ranks of a model must
// call it once per step. An idle rank plans a dummy pass, since the others can't run without it, and
// takes whatever shape they agree on; if every rank is idle, Agreement.Idle is true and nobody runs. A
// rank that is alone, or of a dense model, decides for itself by the same rules.
//
// A Schedule with Reuse exchanges nothing. The votes of that agreement say what every rank has
// scheduled; this Runner's dispatcher and query length say what each does with it, and all ranks find
// the same. The agreement of the new pass has the old step. The schedule must hold the tokens of the
// further pass: those of this rank's vote again, or one for each request.
//
// Plan returns errors that wrap ErrInvalid for negative counts, for nothing scheduled on a rank that
// nobody waits for, without a coordinator, and if ranks are configured differently; ErrTokenMismatch if
// the schedule is not the batch of Reuse; and ErrRankMissing and ErrLockstep from the exchange, after
// which the next Plan is in step again.
func (r *Runner) Plan(ctx context.Context, s Schedule) (Pass, error) {
	if r == nil {
		r = nilRunner
	}
	if s.Reuse != nil || !r.parallel.coordinated() {
		return r.planUnasked(ctx, &s)
	}
	e := new(exchange)
	if err := r.draft(&s, &e.draft); err != nil {
		return Pass{}, err
	}
	if err := r.exchange(ctx, e); err != nil {
		return Pass{}, err
	}
	return r.finish(&e.draft, e.agreement, &e.plan)
}

// Begin is the first half of [Runner.Plan]: it votes, and returns without waiting for the other ranks.
// wait returns what Plan would have returned: one pass, which runs once, however often wait is called
// and by however many goroutines. So an event loop that holds several ranks in one goroutine begins
// all, then waits for all; and an engine can exchange the votes of the next step while a pass runs.
//
// The exchange goes on under ctx whether or not anybody waits. What Plan refuses before the exchange is
// Begin's own error. One exchange may be open at a time: a second Begin or Plan before the first has
// ended returns ErrLockstep. The caller may reuse the schedule's slice when Begin has returned. A panic
// of the coordinator's Exchange comes out of wait.
func (r *Runner) Begin(ctx context.Context, s Schedule) (wait func() (Pass, error), err error) {
	if r == nil {
		r = nilRunner
	}
	if s.Reuse != nil || !r.parallel.coordinated() {
		pass, err := r.planUnasked(ctx, &s)
		if err != nil {
			return nil, err
		}
		return func() (Pass, error) { return pass, nil }, nil
	}
	e := new(exchange)
	if err := r.draft(&s, &e.draft); err != nil {
		return nil, err
	}
	e.draft.lengths = slices.Clone(e.draft.lengths)
	if err := r.open(ctx, e, true); err != nil {
		return nil, err
	}
	e.begin()
	return e.waitPass, nil
}

// waitPass is the second half of Plan.
func (e *exchange) waitPass() (Pass, error) {
	if err := e.settle(); err != nil {
		return Pass{}, err
	}
	return e.runner.finish(&e.draft, e.agreement, &e.plan)
}

// draft is a pass before the ranks have agreed: this rank's batch, and its vote.
type draft struct {
	lengths []int // scheduled tokens of the requests, the caller's slice; only of a batch worth splitting
	vote    Vote
	reason  Reason // of the vote's mode
}

// draft checks a schedule and dispatches its batch. d is that of a new exchange.
func (r *Runner) draft(s *Schedule, d *draft) error {
	sum, reqs, uniform, err := s.tally(r.dispatcher.queryLen())
	if _, ok := r.parallel.roundUp(sum); err != nil || !ok || uint(s.NumActiveLoRAs) > maxCount ||
		reqs == 0 && !r.parallel.coordinated() {
		return r.refuse(s, sum, err)
	}
	v := &d.vote
	v.NumTokens, v.NumReqs, v.NumActiveLoRAs = sum, reqs, s.NumActiveLoRAs
	v.Uniform, v.Idle = uniform && !s.Prefill, reqs == 0
	v.ExcludeFull, v.Eager, v.Note = s.ExcludeFull, s.Eager, s.Note
	threshold := r.parallel.PrefillUBatchThreshold
	if v.Uniform {
		threshold = r.parallel.DecodeUBatchThreshold
	}
	if s.AllowUBatches && r.parallel.NumUBatches > 1 && sum >= threshold && reqs > 0 {
		v.UBatch = true
		d.lengths = s.NumScheduledTokens
	}
	r.dispatch(d)
	return nil
}

// refuse returns all that is wrong with a schedule. err is what is wrong with its lengths, or else sum
// their sum.
func (r *Runner) refuse(s *Schedule, sum int, err error) error {
	var p problems
	if err != nil {
		p = append(p, err)
	}
	p.count("NumActiveLoRAs", s.NumActiveLoRAs)
	r.parallel.tooMany(&p, sum, "the schedule")
	if err == nil && sum == 0 && !r.parallel.coordinated() {
		p.addf("nothing is scheduled, and no other rank waits for a dummy pass")
	}
	return p.err()
}

// tally returns the tokens of a schedule, the requests that have any, and whether each of them has q.
func (s *Schedule) tally(q int) (sum, reqs int, uniform bool, err error) {
	if sum, err = sumScheduled(s.NumScheduledTokens); err != nil {
		return 0, 0, false, err
	}
	uniform = true
	for _, n := range s.NumScheduledTokens {
		if n > 0 {
			reqs++
			uniform = uniform && n == q
		}
	}
	return sum, reqs, uniform, nil
}

// dispatch completes a draft's vote with the mode and the padding that this Runner's dispatcher finds
// for its batch. An idle vote becomes that of the dummy batch: one uniform decode request, with the
// fewest active adapters that have graphs.
func (r *Runner) dispatch(d *draft) {
	v := &d.vote
	if v.Idle {
		*v = Vote{
			Step: v.Step, Note: v.Note, Idle: true, Uniform: true,
			NumTokens: r.dispatcher.queryLen(), NumActiveLoRAs: r.dispatcher.fewestLoRAs(),
		}
	}
	tokens, _ := r.parallel.roundUp(v.NumTokens) // checked before
	v.GraphMode, v.NumTokensPadded, d.reason = GraphNone, tokens, ReasonDisabled
	if r.dispatcher != nil && !v.Eager {
		var batch BatchDescriptor
		v.GraphMode, batch, d.reason = r.dispatcher.Dispatch(v.query(tokens))
		v.NumTokensPadded = batch.NumTokens
	}
}

// query asks for the graph of a vote's batch when it is padded to that many tokens.
func (v *Vote) query(tokens int) DispatchQuery {
	return DispatchQuery{
		NumTokens: tokens, NumReqs: v.NumReqs, UniformDecode: v.Uniform,
		NumActiveLoRAs: v.NumActiveLoRAs, ExcludeFull: v.ExcludeFull,
	}
}

// planUnasked plans a pass for which no other rank is asked.
func (r *Runner) planUnasked(ctx context.Context, s *Schedule) (Pass, error) {
	var d draft
	if err := r.draft(s, &d); err != nil {
		return Pass{}, err
	}
	if !r.parallel.coordinated() {
		return r.planAlone(ctx, &d)
	}
	return r.planAgain(&d, s)
}

// planAlone plans the pass of a rank that nobody depends on: it agrees with itself.
func (r *Runner) planAlone(ctx context.Context, d *draft) (Pass, error) {
	var began time.Time
	if r.stepTrace {
		began = r.telemetry.now()
	}
	a, err := Agree([]Vote{d.vote}, r.parallel.NumUBatches)
	if err != nil {
		return Pass{}, err
	}
	pass, err := r.finish(d, &a, &plan{runner: r, lastRank: -1})
	if err != nil {
		return Pass{}, err
	}
	pass.Agreement = nil
	r.stepAlone(ctx, &pass, a.GraphMode, began)
	return pass, nil
}

// planAgain plans a further pass over the batch of an agreement. The votes of the agreement say all:
// each rank's batch is dispatched here, as every other rank does it too.
func (r *Runner) planAgain(d *draft, s *Schedule) (Pass, error) {
	old, rank := s.Reuse, r.parallel.DataParallelRank
	if len(old.Votes) != r.parallel.DataParallelSize {
		return Pass{}, invalidf("Reuse of an agreement with %d votes on a Runner of %d ranks",
			len(old.Votes), r.parallel.DataParallelSize)
	}
	votes := make([]Vote, len(old.Votes))
	var own draft
	for i := range votes {
		v, err := old.Votes[i].again(i, r.dispatcher.queryLen(), s.OneTokenPerRequest)
		if err != nil {
			return Pass{}, err
		}
		var p problems
		r.parallel.tooMany(&p, v.NumTokens, fmt.Sprintf("rank %d", i))
		if err := p.err(); err != nil {
			return Pass{}, err
		}
		again := draft{vote: v}
		r.dispatch(&again)
		if i == rank {
			own = again
		}
		votes[i] = again.vote
	}
	if d.vote.Idle != own.vote.Idle ||
		!d.vote.Idle && (d.vote.NumTokens != own.vote.NumTokens || d.vote.NumReqs != own.vote.NumReqs) {
		return Pass{}, fmt.Errorf("%w: the schedule of rank %d has %s, but Reuse is an agreement on %s",
			ErrTokenMismatch, rank, d.vote.batch(), own.vote.batch())
	}
	a, err := Agree(votes, 0)
	if err != nil {
		return Pass{}, err
	}
	return r.finish(&own, &a, &plan{runner: r, lastRank: -1})
}

// again returns the vote of a rank for a further pass over the batch of its vote v. q is the query
// length of a uniform decode batch now.
func (v *Vote) again(rank, q int, oneToken bool) (Vote, error) {
	if err := v.Validate(rank); err != nil {
		return Vote{}, err
	}
	w := Vote{
		Step: v.Step, NumTokens: v.NumTokens, NumReqs: v.NumReqs, NumActiveLoRAs: v.NumActiveLoRAs,
		ExcludeFull: v.ExcludeFull, Eager: v.Eager, Idle: v.Idle, Note: v.Note,
	}
	if v.Idle {
		return w, nil
	}
	if oneToken {
		w.NumTokens = v.NumReqs
	}
	if w.NumTokens == 0 {
		return Vote{}, invalidf("rank %d's vote for %d tokens does not say how many requests it has, or has none",
			rank, v.NumTokens)
	}
	w.Uniform = (oneToken || v.Uniform) && int64(w.NumTokens) == int64(q)*int64(v.NumReqs)
	return w, nil
}

// batch describes the batch of a vote in an error.
func (v *Vote) batch() string {
	if v.Idle {
		return "nothing"
	}
	return fmt.Sprintf("%d tokens of %d requests", v.NumTokens, v.NumReqs)
}

// finish makes the pass that the ranks have agreed on.
func (r *Runner) finish(d *draft, a *Agreement, shared *plan) (Pass, error) {
	rank := r.parallel.DataParallelRank
	if !r.parallel.coordinated() {
		rank = 0
	}
	tokens := int(a.NumTokensAcrossDP.AtVec(rank))
	pass := Pass{
		NumTokens:         tokens,
		NumTokensUnpadded: min(d.vote.NumTokens, tokens), // an idle rank's q may be above what the others run
		NumTokensGraph:    min(d.vote.NumTokensPadded, tokens),
		NumReqs:           max(d.vote.NumReqs, toInt(d.vote.Idle)),
		GraphMode:         a.GraphMode,
		Reason:            d.reason,
		Phase:             phaseMixed,
		Dummy:             d.vote.Idle,
		Agreement:         a,
		plan:              shared,
	}
	if d.vote.Uniform {
		pass.Phase = phaseDecode
	}
	if err := r.applyGraph(&pass, d, a); err != nil {
		return Pass{}, err
	}
	if n := r.parallel.NumUBatches; a.UBatch && tokens >= n*r.parallel.TokenMultiple {
		if err := r.split(&pass, d, n); err != nil {
			return Pass{}, err
		}
	}
	return pass, nil
}

// applyGraph gives the pass the key of the graph for its final token count, which the other ranks may
// have raised.
func (r *Runner) applyGraph(pass *Pass, d *draft, a *Agreement) error {
	if a.GraphMode < d.vote.GraphMode {
		pass.Reason = ReasonDPRank
	}
	if a.GraphMode == GraphNone {
		pass.Batch = BatchDescriptor{NumTokens: pass.NumTokens}
		return nil
	}
	if err := r.checkFollow(a); err != nil {
		return err
	}
	_, batch, reason := r.follow(&d.vote, a, pass.NumTokens)
	if d.vote.Idle {
		pass.Reason = reason // it has no batch of its own that could have a reason
	}
	pass.Batch = batch
	return nil
}

// follow dispatches the batch of a vote again, as the ranks have agreed.
func (r *Runner) follow(v *Vote, a *Agreement, tokens int) (GraphMode, BatchDescriptor, Reason) {
	q := v.query(tokens)
	q.ExcludeFull = q.ExcludeFull || a.GraphMode < GraphFull
	return r.dispatcher.Dispatch(q)
}

// checkFollow refuses an agreement that some rank can't follow. Every rank finds the same, since all of
// it follows from the votes. Ranks of equal configuration always can, so it is only asked if a vote
// does not say how its rank is configured.
func (r *Runner) checkFollow(a *Agreement) error {
	if len(a.Votes) == 1 || a.allSaid() {
		return nil
	}
	for rank := range a.Votes {
		tokens := int(a.NumTokensAcrossDP.AtVec(rank))
		d := draft{vote: a.Votes[rank]}
		r.dispatch(&d)
		mode, batch, reason := GraphNone, BatchDescriptor{NumTokens: tokens}, ReasonDisabled
		if r.dispatcher != nil {
			mode, batch, reason = r.follow(&d.vote, a, tokens)
		}
		if mode != a.GraphMode || batch.NumTokens != tokens {
			return &RankError{fmt.Errorf("%w: the ranks agreed on %v with %d tokens, for which rank %d's batch "+
				"finds %v with %d tokens (%v); configure all ranks the same", ErrInvalid,
				a.GraphMode, tokens, rank, mode, batch.NumTokens, reason), a.Step, []int{rank}}
		}
	}
	return nil
}

// allSaid reports whether every vote says how its rank is configured.
func (a *Agreement) allSaid() bool {
	for rank := range a.Votes {
		if a.Votes[rank].Config == 0 {
			return false
		}
	}
	return true
}

// split splits the pass into n microbatches. They run without graphs.
func (r *Runner) split(pass *Pass, d *draft, n int) error {
	lengths := slices.DeleteFunc(slices.Clone(d.lengths), func(n int) bool { return n == 0 })
	if pass.Dummy {
		lengths = []int{pass.NumTokens}
	}
	point := pass.NumTokens / n / r.parallel.TokenMultiple * r.parallel.TokenMultiple
	_, padded, err := SplitUBatches(lengths, pass.NumTokens, pass.whole().Requests.Stop, n, point)
	if err != nil {
		return err
	}
	pass.UBatches = padded
	if pass.GraphMode != GraphNone {
		pass.GraphMode, pass.Reason = GraphNone, ReasonUBatch
	}
	return nil
}

// WarmUp returns the passes that capture every graph, in the order of [Dispatcher.Captures]. Before it
// yields one, the ranks exchange votes that show that all warm up the same graph; after the last one
// they exchange once more, so that no rank serves before all are done. The caller adds metadata, and
// runs each pass before it asks for the next. A rank that is alone, or of a dense model, exchanges
// nothing.
//
// An error is yielded once and ends the iteration: those of [Runner.Plan], and ErrLockstep if the ranks
// warm up different graphs or some serve already. If a caller breaks off, it skips the last exchange,
// so that of the other ranks fails.
func (r *Runner) WarmUp(ctx context.Context) iter.Seq2[Pass, error] {
	if r == nil {
		r = nilRunner
	}
	return func(yield func(Pass, error) bool) {
		for _, c := range r.dispatcher.Captures() {
			pass, err := r.planCapture(ctx, c)
			if !yield(pass, err) || err != nil {
				return
			}
		}
		if !r.parallel.coordinated() {
			return
		}
		if err := r.exchange(ctx, &exchange{draft: draft{vote: Vote{WarmUp: true}}}); err != nil {
			yield(Pass{}, err)
		}
	}
}

// planCapture plans the pass that captures one graph.
func (r *Runner) planCapture(ctx context.Context, c Capture) (Pass, error) {
	n := c.Batch.NumTokens
	pass := Pass{
		NumTokens: n, NumTokensUnpadded: n, NumTokensGraph: n, NumReqs: c.Batch.NumReqs,
		GraphMode: c.Mode, Batch: c.Batch, Reason: ReasonRelaxed, Phase: phaseWarmUp, Dummy: true,
		plan: &plan{runner: r, lastRank: -1},
	}
	if c.Batch.Uniform {
		pass.Reason = ReasonExact
	}
	if !r.parallel.coordinated() {
		r.stepAlone(ctx, &pass, c.Mode, r.telemetry.now())
		return pass, nil
	}
	e := &exchange{draft: draft{vote: Vote{
		NumTokens: n, NumTokensPadded: n, NumReqs: c.Batch.NumReqs, Uniform: c.Batch.Uniform,
		NumActiveLoRAs: c.Batch.NumActiveLoRAs, GraphMode: c.Mode, WarmUp: true,
	}}}
	if err := r.exchange(ctx, e); err != nil {
		return Pass{}, err
	}
	pass.Agreement, pass.plan = e.agreement, &e.plan
	return pass, nil
}

// BatchDescriptor is the key of a captured graph: what about a batch decides which graph can replay it.
// It is comparable, so it can be a map key. The zero value is no descriptor.
type BatchDescriptor struct {
	NumTokens int  // padded
	NumReqs   int  // padded; 0: any number of requests
	Uniform   bool // all requests have the same query length
	HasLoRA   bool // NumActiveLoRAs is above 0

	// NumActiveLoRAs is the number of adapters that the graph serves, at least that of the batch. See
	// [LoRAConfig].
	NumActiveLoRAs int
}

// RelaxForMixedBatchGraphs returns the key of the graphs for mixed batches, which serve any number of
// requests with any query lengths: the same tokens and adapters.
func (d BatchDescriptor) RelaxForMixedBatchGraphs() BatchDescriptor {
	d.NumReqs, d.Uniform = 0, false
	return d
}

// plain reports whether check finds nothing.
func (d *BatchDescriptor) plain() bool {
	return uint(d.NumTokens) <= maxCount && uint(d.NumReqs) <= maxCount && uint(d.NumActiveLoRAs) <= maxCount &&
		d.HasLoRA == (d.NumActiveLoRAs > 0)
}

// check refuses what no batch can have.
func (d *BatchDescriptor) check(p *problems) {
	p.count("the descriptor's NumTokens", d.NumTokens)
	p.count("the descriptor's NumReqs", d.NumReqs)
	p.count("the descriptor's NumActiveLoRAs", d.NumActiveLoRAs)
	if d.HasLoRA != (d.NumActiveLoRAs > 0) {
		p.addf("the descriptor has HasLoRA %t and NumActiveLoRAs %d", d.HasLoRA, d.NumActiveLoRAs)
	}
}

// Range is a half-open range [Start, Stop).
type Range struct {
	Start int `json:"start"`
	Stop  int `json:"stop"`
}

// Len returns how many numbers the range holds.
func (r Range) Len() int { return r.Stop - r.Start }

// UBatchSlice is the part of a batch that a microbatch works on: a range of requests and one of tokens.
// A request that the split cuts belongs to both sides.
type UBatchSlice struct {
	Requests Range `json:"requests"`
	Tokens   Range `json:"tokens"`
}

// IsEmpty reports whether either range has no length.
func (s UBatchSlice) IsEmpty() bool { return s.Requests.Len() <= 0 || s.Tokens.Len() <= 0 }

// NumTokens returns how many tokens the microbatch has.
func (s UBatchSlice) NumTokens() int { return s.Tokens.Len() }

// String returns the slice as "requests [0, 2) tokens [0, 16)".
func (s UBatchSlice) String() string {
	return fmt.Sprintf("requests [%d, %d) tokens [%d, %d)",
		s.Requests.Start, s.Requests.Stop, s.Tokens.Start, s.Tokens.Stop)
}

// maxUBatches bounds the microbatches of a pass, each of which costs a goroutine.
const maxUBatches = 1 << 16

// SplitUBatches splits a batch into n microbatches of splitPoint tokens each; the last one takes the
// rest. It returns the slices of what is scheduled, and the padded slices, the last of which reaches to
// numTokensPadded and numReqsPadded. If splitPoint is 0, numTokensPadded/n is taken. The scheduled
// tokens are those of each request, in batch order; the results do not alias them. A range of padded
// requests may reach beyond the scheduled ones, so clip it before you index those.
//
// Slice k begins with the request that holds its first token, and ends before the first request that
// starts at or after its end (vLLM's create_ubatch_slices).
//
// It returns an error that wraps ErrInvalid if n is below 2 or above 2^16, if a count is negative, if
// padding is below what is scheduled, or if a slice would have no tokens, which happens if
// numTokensPadded is well above the scheduled tokens.
func SplitUBatches(
	numScheduledTokens []int, numTokensPadded, numReqsPadded, n, splitPoint int,
) (slices, padded []UBatchSlice, err error) {
	scheduled, err := sumScheduled(numScheduledTokens)
	if err != nil {
		return nil, nil, err
	}
	var p problems
	p.count("the padded tokens", numTokensPadded)
	p.count("the padded requests", numReqsPadded)
	p.count("the split point", splitPoint)
	if numTokensPadded < scheduled {
		p.addf("padded tokens %d are fewer than the %d scheduled", numTokensPadded, scheduled)
	}
	if numReqsPadded < len(numScheduledTokens) {
		p.addf("padded requests %d are fewer than the %d scheduled", numReqsPadded, len(numScheduledTokens))
	}
	if n < 2 || n > maxUBatches {
		p.addf("a split into %d microbatches, want 2 to %d", n, maxUBatches)
	}
	if err := p.err(); err != nil {
		return nil, nil, err
	}
	split := splitPoint
	if split == 0 {
		split = numTokensPadded / n
	}
	if lastStart := int64(n-1) * int64(split); split == 0 || lastStart >= int64(scheduled) {
		return nil, nil, invalidf("the last of %d microbatches of %d tokens each (%d padded in all) "+
			"would start at token %d of %d scheduled", n, split, numTokensPadded, lastStart, scheduled)
	}
	both := make([]UBatchSlice, 2*n)
	slices, padded = both[:n:n], both[n:]
	fillSlices(slices, numScheduledTokens, split, scheduled)
	copy(padded, slices)
	padded[n-1].Requests.Stop, padded[n-1].Tokens.Stop = numReqsPadded, numTokensPadded
	return slices, padded, nil
}

// fillSlices cuts the scheduled tokens every split tokens, in one walk over the requests.
func fillSlices(slices []UBatchSlice, numScheduledTokens []int, split, scheduled int) {
	req, reqStart := 0, 0 // the next request to look at and its first token
	for k := range slices {
		s := &slices[k]
		s.Tokens = Range{k * split, (k + 1) * split}
		if k == len(slices)-1 {
			s.Tokens.Stop = scheduled
		}
		for req < len(numScheduledTokens) && reqStart <= s.Tokens.Start {
			reqStart += numScheduledTokens[req]
			req++
		}
		s.Requests.Start = req - 1
		for req < len(numScheduledTokens) && reqStart < s.Tokens.Stop {
			reqStart += numScheduledTokens[req]
			req++
		}
		s.Requests.Stop = req
	}
}

// sumScheduled returns the sum of the scheduled tokens.
func sumScheduled(numScheduledTokens []int) (int, error) {
	sum := int64(0)
	for i, n := range numScheduledTokens {
		if n < 0 || n > maxCount {
			return 0, invalidf("request %d has %d scheduled tokens, want 0 to %d", i, n, maxCount)
		}
		if sum += int64(n); sum > maxCount {
			return 0, invalidf("requests 0 to %d have %d scheduled tokens together, more than %d", i, sum, maxCount)
		}
	}
	return int(sum), nil
}

// checkUBatches checks that the padded slices of a pass tile [0, numTokens) and that each has requests.
func checkUBatches(p *problems, ubatches []UBatchSlice, numTokens int) {
	next := 0
	for i, s := range ubatches {
		if s.IsEmpty() || s.Requests.Start < 0 || s.Requests.Stop > maxCount {
			p.addf("microbatch %d is empty or out of range: %v", i, s)
		}
		if s.Tokens.Start != next {
			p.addf("microbatch %d starts at token %d, want %d: slices must tile the pass", i, s.Tokens.Start, next)
		}
		if last := ubatches[max(i-1, 0)].Requests; s.Requests.Start < last.Start || s.Requests.Stop < last.Stop {
			p.addf("microbatch %d has %v after %v", i, s, ubatches[i-1])
		}
		next = s.Tokens.Stop
	}
	if len(ubatches) > 0 && next != numTokens {
		p.addf("the last microbatch ends at token %d of a pass of %d", next, numTokens)
	}
}

// checkPerUBatch checks that metadata has one map for each microbatch, or at most one without microbatches.
func checkPerUBatch(p *problems, name string, maps []map[string]any, ubatches int) {
	if n := len(maps); n > 0 && n != max(ubatches, 1) {
		p.addf("%s has %d maps for a pass with %d microbatches", name, n, ubatches)
	}
}

// UBatch returns the index of the microbatch that ctx is in, and how many there are. Outside a
// microbatch ok is false.
func UBatch(ctx context.Context) (i, n int, ok bool) {
	c := lookup(ctx)
	if c == nil || c.ubatches == 0 {
		return 0, 0, false
	}
	return int(c.ubatch), int(c.ubatches), true
}

// RunUBatches calls fn for every microbatch of the pass in ctx, all concurrently, and returns when all
// have returned. The first runs on the calling goroutine, which would only wait otherwise; each of the
// others runs in its own. If the pass is not split, RunUBatches calls fn once, with ctx and index 0.
//
// A microbatch's context derives from ctx and holds its own forward context: its own attention metadata
// and slot mapping, its own token counts and Part, DP metadata in which every rank has this microbatch's
// tokens, graph mode NONE, and no slices. Everything else is the pass's. The first error cancels the
// contexts of the others and is returned as a *[UBatchError]. A panic also cancels the others; once they
// have returned, RunUBatches panics with a *[UBatchPanic], even if another microbatch returned an error.
// If a microbatch calls runtime.Goexit, as testing.T.FailNow does, the caller's goroutine ends the same
// way.
//
// It returns ErrNoForwardContext outside a pass, and an error that wraps ErrInvalid if fn is nil, if the
// slices do not tile the pass, or if ranks have unequal token counts.
func RunUBatches(ctx context.Context, fn func(ctx context.Context, i int) error) error {
	if fn == nil {
		return invalidf("RunUBatches without a function")
	}
	pass := lookup(ctx)
	if pass == nil {
		return ErrNoForwardContext
	}
	if len(pass.fc.UBatches) == 0 {
		return fn(ctx, 0)
	}
	return pass.runUBatches(ctx, fn)
}

func (c *passContext) runUBatches(ctx context.Context, fn func(ctx context.Context, i int) error) error {
	if err := c.fc.checkSplit(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g := &ubatchGroup{pass: c, ctx: ctx, fn: fn, cancel: cancel, parts: make([]ubatchPart, len(c.fc.UBatches))}
	if c.fc.DP != nil {
		g.dp = make([]DPMetadata, len(g.parts))
	}
	g.wg.Add(len(g.parts))
	for i := 1; i < len(g.parts); i++ {
		go g.run(i)
	}
	defer g.wg.Wait() // also if the first one ends this goroutine
	g.run(0)
	g.wg.Wait()
	if g.panicked != nil {
		panic(g.panicked)
	}
	if g.exited {
		runtime.Goexit()
	}
	return g.err
}

// ubatchGroup runs the microbatches of one RunUBatches, and collects how they end. It is not an
// errgroup.Group, because an error and a panic must come out with the microbatch's index.
type ubatchGroup struct {
	pass   *passContext
	ctx    context.Context
	fn     func(ctx context.Context, i int) error
	parts  []ubatchPart
	dp     []DPMetadata // of the parts; nil: the pass has none
	wg     sync.WaitGroup
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	err      error // the first
	panicked *UBatchPanic
	exited   bool // by runtime.Goexit
}

// ubatchPart holds the context of a microbatch and what it points to.
type ubatchPart struct {
	passContext
	value ForwardContext
}

// run runs microbatch i to whatever end it has.
func (g *ubatchGroup) run(i int) {
	returned := false
	defer g.wg.Done()
	defer func() {
		if returned {
			return
		}
		var panicked *UBatchPanic
		cause := error(&UBatchError{i, errUBatchExited})
		if value := recover(); value != nil {
			panicked = &UBatchPanic{i, value, debug.Stack()}
			cause = panicked
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.panicked == nil {
			g.panicked = panicked
		}
		g.exited = g.exited || panicked == nil
		g.cancel(cause)
	}()
	err := g.call(i)
	returned = true
	if err == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err = &UBatchError{i, err}
	}
	g.cancel(g.err)
}

var errUBatchExited = errors.New("the goroutine exited")

// call calls the function of microbatch i in its context, and inside its span if there is one.
func (g *ubatchGroup) call(i int) error {
	x := &g.parts[i]
	g.fill(&x.value, i)
	x.passContext = passContext{
		Context: g.ctx, fc: &x.value, run: g.pass.run, inner: g.pass.inner,
		ubatch: uint16(i), ubatches: uint32(len(g.parts)),
	}
	x.readMetadata()
	t := g.pass.traced()
	if t == nil || !t.spans {
		return g.fn(&x.passContext, i)
	}
	return g.callTraced(t, x, i)
}

func (g *ubatchGroup) callTraced(t *traced, x *ubatchPart, i int) error {
	ctx, span := t.telemetry.startUBatch(g.ctx, i, x.value.NumTokens)
	defer span.End(span.endOptions()...) // directly, so that the SDK notes a panic
	outcome := errPanic
	defer func() { t.telemetry.endUBatch(&span, outcome) }()
	x.Context = ctx
	outcome = g.fn(&x.passContext, i)
	return outcome
}

// checkSplit checks what [Runner.Run] has checked already, for forward contexts that came another way.
func (fc *ForwardContext) checkSplit() error {
	var p problems
	checkUBatches(&p, fc.UBatches, fc.NumTokens)
	checkPerUBatch(&p, "AttnMetadata", fc.AttnMetadata, len(fc.UBatches))
	checkPerUBatch(&p, "SlotMapping", fc.SlotMapping, len(fc.UBatches))
	if fc.DP != nil {
		fc.DP.checkEqual(&p)
	}
	return p.err()
}

// fill fills in the forward context of microbatch i. The ranks have agreed on the same padded total, so
// each splits at the same tokens and has as many in this microbatch.
func (g *ubatchGroup) fill(u *ForwardContext, i int) {
	fc := g.pass.fc
	part := fc.UBatches[i]
	*u = *fc
	u.NumTokens = part.NumTokens()
	u.NumTokensUnpadded = min(max(fc.NumTokensUnpadded-part.Tokens.Start, 0), u.NumTokens)
	u.GraphMode = GraphNone
	u.UBatches = nil
	u.Part = part
	if len(fc.AttnMetadata) > 0 {
		u.AttnMetadata = fc.AttnMetadata[i : i+1 : i+1]
	}
	if len(fc.SlotMapping) > 0 {
		u.SlotMapping = fc.SlotMapping[i : i+1 : i+1]
	}
	if fc.DP != nil {
		g.dp[i] = fc.DP.equal(u.NumTokens)
		u.DP = &g.dp[i]
	}
}

// UBatchError is the error of the microbatch that failed first.
type UBatchError struct {
	Index int
	Err   error
}

// Error returns the error with the microbatch's index.
func (e *UBatchError) Error() string {
	return fmt.Sprintf("fwd: microbatch %d: %s", e.Index, bare(e.Err))
}

// Unwrap returns the microbatch's own error.
func (e *UBatchError) Unwrap() error { return e.Err }

// UBatchPanic is what [RunUBatches] panics with, as a *UBatchPanic, when a microbatch has panicked. The
// value and the stack are those of the microbatch, which ran in a goroutine that is gone.
type UBatchPanic struct {
	Index int
	Value any
	Stack []byte
}

// Error returns the panic's value and stack.
func (e *UBatchPanic) Error() string {
	return fmt.Sprintf("fwd: microbatch %d panicked: %v\n\n%s", e.Index, e.Value, e.Stack)
}

// Unwrap returns the panic's value if that is an error.
func (e *UBatchPanic) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// ErrorType returns "panic".
func (e *UBatchPanic) ErrorType() string { return "panic" }

const (
	// maxCount is the largest count of tokens, requests and the like: what a rank of the reference
	// system can say.
	maxCount = math.MaxInt32

	// maxListed bounds the lists that are made on request, so that a wrong argument can't exhaust the
	// memory.
	maxListed = 1 << 24
)
