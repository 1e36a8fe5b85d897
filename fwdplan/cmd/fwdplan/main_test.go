// This file runs the command: what it prints, draws and refuses.

package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/forwardctx/fwd/fwdplan"
)

// snapshotFile writes a snapshot of decode and mixed passes, and returns its path.
func snapshotFile(t *testing.T, name string) string {
	t.Helper()
	s := fwdplan.Snapshot{Name: name, Ranks: 1, LeftOut: fwdplan.LeftOut{Failed: 2}}
	for size := 1; size <= 60; size++ {
		s.Rows = append(s.Rows, fwdplan.Row{Tokens: size, Uniform: true, Passes: uint64(4000 / size)})
	}
	s.Rows = append(s.Rows, fwdplan.Row{Tokens: 300, Passes: 40}, fwdplan.Row{Tokens: 2048, Passes: 1000})
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "snapshot.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// command returns what the command prints.
func command(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if err := run(args, strings.NewReader(""), &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestTable(t *testing.T) {
	t.Parallel()
	path := snapshotFile(t, "target")
	got := command(t, "-graphs", "8", "-must", "512", "-compare", "default,1,2,4,8...", "-judge", path, path)
	for _, want := range []string{
		"18,735 passes of 61 sizes can use graphs, target",
		"plan             8      8", "default         51     51", "1,2,4,8...      10     10", "judged on",
		"With 7 graphs these passes would cost", "0 of 61 sizes were seen once", "Left out: 2 failed.",
	} {
		if !strings.Contains(strings.ReplaceAll(got, "\n", " "), want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for line := range strings.Lines(got) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > width && !strings.Contains(line, path) {
			t.Errorf("a line of %d characters: %s", n, line)
		}
	}
}

func TestJSON(t *testing.T) {
	t.Parallel()
	path := snapshotFile(t, "target")
	var got result
	if err := json.Unmarshal([]byte(command(t, "-json", "-graphs", "5", "-compare", "8,64,2048", path)),
		&got); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := fwdplan.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := fwdplan.Choose(s, fwdplan.Config{MaxGraphs: 5})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Plan, want) {
		t.Errorf("got %+v\nwant %+v", got.Plan, want)
	}
	if len(got.Compared) != 2 || got.Compared[1].Name != "8,64,2048" || got.Compared[1].Cost <= want.Cost {
		t.Errorf("compared %+v", got.Compared)
	}
}

func TestPicture(t *testing.T) {
	t.Parallel()
	path, svg := snapshotFile(t, "target"), filepath.Join(t.TempDir(), "plan.svg")
	for _, args := range [][]string{
		{"-graphs", "6"}, {"-graphs", "1"}, {"-graphs", "200"},
		{"-graphs", "9", "-mode", "FULL_AND_PIECEWISE", "-max-seqs", "32", "-separate", "-unseen"},
	} {
		command(t, append(args, "-svg", svg, path)...)
		data, err := os.ReadFile(svg)
		if err != nil {
			t.Fatal(err)
		}
		in, elements := xml.NewDecoder(bytes.NewReader(data)), 0
		for {
			token, err := in.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v: %v", args, err)
			}
			if _, ok := token.(xml.StartElement); ok {
				elements++
			}
		}
		if elements < 60 || bytes.Contains(data, []byte("NaN")) || bytes.Contains(data, []byte("Inf")) {
			t.Errorf("%v: a picture of %d elements\n%s", args, elements, data)
		}
	}
}

func TestLists(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"default":            {"default"},
		"default,1,2,4":      {"default", "1,2,4"},
		"8, 16...,default,3": {"8,16...", "default", "3"},
	} {
		if got := split(text); !reflect.DeepEqual(got, want) {
			t.Errorf("split(%q) = %q, want %q", text, got, want)
		}
	}
	for text, want := range map[string][]int{
		"1,2,4...":   {1, 2, 4, 8, 16, 32},
		"8,16,24...": {8, 16, 24, 32, 40},
		"1,5":        {1, 5},
		"4,8,...":    {4, 8, 16, 32},
	} {
		got, err := parseLadder(text, fwdplan.Plan{}, fwdplan.Config{Max: 40})
		if err != nil || !reflect.DeepEqual(got.Sizes, want) {
			t.Errorf("parseLadder(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	path, draft := snapshotFile(t, "target"), snapshotFile(t, "draft")
	damaged := filepath.Join(t.TempDir(), "damaged.json")
	if err := os.WriteFile(damaged, []byte("{\n\"format\": 1}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"nowhere.json"}, "nowhere.json: no such file"},
		{[]string{damaged}, "line 2: found a JSON number for format"},
		{[]string{"-"}, "-: fwd: invalid: line 1: the snapshot is empty"},
		{[]string{path, draft}, `snapshots of different Runners: name "target" with 1 ranks, name "draft" with 1`},
		{[]string{"-must", "512", "-max", "256", path}, "512 in Must is above Max, 256"},
		{[]string{"-multiple", "2", "-must", "7", path}, "7 in Must is no multiple of 2"},
		{[]string{"-compare", "4,2", path}, "4,2: fwd: invalid: capture sizes [4 2]"},
		{[]string{"-compare", "4,x", path}, `-compare 4,x: "x" is not a size`},
		{[]string{"-compare", "4...", path}, `"..." needs two ascending sizes`},
		{[]string{"-judge", damaged, path}, "line 2"},
	} {
		var out, errs strings.Builder
		exit := start(c.args, strings.NewReader(""), &out, &errs)
		if exit != 1 || out.Len() > 0 || !strings.HasPrefix(errs.String(), "fwdplan: ") ||
			!strings.Contains(errs.String(), c.want) {
			t.Errorf("%q: exit %d, stdout %q, stderr %q, want 1 and %q", c.args, exit, &out, &errs, c.want)
		}
	}
}

// TestBadFlags: a wrong command line is told apart from other errors, in one line and a hint. Help that
// is asked for is no error.
func TestBadFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		want string
	}{
		{"", "which snapshots? Give their files, or - for standard input"},
		{"-must 0 x", `invalid value "0" for flag -must: "0" is not a size`},
		{"-mode FASTER x", `invalid value "FASTER" for flag -mode: fwd: invalid: graph mode "FASTER" is none of`},
		{"-sizes 1 x", "flag provided but not defined: -sizes"},
	} {
		var out, errs strings.Builder
		exit := start(strings.Fields(c.args), strings.NewReader(""), &out, &errs)
		if exit != 2 || out.Len() > 0 || strings.Count(errs.String(), "\n") != 2 ||
			!strings.HasPrefix(errs.String(), "fwdplan -h explains the flags.\nfwdplan: "+c.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want 2 and %q", c.args, exit, &out, &errs, c.want)
		}
	}
	var out, errs strings.Builder
	exit := start([]string{"-help"}, strings.NewReader(""), &out, &errs)
	if exit != 0 || errs.Len() > 0 || !strings.Contains(out.String(), "\n  -graphs graphs\n") {
		t.Errorf("-help: exit %d, stdout %q, stderr %q", exit, &out, &errs)
	}
}

// TestReadmePicture draws README's picture again, so that it can't rot.
func TestReadmePicture(t *testing.T) {
	t.Parallel()
	svg := filepath.Join(t.TempDir(), "plan.svg")
	testdata := filepath.Join("..", "..", "testdata")
	command(t, "-graphs", "20", "-must", "512", "-svg", svg, filepath.Join(testdata, "first.json"))
	got, err := os.ReadFile(svg)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(testdata, "plan.svg"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("testdata/plan.svg is another picture; draw it anew with the commands in README.md")
	}
}
