// Package natsdp connects the data-parallel ranks of a model over NATS, so that they can be processes on several hosts.
//
//	coordinator, err := natsdp.Join(ctx, natsdp.Config{Group: "target", Rank: rank, Size: 8}, natsdp.WithURL("nats://nats:4222"))
//	...
//	defer coordinator.Close()
//	runner, err := fwd.New(config, fwd.WithCoordinator(coordinator))
//
// Ranks find each other by the name of their group. [Join] waits until all are there, and checks that they agree on the size of
// the group and that no rank is taken twice. Then each step is one message from every rank to all others: there is no leader, and
// the server does nothing but distribute. Core NATS delivers a message once or not at all, so a rank that waits sends its vote
// again from time to time, until its round is complete. A server that restarts, a connection that breaks, or a cluster that loses a
// node costs time and, where that is longer than a rank wants to wait, a step.
//
// A rank whose process ended can be started again: its Join, which needs all other ranks, learns where the group is, and its first
// vote is for a step that the last process of the rank can't have been in. Ranks that wait meanwhile go on to that step, without an
// error. A process that was thought dead and turns up after another has joined in its place is told so, and gets [ErrRankTaken]
// from then on: it ends, or joins again once the other has ended.
//
// # Time
//
// Exchange waits for as long as its ctx and [fwd.WithExchangeTimeout] let it. What limits that wait has to be longer than the
// slowest pass of any rank, and than any outage that is to be survived without a failed step.
//
// # Subjects and permissions
//
// PREFIX is fwd.dp, unless [WithSubjectPrefix] says otherwise. What rank r has for everyone goes to the subject PREFIX.GROUP.all.r, and what it has for rank q to PREFIX.GROUP.q.r. So rank r
// needs permission to publish to PREFIX.GROUP.*.r, and to subscribe to PREFIX.GROUP.all.* and PREFIX.GROUP.r.*; with these
// alone it can't speak for another rank, and nobody else can speak for it. A message is believed only if the rank in it is that
// of its subject. Everything that is damaged, of another version, group or size, or of a process whose rank has been taken over
// is counted in [Stats] and ignored.
package natsdp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/nats-io/nats.go"
)

// sentinel is an error to match with errors.Is. Its word stands in error.type on spans and metrics.
type sentinel struct{ word, text string }

// Error returns the text, with the package's name before it.
func (e *sentinel) Error() string { return "natsdp: " + e.text }

// ErrorType returns a stable word for telemetry, such as "rank_taken".
func (e *sentinel) ErrorType() string { return e.word }

// The errors of this package, beside those of fwd.
var (
	ErrRankTaken = &sentinel{"rank_taken", "another process has this rank"}
	ErrClosed    = &sentinel{"closed", "the coordinator is closed"}
)

// DefaultSubjectPrefix is what the subjects of all groups begin with.
const DefaultSubjectPrefix = "fwd.dp"

// Config says which rank of which group joins.
type Config struct {
	Group string // the same for all ranks and no other group of the servers: letters, digits, "-" and "_"
	Rank  int    // below Size
	Size  int    // number of ranks, at least 1
}

// Option says how the group is reached.
type Option interface{ apply(*options) }

type options struct {
	connect func(ctx context.Context) (*nats.Conn, error) // nil: conn is given
	conn    *nats.Conn
	prefix  string
}

type optionFunc func(*options)

func (f optionFunc) apply(o *options) { f(o) }

// WithURL makes Join connect to a server, or to one of several separated by commas, as [Connect] does, and Close close that
// connection.
func WithURL(url string, opts ...nats.Option) Option {
	opts = append([]nats.Option{nats.NoEcho()}, opts...) // the connection has one rank alone
	return optionFunc(func(o *options) {
		o.conn, o.connect = nil, func(ctx context.Context) (*nats.Conn, error) { return Connect(ctx, url, opts...) }
	})
}

// WithConn makes the coordinator use a connection that stays the caller's. Several groups, and ranks, may share one; with
// [nats.NoEcho] the ranks of a group may not, since they would not hear each other. How long it tries to reconnect is how long
// an outage may last.
func WithConn(conn *nats.Conn) Option {
	return optionFunc(func(o *options) { o.conn, o.connect = conn, nil })
}

// WithSubjectPrefix sets what the subjects of the group begin with, instead of [DefaultSubjectPrefix]: one or more tokens,
// separated by dots.
func WithSubjectPrefix(prefix string) Option {
	return optionFunc(func(o *options) { o.prefix = prefix })
}

// Connect connects to a NATS server as suits a group: it waits for a server until ctx ends. A connection that is lost is made
// again, as often as it takes, unless a server refuses the credentials. Meanwhile no votes are kept for later: they are sent again
// anyway. TLS and credentials are options of nats: [nats.RootCAs], [nats.ClientCert], [nats.Secure],
// [nats.UserCredentials], [nats.UserInfo] and others. opts override what Connect would choose.
//
// The error is that of [nats.Connect] where a server refuses, [nats.ErrAuthorization] among them. Where none has answered before
// ctx ended it wraps ctx's cause, and what the last attempt failed with.
func Connect(ctx context.Context, url string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{
		nats.MaxReconnects(-1),
		nats.ReconnectWait(50 * time.Millisecond),
		nats.ReconnectJitter(50*time.Millisecond, 200*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.FlusherTimeout(5 * time.Second),
		nats.PingInterval(5 * time.Second),                                // a link that is silently gone shows after three of them
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}), // the default one prints
	}, opts...)
	err := errors.New("nats: connecting")
	for {
		conn, failure := connectOnce(ctx, url, opts)
		if conn != nil {
			return conn, nil
		}
		if failure != nil && !isAbsent(failure) {
			return nil, failure
		}
		if failure != nil {
			err = failure
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-time.After(2 * resendFirst):
		}
	}
}

// connectOnce connects, but not for longer than ctx lets it: then it returns neither a connection nor an error.
func connectOnce(ctx context.Context, url string, opts []nats.Option) (*nats.Conn, error) {
	type result struct {
		conn *nats.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := nats.Connect(url, opts...)
		done <- result{conn, err}
	}()
	select {
	case r := <-done:
		return r.conn, r.err
	case <-ctx.Done():
		go func() { // ends with the timeout of the connection
			if r := <-done; r.err == nil {
				r.conn.Close()
			}
		}()
		return nil, nil
	}
}

// isAbsent reports whether an error of connecting means that there is no server (yet), rather than one that refuses.
func isAbsent(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return errors.Is(err, nats.ErrNoServers) || errors.Is(err, nats.ErrTimeout) || ok && op.Op == "dial" ||
		errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) // a load balancer with no server behind it
}

// Coordinator is one rank of a group. It implements [fwd.Coordinator]. Exchange is for one Runner; the other methods may be
// called at any time.
type Coordinator struct {
	member *member
	conn   *nats.Conn
	owned  bool
	base   string // of subjects: the prefix and the group

	in     chan *nats.Msg
	all    *nats.Subscription
	direct *nats.Subscription
	status chan nats.Status
	done   chan struct{} // tells receive to end
	ended  sync.WaitGroup
	close  sync.Once
}

// Join makes this process a rank of a group, and returns once all ranks of it have been heard from. A rank that is started again
// joins at the group's step. Where another process had the rank and did not leave it by Close, and where there are no other ranks to
// say so, Join waits a second for its objection.
//
// It wraps fwd.ErrInvalid: a group, rank, size or prefix that can't be, neither URL nor connection, ranks that say another size
// or speak another version; [ErrRankTaken]; fwd.ErrRankMissing and ctx's cause when ctx ends first, as a *[fwd.RankError] that
// names the ranks; and the errors of nats, [nats.ErrPermissionViolation] and [nats.ErrAuthorization] among them.
func Join(ctx context.Context, cfg Config, opts ...Option) (*Coordinator, error) {
	o := options{prefix: DefaultSubjectPrefix}
	for i, opt := range opts {
		if opt == nil {
			return nil, invalidf("option %d of %d is nil", i, len(opts))
		}
		opt.apply(&o)
	}
	if err := cfg.check(&o); err != nil {
		return nil, err
	}
	conn := o.conn
	if o.connect != nil {
		var err error
		if conn, err = o.connect(ctx); err != nil {
			return nil, err
		}
	}
	c := &Coordinator{
		conn: conn, owned: o.connect != nil,
		base:   o.prefix + "." + cfg.Group,
		in:     make(chan *nats.Msg, min(1024+16*cfg.Size, 1<<16)), // several rounds; what is beyond is dropped, and sent again
		status: conn.StatusChanged(nats.CONNECTED, nats.CLOSED),
		done:   make(chan struct{}),
	}
	c.member = newMember(cfg.Group, cfg.Rank, cfg.Size, c.publisher(cfg))
	if err := c.subscribe(cfg.Rank); err != nil {
		c.release()
		return nil, err
	}
	c.ended.Go(c.receive)
	if err := c.member.join(ctx, c.refused); err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", fwd.ErrInvalid, fmt.Sprintf(format, args...))
}

func (c Config) check(o *options) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, invalidf(format, args...)) }
	if c.Size < 1 || c.Size > maxRanks {
		bad("a group of %d ranks, want 1 to %d", c.Size, maxRanks)
	} else if c.Rank < 0 || c.Rank >= c.Size {
		bad("rank %d of %d, want 0 to %d", c.Rank, c.Size, c.Size-1)
	}
	if !isToken(c.Group) {
		bad("a group named %q, want letters, digits, - and _", c.Group)
	}
	for token := range strings.SplitSeq(o.prefix, ".") {
		if !isToken(token) {
			bad("subject prefix %q, want tokens of letters, digits, - and _, separated by dots", o.prefix)
			break
		}
	}
	if o.conn == nil && o.connect == nil {
		bad("no connection for rank %d of group %q: neither a URL nor a connection is given", c.Rank, c.Group)
	}
	return errors.Join(errs...)
}

// isToken reports whether s can be part of a subject.
func isToken(s string) bool {
	return len(s) > 0 && len(s) <= 128 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}

// publisher returns what sends this rank's messages. An error says nothing that the member could use: what is lost is sent
// again, and the end of the connection comes by its status.
func (c *Coordinator) publisher(cfg Config) func(to int, message []byte) {
	rank := strconv.Itoa(cfg.Rank)
	toEveryone := c.base + ".all." + rank
	return func(to int, message []byte) {
		subject := toEveryone
		if to != toAll {
			subject = c.base + "." + strconv.Itoa(to) + "." + rank
		}
		_ = c.conn.Publish(subject, message)
	}
}

func (c *Coordinator) subscribe(rank int) (err error) {
	if c.all, err = c.conn.ChanSubscribe(c.base+".all.*", c.in); err != nil {
		return fmt.Errorf("natsdp: %w", err)
	}
	if c.direct, err = c.conn.ChanSubscribe(c.base+"."+strconv.Itoa(rank)+".*", c.in); err != nil {
		return fmt.Errorf("natsdp: %w", err)
	}
	return nil
}

// receive hands the member what comes in.
func (c *Coordinator) receive() {
	for {
		select {
		case msg := <-c.in:
			if from, ok := sender(msg.Subject); ok {
				c.member.handle(from, msg.Sub == c.direct, msg.Data)
			}
		case status := <-c.status:
			if status == nats.CLOSED {
				c.member.lose(c.closedError())
			}
			c.member.again() // connected again
		case <-c.done:
			return
		}
	}
}

// closedError says why the connection has ended, where that is known.
func (c *Coordinator) closedError() error {
	if err := c.conn.LastError(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		return fmt.Errorf("natsdp: rank %d: %w: %w", c.member.rank, nats.ErrConnectionClosed, err)
	}
	return fmt.Errorf("natsdp: rank %d: %w", c.member.rank, nats.ErrConnectionClosed)
}

// sender returns the rank at the end of a subject.
func sender(subject string) (rank int, ok bool) {
	rank, err := strconv.Atoi(subject[strings.LastIndexByte(subject, '.')+1:])
	return rank, err == nil && rank >= 0
}

// refused returns the server's refusal of the group's subjects.
func (c *Coordinator) refused() error {
	if err := c.conn.LastError(); errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), `"`+c.base+".") {
		return fmt.Errorf("natsdp: %w", err)
	}
	return nil
}

// Rank implements [fwd.Coordinator].
func (c *Coordinator) Rank() int { return c.member.rank }

// Size implements [fwd.Coordinator].
func (c *Coordinator) Size() int { return c.member.size }

// Exchange implements [fwd.Coordinator]. Beside the errors that are every coordinator's it returns ErrClosed, [ErrRankTaken], and
// [nats.ErrConnectionClosed] where the connection is closed for good; these last. A step above 2^62 is fwd.ErrInvalid.
func (c *Coordinator) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return c.member.exchange(ctx, v)
}

// Stats are counts since Join. All but Resent and Broken count messages that were ignored.
type Stats struct {
	Malformed  uint64 // that could not be read
	Foreign    uint64 // of another version, group or size, of a rank that is not that of the subject, or of another process with this rank
	Stale      uint64 // of processes whose rank has been taken over
	Duplicates uint64 // votes that were known, or of a round that was over
	Resent     uint64 // votes of this rank that were sent again
	Broken     uint64 // rounds that this rank waited in and that ended for a missing rank
}

// Stats returns the counts so far.
func (c *Coordinator) Stats() Stats {
	c.member.mu.Lock()
	defer c.member.mu.Unlock()
	return c.member.stats
}

// Close takes this rank out of the group. An exchange in progress is broken, as when its ctx ends. Close stays until the others
// have this rank's last vote, at most a second, so that the last step of a run is lost for nobody. It closes the connection that
// WithURL made, once its goodbye has been sent, for which it waits another second at most. A second call does nothing; the error is always nil.
func (c *Coordinator) Close() error {
	c.close.Do(func() {
		c.member.leave()
		if c.owned && c.conn.IsConnected() {
			_ = c.conn.FlushTimeout(lingerMost) // the goodbye
		}
		c.release()
	})
	return nil
}

// release gives back everything but the member.
func (c *Coordinator) release() {
	for _, sub := range []*nats.Subscription{c.all, c.direct} {
		if sub != nil {
			_ = sub.Unsubscribe() // fails where the connection has ended
		}
	}
	close(c.done)
	c.ended.Wait()
	c.conn.RemoveStatusListener(c.status)
	if c.owned {
		c.conn.Close()
	}
}
