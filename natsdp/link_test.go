// This file tests what a process of several ranks sends, from inside.

package natsdp

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// newTestLink returns a link of ranks 0 to 3 of 8 that does not speak yet, and a subscription to what it
// will say to all.
func newTestLink(t *testing.T) (*link, *nats.Subscription) {
	t.Helper()
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.WaitForShutdown)
	t.Cleanup(s.Shutdown)
	connect := func() *nats.Conn {
		conn, err := Connect(t.Context(), s.ClientURL())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(conn.Close)
		return conn
	}
	hears := connect()
	sub, err := hears.SubscribeSync("fwd.dp.g.all.*")
	if err == nil {
		err = hears.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	o := &options{prefix: DefaultSubjectPrefix, log: slog.New(slog.DiscardHandler)}
	return newLink(Config{Group: "g", Ranks: []int{0, 1, 2, 3}, Size: 8}, o, connect()), sub
}

// vote leaves a vote of a rank to be sent.
func (l *link) vote(rank int) {
	m := l.byRank[rank]
	msg := m.message(kindVote)
	msg.round, msg.vote = 1, fwd.Vote{Step: 1}
	l.send(outgoing{m, toAll, msg.encode()})
}

// Votes of some ranks of a process that come together go out soon, also if the others have none.
func TestSomeVotesGoOut(t *testing.T) {
	t.Parallel()
	l, sub := newTestLink(t)
	for rank := range 3 {
		l.vote(rank)
	}
	go l.publish(nil)
	defer close(l.done)
	msg, err := sub.NextMsg(10 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(slices.Collect(unbundle(msg.Data))); n != 3 {
		t.Errorf("%d votes in the first message, want 3", n)
	}
}

// Bundles that wait together are packed anew.
func TestBundlesArePackedOnce(t *testing.T) {
	t.Parallel()
	l, sub := newTestLink(t)
	m := l.members[0]
	hello := m.greeting()
	for range 2 {
		for _, data := range bundles(m.message(kindBundle), [][]byte{hello, hello}, m.most) {
			l.send(outgoing{m, toAll, data})
		}
	}
	go l.publish(nil)
	defer close(l.done)
	msg, err := sub.NextMsg(10 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for data := range unbundle(msg.Data) {
		if isBundle(data) {
			t.Error("a bundle in a bundle")
		}
	}
	if n := len(slices.Collect(unbundle(msg.Data))); n != 4 {
		t.Errorf("%d messages, want 4", n)
	}
}
