//go:build unix

// Package faults holds what the ranks of a run must survive when they are processes: that some of them die, stand still or are
// taken for dead, and that what connects them breaks, is slow, or has others on it.
package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
	"gonum.org/v1/gonum/floats"
)

// patience is how long anything may take that must happen.
const patience = time.Minute

// binary is serve.
var binary string

func TestMain(m *testing.M) {
	if address := os.Getenv(asServer); address != "" {
		serveNATS(address)
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	for _, name := range os.Environ() { // no endpoint from outside
		if name, _, _ = strings.Cut(name, "="); strings.HasPrefix(name, "OTEL_") {
			os.Unsetenv(name)
		}
	}
	removeStale()
	dir := filepath.Join(os.TempDir(), ownName(os.Getpid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		log.Print(err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Setenv("TMPDIR", dir) // so that all files of the tests are there
	binary = filepath.Join(dir, "serve")
	build := exec.Command("go", "build", "-race="+raceDetector(), "-o", binary, "./serve")
	build.Dir = filepath.Join("..", "..", "examples")
	if out, err := build.CombinedOutput(); err != nil {
		log.Printf("building serve: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// raceDetector says whether these tests were built with the race detector, as serve is to be.
func raceDetector() string {
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		return "true"
	}
	return "false"
}

// ownPrefix begins the names of what the kernel does not remove when a process dies: directories and network namespaces.
const ownPrefix = "fwd-faults-"

func ownName(pid int) string { return ownPrefix + strconv.Itoa(pid) }

// isStale reports whether a name is of a process that has died.
func isStale(name string) bool {
	rest, own := strings.CutPrefix(name, ownPrefix)
	text, _, _ := strings.Cut(rest, "-")
	pid, err := strconv.Atoi(text)
	return own && err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

// removeStale removes what earlier runs of these tests have left that were killed.
func removeStale() {
	names, _ := fs.Glob(os.DirFS(os.TempDir()), ownPrefix+"*")
	for _, name := range names {
		if isStale(name) {
			os.RemoveAll(filepath.Join(os.TempDir(), name))
		}
	}
	removeStaleNamespaces()
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// process is a running program.
type process struct {
	*testing.T
	name           string
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	exited         chan struct{}
}

// start starts a program, which does not outlive the test.
func start(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{T: t, name: name, cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.stdout, &p.stderr
	cmd.WaitDelay = time.Second // it starts no others that could hold its output
	onItsOwn(cmd)
	started := make(chan error)
	go func() {
		// The kernel watches over the thread that started a process, so this one must stay.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in cmd.ProcessState
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.clear)
	return p
}

// clear makes sure that a process has ended, with all in its group. A test that has not failed leaves none.
func (p *process) clear() {
	select {
	case <-p.exited:
		if err := syscall.Kill(-p.cmd.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
			p.Errorf("%s has left others in its process group %d: %v", p.name, p.cmd.Process.Pid, err)
		}
	default:
		if !p.Failed() {
			p.Errorf("%s is still there", p.name)
		}
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
		p.wait()
	}
	if p.Failed() {
		p.Logf("%s: exit %d, stderr %q", p.name, p.cmd.ProcessState.ExitCode(), &p.stderr)
	}
}

// wait returns the exit status; -1 of a program that was killed.
func (p *process) wait() int {
	p.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.Fatalf("%s has not ended after %v", p.name, patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) signal(s os.Signal) {
	p.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.Fatalf("%s: %v", p.name, err)
	}
}

// kill kills a process with SIGKILL.
func (p *process) kill() {
	p.Helper()
	p.signal(syscall.SIGKILL)
	if exit := p.wait(); exit != -1 {
		p.Fatalf("%s ended before it was killed: exit %d, stderr %q", p.name, exit, &p.stderr)
	}
}

// report is what serve prints.
type report struct {
	Requests    int
	Finished    int
	Resumed     int
	Steps       int
	FailedSteps int `json:"failed_steps"`
	Check       struct{ Requests, Agreed int }
}

// report returns what a rank has printed, once it has ended well.
func (p *process) report() report {
	p.Helper()
	exit := p.wait()
	var r report
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil || exit != 0 || p.stderr.Len() > 0 {
		p.Fatalf("%s: exit %d, stderr %q, %v in stdout %q", p.name, exit, &p.stderr, err, &p.stdout)
	}
	return r
}

// failure returns what a rank says that has ended with an error, and how many requests it had finished by then.
func (p *process) failure() (text string, finished int) {
	p.Helper()
	exit := p.wait()
	text = p.stderr.String()
	if exit != 1 || p.stdout.Len() > 0 || strings.Count(text, "\n") != 1 {
		p.Errorf("%s: exit %d, stderr %q, stdout %q; want 1 and one line", p.name, exit, text, &p.stdout)
	}
	var steps, requests int
	if at := strings.LastIndexByte(text, '('); at < 0 {
		p.Errorf("%s does not say how far it got: %s", p.name, text)
	} else if _, err := fmt.Sscanf(text[at:], "(after %d steps, %d of %d requests finished)", &steps, &finished, &requests); err != nil {
		p.Errorf("%s does not say how far it got: %v: %s", p.name, err, text)
	}
	return text, finished
}

// Every run has these requests, which come within six seconds.
const (
	maxContext  = 40
	numRequests = 200
	speed       = 5
)

var requests = trace.Requests(trace.Default()[:numRequests], maxContext)

// answers returns what the requests come to when each is computed alone.
var answers = sync.OnceValues(func() ([]engine.Result, error) {
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		return nil, err
	}
	results := make([]engine.Result, len(requests))
	for i, r := range requests {
		if results[i].Tokens, results[i].Logits, err = model.Generate(context.Background(), weights, r.Adapter, r.Prompt, r.MaxTokens); err != nil {
			return nil, err
		}
	}
	return results, nil
})

// group is the ranks of one run of serve.
type group struct {
	*testing.T
	name     string
	flags    []string              // of all ranks
	url      func(rank int) string // of the NATS server
	requests int                   // of all ranks
	command  func(rank int, args ...string) *exec.Cmd
	files    []string // with the results
	ranks    []*process
}

var groups atomic.Int64

// newGroup returns a group whose ranks are not started yet.
func newGroup(t *testing.T, size int, url func(rank int) string, flags string) *group {
	g := &group{
		T:        t,
		name:     fmt.Sprintf("group%d", groups.Add(1)),
		flags:    append(strings.Fields("-json -check -graph NONE"), strings.Fields(flags)...),
		url:      url,
		requests: numRequests,
		command:  func(_ int, args ...string) *exec.Cmd { return exec.Command(binary, args...) },
		ranks:    make([]*process, size),
	}
	dir := t.TempDir()
	for rank := range size {
		g.files = append(g.files, filepath.Join(dir, fmt.Sprint("results.", rank)))
	}
	return g
}

// startAll starts all ranks.
func (g *group) startAll() {
	g.Helper()
	for rank := range g.ranks {
		g.start(rank)
	}
}

// start starts a rank, always by the same command.
func (g *group) start(rank int) {
	g.Helper()
	g.ranks[rank] = g.startAs(rank, g.url(rank), g.files[rank])
}

// startAs starts a process as a rank, which adds its results to a file.
func (g *group) startAs(rank int, url, file string) *process {
	g.Helper()
	args := strings.Fields(fmt.Sprintf("-nats %s -group %s -dp %d -rank %d -results %s -max-context %d -requests %d -speed %d",
		url, g.name, len(g.ranks), rank, file, maxContext, g.requests, speed))
	return start(g.T, fmt.Sprintf("rank %d", rank), g.command(rank, append(args, g.flags...)...))
}

// own returns how many requests are a rank's: every one whose number is the rank, modulo the number of ranks.
func (g *group) own(rank int) int { return (g.requests - rank + len(g.ranks) - 1) / len(g.ranks) }

// written returns how many results are in a file.
func written(t *testing.T, file string) int {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return bytes.Count(text, []byte("\n"))
}

// finished returns how many requests the ranks have finished so far.
func (g *group) finished() (n int) {
	g.Helper()
	for _, file := range g.files {
		n += written(g.T, file)
	}
	return n
}

// reach waits until the ranks have finished a part of the requests.
func (g *group) reach(part float64) {
	g.Helper()
	n := int(part * float64(g.requests))
	eventually(g.T, fmt.Sprintf("%d of %d requests are finished", n, g.requests), func() bool { return g.finished() >= n })
	g.amid()
}

// goOn waits until the ranks finish requests again.
func (g *group) goOn() {
	g.Helper()
	before := g.finished()
	eventually(g.T, "the ranks go on", func() bool { return g.finished() > before })
}

// amid makes sure that a fault hits the run, and not what is left of it.
func (g *group) amid() {
	g.Helper()
	if n := g.finished(); n == g.requests {
		g.Fatal("the run is over before the fault is")
	}
}

// standStill makes sure that a fault keeps the ranks from finishing anything, for so long, and that there is something left to do.
func (g *group) standStill(d time.Duration) {
	g.Helper()
	time.Sleep(200 * time.Millisecond) // what is under way comes to its end
	before := g.finished()
	time.Sleep(d)
	if n := g.finished(); n != before {
		g.Errorf("%d requests were finished in spite of the fault", n-before)
	}
	g.amid()
}

// complete waits for the end of a run that nothing could stop: all ranks end well, and every request is finished, by its own
// rank, once, and as it should be.
func (g *group) complete() []report {
	g.Helper()
	reports := make([]report, len(g.ranks))
	for rank, p := range g.ranks {
		r, own := p.report(), g.own(rank)
		if r.Requests != own || r.Finished != own || r.Check.Requests != own || r.Check.Agreed != own {
			g.Errorf("rank %d: %+v, want %d requests", rank, r, own)
		}
		if n := g.check(rank, g.files[rank]); n != own {
			g.Errorf("rank %d has %d results, want %d", rank, n, own)
		}
		g.Logf("rank %d: %+v", rank, r)
		reports[rank] = r
	}
	return reports
}

// unharmed waits for the end of a run in which no step failed: all ranks took the same ones.
func (g *group) unharmed() {
	g.Helper()
	reports := g.complete()
	for rank, r := range reports {
		if r.FailedSteps != 0 || r.Steps != reports[0].Steps || r.Resumed != 0 {
			g.Errorf("rank %d: %+v, want no failed step, and %d steps", rank, r, reports[0].Steps)
		}
	}
}

// harmed waits for the end of a run in which steps failed, for all ranks, and no rank was started again.
func (g *group) harmed() {
	g.Helper()
	for rank, r := range g.complete() {
		if r.FailedSteps == 0 || r.Resumed != 0 {
			g.Errorf("rank %d: %+v, want failed steps", rank, r)
		}
	}
}

// result is a line of a results file.
type result struct {
	ID      int
	Request string
	Tokens  []int
	Logits  []float64
}

// check returns how many results are in a rank's file. All of them are right, of the rank's own requests, and there once. What
// follows the last line is of a process that was killed while it wrote.
func (g *group) check(rank int, file string) int {
	g.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		g.Fatal(err)
	}
	want, err := answers()
	if err != nil {
		g.Fatal(err)
	}
	seen := map[int]bool{}
	for line := range bytes.Lines(text[:bytes.LastIndexByte(text, '\n')+1]) {
		var r result
		if err := json.Unmarshal(line, &r); err != nil || r.ID < 0 || r.ID >= g.requests || r.ID%len(g.ranks) != rank || seen[r.ID] {
			g.Fatalf("rank %d: %v in line %d, request %d: %.80s", rank, err, len(seen)+1, r.ID, line)
		}
		seen[r.ID] = true
		if !r.is(want[r.ID]) {
			g.Errorf("rank %d: request %d has another answer than alone", rank, r.ID)
		}
	}
	return len(seen)
}

// is reports whether the tokens are the same, and the last logits but for rounding.
func (r *result) is(want engine.Result) bool {
	largest := floats.Norm(want.Logits, math.Inf(1))
	return slices.Equal(r.Tokens, want.Tokens) && len(r.Logits) == len(want.Logits) && floats.EqualApprox(r.Logits, want.Logits, 1e-9*largest)
}
