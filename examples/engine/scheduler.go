package engine

import (
	"fmt"
	"math"
	"slices"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// Request is one prompt to continue.
type Request struct {
	ID        int
	Arrival   time.Duration // after the start of the run
	Prompt    []int         // at least one token
	MaxTokens int           // how many tokens to generate, at least one
	Adapter   int           // LoRA adapter, from 1, or model.NoAdapter
}

// ArrivalAt returns when the request arrives, after the start, if time goes by speed times as fast;
// at a speed of 0 that is immediately. It returns an error if that is later than a [time.Duration]
// can say.
func (r *Request) ArrivalAt(speed float64) (time.Duration, error) {
	if speed == 0 {
		return 0, nil
	}
	at := float64(r.Arrival) / speed
	if at >= math.MaxInt64 {
		return 0, fmt.Errorf("request %d would arrive after %.3g s, want at most %.3g s", r.ID,
			at/float64(time.Second), time.Duration(math.MaxInt64).Seconds())
	}
	return time.Duration(at), nil
}

// length is the number of tokens that end up in the KV cache: the last generated one is never fed
// back.
func (r *Request) length() int { return len(r.Prompt) + r.MaxTokens - 1 }

// Result is what became of a request.
type Result struct {
	ID       int
	Finished bool
	Tokens   []int     // generated so far
	Logits   []float64 // that the last token was sampled from
}

// sequence is a request on its rank.
type sequence struct {
	request    *Request
	result     *Result
	blockTable []int
	computed   int        // tokens whose keys and values are in the cache
	coming     int        // tokens that the pass computes which is about to run, if that is foreseen
	left       bool       // the batch, before that pass
	drafts     []int      // guesses at the tokens after the known ones, not verified yet
	span       trace.Span // nil: it is not scheduled yet, or has ended
	passes     int
	arrived    time.Time
	scheduled  time.Time // first
	firstToken time.Time
}

// token returns the token at a position of prompt, answer and guesses, and 0 after them.
func (s *sequence) token(position int) int {
	for _, part := range [...][]int{s.request.Prompt, s.result.Tokens} {
		if position < len(part) {
			return part[position]
		}
		position -= len(part)
	}
	if position < len(s.drafts) {
		return s.drafts[position]
	}
	return 0
}

// known is the number of tokens of prompt and answer.
func (s *sequence) known() int { return len(s.request.Prompt) + len(s.result.Tokens) }

// pending returns which tokens are to compute, and how many: the rest of the prompt, or the token
// sampled last and the guesses after it.
func (s *sequence) pending() (first, count int) {
	first, known := s.computed+s.coming, s.known()
	if first == known {
		known++ // the pass that is foreseen samples one more
	}
	return first, known + len(s.drafts) - first
}

// scheduled is a sequence's part of one step.
type scheduled struct {
	seq          *sequence
	first, count int  // tokens
	still        bool // its rows are there to be counted, and are written nowhere
}

// scheduler decides what a rank computes in each step: continuous batching with chunked prefill.
// Sequences join and leave the batch at any step, and a long prompt is computed over several steps
// beside the decoding of others, because every step has a budget of tokens.
type scheduler struct {
	waiting []*sequence // by arrival
	running []*sequence // by admission
	leaving int         // sequences that end with the pass that is foreseen
	blocks  *blockAllocator
	budget  int // tokens in a step
	maxSeqs int // sequences in a step
	drafts  int // guesses that a sequence may have beyond its last token
}

// open says when serving begins, and so when each request arrives.
func (s *scheduler) open(began time.Time, arrival func(*Request) time.Duration) {
	for _, seq := range s.waiting {
		seq.arrived = began.Add(arrival(seq.request))
	}
}

// schedule returns the next step: first what is running, so that no admitted request starves, then
// new ones that have arrived. It returns nothing when the rank is idle.
func (s *scheduler) schedule(now time.Time) []scheduled {
	var batch []scheduled
	budget := s.budget
	take := func(seq *sequence) {
		first, count := seq.pending()
		count = min(count, budget)
		budget -= count
		batch = append(batch, scheduled{seq: seq, first: first, count: count})
	}
	for _, seq := range s.running {
		if budget > 0 {
			take(seq)
		}
	}
	for budget > 0 && len(s.running) < s.maxSeqs && len(s.waiting) > 0 && !s.waiting[0].arrived.After(now) {
		seq := s.waiting[0]
		// A request gets blocks for all it will ever need, so nothing that runs ever has to be evicted.
		blocks, ok := s.blocks.allocate(seq.request.length() + s.drafts)
		if !ok {
			break
		}
		seq.blockTable, seq.scheduled = blocks, now
		s.waiting = s.waiting[1:]
		s.running = append(s.running, seq)
		take(seq)
	}
	return batch
}

// arrived is the number of sequences that wait since they have arrived.
func (s *scheduler) arrived(now time.Time) int {
	n, _ := slices.BinarySearchFunc(s.waiting, now, func(seq *sequence, now time.Time) int {
		if seq.arrived.After(now) {
			return 1
		}
		return -1
	})
	return n
}

// unfinished is the number of sequences that are waiting or running. Those that are leaving count until
// they have left: their pass may fail.
func (s *scheduler) unfinished() int { return len(s.waiting) + len(s.running) + s.leaving }

// idle returns for how long there is nothing to do, at most as long as that.
func (s *scheduler) idle(now time.Time, most time.Duration) time.Duration {
	if len(s.running)+s.leaving > 0 {
		return 0
	}
	if len(s.waiting) > 0 {
		most = min(most, s.waiting[0].arrived.Sub(now))
	}
	return max(most, 0)
}

// finish takes leave of a sequence that has all its tokens.
func (s *scheduler) finish(seq *sequence) {
	if seq.left {
		s.leaving--
	} else {
		s.remove(seq)
	}
}

// remove takes a sequence out of the batch.
func (s *scheduler) remove(seq *sequence) {
	s.blocks.release(seq.blockTable)
	s.running = slices.DeleteFunc(s.running, func(other *sequence) bool { return other == seq })
}
