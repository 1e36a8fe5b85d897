// This file tests servers and connections that break.

package natsdp_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// restartServer starts a server again at its old address.
func restartServer(t *testing.T, opts *server.Options, addr net.Addr) *server.Server {
	t.Helper()
	again := opts.Clone()
	again.Port = addr.(*net.TCPAddr).Port
	return startServer(t, again)
}

// A server that is restarted in the middle of a round, again and again, costs time but no step.
func TestServerRestart(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	s := startServer(t, opts)
	group := joinAll(t, newName(), 3, at(s))
	for step := uint64(1); step <= 6; step++ {
		first := []<-chan result{begin(t.Context(), group[step%3], vote(int(step%3), step))}
		if step%2 == 0 {
			time.Sleep(20 * time.Millisecond) // so that its vote comes to the others
		}
		addr := s.Addr()
		stopServer(s)
		for rank, c := range group {
			if rank != int(step%3) {
				first = append(first, begin(t.Context(), c, vote(rank, step)))
			}
		}
		time.Sleep(50 * time.Millisecond)
		s = restartServer(t, opts, addr)
		for _, done := range first {
			agreed(t, -1, receive(t, done), 3, step)
		}
	}
}

// Without a server nothing waits longer than its ctx, and the group is whole again with the server.
func TestServerGone(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	s := startServer(t, opts)
	group := joinAll(t, newName(), 2, at(s))
	together(t, group, 1)
	addr := s.Addr()
	stopServer(s)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	calls := []<-chan result{begin(ctx, group[0], vote(0, 2)), begin(ctx, group[1], vote(1, 2))}
	for rank, done := range calls {
		r := receive(t, done)
		rankErr := missing(r.err)
		if rankErr == nil || !errors.Is(r.err, context.DeadlineExceeded) || rankErr.Step != 2 ||
			!slices.Equal(rankErr.Ranks, []int{1 - rank}) {
			t.Errorf("rank %d: %v, want that rank %d is missing in step 2", rank, r.err, 1-rank)
		}
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("took %v", took)
	}
	restartServer(t, opts, addr)
	together(t, group, 3)
}

// A connection that either side breaks in the middle of a round costs no step.
func TestReconnect(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	group, conns := joinByConns(t, s, newName(), 3)
	for step := uint64(1); step <= 12; step++ {
		rank := int(step % 3)
		first := begin(t.Context(), group[rank], vote(rank, step))
		if step%2 == 0 {
			if err := conns[rank].ForceReconnect(); err != nil {
				t.Fatal(err)
			}
		} else {
			id, err := conns[rank].GetClientID()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.DisconnectClientByID(id); err != nil {
				t.Fatal(err)
			}
		}
		calls := []<-chan result{first}
		for other, c := range group {
			if other != rank {
				calls = append(calls, begin(t.Context(), c, vote(other, step)))
			}
		}
		for _, done := range calls {
			agreed(t, -1, receive(t, done), 3, step)
		}
	}
}

// returns returns what f returns, which is given a ctx that ends soon.
func returns(t *testing.T, what string, f func(ctx context.Context) error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatalf("%s does not return", what)
		return nil
	}
}

// A connection that is being made again, and gets no answer, keeps nobody waiting for longer than
// its ctx says.
func TestReconnectHangs(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	var noAnswer sync.RWMutex // locked while dialing gets none
	dials := make(chan struct{}, 1000)
	conn := connect(t, s, nats.SetCustomDialer(dialerFunc(func() (net.Conn, error) {
		dials <- struct{}{}
		noAnswer.RLock()
		defer noAnswer.RUnlock()
		return net.Dial("tcp", s.Addr().String())
	})))
	group := joinAll(t, newName(), 2, func(rank int) []natsdp.Option {
		if rank == 0 {
			return []natsdp.Option{natsdp.WithConn(conn)}
		}
		return at(s)(rank)
	})
	together(t, group, 1)

	<-dials
	breakConnection := func() (mend func()) {
		id, err := conn.GetClientID()
		if err != nil {
			t.Fatal(err)
		}
		noAnswer.Lock()
		mend = sync.OnceFunc(noAnswer.Unlock)
		t.Cleanup(mend)
		if err := s.DisconnectClientByID(id); err != nil {
			t.Fatal(err)
		}
		<-dials
		return mend
	}
	mend := breakConnection()
	name := newName()
	for what, f := range map[string]func(ctx context.Context) error{
		"Exchange": func(ctx context.Context) error {
			_, err := group[0].Exchange(ctx, vote(0, 2))
			return err
		},
		"Join": func(ctx context.Context) error {
			_, err := natsdp.Join(ctx, natsdp.Config{Group: name, Size: 2}, natsdp.WithConn(conn))
			return err
		},
	} {
		err := returns(t, what, f)
		if missing(err) == nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, want %v and %v", what, err, fwd.ErrRankMissing, context.DeadlineExceeded)
		}
	}
	_ = returns(t, "Stats", func(context.Context) error { _ = group[0].Stats(); return nil })
	_ = returns(t, "Missing", func(context.Context) error { _ = group[0].Missing(); return nil })
	// Rank 1 comes late to the step. Whether or not the other's vote is still on its way, they are
	// together in the next.
	mend()
	first := begin(t.Context(), group[0], vote(0, 3))
	second := receive(t, begin(t.Context(), group[1], vote(1, 2)))
	if second.err == nil && second.votes[0].Step == 2 {
		second = receive(t, begin(t.Context(), group[1], vote(1, 3)))
	}
	agreed(t, 0, receive(t, first), 2, 3)
	agreed(t, 1, second, 2, 3)
	together(t, joinAll(t, name, 2, at(s)), 1) // what the failed Join has sent does not matter

	breakConnection()
	if err := returns(t, "Close", func(context.Context) error { return group[0].Close() }); err != nil {
		t.Error(err)
	}
}

// A connection that is closed for good ends an exchange immediately, and those after it.
func TestConnectionClosed(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	conn := connect(t, s)
	group := joinAll(t, newName(), 2, func(rank int) []natsdp.Option {
		if rank == 0 {
			return []natsdp.Option{natsdp.WithConn(conn)}
		}
		return at(s)(rank)
	})
	done := begin(t.Context(), group[0], vote(0, 1))
	time.Sleep(20 * time.Millisecond)
	conn.Close()
	if r := receive(t, done); !errors.Is(r.err, nats.ErrConnectionClosed) {
		t.Errorf("%v, want %v", r.err, nats.ErrConnectionClosed)
	}
	if r := receive(t, begin(t.Context(), group[0], vote(0, 2))); !errors.Is(r.err, nats.ErrConnectionClosed) {
		t.Errorf("the next: %v, want %v", r.err, nats.ErrConnectionClosed)
	}
}

// Close breaks an open exchange: the others learn immediately who is missing.
func TestClose(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	group := joinAll(t, newName(), 3, at(s))
	together(t, group, 1)
	closed, other := begin(t.Context(), group[0], vote(0, 2)), begin(t.Context(), group[1], vote(1, 2))
	for _, c := range group[:2] {
		for !slices.Equal(c.Missing(), []int{2}) { // until both wait, and have each other's vote
			time.Sleep(time.Millisecond)
		}
	}
	if err := group[0].Close(); err != nil {
		t.Error(err)
	}
	if r := receive(t, closed); !errors.Is(r.err, natsdp.ErrClosed) || !errors.Is(r.err, fwd.ErrRankMissing) {
		t.Errorf("the one that closed: %v, want %v", r.err, natsdp.ErrClosed)
	}
	if r := receive(t, other); !errors.Is(r.err, fwd.ErrRankMissing) || errors.Is(r.err, natsdp.ErrClosed) {
		t.Errorf("the other: %v, want %v alone", r.err, fwd.ErrRankMissing)
	}
	if _, err := group[0].Exchange(t.Context(), vote(0, 3)); !errors.Is(err, natsdp.ErrClosed) {
		t.Errorf("an exchange after Close: %v, want %v", err, natsdp.ErrClosed)
	}
	if err := group[0].Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
}

// A cluster of three servers loses one in the middle of a run: the ranks that were connected to it
// go to the others, and no step fails.
func TestCluster(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	urls := ""
	for i, s := range servers {
		if i > 0 {
			urls += ","
		}
		urls += s.ClientURL()
	}
	group := joinAll(t, newName(), 6, func(rank int) []natsdp.Option {
		// The ranks begin at different servers, and each knows them all.
		return []natsdp.Option{natsdp.WithURL(servers[rank%3].ClientURL()+","+urls, nats.DontRandomize())}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*patience) // only a loaded machine takes long
	defer cancel()
	const steps = 1000
	finished := make(chan error)
	for rank, c := range group {
		go func() {
			for step := uint64(1); step <= steps; step++ {
				votes, err := c.Exchange(ctx, vote(rank, step))
				if err != nil {
					finished <- err
					return
				}
				for other, v := range votes {
					if !isVote(v, other, step) {
						t.Errorf("rank %d in step %d: the vote of rank %d is %+v", rank, step, other, v)
					}
				}
				if rank == 0 && step == steps/2 {
					go stopServer(servers[1])
				}
			}
			finished <- nil
		}()
	}
	for range group {
		if err := <-finished; err != nil {
			t.Error(err)
		}
	}
}

// startCluster starts servers that are one cluster.
func startCluster(t *testing.T, n int) []*server.Server {
	t.Helper()
	var servers []*server.Server
	seed := ""
	for range n {
		opts := serverOptions()
		opts.Cluster = server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: server.RANDOM_PORT}
		if seed != "" {
			opts.Routes = server.RoutesFromStr(seed)
		}
		s := startServer(t, opts)
		if seed == "" {
			seed = "nats://" + s.ClusterAddr().String()
		}
		servers = append(servers, s)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		whole := true
		for _, s := range servers {
			whole = whole && s.NumRoutes() >= n-1
		}
		if whole {
			return servers
		}
		if time.Now().After(deadline) {
			t.Fatal("the cluster does not come together")
		}
	}
}
