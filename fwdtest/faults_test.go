// This file breaks coordinators in many ways and tests that the suite notices each. The ways are
// listed in the files faults_*_test.go.

package fwdtest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
)

// fault is a way to break a group.
type fault struct {
	name  string
	group breakGroup
	says  string   // what the suite must say: a regular expression
	fails []string // the subtests that must fail because of it
}

// faults are all of them.
var faults = slices.Concat(exchangeFaults, lockstepFaults, missingFaults, missingRanksFaults, lastFaults,
	contextFaults, refusedFaults, lossFaults, loadFaults, leftFaults)

// breakGroup replaces the coordinators of a new group.
type breakGroup func(group []fwd.Coordinator)

// exchange is another Exchange for the coordinator c.
type exchange func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error)

// broken is a coordinator of the in-process group with another Exchange, Missing or Last; nil: as it
// was.
type broken struct {
	fwd.Coordinator
	exchange exchange
	missing  func(c fwd.Coordinator) []int
	last     func(c fwd.Coordinator) int
}

// Exchange implements [fwd.Coordinator].
func (b broken) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if b.exchange == nil {
		return b.Coordinator.Exchange(ctx, v)
	}
	return b.exchange(b.Coordinator, ctx, v)
}

// Missing names the ranks that the open Exchange waits for.
func (b broken) Missing() []int {
	if b.missing == nil {
		return missing(b.Coordinator)
	}
	return b.missing(b.Coordinator)
}

// Last names the rank whose vote came last.
func (b broken) Last() int {
	if b.last == nil {
		return last(b.Coordinator)
	}
	return b.last(b.Coordinator)
}

func last(c fwd.Coordinator) int { return c.(interface{ Last() int }).Last() }

func missing(c fwd.Coordinator) []int { return c.(interface{ Missing() []int }).Missing() }

// inGroup breaks every rank in the same way; newExchange is called once for a group.
func inGroup(newExchange func() exchange) breakGroup {
	return func(group []fwd.Coordinator) {
		e := newExchange()
		for i, c := range group {
			group[i] = broken{Coordinator: c, exchange: e}
		}
	}
}

// inRanks is inGroup with an exchange for each rank, for ranks that have a state of their own.
func inRanks(newExchange func() exchange) breakGroup {
	return func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = broken{Coordinator: c, exchange: newExchange()}
		}
	}
}

// without breaks ranks that have no state.
func without(e exchange) breakGroup { return inGroup(func() exchange { return e }) }

// holding is an exchange that holds a mutex while it is open.
func holding(mu *sync.Mutex) exchange {
	return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		mu.Lock()
		defer mu.Unlock()
		return c.Exchange(ctx, v)
	}
}

// inVotes breaks the votes that come back. spoil may change those that it gets: they are a copy,
// since the ranks of a group share theirs.
func inVotes(spoil func(c fwd.Coordinator, votes []fwd.Vote) []fwd.Vote) breakGroup {
	return without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		if err == nil {
			votes = spoil(c, slices.Clone(votes))
		}
		return votes, err
	})
}

// inVote breaks each vote that comes from another rank.
func inVote(spoil func(v *fwd.Vote)) breakGroup {
	return inVotes(func(c fwd.Coordinator, votes []fwd.Vote) []fwd.Vote {
		for rank := range votes {
			if rank != c.Rank() {
				spoil(&votes[rank])
			}
		}
		return votes
	})
}

// inErrors breaks errors of that kind.
func inErrors(kind error, spoil func(c fwd.Coordinator, err *fwd.RankError) error) breakGroup {
	return without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		var rankErr *fwd.RankError
		if errors.As(err, &rankErr) && errors.Is(err, kind) {
			err = spoil(c, rankErr)
		}
		return votes, err
	})
}

// others returns the ranks of c's group except those.
func others(c fwd.Coordinator, ranks ...int) []int {
	var others []int
	for rank := range c.Size() {
		if !slices.Contains(ranks, rank) {
			others = append(others, rank)
		}
	}
	return others
}

// liberties are what a coordinator may do in another way than the in-process group, each with the
// subtests that must allow it.
var liberties = []struct {
	name   string
	group  breakGroup
	passes []string
}{
	{"all fail if a rank restarts after the first step", inRanks(func() exchange {
		last := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == 1 && last == 1 {
				v.Step = 0 // out of step instead of a second call
			}
			last = v.Step
			return c.Exchange(ctx, v)
		}
	}), []string{"Lockstep/RestartedAfterFirstStep"}},
	{"an ended context breaks the round", inGroup(func() exchange {
		var waiting sync.Map // the functions that end the wait
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if ctx.Err() != nil {
				waiting.Range(func(_, stop any) bool { stop.(context.CancelFunc)(); return false })
				err := fmt.Errorf("%w: %w", fwd.ErrRankMissing, ctx.Err())
				return nil, &fwd.RankError{Err: err, Step: v.Step, Ranks: others(c, c.Rank())}
			}
			ctx, stop := context.WithCancel(ctx)
			waiting.Store(c.Rank(), stop)
			defer waiting.Delete(c.Rank())
			return c.Exchange(ctx, v)
		}
	}), []string{"Context/EndedBeforeTheLastCame"}},
	{"ranks share their votes, and nobody may write to them", inRanks(func() exchange {
		var last, was []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if !slices.EqualFunc(last, was, func(a, b fwd.Vote) bool { return a.NumTokens == b.NumTokens }) {
				panic("somebody has written to the votes")
			}
			votes, err := c.Exchange(ctx, v)
			last, was = votes, slices.Clone(votes)
			return votes, err
		}
	}), []string{"Exchange/VotesStay", "Load/BackToBack", "Load/Chaos", "Plans/Begin"}},
	{"has neither Missing nor Last", func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = struct{ fwd.Coordinator }{c}
		}
	}, []string{"Exchange/Ranks"}},
	{aMesh + "without flaws", inMesh(flaws{}), []string{"Loss/BeforeTheVote"}},
	{aMesh + "that passes ballots on", inMesh(flaws{relays: true}),
		[]string{"Loss/BeforeTheVote", "Loss/UnheardByAll", "Loss/GiveUpInTurn", "Loss/ComesAndGoes"}},
	{aLargeMesh, inMesh(flaws{}), []string{"Loss/AfterFirstVotes", "Loss/Stays", "Loss/ComesAndGoes"}},
}

// subject is the environment variable that names the fault or liberty of TestSubject's
// coordinators.
const subject = "FWDTEST_SUBJECT"

// TestSubject is the suite as it runs in a process of its own.
func TestSubject(t *testing.T) {
	name, ok := os.LookupEnv(subject)
	if !ok {
		t.Skip("runs in the processes that TestFaults starts")
	}
	go func() { // ends with the process that holds the other end
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	breakGroup := func([]fwd.Coordinator) {}
	for _, f := range faults {
		if f.name == name {
			breakGroup = f.group
		}
	}
	for _, l := range liberties {
		if l.name == name {
			breakGroup = l.group
		}
	}
	var opts []fwdtest.Option
	if strings.HasPrefix(name, aMesh) {
		opts = append(opts, fwdtest.WithLoss(loseInMesh))
	}
	if name == aLargeMesh {
		opts = append(opts, fwdtest.WithSizes(2, 5, 8))
	}
	fwdtest.TestCoordinator(t, func(t *testing.T, size int) []fwd.Coordinator {
		group := localGroup(t, size)
		breakGroup(group)
		return group
	}, opts...)
}

// TestFaults checks that every fault makes the subtests fail that are there for it.
func TestFaults(t *testing.T) {
	t.Parallel()
	processes := make(chan bool, 2) // that run concurrently
	for _, f := range faults {
		for _, name := range f.fails {
			t.Run(f.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				processes <- true
				defer func() { <-processes }()
				output, err := runSubject(t, f.name, "/"+name)
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					t.Fatalf("the suite ended with %v, want it to fail:\n%s", err, output)
				}
				failed := "--- FAIL: TestSubject/" + name
				if !strings.Contains(output, failed+" (") || strings.Contains(output, "panic: ") {
					t.Fatalf("want %q, and no panic, in:\n%s", failed, output)
				}
				if !regexp.MustCompile(f.says).MatchString(output) {
					t.Errorf("want a match of %q in:\n%s", f.says, output)
				}
			})
		}
	}
}

// TestNoFault checks that all subtests pass without a fault, and that a fault makes each of them
// fail.
func TestNoFault(t *testing.T) {
	output, err := runSubject(t, "none", "")
	if err != nil {
		t.Fatalf("%v:\n%s", err, output)
	}
	withLoss, err := runSubject(t, aMesh+"without flaws", "/Loss")
	if err != nil {
		t.Fatalf("%v:\n%s", err, withLoss)
	}
	output += withLoss
	var passed, failing []string
	subtests := regexp.MustCompile(`--- PASS: TestSubject/(\w+/\w+) `)
	for _, match := range subtests.FindAllStringSubmatch(output, -1) {
		passed = append(passed, match[1])
	}
	for _, f := range faults {
		failing = append(failing, f.fails...)
	}
	slices.Sort(passed)
	slices.Sort(failing)
	if failing = slices.Compact(failing); !slices.Equal(passed, failing) {
		t.Errorf("the subtests are\n%q, and those that a fault makes fail\n%q", passed, failing)
	}
}

// TestLiberties checks that what is allowed passes.
func TestLiberties(t *testing.T) {
	for _, l := range liberties {
		for _, name := range l.passes {
			output, err := runSubject(t, l.name, "/"+name)
			if passed := "--- PASS: TestSubject/" + name; err != nil || !strings.Contains(output, passed+" (") {
				t.Errorf("%s: %v, want %q in:\n%s", l.name, err, passed, output)
			}
		}
	}
}

// TestSkipped checks that a coordinator is not checked for what it need not have: the methods Missing
// and Last, and a way to lose its messages.
func TestSkipped(t *testing.T) {
	for part, checks := range map[string]int{"MissingRanks": 5, "Last": 5, "Loss": 7} {
		output, err := runSubject(t, "has neither Missing nor Last", "/"+part)
		skipped := strings.Count(output, "--- SKIP: TestSubject/"+part+"/")
		if err != nil || skipped != checks {
			t.Errorf("%v, %d checks of %s skipped, want %d:\n%s", err, skipped, part, checks, output)
		}
	}
}

// runSubject runs TestSubject, or the subtest with that path in it, with that fault in a process of
// its own, which does not outlive this one.
func runSubject(t *testing.T, fault, subtest string) (output string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := "^TestSubject" + strings.ReplaceAll(subtest, "/", "$/^") + "$"
	cmd := exec.CommandContext(t.Context(), self,
		"-test.run", run, "-test.v", "-test.short", "-test.timeout", "60s")
	cmd.Env = append(os.Environ(), subject+"="+fault)
	if _, err := cmd.StdinPipe(); err != nil { // only the end of this process closes it
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}
