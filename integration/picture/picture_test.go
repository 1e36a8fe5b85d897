// Tests that the picture is drawn from its recording, and that the engine still takes such steps.
package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd/integration/picture/timeline"
	"github.com/google/go-cmp/cmp"
)

// The files are in another module, so go test does not see that they have changed: after an edit by
// hand, run it with -count=1.
const (
	recording = "../../testdata/step.json"
	drawing   = "../../testdata/step.svg"
	again     = "record and draw it again: go -C integration run ./picture -o ../testdata/step.svg"
)

func readRecording(t *testing.T, file string) []timeline.Span {
	t.Helper()
	spans, err := read(file)
	if err != nil {
		t.Fatal(err)
	}
	return spans
}

// TestDrawing draws the recording and compares it with the picture.
func TestDrawing(t *testing.T) {
	out := filepath.Join(t.TempDir(), "step.svg")
	if err := run(t.Context(), recording, out); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(drawing)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(string(got), "\n")); diff != "" {
		t.Errorf("%s is not what is drawn from %s (-file +drawn):\n%s", drawing, recording, diff)
	}
	if len(got) > 40<<10 {
		t.Errorf("the picture has %d bytes, want at most 40 KiB", len(got))
	}
}

// TestRecording records a step anew and compares its structure with the one that is drawn.
func TestRecording(t *testing.T) {
	out := filepath.Join(t.TempDir(), "step.svg")
	if err := run(t.Context(), "", out); err != nil {
		t.Fatal(err)
	}
	fresh := readRecording(t, strings.TrimSuffix(out, ".svg")+".json")
	kept := readRecording(t, recording)
	if diff := cmp.Diff(structure(kept), structure(fresh)); diff != "" {
		t.Errorf("%s is unlike the engine's steps (-file +engine):\n%s%s", recording, diff, again)
	}
	for _, spans := range [][]timeline.Span{kept, fresh} {
		checkStep(t, spans)
	}
}

// isOfRank reports whether a span is an exchange or a pass: each rank has one of both.
func isOfRank(s *timeline.Span) bool {
	return s.Kind() == timeline.Coordinate || s.Kind() == timeline.Forward
}

// structure returns a line for each exchange and each pass of a step, and one line for all other
// spans of a kind: how many of those there are may depend on time. A line says which parent and
// which attributes a span has, without the values of these. It leaves out the time that a pass
// waited, which a pass that never waited doesn't have.
func structure(spans []timeline.Span) []string {
	byID := map[string]*timeline.Span{}
	for i := range spans {
		byID[spans[i].ID] = &spans[i]
	}
	name := func(s *timeline.Span) string {
		if s == nil {
			return "nothing"
		}
		if rank, ok := s.Int(timeline.Rank); ok && isOfRank(s) {
			return fmt.Sprintf("%s of rank %d", s.Kind(), rank)
		}
		return s.Kind()
	}
	var lines []string
	for i := range spans {
		s := &spans[i]
		parent := name(byID[s.Parent])
		if !isOfRank(s) && byID[s.Parent] != nil {
			parent = byID[s.Parent].Kind()
		}
		line := name(s) + " below " + parent
		for _, key := range slices.Sorted(maps.Keys(s.Attributes)) {
			if key != timeline.WaitTime {
				line += fmt.Sprintf(", %s %T", key, s.Attributes[key])
			}
		}
		if isOfRank(s) || !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return lines
}

// checkStep checks that a step has one root and, below it, an exchange and a pass of each rank.
func checkStep(t *testing.T, spans []timeline.Span) {
	t.Helper()
	roots := slices.DeleteFunc(slices.Clone(spans), func(s timeline.Span) bool { return s.Parent != "" })
	if len(roots) != 1 {
		t.Fatalf("%d spans have no parent, want 1", len(roots))
	}
	want, got := map[string]int{}, map[string]int{}
	for rank := range ranks {
		want[fmt.Sprint(timeline.Coordinate, rank)] = 1
		want[fmt.Sprint(timeline.Forward, rank)] = 1
	}
	for i := range spans {
		s := &spans[i]
		if !isOfRank(s) {
			continue
		}
		rank, _ := s.Int(timeline.Rank)
		got[fmt.Sprint(s.Kind(), rank)]++
		if s.ID != roots[0].ID && s.Parent != roots[0].ID {
			t.Errorf("%s of rank %d is not below the root of the step", s.Name, rank)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("spans of each rank (-want +got):\n%s", diff)
	}
}

// TestEncode: what is read is what was written, one span in a line.
func TestEncode(t *testing.T) {
	want, err := os.ReadFile(recording)
	if err != nil {
		t.Fatal(err)
	}
	spans := readRecording(t, recording)
	got, err := encode(spans)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not as it would be written now:\n%s", recording, cmp.Diff(string(want), string(got)))
	}
	if lines := bytes.Count(got, []byte("\n")); lines != len(spans)+2 {
		t.Errorf("%d lines for %d spans", lines, len(spans))
	}
}

// TestBadInput: files that can't be read or drawn are errors that name them, and nothing is
// written.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.json")
	if err := os.WriteFile(bad, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, out, want string }{
		{recording, "step.png", `-o is "step.png", want a name that ends in .svg`},
		{filepath.Join(dir, "none.json"), filepath.Join(dir, "step.svg"), "none.json: no such file"},
		{bad, filepath.Join(dir, "step.svg"), "bad.json: json: cannot unmarshal object"},
	} {
		if err := run(t.Context(), c.from, c.out); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("drawing %s to %s: %v, want %q", c.from, c.out, err, c.want)
		}
		if _, err := os.Stat(c.out); err == nil {
			t.Errorf("%s was written", c.out)
		}
	}
}
