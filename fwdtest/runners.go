package fwdtest

import (
	"context"
	"fmt"
	"testing"

	"github.com/forwardctx/fwd"
)

// withRunners returns the suite for groups in which a Runner drives each rank: it is the Runner then that has to know the
// step.
func (s suite) withRunners() suite {
	newGroup := s.newGroup
	s.newGroup = func(t *testing.T, size int) []fwd.Coordinator {
		ranks := newGroup(t, size)
		for i, c := range ranks {
			ranks[i] = &planner{Coordinator: c}
		}
		return ranks
	}
	return s
}

// planner is a rank that votes by its Runner's Plan, in the shape of a coordinator. A rank that begins anew has a new Runner.
type planner struct {
	fwd.Coordinator
	runner *fwd.Runner
	sent   fwd.Vote   // by the Runner
	votes  []fwd.Vote // that it got
}

// Exchange plans a step with v's tokens, and checks that the Runner votes v and agrees on the votes that it gets.
func (p *planner) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if v.Step == 1 {
		var err error
		parallel := fwd.ParallelConfig{DataParallelSize: p.Size(), DataParallelRank: p.Rank()}
		if p.runner, err = fwd.New(fwd.Config{Parallel: parallel}, fwd.WithCoordinator(ear{p})); err != nil {
			return nil, err
		}
	}
	pass, err := p.runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{v.NumTokens}})
	if !same(p.sent, v) {
		return nil, fmt.Errorf("the Runner votes %+v, want %+v; its Plan: %v", p.sent, v, err)
	}
	if err != nil {
		return nil, err
	}
	if a := pass.Agreement; a == nil || a.Step != p.votes[0].Step {
		return nil, fmt.Errorf("the Runner agrees on %+v, want an agreement of step %d", a, p.votes[0].Step)
	}
	return p.votes, nil
}

// ear is the planner's coordinator as its Runner sees it.
type ear struct{ *planner }

// Exchange notes what passes.
func (e ear) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := e.Coordinator.Exchange(ctx, v)
	e.sent, e.votes = v, votes
	return votes, err
}
