// This file tests in simulated time what becomes of ranks that hear others and are not heard, or the
// other way round.

package natsdp

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// aloneRun is a group that loses messages on some ways.
type aloneRun struct {
	*testing.T
	bus    *bus
	ledger *ledger
	over   context.Context

	mu     sync.Mutex
	ended  map[uint64][]byte // how each rank left a step: 'c'omplete, 'b'roken, or 0
	counts map[string]int
}

// Whatever gets lost, on whichever ways and for however long, ranks that complete a step have the same
// votes, and no step is complete for a rank and broken for another if the step before was so too. When
// nothing gets lost any more the group is whole.
func TestNobodyRunsAlone(t *testing.T) {
	t.Parallel()
	counts := map[string]int{}
	for seed := range seeds(t) {
		synctest.Test(t, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			r := newAloneRun(t, seed)
			r.run(rand.New(rand.NewPCG(seed, 9)))
			for what, n := range r.counts {
				counts[what] += n
			}
		})
		if t.Failed() {
			return
		}
	}
	t.Log(counts)
	for _, what := range []string{"complete", "broken", "divided"} {
		if counts[what] == 0 {
			t.Errorf("the test does not do what it should: no step was %s", what)
		}
	}
}

func newAloneRun(t *testing.T, seed uint64) *aloneRun {
	r := &aloneRun{
		T: t, bus: newBus(3+int(seed%6), seed),
		ledger: &ledger{steps: map[uint64][]int{}, given: map[int]int{}},
		ended:  map[uint64][]byte{}, counts: map[string]int{},
	}
	r.bus.hub = seed%4 == 3
	return r
}

func (r *aloneRun) run(random *rand.Rand) {
	over, stop := context.WithTimeout(r.Context(), time.Hour)
	defer stop()
	r.over = over
	var wg sync.WaitGroup
	for rank, s := range r.bus.joinAll(r.T) {
		seed := random.Uint64()
		wg.Go(func() { r.takeSteps(s, rand.New(rand.NewPCG(seed, uint64(rank)))) })
	}
	r.bus.set(0, 0, 2*time.Millisecond)
	for range 20 {
		r.fault(random)
	}
	r.mu.Lock()
	complete := r.counts["complete"]
	r.mu.Unlock()
	time.Sleep(20 * time.Second)
	r.mu.Lock()
	if n := r.counts["complete"] - complete; n < 20*r.bus.size {
		r.Errorf("%d ranks have completed %d steps in 20 s in which nothing got lost", r.bus.size, n)
	}
	r.mu.Unlock()
	stop()
	wg.Wait()
	r.check()
	r.bus.killAll()
}

// fault makes messages get lost on some ways for some time: all, some, or all in turns.
func (r *aloneRun) fault(random *rand.Rand) {
	var ways []way
	for range 1 + random.IntN(3) {
		from, to := random.IntN(r.bus.size), random.IntN(r.bus.size)
		if from != to {
			ways = append(ways, way{from, to})
		}
	}
	set := func(loss float64) {
		for _, w := range ways {
			r.bus.lose(w.from, w.to, loss)
		}
	}
	upTo := func(most time.Duration) time.Duration { return time.Duration(random.Int64N(int64(most))) }
	switch random.IntN(3) {
	case 0:
		set(1)
		time.Sleep(upTo(5 * time.Second))
	case 1:
		set(0.2 + 0.7*random.Float64())
		time.Sleep(upTo(5 * time.Second))
	case 2:
		for range 6 {
			set(1)
			time.Sleep(upTo(500 * time.Millisecond))
			set(0)
			time.Sleep(upTo(500 * time.Millisecond))
		}
	}
	if set(0); random.IntN(3) == 0 {
		time.Sleep(upTo(2 * time.Second))
	}
}

func (r *aloneRun) takeSteps(s *station, random *rand.Rand) {
	stepper := &stepper{Coordinator: s}
	for r.over.Err() == nil {
		time.Sleep(time.Duration(random.Int64N(int64(50 * time.Millisecond))))
		wait := 300*time.Millisecond + time.Duration(random.Int64N(int64(2*time.Second)))
		ctx, cancel := context.WithTimeout(r.over, wait)
		votes, err := stepper.next(ctx, r.ledger.vote(s.rank))
		cancel()
		var rankErr *fwd.RankError
		switch {
		case err == nil:
			if err := r.ledger.check(s.rank, votes); err != nil {
				r.Error(err)
			}
			r.note(votes[0].Step, s.rank, 'c', "complete")
		case r.over.Err() != nil:
		case errors.Is(err, fwd.ErrRankMissing) && errors.As(err, &rankErr):
			r.note(rankErr.Step, s.rank, 'b', "broken")
			if len(rankErr.Ranks) == 0 || slices.Contains(rankErr.Ranks, s.rank) {
				r.Errorf("rank %d names ranks %v: %v", s.rank, rankErr.Ranks, err)
			}
		default:
			r.Errorf("rank %d: %v", s.rank, err)
		}
	}
}

func (r *aloneRun) note(step uint64, rank int, how byte, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended[step] == nil {
		r.ended[step] = make([]byte, r.bus.size)
	}
	r.ended[step][rank] = how
	r.counts[what]++
}

// check looks for steps in a row that were complete for one rank and broken for another.
func (r *aloneRun) check() {
	for step, ended := range r.ended {
		divided := false
		for a, how := range ended {
			for b, other := range ended {
				if how != 'c' || other != 'b' {
					continue
				}
				divided = true
				if next := r.ended[step+1]; next != nil && next[a] == 'c' && next[b] == 'b' {
					r.Errorf("steps %d and %d are complete for rank %d and broken for rank %d", step, step+1, a, b)
				}
			}
		}
		if divided {
			r.counts["divided"]++
		}
	}
}

// A rank that one other does not hear any more completes at most the step in which that began. Its error
// names that rank. When the rank is heard again the group is whole within two steps.
func TestUnheard(t *testing.T) {
	t.Parallel()
	const size = 3
	for from := range size {
		for to := range size {
			if from != to {
				synctest.Test(t, func(t *testing.T) { unheard(t, size, from, to) })
			}
		}
	}
}

func unheard(t *testing.T, size, from, to int) {
	b := newBus(size, 1)
	group := b.joinAll(t)
	defer b.killAll()
	steppers := make([]*stepper, size)
	for rank, s := range group {
		steppers[rank] = &stepper{Coordinator: s}
	}
	step := func() (errs []error) {
		errs = make([]error, size)
		var wg sync.WaitGroup
		for rank, s := range steppers {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second+time.Duration(rank)*time.Millisecond)
				defer cancel()
				_, errs[rank] = s.next(ctx, rank)
			})
		}
		wg.Wait()
		return errs
	}
	for range 2 {
		if errs := step(); errors.Join(errs...) != nil {
			t.Fatal(errs)
		}
	}
	b.lose(from, to, 1)
	for lost := range 5 {
		errs := step()
		for rank, err := range errs {
			rankErr := (*fwd.RankError)(nil)
			if lost == 0 && rank != to && err == nil {
				continue // nobody could know yet
			}
			if !errors.Is(err, fwd.ErrRankMissing) || !errors.As(err, &rankErr) {
				t.Errorf("%d to %d, step %d of the loss: rank %d got %v", from, to, lost, rank, err)
			} else if rank == from && !slices.Contains(rankErr.Ranks, to) ||
				rank == to && !slices.Contains(rankErr.Ranks, from) {
				t.Errorf("%d to %d, step %d of the loss: rank %d blames ranks %v: %v",
					from, to, lost, rank, rankErr.Ranks, err)
			}
		}
	}
	b.lose(from, to, 0)
	for n := range 5 {
		if err := errors.Join(step()...); err != nil && n >= 2 {
			t.Errorf("%d to %d, %d steps after the loss: %v", from, to, n+1, err)
		}
	}
}
