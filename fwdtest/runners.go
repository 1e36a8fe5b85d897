package fwdtest

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

// withRunners returns the suite for groups in which a Runner drives each rank: then it is the
// Runner that has to know the step.
func (s suite) withRunners() suite {
	newGroup := s.newGroup
	s.newGroup = func(t *testing.T, size int) []fwd.Coordinator {
		ranks := newGroup(t, size)
		planners := make([]fwd.Coordinator, len(ranks))
		for i, c := range ranks {
			planners[i] = &planner{Coordinator: c}
		}
		return planners
	}
	return s
}

// planner is a rank that votes by its Runner's Plan, in the shape of a coordinator. A rank that
// begins anew has a new Runner.
type planner struct {
	fwd.Coordinator
	runner *fwd.Runner
	sent   fwd.Vote   // by the Runner
	votes  []fwd.Vote // that it got
}

// Exchange plans a step with v's tokens. It checks that the Runner votes v, apart from its
// fingerprint, and that it agrees on the votes that it gets.
func (p *planner) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if v.Step == 1 {
		var err error
		if p.runner, err = fwd.New(fwd.Config{}, fwd.WithCoordinator(ear{p})); err != nil {
			return nil, err
		}
	}
	schedule := fwd.Schedule{NumScheduledTokens: []int{v.NumTokens}, Prefill: true, Note: v.Note}
	pass, err := p.runner.Plan(ctx, schedule)
	config := p.sent.Config
	if p.sent.Config = 0; !same(&p.sent, &v) {
		return nil, fmt.Errorf("the Runner's vote has %s; its Plan: %w", difference(p.sent, v), err)
	}
	if err != nil {
		return nil, err
	}
	if a := pass.Agreement; a == nil || a.Step != p.votes[0].Step {
		return nil, fmt.Errorf("the Runner agrees on %+v, want an agreement of step %d", a, p.votes[0].Step)
	}
	votes := slices.Clone(p.votes)
	for rank := range votes {
		if votes[rank].Config != config {
			return nil, fmt.Errorf("the vote of rank %d has Config %d, want %d", rank, votes[rank].Config, config)
		}
		votes[rank].Config = 0
	}
	return votes, nil
}

// ear is the planner's coordinator as its Runner sees it.
type ear struct{ *planner }

// Exchange notes what passes.
func (e ear) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := e.Coordinator.Exchange(ctx, v)
	e.sent, e.votes = v, votes
	return votes, err
}
