package fwdtest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// TestCoordinator checks that the coordinators which newGroup makes do what [fwd.Coordinator]
// promises, each promise in a subtest of its own. All subtests have ended when it returns.
//
// newGroup makes the coordinators of a new group of size ranks, 1 to 8 unless an option asks for more;
// element i is that of rank i. None of them has exchanged yet. It registers what has to be closed with
// the Cleanup of the t that it is given, which is the subtest's, and calls the Fatal of that t if it
// can't make a group. Several subtests call it concurrently. With -short there are fewer steps.
func TestCoordinator(
	t *testing.T, newGroup func(t *testing.T, size int) []fwd.Coordinator, opts ...Option,
) {
	s := suite{newGroup: newGroup}
	for _, o := range opts {
		o.apply(&s)
	}
	s.measure(t)
	for _, p := range parts {
		s := s
		if p.runners {
			s = s.withRunners()
		}
		if !p.alone {
			s = s.besideLarge()
		}
		t.Run(p.name, func(t *testing.T) { // returns when the part's parallel subtests have ended
			for _, c := range p.checks {
				t.Run(c.name, func(t *testing.T) {
					if !p.alone {
						t.Parallel()
					}
					c.runAll(s, t, !p.alone)
				})
			}
		})
	}
}

// suite is what the checks need to know.
type suite struct {
	newGroup func(t *testing.T, size int) []fwd.Coordinator

	// These are options.
	lose  func(t *testing.T, group []fwd.Coordinator, from, to int) (end func()) // nil: nothing is lost
	sizes []int                                                                  // nil: those of each check
	smoke []int

	timings map[int]timing // by size of large groups
	timing                 // of the group that is checked
}

// timing is how long something takes in a group of some size.
type timing struct {
	round  time.Duration // a round
	settle time.Duration // after which a vote has come to the other ranks
}

type check struct {
	name string
	run  func(s suite, t *testing.T, size int)
	ranks
}

// ranks is in groups of how many ranks a check runs.
type ranks struct {
	least  int   // that it needs
	usual  []int // unless there is an option
	fixed  bool  // whatever the options say
	smokes bool  // it is one of the few that WithSmoke chooses
}

// from returns the sizes of groups of a check that needs at least so many ranks.
func from(least int, usual ...int) ranks { return ranks{least: least, usual: usual} }

// always returns the sizes of a check to which the number of ranks does not matter, but which would take
// long with many.
func always(size int) ranks { return ranks{usual: []int{size}, fixed: true} }

func (r ranks) andSmoke() ranks {
	r.smokes = true
	return r
}

// sizes returns the sizes of the groups in which a check runs.
func (c check) sizes(s suite) []int {
	sizes := c.usual
	if s.sizes != nil && !c.fixed {
		sizes = s.sizes
	}
	if c.smokes {
		sizes = append(slices.Clone(sizes), s.smoke...)
	}
	return sizes
}

// runAll runs a check in groups of all sizes, each in a subtest if there are several.
func (c check) runAll(s suite, t *testing.T, parallel bool) {
	sizes := c.sizes(s)
	if len(sizes) == 1 {
		c.runAt(s, t, sizes[0])
		return
	}
	for _, size := range sizes {
		t.Run(fmt.Sprintf("ranks=%d", size), func(t *testing.T) {
			if parallel {
				t.Parallel()
			}
			c.runAt(s, t, size)
		})
	}
}

func (c check) runAt(s suite, t *testing.T, size int) {
	if size < c.least {
		t.Skipf("this needs at least %d ranks", c.least)
	}
	if measured, ok := s.timings[size]; ok {
		s.timing = measured
	}
	c.run(s, t, size)
}

// part is checks of one kind. Most checks mainly wait, and run in parallel. Those that keep the
// processors busy would delay them, and those that count goroutines would count theirs.
type part struct {
	name    string
	runners bool // a Runner drives each rank
	alone   bool // one check at a time
	checks  []check
}

var parts = []part{
	{name: "Exchange", checks: []check{
		{"Ranks", suite.ranks, from(1, 1, 2, 3, 8).andSmoke()},
		{"Fields", suite.fields, from(1, 3).andSmoke()},
		{"ArrivalOrder", suite.arrivalOrder, from(2, 3, 4)},
		{"VotesStay", suite.votesStay, from(2, 3)},
	}},
	{name: "Lockstep", checks: []check{
		{"DifferentSteps", suite.differentSteps, from(2, 3).andSmoke()},
		{"Restarted", suite.restarted, from(2, 3)},
		{"RestartedAfterFirstStep", suite.restartedAfterFirstStep, from(2, 2)},
		{"RestartedAgain", suite.restartedAgain, from(2, 2)},
		{"AllRestarted", suite.allRestarted, from(1, 3)},
		{"AllAhead", suite.allAhead, from(1, 3)},
	}},
	{name: "Missing", checks: []check{
		{"Cancelled", missing(cancelled), from(2, 4).andSmoke()},
		{"CancelledWithCause", missing(cancelledWithCause), from(2, 4)},
		{"DeadlineExceeded", missing(deadlineExceeded), from(2, 4)},
		{"Late", suite.late, from(2, 3).andSmoke()},
		{"LateByDifferentSteps", suite.lateByDifferentSteps, from(3, 3)},
		{"LateAndRestarted", suite.lateAndRestarted, from(2, 2)},
	}},
	{name: "MissingRanks", checks: []check{
		{"NoneOpen", suite.missingNoneOpen, from(2, 3)},
		{"Waiting", suite.missingWaiting, from(2, 3, 4).andSmoke()},
		{"AfterBrokenSteps", suite.missingAfterBrokenSteps, from(3, 4)},
		{"AnyTime", suite.missingAnyTime, from(2, 4)},
	}},
	{name: "Last", checks: []check{
		{"None", suite.lastNone, from(2, 3)},
		{"InOrder", suite.lastInOrder, from(2, 3, 4).andSmoke()},
		{"AfterBrokenSteps", suite.lastAfterBrokenSteps, from(2, 3)},
		{"AnyTime", suite.lastAnyTime, from(2, 4)},
	}},
	{name: "Context", checks: []check{
		{"EndedBefore", suite.endedBefore, from(2, 3)},
		{"EndedBeforeTheLastCame", suite.endedBeforeTheLastCame, from(2, 3)},
		{"EndedAfter", suite.endedAfter, from(2, 3)},
	}},
	{name: "Refused", checks: []check{
		{"InvalidVote", suite.invalidVote, from(2, 2)},
		{"SecondCall", suite.secondCall, from(2, 3)},
		{"SecondCallAfterTheRound", suite.secondCallAfterTheRound, from(2, 3)},
		{"SecondCallAfterABrokenRound", suite.secondCallAfterABrokenRound, from(2, 3)},
	}},
	{name: "Runners", runners: true, checks: []check{
		{"Restarted", suite.restarted, from(2, 3)},
		{"RestartedAfterFirstStep", suite.restartedAfterFirstStep, from(2, 2)},
		{"Missing", missing(cancelled), from(2, 4).andSmoke()},
		{"Late", suite.late, from(2, 3).andSmoke()},
		{"LateAndRestarted", suite.lateAndRestarted, from(2, 2)},
	}},
	{name: "Plans", checks: []check{
		{"Schedules", suite.planSchedules, from(2, 3).andSmoke()},
		{"Idle", suite.planIdle, from(2, 3)},
		{"AllIdle", suite.planAllIdle, from(2, 3)},
		{"ConfiguredDifferently", suite.planConfiguredDifferently, from(3, 3)},
		{"WarmUp", suite.planWarmUp, from(2, 3)},
		{"WarmUpAlone", suite.planWarmUpAlone, from(3, 3)},
		{"WarmUpAnotherGraph", suite.planWarmUpAnotherGraph, from(3, 3)},
		{"Begin", suite.planBegin, from(2, 3).andSmoke()},
		{"BeginMissing", suite.planBeginMissing, from(2, 3)},
	}},
	{name: "Loss", checks: []check{
		{"BeforeTheVote", suite.lossBeforeTheVote, from(3, 3)},
		{"AfterFirstVotes", suite.lossAfterFirstVotes, from(3, 3)},
		{"UnheardByAll", suite.lossUnheardByAll, from(3, 4)},
		{"HearsNobody", suite.lossHearsNobody, from(3, 4)},
		{"GiveUpInTurn", suite.lossGiveUpInTurn, from(3, 3)},
		{"Stays", suite.lossStays, from(3, 3)},
		{"ComesAndGoes", suite.lossComesAndGoes, from(3, 4)},
	}},
	{name: "Load", alone: true, checks: []check{
		{"BackToBack", suite.backToBack, from(1, 2, 4, 8)},
		{"Paced", suite.paced, from(1, 4)},
		{"Runners", suite.backToBackOfRunners, from(2, 2, 4, 8)},
		{"SeveralGroups", suite.severalGroups, from(1, 3)},
		{"Chaos", suite.chaos, from(2, 4)},
	}},
	{name: "NothingLeft", alone: true, checks: []check{
		{"Rounds", suite.nothingLeftByRounds, always(4)},
		{"BrokenRounds", suite.nothingLeftByBrokenRounds, always(3)},
		{"Groups", suite.nothingLeftByGroups, always(2)},
	}},
}

// measure notes how long groups take.
func (s *suite) measure(t *testing.T) {
	s.timing = s.measured(t, 4)
	s.timings = make(map[int]timing)
	for _, size := range slices.Concat(s.sizes, s.smoke) {
		if size < 1 {
			t.Fatalf("an option asks for groups of %d ranks, want at least 1", size)
		}
		if _, ok := s.timings[size]; size > 8 && !ok {
			s.timings[size] = s.measured(t, size)
		}
	}
}

// besideLarge returns the suite for groups that are checked while large ones keep the processors busy.
func (s suite) besideLarge() suite {
	for _, large := range s.timings {
		s.settle = max(s.settle, large.settle)
	}
	return s
}

// measured lets a group take some rounds and notes how long they take. Nobody outside can see when a
// vote has come to the other ranks: the suite gives it 20 times as long as a round usually takes,
// or twice as long as the slowest took.
func (s *suite) measured(t *testing.T, size int) (measured timing) {
	g := s.group(t, size)
	var took []time.Duration
	start := time.Now()
	for i := range 30 {
		began := time.Now()
		for _, c := range g.begin(t.Context(), g.all()...) {
			c.returned(patience) // whatever it returns: the checks look at that
			g.steps[c.rank]++
		}
		if i >= 10 { // connected, and warm
			took = append(took, time.Since(began))
		}
		if len(took) > 0 && time.Since(start) > 5*time.Second {
			break
		}
	}
	slices.Sort(took)
	measured.round = took[len(took)/2]
	measured.settle = min(max(20*measured.round, 2*took[len(took)-1], 25*time.Millisecond), time.Second)
	return measured
}

// many returns n, the number of steps of a long run. It returns fewer with -short, and if n steps
// would take more than 5 seconds.
func (s suite) many(n int) int {
	if testing.Short() {
		n /= 10
	}
	return min(n, int(5*time.Second/max(s.round, 1)))
}
