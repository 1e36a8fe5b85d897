// Package natsdp connects the data-parallel ranks of a model over NATS, so that they can be
// processes on several hosts.
//
//	coordinator, err := natsdp.Join(ctx, natsdp.Config{Group: "target", Rank: rank, Size: 8},
//		natsdp.WithURL("nats://nats:4222"))
//	...
//	defer coordinator.Close()
//	runner, err := fwd.New(config, fwd.WithCoordinator(coordinator))
//
// Ranks find each other by the name of their group. [Join] waits until all are there. It checks
// that they agree on the size of the group and that no rank is taken twice. Then each step is one
// message from every rank to all others: there is no leader, and the server only distributes. Core
// NATS delivers a message once or not at all, so a rank that waits asks for the votes that it lacks,
// at most twice a second, until its round is complete. A server that restarts, a connection that
// breaks, or a cluster that loses a node costs time. It costs a step only if it takes longer than a
// rank wants to wait.
//
// A rank whose process ended can be started again. Its Join needs all other ranks and learns from
// them where the group is. Its first vote is for a step in which the last process of the rank can't
// have been. Ranks that wait meanwhile go on to that step, without an error. If a process was
// thought dead and turns up after another has joined in its place, it is told so and gets
// [ErrRankTaken] from then on. It should end, or join again once the other has ended.
//
// A process that runs several ranks, such as the devices of a host, joins once with [JoinRanks].
//
// # Large groups
//
// In a group of 16 ranks or more, each rank sends its vote to rank 0, the hub, which passes all of
// them on in one message, or in several if the server takes no message so long. So a step costs each
// rank at most four messages, however many there are. The bytes still grow with the square of
// the ranks, since each rank gets the votes of all. The hub is no new single point of failure, since
// no step is complete without each rank, and an error names the hub as any other rank that is missing.
// It does not vote for others, but who controls it could make up their votes.
//
// # What nobody can rule out
//
// A rank that has the votes of all completes the step, and no message can tell it that another rank
// has not got them. So a step can be complete for some ranks and broken, or passed over, for others:
// if a vote is lost and its receiver stops waiting before it comes again, or if a process dies, or is
// cut off without noticing, just after it has got all votes. That never happens to two ranks in two
// steps in a row. A vote says how the step before ended for its rank: if it was complete for some and
// broken for others, nobody completes this one, and all get fwd.ErrRankMissing. After a broken step
// each rank also confirms that it has the votes of all. So a rank that hears the others and is not
// heard takes one step alone at most, and its error names those that do not hear it. If its server or
// its own process keeps messages from coming or going, the error says why, such as
// [nats.ErrPermissionViolation], [nats.ErrSlowConsumer] or [nats.ErrMaxPayload].
//
// The ranks that complete a step always have the same votes, of the same processes: each vote says
// which lives of all ranks its sender counts, and votes that disagree on that complete nothing. A rank
// that has lost its connection asks for the votes of the open step again. A process that was replaced
// and has heard nothing of it takes at most the step alone that was open then.
//
// An engine loses nothing by that. A rank for which the step was broken has run no pass, and plans
// the same requests again in the next step. A rank for which it was complete has run its pass. If
// passes of ranks exchange rows, that pass waits for ranks that do not run it: such an exchange
// needs a deadline of its own.
//
// # Another size
//
// The ranks of a group close their coordinators, all of them, and join again with another
// Config.Size. The group may keep its name, and its steps begin at 1 again. As long as a rank of the
// old size has not left, Join returns an error that names it. That rank's exchanges fail with
// [fwd.ErrRankMissing], and the error says that the group has another size now. A rank that joins
// later with the old size gets an error that names both sizes.
//
// # Time
//
// The clocks of the hosts may differ by less than a day.
//
// Exchange waits for as long as its ctx and [fwd.WithExchangeTimeout] let it. Both must last longer
// than the slowest pass of any rank, and longer than any outage that should not cost a step.
//
// # Subjects and permissions
//
// PREFIX is fwd.dp unless [WithSubjectPrefix] changes it. Rank r publishes to PREFIX.GROUP.all.r
// what everyone should hear, and to PREFIX.GROUP.q.r what rank q should hear. So rank r needs
// permission to publish to PREFIX.GROUP.*.r, and to subscribe to PREFIX.GROUP.all.* and
// PREFIX.GROUP.r.*. With these permissions alone it can't speak for another rank, and nobody but the
// hub of a large group can speak for it. A process of several ranks publishes as all of them: as 0-3, or
// 0-3_8, in place of r. A message is believed only if the rank in it is one of those in its subject. Some
// messages are counted in [Stats], and a group that is together ignores them: damaged ones, those
// of another version, group or size, those of a process whose rank has been taken over, and those
// with numbers that no honest rank can have come to, which would leave the group none to go on with.
//
// # Versions
//
// All ranks of a group must run the same version of the messages, which is 3. If they don't, Join
// returns an error that names both versions. A group answers a rank of another version that asks, so
// that it can tell.
package natsdp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/nats-io/nats.go"
)

// sentinel is an error to match with errors.Is.
type sentinel struct{ word, text string }

// Error returns the text, with the package's name before it.
func (e *sentinel) Error() string { return "natsdp: " + e.text }

// ErrorType returns a stable word for telemetry, such as "rank_taken".
func (e *sentinel) ErrorType() string { return e.word }

// The errors of this package, beside those of fwd. Each has a method ErrorType() string behind it,
// found with errors.As: the word in error.type on spans and metrics.
var (
	// ErrRankTaken says that another process has this rank.
	ErrRankTaken error = &sentinel{"rank_taken", "another process has this rank"}

	// ErrClosed says that Close has been called.
	ErrClosed error = &sentinel{"closed", "the coordinator is closed"}
)

// DefaultSubjectPrefix is the beginning of the subjects of all groups.
const DefaultSubjectPrefix = "fwd.dp"

// Config says which rank of which group joins.
type Config struct {
	// Group is the same for all ranks, and differs from that of any other group on the same servers.
	// It consists of letters, digits, "-" and "_".
	Group string

	Rank  int   // from 0
	Ranks []int // for [JoinRanks], in place of Rank
	Size  int   // number of ranks, at least 1
}

// Option says how the group is reached.
type Option interface{ apply(*options) }

type options struct {
	connect func(ctx context.Context) (*nats.Conn, error) // nil: conn is given
	conn    *nats.Conn
	prefix  string
	log     *slog.Logger
	rotated bool // see WithRotatedCredentials
}

type optionFunc func(*options)

func (f optionFunc) apply(o *options) { f(o) }

// WithURL makes Join connect to a server, or to one of several separated by commas, as [Connect]
// does. Close closes that connection.
func WithURL(url string, opts ...nats.Option) Option {
	opts = append([]nats.Option{nats.NoEcho()}, opts...) // only one rank uses the connection
	return optionFunc(func(o *options) {
		o.conn, o.connect = nil, func(ctx context.Context) (*nats.Conn, error) { return o.dial(ctx, url, opts) }
	})
}

// WithConn makes the coordinator use a connection that the caller closes. Several groups may share
// it, and several ranks of a group, unless it has [nats.NoEcho]: then they would not hear each
// other, and Join refuses the second. An outage may last for as long as the connection tries to
// reconnect.
func WithConn(conn *nats.Conn) Option {
	return optionFunc(func(o *options) { o.conn, o.connect = conn, nil })
}

// WithSubjectPrefix sets the beginning of the group's subjects, instead of [DefaultSubjectPrefix].
// It is one or more tokens, separated by dots.
func WithSubjectPrefix(prefix string) Option {
	return optionFunc(func(o *options) { o.prefix = prefix })
}

// WithRotatedCredentials makes a connection of [WithURL] keep trying if a server refuses its
// credentials, while Join waits and later, since they may be replaced at any time. Without it a
// refusal ends Join, and a second one in a row ends a connection that is made again.
// [nats.UserCredentials] reads its file for each attempt.
func WithRotatedCredentials() Option {
	return optionFunc(func(o *options) { o.rotated = true })
}

// WithLogger sets where the coordinator says who is awaited, who has joined and left, that the
// connection is lost or there again, that another process has the rank, which rounds were broken, and
// what a server reports on a connection of [WithURL]. While Join waits, that is at most a line a
// second. Without it, or if logger is nil, nothing is said.
func WithLogger(logger *slog.Logger) Option {
	return optionFunc(func(o *options) {
		if o.log = logger; logger == nil {
			o.log = slog.New(slog.DiscardHandler)
		}
	})
}

// Connect connects to a NATS server in the way that suits a group: it waits for a server until ctx
// ends, also for one that is starting or full. A lost connection is made again, as often as
// necessary, unless a server refuses the credentials. Meanwhile no votes are kept for later, since
// they are asked for anyway. TLS and credentials are options of nats: [nats.RootCAs],
// [nats.ClientCert], [nats.Secure], [nats.UserCredentials], [nats.UserInfo] and others. opts override
// what Connect would choose.
//
// If a server refuses, the error is that of [nats.Connect], such as [nats.ErrAuthorization]. If no
// server has answered before ctx ended, the error wraps ctx's cause and the error of the last
// attempt. A URL that can't be parsed is fwd.ErrInvalid, and the error does not show it, since it
// may hold a password.
func Connect(ctx context.Context, url string, opts ...nats.Option) (*nats.Conn, error) {
	o := options{log: slog.New(slog.DiscardHandler)}
	return o.dial(ctx, url, opts)
}

// dial is Connect with the options of Join.
func (o *options) dial(ctx context.Context, url string, opts []nats.Option) (*nats.Conn, error) {
	if err := checkURLs(url); err != nil {
		return nil, err
	}
	base := []nats.Option{
		nats.MaxReconnects(-1),
		nats.ReconnectWait(50 * time.Millisecond),
		nats.ReconnectJitter(50*time.Millisecond, 200*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.FlusherTimeout(5 * time.Second),
		// A link that is silently gone is noticed after three pings.
		nats.PingInterval(5 * time.Second),
		// The default one prints.
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			o.log.Warn("the server or the connection reports an error", "error", err)
		}),
	}
	if o.rotated {
		base = append(base, nats.IgnoreAuthErrorAbort())
	}
	opts = append(base, opts...)
	failed := errors.New("nats: no server has answered") // before any attempt has failed
	var said time.Time
	for {
		conn, err := connectOnce(ctx, url, opts)
		if conn != nil {
			return conn, nil
		}
		if ctx.Err() == nil {
			if failed = err; !isAbsent(err) && !(o.rotated && isRefused(err)) {
				return nil, err
			}
			if time.Since(said) >= time.Second {
				said = time.Now()
				o.log.Warn("cannot connect yet", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", failed, context.Cause(ctx))
		case <-time.After(2 * resendFirst):
		}
	}
}

// checkURLs refuses URLs, separated by commas, that can't be parsed. Its error, unlike that of nats,
// does not show them.
func checkURLs(list string) error {
	urls := strings.Split(list, ",")
	for i, text := range urls {
		if text = strings.TrimSpace(text); !strings.Contains(text, "://") {
			text = "nats://" + text
		}
		if _, err := url.Parse(text); err != nil {
			return invalidf("URL %d of %d of NATS servers can't be parsed; "+
				"write special characters of a password as %%XX, or give it by an option of nats", i+1, len(urls))
		}
	}
	return nil
}

// isRefused reports whether an error is that of a server which refuses credentials.
func isRefused(err error) bool {
	return errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) ||
		errors.Is(err, nats.ErrAuthRevoked) || errors.Is(err, nats.ErrAccountAuthExpired)
}

// connectOnce connects once. If ctx ends first, its cause is the error.
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
		go func() { // ends with the connection's own timeout
			if r := <-done; r.err == nil {
				r.conn.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// isAbsent reports whether an error of connecting means that there is no server yet, or none with
// room, rather than one that refuses.
func isAbsent(err error) bool {
	said := strings.ToLower(err.Error())
	for _, busy := range []string{
		nats.MAX_CONNECTIONS_ERR, nats.MAX_ACCOUNT_CONNECTIONS_ERR, "authentication timeout",
	} {
		if strings.Contains(said, busy) {
			return true
		}
	}
	var op *net.OpError
	ok := errors.As(err, &op)
	if errors.Is(err, nats.ErrNoServers) || errors.Is(err, nats.ErrTimeout) ||
		ok && (op.Op == "dial" || op.Timeout()) {
		return true
	}
	// A load balancer hangs up if there is no server behind it, and so does a full server. A server hangs
	// up after TLS has begun if it refuses the certificate.
	return !errors.Is(err, nats.ErrTLS) && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE))
}

// Coordinator is one rank of a group. Make one with [Join] or [JoinRanks]; the zero value is of no
// use. It implements [fwd.Coordinator]. Exchange is for one Runner; any goroutine may call the other
// methods at any time.
type Coordinator struct {
	member    *member
	link      *link
	closeOnce sync.Once
}

// Join makes this process a rank of a group. It returns when it has heard from all ranks. A rank
// that is started again joins at the group's step. If another process had the rank and did not
// leave it by Close, or if the group has no other ranks which could tell, Join waits a second for
// an objection of that process. It then needs a ctx that lasts longer.
//
// Join returns an error that wraps fwd.ErrInvalid if cfg or an option is wrong, if there is neither
// a URL nor a connection, or if other ranks have another size or speak another version. It returns
// [ErrRankTaken] if another process has the rank. If ctx ends first, the error wraps its cause; if
// ranks have not come, it is a *[fwd.RankError] that is fwd.ErrRankMissing and names them. Errors
// of nats are wrapped, such as [nats.ErrPermissionViolation] and [nats.ErrAuthorization]. Join
// returns at most a second after ctx has ended.
func Join(ctx context.Context, cfg Config, opts ...Option) (*Coordinator, error) {
	if cfg.Ranks != nil {
		return nil, invalidf("Config.Ranks is %v; use JoinRanks for several ranks", cfg.Ranks)
	}
	cfg.Ranks = []int{cfg.Rank}
	joined, err := join(ctx, cfg, opts)
	if err != nil {
		return nil, err
	}
	return joined[0], nil
}

// JoinRanks makes this process several ranks of a group, such as the devices of a host, and returns
// their coordinators in the order of cfg.Ranks. They share a connection: a vote of one comes to the
// others in memory, and one message goes out for all of them when the last of them has voted. The
// last Close closes the connection.
//
// JoinRanks returns the errors of [Join]. If one of the ranks can't join, none does.
func JoinRanks(ctx context.Context, cfg Config, opts ...Option) ([]*Coordinator, error) {
	if len(cfg.Ranks) == 0 || cfg.Rank != 0 {
		return nil, invalidf("Config.Ranks is %v and Config.Rank is %d; "+
			"JoinRanks wants the ranks in Ranks, and no Rank", cfg.Ranks, cfg.Rank)
	}
	return join(ctx, cfg, opts)
}

func join(ctx context.Context, cfg Config, opts []Option) ([]*Coordinator, error) {
	o := options{prefix: DefaultSubjectPrefix, log: slog.New(slog.DiscardHandler)}
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
	l := newLink(cfg, &o, conn)
	if err := l.claimConn(); err != nil {
		return nil, err
	}
	go l.speak()
	if err := l.join(ctx); err != nil {
		return nil, err
	}
	coordinators := make([]*Coordinator, len(cfg.Ranks))
	for i, rank := range cfg.Ranks {
		coordinators[i] = &Coordinator{member: l.byRank[rank], link: l}
	}
	return coordinators, nil
}

func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", fwd.ErrInvalid, fmt.Sprintf(format, args...))
}

func (c Config) check(o *options) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, invalidf(format, args...)) }
	if c.Size < 1 || c.Size > maxRanks {
		bad("a group of %d ranks, want 1 to %d", c.Size, maxRanks)
	} else {
		seen := map[int]bool{}
		for _, rank := range c.Ranks {
			if rank < 0 || rank >= c.Size {
				bad("rank %d of %d, want 0 to %d", rank, c.Size, c.Size-1)
			} else if seen[rank] {
				bad("rank %d twice in Config.Ranks %v", rank, c.Ranks)
			}
			seen[rank] = true
		}
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
	line := fmt.Sprintf(longestLine, o.prefix, c.Group, newSpeaker(c.Ranks).token)
	if n := len(line); n > maxControlLine {
		bad("subject prefix of %d bytes and %d ranks make a line of %d bytes, and servers take %d; "+
			"use a shorter prefix, or ranks in a row", len(o.prefix), len(c.Ranks), n, maxControlLine)
	}
	if o.conn == nil && o.connect == nil {
		bad("ranks %v of group %q have neither a URL nor a connection; use WithURL or WithConn", c.Ranks, c.Group)
	}
	return errors.Join(errs...)
}

// A server ends a connection on which a line comes that is longer than maxControlLine, unless its
// configuration says otherwise.
const (
	maxControlLine = 4096
	longestLine    = "PUB %s.%s.1048575.%s 1048576\r\n"
)

// isToken reports whether s can be part of a subject.
func isToken(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	return len(s) > 0 && len(s) <= 128 && strings.Trim(s, letters+"0123456789-_") == ""
}

// Rank returns this rank, from 0.
func (c *Coordinator) Rank() int { return c.member.rank }

// Size returns the number of ranks.
func (c *Coordinator) Size() int { return c.member.size }

// Exchange votes and returns the votes of all ranks, see [fwd.Coordinator]. Beside the errors of
// every coordinator it returns [ErrClosed], [ErrRankTaken], and [nats.ErrConnectionClosed] if the
// connection is closed for good; all later calls return the same. It returns an error that wraps
// fwd.ErrInvalid for a step above 2^62.
func (c *Coordinator) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return c.member.exchange(ctx, v)
}

// Missing returns the ranks whose votes the open Exchange waits for, in ascending order, or nil if
// none is open. It may be called at any time, from any goroutine, and does not wait.
func (c *Coordinator) Missing() []int { return c.member.missingVotes() }

// Last returns the rank whose vote was the last to come to this rank in its latest Exchange that
// has ended, which may be its own. It returns -1 if that Exchange did not get all votes, or if
// there was none yet. Votes that come to the ranks in different orders may be the last on one rank
// and not on another. Last may be called at any time, from any goroutine, and does not wait.
func (c *Coordinator) Last() int { return c.member.lastVote() }

// Stats are counts since Join. The first five count messages that told this rank nothing about its
// round.
type Stats struct {
	// Malformed counts messages that could not be read.
	Malformed uint64

	// Foreign counts messages of another version, group or size, of a rank that is not that of the
	// subject, on subjects that end with no rank, and of another process with this rank.
	Foreign uint64

	// Implausible counts messages with a round, step or epoch that no honest rank can have come to.
	Implausible uint64

	// Stale counts messages of processes whose rank has been taken over.
	Stale uint64

	// Duplicates counts votes that were known, and votes of a round that was over. A rank that still
	// waits in such a round is answered.
	Duplicates uint64

	// Resent counts how often this rank has sent a vote again to a rank that asked for it. The hub of a
	// large group then sends all that it has.
	Resent uint64

	// Broken counts rounds in which this rank waited and which ended because a rank was missing.
	Broken uint64
}

// Stats returns the counts so far.
func (c *Coordinator) Stats() Stats {
	c.member.mu.Lock()
	defer c.member.mu.Unlock()
	return c.member.stats
}

// Close takes this rank out of the group. It breaks an open exchange, as the end of its ctx does.
//
// Close waits at most a second until the others have this rank's last vote, so that nobody loses
// the last step of a run. Then it says goodbye and closes the connection if WithURL made it, for
// which it waits at most another second. If the connection is the caller's, the goodbye is in its
// buffer, and [nats.Conn.Flush] sends it. A second call does nothing. The error is always nil.
func (c *Coordinator) Close() error {
	c.closeOnce.Do(func() {
		c.member.leave()
		c.link.leave()
	})
	return nil
}
