// This file tests how a server is reached that is not ready, and what is said about it.

package natsdp_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// No error shows a password or a token, whatever is wrong with the URL.
func TestNoSecretInErrors(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	opts.Users = []*server.User{{Username: "u", Password: "right"}}
	s := startServer(t, opts)
	addr := s.Addr().String()
	const secret = "hunter2"
	for _, url := range []string{
		"nats://u:hunter2%zz@" + addr, "nats://hunter2%zz@" + addr, "u:hunter2%zz@" + addr,
		"nats://u:hunter2@" + addr, "nats://hunter2@" + addr, "u:hunter2@" + addr, "hunter2@" + addr,
		"nats://u:hunter2", "nats://" + addr + ",nats://u:hunter2%zz@" + addr, "x://u:hunter2\x7f@" + addr,
		"nats://u:hunter2@127.0.0.1:1", "nats://u:hunter2@[::1", "tls://u:hunter2@" + addr,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		conn, err := natsdp.Connect(ctx, url)
		cancel()
		if conn != nil {
			conn.Close()
		}
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", url, err)
		}
	}
}

// A server that is full is waited for until it has room, or ctx ends. The error then says what the
// last attempt met: the server's word or, where the server has hung up before, a broken connection.
func TestFullServer(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	opts.MaxConn = 1
	s := startServer(t, opts)
	first, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	enough, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = natsdp.Connect(enough, s.ClientURL())
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), ": ") {
		t.Errorf("%v, want what Connect has met, and why it waits no longer", err)
	}
	time.AfterFunc(100*time.Millisecond, first.Close)
	connect(t, s)
}

// A server that has no time to let anybody in is waited for.
func TestBusyServer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() {
		for range 3 {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "INFO {\"server_id\":\"x\",\"max_payload\":1048576}\r\n")
			in := bufio.NewReader(c)
			_, _ = in.ReadString('\n') // CONNECT
			_, _ = in.ReadString('\n') // PING
			fmt.Fprint(c, "-ERR 'Authentication Timeout'\r\n")
			c.Close()
		}
		cancel()
	}()
	_, err = natsdp.Connect(ctx, "nats://"+l.Addr().String())
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that Connect waits until its ctx ends", err)
	}
}

// syncBuffer is a buffer for goroutines that write concurrently.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// password lets in whoever has it. It can be changed while a server runs.
type password struct{ atomic.Pointer[string] }

func newPassword(s string) *password {
	p := &password{}
	p.Store(&s)
	return p
}

// Check is that of [server.Authentication].
func (p *password) Check(c server.ClientAuthentication) bool {
	return c.GetOpts().Password == *p.Load()
}

// A rank whose credentials the server does not take yet, or no more, keeps trying if it was told to,
// and says so.
func TestRotatedCredentials(t *testing.T) {
	t.Parallel()
	servers, ranks := newPassword("old"), newPassword("new")
	opts := serverOptions()
	opts.CustomClientAuthentication = servers
	s := startServer(t, opts)
	log := &syncBuffer{}
	current := func() (string, string) { return "u", *ranks.Load() }
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	joined := make(chan *natsdp.Coordinator, 1)
	go func() {
		c, err := natsdp.Join(ctx, natsdp.Config{Group: newName(), Size: 1},
			natsdp.WithURL(s.ClientURL(), nats.UserInfoHandler(current)), natsdp.WithRotatedCredentials(),
			natsdp.WithLogger(slog.New(slog.NewTextHandler(log, nil))))
		if err != nil {
			t.Error(err)
		}
		joined <- c
	}()
	says := func(what string) {
		t.Helper()
		waitFor(t, what, func() bool { return strings.Contains(log.String(), what) })
	}
	says("cannot connect yet")
	rotated, again := "new", "newer"
	servers.Store(&rotated)
	c := <-joined
	if c == nil {
		return
	}
	defer c.Close()
	servers.Store(&again)
	disconnectAll(t, s)
	says("RECONNECTING")
	time.Sleep(time.Second) // for some attempts
	ranks.Store(&again)
	says("status=CONNECTED")
	if _, err := c.Exchange(ctx, fwd.Vote{Step: 1}); err != nil {
		t.Error(err)
	}
}

// disconnectAll ends all connections of a server.
func disconnectAll(t *testing.T, s *server.Server) {
	t.Helper()
	conns, err := s.Connz(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range conns.Conns {
		if err := s.DisconnectClientByID(conn.Cid); err != nil {
			t.Error(err)
		}
	}
}

// waitFor waits until something is true that must become true.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not come", what)
		}
	}
}

// The log says who is awaited, who is there, who has left, and that another process has the rank.
func TestLogger(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	log := &syncBuffer{}
	logger := natsdp.WithLogger(slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
	defer cancel()
	cfg := natsdp.Config{Group: name, Rank: 0, Size: 2}
	if _, err := natsdp.Join(ctx, cfg, append(at(s)(0), logger)...); missing(err) == nil {
		t.Fatal(err)
	}
	line := `msg="waiting for ranks" group=` + name + " rank=0 missing=[1]"
	if n := strings.Count(log.String(), line); n < 1 || n > 3 {
		t.Errorf("%d lines say who is awaited in 2.5 s, want at most one a second:\n%s", n, log.String())
	}
	group := joinAll(t, name, 2, func(rank int) []natsdp.Option {
		if rank == 0 {
			return append(at(s)(0), logger)
		}
		return at(s)(rank)
	})
	group[1].Close()
	left := func() bool { return strings.Contains(log.String(), "a rank has left") }
	waitFor(t, "a line for a rank that left", left)
	for _, want := range []string{`msg=joined`, `msg="a rank is there"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, log.String())
		}
	}
}

// Two ranks of a group can't share a connection with nats.NoEcho. Groups can.
func TestNoEcho(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	conn := connect(t, s, nats.NoEcho())
	name := newName()
	shared := func(int) []natsdp.Option { return []natsdp.Option{natsdp.WithConn(conn)} }
	for range 2 { // a rank that has left leaves the connection free
		group := joinAll(t, name, 1, shared)
		together(t, joinAll(t, newName(), 1, shared), 1)
		_, err := natsdp.Join(t.Context(), natsdp.Config{Group: name, Size: 1}, natsdp.WithConn(conn))
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), "NoEcho") {
			t.Errorf("a second rank on the connection: %v, want the reason", err)
		}
		group[0].Close()
	}
}

// A group of three becomes one of two under its name: all leave, then two join. While one has not
// left, Join names it, and it learns why the others are missing. One that joins with the old size
// does not get in.
func TestGroupShrinks(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 3, at(s))
	together(t, group, 1)
	straggler := group[2]
	closeAll(group[:2])
	refused := func(rank, size int, want string) {
		t.Helper()
		_, err := natsdp.Join(t.Context(), natsdp.Config{Group: name, Rank: rank, Size: size}, at(s)(rank)...)
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("joining as rank %d of %d: %v, want %s", rank, size, err, want)
		}
	}
	refused(0, 2, "rank 2 says that the group has 3 ranks")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := straggler.Exchange(ctx, vote(2, 2))
	if missing(err) == nil || !strings.Contains(err.Error(), "rank 0 has left, and says that the group has 2") {
		t.Errorf("the straggler: %v, want that the group has another size", err)
	}
	straggler.Close()
	smaller := joinAll(t, name, 2, at(s))
	together(t, smaller, 1)
	refused(2, 3, "has 2 ranks")
	together(t, smaller, 2)
}
