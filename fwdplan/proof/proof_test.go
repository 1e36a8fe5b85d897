// This file is about the simulation, and about what the proof prints.

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/fwdplan"
	"github.com/forwardctx/fwd/fwdplan/reqtrace"
)

// TestEngine follows two ranks with a budget of 4 tokens through every step.
func TestEngine(t *testing.T) {
	t.Parallel()
	begin := time.Unix(0, 0)
	rows := []reqtrace.Row{
		{Time: begin, ContextTokens: 3, GeneratedTokens: 3},                    // rank 0
		{Time: begin, ContextTokens: 6, GeneratedTokens: 1},                    // rank 1, in two chunks
		{Time: begin.Add(time.Hour), ContextTokens: 1, GeneratedTokens: 2},     // rank 0, when all are idle
		{Time: begin.Add(2 * time.Hour), ContextTokens: 9, GeneratedTokens: 1}, // rank 1
	}
	e := engine{ranks: 2, budget: 4, maxSeqs: 4, speed: 1, step: time.Millisecond, token: time.Microsecond}
	first, second, err := e.run(t.Context(), rows)
	if err != nil {
		t.Fatal(err)
	}
	us := func(n uint64) uint64 { return n * uint64(time.Microsecond) }
	want := []fwdplan.Row{
		{Tokens: 1, Uniform: true, Passes: 1, Nanoseconds: us(1001)}, // the third token of row 0, rank 1 being idle
		{Tokens: 2, Passes: 1, Nanoseconds: us(1002)},                // the rest of row 1 beside a decode
		{Tokens: 4, Passes: 1, Nanoseconds: us(1004)},                // the prompt of row 0 beside a chunk of row 1
	}
	if !reflect.DeepEqual(first.Rows, want) {
		t.Errorf("the first half has %+v\nwant %+v", first.Rows, want)
	}
	want = []fwdplan.Row{
		{Tokens: 1, Uniform: true, Passes: 1, Nanoseconds: us(1001)},
		{Tokens: 1, Passes: 1, Dummies: 1, Nanoseconds: us(2002)}, // the prompt of row 2, and the end of row 3's
		{Tokens: 4, Dummies: 2, Nanoseconds: us(2008)},            // 9 are 4 + 4 + 1
	}
	if !reflect.DeepEqual(second.Rows, want) {
		t.Errorf("the second half has %+v\nwant %+v", second.Rows, want)
	}
}

func TestEngineEnds(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	e := engine{ranks: 1, budget: 4, maxSeqs: 4, speed: 1, step: time.Millisecond}
	if _, _, err := e.run(ctx, reqtrace.Default()); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled simulation returned %v", err)
	}
}

// TestProof runs it on the built-in trace: the more graphs a plan has, the less it pads what it has seen.
func TestProof(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-speeds", "4,16,40"}, nil, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	tables := 0
	last, byDefault := 0.0, 0.0
	for line := range strings.Lines(out.String()) {
		fields := strings.Fields(strings.ReplaceAll(line, "%", ""))
		if strings.HasPrefix(line, "default") {
			tables++
		}
		if !strings.HasPrefix(line, "default") && !strings.HasPrefix(line, "plan") {
			continue
		}
		padding, err := strconv.ParseFloat(fields[len(fields)-3], 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		switch {
		case strings.HasPrefix(line, "default"):
			byDefault, last = padding, padding*100
		case padding > last:
			t.Errorf("more graphs pad more: %s", line)
		case strings.HasPrefix(line, "plan, at most 51") && padding > byDefault/20:
			t.Errorf("the default pads %v%%, the plan with as many graphs: %s", byDefault, line)
		}
		last = min(last, padding)
	}
	if tables != 3 {
		t.Errorf("%d tables, want 3:\n%s", tables, out.String())
	}
}

// TestSaved compares the snapshot that README's picture is drawn from with the one that the proof saves.
func TestSaved(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if err := run(t.Context(), []string{"-speeds", "8", "-save", folder}, nil, io.Discard,
		io.Discard); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(folder, "first.json"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("..", "testdata", "first.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("testdata/first.json is another snapshot; draw the picture anew with the commands in README.md")
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-ranks", "0"}, "-ranks 0"},
		{[]string{"-batched-tokens", "8", "-max-seqs", "9"}, "-batched-tokens 8, -max-seqs 9"},
		{[]string{"-speeds", "4,fast"}, `"fast" is not a number`},
		{[]string{"-speeds", "0"}, `"0" is not a number from 0.001`},
		{[]string{"a", "b"}, "2 traces, want one"},
		{[]string{"nowhere.csv"}, "nowhere.csv: no such file"},
		{[]string{"-"}, "-: line 1: the trace is empty"},
	} {
		err := run(t.Context(), c.args, strings.NewReader(""), io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want an error with %q", c.args, err, c.want)
		}
	}
}
