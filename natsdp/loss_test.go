// This file tests that coordinators over NATS pass the suite, also if messages get lost in one direction.

package natsdp_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// ear is the connection of a rank that does not hear some others: it leaves their messages out of what
// a server sends.
type ear struct {
	mu   sync.Mutex
	deaf map[int]int // by rank, how many losses there are
}

func newEar() *ear { return &ear{deaf: map[int]int{}} }

// lose makes messages of a rank get lost until end is called.
func (e *ear) lose(from int) (end func()) {
	count := func(n int) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.deaf[from] += n
	}
	count(1)
	return func() { count(-1) }
}

func (e *ear) hears(subject string) bool {
	from, err := strconv.Atoi(subject[strings.LastIndexByte(subject, '.')+1:])
	e.mu.Lock()
	defer e.mu.Unlock()
	return err != nil || e.deaf[from] == 0
}

// Dial makes a connection that hears with e.
func (e *ear) Dial(network, address string) (net.Conn, error) {
	conn, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	return &earConn{Conn: conn, ear: e, in: bufio.NewReader(conn)}, nil
}

type earConn struct {
	net.Conn
	ear  *ear
	in   *bufio.Reader
	left bytes.Buffer // of the last line, or of the last message
}

// Read reads lines of the protocol, and leaves out messages that e does not hear.
func (c *earConn) Read(p []byte) (int, error) {
	for c.left.Len() == 0 {
		line, err := c.in.ReadString('\n')
		if err != nil {
			return 0, err
		}
		c.left.WriteString(line)
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[0] != "MSG" {
			continue
		}
		n, err := strconv.Atoi(fields[len(fields)-1])
		if err != nil {
			return 0, fmt.Errorf("a message without a size: %q", line)
		}
		if _, err := io.CopyN(&c.left, c.in, int64(n)+2); err != nil {
			return 0, err
		}
		if !c.ear.hears(fields[1]) {
			c.left.Reset()
		}
	}
	return c.left.Read(p)
}

// ears makes groups whose ranks can be made deaf to others.
type ears struct {
	server *server.Server
	mu     sync.Mutex
	of     map[fwd.Coordinator]*ear
}

func newEars(t *testing.T) *ears {
	return &ears{server: startServer(t, serverOptions()), of: map[fwd.Coordinator]*ear{}}
}

func (e *ears) newGroup(t *testing.T, size int) []fwd.Coordinator {
	own := make([]*ear, size)
	for rank := range own {
		own[rank] = newEar()
	}
	group := coordinators(joinAll(t, newName(), size, func(rank int) []natsdp.Option {
		return at(e.server, nats.SetCustomDialer(own[rank]))(rank)
	}))
	e.mu.Lock()
	defer e.mu.Unlock()
	for rank, c := range group {
		e.of[c] = own[rank]
	}
	t.Cleanup(func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, c := range group {
			delete(e.of, c)
		}
	})
	return group
}

func (e *ears) lose(_ *testing.T, group []fwd.Coordinator, from, to int) (end func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.of[group[to]].lose(from)
}

func TestConformance(t *testing.T) {
	e := newEars(t)
	fwdtest.TestCoordinator(t, e.newGroup, fwdtest.WithLoss(e.lose))
}

// Groups with a hub pass the suite, and one of 128 ranks passes a part of it.
func TestConformanceOfLargeGroups(t *testing.T) {
	if testing.Short() || natsdp.RaceDetector {
		t.Skip("takes minutes")
	}
	e := newEars(t)
	fwdtest.TestCoordinator(t, e.newGroup,
		fwdtest.WithLoss(e.lose), fwdtest.WithSizes(2, 32), fwdtest.WithSmoke(128))
}
