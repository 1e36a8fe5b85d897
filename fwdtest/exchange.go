package fwdtest

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/forwardctx/fwd"
)

// The coordinators are those of the ranks, and a rank alone exchanges with itself.
func (s suite) ranks(t *testing.T) {
	for _, size := range []int{1, 2, 3, 8} {
		g := s.group(t, size)
		for rank, c := range g.ranks {
			if c.Rank() != rank || c.Size() != size {
				t.Errorf("coordinator %d of %d is rank %d of %d", rank, size, c.Rank(), c.Size())
			}
		}
		for range 3 {
			g.together()
		}
	}
}

// Every field of every vote arrives at every rank.
func (s suite) fields(t *testing.T) {
	g := s.group(t, 3)
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		g.step += pick[uint64](random, 0, 0, 1, 1<<31, 1<<40, 1<<53)
		var calls []*call
		for rank := range g.ranks {
			calls = append(calls, g.come(t.Context(), rank, randomVote(random, g.step+1)))
		}
		g.agree(calls)
	}
}

func pick[T any](random *rand.Rand, from ...T) T { return from[random.IntN(len(from))] }

// randomVote prefers values at the ends of what is allowed.
func randomVote(random *rand.Rand, step uint64) fwd.Vote {
	const most = 1<<31 - 1
	v := fwd.Vote{
		Step:            step,
		NumTokensPadded: pick(random, 0, 1, 4096, most, random.IntN(most)),
		UBatch:          pick(random, false, true),
		GraphMode:       pick(random, fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull),
	}
	v.NumTokens = pick(random, 0, v.NumTokensPadded, random.IntN(max(v.NumTokensPadded, 1)))
	var traceID [16]byte
	var spanID [8]byte
	for i := range traceID {
		traceID[i] = byte(random.Uint32())
		spanID[i/2] = byte(random.Uint32())
	}
	sc := v.SpanContext // none: not every vote has one
	switch random.IntN(4) {
	case 1: // half of one
		sc = sc.WithTraceID(traceID)
	case 2:
		sc = sc.WithTraceID(traceID).WithSpanID(spanID)
	case 3:
		state := sc.TraceState()
		for i := range random.IntN(4) {
			state, _ = state.Insert("tenant"+strconv.Itoa(i)+"@vendor", strconv.FormatUint(random.Uint64(), 36)) // always well formed
		}
		sc = sc.WithTraceID(traceID).WithSpanID(spanID).WithTraceFlags(0x03).WithTraceState(state)
		sc = sc.WithTraceFlags(sc.TraceFlags().WithSampled(pick(random, false, true))).WithRemote(pick(random, false, true))
	}
	v.SpanContext = sc
	return v
}

// In whatever order the ranks come, nobody returns before the last, and all get all votes.
func (s suite) arrivalOrder(t *testing.T) {
	orders := permutations(3)
	for i, order := range permutations(4) {
		if i%4 == 0 { // each rank has its turn as the first and as the last
			orders = append(orders, order)
		}
	}
	groups := map[int]*group{3: s.group(t, 3), 4: s.group(t, 4)}
	for _, order := range orders {
		g := groups[len(order)]
		last := len(order) - 1
		calls := g.beginInOrder(t.Context(), order[:last]...)
		g.waiting(calls)
		g.agree(append(calls, g.begin(t.Context(), order[last])...))
	}
}

// permutations returns every order of 0 to n-1.
func permutations(n int) [][]int {
	if n == 0 {
		return [][]int{nil}
	}
	var orders [][]int
	for _, order := range permutations(n - 1) {
		for at := range n {
			orders = append(orders, slices.Insert(slices.Clone(order), at, n-1))
		}
	}
	return orders
}

// Who writes to the votes disturbs neither the other ranks nor a later round, and who keeps them keeps what they were.
func (s suite) votesAreTheCallers(t *testing.T) {
	g := s.group(t, 3)
	var kept [][]fwd.Vote
	for range 5 {
		g.step++
		for i, c := range g.begin(t.Context(), g.all()...) {
			c.agreed()
			if i == 2 {
				kept = append(kept, c.votes)
			} else {
				clear(c.votes[:cap(c.votes)])
			}
		}
	}
	for i, votes := range kept {
		if err := differ(votes, g.votes(uint64(i+1))); err != nil {
			t.Errorf("the votes that rank 2 got in step %d have changed: %v", i+1, err)
		}
	}
}
