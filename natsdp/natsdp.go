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
// PREFIX is fwd.dp, unless [WithSubjectPrefix] says otherwise. What rank r has for everyone goes to the subject PREFIX.GROUP.all.r,
// and what it has for rank q to PREFIX.GROUP.q.r. So rank r needs permission to publish to PREFIX.GROUP.*.r, and to subscribe to
// PREFIX.GROUP.all.* and PREFIX.GROUP.r.*; with these alone it can't speak for another rank, and nobody else can speak for it. A
// message is believed only if the rank in it is that of its subject. What is damaged, of another version, group or size, or of a
// process whose rank has been taken over is counted in [Stats], and a group that is together ignores it.
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
	"sync/atomic"
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
	// ErrRankTaken says that another process has this rank.
	ErrRankTaken error = &sentinel{"rank_taken", "another process has this rank"}

	// ErrClosed says that Close has been called.
	ErrClosed error = &sentinel{"closed", "the coordinator is closed"}
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
// anyway. TLS and credentials are options of nats: [nats.RootCAs], [nats.ClientCert], [nats.Secure], [nats.UserCredentials],
// [nats.UserInfo] and others. opts override what Connect would choose.
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
	failed := errors.New("nats: no server has answered") // before any attempt has failed
	for {
		conn, err := connectOnce(ctx, url, opts)
		if conn != nil {
			return conn, nil
		}
		if ctx.Err() == nil {
			if failed = err; !isAbsent(err) {
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", failed, context.Cause(ctx))
		case <-time.After(2 * resendFirst):
		}
	}
}

// connectOnce connects, but not for longer than ctx lets it: then its cause is the error.
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
		return nil, context.Cause(ctx)
	}
}

// isAbsent reports whether an error of connecting means that there is no server (yet), rather than one that refuses.
func isAbsent(err error) bool {
	var op *net.OpError
	ok := errors.As(err, &op)
	if errors.Is(err, nats.ErrNoServers) || errors.Is(err, nats.ErrTimeout) || ok && (op.Op == "dial" || op.Timeout()) {
		return true
	}
	// A load balancer hangs up when there is no server behind it; a server, once TLS has begun, when it refuses the certificate.
	return !errors.Is(err, nats.ErrTLS) && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET))
}

// Coordinator is one rank of a group, made by [Join]; a zero one is of no use. It implements [fwd.Coordinator]. Exchange is for
// one Runner; the other methods may be called at any time.
//
// Nothing that a caller waits for happens on the connection itself: that may keep whoever uses it waiting, for a name server, a
// server that does not answer, or room in a socket. So one goroutine speaks on it, and another listens.
type Coordinator struct {
	member *member
	conn   *nats.Conn
	owned  bool
	base   string // of subjects: PREFIX.GROUP

	out       chan outgoing
	in        chan *nats.Msg
	all       *nats.Subscription // to what is for everyone,
	direct    *nats.Subscription // and for this rank alone
	down      atomic.Bool        // the connection is being made again: what is sent is lost
	done      chan struct{}      // tells speak to end
	ended     chan struct{}      // that it has
	closeOnce sync.Once
}

// outgoing is a message to a rank, or to all.
type outgoing struct {
	to   int
	data []byte
}

// Join makes this process a rank of a group, and returns once all ranks of it have been heard from. A rank that is started again
// joins at the group's step. Where another process had the rank and did not leave it by Close, and where there are no other ranks to
// say so, Join waits a second for its objection, and needs a ctx that lasts longer.
//
// It wraps fwd.ErrInvalid: a group, rank, size, prefix or option that can't be, neither URL nor connection, ranks that say another
// size or speak another version; [ErrRankTaken]; ctx's cause when ctx ends first, in a *[fwd.RankError] that is fwd.ErrRankMissing
// and names the ranks where it is ranks that have not come; and the errors of nats, [nats.ErrPermissionViolation] and
// [nats.ErrAuthorization] among them. It returns at most a second after ctx has ended.
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
	room := min(1024+16*cfg.Size, 1<<16) // several rounds; what is beyond is dropped, and sent again
	c := &Coordinator{
		conn: conn, owned: o.connect != nil,
		base:  o.prefix + "." + cfg.Group,
		out:   make(chan outgoing, room),
		in:    make(chan *nats.Msg, room),
		done:  make(chan struct{}),
		ended: make(chan struct{}),
	}
	c.member = newMember(cfg.Group, cfg.Rank, cfg.Size, c.send)
	go c.speak()
	if err := c.member.join(ctx); err != nil {
		c.member.goodbye()
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

// send leaves a message to speak, or drops it where there is no room.
func (c *Coordinator) send(to int, data []byte) {
	select {
	case c.out <- outgoing{to, data}:
	default:
	}
}

// speak does all that is done on the connection, from first to last.
func (c *Coordinator) speak() {
	defer close(c.ended)
	if c.owned {
		defer c.hangUp()
	}
	before := c.conn.LastError()
	status := c.conn.StatusChanged(nats.RECONNECTING, nats.CONNECTED, nats.CLOSED)
	defer c.conn.RemoveStatusListener(status)
	c.down.Store(!c.conn.IsConnected())
	if err := c.subscribe(); err != nil {
		c.member.lose(fmt.Errorf("natsdp: %w", err))
	}
	defer c.unsubscribe()
	select {
	case <-c.done: // Join has given up before this came so far, and nobody has heard of it
		return
	default:
	}
	var listening sync.WaitGroup
	listening.Go(func() { c.listen(status) })
	c.publish(before)
	listening.Wait()
}

func (c *Coordinator) subscribe() (err error) {
	if c.all, err = c.conn.ChanSubscribe(c.base+".all.*", c.in); err == nil {
		c.direct, err = c.conn.ChanSubscribe(c.base+"."+strconv.Itoa(c.member.rank)+".*", c.in)
	}
	return err
}

// unsubscribe ends subscriptions. Errors say that there is none, or that the connection has ended.
func (c *Coordinator) unsubscribe() {
	_, _ = c.all.Unsubscribe(), c.direct.Unsubscribe()
}

// hangUp closes the connection, once the goodbye is on its way.
func (c *Coordinator) hangUp() {
	if c.conn.IsConnected() {
		_ = c.conn.FlushTimeout(lingerMost)
	}
	c.conn.Close()
}

// publish publishes what the member sends, unless the connection is down. An error says nothing that the member could use: what is
// lost is sent again, and the end of the connection comes by its status. While the rank joins it also looks for a refusal of the
// server, other than the error that was there before.
func (c *Coordinator) publish(before error) {
	look := time.NewTicker(resendFirst / 2)
	defer look.Stop()
	rank := strconv.Itoa(c.member.rank)
	toEveryone := c.base + ".all." + rank
	one := func(o outgoing) {
		subject := toEveryone
		if o.to != toAll {
			subject = c.base + "." + strconv.Itoa(o.to) + "." + rank
		}
		if !c.down.Load() {
			_ = c.conn.Publish(subject, o.data)
		}
	}
	for {
		select {
		case o := <-c.out:
			one(o)
		case <-look.C:
			if c.member.hasJoined() {
				look.Stop()
			} else if err := c.conn.LastError(); err != before && c.isRefusal(err, rank) {
				c.member.failJoin(fmt.Errorf("natsdp: %w", err))
			}
		case <-c.done:
			for range len(c.out) { // the goodbye is the last
				one(<-c.out)
			}
			return
		}
	}
}

// isRefusal reports whether an error is that of a server which does not let a rank have its subjects in the group.
func (c *Coordinator) isRefusal(err error, rank string) bool {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return false
	}
	_, subject, ok := strings.Cut(err.Error(), `"`+c.base+".")
	subject, _, _ = strings.Cut(subject, `"`)
	return ok && (subject == "all.*" || subject == rank+".*" || strings.HasSuffix(subject, "."+rank))
}

// listen hands the member what comes in.
func (c *Coordinator) listen(status <-chan nats.Status) {
	for {
		select {
		case msg := <-c.in:
			if from, ok := sender(msg.Subject); ok {
				c.member.handle(from, msg.Sub == c.direct, msg.Data)
			}
		case s := <-status:
			switch c.down.Store(s != nats.CONNECTED); s {
			case nats.CONNECTED:
				c.member.again()
			case nats.CLOSED:
				c.member.lose(c.closedError())
			}
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

// Rank implements [fwd.Coordinator].
func (c *Coordinator) Rank() int { return c.member.rank }

// Size implements [fwd.Coordinator].
func (c *Coordinator) Size() int { return c.member.size }

// Exchange implements [fwd.Coordinator]. Beside the errors that are every coordinator's it returns ErrClosed, [ErrRankTaken], and
// [nats.ErrConnectionClosed] where the connection is closed for good; these last. A step above 2^62 is fwd.ErrInvalid.
func (c *Coordinator) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return c.member.exchange(ctx, v)
}

// Missing returns the ranks whose votes the open Exchange waits for, in ascending order, or nil if none
// is open. It may be called at any time, from any goroutine, and does not wait.
func (c *Coordinator) Missing() []int { return c.member.missingVotes() }

// Stats are counts since Join. All but Resent and Broken count messages that told this rank nothing about its round.
type Stats struct {
	Malformed  uint64 // that could not be read
	Foreign    uint64 // of another version, group or size, of a rank that is not that of the subject, or of another process with this rank
	Stale      uint64 // of processes whose rank has been taken over
	Duplicates uint64 // votes that were known, or of a round that was over: who still waits in that is answered
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
// have this rank's last vote, at most a second, so that the last step of a run is lost for nobody; then until its goodbye is on
// the connection, and that is closed where WithURL made it, which takes at most another second where a server answers, and else
// goes on without it. A connection of the caller's has the goodbye in its buffer, which [nats.Conn.Flush] empties. A second call
// does nothing; the error is always nil.
func (c *Coordinator) Close() error {
	c.closeOnce.Do(func() {
		c.member.leave()
		c.release()
	})
	return nil
}

// release lets go of the connection, and waits until that is done, though not for long.
func (c *Coordinator) release() {
	close(c.done)
	select {
	case <-c.ended:
	case <-time.After(lingerMost):
	}
}
