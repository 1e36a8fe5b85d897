// This file tests in simulated time how ranks join, and for how long they wait.

package natsdp

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// A Join that gave up leaves nothing behind: the next one of its rank does not wait for an
// objection that cannot come.
func TestGivenUpJoin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		go b.join(t.Context(), 0)
		for range 3 { // rank 2 is missing
			ctx, cancel := context.WithTimeout(t.Context(), claimWait/2)
			_, err := b.join(ctx, 1)
			cancel()
			var rankErr *fwd.RankError
			if !errors.As(err, &rankErr) || !errors.Is(err, fwd.ErrRankMissing) ||
				!slices.Equal(rankErr.Ranks, []int{2}) {
				t.Errorf("without rank 2: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
		go b.join(t.Context(), 2)
		ctx, cancel := context.WithTimeout(t.Context(), claimWait/2)
		defer cancel()
		if _, err := b.join(ctx, 1); err != nil {
			t.Error(err)
		}
		b.killAll()
	})
}

// killAll ends all members.
func (b *bus) killAll() {
	b.mu.Lock()
	stations := slices.Clone(b.stations)
	b.mu.Unlock()
	for _, s := range stations {
		s.lose(ErrClosed)
	}
}

// If the clock of a rank's last host was ahead, all that want its place are behind, and choose an
// epoch by what they are told. Still one of them gets it, even if they have not heard of each
// other.
func TestOneGetsTheRankBehind(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			b := newBus(2, seed)
			ahead := b.attach(1)
			ahead.epoch += uint64(time.Hour)
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := ahead.join(ctx); err != nil {
					t.Error(err)
				}
			})
			if _, err := b.join(ctx, 0); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			ahead.kill()
			b.delay, b.loss = 20*time.Millisecond, 0.3
			got := make([]*station, 3)
			for i := range got {
				wg.Go(func() {
					s, err := b.join(ctx, 1)
					if err == nil {
						got[i] = s
					} else if !errors.Is(err, ErrRankTaken) {
						t.Errorf("seed %d: %v", seed, err)
					}
				})
			}
			wg.Wait()
			time.Sleep(time.Second) // those that have lost the rank again are told, as long as they speak
			for _, s := range got {
				if s != nil {
					s.ask(toAll)
				}
			}
			time.Sleep(time.Second)
			synctest.Wait()
			got = slices.DeleteFunc(got, func(s *station) bool { return s == nil })
			for i, s := range got {
				for _, other := range got[:i] {
					if s.epoch == other.epoch {
						t.Errorf("seed %d: two processes have rank 1 in epoch %d", seed, s.epoch)
					}
				}
			}
			if len(got) == 0 {
				t.Errorf("seed %d: nobody has rank 1", seed)
			}
		})
	}
}

// Nobody joins by the answer of a process that may still have to give way: the votes of the rank's
// last process count.
func TestAskerDoesNotAnswerClaims(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		group := b.joinAll(t)
		group[1].end()
		group[2].freeze()
		asker := b.attach(2)
		refused := make(chan error, 1)
		go func() { refused <- asker.join(t.Context()) }()
		time.Sleep(time.Millisecond)
		joined := make(chan error, 1)
		again := b.attach(1)
		go func() { joined <- again.join(t.Context()) }()
		time.Sleep(claimWait / 2)
		select {
		case err := <-joined:
			t.Errorf("rank 1 has joined without rank 2: %v", err)
		default:
		}
		group[2].thaw()
		if err := <-refused; !errors.Is(err, ErrRankTaken) {
			t.Errorf("the asker: %v, want %v", err, ErrRankTaken)
		}
		if err := <-joined; err != nil {
			t.Error(err)
		}
	})
}

// A rank that waits for another asks that one, and not the others again and again.
func TestWaitingIsQuiet(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 8
		b := newBus(size, 1)
		for rank := range size - 1 {
			go b.join(t.Context(), rank)
		}
		time.Sleep(time.Second)
		before := b.delivered.Load()
		time.Sleep(time.Minute)
		if n := b.delivered.Load() - before; n > 60*size { // each asks once a second, and hears itself
			t.Errorf("%d messages in a minute", n)
		}
		b.killAll()
	})
}

// A round may end at two steps: at one for ranks that had all votes, which were for different
// steps, and at another for those that had not. The group is at the higher one.
func TestJoinAtTheHigherStep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newBus(3, 1).attach(0)
		for rank, step := range map[int]uint64{1: 40, 2: 90} {
			msg := message{
				kind: kindState, group: s.group, size: 3, rank: rank, epoch: s.epoch + 1,
				round: 7, step: step, holds: true, asker: s.epoch,
			}
			s.handle(rank, true, msg.encode())
		}
		if s.round != 7 || s.step != 90 {
			t.Errorf("round %d, step %d, want 7 and 90", s.round, s.step)
		}
	})
}

// A rank that hears a message of version 1 while it joins gives up, and says which versions there
// are. A group that is together counts such messages and goes on.
func TestVersion1(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(3, 1)
		joining := b.attach(0)
		refused := make(chan error, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		go func() { refused <- joining.join(ctx) }()
		synctest.Wait()
		joining.handle(1, false, version1("sim"))
		err := <-refused
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), versionError{version: 1}.Error()) {
			t.Errorf("joining: %v, want that rank 1 speaks version 1", err)
		}
		joining.kill()

		group := b.joinAll(t)
		waits := group[0].begin(t.Context(), 1)
		synctest.Wait()
		group[0].handle(1, false, version1("sim"))
		if got := group[0].missingVotes(); !slices.Equal(got, []int{1, 2}) {
			t.Errorf("after a vote of version 1, ranks %v are missing, want [1 2]", got)
		}
		succeed(t, waits, group[1].begin(t.Context(), 1), group[2].begin(t.Context(), 1))
		group[0].mu.Lock()
		defer group[0].mu.Unlock()
		if group[0].stats.Foreign != 1 {
			t.Errorf("%d foreign messages, want 1", group[0].stats.Foreign)
		}
	})
}

// A rank of another version that asks a group learns from the answer which version that speaks. It
// would not get one for anything else.
func TestOtherVersionGetsAnAnswer(t *testing.T) {
	t.Parallel()
	var answers [][]byte
	m := newMember("sim", 0, 3, func(to int, data []byte) {
		if to == 1 {
			answers = append(answers, data)
		}
	})
	m.phase = joined
	for _, k := range []kind{kindHello, kindClaim, kindVote, kindState} {
		later := version1("sim")
		later[2], later[3] = version+1, byte(k)
		m.handle(1, false, later)
	}
	if len(answers) != 2 {
		t.Fatalf("%d answers, want one to each of two questions", len(answers))
	}
	for _, b := range answers {
		if !strings.HasPrefix(string(b), magic+string(rune(version))) {
			t.Errorf("the answer %x does not begin with the version", b)
		}
	}
}

// A process whose clock is more than a day ahead of the others' does not join a group, and learns
// why. So do those that join together with it: theirs may be the wrong ones.
func TestClocksOfDifferentDays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(2, 1)
		defer b.killAll()
		join := func(rank int, ahead time.Duration) <-chan error {
			s := b.attach(rank)
			s.epoch += uint64(ahead)
			done := make(chan error, 1)
			go func() { done <- s.join(t.Context()) }()
			return done
		}
		wrong, right := join(0, 25*time.Hour), join(1, 0)
		for clock, done := range map[string]<-chan error{"clock of rank 0": wrong, "clock of rank 1": right} {
			if err := <-done; !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), clock) {
				t.Errorf("%v, want an error that names the %s", err, clock)
			}
		}
		b.joinAll(t)
		if err := <-join(1, 25*time.Hour); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("joining a group that is together: %v, want %v", err, fwd.ErrInvalid)
		}
	})
}
