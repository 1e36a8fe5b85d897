// This file tests the protocol in simulated time, on a network that loses messages.

package natsdp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// bus is a network in simulated time that loses messages, and delivers them twice, late and in
// another order. Members are on it by rank; several may have the same rank.
type bus struct {
	size int

	mu       sync.Mutex
	random   *rand.Rand
	loss     float64
	twice    float64
	delay    time.Duration // at most
	cut      map[int]bool  // ranks to and from which nothing comes
	lossTo   map[way]float64
	hub      bool // small groups have a hub too
	stations []*station

	delivered atomic.Int64 // messages
	longest   atomic.Int64 // bytes of one
}

// way is from one rank to another.
type way struct{ from, to int }

// station is a member's place on the bus.
type station struct {
	*member
	bus     *bus
	killed  bool
	severed bool // nothing gets through, and nothing is kept for it
	frozen  bool // nothing gets through, until it thaws
	held    []func()
}

func newBus(size int, seed uint64) *bus {
	return &bus{
		size: size, random: rand.New(rand.NewPCG(seed, 1)), cut: map[int]bool{}, lossTo: map[way]float64{},
	}
}

// attach adds a member that has not joined yet.
func (b *bus) attach(rank int) *station {
	s := &station{bus: b}
	s.member = newMember("sim", rank, b.size, func(to int, data []byte) { b.send(s, to, data) })
	if b.hub {
		s.member.hub = 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stations = append(b.stations, s)
	return s
}

// join adds a member and joins the group.
func (b *bus) join(ctx context.Context, rank int) (*station, error) {
	s := b.attach(rank)
	err := s.join(ctx)
	if err != nil {
		s.goodbye()
	}
	return s, err
}

// joinAll makes a whole group.
func (b *bus) joinAll(t *testing.T) []*station {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	group := make([]*station, b.size)
	var wg sync.WaitGroup
	for rank := range group {
		wg.Go(func() {
			var err error
			if group[rank], err = b.join(ctx, rank); err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
		})
	}
	wg.Wait()
	return group
}

func (b *bus) send(from *station, to int, data []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if from.killed || from.severed || b.cut[from.rank] {
		return
	}
	for _, s := range b.stations {
		if s == from || to != toAll && s.rank != to || s.killed || s.severed || b.cut[s.rank] ||
			b.random.Float64() < b.loss || b.random.Float64() < b.lossTo[way{from.rank, s.rank}] {
			continue
		}
		b.deliver(from.rank, s, to != toAll, data)
		if b.random.Float64() < b.twice {
			b.deliver(from.rank, s, to != toAll, data)
		}
	}
}

func (b *bus) deliver(from int, s *station, direct bool, data []byte) {
	b.delivered.Add(1)
	b.longest.Store(max(b.longest.Load(), int64(len(data))))
	speaker := newSpeaker([]int{from})
	arrive := func() { hear([]*member{s.member}, speaker, direct, data) }
	if s.frozen {
		s.held = append(s.held, arrive)
		return
	}
	delay := time.Duration(1)
	if b.delay > 0 {
		delay += time.Duration(b.random.Int64N(int64(b.delay)))
	}
	time.AfterFunc(delay, arrive)
}

// handle gives a member one message that has come from a rank.
func (m *member) handle(from int, direct bool, data []byte) {
	msg := message{raw: data, at: time.Now()}
	err := msg.read(m.group, m.size, from)
	m.take(from, direct, &msg, err)
}

// lose makes messages get lost on a way, as often as loss says.
func (b *bus) lose(from, to int, loss float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lossTo[way{from, to}] = loss
}

// isolate cuts a rank off, or connects it again.
func (b *bus) isolate(rank int, cut bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut[rank] = cut
}

// freeze holds back the messages for a member.
func (s *station) freeze() {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	s.frozen = true
}

// kill ends a member without a word.
func (s *station) kill() {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	s.killed = true
}

// end lets a member leave, as a process does before it ends. The network keeps no order, so end
// waits until everything that was sent before has come, and then until the goodbye has come.
func (s *station) end() {
	time.Sleep(time.Millisecond)
	s.leave()
	s.kill()
	time.Sleep(time.Millisecond)
}

// thaw delivers the messages that were held back.
func (s *station) thaw() {
	s.bus.mu.Lock()
	held := s.held
	s.frozen, s.held = false, nil
	s.bus.mu.Unlock()
	for _, arrive := range held {
		arrive()
	}
}

// Exchange, Rank and Size make a station a fwd.Coordinator.
func (s *station) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return s.exchange(ctx, v)
}
func (s *station) Rank() int { return s.rank }
func (s *station) Size() int { return s.size }

// look shows what a member knows.
func (s *station) look(f func(m *member)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s.member)
}

// begin lets a station take a step in a goroutine. Its error comes from the channel.
func (s *station) begin(ctx context.Context, step uint64) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := s.Exchange(ctx, fwd.Vote{Step: step})
		done <- err
	}()
	return done
}

// succeed checks that steps which were begun go well.
func succeed(t *testing.T, begun ...<-chan error) {
	t.Helper()
	for _, done := range begun {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// stepper takes steps as a Runner does.
type stepper struct {
	fwd.Coordinator
	step uint64
}

func (s *stepper) next(ctx context.Context, tokens int) ([]fwd.Vote, error) {
	votes, err := s.Exchange(ctx, fwd.Vote{Step: s.step + 1, NumTokens: tokens, NumTokensPadded: tokens})
	if rankErr := (*fwd.RankError)(nil); errors.As(err, &rankErr) {
		s.step = rankErr.Step
	} else if err == nil {
		s.step = votes[0].Step
	}
	return votes, err
}

// A network that loses, doubles, delays and reorders messages costs only time: no step fails, and
// nothing mixes.
func TestLossyNetwork(t *testing.T) {
	t.Parallel()
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const size, steps = 4, 500
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				b := newBus(size, seed)
				b.loss, b.twice, b.delay = 0.1, 0.1, 5*time.Millisecond
				var wg sync.WaitGroup
				for rank, s := range b.joinAll(t) {
					wg.Go(func() {
						for step := uint64(1); step <= steps; step++ {
							vote := fwd.Vote{Step: step, NumTokens: rank, NumTokensPadded: size + int(step)}
							votes, err := s.Exchange(ctx, vote)
							if err != nil {
								t.Errorf("rank %d, step %d: %v", rank, step, err)
								return
							}
							for other, v := range votes {
								if v.Step != step || v.NumTokens != other || v.NumTokensPadded != size+int(step) {
									t.Errorf("rank %d, step %d: the vote of rank %d is %+v", rank, step, other, v)
								}
							}
						}
						s.leave()
					})
				}
				wg.Wait()
			})
		})
	}
}

// ledger is what the ranks were told, by step.
type ledger struct {
	mu    sync.Mutex
	steps map[uint64][]int // the tokens of all ranks
	given map[int]int      // the rank that voted for so many tokens, which are never the same twice
}

// check notes the votes of a step. Each must be its rank's, and all ranks must be told the same.
func (l *ledger) check(rank int, votes []fwd.Vote) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	tokens := make([]int, len(votes))
	for other, v := range votes {
		if v.Step != votes[0].Step {
			return fmt.Errorf("rank %d: votes of steps %d and %d", rank, votes[0].Step, v.Step)
		}
		if giver, ok := l.given[v.NumTokens]; !ok || giver != other {
			return fmt.Errorf("rank %d: the vote of rank %d is %+v, which rank %d gave", rank, other, v, giver)
		}
		tokens[other] = v.NumTokens
	}
	step := votes[0].Step
	if known, ok := l.steps[step]; ok && !slices.Equal(known, tokens) {
		return fmt.Errorf("rank %d was told %v in step %d, others %v", rank, tokens, step, known)
	}
	l.steps[step] = tokens
	return nil
}

// Ranks stop waiting, die and come back, freeze and thaw, on a network that loses messages. Those
// that get votes for a step get the same ones, and the group is whole again when it is over.
func TestChaos(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { chaos(t, seed, false) })
		})
	}
}

// The same with a hub.
func TestChaosWithHub(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { chaos(t, seed, true) })
		})
	}
}

// chaosRun is one run of TestChaos.
type chaosRun struct {
	*testing.T
	bus    *bus
	ledger *ledger
	seed   uint64
	ranks  []*stepper
	here   atomic.Int64 // ranks that have not been killed

	agreed, failed, restarted []int // by rank
}

func chaos(t *testing.T, seed uint64, hub bool) {
	const size = 4
	c := &chaosRun{
		T: t, bus: newBus(size, seed), seed: seed, ranks: make([]*stepper, size),
		ledger: &ledger{steps: map[uint64][]int{}, given: map[int]int{}},
		agreed: make([]int, size), failed: make([]int, size), restarted: make([]int, size),
	}
	c.bus.loss, c.bus.twice, c.bus.delay, c.bus.hub = 0.05, 0.05, 5*time.Millisecond, hub
	c.here.Store(size)
	ctx, over := context.WithTimeout(t.Context(), 10*time.Minute)
	defer over()
	var wg sync.WaitGroup
	for rank, s := range c.bus.joinAll(t) {
		c.ranks[rank] = &stepper{Coordinator: s}
		wg.Go(func() {
			defer over() // a rank that gives up would let the others wait
			random := rand.New(rand.NewPCG(seed, uint64(rank)))
			for ctx.Err() == nil && c.turn(rank, random) {
			}
		})
	}
	wg.Wait()
	t.Logf("agreed %v, failed %v, restarted %v", c.agreed, c.failed, c.restarted)
	if slices.Min(c.agreed) == 0 || slices.Min(c.failed) == 0 || slices.Max(c.restarted) == 0 {
		t.Error("the test does not do what it should")
	}
	c.calm()
}

// turn lets a rank take a step, which may fail, and then perhaps sleep or die and come back. It
// reports whether the rank can go on.
func (c *chaosRun) turn(rank int, random *rand.Rand) bool {
	milliseconds := func(most int) time.Duration { return time.Duration(random.IntN(most)) * time.Millisecond }
	tokens := c.ledger.vote(rank)
	ctx, cancel := context.WithTimeout(c.Context(), time.Millisecond+milliseconds(2000))
	votes, err := c.ranks[rank].next(ctx, tokens)
	cancel()
	switch {
	case err == nil:
		c.agreed[rank]++
		if err := c.ledger.check(rank, votes); err != nil {
			c.Error(err)
			return false
		}
	case errors.Is(err, fwd.ErrRankMissing) || errors.Is(err, fwd.ErrLockstep):
		c.failed[rank]++
	default:
		c.Errorf("rank %d: %v", rank, err)
	}
	switch random.IntN(60) {
	case 0:
		time.Sleep(milliseconds(3000))
	case 1:
		return c.restart(rank)
	}
	return true
}

// restart kills a rank and lets another process join in its place, unless it is the last one: a
// group of which nobody is left begins anew.
func (c *chaosRun) restart(rank int) bool {
	if c.here.Add(-1) == 0 {
		c.here.Add(1)
		return true
	}
	c.restarted[rank]++
	c.ranks[rank].Coordinator.(*station).kill()
	ctx, cancel := context.WithTimeout(c.Context(), 5*time.Minute)
	defer cancel()
	s, err := c.bus.join(ctx, rank)
	if err != nil {
		c.Errorf("rank %d started again: %v", rank, err)
		return false
	}
	c.ranks[rank] = &stepper{Coordinator: s}
	c.here.Add(1)
	return true
}

// calm checks that the group is whole when nothing gets lost any more. What got lost before may
// still cost a step or two: a rank that never heard that a step was broken takes it alone.
func (c *chaosRun) calm() {
	c.bus.mu.Lock()
	c.bus.loss, c.bus.twice = 0, 0
	c.bus.mu.Unlock()
	together := uint64(0)
	for _, s := range c.ranks {
		together = max(together, s.step+5)
	}
	var wg sync.WaitGroup
	for _, s := range c.ranks {
		wg.Go(func() {
			for s.step < together+5 {
				ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
				votes, err := s.next(ctx, c.ledger.vote(s.Rank()))
				cancel()
				rankErr := (*fwd.RankError)(nil)
				if err != nil && (s.step >= together || !errors.As(err, &rankErr)) {
					c.Errorf("rank %d when all is calm: %v", s.Rank(), err)
					return
				}
				if err == nil {
					if err := c.ledger.check(s.Rank(), votes); err != nil {
						c.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// vote returns tokens that no rank has voted for yet.
func (l *ledger) vote(rank int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	tokens := len(l.given) + 1
	l.given[tokens] = rank
	return tokens
}

// A process does not answer for so long that another joins in its place. When it turns up it is
// told so, and it changes nothing.
func TestFrozen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		group := b.joinAll(t)
		steppers := make([]*stepper, 3)
		for rank, s := range group {
			steppers[rank] = &stepper{Coordinator: s}
		}
		all := func(want error) {
			t.Helper()
			var wg sync.WaitGroup
			for _, s := range steppers {
				wg.Go(func() {
					if _, err := s.next(t.Context(), s.Rank()); !errors.Is(err, want) {
						t.Errorf("rank %d: %v, want %v", s.Rank(), err, want)
					}
				})
			}
			wg.Wait()
		}
		all(nil)
		old := group[1]
		old.freeze()
		s, err := b.join(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		steppers[1] = &stepper{Coordinator: s}
		all(nil)
		// It turns up, and votes before it has heard anything.
		done := make(chan error)
		go func() {
			_, err := old.Exchange(t.Context(), fwd.Vote{Step: 2, NumTokens: 9, NumTokensPadded: 9})
			done <- err
		}()
		synctest.Wait()
		old.thaw()
		if err := <-done; !errors.Is(err, ErrRankTaken) {
			t.Errorf("the frozen one got %v, want %v", err, ErrRankTaken)
		}
		if _, err := old.Exchange(t.Context(), fwd.Vote{Step: 3}); !errors.Is(err, ErrRankTaken) {
			t.Errorf("the next time it got %v, want %v", err, ErrRankTaken)
		}
		for range 3 {
			all(nil)
		}
		for rank, s := range steppers {
			if s.step != 5 {
				t.Errorf("rank %d is at step %d, want 5", rank, s.step)
			}
			member := s.Coordinator.(*station).member
			member.mu.Lock()
			if rank != 1 && member.stats.Stale == 0 {
				t.Errorf("rank %d has counted no vote of the frozen one", rank)
			}
			member.mu.Unlock()
		}
	})
}

// A rank that leaves stays until all others have its last vote. Otherwise a rank that has not got
// it would wait in vain.
func TestLastVote(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		var wg sync.WaitGroup
		group := b.joinAll(t)
		b.isolate(2, true) // until the others are through
		for _, s := range group {
			wg.Go(func() {
				if s.rank == 2 {
					time.Sleep(10 * time.Millisecond)
				}
				if _, err := s.Exchange(t.Context(), fwd.Vote{Step: 1}); err != nil {
					t.Errorf("rank %d: %v", s.rank, err)
				}
				s.leave()
			})
		}
		time.Sleep(time.Millisecond)
		b.isolate(2, false)
		b.isolate(1, true) // rank 2 hears from rank 0 alone, and rank 1 from nobody, until rank 0 leaves
		time.Sleep(200 * time.Millisecond)
		b.isolate(1, false)
		wg.Wait()
	})
}

// A rank that leaves does not stay for the dead.
func TestLeaveTheDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(2, 1)
		group := b.joinAll(t)
		done := group[1].begin(t.Context(), 1)
		if _, err := group[0].Exchange(t.Context(), fwd.Vote{Step: 1}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		group[1].kill()
		began := time.Now()
		group[0].leave()
		if took := time.Since(began); took > lingerMost {
			t.Errorf("leaving took %v", took)
		}
	})
}

// A rank that has left is free immediately: the next process of that rank waits for no objection.
func TestFreeAfterLeaving(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(2, 1)
		group := b.joinAll(t)
		// Nor does it wait for an objection of this one, which gives way.
		if _, err := b.join(t.Context(), 1); !errors.Is(err, ErrRankTaken) {
			t.Errorf("joining beside the process that has the rank: %v, want %v", err, ErrRankTaken)
		}
		group[1].end()
		began := time.Now()
		if _, err := b.join(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took >= claimWait {
			t.Errorf("joining took %v, as if somebody else could have the rank", took)
		}
	})
}

// The clock of a rank's new host may be behind that of its old one.
func TestClockBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b := newBus(2, 1)
		ahead := b.attach(1)
		ahead.epoch += uint64(time.Hour)
		joined := make(chan error)
		go func() { joined <- ahead.join(ctx) }()
		first, err := b.join(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-joined; err != nil {
			t.Fatal(err)
		}
		ahead.kill()
		again, err := b.join(ctx, 1)
		if err != nil {
			t.Fatal(err)
		}
		if again.epoch <= ahead.epoch {
			t.Errorf("the later life has epoch %d, the earlier one %d", again.epoch, ahead.epoch)
		}
		go func() {
			_, err := first.Exchange(ctx, fwd.Vote{Step: 1})
			joined <- err
		}()
		if _, err := again.Exchange(ctx, fwd.Vote{Step: 1}); err != nil {
			t.Error(err)
		}
		if err := <-joined; err != nil {
			t.Error(err)
		}
	})
}

// If several processes want the same rank, one gets it, whenever they begin and however long
// messages take, and the group comes together.
func TestOneGetsTheRank(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		synctest.Test(t, func(t *testing.T) {
			b := newBus(2, seed)
			b.delay = 20 * time.Millisecond
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var wg sync.WaitGroup
			var mu sync.Mutex
			got := make([][]*station, 2)
			random := rand.New(rand.NewPCG(seed, 2))
			for _, rank := range []int{0, 1, 1, 1} {
				begins := time.Duration(random.Int64N(int64(60 * time.Millisecond)))
				wg.Go(func() {
					time.Sleep(begins)
					s, err := b.join(ctx, rank)
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						got[rank] = append(got[rank], s)
					} else if !errors.Is(err, ErrRankTaken) {
						t.Errorf("seed %d, rank %d: %v", seed, rank, err)
					}
				})
			}
			wg.Wait()
			// Two that claimed it at the same moment may both have been told that it is theirs. The earlier
			// one learns otherwise.
			time.Sleep(b.delay)
			synctest.Wait()
			got[1] = slices.DeleteFunc(got[1], func(s *station) bool { return errors.Is(s.dead, ErrRankTaken) })
			if len(got[0]) != 1 || len(got[1]) != 1 {
				t.Fatalf("seed %d: rank 0 is taken %d times, rank 1 %d times", seed, len(got[0]), len(got[1]))
			}
			for rank := range got {
				wg.Go(func() {
					if _, err := got[rank][0].Exchange(ctx, fwd.Vote{Step: 1}); err != nil {
						t.Errorf("seed %d, rank %d: %v", seed, rank, err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// A process that only asks for a rank, and may still have to give way, does not speak for it: the
// holder of the rank goes on when it turns up again.
func TestAskerDoesNotSpeak(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		group := b.joinAll(t)
		group[1].freeze()
		asker := b.attach(1)
		refused := make(chan error)
		go func() { refused <- asker.join(t.Context()) }()
		synctest.Wait()
		// Rank 0 breaks the round. The asker hears of it, and rank 2 does not.
		b.isolate(2, true)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := group[0].Exchange(ended, fwd.Vote{Step: 1}); !errors.Is(err, fwd.ErrRankMissing) {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		b.isolate(2, false)
		b.isolate(0, true) // so that only the asker could answer rank 2
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
		defer stop()
		late := group[2].begin(ctx, 1)
		time.Sleep(10 * time.Millisecond)
		b.isolate(0, false)
		group[1].thaw()
		if err := <-refused; !errors.Is(err, ErrRankTaken) {
			t.Errorf("the asker got %v, want %v", err, ErrRankTaken)
		}
		succeed(t, late, group[0].begin(ctx, 2), group[1].begin(ctx, 2))
	})
}

// A process claims a rank and ends before it has joined. If the last process of that rank turns up
// again, it has lost its place. It is told so, and the next one can join.
func TestClaimerEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		group := b.joinAll(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		group[1].freeze()
		time.Sleep(time.Millisecond) // so that the claimer is a later one
		claimer := b.attach(1)
		claimer.proceed() // to its claim
		claimer.kill()
		time.Sleep(time.Second)
		b.mu.Lock()
		group[1].held = nil // lost
		b.mu.Unlock()
		group[1].thaw()
		if _, err := group[1].Exchange(ctx, fwd.Vote{Step: 1}); !errors.Is(err, ErrRankTaken) {
			t.Errorf("the last one of the rank got %v, want %v", err, ErrRankTaken)
		}
		again, err := b.join(ctx, 1)
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, group[0].begin(ctx, 1), again.begin(ctx, 1), group[2].begin(ctx, 1))
	})
}

// A rank may have completed a round before it died, with a vote of its own that came to nobody. The
// step of that round is not taken again with other votes.
func TestStepIsNotTakenAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(2, 1)
		group := b.joinAll(t)
		errs := make(chan error)
		step := uint64(0)
		go func() {
			votes, err := group[0].Exchange(t.Context(), fwd.Vote{Step: 1})
			if err == nil {
				step = votes[0].Step
			}
			errs <- err
		}()
		time.Sleep(time.Millisecond)
		b.isolate(1, true) // its vote comes to nobody
		if _, err := group[1].Exchange(t.Context(), fwd.Vote{Step: 1}); err != nil {
			t.Fatal(err)
		}
		group[1].kill()
		b.isolate(1, false)
		again, err := b.join(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		votes, err := again.Exchange(t.Context(), fwd.Vote{Step: 1})
		if err != nil {
			t.Fatal(err)
		}
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
		if votes[0].Step != 2 || step != 2 {
			t.Errorf("the ranks agree in steps %d and %d, want 2", step, votes[0].Step)
		}
	})
}

// A rank that hears of a broken step, but not of those before it, has missed them all: it is late,
// and has not been restarted.
func TestLateByMoreThanItHeardOf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(2, 1)
		group := b.joinAll(t)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for step := uint64(1); step <= 3; step++ {
			b.isolate(1, step < 3) // it hears only of the last one
			if _, err := group[0].Exchange(ended, fwd.Vote{Step: step}); !errors.Is(err, fwd.ErrRankMissing) {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		succeed(t, group[0].begin(t.Context(), 4), group[1].begin(t.Context(), 1))
	})
}

// Each rank names the vote that came last to it. A vote that got lost comes last to those that have lost
// it, and not to its own rank. A rank that is out for good names none.
func TestLastOfALostVote(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		group := b.joinAll(t)
		lose := func(loss float64) {
			time.Sleep(time.Millisecond) // the votes so far have come
			b.mu.Lock()
			defer b.mu.Unlock()
			b.loss = loss
		}
		first := group[0].begin(t.Context(), 1)
		lose(1)
		lost := group[1].begin(t.Context(), 1)
		lose(0)
		succeed(t, first, lost, group[2].begin(t.Context(), 1))
		want := []int{1, 2, 1}
		for rank, s := range group {
			if got := s.lastVote(); got != want[rank] {
				t.Errorf("rank %d names %d as the last, want %d", rank, got, want[rank])
			}
		}
		waits := group[0].begin(t.Context(), 2)
		time.Sleep(time.Millisecond)
		group[0].lose(ErrClosed)
		if err := <-waits; !errors.Is(err, ErrClosed) || group[0].lastVote() != -1 {
			t.Errorf("%v, rank %d came last; want ErrClosed and -1", err, group[0].lastVote())
		}
	})
}

// Whoever floods a rank gets few answers: neither votes of rounds that are over, nor those of a life
// that is over, nor questions make it flood others.
func TestFloodIsAnsweredSlowly(t *testing.T) {
	t.Parallel()
	for what, flood := range map[string]func(m *message){
		"votes of a round that is over": func(m *message) { m.kind, m.round = kindVote, 1 },
		"votes of a life that is over":  func(m *message) { m.kind, m.round, m.epoch = kindVote, 1, 1 },
		"questions":                     func(m *message) { m.kind = kindHello },
		"questions of another size":     func(m *message) { m.kind, m.size = kindHello, 9 },
		"votes of the rank itself": func(m *message) {
			m.kind, m.rank, m.epoch, m.round = kindVote, 0, 1, 1
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBus(2, 1)
			group := b.joinAll(t)
			defer b.killAll()
			succeed(t, group[0].begin(t.Context(), 1), group[1].begin(t.Context(), 1))
			time.Sleep(time.Second)
			msg := group[1].message(kindHello)
			flood(&msg)
			group[1].kill()
			sent := 0
			group[0].send = func(int, []byte) { sent++ }
			data := msg.encode()
			for range 10_000 { // in a second
				group[0].handle(msg.rank, false, data)
				time.Sleep(100 * time.Microsecond)
			}
			if most := limitAnswers * int(time.Second/limitInterval+1); sent == 0 || sent > most {
				t.Errorf("%s: %d answers, want some and at most %d", what, sent, most)
			}
		})
	}
}

// One message of a rank, with a number near the end of the range, does not end the group: the rank is
// started again, and all go on.
func TestPoison(t *testing.T) {
	t.Parallel()
	const top = uint64(maxCounter)
	for what, poison := range map[string]func(m *message){
		"a vote in the last round":          func(m *message) { m.kind, m.round = kindVote, top },
		"a vote in the round before":        func(m *message) { m.kind, m.round = kindVote, top-1 },
		"a vote for the last step":          func(m *message) { m.kind, m.vote.Step = kindVote, top },
		"a vote of the last epoch":          func(m *message) { m.kind, m.epoch = kindVote, top },
		"a question of the last epoch":      func(m *message) { m.kind, m.epoch = kindClaim, top },
		"a round that is broken at the end": func(m *message) { m.kind, m.step = kindBroken, top },
		"the last round is broken":          func(m *message) { m.kind, m.round = kindBroken, top },
		"an answer with the last epoch":     func(m *message) { m.kind, m.holder = kindState, top },
		"an answer with the last step":      func(m *message) { m.kind, m.step, m.holds = kindState, top, true },
		"a vote of the day after tomorrow": func(m *message) {
			m.kind, m.epoch = kindVote, latestEpoch()+uint64(24*time.Hour)
		},
	} {
		synctest.Test(t, func(t *testing.T) { poisoned(t, what, poison) })
	}
}

func poisoned(t *testing.T, what string, poison func(m *message)) {
	b := newBus(3, 1)
	group := b.joinAll(t)
	defer b.killAll()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	succeed(t, group[0].begin(ctx, 1), group[1].begin(ctx, 1), group[2].begin(ctx, 1))
	time.Sleep(time.Millisecond)
	msg := group[2].message(kindVote)
	msg.round, msg.vote.Step, msg.by, msg.missing = 2, 2, 2, []int{0, 1}
	poison(&msg)
	group[2].send(toAll, msg.encode())
	time.Sleep(time.Millisecond)
	group[2].kill()
	for rank, s := range group[:2] {
		s.look(func(m *member) {
			if m.stats.Implausible != 1 {
				t.Errorf("%s: rank %d has counted %d of 1", what, rank, m.stats.Implausible)
			}
		})
	}
	for restarted := 2; restarted > 0; restarted-- {
		group[restarted].kill()
		again, err := b.join(ctx, restarted)
		if err != nil {
			t.Fatalf("%s: rank %d can't join any more: %v", what, restarted, err)
		}
		group[restarted] = again
		step := uint64(0)
		group[0].look(func(m *member) { step = m.step + 1 })
		for range 3 {
			succeed(t, group[0].begin(ctx, step), group[1].begin(ctx, step), group[2].begin(ctx, step))
			step++
		}
	}
}

// However many votes skip steps, some steps are left.
func TestStepsAreLeft(t *testing.T) {
	t.Parallel()
	m := newMember("sim", 0, 2, func(int, []byte) {})
	m.phase = joined
	for range 300 {
		before := m.step
		m.step = m.mostStep()
		if m.step <= before || m.step >= maxCounter {
			t.Fatalf("after step %d comes at most %d", before, m.step)
		}
	}
	_, err := m.exchange(t.Context(), fwd.Vote{Step: m.mostStep() + 1})
	if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), fmt.Sprint(m.mostStep())) {
		t.Errorf("a vote that skips too many: %v, want that it names what is possible", err)
	}
}
