// This file tests how ranks join their group, and join it again.

package natsdp_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats.go"
)

// missing returns the RankError of missing ranks in err, or nil.
func missing(err error) *fwd.RankError {
	var rankErr *fwd.RankError
	if !errors.As(err, &rankErr) || !errors.Is(err, fwd.ErrRankMissing) {
		return nil
	}
	return rankErr
}

// vote is a vote that tells ranks apart.
func vote(rank int, step uint64) fwd.Vote {
	return fwd.Vote{Step: step, NumTokens: rank + 1, NumTokensPadded: rank + 1}
}

func isVote(v fwd.Vote, rank int, step uint64) bool {
	return v.Step == step && v.NumTokens == rank+1 && v.NumTokensPadded == rank+1
}

// result is what an exchange returned.
type result struct {
	votes []fwd.Vote
	err   error
}

// begin lets a rank take a step in a goroutine.
func begin(ctx context.Context, c *natsdp.Coordinator, v fwd.Vote) <-chan result {
	done := make(chan result, 1)
	go func() {
		votes, err := c.Exchange(ctx, v)
		done <- result{votes, err}
	}()
	return done
}

// receive waits for a result, but not for ever.
func receive(t *testing.T, done <-chan result) result {
	t.Helper()
	select {
	case r := <-done:
		return r
	case <-time.After(patience):
		t.Fatal("an exchange does not return")
		return result{}
	}
}

// together checks that a group is whole: all ranks take a step, and get all votes.
func together(t *testing.T, group []*natsdp.Coordinator, step uint64) {
	t.Helper()
	var calls []<-chan result
	for rank, c := range group {
		calls = append(calls, begin(t.Context(), c, vote(rank, step)))
	}
	for rank, done := range calls {
		agreed(t, rank, receive(t, done), len(group), step)
	}
}

func agreed(t *testing.T, rank int, got result, size int, step uint64) {
	t.Helper()
	if got.err != nil {
		t.Fatalf("rank %d in step %d: %v", rank, step, got.err)
	}
	if len(got.votes) != size {
		t.Fatalf("rank %d in step %d: %d votes of %d ranks", rank, step, len(got.votes), size)
	}
	for other, v := range got.votes {
		if !isVote(v, other, step) {
			t.Errorf("rank %d in step %d: the vote of rank %d is %+v, want %+v",
				rank, step, other, v, vote(other, step))
		}
	}
}

// A process that is started again after it was killed joins at the group's step: its Runner begins
// at 1, and no step fails. The step in which the others wait is passed over, since the killed
// process may have had all votes of it.
func TestJoinAgain(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group, conns := joinByConns(t, s, name, 3)
	for step := uint64(1); step <= 20; step++ {
		together(t, group, step)
	}
	for step := uint64(21); step < 31; step += 2 {
		rank := int(step % 3)
		conns[rank].Close() // the end of the process, as the others see it
		var waiting []<-chan result
		for other, c := range group {
			if other != rank {
				waiting = append(waiting, begin(t.Context(), c, vote(other, step)))
			}
		}
		conn := connect(t, s)
		began := time.Now()
		cfg := natsdp.Config{Group: name, Rank: rank, Size: 3}
		c, err := natsdp.Join(t.Context(), cfg, natsdp.WithConn(conn))
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > patience/2 {
			t.Errorf("joining again took %v", took)
		}
		t.Cleanup(func() { c.Close() })
		group[rank], conns[rank] = c, conn
		first := vote(rank, 1)
		agreed(t, rank, receive(t, begin(t.Context(), c, first)), 3, step+1)
		for _, done := range waiting {
			agreed(t, -1, receive(t, done), 3, step+1)
		}
	}
	together(t, group, 31)
}

// A process was killed after it had voted: its vote may have come to some ranks and not to others,
// so the one in its place does not vote in that round again. The others vote again immediately.
func TestJoinAgainAfterVoting(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 3, at(s))
	together(t, group, 1)
	ctx, kill := context.WithCancel(t.Context())
	waiting := []<-chan result{begin(t.Context(), group[0], vote(0, 2))}
	voted := begin(ctx, group[1], vote(1, 2))
	time.Sleep(100 * time.Millisecond) // so that the votes come
	cfg := natsdp.Config{Group: name, Rank: 1, Size: 3}
	c, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL()))
	if !errors.Is(err, natsdp.ErrRankTaken) {
		t.Fatalf("joining beside the process that has the rank: %v, %v", c, err)
	}
	kill()
	if r := receive(t, voted); !errors.Is(r.err, fwd.ErrRankMissing) {
		t.Fatal(r.err)
	}
	if r := receive(t, waiting[0]); !errors.Is(r.err, fwd.ErrRankMissing) {
		t.Fatal(r.err)
	}
	group[1].Close()
	again := joinAll(t, newName(), 1, at(s)) // another group is another matter
	together(t, again, 1)
	if group[1], err = natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { group[1].Close() })
	together(t, group, 3)
}

// A rank that has been closed is free.
func TestJoinAfterClose(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 2, at(s))
	together(t, group, 1)
	group[1].Close()
	cfg := natsdp.Config{Group: name, Rank: 1, Size: 2}
	c, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	group[1] = c
	together(t, group, 2)
}

// All ranks must come. A rank that joins is told which have not.
func TestJoinMissing(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, cause)
	defer cancel()
	name := newName()
	errs := make(chan error)
	for _, rank := range []int{0, 2} {
		go func() {
			cfg := natsdp.Config{Group: name, Rank: rank, Size: 4}
			_, err := natsdp.Join(ctx, cfg, natsdp.WithURL(s.ClientURL()))
			errs <- err
		}()
	}
	for range 2 {
		err := <-errs
		rankErr := missing(err)
		if rankErr == nil || !errors.Is(err, cause) || !slices.Equal(rankErr.Ranks, []int{1, 3}) {
			t.Errorf("%v, want that ranks 1 and 3 are missing, and why it has not waited longer", err)
		}
	}
}

// Ranks that don't agree on the size don't become a group, and the error of each names both sizes.
func TestJoinSizes(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	errs := make(chan error)
	for rank, size := range []int{2, 3} {
		go func() {
			cfg := natsdp.Config{Group: name, Rank: rank, Size: size}
			_, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL()))
			errs <- err
		}()
	}
	for range 2 {
		err := <-errs
		if !errors.Is(err, fwd.ErrInvalid) ||
			!strings.Contains(err.Error(), "has 2 ranks") && !strings.Contains(err.Error(), "has 3 ranks") {
			t.Errorf("%v, want both sizes", err)
		}
	}
	// A group that is together goes on, and the rank that is wrong learns it from the group.
	group := joinAll(t, name, 2, at(s))
	for _, cfg := range []natsdp.Config{
		{Group: name, Rank: 1, Size: 3}, {Group: name, Rank: 5, Size: 8}, {Group: name, Rank: 0, Size: 1 << 20},
	} {
		_, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL()))
		if !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), "has 2 ranks") {
			t.Errorf("joining as rank %d of %d: %v", cfg.Rank, cfg.Size, err)
		}
	}
	together(t, group, 1)
	if group[0].Stats().Foreign == 0 {
		t.Error("the messages of another size are not counted")
	}
}

// A rank is taken once: by the process that has joined, or by the first of those that begin at the
// same time.
func TestJoinTaken(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	for range 5 {
		name := newName()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		type joined struct {
			rank int
			c    *natsdp.Coordinator
			err  error
		}
		results := make(chan joined)
		for _, rank := range []int{0, 1, 1, 1} {
			go func() {
				cfg := natsdp.Config{Group: name, Rank: rank, Size: 2}
				c, err := natsdp.Join(ctx, cfg, natsdp.WithURL(s.ClientURL()))
				results <- joined{rank, c, err}
			}()
		}
		group := make([]*natsdp.Coordinator, 2)
		for range 4 {
			switch r := <-results; {
			case r.err == nil && group[r.rank] != nil:
				t.Errorf("rank %d is taken twice", r.rank)
			case r.err == nil:
				group[r.rank] = r.c
				t.Cleanup(func() { r.c.Close() })
			case !errors.Is(r.err, natsdp.ErrRankTaken):
				t.Errorf("rank %d: %v", r.rank, r.err)
			}
		}
		cancel()
		if t.Failed() {
			t.FailNow()
		}
		together(t, group, 1)
		cfg := natsdp.Config{Group: name, Rank: 0, Size: 2}
		_, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL()))
		if !errors.Is(err, natsdp.ErrRankTaken) || !strings.Contains(err.Error(), "rank 0 of 2") {
			t.Errorf("joining as rank 0 once more: %v", err)
		}
		together(t, group, 2)
	}
}

// A wrong configuration is refused before anything is sent, in one error that names all that is
// wrong.
func TestJoinConfig(t *testing.T) {
	t.Parallel()
	url := natsdp.WithURL("x")
	for _, tt := range []struct {
		cfg  natsdp.Config
		opts []natsdp.Option
		want []string
	}{
		{natsdp.Config{}, nil,
			[]string{"a group of 0 ranks", `a group named ""`, "neither a URL nor a connection; use WithURL"}},
		{natsdp.Config{Group: "g", Rank: 2, Size: 2}, []natsdp.Option{url}, []string{"rank 2 of 2, want 0 to 1"}},
		{natsdp.Config{Group: "g", Rank: -1, Size: 2}, []natsdp.Option{url}, []string{"rank -1 of 2"}},
		{natsdp.Config{Group: "g.h", Size: 1 << 21}, []natsdp.Option{url}, []string{`"g.h"`, "2097152 ranks"}},
		{natsdp.Config{Group: "g >", Size: 1}, []natsdp.Option{url, natsdp.WithSubjectPrefix("a..b")},
			[]string{`"g >"`, `"a..b"`}},
		{natsdp.Config{Group: "g", Size: 1}, []natsdp.Option{url, nil}, []string{"option 1 of 2 is nil"}},
		{natsdp.Config{Group: "g", Size: 1},
			[]natsdp.Option{url, natsdp.WithSubjectPrefix(strings.Repeat("prefix.", 600) + "x")},
			[]string{"prefix of 4201 bytes", "4096"}},
	} {
		_, err := natsdp.Join(t.Context(), tt.cfg, tt.opts...)
		if !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("%+v: %v", tt.cfg, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: %v does not say %s", tt.cfg, err, want)
			}
		}
	}
}

type dialerFunc func() (net.Conn, error)

func (f dialerFunc) Dial(network, address string) (net.Conn, error) { return f() }

// Join waits for a server that is not there yet, as long as ctx says.
func TestJoinWithoutServer(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	s := startServer(t, opts)
	url, port := s.ClientURL(), s.Addr()
	stopServer(s)
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	began := time.Now()
	attempt := 0
	dialer := dialerFunc(func() (net.Conn, error) {
		if attempt++; attempt == 3 { // this one gets no answer
			cancel(enough)
			<-t.Context().Done()
		}
		return net.Dial("tcp", port.String())
	})
	cfg := natsdp.Config{Group: newName(), Size: 1}
	_, err := natsdp.Join(ctx, cfg, natsdp.WithURL(url, nats.SetCustomDialer(dialer)))
	if !errors.Is(err, enough) || !errors.Is(err, nats.ErrNoServers) {
		t.Errorf("%v, want %v and %v", err, enough, nats.ErrNoServers)
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("took %v", took)
	}
	joined := make(chan error)
	go func() {
		c, err := natsdp.Join(t.Context(), natsdp.Config{Group: newName(), Size: 1}, natsdp.WithURL(url))
		if err == nil {
			err = c.Close()
		}
		joined <- err
	}()
	time.Sleep(200 * time.Millisecond)
	restartServer(t, opts, port)
	if err := <-joined; err != nil {
		t.Error(err)
	}
}

// An address that takes a connection and says nothing, as a load balancer may for a server that is
// not there, is no server yet.
func TestJoinSilence(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	silence, err := net.Listen("tcp", "127.0.0.1:0") // the system accepts for it
	if err != nil {
		t.Fatal(err)
	}
	defer silence.Close()
	attempt := 0
	silentFirst := dialerFunc(func() (net.Conn, error) {
		if attempt++; attempt == 1 {
			return net.Dial("tcp", silence.Addr().String())
		}
		return net.Dial("tcp", s.Addr().String())
	})
	group := joinAll(t, newName(), 2, func(rank int) []natsdp.Option {
		if rank == 0 {
			return at(s, nats.SetCustomDialer(silentFirst), nats.Timeout(200*time.Millisecond))(rank)
		}
		return at(s)(rank)
	})
	together(t, group, 1)
	if attempt < 2 {
		t.Errorf("connected %d times, want at least 2", attempt)
	}
}

// Groups of the same name under different prefixes are different groups.
func TestSubjectPrefix(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	conn := connect(t, s)
	heard, err := conn.SubscribeSync("team.a." + name + ".all.*")
	if err != nil {
		t.Fatal(err)
	}
	under := func(prefix string) []*natsdp.Coordinator {
		return joinAll(t, name, 2, func(rank int) []natsdp.Option {
			return append(at(s)(rank), natsdp.WithSubjectPrefix(prefix))
		})
	}
	a, b := under("team.a"), under("team.b")
	for step := uint64(1); step <= 5; step++ {
		together(t, a, step)
	}
	together(t, b, 1)
	if _, err := heard.NextMsg(patience); err != nil {
		t.Errorf("nothing comes under the prefix: %v", err)
	}
	for _, c := range append(a, b...) {
		if stats := c.Stats(); stats.Foreign+stats.Stale+stats.Malformed != 0 {
			t.Errorf("rank %d has counted %+v", c.Rank(), stats)
		}
	}
}

// Subjects that do not end with the number of a rank, as the number is written, are foreign.
func TestRankAsItIsWritten(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 2, at(s))
	conn := connect(t, s)
	good := natsdp.ForgeBroken(name, 2, 1, natsdp.LaterEpoch(), 1, 0)
	tokens := []string{"01", "+1", "001", "-0", "x", "1048576"}
	before := group[0].Stats().Foreign
	for _, token := range tokens {
		if err := conn.Publish(natsdp.DefaultSubjectPrefix+"."+name+".all."+token, good); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	together(t, group, 1)
	if got := group[0].Stats().Foreign - before; got != uint64(len(tokens)) {
		t.Errorf("%d foreign messages, want %d", got, len(tokens))
	}
}
