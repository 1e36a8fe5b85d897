package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// stopTimeout is how long the processes may take to stop when they are told to, before they are
// killed. They end their steps and deliver their last spans.
const stopTimeout = stopGrace + shutdownTimeout + 10*time.Second

// serveProcesses serves by a process for each rank, and a NATS server in this one that connects
// them. It prints what came of all of them.
func serveProcesses(ctx context.Context, o *options, stdout, stderr io.Writer) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	nats, err := startServer()
	if err != nil {
		return err
	}
	defer nats.WaitForShutdown()
	defer nats.Shutdown()
	ranks := make([]*process, o.dp)
	stderr = &oneAtATime{to: stderr}
	for rank := range ranks {
		ranks[rank] = newProcess(rank, program, o.processArgs(rank, nats.ClientURL()), stderr)
	}
	runAll(ctx, ranks, max(o.joinTimeout, 2*o.exchangeTimeout+o.rejoin)+shutdownTimeout)

	var reports []*report
	var errs []error
	for _, p := range ranks {
		r, err := p.report()
		if err != nil {
			errs = append(errs, fmt.Errorf("rank %d: %w", p.rank, err))
			continue
		}
		reports = append(reports, r)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	all := mergeReports(reports)
	err = all.print(stdout, o.json)
	if c := all.Check; c != nil && err == nil {
		if !o.json {
			err = c.print(stdout)
		}
		err = cmp.Or(err, c.err())
	}
	return err
}

// startServer starts a NATS server on a free port, for this host alone.
func startServer() (*server.Server, error) {
	s, err := server.NewServer(
		&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true},
	)
	if err != nil {
		return nil, fmt.Errorf("NATS server: %w", err)
	}
	s.Start()
	const patience = 10 * time.Second
	if !s.ReadyForConnections(patience) {
		s.Shutdown()
		return nil, fmt.Errorf("NATS server: it takes no connections after %v", patience)
	}
	return s, nil
}

// processArgs returns the arguments of a rank's process: those of this one, and its place.
func (o *options) processArgs(rank int, url string) []string {
	args := []string{"-nats=" + url, "-rank=" + strconv.Itoa(rank), "-json"}
	for _, name := range slices.Sorted(maps.Keys(o.given)) {
		value := o.given[name]
		switch name {
		case "processes", "json":
			continue
		case "results":
			value += "." + strconv.Itoa(rank)
		}
		value = o.telemetryOptions.ofRank(name, value, rank)
		args = append(args, "-"+name+"="+value)
	}
	return args
}

// process is the process of a rank.
type process struct {
	rank   int
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr *lines
	err    error // how it ended
}

func newProcess(rank int, program string, args []string, stderr io.Writer) *process {
	p := &process{
		rank:   rank,
		cmd:    exec.Command(program, args...),
		stderr: newLines(stderr, fmt.Sprintf("rank %d: ", rank)),
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, p.stderr
	p.cmd.WaitDelay = time.Second // it starts no others that could hold its output
	onItsOwn(p.cmd)
	return p
}

// runAll runs processes until all have ended. When ctx ends they are asked to stop, and after a
// while they are killed; so are the others when one can't be started, or has failed and they have
// not noticed by themselves within limit.
func runAll(ctx context.Context, all []*process, limit time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running, starting sync.WaitGroup
	failed := make(chan struct{}, len(all))
	starting.Add(len(all))
	for _, p := range all {
		running.Go(func() {
			// The kernel watches over the thread that started a process, so this one must stay.
			runtime.LockOSThread()
			p.err = p.cmd.Start()
			starting.Done()
			if p.err != nil {
				cancel()
				return
			}
			p.err = p.cmd.Wait()
			p.stderr.flush()
			if _, err := p.report(); err != nil {
				failed <- struct{}{}
			}
		})
	}
	starting.Wait()
	ended := make(chan struct{})
	go func() {
		running.Wait()
		close(ended)
	}()

	// until waits for the end, or for something else that calls for it.
	until := func(timeout <-chan time.Time, failed <-chan struct{}) (over bool) {
		select {
		case <-ended:
			return true
		case <-ctx.Done():
		case <-failed:
		case <-timeout:
		}
		return false
	}
	if until(nil, failed) || until(time.After(limit), nil) {
		return
	}
	signalAll(all, syscall.SIGTERM)
	select {
	case <-ended:
	case <-time.After(stopTimeout):
		signalAll(all, os.Kill)
		<-ended
	}
}

func signalAll(all []*process, s os.Signal) {
	for _, p := range all {
		if p.cmd.Process != nil {
			_ = p.cmd.Process.Signal(s) // it may have ended
		}
	}
}

// report returns what the process has printed. One that found wrong answers, or could not compare
// all, has a report and says so by its exit status too.
func (p *process) report() (*report, error) {
	var r report
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil {
		if p.err == nil {
			return nil, fmt.Errorf("its report: %w", err)
		}
		return nil, p.err
	}
	if p.err != nil && (r.Check == nil || r.Check.Agreed == r.Check.Requests) {
		return nil, p.err
	}
	return &r, nil
}

// lines writes whole lines, each with a prefix and in one piece.
type lines struct {
	to     io.Writer
	prefix string
	begun  []byte // of the next line
}

func newLines(to io.Writer, prefix string) *lines { return &lines{to: to, prefix: prefix} }

// Write implements [io.Writer].
func (l *lines) Write(text []byte) (int, error) {
	l.begun = append(l.begun, text...)
	for {
		line, rest, whole := bytes.Cut(l.begun, []byte("\n"))
		if !whole {
			return len(text), nil
		}
		l.write(line)
		l.begun = rest
	}
}

// flush writes a last line that has no end.
func (l *lines) flush() {
	if len(l.begun) > 0 {
		l.write(l.begun)
		l.begun = nil
	}
}

func (l *lines) write(line []byte) {
	fmt.Fprintf(l.to, "%s%s\n", l.prefix, line)
}

// oneAtATime lets several goroutines write to one writer.
type oneAtATime struct {
	mu sync.Mutex
	to io.Writer
}

// Write implements [io.Writer].
func (w *oneAtATime) Write(text []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(text)
}
