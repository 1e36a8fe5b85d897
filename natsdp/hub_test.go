// This file tests large groups, and processes with several ranks, at a real server.

package natsdp_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
)

// joinByProcesses makes a group of processes that have some ranks each. It returns the coordinators by
// rank.
func joinByProcesses(t *testing.T, s *server.Server, size int, processes [][]int) []*natsdp.Coordinator {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	name, group := newName(), make([]*natsdp.Coordinator, size)
	var wg sync.WaitGroup
	for i, ranks := range processes {
		opt := natsdp.WithURL(s.ClientURL())
		if i%2 == 1 { // which hears itself
			opt = natsdp.WithConn(connect(t, s))
		}
		wg.Go(func() {
			joined, err := natsdp.JoinRanks(ctx, natsdp.Config{Group: name, Ranks: ranks, Size: size}, opt)
			if err != nil {
				t.Errorf("ranks %v: %v", ranks, err)
				return
			}
			for i, c := range joined {
				group[ranks[i]] = c
			}
		})
	}
	if wg.Wait(); t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { closeAll(group) })
	return group
}

// inThrees returns processes with three ranks each, which are not in a row, and one that has the rest.
func inThrees(size int) (processes [][]int) {
	n := (size + 2) / 3
	for first := range n {
		var ranks []int
		for rank := first; rank < size; rank += n {
			ranks = append(ranks, rank)
		}
		processes = append(processes, ranks)
	}
	slices.Reverse(processes[0])
	return processes
}

func TestConformanceOfProcesses(t *testing.T) {
	s := startServer(t, serverOptions())
	fwdtest.TestCoordinator(t, func(t *testing.T, size int) []fwd.Coordinator {
		return coordinators(joinByProcesses(t, s, size, inThrees(size)))
	})
}

// The ranks of a process get the same slice, so the votes were read once for all of them. Only the hub
// reads each vote as it comes.
func TestProcessReadsVotesOnce(t *testing.T) {
	const size = 20
	s := startServer(t, serverOptions())
	processes := inThrees(size)
	group := joinByProcesses(t, s, size, processes)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for step := uint64(1); ; step++ {
		got := make([][]fwd.Vote, size)
		var wg sync.WaitGroup
		for rank, c := range group {
			wg.Go(func() {
				var err error
				if got[rank], err = c.Exchange(ctx, fwd.Vote{Step: step}); err != nil {
					t.Errorf("rank %d, step %d: %v", rank, step, err)
				}
			})
		}
		if wg.Wait(); t.Failed() {
			t.FailNow() // also if the slices were never the same
		}
		shared := true
		for _, ranks := range processes {
			ranks = slices.DeleteFunc(slices.Clone(ranks), func(rank int) bool { return rank == 0 })
			for _, rank := range ranks[1:] {
				shared = shared && &got[rank][0] == &got[ranks[0]][0]
			}
		}
		if shared { // which they need not be if a rank was so late that the hub has passed on others before
			return
		}
	}
}

// The server delivers at most four messages a rank and step, and few when ranks join.
func TestDeliveriesOfServer(t *testing.T) {
	for _, size := range []int{16, 256} {
		if size > 16 && natsdp.RaceDetector {
			continue // joining takes so long then that ranks ask again
		}
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const steps = 10
			s := startServer(t, serverOptions())
			group := joinAll(t, newName(), size, at(s))
			if n := delivered(t, s); n > int64(30*size) {
				t.Errorf("%d deliveries until all have joined, want at most %d", n, 30*size)
			}
			before := delivered(t, s)
			for step := uint64(1); step <= steps; step++ {
				together(t, group, step)
			}
			if n := delivered(t, s) - before; n > int64(4*size*steps) {
				t.Errorf("%d deliveries in %d steps of %d ranks, want at most four a rank", n, steps, size)
			}
			for rank, c := range group {
				if stats := c.Stats(); stats.Resent != 0 {
					t.Fatalf("rank %d has sent votes again: %+v", rank, stats)
				}
			}
		})
	}
}

// delivered returns how many messages a server has sent.
func delivered(t *testing.T, s *server.Server) int64 {
	t.Helper()
	v, err := s.Varz(nil)
	if err != nil {
		t.Fatal(err)
	}
	return v.OutMsgs
}

// One message goes out for all ranks of a process, and those of a process meet in memory.
func TestOneMessageForAProcess(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	group := joinByProcesses(t, s, 8, [][]int{{0, 1, 2, 3}, {4, 5, 6, 7}})
	time.Sleep(100 * time.Millisecond) // for what joining has left to say
	const steps = 50
	before := delivered(t, s)
	for step := uint64(1); step <= steps; step++ {
		together(t, group, step)
	}
	// One message from each process to the other, and to itself if its connection has an echo: three. A
	// process whose ranks don't vote together sends more. With a message for each rank it would be twelve.
	if n := delivered(t, s) - before; n < 2*steps || n > 10*steps {
		t.Errorf("%d deliveries in %d steps", n, steps)
	}
	alone := joinByProcesses(t, s, 3, [][]int{{2, 0, 1}})
	before = delivered(t, s)
	together(t, alone, 1)
	if n := delivered(t, s) - before; n != 0 {
		t.Errorf("%d deliveries in a step of one process", n)
	}
}

// Ranks is for JoinRanks, and Rank for Join. What can't be is refused.
func TestJoinRanksConfig(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	opt := natsdp.WithURL(s.ClientURL())
	many := make([]int, 1<<12)
	for i := range many {
		many[i] = 2 * i
	}
	for want, cfg := range map[string]natsdp.Config{
		"Config.Ranks is []":             {Group: "g", Size: 2},
		"Config.Rank is 1":               {Group: "g", Size: 2, Rank: 1, Ranks: []int{0}},
		"rank 2 of 2":                    {Group: "g", Size: 2, Ranks: []int{0, 2}},
		"rank -1 of 2":                   {Group: "g", Size: 2, Ranks: []int{-1}},
		"rank 1 twice in":                {Group: "g", Size: 2, Ranks: []int{1, 1}},
		"servers take 4096; use a short": {Group: "g", Size: 1 << 14, Ranks: many},
	} {
		_, err := natsdp.JoinRanks(t.Context(), cfg, opt)
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+.100v: %v, want %s", cfg, err, want)
		}
	}
	_, err := natsdp.Join(t.Context(), natsdp.Config{Group: "g", Size: 2, Ranks: []int{0}}, opt)
	if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), "use JoinRanks") {
		t.Errorf("Join with Ranks: %v", err)
	}
}

// If one rank of a process can't join, none does, and the others are free for the next process.
func TestJoinRanksAllOrNone(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cfg := natsdp.Config{Group: newName(), Size: 3, Ranks: []int{0, 1}}
	first := make(chan []*natsdp.Coordinator, 1)
	go func() {
		joined, err := natsdp.JoinRanks(ctx, cfg, natsdp.WithURL(s.ClientURL()))
		if err != nil {
			t.Error(err)
		}
		first <- joined
	}()
	opt := natsdp.WithURL(s.ClientURL())
	two, err := natsdp.Join(ctx, natsdp.Config{Group: cfg.Group, Size: 3, Rank: 2}, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	group := append(<-first, two)
	together(t, group, 1)
	rival := cfg
	rival.Ranks = []int{1, 2}
	if _, err := natsdp.JoinRanks(ctx, rival, opt); !errors.Is(err, natsdp.ErrRankTaken) {
		t.Errorf("ranks that others have: %v, want %v", err, natsdp.ErrRankTaken)
	}
	together(t, group, 2)
	// The ranks of a process leave one by one, and the last closes the connection.
	group[0].Close()
	if s.NumClients() != 2 {
		t.Errorf("%d connections after one of two ranks has left, want 2", s.NumClients())
	}
	group[1].Close()
	waitFor(t, "the end of the connection", func() bool { return s.NumClients() == 1 })
	again, err := natsdp.JoinRanks(ctx, cfg, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(again)
	step := uint64(3)
	together(t, append(again, two), step)
}
