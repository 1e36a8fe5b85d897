package fwdtest

import (
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// TestCoordinator checks that the coordinators that newGroup makes hold what [fwd.Coordinator] promises, each promise in a
// subtest of its own. All subtests are through when it returns.
//
// newGroup makes the coordinators of a new group of size ranks, 1 to 8, element i that of rank i; none of them has
// exchanged yet. What has to be closed, newGroup registers with the Cleanup of the t that it is given, which is the
// subtest's; where a group can't be made it calls that t's Fatal. It is called from several subtests at once. With -short
// there are fewer steps.
func TestCoordinator(t *testing.T, newGroup func(t *testing.T, size int) []fwd.Coordinator) {
	s := suite{newGroup: newGroup}
	s.measure(t)
	for _, p := range parts {
		s := s
		if p.runners {
			s = s.withRunners()
		}
		t.Run(p.name, func(t *testing.T) { // returns when the part's parallel subtests are through
			for _, c := range p.checks {
				t.Run(c.name, func(t *testing.T) {
					if !p.alone {
						t.Parallel()
					}
					c.run(s, t)
				})
			}
		})
	}
}

// suite is what the checks need to know.
type suite struct {
	newGroup func(t *testing.T, size int) []fwd.Coordinator
	round    time.Duration // that a round takes
	settle   time.Duration // after which a vote has come to the other ranks
}

type check struct {
	name string
	run  func(s suite, t *testing.T)
}

// part is checks of one kind. Most checks mainly wait, and run in parallel. Those that keep the processors busy would delay
// them, and those that count goroutines would count theirs.
type part struct {
	name    string
	runners bool // each rank is driven by a Runner
	alone   bool // one check at a time
	checks  []check
}

var parts = []part{
	{name: "Exchange", checks: []check{
		{"Ranks", suite.ranks},
		{"Fields", suite.fields},
		{"ArrivalOrder", suite.arrivalOrder},
		{"VotesAreTheCallers", suite.votesAreTheCallers},
	}},
	{name: "Lockstep", checks: []check{
		{"DifferentSteps", suite.differentSteps},
		{"Restarted", suite.restarted},
		{"RestartedAfterFirstStep", suite.restartedAfterFirstStep},
		{"RestartedAgain", suite.restartedAgain},
		{"AllRestarted", suite.allRestarted},
		{"AllAhead", suite.allAhead},
	}},
	{name: "Missing", checks: []check{
		{"Cancelled", missing(cancelled)},
		{"CancelledWithCause", missing(cancelledWithCause)},
		{"DeadlineExceeded", missing(deadlineExceeded)},
		{"Late", suite.late},
		{"LateByDifferentSteps", suite.lateByDifferentSteps},
		{"LateAndRestarted", suite.lateAndRestarted},
	}},
	{name: "Context", checks: []check{
		{"EndedBefore", suite.endedBefore},
		{"EndedBeforeTheLastCame", suite.endedBeforeTheLastCame},
		{"EndedAfter", suite.endedAfter},
	}},
	{name: "Refused", checks: []check{
		{"InvalidVote", suite.invalidVote},
		{"SecondCall", suite.secondCall},
		{"SecondCallAfterTheRound", suite.secondCallAfterTheRound},
		{"SecondCallAfterABrokenRound", suite.secondCallAfterABrokenRound},
	}},
	{name: "Runners", runners: true, checks: []check{
		{"Restarted", suite.restarted},
		{"RestartedAfterFirstStep", suite.restartedAfterFirstStep},
		{"Missing", missing(cancelled)},
		{"Late", suite.late},
		{"LateAndRestarted", suite.lateAndRestarted},
	}},
	{name: "Load", alone: true, checks: []check{
		{"BackToBack", suite.backToBack},
		{"Paced", suite.paced},
		{"Runners", func(s suite, t *testing.T) { s.withRunners().backToBack(t) }},
		{"SeveralGroups", suite.severalGroups},
		{"Chaos", suite.chaos},
	}},
	{name: "NothingLeft", alone: true, checks: []check{
		{"Rounds", suite.nothingLeftByRounds},
		{"BrokenRounds", suite.nothingLeftByBrokenRounds},
		{"Groups", suite.nothingLeftByGroups},
	}},
}

// measure lets a group take some rounds, for how long they take. Nobody outside can see when a vote has come to the other
// ranks: the suite gives it 20 times as long as a round usually takes, or twice as long as the slowest.
func (s *suite) measure(t *testing.T) {
	g := s.group(t, 4)
	var took []time.Duration
	for i := range 30 {
		began := time.Now()
		for _, c := range g.begin(t.Context(), g.all()...) {
			c.returned(patience) // with what, others check
			g.steps[c.rank]++
		}
		if i >= 10 { // connected, and warm
			took = append(took, time.Since(began))
		}
	}
	slices.Sort(took)
	s.round = took[len(took)/2]
	s.settle = min(max(20*s.round, 2*took[len(took)-1], 25*time.Millisecond), time.Second)
}

// many returns n, the number of steps of a long run; fewer with -short, and where they would take more than 5 seconds.
func (s suite) many(n int) int {
	if testing.Short() {
		n /= 10
	}
	return min(n, int(5*time.Second/max(s.round, 1)))
}
