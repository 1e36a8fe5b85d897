package fwd

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
)

// BatchDescriptor is the key of a captured graph: what about a batch decides which graph can replay it. It is
// comparable, so it can be a map key. The zero value is no descriptor.
type BatchDescriptor struct {
	NumTokens      int  // padded
	NumReqs        int  // padded; 0: any number of requests
	Uniform        bool // all requests have the same query length
	HasLoRA        bool // NumActiveLoRAs is above 0
	NumActiveLoRAs int  // that the graph serves, see LoRAConfig: not less than the batch has
}

// RelaxForMixedBatchGraphs returns the key of the graphs for mixed batches, which serve any number of requests with
// any query lengths: the same tokens and adapters.
func (d BatchDescriptor) RelaxForMixedBatchGraphs() BatchDescriptor {
	d.NumReqs, d.Uniform = 0, false
	return d
}

// check refuses what no batch can have.
func (d BatchDescriptor) check(p *problems) {
	p.count("the descriptor's NumTokens", d.NumTokens)
	p.count("the descriptor's NumReqs", d.NumReqs)
	p.count("the descriptor's NumActiveLoRAs", d.NumActiveLoRAs)
}

// Range is a half-open range [Start, Stop).
type Range struct{ Start, Stop int }

// Len returns how many numbers the range holds.
func (r Range) Len() int { return r.Stop - r.Start }

// UBatchSlice is the part of a batch that a microbatch works on: a range of requests and one of tokens. A request that
// the split cuts belongs to both sides.
type UBatchSlice struct{ Requests, Tokens Range }

// IsEmpty reports whether either range has no length.
func (s UBatchSlice) IsEmpty() bool { return s.Requests.Len() <= 0 || s.Tokens.Len() <= 0 }

// NumTokens returns how many tokens the microbatch has.
func (s UBatchSlice) NumTokens() int { return s.Tokens.Len() }

// String returns the slice as "requests [0, 2) tokens [0, 16)".
func (s UBatchSlice) String() string {
	return fmt.Sprintf("requests [%d, %d) tokens [%d, %d)", s.Requests.Start, s.Requests.Stop, s.Tokens.Start, s.Tokens.Stop)
}

// maxUBatches bounds the microbatches of a pass, each of which costs a goroutine.
const maxUBatches = 1 << 16

// SplitUBatches splits a batch into n microbatches of splitPoint tokens each, the last one taking the rest. It returns
// the slices of what is scheduled and the padded slices, whose last one reaches to numTokensPadded and numReqsPadded.
// splitPoint 0 means numTokensPadded/n. The inputs are the scheduled tokens of each request, in batch order; the
// outputs do not alias them. A range of padded requests may reach beyond the scheduled ones: clip it before indexing those.
//
// Slice k begins with the request that holds its first token and ends before the first request that starts at or
// after its end (vLLM's create_ubatch_slices).
//
// ErrInvalid: fewer than 2 microbatches or more than 2^16, a negative count, padding below what is scheduled, and a split that
// leaves a slice without tokens, which happens where numTokensPadded is well above the scheduled tokens.
func SplitUBatches(numScheduledTokens []int, numTokensPadded, numReqsPadded, n, splitPoint int) (slices, padded []UBatchSlice, err error) {
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
		return nil, nil, invalidf("%d microbatches split at %d of %d padded tokens: the last would start at token %d of %d scheduled",
			n, split, numTokensPadded, lastStart, scheduled)
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
		if i > 0 && (s.Requests.Start < ubatches[i-1].Requests.Start || s.Requests.Stop < ubatches[i-1].Requests.Stop) {
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

// UBatch returns the index of the microbatch that ctx is in and how many there are. ok is false outside of one.
func UBatch(ctx context.Context) (i, n int, ok bool) {
	c := lookup(ctx)
	if c == nil || c.ubatches == 0 {
		return 0, 0, false
	}
	return c.ubatch, c.ubatches, true
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

// UBatchPanic is what [RunUBatches] panics with, as *UBatchPanic, when a microbatch has panicked: the value and the
// stack are those of the microbatch, which ran in a goroutine that is gone.
type UBatchPanic struct {
	Index int
	Value any
	Stack []byte
}

// Error returns the panic's value and stack.
func (e *UBatchPanic) Error() string {
	return fmt.Sprintf("fwd: microbatch %d panicked: %v\n\n%s", e.Index, e.Value, e.Stack)
}

// Unwrap returns the panic's value where that is an error.
func (e *UBatchPanic) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// ErrorType returns "panic".
func (e *UBatchPanic) ErrorType() string { return errPanic.ErrorType() }

// RunUBatches calls fn for every microbatch of the pass in ctx, each in its own goroutine, all at once, and returns when
// all have returned. A pass without microbatches calls fn once, with ctx and index 0, on the calling goroutine.
//
// A microbatch's context derives from ctx and holds its own forward context: its own attention metadata and slot
// mapping, its own token counts, DP metadata in which every rank has this microbatch's tokens, graph mode NONE, no
// slices. Everything else is the pass's. The first error cancels the contexts of the others and comes back as *[UBatchError]. A panic does so too, and
// RunUBatches panics with *[UBatchPanic] once the others have stopped; a panic goes before errors. A microbatch that
// calls runtime.Goexit, as testing.T.FailNow does, ends the caller's goroutine the same way.
//
// It wraps ErrNoForwardContext, and ErrInvalid: fn is nil, the slices do not tile the pass, or ranks have unequal
// token counts.
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
	group := ubatchGroup{cancel: cancel}
	for i := range c.fc.UBatches {
		group.wg.Go(func() { group.run(i, func() error { return c.runUBatch(ctx, i, fn) }) })
	}
	group.wg.Wait()
	if group.panicked != nil {
		panic(group.panicked)
	}
	if group.exited {
		runtime.Goexit()
	}
	return group.err
}

// ubatchGroup collects how the microbatches of one RunUBatches end. It is not an errgroup.Group: an error and a panic
// must come out with the microbatch's index.
type ubatchGroup struct {
	wg     sync.WaitGroup
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	err      error // the first
	panicked *UBatchPanic
	exited   bool // by runtime.Goexit
}

// run runs microbatch i to whatever end it has.
func (g *ubatchGroup) run(i int, fn func() error) {
	returned := false
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
	err := fn()
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

// runUBatch runs fn inside microbatch i's span and context.
func (c *passContext) runUBatch(ctx context.Context, i int, fn func(ctx context.Context, i int) error) error {
	value := c.fc.ubatch(i)
	t := c.telemetry()
	ctx, span := t.startUBatch(ctx, i, value.NumTokens)
	defer span.End(span.options...) // directly, so that the SDK notes a panic
	var outcome error = errPanic
	defer func() { span.finish(outcome, t.errorType(outcome)) }()
	outcome = fn(&passContext{Context: ctx, fc: value, ubatch: i, ubatches: len(c.fc.UBatches), run: c.run}, i)
	return outcome
}

// checkSplit checks what [Runner.Run] has checked already, for forward contexts that came by another way.
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

// ubatch returns the forward context of microbatch i. Ranks have agreed on the same padded total, so each splits at the
// same tokens and has as many in this microbatch.
func (fc *ForwardContext) ubatch(i int) *ForwardContext {
	tokens := fc.UBatches[i].Tokens
	u := *fc
	u.NumTokens = tokens.Len()
	u.NumTokensUnpadded = min(max(fc.NumTokensUnpadded-tokens.Start, 0), tokens.Len())
	u.GraphMode = GraphNone
	u.UBatches = nil
	if len(fc.AttnMetadata) > 0 {
		u.AttnMetadata = fc.AttnMetadata[i : i+1 : i+1]
	}
	if len(fc.SlotMapping) > 0 {
		u.SlotMapping = fc.SlotMapping[i : i+1 : i+1]
	}
	if fc.DP != nil {
		u.DP = fc.DP.withEqual(tokens.Len())
	}
	return &u
}
