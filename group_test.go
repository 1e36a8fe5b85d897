// This file tests the local group and what Runners make of it, in simulated time: steps that all take, steps
// that fail, and ranks that come late or anew.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/forwardctx/fwd"
)

// groupVote is a vote that tells the ranks and the steps apart.
func groupVote(rank int, step uint64) fwd.Vote {
	return fwd.Vote{Step: step, NumTokens: rank + 1, NumTokensPadded: rank + 1}
}

// groupCore leaves out of votes what a Runner says beyond groupVote.
var groupCore = cmpopts.IgnoreFields(fwd.Vote{}, "NumReqs", "Uniform", "Config")

// groupVotes are the votes of all ranks in one step.
func groupVotes(size int, step uint64) []fwd.Vote {
	votes := make([]fwd.Vote, size)
	for rank := range votes {
		votes[rank] = groupVote(rank, step)
	}
	return votes
}

// groupMember takes one step of one rank and returns the votes of all.
type groupMember func(ctx context.Context) ([]fwd.Vote, error)

// groupDriver is a way in which a rank takes part in a step.
type groupDriver struct {
	name string
	join func(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember
}

// groupDrivers are an engine's own use of the coordinator, and the ways of a Runner.
var groupDrivers = append([]groupDriver{{"coordinator", joinDirectly}}, groupRunnerDrivers...)

var groupRunnerDrivers = []groupDriver{
	{"plan", joinByPlan},
	{"run", joinByRun},
	{"begin", joinByBegin},
	{"begin elsewhere", func(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember {
		return joinByBegin(t, &groupTap{Coordinator: c}, opts...) // not known as one of a local group
	}},
}

// joinDirectly follows the step as the contract of Coordinator says.
func joinDirectly(_ *testing.T, c fwd.Coordinator, _ ...fwd.Option) groupMember {
	step := uint64(0)
	return func(ctx context.Context) ([]fwd.Vote, error) {
		votes, err := c.Exchange(ctx, groupVote(c.Rank(), step+1))
		var rankErr *fwd.RankError
		if errors.As(err, &rankErr) {
			step = rankErr.Step
		} else if err == nil {
			step = votes[0].Step
		}
		return votes, err
	}
}

func joinByPlan(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember {
	tap := &groupTap{Coordinator: c}
	r := groupRunner(t, tap, opts...)
	return func(ctx context.Context) ([]fwd.Vote, error) {
		pass, err := r.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{c.Rank() + 1}})
		if err != nil {
			return nil, err
		}
		if pass.Agreement == nil || pass.Agreement.Step != tap.votes[0].Step {
			return nil, fmt.Errorf("the plan has agreement %+v, want step %d", pass.Agreement, tap.votes[0].Step)
		}
		return tap.votes, nil
	}
}

func joinByRun(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember {
	tap := &groupTap{Coordinator: c}
	r := groupRunner(t, tap, opts...)
	return func(ctx context.Context) ([]fwd.Vote, error) {
		calls := 0
		err := r.Run(ctx, fwd.Pass{NumTokens: c.Rank() + 1}, func(context.Context) error { calls++; return nil })
		if want := map[bool]int{true: 1}[err == nil]; calls != want {
			return nil, fmt.Errorf("forward was called %d times, Run returned %v", calls, err)
		}
		return tap.votes, err
	}
}

func joinByBegin(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember {
	r := groupRunner(t, c, opts...)
	return func(ctx context.Context) ([]fwd.Vote, error) {
		wait, err := r.Begin(ctx, fwd.Schedule{NumScheduledTokens: []int{c.Rank() + 1}})
		if err != nil {
			return nil, err
		}
		pass, err := wait()
		if err != nil {
			return nil, err
		}
		return pass.Agreement.Votes, nil
	}
}

// groupSim is a group in a bubble of simulated time, in which every rank is driven in the same way.
type groupSim struct {
	*testing.T
	join    func(t *testing.T, c fwd.Coordinator, opts ...fwd.Option) groupMember
	group   []fwd.Coordinator
	members []groupMember
}

// groupEach runs a test with each driver. The bubble fails the test if a goroutine is left.
func groupEach(t *testing.T, size int, test func(s *groupSim)) {
	t.Parallel()
	for _, d := range groupDrivers {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &groupSim{T: t, join: d.join, group: localGroup(t, size)}
				for _, c := range s.group {
					s.members = append(s.members, d.join(t, c))
				}
				test(s)
			})
		})
	}
}

// restart replaces a rank by one that begins anew on the same coordinator.
func (s *groupSim) restart(rank int) { s.members[rank] = s.join(s.T, s.group[rank]) }

// groupCall is one step that a rank takes.
type groupCall struct {
	s     *groupSim
	rank  int
	done  chan struct{}
	votes []fwd.Vote
	err   error
}

// begin starts a step on the ranks, in that order: each has come, or is through, before the next
// begins.
func (s *groupSim) begin(ctx context.Context, ranks ...int) []*groupCall {
	calls := make([]*groupCall, len(ranks))
	for i, rank := range ranks {
		c := &groupCall{s: s, rank: rank, done: make(chan struct{})}
		go func() {
			defer close(c.done)
			c.votes, c.err = s.members[rank](ctx)
		}()
		synctest.Wait()
		calls[i] = c
	}
	return calls
}

// waiting checks that a call has not returned.
func (c *groupCall) waiting() {
	c.s.Helper()
	synctest.Wait()
	select {
	case <-c.done:
		c.s.Fatalf("rank %d returned %v, %v; want it to wait", c.rank, c.votes, c.err)
	default:
	}
}

// returned checks that a call has returned.
func (c *groupCall) returned() {
	c.s.Helper()
	synctest.Wait()
	select {
	case <-c.done:
	default:
		c.s.Fatalf("rank %d is still waiting", c.rank)
	}
}

// agreed checks that a call has returned the votes of all ranks at that step.
func (c *groupCall) agreed(step uint64) {
	c.s.Helper()
	c.returned()
	if c.err != nil {
		c.s.Fatalf("rank %d: %v; want the votes of step %d", c.rank, c.err, step)
	}
	if diff := cmp.Diff(groupVotes(len(c.s.group), step), c.votes, groupCore); diff != "" {
		c.s.Errorf("rank %d: votes (-want +got):\n%s", c.rank, diff)
	}
}

// failed checks that a call has failed with a RankError of that content.
func (c *groupCall) failed(want error, step uint64, ranks ...int) {
	c.s.Helper()
	c.returned()
	groupCheckError(c.s.T, c.rank, c.err, want, step, ranks...)
}

func groupCheckError(t *testing.T, rank int, err, want error, step uint64, ranks ...int) {
	t.Helper()
	var got *fwd.RankError
	if !errors.As(err, &got) || !errors.Is(err, want) {
		t.Fatalf("rank %d: error %v, want a RankError that is %v", rank, err, want)
	}
	for _, other := range []error{fwd.ErrLockstep, fwd.ErrRankMissing, fwd.ErrInvalid} {
		if other != want && errors.Is(err, other) {
			t.Errorf("rank %d: error %v is %v too", rank, err, other)
		}
	}
	if got.Step != step || !slices.Equal(got.Ranks, ranks) {
		t.Errorf("rank %d: error %v has step %d and ranks %v, want step %d and ranks %v",
			rank, err, got.Step, got.Ranks, step, ranks)
	}
}

// together checks that the group is whole: all ranks take a step and get its votes.
func (s *groupSim) together(step uint64) {
	s.Helper()
	for _, c := range s.begin(s.Context(), s.ranks()...) {
		c.agreed(step)
	}
}

func (s *groupSim) ranks() []int {
	ranks := make([]int, len(s.group))
	for i := range ranks {
		ranks[i] = i
	}
	return ranks
}

// groupPermutations calls f with every order of 0..n-1.
func groupPermutations(n int, f func([]int)) {
	var grow func(prefix []int)
	grow = func(prefix []int) {
		if len(prefix) == n {
			f(prefix)
			return
		}
		for i := range n {
			if !slices.Contains(prefix, i) {
				grow(append(slices.Clone(prefix), i))
			}
		}
	}
	grow(nil)
}

// All ranks at the same step, in every order of arrival: nobody returns before the last has come, and all get
// all votes.
func TestGroupSameStep(t *testing.T) {
	groupEach(t, 4, func(s *groupSim) {
		step := uint64(0)
		groupPermutations(4, func(order []int) {
			step++
			calls := s.begin(s.Context(), order[:2]...)
			calls = append(calls, s.begin(context.Background(), order[2])...) // which never ends
			for _, c := range calls {
				c.waiting()
			}
			for _, c := range append(calls, s.begin(s.Context(), order[3])...) {
				c.agreed(step)
			}
		})
	})
}

// Ranks of one process share the votes of a round, and a Runner's agreement is about these very votes.
func TestGroupSharesVotes(t *testing.T) {
	groupEach(t, 3, func(s *groupSim) {
		for step := uint64(1); step <= 3; step++ {
			calls := s.begin(s.Context(), 0, 1, 2)
			for _, c := range calls {
				if c.agreed(step); &c.votes[0] != &calls[0].votes[0] {
					s.Errorf("step %d: rank %d has votes of its own", step, c.rank)
				}
			}
		}
	})
}

// All ranks there, but at different steps: a restarted rank costs one failed step, whenever it comes.
func TestGroupDifferentSteps(t *testing.T) {
	groupEach(t, 3, func(s *groupSim) {
		step := uint64(0)
		for _, restarted := range [][]int{{0}, {1}, {2}, {0, 2}, {1, 2}} {
			for last := range 3 { // the rank that comes last
				for range 4 {
					step++
					s.together(step)
				}
				for _, rank := range restarted {
					s.restart(rank)
				}
				order := slices.DeleteFunc(s.ranks(), func(r int) bool { return r == last })
				calls := s.begin(s.Context(), order...)
				for _, c := range calls {
					c.waiting()
				}
				step++
				for _, c := range append(calls, s.begin(s.Context(), last)...) {
					c.failed(fwd.ErrLockstep, step, restarted...)
					if text := c.err.Error(); !strings.Contains(text, fmt.Sprint(step)) || !strings.Contains(text, "1") {
						s.Errorf("the error %q does not show the steps 1 and %d of the ranks", text, step)
					}
				}
				step++
				s.together(step) // whole again immediately
			}
		}
	})
}

// A rank restarted after the very first step says again what it said before. That is its own failed step
// alone.
func TestGroupRestartAfterFirstStep(t *testing.T) {
	groupEach(t, 2, func(s *groupSim) {
		s.together(1)
		s.restart(1)
		waiting := s.begin(s.Context(), 0)[0]
		failed := s.begin(s.Context(), 1)[0]
		failed.returned()
		if !errors.Is(failed.err, fwd.ErrLockstep) {
			s.Fatalf("the restarted rank got %v, want %v", failed.err, fwd.ErrLockstep)
		}
		again := s.begin(s.Context(), 1)[0]
		again.returned()
		if waiting.returned(); waiting.err != nil {
			waiting, again = s.begin(s.Context(), 0)[0], s.begin(s.Context(), 1)[0]
		}
		waiting.agreed(2)
		again.agreed(2)
		s.together(3)
	})
}

// A rank that restarts again right after its first, failed step is at another step than the others once more:
// that costs one failed step each time, of everyone.
func TestGroupRestartTwice(t *testing.T) {
	groupEach(t, 2, func(s *groupSim) {
		for step := uint64(1); step <= 4; step++ {
			s.together(step)
		}
		for step := uint64(5); step <= 7; step++ {
			s.restart(1)
			for _, c := range s.begin(s.Context(), 0, 1) {
				c.failed(fwd.ErrLockstep, step, 1)
			}
		}
		s.together(8)
	})
}

// All ranks restart together: nothing but the votes says at which step a group is.
func TestGroupAllRestart(t *testing.T) {
	groupEach(t, 3, func(s *groupSim) {
		for step := uint64(1); step <= 5; step++ {
			s.together(step)
		}
		for rank := range s.group {
			s.restart(rank)
		}
		s.together(1)
		s.together(2)
	})
}

var errGone = errors.New("gone")

// groupEnds are the ways in which a ctx ends.
var groupEnds = []struct {
	name string
	end  func(ctx context.Context) (context.Context, func())
	want error
}{
	{"cancel", func(ctx context.Context) (context.Context, func()) {
		return context.WithCancel(ctx)
	}, context.Canceled},
	{"cause", func(ctx context.Context) (context.Context, func()) {
		ctx, cancel := context.WithCancelCause(ctx)
		return ctx, func() { cancel(errGone) }
	}, errGone},
	{"deadline", func(ctx context.Context) (context.Context, func()) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		context.AfterFunc(ctx, cancel)
		return ctx, func() { time.Sleep(2 * time.Second) }
	}, context.DeadlineExceeded},
}

// A rank's ctx ends first: the round is broken for all that wait in it, immediately, and the ranks that had
// not come are named. The group goes on with the next step.
func TestGroupMissing(t *testing.T) {
	groupEach(t, 4, func(s *groupSim) {
		step := uint64(0)
		for _, end := range groupEnds {
			for _, here := range [][]int{{0}, {3}, {1, 2}, {2, 0}, {3, 1, 0}, {0, 1, 2}} {
				ctx, stop := end.end(s.Context())
				calls := s.begin(ctx, here[0])
				calls = append(calls, s.begin(context.Background(), here[1:]...)...)
				for _, c := range calls {
					c.waiting()
				}
				stop()
				var missing []int
				for rank := range s.group {
					if !slices.Contains(here, rank) {
						missing = append(missing, rank)
					}
				}
				step++
				for _, c := range calls {
					c.failed(fwd.ErrRankMissing, step, missing...)
					if own := c.rank == here[0]; errors.Is(c.err, end.want) != own {
						s.Errorf("%s of rank %d: rank %d's error %v is %v: %t, want %t",
							end.name, here[0], c.rank, c.err, end.want, !own, own)
					}
				}
				step++
				s.together(step) // the missing ranks come late, and nobody is told off
			}
		}
	})
}

// A rank whose ctx has ended before it comes: it can't wait, but as the last one it needn't.
func TestGroupEndedContext(t *testing.T) {
	groupEach(t, 2, func(s *groupSim) {
		ended, cancel := context.WithCancel(s.Context())
		cancel()
		first := s.begin(ended, 0)[0]
		first.failed(fwd.ErrRankMissing, 1, 1)
		calls := append(s.begin(s.Context(), 1), s.begin(ended, 0)...)
		calls[0].agreed(2)
		calls[1].agreed(2)
		s.together(3)
	})
}

// The default exchange timeout is one minute of a Runner's own; 0 is none.
func TestGroupExchangeTimeout(t *testing.T) {
	t.Parallel()
	for _, d := range groupRunnerDrivers {
		for _, tt := range []struct {
			name string
			opts []fwd.Option
			want time.Duration
		}{
			{"default", nil, time.Minute},
			{"own", []fwd.Option{fwd.WithExchangeTimeout(3 * time.Second)}, 3 * time.Second},
			{"none", []fwd.Option{fwd.WithExchangeTimeout(0)}, 0},
			{"negative", []fwd.Option{fwd.WithExchangeTimeout(-time.Second)}, 0},
		} {
			t.Run(d.name+"/"+tt.name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					s := &groupSim{T: t, join: d.join, group: localGroup(t, 3)}
					s.members = []groupMember{
						d.join(t, s.group[0], tt.opts...),
						d.join(t, s.group[1], fwd.WithExchangeTimeout(0)),
						d.join(t, s.group[2]),
					}
					groupTimeout(s, tt.want)
				})
			})
		}
	}
}

// groupTimeout checks that rank 0's wait ends after that time, which is 0 for never, and rank 1's with it.
func groupTimeout(s *groupSim, want time.Duration) {
	began := time.Now()
	first := s.begin(s.Context(), 0)[0]
	second := s.begin(s.Context(), 1)[0]
	if want == 0 {
		time.Sleep(1000 * time.Hour)
		first.waiting()
		second.waiting()
		third := s.begin(s.Context(), 2)[0]
		for _, c := range []*groupCall{first, second, third} {
			c.agreed(1)
		}
		return
	}
	<-first.done
	<-second.done
	if waited := time.Since(began); waited != want {
		s.Errorf("the exchange ended after %v, want %v", waited, want)
	}
	first.failed(fwd.ErrRankMissing, 1, 2)
	second.failed(fwd.ErrRankMissing, 1, 2)
	if !errors.Is(first.err, context.DeadlineExceeded) || !strings.Contains(first.err.Error(), want.String()) {
		s.Errorf("the error %v of the rank that timed out is not %v, or does not say how long it waited",
			first.err, context.DeadlineExceeded)
	}
	if errors.Is(second.err, context.DeadlineExceeded) {
		s.Errorf("the error %v of the other rank is %v, and its own wait had no bound",
			second.err, context.DeadlineExceeded)
	}
	s.together(2)
}

// A rank comes late to a step that is broken already, or to several: it votes at the group's step, without an
// error.
func TestGroupLateRank(t *testing.T) {
	groupEach(t, 3, func(s *groupSim) {
		step := uint64(0)
		breakStep := func(ranks ...int) {
			ctx, cancel := context.WithCancel(s.Context())
			calls := s.begin(ctx, ranks...)
			cancel()
			step++
			for _, c := range calls {
				c.returned()
				var got *fwd.RankError
				if !errors.As(c.err, &got) || !errors.Is(c.err, fwd.ErrRankMissing) || got.Step != step {
					s.Fatalf("rank %d: error %v, want a missing rank in step %d", c.rank, c.err, step)
				}
			}
		}
		for broken := 1; broken <= 4; broken++ {
			for late := range s.group {
				others := slices.DeleteFunc(s.ranks(), func(r int) bool { return r == late })
				// The late rank comes last, first, or while the others wait.
				for at := range 3 {
					for range broken {
						breakStep(others...)
					}
					step++
					for _, c := range s.begin(s.Context(), slices.Insert(slices.Clone(others), at, late)...) {
						c.agreed(step)
					}
				}
				s.together(step + 1)
				step++
			}
		}
		// Two ranks late, by different numbers of steps.
		breakStep(0, 1)
		breakStep(0)
		breakStep(0, 2)
		step++
		s.together(step)
		// A late rank joins, and that round breaks too.
		breakStep(0, 1)
		breakStep(2)
		breakStep(0, 2)
		step++
		s.together(step)
	})
}

// A late rank that has also been restarted is out of step as any restarted rank is.
func TestGroupLateAndRestarted(t *testing.T) {
	groupEach(t, 2, func(s *groupSim) {
		for step := uint64(1); step <= 5; step++ {
			s.together(step)
		}
		ctx, cancel := context.WithCancel(s.Context())
		c := s.begin(ctx, 0)[0]
		cancel()
		c.failed(fwd.ErrRankMissing, 6, 1)
		s.restart(1)
		for _, c := range s.begin(s.Context(), 0, 1) {
			c.failed(fwd.ErrLockstep, 7, 1)
		}
		s.together(8)

		// A restarted rank that waits alone learns the group's step from its broken round.
		s.restart(1)
		ctx, cancel = context.WithCancel(s.Context())
		c = s.begin(ctx, 1)[0]
		cancel()
		c.failed(fwd.ErrRankMissing, 8, 0)
		s.together(9)
	})
}

// exchangeOf is one exchange of a vote.
func exchangeOf(c fwd.Coordinator, v fwd.Vote) groupMember {
	return func(ctx context.Context) ([]fwd.Vote, error) { return c.Exchange(ctx, v) }
}

// A rank that calls twice in one step, in the open round or after it, gets an error, and the round is not
// disturbed.
func TestGroupDoubleCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		group := localGroup(t, 3)
		s := &groupSim{T: t, group: group}
		for rank, c := range group {
			s.members = append(s.members, exchangeOf(c, groupVote(rank, 1)))
		}
		twice := func(v fwd.Vote, when string) {
			t.Helper()
			votes, err := group[0].Exchange(t.Context(), v)
			if votes != nil || !errors.Is(err, fwd.ErrLockstep) {
				t.Errorf("%s: Exchange = %v, %v; want %v", when, votes, err, fwd.ErrLockstep)
			}
		}
		other := groupVote(0, 1)
		other.NumTokensPadded = 99
		calls := s.begin(t.Context(), 0)
		twice(groupVote(0, 1), "alone in the round")
		twice(other, "with another vote")
		twice(groupVote(0, 2), "for the next step")
		calls = append(calls, s.begin(t.Context(), 1)...)
		twice(groupVote(0, 1), "among others")
		for _, c := range calls {
			c.waiting()
		}
		calls = append(calls, s.begin(t.Context(), 2)...)
		for _, c := range calls {
			c.agreed(1)
		}
		twice(groupVote(0, 1), "after the round")
		twice(other, "after the round, with another vote")

		// And after a round that broke.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := group[0].Exchange(ctx, groupVote(0, 2)); !errors.Is(err, fwd.ErrRankMissing) {
			t.Fatal(err)
		}
		twice(groupVote(0, 2), "after a broken round")
		for rank, c := range group {
			step := uint64(2) // of which the others know nothing
			if rank == 0 {
				step = 3
			}
			s.members[rank] = exchangeOf(c, groupVote(rank, step))
		}
		for _, c := range s.begin(t.Context(), 0, 1, 2) {
			c.agreed(3)
		}
	})
}

// Two overlapping exchanges on one Runner: the second gets an error, the first and the round are not
// disturbed.
func TestGroupOverlappingExchanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		group := localGroup(t, 2)
		r, peer := groupRunner(t, group[0]), groupRunner(t, group[1])
		plan := func(r *fwd.Runner) error {
			_, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}})
			return err
		}
		run := func(r *fwd.Runner) error { return r.Run(t.Context(), fwd.Pass{NumTokens: 1}, nothing) }
		begin := func(r *fwd.Runner) error {
			wait, err := r.Begin(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}})
			if err != nil {
				return err
			}
			_, err = wait()
			return err
		}
		for i, first := range []func(*fwd.Runner) error{plan, run, begin} {
			done := make(chan error)
			go func() { done <- first(r) }()
			synctest.Wait()
			for _, second := range []func(*fwd.Runner) error{plan, run, begin} {
				groupCheckError(t, 0, second(r), fwd.ErrLockstep, uint64(i+1), 0)
			}
			counted := fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 1)}
			if err := r.Run(t.Context(), counted, nothing); err != nil {
				t.Errorf("a pass that exchanges nothing, meanwhile: %v", err)
			}
			if err := plan(peer); err != nil {
				t.Errorf("step %d of the peer: %v", i+1, err)
			}
			if err := <-done; err != nil {
				t.Errorf("step %d: %v", i+1, err)
			}
		}
		// Inside a pass nothing is exchanged any more: there the next step may begin.
		done := make(chan error)
		go func() {
			done <- r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error { return plan(r) })
		}()
		for range 2 {
			if err := plan(peer); err != nil {
				t.Error(err)
			}
		}
		if err := <-done; err != nil {
			t.Errorf("a step planned inside a pass: %v", err)
		}
	})
}

// A refused vote is not sent: the rank has not come, and its next vote is its first.
func TestGroupRefusedVote(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &groupSim{T: t, group: localGroup(t, 2)}
		for rank, c := range s.group {
			s.members = append(s.members, exchangeOf(c, groupVote(rank, 1)))
		}
		peer := s.begin(t.Context(), 1)[0]
		for _, v := range []fwd.Vote{
			{Step: 1, NumTokens: 5, NumTokensPadded: 4},
			{Step: 1, NumTokens: -1, NumTokensPadded: 4},
			{Step: 1, NumTokens: -2, NumTokensPadded: -1},
			{Step: 1, GraphMode: fwd.GraphFullDecodeOnly},
			{Step: 1, GraphMode: fwd.GraphFullAndPiecewise},
			{Step: 1, GraphMode: 77},
			{Step: 1, NumReqs: -1},
			{Step: 1, NumActiveLoRAs: -1},
		} {
			if votes, err := s.group[0].Exchange(t.Context(), v); votes != nil || !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("Exchange(%+v) = %v, %v; want %v", v, votes, err, fwd.ErrInvalid)
			}
		}
		peer.waiting()
		s.begin(t.Context(), 0)[0].agreed(1)
		peer.agreed(1)
	})
}

// New finds a coordinator that belongs to another rank or to a group of another size. A Runner that says
// neither takes both from the coordinator.
func TestGroupMiswiredCoordinator(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name       string
		parallel   fwd.ParallelConfig
		rank, size int
		refused    bool
	}{
		{"right", fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 1, 2, false},
		{"alone", fwd.ParallelConfig{}, 0, 1, false},
		{"taken over", fwd.ParallelConfig{NumUBatches: 2}, 1, 3, false},
		{"taken over, dense", fwd.ParallelConfig{Dense: true}, 2, 3, false},
		{"rank", fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 0, 2, true},
		{"size", fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 1, 3, true},
		{"both", fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 2, 4, true},
		{"size of one", fwd.ParallelConfig{DataParallelSize: 1}, 0, 2, true},
		{"rank without size", fwd.ParallelConfig{DataParallelRank: 1}, 1, 2, true},
		{"dense", fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1, Dense: true}, 0, 2, true},
		{"an impossible rank", fwd.ParallelConfig{}, 3, 3, true},
	} {
		c := &groupFake{rank: tt.rank, size: tt.size}
		r, err := fwd.New(fwd.Config{Parallel: tt.parallel}, fwd.WithCoordinator(c))
		if errors.Is(err, fwd.ErrInvalid) != tt.refused || (err == nil) == tt.refused {
			t.Errorf("%s: New = %v, want refused %t", tt.name, err, tt.refused)
		}
		want := fmt.Sprintf("rank %d of %d", tt.rank, tt.size)
		if err == nil && !strings.Contains(r.String(), want) {
			t.Errorf("%s: the Runner is %s, want %s", tt.name, r, want)
		}
	}
}

// groupAnswer is what a coordinator answers to the first vote of rank 1 of 3.
type groupAnswer struct {
	name   string
	answer func(v fwd.Vote) ([]fwd.Vote, error)
	want   error  // nil: believed
	next   uint64 // the step that the Runner votes for then
}

// votesAt returns v at these steps.
func votesAt(v fwd.Vote, steps ...uint64) []fwd.Vote {
	votes := make([]fwd.Vote, len(steps))
	for i, step := range steps {
		votes[i] = v
		votes[i].Step = step
	}
	return votes
}

// answerAt answers with the votes of these steps.
func answerAt(steps ...uint64) func(v fwd.Vote) ([]fwd.Vote, error) {
	return func(v fwd.Vote) ([]fwd.Vote, error) { return votesAt(v, steps...), nil }
}

var groupAnswers = []groupAnswer{
	{"right", answerAt(1, 1, 1), nil, 2},
	{"a later step", answerAt(9, 9, 9), nil, 10},
	{"stale", answerAt(0, 0, 0), fwd.ErrLockstep, 2},
	{"stale own", answerAt(1, 0, 1), fwd.ErrLockstep, 2},
	{"stale other", answerAt(1, 1, 0), fwd.ErrLockstep, 2},
	{"one ahead, last", answerAt(1, 1, 8), fwd.ErrLockstep, 9},
	{"one ahead, first", answerAt(8, 1, 1), fwd.ErrLockstep, 9},
	{"too few", answerAt(1, 1), fwd.ErrInvalid, 2},
	{"too many", answerAt(1, 1, 1, 1), fwd.ErrInvalid, 2},
	{"none", answerAt(), fwd.ErrInvalid, 2},
	{"a bad vote", func(v fwd.Vote) ([]fwd.Vote, error) {
		votes := votesAt(v, 1, 1, 1)
		votes[2].NumTokens, votes[2].NumTokensPadded = 3, 2
		return votes, nil
	}, fwd.ErrInvalid, 2},
	{"own error", func(fwd.Vote) ([]fwd.Vote, error) { return nil, context.Canceled }, context.Canceled, 2},
	{"out of step", func(fwd.Vote) ([]fwd.Vote, error) {
		return nil, fmt.Errorf("wrapped: %w", &fwd.RankError{Err: fwd.ErrLockstep, Step: 40, Ranks: []int{1}})
	}, fwd.ErrLockstep, 41},
	{"refused", func(fwd.Vote) ([]fwd.Vote, error) {
		return nil, fmt.Errorf("%w: no", fwd.ErrInvalid)
	}, fwd.ErrInvalid, 1},
}

// foreignAnswers change each field of the Runner's own vote but the step and what a trace needs.
func foreignAnswers() (answers []groupAnswer) {
	for i := range reflect.TypeFor[fwd.Vote]().NumField() {
		field := reflect.TypeFor[fwd.Vote]().Field(i)
		if field.Name == "Step" || field.Name == "SpanContext" {
			continue
		}
		answers = append(answers, groupAnswer{"foreign " + field.Name, func(v fwd.Vote) ([]fwd.Vote, error) {
			votes := votesAt(v, 1, 1, 1)
			switch f := reflect.ValueOf(&votes[1]).Elem().Field(i); f.Kind() {
			case reflect.Bool:
				f.SetBool(!f.Bool())
			case reflect.Int:
				f.SetInt(f.Int() + 1)
			default:
				f.SetUint(f.Uint() + 1)
			}
			return votes, nil
		}, fwd.ErrLockstep, 2})
	}
	return answers
}

// A Runner does not believe a coordinator that mixes rounds up, and runs nothing on its word.
func TestGroupBadCoordinator(t *testing.T) {
	t.Parallel()
	for _, tt := range append(foreignAnswers(), groupAnswers...) {
		t.Run(tt.name, func(t *testing.T) {
			for _, d := range groupRunnerDrivers {
				var sent []fwd.Vote
				member := d.join(t, &groupFake{rank: 1, size: 3, exchange: func(v fwd.Vote) ([]fwd.Vote, error) {
					if sent = append(sent, v); len(sent) == 1 {
						return tt.answer(v)
					}
					return votesAt(v, v.Step, v.Step, v.Step), nil
				}})
				if _, err := member(t.Context()); !errors.Is(err, tt.want) {
					t.Errorf("%s: %v, want %v", d.name, err, tt.want)
				}
				if _, err := member(t.Context()); err != nil {
					t.Errorf("%s: the step after: %v", d.name, err)
				}
				if diff := cmp.Diff([]fwd.Vote{groupVote(1, 1), groupVote(1, tt.next)}, sent, groupCore); diff != "" {
					t.Errorf("%s: sent (-want +got):\n%s", d.name, diff)
				}
			}
		})
	}
}

// Every rank computes the same agreement, in whatever order the ranks come.
func TestGroupAgreementIsTheSame(t *testing.T) {
	t.Parallel()
	batch := func(tokens ...int) fwd.Schedule { return fwd.Schedule{NumScheduledTokens: tokens} }
	eager := fwd.Schedule{NumScheduledTokens: []int{1}, Eager: true}
	for _, tt := range []struct {
		name      string
		schedules [4]fwd.Schedule
		want      fwd.Agreement
	}{
		{
			"full", [4]fwd.Schedule{batch(1), batch(1, 1, 1), batch(), batch(1, 1, 1, 1)},
			fwd.Agreement{
				GraphMode: fwd.GraphFull, NumTokensAcrossDP: vec(4, 4, 4, 4), MaxTokensRank: 1, LowestModeRank: -1,
			},
		},
		{
			"piecewise", [4]fwd.Schedule{batch(1), batch(), batch(7), batch(5, 1)},
			fwd.Agreement{
				GraphMode: fwd.GraphPiecewise, NumTokensAcrossDP: vec(8, 8, 8, 8), MaxTokensRank: 2, LowestModeRank: 2,
			},
		},
		{
			"none", [4]fwd.Schedule{batch(3), batch(17), batch(), eager},
			fwd.Agreement{NumTokensAcrossDP: vec(4, 17, 2, 1), MaxTokensRank: 1, LowestModeRank: 1},
		},
		{
			"idle", [4]fwd.Schedule{batch(), batch(0, 0), batch(), batch(0)},
			fwd.Agreement{Idle: true, NumTokensAcrossDP: vec(2, 2, 2, 2), LowestModeRank: -1},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { groupAgreeInOrders(t, tt.schedules, tt.want) })
		})
	}
}

// groupAgreeInOrders plans a step for every order of arrival, and checks the agreement of each rank.
func groupAgreeInOrders(t *testing.T, schedules [4]fwd.Schedule, want fwd.Agreement) {
	dispatcher := planDispatcher(t, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{2, 4, 8, 16}, MaxNumSeqs: 16,
	})
	s := &groupSim{T: t, group: localGroup(t, 4)}
	agreements := make([]*fwd.Agreement, 4)
	for rank, c := range s.group {
		r := groupRunner(t, c, fwd.WithDispatcher(dispatcher))
		s.members = append(s.members, func(ctx context.Context) ([]fwd.Vote, error) {
			pass, err := r.Plan(ctx, schedules[rank])
			agreements[rank] = pass.Agreement
			return nil, err
		})
	}
	groupPermutations(4, func(order []int) {
		want.Step++
		for _, c := range s.begin(t.Context(), order...) {
			if c.returned(); c.err != nil {
				t.Fatal(c.err)
			}
		}
		for rank, a := range agreements {
			want.Votes = agreements[0].Votes
			if diff := cmp.Diff(&want, a, groupAgreement); diff != "" {
				t.Fatalf("order %v, rank %d (-want +got):\n%s", order, rank, diff)
			}
		}
	})
}

// A coordinator of a local group says whom its open exchange waits for. Status names the same ranks.
func TestGroupWaitsFor(t *testing.T) {
	groupEach(t, 4, func(s *groupSim) {
		missing := func(rank int, want ...int) {
			s.Helper()
			synctest.Wait()
			got := s.group[rank].(interface{ Missing() []int }).Missing()
			if !slices.Equal(got, want) || (got == nil) != (want == nil) {
				s.Errorf("rank %d waits for %v, want %v", rank, got, want)
			}
		}
		missing(1)
		first := s.begin(s.Context(), 1)[0]
		missing(1, 0, 2, 3)
		missing(0)
		ctx, cancel := context.WithCancel(s.Context())
		second := s.begin(ctx, 3)[0]
		missing(1, 0, 2)
		missing(3, 0, 2)
		cancel()
		first.failed(fwd.ErrRankMissing, 1, 0, 2)
		second.failed(fwd.ErrRankMissing, 1, 0, 2)
		missing(1)
		missing(3)
		calls := s.begin(s.Context(), 0, 1, 2)
		missing(0, 3)
		for _, c := range append(calls, s.begin(s.Context(), 3)...) {
			c.agreed(2)
		}
		missing(0)
		missing(3)
	})
}

// A coordinator of a local group says whose vote came last in its latest exchange.
func TestGroupLast(t *testing.T) {
	groupEach(t, 3, func(s *groupSim) {
		last := func(when string, want ...int) {
			s.Helper()
			synctest.Wait()
			var got []int
			for _, c := range s.group {
				got = append(got, c.(interface{ Last() int }).Last())
			}
			if !slices.Equal(got, want) {
				s.Errorf("%s: the last ranks are %v, want %v", when, got, want)
			}
		}
		last("before any exchange", -1, -1, -1)
		groupPermutations(3, func(order []int) {
			s.begin(s.Context(), order...)
			last(fmt.Sprintf("in the order %v", order), order[2], order[2], order[2])
		})
		ctx, cancel := context.WithCancel(s.Context())
		s.begin(ctx, 2, 1)
		last("while an exchange is open", 0, 0, 0)
		cancel()
		last("after ranks 1 and 2 have waited in vain", 0, -1, -1)
		s.restart(1)
		for _, c := range s.begin(s.Context(), 0, 2, 1) {
			c.failed(fwd.ErrLockstep, 8, 1)
		}
		last("after different steps", 1, 1, 1)
	})
}

// A group of goroutines has at most 2^16 ranks.
func TestGroupSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 1 << 16} {
		group := localGroup(t, size)
		if len(group) != size || group[size-1].Rank() != size-1 || group[0].Size() != size {
			t.Errorf("a group of %d ranks has %d, the last is %d of %d",
				size, len(group), group[size-1].Rank(), group[0].Size())
		}
	}
	if group, err := fwd.NewLocalGroup(1<<16 + 1); !errors.Is(err, fwd.ErrInvalid) || group != nil {
		t.Errorf("a group of 2^16+1 ranks: %v", err)
	}
}

// Runners whose contexts end at random, some of which restart as well: each exchange ends with the votes, the
// same ones on every rank, or with an error, and when that is over the group is whole again. Each rank takes
// part in another way.
func TestGroupStress(t *testing.T) {
	t.Parallel()
	rounds := 2_000
	if testing.Short() {
		rounds = 300
	}
	for _, restarts := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarts=%t", restarts), func(t *testing.T) {
			t.Parallel()
			watchdog, stop := context.WithTimeout(t.Context(), 5*time.Minute)
			defer stop()
			g := &groupChaos{T: t, restarts: restarts}
			g.disturb(watchdog, rounds)
			if watchdog.Err() != nil {
				t.Fatal("a rank hangs")
			}
			g.comeTogether(watchdog, stop)
		})
	}
}

const chaosRanks = 4

// groupChaos is a group whose contexts end at any time.
type groupChaos struct {
	*testing.T
	restarts                  bool
	members                   [chaosRanks]groupMember
	agreed, missing, lockstep [chaosRanks]int
}

// disturb lets every rank take so many steps while contexts end.
func (g *groupChaos) disturb(watchdog context.Context, rounds int) {
	disturbed, calm := context.WithCancel(watchdog) // until every rank has had its rounds
	defer calm()
	var through atomic.Int32
	var wg sync.WaitGroup
	for rank, c := range localGroup(g.T, chaosRanks) {
		join := groupRunnerDrivers[rank].join
		g.members[rank] = join(g.T, c)
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(rank), 42))
			reached := uint64(0)
			for calls := 0; disturbed.Err() == nil; calls++ {
				if calls == rounds && through.Add(1) == chaosRanks {
					calm()
				}
				if g.restarts && random.IntN(50) == 0 {
					g.members[rank] = join(g.T, c)
				}
				ctx, cancel := context.WithCancel(disturbed)
				if random.IntN(4) == 0 {
					spins := random.IntN(40)
					wg.Go(func() {
						for range spins {
							runtime.Gosched()
						}
						cancel()
					})
				}
				votes, err := g.members[rank](ctx)
				cancel()
				reached = g.outcome(rank, reached, votes, err)
			}
		})
	}
	wg.Wait()
	never := [chaosRanks]int{}
	if g.missing == never || g.agreed == never || g.restarts && g.lockstep == never {
		g.Errorf("the test does not do what it should: agreed %v, missing %v, lockstep %v",
			g.agreed, g.missing, g.lockstep)
	}
}

// outcome checks how a step of a rank ended, and returns the step that it has reached.
func (g *groupChaos) outcome(rank int, reached uint64, votes []fwd.Vote, err error) uint64 {
	var rankErr *fwd.RankError
	isRankErr := errors.As(err, &rankErr)
	switch {
	case err == nil:
		g.agreed[rank]++
		if diff := cmp.Diff(groupVotes(chaosRanks, votes[0].Step), votes, groupCore); diff != "" {
			g.Errorf("rank %d: votes (-want +got):\n%s", rank, diff)
		}
		if !g.restarts && votes[0].Step <= reached {
			g.Errorf("rank %d: step %d after step %d", rank, votes[0].Step, reached)
		}
		return votes[0].Step
	case isRankErr && errors.Is(err, fwd.ErrRankMissing):
		g.missing[rank]++
		if len(rankErr.Ranks) == 0 || slices.Contains(rankErr.Ranks, rank) {
			g.Errorf("rank %d: %v names no missing rank, or this one", rank, err)
		}
		return rankErr.Step
	case isRankErr && errors.Is(err, fwd.ErrLockstep) && g.restarts:
		g.lockstep[rank]++
	default:
		g.Errorf("rank %d: %v", rank, err)
	}
	return reached
}

// comeTogether checks that the group is whole when all is calm: immediately, or after the step that a
// restarted rank costs.
func (g *groupChaos) comeTogether(ctx context.Context, stop func()) {
	var steps [chaosRanks][5]uint64
	var wg sync.WaitGroup
	for rank, member := range g.members {
		wg.Go(func() {
			for i, failures := 0, 0; i < len(steps[rank]); {
				votes, err := member(ctx)
				switch {
				case err == nil:
					steps[rank][i] = votes[0].Step
					i++
				case g.restarts && i == 0 && failures < 2 && errors.Is(err, fwd.ErrLockstep):
					failures++
				default:
					g.Errorf("rank %d when all is calm: %v", rank, err)
					stop()
					return
				}
			}
		})
	}
	wg.Wait()
	for rank, own := range steps {
		if own != steps[0] || own[4] != own[0]+4 {
			g.Errorf("rank %d took the steps %v, rank 0 %v", rank, own, steps[0])
		}
	}
}

// Exchanges of Runners leave no goroutine, whether they fail or succeed.
func TestGroupNoGoroutineLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	group := localGroup(t, 2)
	var alone, both []groupMember
	for _, d := range groupRunnerDrivers {
		alone = append(alone, d.join(t, group[0]))
	}
	for rank, c := range localGroup(t, 4) {
		both = append(both, groupRunnerDrivers[rank].join(t, c))
	}
	for range 50 {
		for _, member := range alone {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := member(ctx); err == nil {
				t.Error("an exchange of one rank of two returned votes")
			}
		}
		var wg sync.WaitGroup
		for _, member := range both {
			wg.Go(func() {
				if _, err := member(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	settleGoroutines(t, before)
}
