// This file counts in simulated time what a large group costs, and tests what becomes of it without
// its hub.

package natsdp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
)

// steps lets all ranks take steps, in which rank r comes when wait(r) has gone by.
func takeSteps(t *testing.T, group []*station, from, n uint64, wait func(rank int) time.Duration) {
	t.Helper()
	var wg sync.WaitGroup
	for rank, s := range group {
		wg.Go(func() {
			for step := from; step < from+n; step++ {
				time.Sleep(wait(rank))
				votes, err := s.Exchange(t.Context(), fwd.Vote{Step: step, NumTokens: rank, NumTokensPadded: rank})
				if err != nil {
					t.Errorf("rank %d, step %d: %v", rank, step, err)
					return
				}
				for other, v := range votes {
					if v.Step != step || v.NumTokens != other {
						t.Errorf("rank %d, step %d: the vote of rank %d is %+v", rank, step, other, v)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// A step costs at most four deliveries for each rank, in whatever order ranks come and however late
// some are, and no vote is sent again. Nor does a group greet each other one by one.
func TestDeliveriesGrowWithTheRanks(t *testing.T) {
	t.Parallel()
	const late = 500 * time.Millisecond
	for size, steps := range map[int]uint64{16: 20, 64: 10, 256: 4, 1024: 1} {
		part := func(n int, of time.Duration) time.Duration { return of * time.Duration(n) / time.Duration(size) }
		for name, wait := range map[string]func(rank int) time.Duration{
			"together":    func(int) time.Duration { return 0 },
			"one by one":  func(rank int) time.Duration { return time.Duration(rank) * 100 * time.Microsecond },
			"one is late": func(rank int) time.Duration { return time.Duration(rank/(size-1)) * late },
			"hub is late": func(rank int) time.Duration { return time.Duration((size-rank)/size) * late },
			"spread": func(rank int) time.Duration {
				return part(rank*7%size, 2*late)
			},
			"halves apart": func(rank int) time.Duration { return time.Duration(rank%2) * late },
		} {
			if size == 1024 && (RaceDetector || name != "together" && name != "one is late") {
				continue // which take seconds, and minutes with the race detector
			}
			synctest.Test(t, func(t *testing.T) {
				b := newBus(size, 1)
				defer b.killAll()
				group := b.joinAll(t)
				if n, most := b.delivered.Load(), int64(16*size); n > most {
					t.Errorf("%d ranks join with %d deliveries, want at most %d", size, n, most)
				}
				time.Sleep(time.Second)
				before := b.delivered.Load()
				takeSteps(t, group, 1, steps, wait)
				if n, most := b.delivered.Load()-before, 4*int64(size)*int64(steps); n > most {
					t.Errorf("%d ranks, %s: %d deliveries in %d steps, want at most %d", size, name, n, steps, most)
				}
				for _, s := range group {
					s.look(func(m *member) {
						if m.stats.Resent != 0 || m.stats.Duplicates != 0 {
							t.Errorf("%d ranks, %s: rank %d has counted %+v", size, name, m.rank, m.stats)
						}
					})
				}
			})
		}
	}
}

// The hellos that the hub tells a rank while the group begins may come after the group has begun. They are
// not answered, unlike the hub's own, which may ask before it leaves.
func TestHelloComesLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size, rank = 20, 5
		b := newBus(size, 1)
		defer b.killAll()
		group := b.joinAll(t)
		time.Sleep(time.Second)
		var hellos [][]byte
		for other, s := range group {
			if other != rank {
				hellos = append(hellos, s.greeting())
			}
		}
		before := b.delivered.Load()
		told := bundles(group[0].message(kindBundle), hellos, defaultPayload)[0]
		hear([]*member{group[rank].member}, newSpeaker([]int{0}), true, told)
		time.Sleep(time.Second)
		if n := b.delivered.Load() - before; n != 1 {
			t.Errorf("%d deliveries after the hellos of all, want an answer to the hub", n)
		}
	})
}

// All ranks name the vote that came last to the hub, and those that are missing.
func TestHubTellsWhoIsLast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 20
		b := newBus(size, 1)
		defer b.killAll()
		group := b.joinAll(t)
		for step, last := range []int{7, 0, 19} {
			var begun []<-chan error
			for rank, s := range group {
				if rank != last {
					begun = append(begun, s.begin(t.Context(), uint64(step+1)))
				}
			}
			time.Sleep(time.Second / 4)
			for rank, s := range group {
				if got := s.missingVotes(); rank != last && !slices.Equal(got, []int{last}) {
					t.Errorf("rank %d names ranks %v as missing, want [%d]", rank, got, last)
				}
			}
			succeed(t, append(begun, group[last].begin(t.Context(), uint64(step+1)))...)
			for rank, s := range group {
				if got := s.lastVote(); got != last {
					t.Errorf("rank %d names rank %d as the last, want %d", rank, got, last)
				}
			}
		}
	})
}

// However many ranks come one after the other, whoever looks twice within a second learns who is missing.
func TestMissingOneByOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 20
		b := newBus(size, 1)
		defer b.killAll()
		group := b.joinAll(t)
		var begun []<-chan error
		for last := range size - 1 {
			begun = append(begun, group[last].begin(t.Context(), 1))
			time.Sleep(time.Second)
			for rank := range last + 1 {
				group[rank].missingVotes()
			}
			time.Sleep(10 * time.Millisecond)
			for rank := range last + 1 {
				if got := group[rank].missingVotes(); len(got) != size-1-last || got[0] != last+1 {
					t.Errorf("rank %d names ranks %v as missing, want %d to %d", rank, got, last+1, size-1)
				}
			}
		}
		succeed(t, append(begun, group[size-1].begin(t.Context(), 1))...)
	})
}

// A rank that can't wait any longer ends the round for all, and all name who was missing: a rank, some,
// or the hub, whether that does nothing or is gone.
func TestMissingThroughHub(t *testing.T) {
	t.Parallel()
	for _, missing := range [][]int{{5}, {0}, {1, 2, 19}, {0, 3}} {
		for _, gone := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				missingThroughHub(t, missing, gone)
			})
		}
	}
}

func missingThroughHub(t *testing.T, missing []int, gone bool) {
	const size = 20
	b := newBus(size, 1)
	defer b.killAll()
	group := b.joinAll(t)
	want := missing
	for _, rank := range missing {
		if gone {
			group[rank].kill()
		}
		if gone && rank == 0 {
			want = []int{0} // nobody knows of others without it
		}
	}
	var begun []<-chan error
	for rank, s := range group {
		if !slices.Contains(missing, rank) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begun = append(begun, s.begin(ctx, 1))
		}
	}
	for _, done := range begun {
		err := <-done
		rankErr := (*fwd.RankError)(nil)
		if !errors.Is(err, fwd.ErrRankMissing) || !errors.As(err, &rankErr) || !slices.Equal(rankErr.Ranks, want) {
			t.Errorf("without ranks %v, gone %t: %v", missing, gone, err)
		}
	}
	if most := int64(24 * size); b.delivered.Load() > 16*size+most {
		t.Errorf("%d deliveries", b.delivered.Load())
	}
	if gone {
		return
	}
	begun = nil
	for _, s := range group {
		begun = append(begun, s.begin(t.Context(), 2))
	}
	succeed(t, begun...)
}

// A hub that is started again takes its place, and so do other ranks of a large group.
func TestRestartInLargeGroup(t *testing.T) {
	t.Parallel()
	for _, restarted := range [][]int{{0}, {9}, {0, 9}, {3, 4, 5}} {
		synctest.Test(t, func(t *testing.T) {
			const size = 20
			b := newBus(size, 1)
			defer b.killAll()
			group := b.joinAll(t)
			takeSteps(t, group, 1, 3, func(int) time.Duration { return 0 })
			var waiting []<-chan error
			for rank, s := range group {
				if !slices.Contains(restarted, rank) {
					waiting = append(waiting, s.begin(t.Context(), 4))
				}
			}
			for _, rank := range restarted {
				group[rank].kill()
				group[rank].lose(ErrClosed)
			}
			var wg sync.WaitGroup
			for _, rank := range restarted {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					again, err := b.join(ctx, rank)
					if err != nil {
						t.Errorf("%v: rank %d started again: %v", restarted, rank, err)
					}
					group[rank] = again
				})
			}
			wg.Wait()
			if t.Failed() {
				t.FailNow()
			}
			for _, rank := range restarted {
				waiting = append(waiting, group[rank].begin(t.Context(), 1))
			}
			succeed(t, waiting...)
			step := uint64(0)
			group[1].look(func(m *member) { step = m.step })
			takeSteps(t, group, step+1, 3, func(int) time.Duration { return 0 })
		})
	}
}

// Bundles are split where a message may not be so large.
func TestBundlesAreSplit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 40
		b := newBus(size, 1)
		defer b.killAll()
		group := b.joinAll(t)
		for _, s := range group {
			s.setMost(1000)
		}
		takeSteps(t, group, 1, 3, func(int) time.Duration { return 0 })
		if n := b.longest.Load(); n > 16*1024 { // of greetings, before
			t.Errorf("a message of %d bytes", n)
		}
	})
}

// What is packed comes back, whatever the limit.
func TestBundles(t *testing.T) {
	head := message{group: 1, size: 20, rank: 3}
	var messages [][]byte
	for n := range 50 {
		messages = append(messages, head.encode()[:20+n%20])
	}
	for _, most := range []int{1, 50, 200, 1000, 1 << 20} {
		var got [][]byte
		for _, data := range bundles(head, messages, most) {
			if len(data) > most && isBundle(data) {
				t.Errorf("a bundle of %d bytes, want at most %d", len(data), most)
			}
			got = slices.AppendSeq(got, unbundle(data))
		}
		if fmt.Sprint(got) != fmt.Sprint(messages) {
			t.Errorf("%d of %d messages come back with at most %d bytes", len(got), len(messages), most)
		}
	}
}
