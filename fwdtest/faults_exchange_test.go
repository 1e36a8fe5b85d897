// This file lists faults in what an exchange returns: votes, and what Runners agree on because of
// them.

package fwdtest_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
)

// misnumbered is a coordinator that counts its ranks from the end.
type misnumbered struct{ fwd.Coordinator }

// Rank implements [fwd.Coordinator].
func (m misnumbered) Rank() int { return m.Size() - 1 - m.Coordinator.Rank() }

var exchangeFaults = slices.Concat(votesFaults, fieldFaults)

// votesFaults are faults in the list of votes.
var votesFaults = []fault{
	{"counts ranks from the end", func(group []fwd.Coordinator) {
		for i, c := range group {
			group[i] = misnumbered{c}
		}
	}, `coordinator 0 of 2 is rank 1 of 2`, []string{"Exchange/Ranks"}},
	{"drops a vote", inVotes(func(_ fwd.Coordinator, votes []fwd.Vote) []fwd.Vote {
		return votes[:len(votes)-1]
	}), `rank \d in step \d+: .*votes, want \d`,
		[]string{"Exchange/ArrivalOrder", "Load/BackToBack", "Load/Chaos"}},
	{"swaps ranks", inVotes(func(_ fwd.Coordinator, votes []fwd.Vote) []fwd.Vote {
		slices.Reverse(votes)
		return votes
	}), `rank \d in step \d+: the vote of rank \d .*has NumTokens \d+, want \d`,
		[]string{"Exchange/ArrivalOrder", "Load/Paced", "Load/Chaos"}},
	{"mixes steps", inRanks(func() exchange {
		var last []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			mixed := slices.Clone(votes)
			if err == nil && last != nil {
				mixed[len(mixed)-1] = last[len(mixed)-1]
			}
			last = votes
			return mixed, err
		}
	}), `rank \d in step 2: .*(has Step 1, want 2|Step:1 |voted steps \[2.* 1\])`,
		[]string{"Exchange/ArrivalOrder", "Load/BackToBack", "Load/Runners"}},
	{"returns the last round again", inRanks(func() exchange {
		var last []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err == nil && last != nil {
				votes, last = last, votes
			} else {
				last = votes
			}
			return votes, err
		}
	}), `rank \d in step 2: the vote of rank 0 has Step 1, want 2`, []string{"Exchange/Ranks", "Load/Paced"}},
	{"returns before all have come",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, context.DeadlineExceeded) {
				return slices.Repeat([]fwd.Vote{v}, c.Size()), nil
			}
			return votes, err
		}), `rank \d in step \d returned \d votes, <nil>; want it to wait`, []string{"Exchange/ArrivalOrder"}},
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
	}), `the votes that rank \d got in step 1 have changed`, []string{"Exchange/VotesStay"}},
	{"clears votes when a round breaks", inRanks(func() exchange {
		var last []fwd.Vote
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if err != nil {
				clear(last)
			}
			votes = slices.Clone(votes)
			last = votes
			return votes, err
		}
	}), `the votes that rank \d got in step 4 have changed`, []string{"Exchange/VotesStay"}},
	{"confuses groups", inGroup(func() exchange {
		type key struct {
			rank int
			step uint64
		}
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			held.Store(key{c.Rank(), v.Step}, v)
			votes, err := c.Exchange(ctx, v)
			votes = slices.Clone(votes)
			for rank := range votes {
				last, _ := held.Load(key{rank, v.Step})
				votes[rank] = last.(fwd.Vote)
			}
			return votes, err
		}
	}), `the vote of rank \d has NumTokens \d+, want \d`, []string{"Load/SeveralGroups"}},
}

// held is what the groups of this process keep for ever.
var held sync.Map

// fieldFaults are faults in the fields of the votes that come from other ranks.
var fieldFaults = []fault{
	{"forgets NumTokens", inVote(func(v *fwd.Vote) { v.NumTokens = v.NumTokensPadded }),
		`has NumTokens \d+, want \d`, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"forgets NumTokensPadded", inVote(func(v *fwd.Vote) { v.NumTokensPadded = v.NumTokens }),
		`has NumTokensPadded \d+, want \d`, []string{"Exchange/Fields"}},
	{"forgets NumReqs", inVote(func(v *fwd.Vote) { v.NumReqs = 0 }),
		`NumReqs \d+, want \d`, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"takes NumReqs for 16 bits", inVote(func(v *fwd.Vote) { v.NumReqs = int(uint16(v.NumReqs)) }),
		`has NumReqs \d+, want \d`, []string{"Exchange/Fields"}},
	{"forgets NumActiveLoRAs", inVote(func(v *fwd.Vote) { v.NumActiveLoRAs = 0 }),
		`NumActiveLoRAs \d+, want \d`, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"takes adapters for one flag", inVote(func(v *fwd.Vote) { v.NumActiveLoRAs = min(v.NumActiveLoRAs, 1) }),
		`NumActiveLoRAs 1, want \d`, []string{"Exchange/Fields"}},
	{"forgets Uniform", inVote(func(v *fwd.Vote) { v.Uniform = false }),
		`Uniform (true|false), want `, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"forgets ExcludeFull", inVote(func(v *fwd.Vote) { v.ExcludeFull = false }),
		`ExcludeFull (true|false), want `, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"forgets Eager", inVote(func(v *fwd.Vote) { v.Eager = false }),
		`Eager (true|false), want `, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"forgets UBatch", inVote(func(v *fwd.Vote) { v.UBatch = false }),
		`UBatch (true|false), want |microbatches false`, []string{"Exchange/Fields", "Plans/Idle"}},
	{"takes one flag for another", inVote(func(v *fwd.Vote) { v.Idle, v.UBatch = v.UBatch, v.Idle }),
		`(UBatch|Idle) (true|false), want (true|false)|microbatches`, []string{"Exchange/Fields", "Plans/Idle"}},
	{"forgets Idle", inVote(func(v *fwd.Vote) { v.Idle = false }),
		`Idle false, want true|microbatches false|agrees on other votes`,
		[]string{"Exchange/Fields", "Plans/Idle", "Plans/AllIdle"}},
	{"forgets WarmUp", inVote(func(v *fwd.Vote) { v.WarmUp = false }),
		`WarmUp false, want true|rank \d: (error )?(<nil>|fwd: ranks out of step)`,
		[]string{"Exchange/Fields", "Plans/WarmUp", "Plans/WarmUpAlone"}},
	{"forgets what is warmed up", inVote(func(v *fwd.Vote) {
		if v.WarmUp {
			v.NumTokens, v.NumTokensPadded, v.NumReqs, v.GraphMode = 0, 0, 0, fwd.GraphNone
		}
	}), `has Num|agrees on other votes|out of step`, []string{"Exchange/Fields", "Plans/WarmUpAnotherGraph"}},
	{"forgets GraphMode", inVote(func(v *fwd.Vote) { v.GraphMode = fwd.GraphNone }),
		`GraphMode \w+, want `, []string{"Exchange/Fields", "Plans/Schedules"}},
	{"forgets Note", inVote(func(v *fwd.Vote) { v.Note = 0 }),
		`Note \d+, want \d`, []string{"Exchange/Fields", "Plans/Schedules", "Plans/Begin"}},
	{"takes Note for float64", inVote(func(v *fwd.Vote) { v.Note = uint64(float64(v.Note/2)) * 2 }),
		`Note \d+, want \d`, []string{"Exchange/Fields", "Plans/Begin"}},
	{"forgets Config", inVote(func(v *fwd.Vote) { v.Config = 0 }),
		`Config 0, want \d|error <nil>|agrees on other votes`,
		[]string{"Exchange/Fields", "Plans/ConfiguredDifferently", "Load/Runners"}},
	{"takes Config for 63 bits", inVote(func(v *fwd.Vote) { v.Config &= 1<<63 - 1 }),
		`Config \d+, want \d`, []string{"Exchange/Fields"}},
	{"takes steps for float64", inVote(func(v *fwd.Vote) { v.Step = uint64(float64(v.Step)) }),
		`has Step \d+, want \d`, []string{"Exchange/Fields"}},
	{"forgets the span context", inVote(func(v *fwd.Vote) { v.SpanContext = fwd.Vote{}.SpanContext }),
		`has SpanContext `, []string{"Exchange/Fields"}},
	{"forgets the trace flags", inVote(func(v *fwd.Vote) { v.SpanContext = v.SpanContext.WithTraceFlags(0) }),
		`has SpanContext `, []string{"Exchange/Fields"}},
	{"forgets the trace state", inVote(func(v *fwd.Vote) {
		v.SpanContext = v.SpanContext.WithTraceState(fwd.Vote{}.SpanContext.TraceState())
	}), `has SpanContext `, []string{"Exchange/Fields"}},
	{"forgets span contexts that are not valid", inVote(func(v *fwd.Vote) {
		if !v.SpanContext.IsValid() {
			v.SpanContext = fwd.Vote{}.SpanContext
		}
	}), `has SpanContext `, []string{"Exchange/Fields"}},
}
