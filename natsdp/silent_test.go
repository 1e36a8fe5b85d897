// This file tests what a rank is told that can't speak or hear, because of the server or of itself.

package natsdp_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/trace"
)

// configVariable makes the test binary a server with that configuration. A server that is to load its
// configuration again runs in a process of its own: it races with its own connections.
const configVariable = "NATSDP_TEST_SERVER"

func TestMain(m *testing.M) {
	if file := os.Getenv(configVariable); file != "" {
		serveFile(file)
		return
	}
	os.Exit(m.Run())
}

// serveFile runs a server until its standard input ends. It prints its address.
func serveFile(file string) {
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		fmt.Println(err)
		return
	}
	s, err := server.NewServer(opts)
	if err != nil {
		fmt.Println(err)
		return
	}
	s.Start()
	if s.ReadyForConnections(patience) {
		fmt.Println(s.ClientURL())
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	stopServer(s)
}

// reloadable is a server whose users can lose permissions.
type reloadable struct {
	t       *testing.T
	file    string
	url     string
	process *os.Process
}

func newReloadable(t *testing.T, group string, size int) *reloadable {
	t.Helper()
	r := &reloadable{t: t, file: filepath.Join(t.TempDir(), "server.conf")}
	r.write(group, size, "", "")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), configVariable+"="+r.file, "GORACE=exitcode=0")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	r.process = cmd.Process
	lines := bufio.NewScanner(out)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "nats://") {
		t.Fatalf("the server says %q", lines.Text())
	}
	r.url = lines.Text()
	go func() {
		for lines.Scan() { // so that it never waits
		}
	}()
	return r
}

// write writes the configuration. Rank 1 may not publish to, or subscribe to, what is denied.
func (r *reloadable) write(group string, size int, denyPublish, denySubscribe string) {
	r.t.Helper()
	var b strings.Builder
	b.WriteString("listen: 127.0.0.1:-1\nauthorization { users = [\n")
	for rank := range size {
		base := natsdp.DefaultSubjectPrefix + "." + group
		publish, subscribe := "", ""
		if rank == 1 && denyPublish != "" {
			publish = fmt.Sprintf(", deny: %q", base+"."+denyPublish)
		}
		if rank == 1 && denySubscribe != "" {
			subscribe = fmt.Sprintf(", deny: %q", base+"."+denySubscribe)
		}
		fmt.Fprintf(&b, "{user: rank%d, password: pw, permissions: {publish: {allow: %q%s}, "+
			"subscribe: {allow: [%q, %q]%s}}}\n", rank, fmt.Sprintf("%s.*.%d", base, rank), publish,
			base+".all.*", fmt.Sprintf("%s.%d.*", base, rank), subscribe)
	}
	b.WriteString("]}\n")
	if err := os.WriteFile(r.file, []byte(b.String()), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// A rank whose permission to speak or to hear is taken is told so by its error and in its log, and the
// others are told which rank it is.
func TestPermissionTaken(t *testing.T) {
	t.Parallel()
	for what, denied := range map[string][2]string{
		"publish": {"all.1", ""}, "subscribe": {"", "all.*"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			const size = 3
			name, log := newName(), &syncBuffer{}
			r := newReloadable(t, name, size)
			group := joinAll(t, name, size, func(rank int) []natsdp.Option {
				opts := []natsdp.Option{natsdp.WithURL(r.url, nats.UserInfo(fmt.Sprintf("rank%d", rank), "pw"))}
				if rank == 1 {
					opts = append(opts, natsdp.WithLogger(slog.New(slog.NewTextHandler(log, nil))))
				}
				return opts
			})
			together(t, group, 1)
			r.write(name, size, denied[0], denied[1])
			if err := r.process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			// It may take a step until the server has loaded that. Then none is complete for rank 1.
			named := false
			deadline := time.Now().Add(patience)
			for step := uint64(2); time.Now().Before(deadline) && !named; step++ {
				errs := takeStep(t, group, step)
				named = errors.Is(errs[1], nats.ErrPermissionViolation)
				if named && !errors.Is(errs[1], fwd.ErrRankMissing) {
					t.Errorf("rank 1: %v", errs[1])
				}
			}
			if !named {
				t.Error("rank 1 is not told that it has no permission")
			}
			waitFor(t, "a line in the log", func() bool {
				return strings.Contains(strings.ToLower(log.String()), "permissions violation")
			})
			for step := uint64(1 << 20); step < 1<<20+3; step++ {
				if errs := takeStep(t, group, step); errs[0] == nil || errs[1] == nil {
					t.Errorf("ranks 0 and 1 complete a step: %v", errs)
				}
			}
		})
	}
}

// takeStep lets all ranks take a step, and returns what comes of it. They don't wait for so long that they
// ask each other: answers come in another way.
func takeStep(t *testing.T, group []*natsdp.Coordinator, step uint64) []error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	errs := make([]error, len(group))
	var wg sync.WaitGroup
	for rank, c := range group {
		wg.Go(func() {
			_, errs[rank] = c.Exchange(ctx, vote(rank, step))
		})
	}
	wg.Wait()
	return errs
}

// A vote that is too long for the server with its trace state goes without it.
func TestTraceStateIsCut(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	opts.MaxPayload = 300
	s := startServer(t, opts)
	group := joinAll(t, newName(), 2, at(s))
	state := trace.TraceState{}
	for key := 'a'; key < 'e'; key++ {
		state, _ = state.Insert(string(key), strings.Repeat("x", 64))
	}
	span := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceState: state, Remote: true,
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	first := vote(0, 1)
	first.SpanContext = span
	done := begin(ctx, group[0], first)
	votes, err := group[1].Exchange(ctx, vote(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	if got := votes[0].SpanContext; got.SpanID() != span.SpanID() || got.TraceState().Len() != 0 {
		t.Errorf("the vote has %v, want its span without the state", got)
	}
	receive(t, done)
}

// A server that takes too few subscriptions ends Join with the reason.
func TestTooFewSubscriptions(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	opts.MaxSubs = 1
	s := startServer(t, opts)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := natsdp.Join(ctx, natsdp.Config{Group: newName(), Size: 2}, at(s)(0)...)
	if !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) || ctx.Err() != nil {
		t.Errorf("%v, want %v, and soon", err, nats.ErrMaxSubscriptionsExceeded)
	}
}

// A rank that had no room for messages is told so if a step fails.
func TestSlowConsumerIsNamed(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 2, at(s))
	together(t, group, 1)
	overrun(t, s, name, group[0])
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := group[0].Exchange(ctx, vote(0, 2)); !errors.Is(err, nats.ErrSlowConsumer) {
		t.Errorf("%v, want %v", err, nats.ErrSlowConsumer)
	}
}
