// This file tests and measures how bundles with the votes of all ranks are taken.

package natsdp

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
)

// asOneProcess lets all ranks but the hub hear what the hub says to all as ranks of one process do.
func asOneProcess(group []*station) {
	hub := group[0]
	send, speaker := hub.send, newSpeaker([]int{hub.rank})
	var others []*member
	for _, s := range group[1:] {
		others = append(others, s.member)
	}
	hub.look(func(m *member) {
		m.send = func(to int, data []byte) {
			if to != toAll {
				send(to, data)
				return
			}
			time.AfterFunc(1, func() { hear(others, speaker, false, data) })
		}
	})
}

// In each step of an ordinary run the ranks of a process are given the same slice, so the votes were read
// once and taken together.
func TestVotesAreReadOnce(t *testing.T) {
	t.Parallel()
	for _, size := range []int{hubFrom, 64} {
		synctest.Test(t, func(t *testing.T) {
			b := newBus(size, 1)
			defer b.killAll()
			group := b.joinAll(t)
			asOneProcess(group)
			for step := uint64(1); step <= 5; step++ {
				votes := make(chan []fwd.Vote, size)
				for _, s := range group {
					go func() {
						got, err := s.Exchange(t.Context(), fwd.Vote{Step: step})
						if err != nil {
							t.Errorf("rank %d, step %d: %v", s.rank, step, err)
						}
						votes <- got
					}()
				}
				slicesOf := map[*fwd.Vote]int{}
				for range size {
					if got := <-votes; len(got) == size {
						slicesOf[&got[0]]++
					}
				}
				if len(slicesOf) != 2 { // the hub's is the other one
					t.Errorf("%d ranks, step %d: %d slices of votes for the hub and one process", size, step, len(slicesOf))
				}
			}
		})
	}
}

// A rank gets its own vote back as it was, though others get it as it came.
func TestOwnSpanIsNotRemote(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(hubFrom, 1)
		defer b.killAll()
		group := b.joinAll(t)
		asOneProcess(group)
		got := make([][]fwd.Vote, len(group))
		var wg sync.WaitGroup
		for rank, s := range group {
			wg.Go(func() {
				var err error
				got[rank], err = s.Exchange(t.Context(), fwd.Vote{Step: 1, SpanContext: sampleSpan().WithRemote(false)})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for rank, votes := range got {
			for other, v := range votes {
				if remote, want := v.SpanContext.IsRemote(), other != rank; remote != want {
					t.Errorf("to rank %d the span of rank %d is remote: %t, want %t", rank, other, remote, want)
				}
			}
		}
	})
}

// A bundle is a table only if it holds a vote of each rank, and all agree.
func TestWhatIsNoTable(t *testing.T) {
	t.Parallel()
	const size, lives = 3, 7
	state, err := trace.ParseTraceState("a=" + strings.Repeat("b", 100))
	if err != nil {
		t.Fatal(err)
	}
	span := sampleSpan().WithTraceState(state) // so long that it makes up for a vote that is not there
	for what, spoil := range map[string]func(votes []message) []message{
		"":                    func(votes []message) []message { return votes },
		"of one rank twice":   func(votes []message) []message { return append(votes, votes[1]) },
		"of two ranks":        func(votes []message) []message { votes[1].rank = 0; return votes },
		"of no life":          func(votes []message) []message { votes[1].epoch = 0; return votes },
		"with something else": func(votes []message) []message { votes[1].kind = kindReady; return votes },
		"of two rounds":       func(votes []message) []message { votes[1].round++; return votes },
		"of two steps":        func(votes []message) []message { votes[1].vote.Step++; return votes },
		"with other lives":    func(votes []message) []message { votes[1].lives++; return votes },
		"with a question":     func(votes []message) []message { votes[1].asks = true; return votes },
		"of another size":     func(votes []message) []message { votes[1].size++; return votes },
		"of another group":    func(votes []message) []message { votes[1].group++; return votes },
		"one missing":         func(votes []message) []message { return votes[:2] },
		"after a broken round": func(votes []message) []message {
			votes[1].ending = ending{broken: true, missing: []int{2}}
			return votes
		},
	} {
		var votes []message
		var said [][]byte
		for rank := range size {
			votes = append(votes, message{
				kind: kindVote, group: 1, size: size, rank: rank, epoch: 5, round: 1, lives: lives,
				vote: fwd.Vote{SpanContext: span},
			})
		}
		for _, msg := range spoil(votes) {
			said = append(said, msg.encode())
		}
		head := message{group: 1, size: size}
		table := readTable(bundles(head, said, defaultPayload)[0], 1, size, time.Now())
		if got, want := table != nil, what == ""; got != want {
			t.Errorf("votes %s are a table: %t, want %t", what, got, want)
		}
	}
}

// twins are two members in the same state, and the votes of all ranks in the round that is open for them.
type twins struct {
	random         *rand.Rand
	together, each *member // take a bundle as one process does, and message by message
	sent           [2][]string
	votes          []message
}

// newTwins makes twins in a state that depends on the seed.
func newTwins(t *testing.T, seed uint64) *twins {
	random := rand.New(rand.NewPCG(seed, 1))
	w := &twins{random: random}
	size, epoch := 3+random.IntN(4), newEpoch()
	rank := 1 + random.IntN(size-1)
	round, step := random.Uint64N(3), random.Uint64N(3)
	vote := fwd.Vote{Step: step + 1, NumTokens: rank, NumTokensPadded: 8}
	if w.chance(5) {
		vote.SpanContext = sampleSpan().WithRemote(false)
	}
	before := []ending{
		{complete: true}, {complete: true}, {}, {broken: true, by: 1, missing: []int{2}},
	}[random.IntN(4)]
	for i := range w.sent {
		m := newMember("sim", rank, size, func(to int, data []byte) {
			w.sent[i] = append(w.sent[i], fmt.Sprintf("%d: %x", to, data))
		})
		m.hub, m.phase, m.epoch, m.round, m.step, m.ending = 0, joined, epoch, round, step, before
		for other := range size {
			if other != rank {
				m.setEpoch(other, epoch+uint64(other))
			}
		}
		if i == 0 {
			w.together = m
		} else {
			w.each = m
		}
	}
	for other := range size {
		msg := message{
			kind: kindVote, group: w.each.group, size: size, rank: other, epoch: epoch + uint64(other),
			round: round + 1, step: step, vote: vote, lives: w.each.livesKnown(),
			ending: ending{complete: before.complete},
		}
		msg.vote.NumTokens, msg.vote.SpanContext = other, vote.SpanContext
		if other == rank {
			msg.epoch, msg.ending = epoch, before
		}
		w.votes = append(w.votes, msg)
	}
	random.Shuffle(size, func(i, j int) { w.votes[i], w.votes[j] = w.votes[j], w.votes[i] })
	if !w.chance(10) {
		for _, m := range []*member{w.together, w.each} {
			if err := m.begin(vote); err != nil {
				t.Fatal(err)
			}
		}
	}
	return w
}

func (w *twins) chance(of int) bool { return w.random.IntN(of) == 0 }

// spoil changes something in a vote that comes in a bundle.
func (w *twins) spoil(msg *message) {
	less := func(n *uint64) { *n -= min(*n, 1) }
	switch w.random.IntN(15) {
	case 0:
		msg.epoch++
	case 1:
		less(&msg.epoch)
	case 2:
		msg.round++
	case 3:
		less(&msg.round)
	case 4:
		msg.step++
	case 5:
		msg.vote.Step++
	case 6:
		msg.lives++
	case 7:
		msg.full = true
	case 8:
		msg.asks = true
	case 9:
		msg.ending = ending{broken: true, by: 1, missing: []int{0}}
	case 10:
		msg.kind = []kind{kindAsk, kindHello, kindReady, kindBye, kindState}[w.random.IntN(5)]
	case 11:
		msg.rank = w.random.IntN(msg.size)
	case 12:
		msg.group++
	case 13:
		msg.size++
	case 14:
		msg.step = maxCounter
	}
}

// bundle returns the votes in a bundle, mostly as the hub says them.
func (w *twins) bundle() []byte {
	for w.chance(2) {
		w.spoil(&w.votes[w.random.IntN(len(w.votes))])
	}
	var said [][]byte
	for i := range w.votes {
		said = append(said, w.votes[i].encode())
	}
	switch n := w.random.IntN(len(said)); w.random.IntN(8) {
	case 0:
		said = slices.Delete(said, n, n+1)
	case 1:
		said[n] = said[n][:len(said[n])-1]
	case 2:
		said = append(said, said[n])
	}
	head := message{kind: kindBundle, group: w.each.group, size: w.each.size}
	return bundles(head, said, defaultPayload)[0]
}

// state returns all that a bundle can change.
func (w *twins) state(i int, m *member) string {
	how := outcome{}
	select {
	case how = <-m.outcome:
	default:
	}
	text := fmt.Sprint(m.round, m.step, m.ending, m.answer, m.waiting, m.vote, m.last, m.lastRank, m.lives,
		m.voted, m.late, m.lateFrom, m.full, m.cut, m.gaveUp, m.asked.IsZero(), m.dead, m.stats, m.epochs,
		how.votes, how.err, w.sent[i])
	for _, g := range []*gathering{&m.open, &m.next} {
		text += fmt.Sprint(" and ", g.count, g.full, g.voters)
		for rank, by := range g.voters {
			if by.here {
				text += fmt.Sprint(g.votes[rank])
			}
		}
	}
	return text
}

// Votes that come in a bundle do what they do one by one, whatever is wrong with them and whatever state
// their receiver is in.
func TestBundleIsTakenLikeItsMessages(t *testing.T) {
	t.Parallel()
	together := 0
	const seeds = 5000
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(seeds) {
			w := newTwins(t, seed)
			early, lost, back := w.chance(10), w.chance(20), w.chance(2)
			for _, m := range []*member{w.together, w.each} {
				if early {
					m.handle(w.votes[0].rank, false, w.votes[0].encode())
				}
				if lost {
					m.interrupted(back)
				}
			}
			data := w.bundle()
			table := readTable(data, w.each.group, w.each.size, time.Now())
			if table != nil && w.together.completedBy(table) {
				together++
			}
			hear([]*member{w.together}, newSpeaker([]int{0}), false, data)
			for data := range unbundle(data) {
				rank, _ := sayer(data)
				w.each.handle(rank, false, data)
			}
			if got, want := w.state(0, w.together), w.state(1, w.each); got != want {
				t.Fatalf("seed %d: a bundle leads to\n%s\nits messages to\n%s", seed, got, want)
			}
		}
	})
	if together < seeds/10 || together > seeds*9/10 {
		t.Errorf("%d of %d bundles are taken together; the test does not do what it should", together, seeds)
	}
}

// BenchmarkBundle takes the votes of all ranks, for one rank and for eight of a process.
func BenchmarkBundle(b *testing.B) {
	for _, size := range []int{16, 256} {
		for _, per := range []int{1, 8} {
			b.Run(fmt.Sprintf("ranks=%d/per=%d", size, per), func(b *testing.B) {
				members, bundle := waiting(b, size)
				hub, process := newSpeaker([]int{0}), members[1:1+per]
				b.ReportAllocs()
				for b.Loop() {
					hear(process, hub, false, bundle)
					for _, m := range process {
						<-m.outcome
						m.round, m.waiting = 0, true
					}
				}
			})
		}
	}
}

// waiting returns ranks that wait in their first round, and the bundle with the votes of all.
func waiting(b *testing.B, size int) (members []*member, bundle []byte) {
	for rank := range size {
		members = append(members, newMember("sim", rank, size, func(int, []byte) {}))
	}
	var said [][]byte
	for _, m := range members {
		m.phase = joined
		for _, other := range members {
			if other != m {
				m.setEpoch(other.rank, other.epoch)
			}
		}
		if err := m.begin(fwd.Vote{Step: 1, NumTokens: 1, NumTokensPadded: 8, NumReqs: 1}); err != nil {
			b.Fatal(err)
		}
		said = append(said, m.said)
	}
	return members, bundles(members[0].message(kindBundle), said, defaultPayload)[0]
}
