// This file has helpers that other files share.

package natsdp_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// patience is how long something may take that must happen.
const patience = 20 * time.Second

// serverOptions are those of a server on a free port of the loopback interface.
func serverOptions() *server.Options {
	return &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
		// The server remembers connections that have gone, which would look like a leak of natsdp.
		MaxClosedClients: 1,
	}
}

// startServer starts a server, which ends with the test.
func startServer(t *testing.T, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopServer(s) })
	s.Start()
	if !s.ReadyForConnections(patience) {
		t.Fatal("the server does not start")
	}
	return s
}

func stopServer(s *server.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

var groups atomic.Int64

// newName returns the name of a group that no other test uses.
func newName() string { return fmt.Sprintf("group%d", groups.Add(1)) }

// joinAll makes a group that ends with the test. Each rank has the options that how returns for it.
func joinAll(t *testing.T, name string, size int, how func(rank int) []natsdp.Option) []*natsdp.Coordinator {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	group := make([]*natsdp.Coordinator, size)
	var wg sync.WaitGroup
	for rank := range group {
		opts := how(rank)
		wg.Go(func() {
			c, err := natsdp.Join(ctx, natsdp.Config{Group: name, Rank: rank, Size: size}, opts...)
			if err != nil {
				t.Errorf("rank %d: %v", rank, err)
			}
			group[rank] = c
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { closeAll(group) })
	return group
}

// closeAll closes coordinators concurrently, as processes that end would.
func closeAll(group []*natsdp.Coordinator) {
	var wg sync.WaitGroup
	for _, c := range group {
		wg.Go(func() { c.Close() })
	}
	wg.Wait()
}

// at returns the option to reach a server.
func at(s *server.Server, opts ...nats.Option) func(int) []natsdp.Option {
	return func(int) []natsdp.Option { return []natsdp.Option{natsdp.WithURL(s.ClientURL(), opts...)} }
}

// joinByConns makes a group whose ranks have connections that belong to the test.
func joinByConns(t *testing.T, s *server.Server, name string, size int) (
	group []*natsdp.Coordinator, conns []*nats.Conn,
) {
	t.Helper()
	group = joinAll(t, name, size, func(int) []natsdp.Option {
		conn := connect(t, s)
		conns = append(conns, conn)
		return []natsdp.Option{natsdp.WithConn(conn)}
	})
	return group, conns
}

// connect returns a connection, which ends with the test.
func connect(t *testing.T, s *server.Server, opts ...nats.Option) *nats.Conn {
	t.Helper()
	conn, err := natsdp.Connect(t.Context(), s.ClientURL(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

func coordinators(group []*natsdp.Coordinator) []fwd.Coordinator {
	out := make([]fwd.Coordinator, len(group))
	for i, c := range group {
		out[i] = c
	}
	return out
}

// The errors of the package have the word for error.type behind them.
func TestErrorTypes(t *testing.T) {
	for err, want := range map[error]string{natsdp.ErrRankTaken: "rank_taken", natsdp.ErrClosed: "closed"} {
		var typed interface{ ErrorType() string }
		if !errors.As(fmt.Errorf("wrapped: %w", err), &typed) || typed.ErrorType() != want {
			t.Errorf("%v has no error type %q", err, want)
		}
	}
}
