// This file tests in simulated time that a process which has been replaced takes part no more,
// whatever it and the others know.

package natsdp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// fewSeeds is how many seeds a simulation runs, unless the environment variable FWD_SEEDS says more.
const fewSeeds = 60

func seeds(t *testing.T) uint64 {
	t.Helper()
	text, ok := os.LookupEnv("FWD_SEEDS")
	if !ok {
		return fewSeeds
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		t.Fatalf("FWD_SEEDS: %v", err)
	}
	return n
}

// livesRun is a group whose processes are cut off, replaced, paused and killed.
type livesRun struct {
	*testing.T
	bus    *bus
	random *rand.Rand // of the goroutine that makes the faults
	ledger *ledger
	over   context.Context
	wg     sync.WaitGroup

	mu        sync.Mutex
	processes []*process      // all that ever were
	current   []*process      // by rank
	calls     map[int]callOf  // by the tokens of their votes
	agreed    int             // calls that returned votes
	together  map[uint64]bool // steps that processes completed which were not replaced
	alone     map[uint64]bool // steps that a replaced process completed
	happened  map[string]int  // faults
}

// process is one process of a rank.
type process struct {
	*station
	joined, replaced time.Time  // zero: it has no successor
	witnesses        []*process // those that were there when its successor joined
	ended            bool       // killed, or told that it has been replaced
	alone            bool       // it has completed a step after it was replaced
}

// callOf says who voted, and when its call began.
type callOf struct {
	by    *process
	began time.Time
}

// All ranks that complete a step have the same votes, and these are of processes which had not been
// replaced when their calls began, see check for the one exception. When the faults are over the
// group is whole.
func TestLives(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	happened := map[string]int{}
	for seed := range seeds(t) {
		synctest.Test(t, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			r := newLivesRun(t, seed)
			r.run()
			mu.Lock()
			defer mu.Unlock()
			for what, n := range r.happened {
				happened[what] += n
			}
			happened["agreed"] += r.agreed
		})
		if t.Failed() {
			return
		}
	}
	t.Log(happened)
	for _, what := range []string{"agreed", "kill", "take over", "cut", "pause", "told"} {
		if happened[what] == 0 && seeds(t) >= fewSeeds {
			t.Errorf("the test does not do what it should: %s never happened", what)
		}
	}
}

func newLivesRun(t *testing.T, seed uint64) *livesRun {
	random := rand.New(rand.NewPCG(seed, 7))
	r := &livesRun{
		T: t, bus: newBus(3+random.IntN(6), seed), random: random,
		ledger: &ledger{steps: map[uint64][]int{}, given: map[int]int{}},
		calls:  map[int]callOf{}, happened: map[string]int{},
		together: map[uint64]bool{}, alone: map[uint64]bool{},
	}
	r.bus.hub = seed%3 == 2
	r.current = make([]*process, r.bus.size)
	return r
}

func (r *livesRun) run() {
	over, stop := context.WithTimeout(r.Context(), 10*time.Minute)
	defer stop()
	r.over = over
	for rank, s := range r.bus.joinAll(r.T) {
		r.enter(rank, s)
	}
	r.bus.set(0.05, 0.05, 5*time.Millisecond)
	for range 12 {
		r.fault()
		time.Sleep(r.upTo(800 * time.Millisecond))
	}
	time.Sleep(5 * time.Second) // what was cut off or paused is there again
	r.bus.set(0, 0, 0)
	time.Sleep(5 * time.Second)
	r.whole()
	stop()
	r.wg.Wait()
	r.bus.killAll()
}

func (b *bus) set(loss, twice float64, delay time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.loss, b.twice, b.delay = loss, twice, delay
}

func (r *livesRun) upTo(most time.Duration) time.Duration {
	return time.Duration(r.random.Int64N(int64(most)))
}

// enter makes a member that has joined the current process of its rank, which takes steps.
func (r *livesRun) enter(rank int, s *station) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	p := &process{station: s, joined: now}
	if old := r.current[rank]; old != nil {
		old.replaced, old.witnesses = now, slices.Delete(slices.Clone(r.current), rank, rank+1)
	}
	r.current[rank] = p
	r.processes = append(r.processes, p)
	random := rand.New(rand.NewPCG(r.random.Uint64(), 8))
	r.wg.Go(func() { r.takeSteps(p, random) })
}

func (r *livesRun) takeSteps(p *process, random *rand.Rand) {
	s := &stepper{Coordinator: p.station}
	for r.over.Err() == nil {
		time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond))))
		p.awake()
		tokens := r.ledger.vote(p.rank)
		r.mu.Lock()
		r.calls[tokens] = callOf{p, time.Now()}
		r.mu.Unlock()
		ctx, cancel := context.WithTimeout(r.over, time.Duration(random.Int64N(int64(4*time.Second))))
		votes, err := s.next(ctx, tokens)
		cancel()
		switch {
		case err == nil:
			r.check(p, votes)
		case errors.Is(err, ErrRankTaken):
			r.end(p, "told")
			return
		case errors.Is(err, ErrClosed):
			return
		case !errors.Is(err, fwd.ErrRankMissing) && !errors.Is(err, fwd.ErrLockstep):
			r.Errorf("rank %d: %v", p.rank, err)
		}
	}
}

// check checks the votes that a call returned.
func (r *livesRun) check(p *process, votes []fwd.Vote) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.agreed++
	if err := r.ledger.check(p.rank, votes); err != nil {
		r.Error(err)
	}
	// A process that has been replaced, and has lost all that would tell it so, may take the step alone
	// that was open then. The others pass that step over.
	step, mine := votes[0].Step, r.calls[votes[p.rank].NumTokens]
	if !p.replaced.IsZero() && p.replaced.Before(mine.began) {
		r.happened["alone"]++
		if p.alone || r.together[step] {
			r.Errorf("a replaced process of rank %d completes step %d, with others or once more", p.rank, step)
		}
		p.alone, r.alone[step] = true, true
		return
	}
	if r.together[step] = true; r.alone[step] {
		r.Errorf("rank %d completes step %d, which a replaced process has completed alone", p.rank, step)
	}
	for rank, v := range votes {
		call := r.calls[v.NumTokens]
		if replaced := call.by.replaced; !replaced.IsZero() {
			r.happened["replaced in a call"]++
			if replaced.Before(call.began) {
				r.Errorf("rank %d completes step %d with a vote of rank %d, whose process was replaced %v before",
					p.rank, v.Step, rank, call.began.Sub(replaced))
			}
		}
	}
}

// end notes that a process takes part no more.
func (r *livesRun) end(p *process, how string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p.ended = true
	r.happened[how]++
}

// fault does something to a process.
func (r *livesRun) fault() {
	r.mu.Lock()
	p := r.current[r.random.IntN(r.bus.size)]
	r.mu.Unlock()
	lasts := r.upTo(4 * time.Second)
	switch r.random.IntN(4) {
	case 0:
		r.note("pause")
		p.freeze()
		time.AfterFunc(lasts, p.thaw)
	case 1:
		r.note("cut")
		p.sever(true)
		time.AfterFunc(lasts, func() { p.sever(false) })
	case 2:
		if r.mayGo(p) {
			r.end(p, "kill")
			p.kill()
			p.lose(ErrClosed)
			r.replace(p.rank)
		}
	case 3:
		if r.mayGo(p) {
			r.note("take over")
			back := func() { p.sever(false) }
			if p.sever(true); r.random.IntN(2) == 0 {
				p.sever(false)
				p.freeze()
				back = p.thaw
			}
			r.replace(p.rank)
			time.AfterFunc(lasts, back)
		}
	}
}

func (r *livesRun) note(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.happened[what]++
}

// mayGo reports whether a process may end. A process that was replaced, and does not know it, can't
// be told from one that was not if nobody is left who knows its successor, which may be paused.
func (r *livesRun) mayGo(p *process) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, old := range r.processes {
		if old.replaced.IsZero() || old.ended {
			continue
		}
		if !slices.ContainsFunc(old.witnesses, func(w *process) bool {
			return w != p && w.replaced.IsZero() && !w.ended
		}) {
			return false
		}
	}
	return true
}

// replace lets another process join as a rank, unless the last one is there again meanwhile.
func (r *livesRun) replace(rank int) {
	for r.over.Err() == nil {
		ctx, cancel := context.WithTimeout(r.over, 20*time.Second)
		s, err := r.bus.join(ctx, rank)
		cancel()
		if err == nil {
			r.enter(rank, s)
			return
		}
		s.kill()
		if r.mu.Lock(); errors.Is(err, ErrRankTaken) && !r.current[rank].ended {
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
	}
	r.Errorf("nobody can join as rank %d", rank)
}

// whole checks that all current processes complete steps now.
func (r *livesRun) whole() {
	agreed := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		for rank, p := range r.current {
			if p.ended {
				r.Errorf("the last process of rank %d has ended", rank)
			}
		}
		return r.agreed
	}
	before := agreed()
	time.Sleep(10 * time.Second)
	// A step takes a tenth of a second, and each rank returns from it.
	if n := agreed() - before; n < 20*r.bus.size {
		r.Errorf("%d ranks have returned from steps %d times in 10 s", r.bus.size, n)
	}
}

// sever breaks the connection of a member, which notices that, or connects it again.
func (s *station) sever(cut bool) {
	s.bus.mu.Lock()
	s.severed = cut
	s.bus.mu.Unlock()
	s.interrupted(!cut)
}

// awake waits until a member is not paused.
func (s *station) awake() {
	for paused := true; paused; {
		s.bus.mu.Lock()
		paused = s.frozen
		s.bus.mu.Unlock()
		if paused {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// replaceRank1 lets a group of three take its first step, cuts rank 1 off, and starts its successor. It
// returns the group with the old rank 1, and the successor.
func replaceRank1(ctx context.Context, t *testing.T, b *bus) (group []*station, again *station) {
	t.Helper()
	group = b.joinAll(t)
	succeed(t, group[0].begin(ctx, 1), group[1].begin(ctx, 1), group[2].begin(ctx, 1))
	group[1].sever(true)
	again, err := b.join(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	return group, again
}

// A process that was cut off and replaced comes back between two votes of a round. The others take
// the step with its successor's vote, and it learns that it has been replaced.
func TestReplacedBetweenVotes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b := newBus(3, 1)
		defer b.killAll()
		group, again := replaceRank1(ctx, t, b)
		old := group[1]
		replaced, first := old.begin(ctx, 2), again.begin(ctx, 2)
		time.Sleep(resendFirst / 5) // so that the old one has not sent its vote again yet
		old.sever(false)
		succeed(t, group[0].begin(ctx, 2), group[2].begin(ctx, 2), first)
		if err := <-replaced; !errors.Is(err, ErrRankTaken) {
			t.Errorf("the one that was replaced got %v, want %v", err, ErrRankTaken)
		}
	})
}

// Two ranks know different processes of a third: the one that joined later has not heard of the
// newer process, which is paused. They don't take a step with different votes.
func TestDifferentLives(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b := newBus(3, 1)
		defer b.killAll()
		group, again := replaceRank1(ctx, t, b)
		old := group[1]
		time.Sleep(time.Second)
		again.freeze()
		old.sever(false)
		group[2].kill()
		later, err := b.join(ctx, 2)
		if err != nil {
			t.Fatal(err)
		}
		zero, two, replaced := group[0].begin(ctx, 2), later.begin(ctx, 2), old.begin(ctx, 2)
		time.Sleep(3 * time.Second)
		if got := fmt.Sprint(group[0].missingVotes()); got != "[1 2]" {
			t.Errorf("rank 0 waits for ranks %s, want the two that count another process of rank 1", got)
		}
		again.thaw()
		succeed(t, zero, two, again.begin(ctx, 2))
		if err := <-replaced; !errors.Is(err, ErrRankTaken) {
			t.Errorf("the one that was replaced got %v, want %v", err, ErrRankTaken)
		}
	})
}

// A rank that was disconnected while the others gave a step up does not take it alone, with votes
// that nobody stands by any more. If they still stand by them, it takes it with them.
func TestReconnectedToOldVotes(t *testing.T) {
	t.Parallel()
	for _, givenUp := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			b := newBus(3, 1)
			group := b.joinAll(t)
			defer b.killAll()
			for _, done := range []<-chan error{
				group[0].begin(t.Context(), 1), group[1].begin(t.Context(), 1), group[2].begin(t.Context(), 1),
			} {
				succeed(t, done)
			}
			ctx, giveUp := context.WithCancel(t.Context())
			defer giveUp()
			waiting := []<-chan error{group[0].begin(ctx, 2), group[1].begin(ctx, 2)}
			time.Sleep(20 * time.Second)
			group[2].sever(true)
			if time.Sleep(time.Second); givenUp {
				giveUp()
				for _, done := range waiting {
					if err := <-done; !errors.Is(err, fwd.ErrRankMissing) {
						t.Errorf("%v, want %v", err, fwd.ErrRankMissing)
					}
				}
			}
			time.Sleep(time.Hour)
			group[2].sever(false)
			time.Sleep(time.Hour)
			began := time.Now()
			late := group[2].begin(t.Context(), 2)
			if givenUp {
				time.Sleep(time.Hour)
				select {
				case err := <-late:
					t.Errorf("a step that the others gave up ends with %v", err)
				default:
				}
				waiting = []<-chan error{group[0].begin(t.Context(), 3), group[1].begin(t.Context(), 3)}
			}
			succeed(t, append(waiting, late)...)
			if took := time.Since(began); !givenUp && took > resendFirst {
				t.Errorf("the votes came after %v, want that the others are asked for them", took)
			}
		})
	}
}
