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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// stopTimeout is how long the processes may take to stop when they are told to, before they are
// killed. They end their steps and deliver their last spans.
const stopTimeout = stopGrace + shutdownTimeout + 10*time.Second

// serveProcesses serves by a process for each rank, and a NATS server in this one that connects
// them. It prints what came of all of them, or why the first one failed.
func serveProcesses(ctx context.Context, o *options, stdout io.Writer, stderr *screen) error {
	requests, _, err := o.readRequests(io.Discard)
	if err != nil {
		return err
	}
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
	for rank := range ranks {
		ranks[rank] = newProcess(rank, program, o.processArgs(rank, nats.ClientURL(), stderr.shows()), stderr)
	}
	bar := startBar(stderr, func() progress { return progressOf(ranks, len(requests)) })
	failed := runAll(ctx, ranks, o.check)
	bar.stop()
	if failed != nil {
		return failed.failure()
	}
	var reports []*report
	for _, p := range ranks {
		r, err := p.report()
		if err != nil {
			return err
		}
		reports = append(reports, r)
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
func (o *options) processArgs(rank int, url string, progress bool) []string {
	args := []string{
		"-nats=" + url, "-rank=" + strconv.Itoa(rank), "-json", "-progress=" + strconv.FormatBool(progress),
	}
	for _, name := range slices.Sorted(maps.Keys(o.given)) {
		value := o.given[name]
		switch name {
		case "processes", "json", "progress":
			continue
		case "results", "sizes":
			value += "." + strconv.Itoa(rank)
		}
		value = o.telemetryOptions.ofRank(name, value, rank)
		args = append(args, "-"+name+"="+value)
	}
	return args
}

// process is the process of a rank.
type process struct {
	rank           int
	cmd            *exec.Cmd
	screen         io.Writer
	stdout, stderr *lines
	printed        bytes.Buffer // its report
	sentence       string       // its last message, if that may be why it failed; not shown yet
	err            error        // how it ended

	progress atomic.Pointer[progress] // nil: it has said nothing yet
	muted    atomic.Bool              // its messages are not shown
}

func newProcess(rank int, program string, args []string, screen io.Writer) *process {
	p := &process{rank: rank, cmd: exec.Command(program, args...), screen: screen}
	p.stdout, p.stderr = &lines{each: p.print}, &lines{each: p.message}
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	p.cmd.Env = withoutLogin(os.Environ()) // the server is this program's own
	p.cmd.WaitDelay = time.Second          // it starts no others that could hold its output
	onItsOwn(p.cmd)
	return p
}

// print takes a line of the process's output: its progress, or a part of its report.
func (p *process) print(line []byte) {
	var now progress
	if bytes.HasPrefix(line, []byte(`{"progress":`)) && json.Unmarshal(line, &now) == nil {
		p.progress.Store(&now)
		return
	}
	p.printed.Write(line)
}

// message takes a line that the process says. The last sentence is kept: if the process fails, it
// says why.
func (p *process) message(line []byte) {
	p.showSentence()
	if sentence, ok := strings.CutPrefix(string(line), "serve: "); ok {
		p.sentence = sentence
		return
	}
	p.show(string(line))
}

func (p *process) showSentence() {
	if p.sentence != "" {
		p.show("serve: " + p.sentence)
		p.sentence = ""
	}
}

func (p *process) show(line string) {
	if !p.muted.Load() {
		fmt.Fprintf(p.screen, "rank %d: %s\n", p.rank, line)
	}
}

// failure returns why the process failed, in its own words if it had any.
func (p *process) failure() error {
	place := fmt.Sprintf("rank %d: ", p.rank)
	if p.sentence != "" {
		return errors.New(place + strings.TrimPrefix(p.sentence, place))
	}
	_, err := p.report()
	return fmt.Errorf("%s%w", place, err)
}

// progressOf returns how far all ranks are. Until each has said how many requests it serves, there
// are so many.
func progressOf(ranks []*process, requests int) progress {
	all := progress{What: "serving"}
	known := true
	for _, p := range ranks {
		now := p.progress.Load()
		if now == nil {
			known = false
			continue
		}
		all.What = now.What
		all.Done += now.Done
		all.Of += now.Of
		all.Tokens += now.Tokens
	}
	if !known {
		all.Of = requests
	}
	return all
}

// runAll runs processes until all have ended, and returns the first that failed. When ctx ends, or
// one fails or can't be started, the others are asked to stop: they can't go on without it. After a
// while they are killed, but not while they compare what they have finished.
func runAll(ctx context.Context, all []*process, check bool) (failed *process) {
	var running, starting sync.WaitGroup
	var first sync.Once
	failure := make(chan struct{})
	fail := func(p *process) {
		first.Do(func() {
			for _, other := range all {
				other.muted.Store(other != p) // what they say from now on follows from this
			}
			failed = p
			close(failure)
		})
	}
	starting.Add(len(all))
	for _, p := range all {
		running.Go(func() {
			// The kernel watches over the thread that started a process, so this one must stay.
			runtime.LockOSThread()
			p.err = p.cmd.Start()
			starting.Done()
			if p.err == nil {
				p.err = p.cmd.Wait()
				p.stdout.flush()
				p.stderr.flush()
			}
			if _, err := p.report(); err != nil {
				fail(p)
			} else {
				p.showSentence()
			}
		})
	}
	starting.Wait()
	ended := make(chan struct{})
	go func() {
		running.Wait()
		close(ended)
	}()

	select {
	case <-ended:
		return failed
	case <-failure:
	case <-ctx.Done():
	}
	signalAll(all, syscall.SIGTERM)
	var kill <-chan time.Time // never: the next signal ends this process, and the others with it
	if !check || ctx.Err() == nil {
		kill = time.After(stopTimeout)
	}
	select {
	case <-ended:
	case <-kill:
		signalAll(all, os.Kill)
		<-ended
	}
	return failed
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
	if err := json.Unmarshal(p.printed.Bytes(), &r); err != nil {
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

// lines cuts what is written to it into lines.
type lines struct {
	each  func(line []byte) // without its end; it may not keep the line
	begun []byte            // of the next line
}

// Write implements [io.Writer].
func (l *lines) Write(text []byte) (int, error) {
	l.begun = append(l.begun, text...)
	for {
		line, rest, whole := bytes.Cut(l.begun, []byte("\n"))
		if !whole {
			return len(text), nil
		}
		l.each(line)
		l.begun = rest
	}
}

// flush ends a last line that has no end.
func (l *lines) flush() {
	if len(l.begun) > 0 {
		l.each(l.begun)
		l.begun = nil
	}
}
