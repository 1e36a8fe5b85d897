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
	"sync/atomic"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdtest"
)

// exchange is another Exchange for the coordinator c.
type exchange func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error)

// broken is a coordinator of the in-process group with another Exchange.
type broken struct {
	fwd.Coordinator
	exchange exchange
}

// Exchange implements [fwd.Coordinator].
func (b broken) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	return b.exchange(b.Coordinator, ctx, v)
}

// misnumbered is a coordinator that counts its ranks from the end.
type misnumbered struct{ fwd.Coordinator }

// Rank implements [fwd.Coordinator].
func (m misnumbered) Rank() int { return m.Size() - 1 - m.Coordinator.Rank() }

// breakGroup replaces the coordinators of a new group.
type breakGroup func(group []fwd.Coordinator)

// inGroup breaks every rank in the same way; newExchange is called once for a group.
func inGroup(newExchange func() exchange) breakGroup {
	return func(group []fwd.Coordinator) {
		e := newExchange()
		for i, c := range group {
			group[i] = broken{c, e}
		}
	}
}

// inRanks is inGroup with an exchange for each rank, where ranks have a state of their own.
func inRanks(newExchange func() exchange) breakGroup {
	return func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = broken{c, newExchange()}
		}
	}
}

// without state.
func without(e exchange) breakGroup { return inGroup(func() exchange { return e }) }

// inVotes breaks the votes that come back. It may change those that it gets.
func inVotes(spoil func(votes []fwd.Vote) []fwd.Vote) breakGroup {
	return without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		if err == nil {
			votes = spoil(votes)
		}
		return votes, err
	})
}

// inVote breaks each vote that comes back.
func inVote(spoil func(v *fwd.Vote)) breakGroup {
	return inVotes(func(votes []fwd.Vote) []fwd.Vote {
		for i := range votes {
			spoil(&votes[i])
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

// held is what the groups of this process have kept for ever.
var held sync.Map

func hold(bytes int) {
	b := make([]byte, bytes)
	held.Store(&b, true)
}

// sleepForEver leaves a goroutine behind.
func sleepForEver() { go func() { <-make(chan bool) }() }

// faults are ways to break a group, each with the subtests that must fail because of it, and with what they must say.
var faults = []struct {
	name  string
	group breakGroup
	says  string // a regular expression
	fails []string
}{
	{"counts ranks from the end", func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = misnumbered{c}
		}
	}, `coordinator 0 of 2 is rank 1 of 2`, []string{"Exchange/Ranks"}},
	{"drops a vote", inVotes(func(votes []fwd.Vote) []fwd.Vote {
		return votes[:len(votes)-1]
	}), `rank \d in step \d+: .*votes, want \d`, []string{"Exchange/ArrivalOrder", "Load/BackToBack", "Load/Chaos"}},
	{"swaps ranks", inVotes(func(votes []fwd.Vote) []fwd.Vote {
		slices.Reverse(votes)
		return votes
	}), `rank \d in step \d+: the .*vote .*is {.*}, want {`, []string{"Exchange/ArrivalOrder", "Load/Paced", "Load/Chaos"}},
	{"mixes steps", inRanks(func() exchange {
		var last []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err == nil && last != nil {
				votes[len(votes)-1] = last[len(votes)-1]
			}
			last = slices.Clone(votes)
			return votes, err
		}
	}), `rank \d in step 2: .*({Step:1 |\[.*1.*\])`, []string{"Exchange/ArrivalOrder", "Load/BackToBack", "Load/Runners"}},
	{"returns the last round again", inRanks(func() exchange {
		var last []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err == nil && last != nil {
				votes, last = last, votes
			} else {
				last = slices.Clone(votes)
			}
			return votes, err
		}
	}), `rank \d in step 2: the vote of rank 0 is {Step:1 .*, want {Step:2`, []string{"Exchange/Ranks", "Load/Paced"}},
	{"returns before all have come", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		votes, err := c.Exchange(ctx, v)
		if errors.Is(err, context.DeadlineExceeded) {
			return slices.Repeat([]fwd.Vote{v}, c.Size()), nil
		}
		return votes, err
	}), `rank \d in step \d returned \[.*\], <nil>; want it to wait`, []string{"Exchange/ArrivalOrder"}},
	{"shares the votes between ranks", inGroup(func() exchange {
		var rounds sync.Map
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err == nil {
				first, _ := rounds.LoadOrStore(v.Step, votes)
				votes = first.([]fwd.Vote)
			}
			return votes, err
		}
	}), `rank 1 in step 1: the vote of rank 0 is {Step:0 NumTokens:0`, []string{"Exchange/VotesAreTheCallers"}},
	{"uses the votes of a round again", inRanks(func() exchange {
		var own []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err == nil {
				own = append(own[:0], votes...)
				votes = own
			}
			return votes, err
		}
	}), `the votes that rank 2 got in step 1 have changed`, []string{"Exchange/VotesAreTheCallers"}},

	{"forgets NumTokens", inVote(func(v *fwd.Vote) { v.NumTokens = v.NumTokensPadded }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets NumTokensPadded", inVote(func(v *fwd.Vote) { v.NumTokensPadded = v.NumTokens }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets UBatch", inVote(func(v *fwd.Vote) { v.UBatch = false }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets GraphMode", inVote(func(v *fwd.Vote) { v.GraphMode = fwd.GraphNone }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"takes steps for float64", inVote(func(v *fwd.Vote) { v.Step = uint64(float64(v.Step)) }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets the span context", inVote(func(v *fwd.Vote) { v.SpanContext = fwd.Vote{}.SpanContext }), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets the trace flags", inVote(func(v *fwd.Vote) { v.SpanContext = v.SpanContext.WithTraceFlags(0) }),
		`the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets the trace state", inVote(func(v *fwd.Vote) {
		v.SpanContext = v.SpanContext.WithTraceState(fwd.Vote{}.SpanContext.TraceState())
	}), `the vote of rank`, []string{"Exchange/Fields"}},
	{"forgets span contexts that are not valid", inVote(func(v *fwd.Vote) {
		if !v.SpanContext.IsValid() {
			v.SpanContext = fwd.Vote{}.SpanContext
		}
	}), `the vote of rank`, []string{"Exchange/Fields"}},

	{"reports a wrong step", inErrors(fwd.ErrLockstep, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Step--
		return err
	}), `rank \d in step \d: error .* has step 2, want 3`, []string{"Lockstep/Restarted", "Runners/Restarted"}},
	{"reports the ranks in step", inErrors(fwd.ErrLockstep, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = others(c, err.Ranks...)
		return err
	}), `rank \d in step \d: error .* has ranks \[.*\], want \[`, []string{"Lockstep/DifferentSteps", "Lockstep/Restarted"}},
	{"reports no RankError", inErrors(fwd.ErrLockstep, func(fwd.Coordinator, *fwd.RankError) error {
		return fwd.ErrLockstep
	}), `is not a RankError`, []string{"Lockstep/Restarted", "Lockstep/RestartedAgain"}},
	{"leaves those in step waiting", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		var rankErr *fwd.RankError
		if errors.As(err, &rankErr) && errors.Is(err, fwd.ErrLockstep) &&
			!slices.Contains(rankErr.Ranks, c.Rank()) {
			<-ctx.Done()
		}
		return votes, err
	}), `rank \d in step \d+ has not returned after 2s`, []string{"Lockstep/Restarted"}},
	{"only goes on", inRanks(func() exchange {
		last := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step <= last {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Step: last, Ranks: []int{c.Rank()}}
			}
			last = v.Step
			return c.Exchange(ctx, v)
		}
	}), `rank \d in step 1: .*out of step.*; want the votes of step 1`, []string{"Lockstep/AllRestarted"}},
	{"counts the steps itself", inRanks(func() exchange {
		step := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			step++
			v.Step = step
			return c.Exchange(ctx, v)
		}
	}), `rank \d in step \d: .*want`, []string{"Lockstep/AllAhead", "Lockstep/Restarted"}},
	{"tells a restarted rank off for ever", inRanks(func() exchange {
		first := true
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == 1 && !first {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Ranks: []int{c.Rank()}}
			}
			first = false
			return c.Exchange(ctx, v)
		}
	}), `error .* has step 0, want 1`, []string{"Lockstep/RestartedAfterFirstStep", "Runners/RestartedAfterFirstStep"}},

	{"ignores the context", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		return c.Exchange(context.WithoutCancel(ctx), v)
	}), `rank \d in step \d+ has not returned after \d+s`, []string{"Missing/Cancelled", "Runners/Missing", "Context/EndedBefore"}},
	{"ignores deadlines", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		if _, ok := ctx.Deadline(); ok {
			ctx = context.WithoutCancel(ctx)
		}
		return c.Exchange(ctx, v)
	}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/DeadlineExceeded"}},
	{"leaves the others waiting", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		if errors.Is(err, fwd.ErrRankMissing) && ctx.Err() == nil {
			<-ctx.Done()
		}
		return votes, err
	}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/Cancelled"}},
	{"takes its time to say so", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		time.Sleep(3 * time.Second)
		return err
	}), `rank \d in step \d+ has not returned after 2s`, []string{"Missing/Cancelled"}},
	{"names the wrong rank", inErrors(fwd.ErrRankMissing, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks[0] = (err.Ranks[0] + 1) % c.Size()
		return err
	}), `rank \d in step \d: error .* has ranks \[.*\], want \[`, []string{"Missing/Cancelled", "Missing/LateByDifferentSteps"}},
	{"names itself", inErrors(fwd.ErrRankMissing, func(c fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = append(err.Ranks, c.Rank())
		slices.Sort(err.Ranks)
		return err
	}), `error .*(has ranks|names itself)`, []string{"Missing/Cancelled", "Context/EndedBefore", "Load/Chaos"}},
	{"names nobody", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Ranks = nil
		return err
	}), `error .*(has ranks|or nobody)`, []string{"Missing/CancelledWithCause", "Load/Chaos"}},
	{"does not count a broken step", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Step--
		return err
	}), `error .* has step \d+, want `, []string{"Missing/Late", "Load/Chaos"}},
	{"never works again", inRanks(func() exchange {
		var last error
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if last != nil {
				return nil, last
			}
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrRankMissing) {
				last = err
			}
			return votes, err
		}
	}), `want the votes of step \d`, []string{"Missing/Cancelled", "Runners/Missing"}},
	{"loses the cause", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fwd.ErrRankMissing
		return err
	}), `error .* is(| not) "the engine stops"`, []string{"Missing/CancelledWithCause", "Context/EndedBefore"}},
	{"gives everyone the cause", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fmt.Errorf("%w: %w", err.Err, context.Canceled)
		return err
	}), `error .* is "context canceled": true, want false`, []string{"Missing/Cancelled"}},
	{"says that it is both", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		err.Err = fmt.Errorf("%w: %w", err.Err, fwd.ErrLockstep)
		return err
	}), `error .* is fwd: ranks out of step too`, []string{"Missing/DeadlineExceeded"}},
	{"tells a late rank off", inGroup(func() exchange {
		var broken atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if step := broken.Load(); v.Step <= step {
				return nil, &fwd.RankError{Err: fwd.ErrLockstep, Step: step, Ranks: []int{c.Rank()}}
			}
			votes, err := c.Exchange(ctx, v)
			var rankErr *fwd.RankError
			if errors.As(err, &rankErr) {
				broken.Store(rankErr.Step)
			}
			return votes, err
		}
	}), `rank \d in step \d: .*out of step.*; want the votes of step \d`, []string{"Missing/Late", "Runners/Late"}},
	{"returns a late rank's own step", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		for i := range votes {
			votes[i].Step = v.Step
		}
		return votes, err
	}), `rank \d in step (\d): the vote of rank 0 is {Step:\d .* want {Step:\d`, []string{"Missing/Late", "Missing/LateByDifferentSteps"}},
	{"takes a restarted rank for a late one", inGroup(func() exchange {
		var broken atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if step := broken.Load(); v.Step <= step {
				v.Step = step + 1
			}
			votes, err := c.Exchange(ctx, v)
			var rankErr *fwd.RankError
			if errors.As(err, &rankErr) {
				broken.Store(rankErr.Step)
			}
			return votes, err
		}
	}), `rank \d in step \d: \[.*want error fwd: ranks out of step`, []string{"Missing/LateAndRestarted", "Runners/LateAndRestarted"}},

	{"returns the context's error", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return c.Exchange(ctx, v)
	}), `want error fwd: rank missing`, []string{"Context/EndedBefore"}},
	{"stays away with an ended context", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		if ctx.Err() != nil {
			return nil, &fwd.RankError{Err: fmt.Errorf("%w: %w", fwd.ErrRankMissing, context.Cause(ctx)), Step: v.Step, Ranks: others(c, c.Rank())}
		}
		return c.Exchange(ctx, v)
	}), `rank \d( in step|.* has not returned)`, []string{"Context/EndedBefore", "Context/EndedBeforeTheLastCame"}},
	{"looks at the last context too", inRanks(func() exchange {
		last := context.Background()
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			both, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(last, cancel)()
			last = ctx
			return c.Exchange(both, v)
		}
	}), `rank \d in step \d returned .*; want it to wait`, []string{"Context/EndedAfter"}},

	{"sends what it should refuse", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		return c.Exchange(ctx, valid(v))
	}), `rank 0 in step 1: .*; want error fwd: invalid`, []string{"Refused/InvalidVote"}},
	{"sends what it refuses", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, v)
		if errors.Is(err, fwd.ErrInvalid) {
			go c.Exchange(ctx, valid(v))
		}
		return votes, err
	}), `rank 1 in step 1 returned .*; want it to wait`, []string{"Refused/InvalidVote"}},
	{"lets a second call disturb the round", inRanks(func() exchange {
		var stop atomic.Pointer[context.CancelFunc]
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			ctx, cancel := context.WithCancel(ctx)
			if first := stop.Swap(&cancel); first != nil {
				(*first)()
			}
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d (returned .*want it to wait|has not returned)`, []string{"Refused/SecondCall"}},
	{"lets a second call wait", inRanks(func() exchange {
		var mu sync.Mutex
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			mu.Lock()
			defer mu.Unlock()
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d has not returned after 2s`, []string{"Refused/SecondCall"}},
	{"takes a second call for the next step", inRanks(func() exchange {
		var last atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == last.Load() {
				v.Step++
			}
			last.Store(v.Step)
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d has not returned after 2s`, []string{"Refused/SecondCallAfterTheRound", "Refused/SecondCallAfterABrokenRound"}},

	{"confuses groups", inGroup(func() exchange {
		type key struct {
			rank int
			step uint64
		}
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			held.Store(key{c.Rank(), v.Step}, v)
			votes, err := c.Exchange(ctx, v)
			for rank := range votes {
				last, _ := held.Load(key{rank, v.Step})
				votes[rank] = last.(fwd.Vote)
			}
			return votes, err
		}
	}), `the vote of rank \d is {.*, want {`, []string{"Load/SeveralGroups"}},
	{"lets a broken round hang at times", inGroup(func() exchange {
		var errs atomic.Int64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrRankMissing) && errs.Add(1) == 20 {
				<-make(chan bool)
			}
			return votes, err
		}
	}), `rank \d in step \d+ has not returned after 10s`, []string{"Load/Chaos"}},
	{"does not come together", inGroup(func() exchange {
		var broken atomic.Bool
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if broken.Load() {
				return nil, &fwd.RankError{Err: fwd.ErrRankMissing, Step: v.Step, Ranks: others(c, c.Rank())}
			}
			votes, err := c.Exchange(ctx, v)
			broken.Store(broken.Load() || err != nil)
			return votes, err
		}
	}), `the group has not come together in 5 attempts`, []string{"Load/Chaos"}},

	{"leaves a goroutine after a round", without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
		sleepForEver()
		return c.Exchange(ctx, v)
	}), `left \d+ goroutines`, []string{"NothingLeft/Rounds", "NothingLeft/BrokenRounds"}},
	{"keeps the votes of every round", inRanks(func() exchange {
		var kept [][]fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			kept = append(kept, votes)
			return votes, err
		}
	}), `and \d+ bytes behind`, []string{"NothingLeft/Rounds"}},
	{"leaves a goroutine after a broken round", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		sleepForEver()
		return err
	}), `left \d+ goroutines`, []string{"NothingLeft/BrokenRounds"}},
	{"keeps what it knew of broken rounds", inErrors(fwd.ErrRankMissing, func(_ fwd.Coordinator, err *fwd.RankError) error {
		hold(100)
		return err
	}), `and \d+ bytes behind`, []string{"NothingLeft/BrokenRounds"}},
	{"leaves a goroutine of a closed group", func([]fwd.Coordinator) { sleepForEver() },
		`left \d+ goroutines`, []string{"NothingLeft/Groups"}},
	{"keeps closed groups", func([]fwd.Coordinator) { hold(4096) },
		`and \d+ bytes behind`, []string{"NothingLeft/Groups"}},
}

// liberties are what a coordinator may do otherwise than the in-process group, each with the subtest that must allow it.
var liberties = []struct {
	name   string
	group  breakGroup
	passes string
}{
	{"all fail where a rank restarts after the first step", inRanks(func() exchange {
		last := uint64(0)
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == 1 && last == 1 {
				v.Step = 0 // out of step instead of a second call
			}
			last = v.Step
			return c.Exchange(ctx, v)
		}
	}), "Lockstep/RestartedAfterFirstStep"},
	{"an ended context breaks the round", inGroup(func() exchange {
		var waiting sync.Map // the functions that end the wait
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if ctx.Err() != nil {
				waiting.Range(func(_, stop any) bool { stop.(context.CancelFunc)(); return false })
				return nil, &fwd.RankError{Err: fmt.Errorf("%w: %w", fwd.ErrRankMissing, ctx.Err()), Step: v.Step, Ranks: others(c, c.Rank())}
			}
			ctx, stop := context.WithCancel(ctx)
			waiting.Store(c.Rank(), stop)
			defer waiting.Delete(c.Rank())
			return c.Exchange(ctx, v)
		}
	}), "Context/EndedBeforeTheLastCame"},
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

// valid makes a valid vote of one that is not.
func valid(v fwd.Vote) fwd.Vote {
	v.NumTokens = max(v.NumTokens, 0)
	v.NumTokensPadded = max(v.NumTokensPadded, v.NumTokens)
	if !v.GraphMode.ValidRuntime() {
		v.GraphMode = fwd.GraphNone
	}
	return v
}

// subject is the environment variable that names the fault or liberty of TestSubject's coordinators.
const subject = "FWDTEST_SUBJECT"

// TestSubject is the suite as it runs in a process of its own.
func TestSubject(t *testing.T) {
	name, ok := os.LookupEnv(subject)
	if !ok {
		t.Skip("runs in the processes that TestFaults starts")
	}
	go func() { // end with the process that holds the other end
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
	fwdtest.TestCoordinator(t, func(t *testing.T, size int) []fwd.Coordinator {
		group := localGroup(t, size)
		breakGroup(group)
		return group
	})
}

// TestFaults: every fault makes the subtests fail that are there for it.
func TestFaults(t *testing.T) {
	t.Parallel()
	processes := make(chan bool, 2) // at once
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

// TestNoFault: without a fault all subtests pass in the same way, and they are those that the faults make fail.
func TestNoFault(t *testing.T) {
	output, err := runSubject(t, "none", "")
	if err != nil {
		t.Fatalf("%v:\n%s", err, output)
	}
	var passed, failing []string
	for _, match := range regexp.MustCompile(`--- PASS: TestSubject/(\w+/\w+) `).FindAllStringSubmatch(output, -1) {
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

// TestLiberties: what is allowed passes.
func TestLiberties(t *testing.T) {
	for _, l := range liberties {
		output, err := runSubject(t, l.name, "/"+l.passes)
		if passed := "--- PASS: TestSubject/" + l.passes; err != nil || !strings.Contains(output, passed+" (") {
			t.Errorf("%s: %v, want %q in:\n%s", l.name, err, passed, output)
		}
	}
}

// runSubject runs TestSubject, or the subtest with that path in it, with that fault in a process of its own, which does not
// outlive this one.
func runSubject(t *testing.T, fault, subtest string) (output string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := "^TestSubject" + strings.ReplaceAll(subtest, "/", "$/^") + "$"
	cmd := exec.CommandContext(t.Context(), self, "-test.run", run, "-test.v", "-test.short", "-test.timeout", "60s")
	cmd.Env = append(os.Environ(), subject+"="+fault)
	if _, err := cmd.StdinPipe(); err != nil { // which nothing but the end of this process closes
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}
