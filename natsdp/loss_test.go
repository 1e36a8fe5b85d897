// This file tests losses in one direction at a real server, and what a rank is told that can't speak
// or hear.

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

// Ranks that hear others and are not heard, or the other way round, don't run alone, with a hub and
// without.
func TestConformanceWithLoss(t *testing.T) {
	s := startServer(t, serverOptions())
	var mu sync.Mutex
	ears := map[fwd.Coordinator]*ear{}
	newGroup := func(t *testing.T, size int) []fwd.Coordinator {
		own := make([]*ear, size)
		for rank := range own {
			own[rank] = newEar()
		}
		group := coordinators(joinAll(t, newName(), size, func(rank int) []natsdp.Option {
			return at(s, nats.SetCustomDialer(own[rank]))(rank)
		}))
		mu.Lock()
		defer mu.Unlock()
		for rank, c := range group {
			ears[c] = own[rank]
		}
		return group
	}
	lose := func(t *testing.T, group []fwd.Coordinator, from, to int) (end func()) {
		mu.Lock()
		defer mu.Unlock()
		return ears[group[to]].lose(from)
	}
	fwdtest.TestCoordinator(t, newGroup, fwdtest.WithLoss(lose), fwdtest.WithSizes(3, 17))
}
