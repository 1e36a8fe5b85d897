// What -debug and -cpuprofile show of a run.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/pprof/profile"
)

// syncBuffer is a buffer that is read while it is written.
type syncBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// get returns the answer to a request.
func get(t *testing.T, url, accept string) (status int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept", accept)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

var debugURL = regexp.MustCompile(`serve: -debug shows this run at (http://127\.0\.0\.1:\d+/)\n`)

// startDebugged starts a long run with -debug, and returns where it shows itself.
func startDebugged(t *testing.T, args ...string) (url string, stop func() (exit int, stderr string)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var stderr syncBuffer
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, append(args, "-debug", ":0", "-speed", "1"), io.Discard, &stderr) }()
	stop = func() (int, string) {
		cancel()
		exit := <-ended
		ended <- exit
		return exit, debugURL.ReplaceAllString(stderr.String(), "")
	}
	t.Cleanup(func() { stop() })
	eventually(t, "the address is said", func() bool { return debugURL.MatchString(stderr.String()) })
	return debugURL.FindStringSubmatch(stderr.String())[1], stop
}

// TestDebug: everything can be read while the run goes on, and nothing after it.
func TestDebug(t *testing.T) {
	t.Parallel()
	url, stop := startDebugged(t, "-dp", "2", "-spec", "1")
	var status []rankStatus
	eventually(t, "both ranks have taken steps", func() bool {
		_, text := get(t, url+"status", "")
		status = nil
		if err := json.Unmarshal([]byte(text), &status); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		// The warm-up takes fewer than 100 steps.
		return len(status) == 2 && status[0].Target.Step > 100 && status[1].Target.Step > 100
	})
	for rank, s := range status {
		if s.Rank != rank || s.Draft == nil || s.Draft.Step == 0 || s.Blocks != 512 {
			t.Errorf("the status of rank %d is %+v", rank, s)
		}
	}
	t.Run("metrics", func(t *testing.T) { checkMetricsPage(t, url+"metrics") })
	t.Run("passes", func(t *testing.T) { checkPassesPage(t, url+"debug/passes") })
	t.Run("pprof", func(t *testing.T) {
		_, text := get(t, url+"debug/pprof/heap", "")
		if p, err := profile.Parse(strings.NewReader(text)); err != nil || len(p.SampleType) == 0 {
			t.Errorf("the heap's profile: %v", err)
		}
	})
	if code, text := get(t, url, ""); code != http.StatusOK || !strings.Contains(text, "/debug/passes") {
		t.Errorf("the index is %d %s", code, text)
	}
	if code, _ := get(t, url+"other", ""); code != http.StatusNotFound {
		t.Errorf("a page that isn't there: %d", code)
	}
	if exit, stderr := stop(); exit != 0 || stderr != "" {
		t.Errorf("exit %d, stderr %q", exit, stderr)
	}
	if response, err := http.Get(url); err == nil {
		response.Body.Close()
		t.Error("it still answers after the run")
	}
}

// checkMetricsPage: the metrics of both ranks are there, and exemplars lead to traces.
func checkMetricsPage(t *testing.T, url string) {
	_, text := get(t, url, "application/openmetrics-text; version=1.0.0")
	for _, want := range []string{
		`(?m)^fwd_forward_duration_seconds_bucket\{[^}]*fwd_dp_rank="1"[^}]*service_name="serve-rank-1"` +
			`[^}]*\} \S+ # \{[^}]*trace_id="[0-9a-f]{32}"`,
		`(?m)^serve_num_requests_running\{[^}]*service_name="serve-rank-0"`,
		`(?m)^serve_kv_cache_blocks\{[^}]*fwd_dp_rank="0"[^}]*\} 512`,
		`(?m)^gen_ai_server_time_to_first_token_seconds_bucket\{[^}]*le="0.04"`,
		`(?m)^fwd_wait_time_seconds_total\{[^}]*fwd_dp_peer_rank="0"`,
		`(?m)^serve_prompt_tokens_total\{`,
		`(?m)^go_goroutines `,
		`(?m)^# EOF$`,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

// checkPassesPage: each rank has a line for each of its last passes.
func checkPassesPage(t *testing.T, url string) {
	_, text := get(t, url, "")
	for _, want := range []string{
		`(?m)^RANK +STEP +BEGAN +MODEL`,
		`(?m)^0 +\d+ +\d\d:\d\d:\d\d\.\d{6} +target +(decode|mixed) +(FULL|NONE|PIECEWISE) +\w+` +
			` +\d+ +\d+ +\d+ +\S+ +\S+`,
		`(?m)^1 +\d+ +\S+ +draft `,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	_, text = get(t, url+"?rank=1", "")
	lines := strings.Count(text, "\n")
	if lines < 100 || lines > keptPasses+1 || strings.Contains(text, "\n0 ") {
		t.Errorf("%d lines of rank 1:\n%s", lines, text)
	}
	code, text := get(t, url+"?rank=2", "")
	if want := "rank is \"2\", want one of 0-1\n"; code != http.StatusBadRequest || text != want {
		t.Errorf("%d %q, want %q", code, text, want)
	}
}

// TestDebugProcesses: each rank that is a process shows itself at its own port.
func TestDebugProcesses(t *testing.T) {
	t.Parallel()
	p := start(t, "-processes", "-dp", "2", "-requests", "4", "-debug", "localhost:0")
	if exit := p.wait(); exit != 0 {
		t.Fatalf("exit %d, stderr %s", exit, &p.stderr)
	}
	ports := map[string]bool{}
	for _, line := range regexp.MustCompile(`(?m)^rank \d: serve: -debug .*:(\d+)/$`).
		FindAllStringSubmatch(p.stderr.String(), -1) {
		ports[line[1]] = true
	}
	if len(ports) != 2 {
		t.Errorf("stderr %s, want two ports", &p.stderr)
	}
}

func TestDebugAddress(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		address string
		rank    int
		want    string
	}{
		{":6060", 0, "127.0.0.1:6060"},
		{":6060", 3, "127.0.0.1:6063"},
		{"0.0.0.0:6060", 1, "0.0.0.0:6061"},
		{"[::1]:6060", 1, "[::1]:6061"},
		{":0", 3, "127.0.0.1:0"},
	} {
		if got, err := debugAddress(c.address, c.rank); got != c.want || err != nil {
			t.Errorf("%s of rank %d is %s, %v; want %s", c.address, c.rank, got, err, c.want)
		}
	}
	for _, address := range []string{"", "6060", ":http", ":65536", ":-1"} {
		if got, err := debugAddress(address, 0); err == nil {
			t.Errorf("%q is %s, want an error", address, got)
		}
	}
}

// TestDebugTaken: an address that another program has is an error before anything runs.
func TestDebugTaken(t *testing.T) {
	t.Parallel()
	url, _ := startDebugged(t, "-dp", "1")
	address := strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/")
	exit, out, errs := runServe(t, "-debug", address)
	if exit != 1 || out != "" || !strings.Contains(errs, "serve: -debug: ") || !strings.Contains(errs, address) {
		t.Errorf("exit %d, stdout %q, stderr %q", exit, out, errs)
	}
}

// TestCPUProfile: the profile of a run says which rank computed, and in which mode.
func TestCPUProfile(t *testing.T) { // not in parallel: a process has one profile
	path := filepath.Join(t.TempDir(), "cpu.prof")
	if exit, _, errs := runServe(t, "-dp", "2", "-cpuprofile", path); exit != 0 || errs != "" {
		t.Fatalf("exit %d, stderr %q", exit, errs)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := profile.Parse(f)
	if err != nil {
		t.Fatal(err)
	}
	seconds := map[string]float64{}
	all := 0.0
	for _, s := range p.Sample {
		took := float64(s.Value[1]) / 1e9
		all += took
		for _, key := range []string{"fwd.dp.rank", "fwd.graph.mode"} {
			for _, value := range s.Label[key] {
				seconds[key+" "+value] += took
			}
		}
	}
	for rank := range 2 {
		if seconds["fwd.dp.rank "+strconv.Itoa(rank)] == 0 {
			t.Errorf("nothing of rank %d in %v", rank, seconds)
		}
	}
	if full, none := seconds["fwd.graph.mode FULL"], seconds["fwd.graph.mode NONE"]; full == 0 || none == 0 {
		t.Errorf("%v in mode FULL, %v in mode NONE", full, none)
	}
	if labelled := seconds["fwd.dp.rank 0"] + seconds["fwd.dp.rank 1"]; labelled < all/2 {
		t.Errorf("%v of %v seconds have a rank", labelled, all)
	}
	exit, out, errs := runServe(t, "-cpuprofile", filepath.Join(path, "x"))
	if exit != 1 || out != "" || !strings.HasPrefix(errs, "serve: -cpuprofile: open ") {
		t.Errorf("a file that can't be: exit %d, stdout %q, stderr %q", exit, out, errs)
	}
}
