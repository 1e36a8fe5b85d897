package engine

import (
	"time"

	"github.com/forwardctx/fwd"
)

// Stats are the figures of a run.
type Stats struct {
	Requests, Finished            int
	Steps                         int // each with a pass on every rank
	FailedSteps                   int // of any group, in which a rank was missing or out of step; tried again
	PromptTokens, GeneratedTokens int
	Duration, WarmUp              time.Duration      // of serving, and before it
	Passes                        map[fwd.Reason]int // by the reason for their graph mode, dummy passes included
	Modes                         map[fwd.GraphMode]int
	DummyPasses                   int
	SplitPasses                   int // into microbatches, which run without graphs
	DraftPasses                   int // of the draft model, dummy ones included
	ProposedTokens                int // that the draft model guessed and the target verified
	AcceptedTokens                int // of these, the right ones that were needed
	Captures, Replays             int // of graphs: a full pass replays one, a piecewise pass one for each stage of the model
	GraphPadding, DataPadding     int // tokens: up to a graph's size, and up to the largest rank's count
	Ranks                         []RankStats
}

// RankStats are the figures of one rank. Forward includes Experts, and the draft model with its votes.
type RankStats struct {
	Rank    int
	Votes   time.Duration // waiting for the other ranks' votes, in Plan and at the gate
	Experts time.Duration // waiting in mixture-of-experts layers for the other ranks' rows
	Forward time.Duration // in passes
}

func collect(ranks []*rank, requests int, duration time.Duration) Stats {
	s := Stats{Requests: requests, Duration: duration, Passes: map[fwd.Reason]int{}, Modes: map[fwd.GraphMode]int{}}
	for _, r := range ranks {
		f := &r.figures
		s.Finished += f.finished
		s.Steps = max(s.Steps, f.steps)
		s.FailedSteps = max(s.FailedSteps, f.failed)
		s.PromptTokens += f.promptTokens
		s.GeneratedTokens += f.generated
		for reason, n := range f.reasons {
			s.Passes[reason] += n
		}
		for mode, n := range f.modes {
			s.Modes[mode] += n
		}
		s.DummyPasses += f.dummies
		s.SplitPasses += f.split
		s.GraphPadding += f.graphPadding
		s.DataPadding += f.dataPadding
		s.DraftPasses += f.draftPasses
		s.ProposedTokens += f.proposed
		s.AcceptedTokens += f.accepted
		own := RankStats{Rank: r.rank, Votes: f.atGate, Forward: f.forward}
		for _, in := range []*instance{r.target, r.draft} {
			if in == nil {
				continue
			}
			captures, replays := in.executor.Graphs()
			s.Captures += captures
			s.Replays += replays
			own.Votes += in.coordinator.waited
			own.Experts += in.experts.waiting()
		}
		s.Ranks = append(s.Ranks, own)
	}
	return s
}

// figures are what a rank counts while it serves. They are read when it has stopped.
type figures struct {
	steps, dummies, split     int
	failed                    int // exchanges
	promptTokens, generated   int
	finished                  int
	draftPasses               int
	proposed, accepted        int
	reasons                   map[fwd.Reason]int
	modes                     map[fwd.GraphMode]int
	graphPadding, dataPadding int
	forward, atGate           time.Duration
}

func newFigures() figures {
	return figures{reasons: map[fwd.Reason]int{}, modes: map[fwd.GraphMode]int{}}
}

// count notes the pass of a step.
func (f *figures) count(pass *fwd.Pass) {
	f.steps++
	if pass.Dummy {
		f.dummies++
	}
	if len(pass.UBatches) > 0 {
		f.split++
	}
	f.reasons[pass.Reason]++
	f.modes[pass.GraphMode]++
	f.graphPadding += pass.NumTokensGraph - pass.NumTokensUnpadded
	f.dataPadding += pass.NumTokens - pass.NumTokensGraph
}
