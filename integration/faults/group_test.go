//go:build unix

// Helpers: the ranks of a run, what they should finish, and outages of one rank.

package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
	"gonum.org/v1/gonum/floats"
)

// Every run has these requests, which come within six seconds.
const (
	maxContext  = 40
	numRequests = 200
	speed       = 5
)

var requests = trace.Requests(trace.Default()[:numRequests], maxContext)

// answers returns the results of the requests when each is computed alone.
var answers = sync.OnceValues(func() ([]engine.Result, error) {
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		return nil, err
	}
	results := make([]engine.Result, len(requests))
	for i, r := range requests {
		tokens, logits, err := model.Generate(context.Background(), weights, r.Adapter, r.Prompt, r.MaxTokens)
		if err != nil {
			return nil, err
		}
		results[i].Tokens, results[i].Logits = tokens, logits
	}
	return results, nil
})

// group is one run of serve: its ranks are processes.
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
	args := strings.Fields(fmt.Sprintf(
		"-nats %s -group %s -dp %d -rank %d -results %s -max-context %d -requests %d -speed %d",
		url, g.name, len(g.ranks), rank, file, maxContext, g.requests, speed))
	return start(g.T, fmt.Sprintf("rank %d", rank), g.command(rank, append(args, g.flags...)...))
}

// own returns how many requests a rank has: every one whose number is the rank, modulo the number
// of ranks.
func (g *group) own(rank int) int { return (g.requests - rank + len(g.ranks) - 1) / len(g.ranks) }

// copyLines copies the whole lines of a file. A process that was stopped while it wrote may have
// left a part of a line after them.
func copyLines(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, text[:bytes.LastIndexByte(text, '\n')+1], 0o600); err != nil {
		t.Fatal(err)
	}
}

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
	what := fmt.Sprintf("%d of %d requests are finished", n, g.requests)
	eventually(g.T, what, func() bool { return g.finished() >= n })
	g.amid()
}

// goOn waits until the ranks finish requests again.
func (g *group) goOn() {
	g.Helper()
	before := g.finished()
	eventually(g.T, "the ranks go on", func() bool { return g.finished() > before })
}

// amid checks that the run is not over yet, so that the fault hits it.
func (g *group) amid() {
	g.Helper()
	if n := g.finished(); n == g.requests {
		g.Fatal("the run is over before the fault is")
	}
}

// standStill checks that a fault keeps the ranks from finishing anything for so long, and that
// there is something left to do.
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

// complete waits for the end of a run that nothing could stop. It checks that all ranks end well,
// and that each request was finished once, by its own rank, with the right answer.
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

// prepare returns a run that has not started, and functions that put one of its ranks out of reach
// and bring it back.
type prepare func(t *testing.T, flags string) (g *group, down, up func(rank int))

// outages puts ranks out of reach, one after the other, in two runs. In the first they are away for
// less time than the ranks wait for each other, which costs no step. In the second they are away
// for longer, which costs steps, and all go on afterwards.
func outages(t *testing.T, shortly, long time.Duration, prepare prepare) {
	t.Parallel()
	for _, tt := range []struct {
		name, flags string
		out         time.Duration
		end         func(g *group)
	}{
		{"shortly", "-exchange-timeout 30s", shortly, (*group).unharmed},
		{"for long", "-exchange-timeout 1s -rejoin 1m", long, (*group).harmed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g, down, up := prepare(t, tt.flags)
			g.startAll()
			for i, rank := range []int{1, 0} {
				g.reach(0.25 * float64(i+1))
				down(rank)
				g.standStill(tt.out)
				up(rank)
			}
			tt.end(g)
		})
	}
}

// unharmed waits for the end of a run in which no step failed. All ranks took the same steps, and
// none of them had anything to warn of in a step.
func (g *group) unharmed() {
	g.Helper()
	reports := g.complete()
	for rank, r := range reports {
		if r.FailedSteps != 0 || r.Steps != reports[0].Steps || r.Resumed != 0 || len(r.warnings) > 0 {
			g.Errorf("rank %d: %+v, want no failed step, %d steps and no warnings", rank, r, reports[0].Steps)
		}
	}
}

// harmed waits for the end of a run in which steps failed on all ranks, and no rank was started
// again. Each rank warns of the exchanges that failed for it.
func (g *group) harmed() {
	g.Helper()
	for rank, r := range g.complete() {
		if r.FailedSteps == 0 || r.Resumed != 0 {
			g.Errorf("rank %d: %+v, want failed steps", rank, r)
		}
		if failed := r.warned("exchange of votes failed"); failed != r.FailedSteps {
			g.Errorf("rank %d warns of %d failed exchanges, and had %d: %q", rank, failed, r.FailedSteps, r.warnings)
		}
	}
}

// check returns how many results are in a rank's file. It checks that they are right, of the rank's
// own requests, and there once.
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
	for line := range bytes.Lines(text) {
		var got engine.Result
		err := json.Unmarshal(line, &got)
		own := got.ID >= 0 && got.ID < g.requests && got.ID%len(g.ranks) == rank
		if err != nil || !own || seen[got.ID] {
			g.Fatalf("rank %d: %v in line %d, request %d: %.80s", rank, err, len(seen)+1, got.ID, line)
		}
		seen[got.ID] = true
		if !same(got, want[got.ID]) {
			g.Errorf("rank %d: request %d has another answer than alone", rank, got.ID)
		}
	}
	return len(seen)
}

// same reports whether two answers have the same tokens and, apart from rounding, the same last
// logits.
func same(got, want engine.Result) bool {
	tolerance := 1e-9 * floats.Norm(want.Logits, math.Inf(1))
	return slices.Equal(got.Tokens, want.Tokens) && len(got.Logits) == len(want.Logits) &&
		floats.EqualApprox(got.Logits, want.Logits, tolerance)
}
