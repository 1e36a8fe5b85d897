// The program as several processes.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/google/go-cmp/cmp"
)

// asProgram is an environment variable that makes the test binary the program, so that the
// processes which it starts are of the code that is tested.
const asProgram = "SERVE_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// program is a running serve.
type program struct {
	*testing.T
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

// patience is how long a test waits for anything.
const patience = 2 * time.Minute

func start(t *testing.T, args ...string) *program {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	p := &program{T: t, cmd: exec.CommandContext(ctx, os.Args[0], args...)}
	p.cmd.Env = append(os.Environ(), asProgram+"=1")
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = 10 * time.Second
	onItsOwn(p.cmd)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// wait returns the exit status; -1 of a program that was killed.
func (p *program) wait() int {
	p.Helper()
	if err := p.cmd.Wait(); err != nil {
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
			p.Fatal(err)
		}
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *program) signal(s os.Signal) {
	p.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.Fatal(err)
	}
}

// report returns what the program has printed, once it has ended well.
func (p *program) report() *report {
	p.Helper()
	exit := p.wait()
	var r report
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil || exit != 0 || p.complaints() != "" {
		p.Fatalf("exit %d, stderr %q, %v in stdout %s", exit, &p.stderr, err, &p.stdout)
	}
	return &r
}

// warning is a line that warns of an exchange that will be tried again, or of one that was, or of ranks
// that take their time to start.
var warning = regexp.MustCompile(
	`(?m)^(rank \d+: )?time=\S+ level=WARN msg="` +
		`(exchange of votes failed|rank came late|waiting for ranks|a step (is|was) |this rank is not heard).*\n`,
)

// complaints returns what the program has printed to stderr beside such warnings.
func (p *program) complaints() string { return warning.ReplaceAllString(p.stderr.String(), "") }

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// hasResults reports whether there are at least n results in a file.
func hasResults(path string, n int) func() bool {
	return func() bool {
		text, _ := os.ReadFile(path) // it may not be there yet
		return bytes.Count(text, []byte("\n")) >= n
	}
}

// TestProcesses: ranks that are processes give the right answers, and one report of all.
func TestProcesses(t *testing.T) {
	for _, flags := range []string{
		"",
		"-spec 2",
		"-ubatches 2 -dp 2",
		"-sp 2 -chunk 7 -dp 3",
		"-loras 3",
		"-graph NONE",
		"-dp 1 -spec 1",
		"-overlap",
		"-overlap -dp 2 -sp 2 -ubatches 2 -loras 3 -graph FULL -speed 1000",
		"-dp 5 -sp 2 -ubatches 2 -spec 2 -loras 2 -graph FULL_DECODE_ONLY -speed 1000",
	} {
		t.Run(flags, func(t *testing.T) {
			t.Parallel()
			r := start(t, strings.Fields("-processes -json -check -requests 43 -max-context 150 "+flags)...).report()
			if r.Requests != 43 || r.Finished != 43 || r.Interrupted || r.FailedSteps != 0 || r.Check == nil ||
				*r.Check != (checkReport{Requests: 43, Agreed: 43}) {
				t.Errorf("%+v, check %+v", r, r.Check)
			}
			passes, modes := 0, 0
			for _, n := range r.Passes {
				passes += n
			}
			for _, n := range r.Modes {
				modes += n
			}
			if ranks := len(r.Waiting); passes != ranks*r.Steps || modes != passes ||
				r.Tokens != r.PromptTokens+r.GeneratedTokens || r.TokensPerSecond <= 0 {
				t.Errorf("%+v: %d passes in %d steps of %d ranks", r, passes, r.Steps, ranks)
			}
			for rank, w := range r.Waiting {
				if w.Rank != rank || w.Forward <= 0 || strings.Contains(flags, "-overlap") != (w.Hidden > 0) {
					t.Errorf("at %d: %+v", rank, w)
				}
			}
			one := start(t, strings.Fields("-json -requests 43 -max-context 150 "+flags)...).report()
			if r.PromptTokens != one.PromptTokens || r.GeneratedTokens != one.GeneratedTokens ||
				len(r.Waiting) != len(one.Waiting) ||
				(r.Speculation == nil) != (one.Speculation == nil) || (r.SplitPasses > 0) != (one.SplitPasses > 0) ||
				r.Graphs.Captures != one.Graphs.Captures {
				t.Errorf("as processes %+v, as goroutines %+v", r, one)
			}
		})
	}
}

// TestProcessesTable: without -json the report is the usual table, with the comparison below it.
func TestProcessesTable(t *testing.T) {
	p := start(t, "-processes", "-dp", "2", "-check", "-requests", "9", "-spec", "1")
	if exit := p.wait(); exit != 0 || p.complaints() != "" {
		t.Errorf("exit %d, stderr %q", exit, &p.stderr)
	}
	for _, want := range []string{" 9 finished\n", "\nguesses ", "\n  rank 1 ",
		"\ncheck: 9 of 9 requests agree with the reference\n"} {
		if !strings.Contains(p.stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, &p.stdout)
		}
	}
}

// TestProcessesTrace: what all ranks find in the trace is said once.
func TestProcessesTrace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trace.csv")
	text := "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" +
		"1,GPT-4,9,3,12,API log\n2,GPT-4,9,0,9,API log\n3,GPT-4,5,2,7,API log\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, "-processes", "-dp", "2", "-trace", path)
	want := "rank 0: serve: trace " + path + ": 1 of 3 calls failed, and are left out\n"
	if exit := p.wait(); exit != 0 || p.complaints() != want {
		t.Errorf("exit %d, stderr %q, want %q", exit, &p.stderr, want)
	}
}

// TestProcessesInterrupted: the first interrupt stops all ranks and prints what they have done. The
// same command serves the rest, and everything agrees.
func TestProcessesInterrupted(t *testing.T) {
	results := filepath.Join(t.TempDir(), "results")
	args := []string{"-processes", "-dp", "3", "-json", "-results", results, "-speed", "2"}
	p := start(t, args...)
	eventually(t, "results of every rank", func() bool {
		return hasResults(results+".0", 3)() && hasResults(results+".1", 3)() && hasResults(results+".2", 3)()
	})
	p.signal(os.Interrupt)
	r := p.report()
	if !r.Interrupted || r.Requests != 400 || r.Finished < 9 || r.Finished == 400 || len(r.Waiting) != 3 {
		t.Errorf("%+v", r)
	}
	written := 0
	for rank := range 3 {
		written += strings.Count(readText(t, fmt.Sprintf("%s.%d", results, rank)), "\n")
	}
	if written != r.Finished {
		t.Errorf("%d results written, %d requests finished", written, r.Finished)
	}
	again := start(t, append(args, "-check", "-speed", "0")...).report()
	if again.Interrupted || again.Finished != 400 || again.Resumed != r.Finished ||
		*again.Check != (checkReport{Requests: 400, Agreed: 400}) {
		t.Errorf("%+v, check %+v, want %d resumed", again, again.Check, r.Finished)
	}
	if again.GeneratedTokens == 0 ||
		again.GeneratedTokens+r.GeneratedTokens < start(t, "-json").report().GeneratedTokens {
		t.Errorf("%d tokens and then %d: not all were generated", r.GeneratedTokens, again.GeneratedTokens)
	}
	p = start(t, append(args, "-check", "-speed", "0", "-max-context", "10")...)
	if exit := p.wait(); exit != 1 || strings.Count(p.complaints(), "\n") != 1 ||
		!strings.Contains(p.complaints(), " is another than in this run, its fingerprint is ") {
		t.Errorf("files of another run: exit %d, stderr %q", exit, &p.stderr)
	}
}

// TestProcessesInterruptedCheck: what all ranks have finished by then is compared. Two signals shortly
// after each other are one.
func TestProcessesInterruptedCheck(t *testing.T) {
	results := filepath.Join(t.TempDir(), "results")
	p := start(t, "-processes", "-dp", "2", "-check", "-results", results, "-speed", "2")
	eventually(t, "results of both ranks", func() bool {
		return hasResults(results+".0", 3)() && hasResults(results+".1", 3)()
	})
	p.signal(syscall.SIGTERM)
	p.signal(syscall.SIGINT)
	exit := p.wait()
	written := strings.Count(readText(t, results+".0")+readText(t, results+".1"), "\n")
	want := fmt.Sprintf("\ncheck: %d of %d finished requests agree with the reference\n", written, written)
	if exit != 0 || p.complaints() != "" || !strings.HasSuffix(p.stdout.String(), want) {
		t.Errorf("exit %d, stderr %q, stdout %s: want %q at the end", exit, &p.stderr, &p.stdout, want)
	}
}

// TestProcessesFailAtOnce: a rank that fails before it joins ends the run, by its own sentence; the
// others don't wait for it.
func TestProcessesFailAtOnce(t *testing.T) {
	results := filepath.Join(t.TempDir(), "results")
	if err := os.WriteFile(results+".1", []byte("a note"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, "-processes", "-dp", "3", "-results", results, "-join-timeout", "1h")
	want := "serve: rank 1: results " + results + ".1: line 1: no result: it begins with \"a note\"\n"
	if exit := p.wait(); exit != 1 || p.stdout.Len() > 0 || p.complaints() != want {
		t.Errorf("exit %d, stdout %q, stderr %q, want %q", exit, &p.stdout, &p.stderr, want)
	}
}

// TestProcessesProgress: how far all ranks have come is printed before the figures.
func TestProcessesProgress(t *testing.T) {
	p := start(t, "-processes", "-dp", "2", "-requests", "30", "-speed", "3", "-json", "-progress")
	if exit := p.wait(); exit != 0 || p.complaints() != "" {
		t.Fatalf("exit %d, stderr %q", exit, &p.stderr)
	}
	in := json.NewDecoder(&p.stdout)
	last := progress{}
	for {
		var text json.RawMessage
		if err := in.Decode(&text); err != nil {
			t.Fatalf("no figures: %v", err)
		}
		now := progress{}
		if err := json.Unmarshal(text, &now); err != nil {
			t.Fatal(err)
		}
		if now.What == "" { // the figures
			break
		}
		if now.What != "serving" || now.Of != 30 || now.Done < last.Done || now.Tokens < last.Tokens {
			t.Errorf("%+v after %+v", now, last)
		}
		last = now
	}
	if last.Tokens == 0 || in.More() {
		t.Errorf("the last progress is %+v, and there is more after the figures: %v", last, in.More())
	}
}

// TestProcessesJoin: a process that is told to stop before all are there says so, and one that
// waits in vain whom it misses.
func TestProcessesJoin(t *testing.T) {
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer nats.Shutdown()
	url := nats.ClientURL()
	exit, out, errs := runServe(t, "-nats", url, "-dp", "3", "-rank", "1", "-join-timeout", "200ms")
	if exit != 1 || out != "" || !strings.Contains(errs, "group serve-") ||
		!strings.Contains(errs, "missing: ranks [0 2]") || !strings.Contains(errs, "-join-timeout 200ms") {
		t.Errorf("exit %d, stdout %q, stderr %q", exit, out, errs)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var stdout, stderr bytes.Buffer
	exit = run(ctx, []string{"-nats", url, "-dp", "3", "-rank", "1"}, &stdout, &stderr)
	if exit != 0 || warning.ReplaceAllString(stderr.String(), "") != "" ||
		!strings.Contains(stdout.String(), "0 finished, interrupted\n") ||
		!strings.HasPrefix(stdout.String(), "requests  133") {
		t.Errorf("exit %d, stderr %q, stdout %s", exit, &stderr, &stdout)
	}
	began := time.Now()
	exit, _, errs = runServe(
		t,
		"-nats",
		"nats://127.0.0.1:1",
		"-dp",
		"3",
		"-rank",
		"1",
		"-join-timeout",
		"300ms",
	)
	const want = ": nats: no servers available for connection: -join-timeout 300ms is over\n"
	if exit != 1 || !strings.HasSuffix(errs, want) ||
		time.Since(began) < 300*time.Millisecond {
		t.Errorf("no server: exit %d, stderr %q", exit, errs)
	}
	exit, _, errs = runServe(t, "-nats", url, "-dp", "1", "-rank", "0", "-nats-creds", "no-such-file")
	if exit != 1 || !strings.Contains(errs, "no-such-file") {
		t.Errorf("no credentials: exit %d, stderr %q", exit, errs)
	}
}

// TestProcessesRanks: processes of several ranks each give the right answers, and the figures of all their
// ranks.
func TestProcessesRanks(t *testing.T) {
	for flags, places := range map[string][]rankList{
		"-spec 2 -loras 3":             {{0, 1}, {2, 3}},
		"-overlap -replan 20 -sp 2":    {{0, 3}, {1, 2}},
		"-graph FULL -ubatches 2":      {{0, 2, 3}, {1}},
		"-overlap -speed 500 -chunk 7": {{0, 1, 2, 3}},
	} {
		t.Run(flags, func(t *testing.T) {
			t.Parallel()
			nats, err := startServer()
			if err != nil {
				t.Fatal(err)
			}
			defer nats.Shutdown()
			const common = "-dp 4 -json -check -requests 43 -max-context 150"
			programs := make([]*program, len(places))
			for i, ranks := range places {
				place := fmt.Sprintf(" -nats %s -ranks %v ", nats.ClientURL(), ranks)
				programs[i] = start(t, strings.Fields(common+place+flags)...)
			}
			var reports []*report
			for i, p := range programs {
				r := p.report()
				reports = append(reports, r)
				own := len(share(make([]engine.Request, 43), places[i], 4))
				if r.Requests != own || r.Finished != own || *r.Check != (checkReport{Requests: own, Agreed: own}) {
					t.Errorf("ranks %v: %+v, check %+v, want %d requests", places[i], r, r.Check, own)
				}
				var ranks rankList
				for _, w := range r.Waiting {
					ranks = append(ranks, w.Rank)
				}
				if !slices.Equal(ranks, places[i]) || r.Steps != reports[0].Steps || r.FailedSteps != 0 {
					t.Errorf("ranks %v: figures of %v, %d steps, %d failed", places[i], ranks, r.Steps, r.FailedSteps)
				}
			}
			all := mergeReports(reports)
			one := start(t, strings.Fields(common+" "+flags)...).report()
			if all.PromptTokens != one.PromptTokens || all.GeneratedTokens != one.GeneratedTokens ||
				*all.Check != *one.Check || len(all.Waiting) != len(one.Waiting) {
				t.Errorf("as processes %+v, as goroutines %+v", all, one)
			}
		})
	}
}

// TestProcessesRejoin: a process that is killed and started again by the same command goes on where it
// was. The others wait for it, and nothing is served twice.
func TestProcessesRejoin(t *testing.T) {
	alone := []rankList{{0}, {1}, {2}}
	t.Run("with guesses", func(t *testing.T) { rejoin(t, alone, 400, "-spec 1 -max-context 100") })
	t.Run("overlap", func(t *testing.T) { rejoin(t, alone, 400, "-overlap -max-context 100") })
	t.Run("two ranks each", func(t *testing.T) {
		rejoin(t, []rankList{{0, 1}, {2, 3}}, 400, "-spec 1 -max-context 100")
	})
	t.Run("graphs that change", func(t *testing.T) {
		for i, r := range rejoin(t, alone, 180, "-requests 180 -max-context 30 -spec 1 -replan 15") {
			if len(r.Ladders) < 2 {
				t.Errorf("rank %d: the graphs never changed: %+v", i, r.Ladders)
			}
		}
	})
}

// rejoin kills the second of some processes, which have these ranks, and starts it again. It returns the
// reports of the processes, which serve so many requests.
func rejoin(t *testing.T, places []rankList, requests int, flags string) (reports []*report) {
	t.Helper()
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer nats.Shutdown()
	results := filepath.Join(t.TempDir(), "results")
	dp := len(slices.Concat(places...))
	args := func(i int) []string {
		const common = "-json -check -exchange-timeout 1s -rejoin 1m -speed 20 "
		return strings.Fields(common + flags +
			fmt.Sprintf(" -nats %s -dp %d -ranks %v -results %s.%d", nats.ClientURL(), dp, places[i], results, i))
	}
	programs := make([]*program, len(places))
	for i := range programs {
		programs[i] = start(t, args(i)...)
	}
	eventually(t, "some results of the second process", hasResults(results+".1", 20))
	programs[1].signal(syscall.SIGKILL)
	if exit := programs[1].wait(); exit != -1 {
		t.Errorf("the second process was not killed: exit %d", exit)
	}
	written := strings.Count(readText(t, results+".1"), "\n")
	time.Sleep(1500 * time.Millisecond) // the others have failed for it
	programs[1] = start(t, args(1)...)
	for i, p := range programs {
		r := p.report()
		reports = append(reports, r)
		own := len(share(make([]engine.Request, requests), places[i], dp))
		if r.Requests != own || r.Finished != own || *r.Check != (checkReport{Requests: own, Agreed: own}) ||
			len(r.Waiting) != len(places[i]) || r.Waiting[0].Rank != places[i][0] {
			t.Errorf("ranks %v: %+v, check %+v, want %d requests", places[i], r, r.Check, own)
		}
		if i == 1 && r.Resumed != written || i != 1 && (r.Resumed != 0 || r.FailedSteps == 0) {
			t.Errorf("ranks %v: %d resumed, %d failed steps; the second process had written %d", places[i],
				r.Resumed, r.FailedSteps, written)
		}
	}
	return reports
}

func TestBadRankFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-nats nats://x", "serve: -nats is nats://x without a -rank or -ranks, want 0 to 3 for -dp 4"},
		{"-nats nats://x -rank 0 -ranks 0-3", "serve: -rank is 0 beside -ranks 0-3, want one of them"},
		{"-nats nats://x -ranks 5,2-4 -dp 5", "serve: -ranks is 2-5, want 0 to 4 for -dp 5"},
		{"-nats nats://x -ranks 0,2-3,3", `value "0,2-3,3" for flag -ranks: rank 3 is in it twice`},
		{"-nats nats://x -ranks 3-1", `-ranks: "3-1" is no rank from 0 to 63, and no range of them such as 0-3`},
		{"-nats nats://x -ranks 0-64", `-ranks: "0-64" is no rank from 0 to 63`},
		{"-nats nats://x -ranks 0,,1", `-ranks: "" is no rank from 0 to 63`},
		{"-nats nats://x -ranks 0-0x1", `-ranks: "0-0x1" is no rank from 0 to 63`},
		{"-ranks 0-1", "serve: -ranks is 0-1: it needs -nats"},
		{"-processes -ranks 1", "serve: -ranks is 1: it needs -nats"},
		{"-nats nats://x -rank 2 -dp 2", "serve: -rank is 2, want 0 to 1 for -dp 2"},
		{"-nats nats://x -rank -1", "serve: -rank is -1, want 0 to 3 for -dp 4"},
		{"-rank 1", "serve: -rank is 1: it needs -nats"},
		{"-processes -rank 1", "serve: -rank is 1: it needs -nats"},
		{"-processes -nats nats://x -rank 0", "serve: -nats is nats://x beside -processes"},
		{"-group g", "serve: -group is g: it needs -nats or -processes"},
		{"-processes -group a.b", `serve: -group is "a.b", want up to 64 letters, digits, - and _`},
		{"-results f", "serve: -results is f: it needs -nats or -processes"},
		{"-exchange-timeout 1s", "serve: -exchange-timeout is 1s: it needs -nats or -processes"},
		{"-processes -exchange-timeout 0", "serve: -exchange-timeout is 0s, want more than 0"},
		{"-rejoin 1s", "serve: -rejoin is 1s: it needs -nats or -processes"},
		{"-processes -rejoin -1s", "serve: -rejoin is -1s, want at least 0"},
		{"-join-timeout 1s", "serve: -join-timeout is 1s: it needs -nats or -processes"},
		{"-processes -join-timeout -1s", "serve: -join-timeout is -1s, want more than 0"},
		{"-processes -nats-creds f", "serve: -nats-creds is f: it needs -nats"},
		{"-nats-ca f", "serve: -nats-ca is f: it needs -nats"},
		{"-nats nats://x -rank 0 -nats-cert c", `serve: -nats-cert is "c" and -nats-key "": they need each other`},
		{"-nats nats://x -rank 0 -nats-key k", `serve: -nats-cert is "" and -nats-key "k": they need each other`},
	} {
		exit, out, errs := runServe(t, strings.Fields(c.args)...)
		if exit != 2 || out != "" || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q; want 2 and %q", c.args, exit, out, errs, c.want)
		}
	}
}

// TestMergeReports: what all ranks do together counts once, what each does for itself adds up.
func TestMergeReports(t *testing.T) {
	a := report{
		Requests: 1, Finished: 2, Resumed: 3, Seconds: 4, Steps: 5, FailedSteps: 6, Tokens: 17,
		PromptTokens: 8, GeneratedTokens: 9, TokensPerSecond: 4.25,
		Passes: map[string]int{
			"exact": 10,
		}, Modes: map[string]int{"FULL": 11, "NONE": 12}, DummyPasses: 13, SplitPasses: 14, DraftPasses: 15,
		Graphs: graphReport{WarmUp: 16, Captures: 17, Replays: 18}, Padding: paddingReport{Graph: 19, DP: 20},
		Waiting: []rankReport{{Rank: 0, Votes: 21, Experts: 22, Forward: 23}},
		HeldUp:  []heldUpReport{{Rank: 0, Votes: 1, VoteTimes: 2, Experts: 3, ExpertTimes: 4}, {Rank: 1}},
		Lowered: []int{1, 5}, Sent: []sentReport{{0, 1, 7}},
		Slowest: []stepReport{{Step: 9, Rank: 0, Took: 2}},
	}
	b := a
	b.Seconds, b.Steps, b.FailedSteps, b.Interrupted = 3, 50, 60, true
	b.Passes, b.Modes = map[string]int{"exact": 1, "dp_rank": 2}, map[string]int{"NONE": 3}
	b.Speculation, b.Check = &specReport{Proposed: 30, Accepted: 31}, &checkReport{Requests: 32, Agreed: 33}
	b.Waiting = []rankReport{{Rank: 1, Votes: 24}}
	b.HeldUp, b.Lowered, b.Sent = []heldUpReport{{Rank: 0, Votes: 10}, {Rank: 1, Votes: 20}}, []int{2, 4}, nil
	b.Slowest = []stepReport{{Step: 8, Rank: 1, Took: 3}}
	c := b
	c.Requests, c.Interrupted, c.Waiting = 100, false, nil
	c.HeldUp, c.Lowered, c.Slowest = nil, nil, nil
	want := &report{
		Requests: 102, Finished: 6, Resumed: 9, Interrupted: true, Seconds: 4,
		Steps: 50, FailedSteps: 60, Tokens: 51,
		PromptTokens: 24, GeneratedTokens: 27, TokensPerSecond: 12.75,
		Passes: map[string]int{
			"exact":   12,
			"dp_rank": 4,
		}, Modes: map[string]int{"FULL": 11, "NONE": 18}, DummyPasses: 39, SplitPasses: 42, DraftPasses: 45,
		Graphs: graphReport{WarmUp: 16, Captures: 51, Replays: 54}, Padding: paddingReport{Graph: 57, DP: 60},
		Speculation: &specReport{Proposed: 60, Accepted: 62}, Check: &checkReport{Requests: 64, Agreed: 66},
		Waiting: []rankReport{{Rank: 0, Votes: 21, Experts: 22, Forward: 23}, {Rank: 1, Votes: 24}},
		HeldUp: []heldUpReport{
			{Rank: 0, Votes: 11, VoteTimes: 2, Experts: 3, ExpertTimes: 4}, {Rank: 1, Votes: 20},
		},
		Lowered: []int{2, 5}, Sent: []sentReport{{0, 1, 7}},
		Slowest: []stepReport{{Step: 8, Rank: 1, Took: 3}, {Step: 9, Rank: 0, Took: 2}},
	}
	if diff := cmp.Diff(want, mergeReports([]*report{&a, &b, &c})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestLines: lines stay whole, whatever pieces they are written in.
func TestLines(t *testing.T) {
	var out bytes.Buffer
	l := lines{each: func(line []byte) { fmt.Fprintf(&out, "p: %s\n", line) }}
	for _, piece := range []string{"a", "b\nc\n", "\n", "d"} {
		if n, err := l.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	l.flush()
	l.flush()
	if got, want := out.String(), "p: ab\np: c\np: \np: d\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
