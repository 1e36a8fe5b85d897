package fwdtest

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/forwardctx/fwd"
)

// ranks checks that the coordinators are those of the ranks, and that a rank alone exchanges with
// itself.
func (s suite) ranks(t *testing.T, size int) {
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

// fields checks that every field of every vote comes to every rank.
func (s suite) fields(t *testing.T, size int) {
	g := s.group(t, size)
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

// randomVote returns a valid vote. It prefers values at the ends of what is allowed.
func randomVote(random *rand.Rand, step uint64) fwd.Vote {
	count := func() int { return pick(random, 0, 1, 4096, math.MaxInt32, random.IntN(math.MaxInt32)) }
	flag := func() bool { return pick(random, false, true) }
	word := func() uint64 { return pick(random, 0, 1, 1<<53+1, math.MaxUint64, random.Uint64()) }
	v := fwd.Vote{
		Step:            step,
		NumTokensPadded: count(),
		NumReqs:         count(),
		NumActiveLoRAs:  count(),
		Uniform:         flag(),
		ExcludeFull:     flag(),
		Eager:           flag(),
		UBatch:          flag(),
		Idle:            flag(),
		WarmUp:          flag(),
		GraphMode:       pick(random, fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull),
		Note:            word(),
		Config:          word(),
	}
	v.NumTokens = pick(random, 0, v.NumTokensPadded, random.IntN(max(v.NumTokensPadded, 1)))
	return withRandomSpan(random, v)
}

// withRandomSpan returns the vote with a whole span context, half of one, or none: not every vote
// has one.
func withRandomSpan(random *rand.Rand, v fwd.Vote) fwd.Vote {
	var traceID [16]byte
	var spanID [8]byte
	for i := range traceID {
		traceID[i] = byte(random.Uint32())
		spanID[i/2] = byte(random.Uint32())
	}
	sc := v.SpanContext
	switch random.IntN(4) {
	case 1:
		sc = sc.WithTraceID(traceID)
	case 2:
		sc = sc.WithTraceID(traceID).WithSpanID(spanID)
	case 3:
		state := sc.TraceState()
		for i := range random.IntN(4) {
			value := strconv.FormatUint(random.Uint64(), 36)
			state, _ = state.Insert("tenant"+strconv.Itoa(i)+"@vendor", value) // always well formed
		}
		sc = sc.WithTraceID(traceID).WithSpanID(spanID).WithTraceFlags(0x03).WithTraceState(state)
		sc = sc.WithTraceFlags(sc.TraceFlags().WithSampled(pick(random, false, true)))
		sc = sc.WithRemote(pick(random, false, true))
	}
	v.SpanContext = sc
	return v
}

// arrivalOrder checks that nobody returns before the last rank has come, in whatever order they
// come, and that all get all votes.
func (s suite) arrivalOrder(t *testing.T, size int) {
	g := s.group(t, size)
	for _, order := range arrivalOrders(size) {
		last := size - 1
		calls := g.beginInOrder(t.Context(), order[:last]...)
		g.waiting(calls)
		g.agree(append(calls, g.begin(t.Context(), order[last])...))
	}
}

// arrivalOrders returns every order of up to 3 ranks, those of 4 in which each rank has its turn as
// the first and as the last, and a few of more ranks.
func arrivalOrders(size int) (orders [][]int) {
	if size > 4 {
		random := rand.New(rand.NewPCG(uint64(size), 45))
		for range 4 {
			orders = append(orders, random.Perm(size))
		}
		return orders
	}
	for i, order := range permutations(size) {
		if size < 4 || i%4 == 0 {
			orders = append(orders, order)
		}
	}
	return orders
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

// votesStay checks that votes which were returned stay what they were, through complete, broken and
// refused rounds: agreements and records keep them.
func (s suite) votesStay(t *testing.T, size int) {
	g := s.group(t, size)
	type kept struct {
		rank  int
		votes []fwd.Vote
		step  uint64
	}
	var all []kept
	for range 4 {
		g.step++
		for _, c := range g.begin(t.Context(), g.all()...) {
			c.agreed()
			all = append(all, kept{c.rank, c.votes, g.step})
		}
	}
	last := size - 1
	g.breakStep(g.except(last)...)
	g.restart(last)
	g.fail(g.begin(t.Context(), g.all()...), fwd.ErrLockstep, last)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	g.fail(g.begin(ended, 0), fwd.ErrRankMissing, g.except(0)...)
	g.together()
	for _, k := range all {
		if err := differ(k.votes, g.votes(k.step)); err != nil {
			t.Errorf("the votes that rank %d got in step %d have changed: %v", k.rank, k.step, err)
		}
	}
}
