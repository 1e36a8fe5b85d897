package fwdtest

import (
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// TestCoordinator checks that the coordinators which newGroup makes do what [fwd.Coordinator]
// promises, each promise in a subtest of its own. All subtests have ended when it returns.
//
// newGroup makes the coordinators of a new group of size ranks, 1 to 8; element i is that of rank
// i. None of them has exchanged yet. It registers what has to be closed with the Cleanup of the t
// that it is given, which is the subtest's, and calls the Fatal of that t if it can't make a group.
// Several subtests call it concurrently. With -short there are fewer steps.
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
		t.Run(p.name, func(t *testing.T) { // returns when the part's parallel subtests have ended
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
	lose     func(t *testing.T, group []fwd.Coordinator, from, to int) (end func()) // nil: nothing is lost
	round    time.Duration                                                          // how long a round takes
	settle   time.Duration                                                          // after which a vote has come to the other ranks
}

type check struct {
	name string
	run  func(s suite, t *testing.T)
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
		{"Ranks", suite.ranks},
		{"Fields", suite.fields},
		{"ArrivalOrder", suite.arrivalOrder},
		{"VotesStay", suite.votesStay},
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
	{name: "MissingRanks", checks: []check{
		{"NoneOpen", suite.missingNoneOpen},
		{"Waiting", suite.missingWaiting},
		{"AfterBrokenSteps", suite.missingAfterBrokenSteps},
		{"AnyTime", suite.missingAnyTime},
	}},
	{name: "Last", checks: []check{
		{"None", suite.lastNone},
		{"InOrder", suite.lastInOrder},
		{"AfterBrokenSteps", suite.lastAfterBrokenSteps},
		{"AnyTime", suite.lastAnyTime},
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
	{name: "Plans", checks: []check{
		{"Schedules", suite.planSchedules},
		{"Idle", suite.planIdle},
		{"AllIdle", suite.planAllIdle},
		{"ConfiguredDifferently", suite.planConfiguredDifferently},
		{"WarmUp", suite.planWarmUp},
		{"WarmUpAlone", suite.planWarmUpAlone},
		{"WarmUpAnotherGraph", suite.planWarmUpAnotherGraph},
		{"Begin", suite.planBegin},
		{"BeginMissing", suite.planBeginMissing},
	}},
	{name: "Loss", checks: []check{
		{"BeforeTheVote", of(3, suite.lossBeforeTheVote)},
		{"AfterFirstVotes", of(3, suite.lossAfterFirstVotes)},
		{"UnheardByAll", of(4, suite.lossUnheardByAll)},
		{"HearsNobody", of(4, suite.lossHearsNobody)},
		{"GiveUpInTurn", of(3, suite.lossGiveUpInTurn)},
		{"Stays", of(3, suite.lossStays)},
		{"ComesAndGoes", of(4, suite.lossComesAndGoes)},
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

// measure lets a group take some rounds and notes how long they take. Nobody outside can see when a
// vote has come to the other ranks: the suite gives it 20 times as long as a round usually takes,
// or twice as long as the slowest took.
func (s *suite) measure(t *testing.T) {
	g := s.group(t, 4)
	var took []time.Duration
	for i := range 30 {
		began := time.Now()
		for _, c := range g.begin(t.Context(), g.all()...) {
			c.returned(patience) // whatever it returns: the checks look at that
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

// many returns n, the number of steps of a long run. It returns fewer with -short, and if n steps
// would take more than 5 seconds.
func (s suite) many(n int) int {
	if testing.Short() {
		n /= 10
	}
	return min(n, int(5*time.Second/max(s.round, 1)))
}

func of(size int, f func(s suite, t *testing.T, size int)) func(s suite, t *testing.T) {
	return func(s suite, t *testing.T) { f(s, t, size) }
}
