// Files of results: what is read back, and what is refused.

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/google/go-cmp/cmp"
)

func resultRequests() ([]engine.Request, []engine.Result) {
	requests := []engine.Request{
		{ID: 1, Prompt: []int{1, 2}, MaxTokens: 2},
		{ID: 5, Prompt: []int{3}, MaxTokens: 1, Adapter: 2},
		{ID: 9, Prompt: []int{4}, MaxTokens: 3},
	}
	results := []engine.Result{
		{ID: 1, Finished: true, Tokens: []int{7, 8}, Logits: []float64{0.1, -1e-300, 1.0 / 3}},
		{ID: 5, Finished: true, Tokens: []int{9}, Logits: []float64{2}},
		{ID: 9, Finished: true, Tokens: []int{1, 1, 1}, Logits: []float64{0}},
	}
	return requests, results
}

// writeResults writes results to a new file, as a run does, and returns its path and text.
func writeResults(t *testing.T, requests []engine.Request, results ...engine.Result) (path, text string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "results")
	file, err := openResults(path, requests)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if err := file.add(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.close(); err != nil {
		t.Fatal(err)
	}
	return path, readText(t, path)
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestResults: what was written is there again, bit for bit, and more can be added.
func TestResults(t *testing.T) {
	requests, results := resultRequests()
	path, text := writeResults(t, requests, results[0], results[1])
	if n := strings.Count(text, "\n"); n != 2 || !strings.HasSuffix(text, "\n") {
		t.Errorf("%d lines of 2 results: %q", n, text)
	}
	file, err := openResults(path, requests)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[int]engine.Result{1: results[0], 5: results[1]}, file.earlier); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if err := file.add(results[2]); err != nil {
		t.Error(err)
	}
	file.close()
	if err := file.add(results[2]); err == nil || !strings.Contains(err.Error(), "results: request 9: ") {
		t.Errorf("a write that fails: %v", err)
	}
	if file, err = openResults(path, requests); err != nil || len(file.earlier) != 3 {
		t.Fatalf("%v, %v", err, file)
	}
	file.close()
}

// TestResultsTorn: wherever a process was killed in its last line, the lines before are there, and
// the next one has a line to itself.
func TestResultsTorn(t *testing.T) {
	requests, results := resultRequests()
	path, text := writeResults(t, requests, results[0], results[1])
	first := strings.Index(text, "\n") + 1
	for end := range text {
		if err := os.WriteFile(path, []byte(text[:end]), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := openResults(path, requests)
		if err != nil {
			t.Fatalf("cut at %d: %v", end, err)
		}
		whole := text[:first]
		if end < first {
			whole = ""
		}
		if len(file.earlier) != strings.Count(whole, "\n") || readText(t, path) != whole {
			t.Fatalf("cut at %d: %d results, %q is left, want %q", end, len(file.earlier), readText(t, path), whole)
		}
		if err := file.add(results[2]); err != nil {
			t.Fatal(err)
		}
		file.close()
		if file, err = openResults(path, requests); err != nil || file.earlier[9].ID != 9 {
			t.Fatalf("cut at %d and gone on: %v", end, err)
		}
		file.close()
	}
}

// TestResultsForeign: a file of another run is refused and stays as it is, its torn line too.
func TestResultsForeign(t *testing.T) {
	requests, results := resultRequests()
	_, text := writeResults(t, requests, results[0], results[1])
	lines := strings.SplitAfter(text, "\n")
	other := requests[1]
	other.Adapter = 1
	for _, c := range []struct {
		name, text string
		requests   []engine.Request
		want       string
	}{
		{"a request of another rank", text, requests[:1],
			"line 2: request 5 is none of the 1 that this rank serves in this run"},
		{"another request", text, []engine.Request{requests[0], other},
			"line 2: request 5 is another than in this run, its fingerprint is \"" + fingerprint(&requests[1])},
		{"twice", lines[0] + lines[1] + lines[0], requests, "line 3: request 1 is there twice"},
		{"too few tokens", strings.Replace(text, "[7,8]", "[7]", 1), requests,
			"line 1: request 1 has 1 tokens, want 2"},
		{"no JSON", lines[0] + "\n", requests, "line 2: no result: "},
		{"other JSON", "{\"steps\":5}\n", requests, "line 1: no result: json: unknown field \"steps\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, torn := filepath.Join(t.TempDir(), "results"), c.text+"{"
			if err := os.WriteFile(path, []byte(torn), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := openResults(path, c.requests); err == nil ||
				!strings.Contains(err.Error(), "results "+path+": "+c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if got := readText(t, path); got != torn {
				t.Errorf("the file is %q now, it was %q", got, torn)
			}
		})
	}
}

// TestResultsNotOurs: a file that no run has written is refused and stays as it is, however it ends.
func TestResultsNotOurs(t *testing.T) {
	requests, results := resultRequests()
	_, text := writeResults(t, requests, results[0])
	for _, c := range []struct{ text, want string }{
		{"a note without an end", `line 1: no result: it begins with "a note without an end"`},
		{"{\"steps\": 5}", `line 1: no result: it begins with "{\"steps\": 5}"`},
		{text[:40] + "x", "line 1: no result: it begins with "},
		{strings.Replace(text, "{\"id\":1", "{\"id\":2", 1)[:60], "line 1: no result: it begins with "},
		{"a note\n", "line 1: no result: "},
		{strings.TrimSpace(text) + " {}\n", `line 1: there is text after the result of request 1: "{}"`},
		{text + strings.TrimSpace(text) + "x\n", `line 2: there is text after the result of request 1: "x"`},
	} {
		path := filepath.Join(t.TempDir(), "results")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openResults(path, requests); err == nil ||
			!strings.Contains(err.Error(), "results "+path+": "+c.want) {
			t.Errorf("%q: %v, want %q", c.text, err, c.want)
		}
		if got := readText(t, path); got != c.text {
			t.Errorf("the file is %q now, it was %q", got, c.text)
		}
	}
}

// TestResultsNoFile: what is no regular file is refused, and nothing waits for its other end.
func TestResultsNoFile(t *testing.T) {
	requests, _ := resultRequests()
	for _, path := range []string{t.TempDir(), os.DevNull} {
		if _, err := openResults(path, requests); err == nil ||
			!strings.Contains(err.Error(), "results "+path+": it is no regular file (") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestOneResultsFile: of two ranks with one file the second is refused, before it joins the others.
func TestOneResultsFile(t *testing.T) {
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer nats.Shutdown()
	path := filepath.Join(t.TempDir(), "results")
	first, err := openResults(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer first.close()
	exit, out, errs := runServe(t, "-nats", nats.ClientURL(), "-dp", "2", "-rank", "1", "-results", path,
		"-join-timeout", "1h")
	want := "serve: results " + path + ": another rank has it open; each needs a file of its own\n"
	if exit != 1 || out != "" || errs != want {
		t.Errorf("exit %d, stdout %q, stderr %q, want %q", exit, out, errs, want)
	}
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	again, err := openResults(path, nil)
	if err != nil {
		t.Fatalf("the file is free again: %v", err)
	}
	again.close()
}
