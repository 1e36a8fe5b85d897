package main

import (
	"bytes"
	"context"
	"errors"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestApply(t *testing.T) {
	const source = "a := 1\nb := 1\n"
	for _, c := range []struct {
		name, old, new string
		want, wantErr  string
	}{
		{name: "once", old: "a := 1", new: "a := 2", want: "a := 2\nb := 1\n"},
		{name: "deletion", old: "a := 1\n", want: "\nb := 1\n"},
		{name: "more lines", old: "a := 1\n",
			new: "if x {\n\ta = \"y\"\n}\n", want: "if x { a = \"y\" ; } ; \nb := 1\n"},
		{name: "gone", old: "c := 1", new: "c := 2",
			wantErr: "fault gone: want its text once in x.go, found it 0 times:\n\t| c := 1"},
		{name: "ambiguous", old: ":= 1", new: ":= 2",
			wantErr: "fault ambiguous: want its text once in x.go, found it 2 times"},
		{name: "idle", old: "a := 1", new: "a := 1", wantErr: "fault idle changes nothing"},
		{name: "empty", new: "a := 1", wantErr: "fault empty changes nothing"},
	} {
		f := fault{name: c.name, file: "x.go", old: c.old, new: c.new}
		got, err := f.apply(source)
		if got != c.want || (err == nil) != (c.wantErr == "") ||
			err != nil && !strings.HasPrefix(err.Error(), c.wantErr) {
			t.Errorf("%s: %q, %v; want %q, %q", c.name, got, err, c.want, c.wantErr)
		}
	}
}

// TestSameLines: what follows a change stays on its line, and goes on where the change ends.
func TestSameLines(t *testing.T) {
	for _, c := range []struct{ old, text, want string }{
		{"a\n", "b\n", "b\n"},
		{"a\nb\n", "", "\n\n"},
		{"a\nb\n", "c\n", "c\n\n"},
		{"a\nb", "c", "\nc"},
		{"a\n", "if b {\n\tc()\n}\n", "if b { c ( ) ; } ; \n"},
		{"a, b\n\tc", "d\n\n\tif e {\n\t}\n\tf", "\nd ; if e { } ; f "},
	} {
		if got := sameLines(c.old, c.text); got != c.want {
			t.Errorf("%q for %q: %q, want %q", c.text, c.old, got, c.want)
		}
	}
}

func packageSources(t *testing.T) (root string, src sources) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if src, err = readSources(root); err != nil {
		t.Fatal(err)
	}
	return root, src
}

// TestFaults: every fault still applies to the package, and leaves it a Go file.
func TestFaults(t *testing.T) {
	_, src := packageSources(t)
	if err := src.checkAll(faults); err != nil {
		t.Error(err)
	}
	names, kinds, changes := map[string]bool{}, map[kind]int{}, map[string]string{}
	for _, f := range faults {
		if !regexp.MustCompile(`^[a-z0-9-]+$`).MatchString(f.name) || f.what == "" || names[f.name] {
			t.Errorf("%s: want a name of its own, and words on what is wrong: %q", f.name, f.what)
		}
		names[f.name] = true
		kinds[f.kind]++
		text, err := f.apply(src[f.file])
		if err != nil {
			continue // reported above
		}
		if other := changes[f.file+text]; other != "" {
			t.Errorf("%s is the same change as %s", f.name, other)
		}
		changes[f.file+text] = f.name
		if _, err := parser.ParseFile(token.NewFileSet(), f.file, text, 0); err != nil {
			t.Errorf("%s: %v", f.name, err)
		}
	}
	for _, k := range []kind{
		arithmetic, coordination, protocol, planning, microbatch, inContext, running, graph, telemetry,
		overlap, ladder,
	} {
		if kinds[k] < 5 {
			t.Errorf("%d faults of kind %s", kinds[k], k)
		}
		delete(kinds, k)
	}
	if len(kinds) > 0 {
		t.Errorf("unknown kinds: %v", kinds)
	}
}

// TestNames: the tests that are run apart are there.
func TestNames(t *testing.T) {
	root, _ := packageSources(t)
	files, err := filepath.Glob(filepath.Join(root, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var tests []byte
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, text...)
	}
	for _, name := range slices.Concat(slowTests, moduleTests) {
		if !bytes.Contains(tests, []byte("func "+name+"(")) {
			t.Errorf("there is no test %s", name)
		}
	}
}

func TestOverlay(t *testing.T) {
	root, src := packageSources(t)
	dir := t.TempDir()
	f := &faults[0]
	path, err := src.overlay(f, root, dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(root, f.file); !bytes.Contains(text, []byte(want)) {
		t.Errorf("%s does not replace %s", text, want)
	}
	faulty, err := os.ReadFile(filepath.Join(dir, f.file))
	if want, _ := f.apply(src[f.file]); err != nil || string(faulty) != want {
		t.Errorf("%v, %d bytes, want the fault in %d", err, len(faulty), len(want))
	}
	if path, err = src.overlay(&control, root, dir); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != `{"Replace":{}}` {
		t.Errorf("the control's overlay is %s, %v", text, err)
	}
}

func TestBlameTest(t *testing.T) {
	for _, c := range []struct{ output, want string }{
		{"--- FAIL: TestA (0.00s)\n    x_test.go:3: wrong\nFAIL\n", "TestA"},
		{"--- FAIL: TestA (0.00s)\n    --- FAIL: TestA/sp=2 (0.00s)\n--- FAIL: TestB (0.00s)\n", "TestA/sp=2"},
		{"panic: test timed out after 40s\n\trunning tests:\n\t\tTestC (39s)\n", "TestC, which hangs"},
		{"panic: oops\n\ngoroutine 8 [running]:\nmain.f(0xc0)\n", "panic: oops"},
		{"fatal error: all goroutines are asleep\n\ngoroutine 1", "fatal error: all goroutines are asleep"},
		{"", "a test"},
	} {
		if got := blameTest("", c.output); got != c.want {
			t.Errorf("%q: %q, want %q", c.output, got, c.want)
		}
	}
}

// noticedBy returns the result of a fault that those detectors have noticed.
func noticedBy(k kind, detectors ...int) result {
	r := result{fault: fault{name: "f", kind: k, what: "w"}}
	for i := range r.verdicts {
		r.verdicts[i].asked = true
	}
	for _, d := range detectors {
		r.verdicts[d] = verdict{asked: true, noticed: true, by: "it"}
	}
	return r
}

func TestProblem(t *testing.T) {
	broken := noticedBy(graph, byServe, byTelemetry, byUnit)
	broken.verdicts[byUnit] = verdict{err: errors.New("does not build")}
	for _, c := range []struct {
		name   string
		result result
		who    who
		want   string
	}{
		{"all", noticedBy(arithmetic, byServe, byTelemetry, byUnit), everybody, ""},
		{"serve", noticedBy(arithmetic, byServe), engineOnly, ""},
		{"telemetry", noticedBy(microbatch, byTelemetry), everybody, ""},
		{"the first that is asked", noticedBy(coordination, byUnit), untilNoticed, ""},
		{"unit tests alone", noticedBy(coordination, byUnit), everybody,
			"f (coordination) is not noticed by serve or telemetry: w"},
		{"unit tests, which do", noticedBy(inContext, byUnit), everybody, ""},
		{"tests with the SDK", noticedBy(telemetry, bySDK), untilNoticed, ""},
		{"nobody", noticedBy(telemetry), untilNoticed, "f is not noticed: w"},
		{"not the engine", noticedBy(arithmetic), engineOnly, "f is not noticed: w"},
		{"a detector that fails", broken, untilNoticed, "f: does not build"},
	} {
		got := ""
		if err := c.result.problem(c.who); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestControl(t *testing.T) {
	if err := (verdict{}).controlError("sdk"); err != nil {
		t.Error(err)
	}
	err := verdict{noticed: true, by: "it", output: "so"}.controlError("sdk")
	if err == nil || err.Error() != "without a fault, sdk fails (it):\nso" {
		t.Errorf("a control that fails: %v", err)
	}
}

// TestTry: a fault is shown to the detectors of its kind in order, until the first that notices.
func TestTry(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds programs")
	}
	root, src := packageSources(t)
	for _, c := range []struct {
		name string
		who  who
		kind kind
		want string
	}{
		{"until noticed", untilNoticed, graph, "unit: -; sdk: yes"},
		{"telemetry first", untilNoticed, telemetry, "sdk: yes"},
		{"overlap first", untilNoticed, overlap, "overlap: -; serve: -"},
		{"everybody", everybody, telemetry, "unit: -; sdk: yes; telemetry: -; serve: -"},
		{"the engine", engineOnly, arithmetic, "telemetry: -; serve: -"},
	} {
		b := &bench{modules: modules{root: root}, sources: src, tmp: t.TempDir(), who: c.who}
		for i := range b.detectors {
			b.detectors[i] = detector{
				module: root + "/examples", build: []string{"build", "./mutants"}, dir: root,
				runs: []string{"-h"}, timeout: time.Minute,
				blame:   func(string, string) string { return "yes" },
				control: func() error { return nil },
			}
		}
		b.detectors[bySDK].runs = []string{"-no-such-flag"} // the command itself stands for a detector
		var out bytes.Buffer
		newTable(&out, options{}).row(b.try(t.Context(), fault{name: "f", kind: c.kind}))
		if got := strings.TrimSpace(out.String()); !strings.HasSuffix(got, "  "+c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestSummary(t *testing.T) {
	var out bytes.Buffer
	tab := newTable(&out, options{})
	results := []result{noticedBy(arithmetic, byServe, byUnit), noticedBy(graph)}
	for _, r := range results {
		tab.row(r)
	}
	err := tab.summary(results, 90*time.Second)
	if err == nil || err.Error() != "1 of 2 faults:\nf is not noticed: w" {
		t.Errorf("problems: %v", err)
	}
	lines := strings.Split(out.String(), "\n")
	want := "f        arithmetic    unit: it; sdk: -; telemetry: -; overlap: -; ladders: -; serve: it"
	if lines[0] != want {
		t.Errorf("row %q, want %q", lines[0], want)
	}
	want = "2 faults in 1m30s, unit noticed 1, sdk noticed 0, telemetry noticed 0, overlap noticed 0, " +
		"ladders noticed 0, serve noticed 1"
	if lines[2] != want {
		t.Errorf("summary %q, want %q", lines[2], want)
	}
}

func TestFlags(t *testing.T) {
	var out, errs bytes.Buffer
	for _, c := range []struct {
		args string
		exit int
		want string
	}{
		{"-run ( -list", 2, "missing closing )"},
		{"-run no-such-fault", 2, "mutants: no fault has such a name"},
		{"-j 0", 2, "mutants: -j is 0, want at least 1"},
		{"-all -engine", 2, "mutants: -all and -engine exclude each other"},
		{"-engine -run late-capture", 2, "mutants: no fault has such a name"},
		{"dp.go", 2, `mutants: unexpected arguments ["dp.go"]`},
		{"-h", 0, "-list"},
	} {
		errs.Reset()
		exit := run(t.Context(), strings.Fields(c.args), &out, &errs)
		if exit != c.exit || !strings.Contains(errs.String(), c.want) {
			t.Errorf("%s: exit %d, %q; want %d, %q", c.args, exit, &errs, c.exit, c.want)
		}
	}
	out.Reset()
	errs.Reset()
	exit := run(t.Context(), []string{"-list", "-v", "-run", "^" + faults[0].name + "$"}, &out, &errs)
	if exit != 0 || !strings.HasPrefix(out.String(), faults[0].name) || !strings.Contains(out.String(), "\t- ") {
		t.Errorf("-list: exit %d, %q, %q", exit, &errs, &out)
	}
}

// TestInterrupted: what ends the command ends it soon, with nothing left behind.
func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var out, errs bytes.Buffer
	began := time.Now()
	if exit := run(ctx, nil, &out, &errs); exit != 1 || errs.String() != "mutants: interrupted\n" {
		t.Errorf("exit %d, %q", exit, &errs)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if left, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}
