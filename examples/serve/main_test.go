// The program in one process: what it prints, and which flags it refuses.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
)

func runServe(t *testing.T, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	exit = run(t.Context(), args, &out, &errs)
	return exit, out.String(), errs.String()
}

func TestTable(t *testing.T) {
	exit, out, errs := runServe(t, "-requests", "20", "-max-context", "40", "-spec", "2", "-ubatches", "2",
		"-check")
	if exit != 0 || errs != "" {
		t.Fatalf("exit %d, stderr %q", exit, errs)
	}
	for _, want := range []string{
		`(?m)^requests +20 +20 finished$`, `(?m)^steps +\d+ `, `(?m)^tokens +\d+ `, `(?m)^tokens/s +\d+`,
		`(?m)^passes +\d+ `, `(?m)^ +\d+ +of them split into microbatches`, `(?m)^  FULL +\d+ `,
		`(?m)^reasons `, `(?m)^  exact +\d+ `,
		`(?m)^graphs +\d+ +captured in \S+$`, `(?m)^ +\d+ +replays$`, `(?m)^guesses +\d+ +\d+ accepted$`,
		`(?m)^padding +\d+ `, `(?m)^  graph +\d+ `, `(?m)^  dp +\d+ `, `(?m)^waiting `, `(?m)^  rank 3 `,
		`(?m)^held up others +votes  times +experts  times$`, `(?m)^rows sent to experts, from rank to rank$`,
		`(?m)^slowest steps +took$`, `(?m)^  \d+ +\d+ ms  rank \d: `,
		`check: 20 of 20 requests agree with the reference\n$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	checkWidth(t, out)
}

func TestJSON(t *testing.T) {
	exit, out, errs := runServe(t, "-json", "-check", "-dp", "2", "-requests", "9", "-speed", "1000")
	if exit != 0 || errs != "" {
		t.Fatalf("exit %d, stderr %q", exit, errs)
	}
	var got report
	in := json.NewDecoder(strings.NewReader(out))
	in.DisallowUnknownFields()
	if err := in.Decode(&got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if _, err := in.Token(); err != io.EOF {
		t.Errorf("more than one object: %s", out)
	}
	passes, modes := 0, 0
	for _, n := range got.Passes {
		passes += n
	}
	for _, n := range got.Modes {
		modes += n
	}
	prompt, generated := 0, 0
	for _, r := range trace.Default()[:9] {
		prompt, generated = prompt+r.ContextTokens, generated+r.GeneratedTokens
	}
	if got.Requests != 9 || got.Finished != 9 || got.Interrupted || passes != 2*got.Steps || modes != passes ||
		got.Graphs.Captures == 0 || got.Graphs.Replays <= got.Graphs.Captures ||
		got.Speculation != nil || got.SplitPasses != 0 || got.DraftPasses != 0 || len(got.Waiting) != 2 ||
		got.Waiting[1].Rank != 1 ||
		got.PromptTokens != prompt || got.GeneratedTokens != generated || got.Tokens != prompt+generated ||
		got.TokensPerSecond <= 0 || got.Check == nil || *got.Check != (checkReport{Requests: 9, Agreed: 9}) {
		t.Errorf("%+v", got)
	}
	if _, out, _ := runServe(t, "-json", "-requests", "1"); strings.Contains(out, "check") {
		t.Errorf("a check that was not asked for: %s", out)
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	var out, errs bytes.Buffer
	if exit := run(ctx, []string{"-speed", "1"}, &out, &errs); exit != 0 || errs.Len() > 0 ||
		!strings.Contains(out.String(), "finished, interrupted\n") {
		t.Errorf("exit %d, stderr %q, stdout %s", exit, &errs, &out)
	}
}

// TestInterruptedCheck: after an interrupt what is finished is compared, and nothing else counts. A
// check that is itself interrupted says so.
func TestInterruptedCheck(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	exit := run(ctx, []string{"-check"}, &out, &errs)
	if want := "check: 0 of 0 finished requests agree with the reference\n"; exit != 0 || errs.Len() > 0 ||
		!strings.HasSuffix(out.String(), want) {
		t.Errorf("exit %d, stderr %q, stdout %s: want 0, and %q at the end", exit, &errs, &out, want)
	}
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	requests := trace.Requests(trace.Default()[:2], 5)
	got := check(ctx, weights, requests, []engine.Result{{Finished: true}, {ID: 1}}, newScreen(&errs))
	if want := (checkReport{Requests: 1, Unfinished: 1}); got != want || got.err() == nil ||
		errs.String() != "serve: check: interrupted before all requests were compared\n" {
		t.Errorf("%+v, want %+v; stderr %q", got, want, &errs)
	}
}

func TestBadFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-dp 0", "serve: -dp is 0, want 1 to 64"},
		{"-dp 65", "serve: -dp is 65, want 1 to 64"},
		{"-dp two", `invalid value "two" for flag -dp`},
		{"-sp 0", "serve: -sp is 0, want 1 to 16"},
		{"-loras -1", "serve: -loras is -1, want 0 to 64"},
		{"-graph SOME", `graph mode "SOME" is none of NONE, PIECEWISE, FULL,`},
		{"-ubatches 0", "serve: -ubatches is 0, want 1 to 16"},
		{"-decode-ubatch-threshold 0", "serve: -decode-ubatch-threshold is 0, want at least 1"},
		{"-prefill-ubatch-threshold -1", "serve: -prefill-ubatch-threshold is -1, want at least 1"},
		{"-decode-ubatch-threshold 8", "serve: -decode-ubatch-threshold is 8: it needs -ubatches of 2 or more"},
		{"-ubatches 1 -prefill-ubatch-threshold 8", "serve: -prefill-ubatch-threshold is 8: it needs -ubatches "},
		{"-spec -1", "serve: -spec is -1, want 0 to 31"},
		{"-overlap -spec 2", "serve: -overlap with -spec 2: a step can't be scheduled before "},
		{"-chunk 0", "serve: -chunk is 0, want at least 1"},
		{"-requests -1", "serve: -requests is -1, want at least 0"},
		{"-max-context -1", "serve: -max-context is -1, want at least 0"},
		{"-speed -1", "serve: -speed is -1, want a finite number of at least 0"},
		{"-speed NaN", "serve: -speed is NaN"},
		{"-speed Inf", "serve: -speed is +Inf"},
		{"-dp 0 -chunk -3", "serve: -chunk is -3"},
		{"-unknown", "flag provided but not defined: -unknown"},
		{"trace.csv", `serve: unexpected arguments ["trace.csv"]`},
	} {
		exit, out, errs := runServe(t, strings.Fields(c.args)...)
		if exit != 2 || out != "" || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q; want 2 and %q", c.args, exit, out, errs, c.want)
		}
	}
	const want = "serve -h explains the flags.\n" +
		"serve: -dp is 0, want 1 to 64\nserve: -chunk is -3, want at least 1\n"
	if _, _, errs := runServe(t, "-dp", "0", "-chunk", "-3"); errs != want {
		t.Errorf("%q, want what is wrong last: %q", errs, want)
	}
}

// TestUsage: the usage has every flag, in groups, and fits a terminal.
func TestUsage(t *testing.T) {
	exit, out, errs := runServe(t, "-h")
	if exit != 0 || errs != "" {
		t.Fatalf("exit %d, stderr %q", exit, errs)
	}
	for _, want := range []string{
		"\n  serve -check\n", "\n\nTrace: what is served\n  -max-context N\n",
		"\n\nGraphs, and sizes of batches\n  -batched-tokens tokens\n",
		"(default 30s)\n", "\n  -nats URL\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	for line := range strings.Lines(out) {
		if len(strings.ReplaceAll(line, "\t", "    ")) > 81 {
			t.Errorf("a line is too long: %q", line)
		}
	}
}

func TestBadTrace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trace.csv")
	if err := os.WriteFile(path,
		[]byte("TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00,5,5\n2026-01-01 00:00:00,5,-5\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	want := "serve: trace " + path + ": line 3: GeneratedTokens \"-5\" is not a whole number from 0 to 1048576\n"
	if exit, out, errs := runServe(t, "-trace", path); exit != 1 || out != "" || errs != want {
		t.Errorf("exit %d, stdout %q, stderr %q, want 1 and %q", exit, out, errs, want)
	}
	if exit, out, errs := runServe(t, "-trace", path+"x"); exit != 1 || out != "" ||
		!strings.Contains(errs, "no such file") {
		t.Errorf("exit %d, stdout %q, stderr %q, want 1 and the missing file", exit, out, errs)
	}
}

// TestSlowReplay: arrivals that a run can't wait for are refused, and don't come immediately.
func TestSlowReplay(t *testing.T) {
	exit, out, errs := runServe(t, "-dp", "1", "-requests", "3", "-speed", "1e-15", "-json")
	const want = "serve: -speed is 1e-15: request 1 would arrive after 1.88e+14 s, want at most 9.22e+09 s\n"
	if exit != 1 || out != "" || errs != want {
		t.Errorf("exit %d, stdout %q, stderr %q, want %q", exit, out, errs, want)
	}
}

// TestDifferences: wrong answers are printed and don't count as agreeing.
func TestDifferences(t *testing.T) {
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	requests := trace.Requests(trace.Default()[:14], 5)
	results := make([]engine.Result, len(requests))
	for i, r := range requests {
		tokens, logits, err := model.Generate(t.Context(), weights, model.NoAdapter, r.Prompt, r.MaxTokens)
		if err != nil {
			t.Fatal(err)
		}
		results[i] = engine.Result{ID: r.ID, Finished: true, Tokens: tokens, Logits: logits}
		if i >= 2 {
			tokens[len(tokens)-1] ^= 1
		}
	}
	var errs bytes.Buffer
	if got, want := check(t.Context(), weights, requests, results,
		newScreen(&errs)), (checkReport{Requests: 14, Agreed: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if out := errs.String(); strings.Count(out, "\n") != 11 ||
		!strings.Contains(out, "serve: request 2: served") || !strings.Contains(out, "and 2 more") {
		t.Errorf("stderr %s", out)
	}
}
