package main

import (
	"context"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
	"github.com/forwardctx/fwd/fwdplan/reqtrace"
)

// engine is what is simulated: data-parallel ranks with continuous batching and chunked prefill, whose
// steps take as long as the rank with the most tokens needs.
type engine struct {
	ranks   int
	budget  int // tokens of a rank in a step
	maxSeqs int // requests of a rank in a step
	speed   float64

	step  time.Duration // what every step takes
	token time.Duration // what each token of the largest rank adds
}

// request is a row of the trace on its rank.
type request struct {
	arrival time.Duration
	prompt  int // tokens still to compute
	answer  int // tokens still to generate after the prompt
}

// rank has its requests in the order in which they came.
type rank struct {
	waiting, running []*request
}

// run serves the whole trace. It returns what was counted until the first request of the second half came,
// and after that.
func (e *engine) run(ctx context.Context, rows []reqtrace.Row) (first, second fwdplan.Snapshot, err error) {
	ranks := make([]rank, e.ranks)
	for i, row := range rows {
		r := &ranks[i%e.ranks]
		r.waiting = append(r.waiting, &request{
			arrival: e.arrival(rows, i), prompt: row.ContextTokens, answer: row.GeneratedTokens - 1,
		})
	}
	half := e.arrival(rows, len(rows)/2)
	var sizes fwdplan.Sizes
	halved := false
	votes := make([]fwd.Vote, e.ranks)
	for now := time.Duration(0); ; {
		if err := ctx.Err(); err != nil {
			return first, second, err
		}
		if !halved && now >= half {
			first, halved = sizes.Snapshot(), true
		}
		most := 0
		for i := range ranks {
			votes[i] = ranks[i].schedule(e, now)
			most = max(most, votes[i].NumTokens)
		}
		if most == 0 {
			next, ok := nextArrival(ranks)
			if !ok {
				break
			}
			now = next
			continue
		}
		took := e.step + time.Duration(most)*e.token
		rec := fwd.Record{Size: e.ranks, Votes: votes, Dummy: votes[0].Idle, Duration: took}
		sizes.Observe(ctx, &rec)
		now += took
	}
	second, err = sizes.Snapshot().Sub(first)
	return first, second, err
}

func (e *engine) arrival(rows []reqtrace.Row, i int) time.Duration {
	return time.Duration(float64(rows[i].Time.Sub(rows[0].Time)) / e.speed)
}

// schedule serves a rank for a step: first what runs, then what has arrived, as long as the budget lasts.
func (r *rank) schedule(e *engine, now time.Duration) fwd.Vote {
	v := fwd.Vote{Uniform: true}
	budget := e.budget
	take := func(q *request) {
		n := 1
		if q.prompt > 0 {
			n, v.Uniform = min(q.prompt, budget), false
			q.prompt -= n
		} else {
			q.answer--
		}
		budget -= n
		v.NumTokens += n
		v.NumReqs++
	}
	left := r.running[:0]
	for _, q := range r.running {
		if budget > 0 {
			take(q)
		}
		if q.prompt > 0 || q.answer > 0 {
			left = append(left, q)
		}
	}
	clear(r.running[len(left):])
	r.running = left
	for budget > 0 && len(r.running) < e.maxSeqs && len(r.waiting) > 0 && r.waiting[0].arrival <= now {
		q := r.waiting[0]
		r.waiting = r.waiting[1:]
		if take(q); q.prompt > 0 || q.answer > 0 {
			r.running = append(r.running, q)
		}
	}
	if v.NumReqs == 0 {
		v = fwd.Vote{Idle: true, Uniform: true, NumTokens: 0}
	}
	return v
}

// nextArrival returns when the next request comes; ok is false if there is none.
func nextArrival(ranks []rank) (next time.Duration, ok bool) {
	for i := range ranks {
		if w := ranks[i].waiting; len(w) > 0 && (!ok || w[0].arrival < next) {
			next, ok = w[0].arrival, true
		}
	}
	return next, ok
}
