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
	Captures, Replays             int // of graphs: a full pass replays one, a piecewise one several
	GraphPadding, DataPadding     int // tokens: up to a graph's size, and up to the largest rank's count
	Ranks                         []RankStats
}

// RankStats are the figures of one rank. Forward includes Experts, and the draft model with its
// votes.
type RankStats struct {
	Rank    int
	Votes   time.Duration // waiting for the other ranks' votes, in Plan and at the gate
	Experts time.Duration // waiting in mixture-of-experts layers for the other ranks' rows
	Forward time.Duration // in passes
}

// collect adds up the figures of the ranks of this process.
func collect(ranks []*rank, requests int) Stats {
	s := Stats{Requests: requests, Passes: map[fwd.Reason]int{}, Modes: map[fwd.GraphMode]int{}}
	for _, r := range ranks {
		f := &r.figures
		s.Finished += f.finished
		s.WarmUp = max(s.WarmUp, f.warmUp)
		if !f.began.IsZero() {
			s.Duration = max(s.Duration, f.ended.Sub(f.began))
		}
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
		for _, in := range r.instances() {
			captures, replays := in.executor.Graphs()
			s.Captures += captures
			s.Replays += replays
		}
		f.own.Rank = r.rank
		f.own.Experts /= time.Duration(len(r.target.experts))
		s.Ranks = append(s.Ranks, f.own)
	}
	return s
}

// figures are what a rank counts while it serves. They are read when it has stopped.
type figures struct {
	began, ended              time.Time // of serving; began is zero until the rank has warmed up
	warmUp                    time.Duration
	failed                    int // exchanges
	steps, dummies, split     int
	promptTokens, generated   int
	finished                  int
	draftPasses               int
	proposed, accepted        int
	reasons                   map[fwd.Reason]int
	modes                     map[fwd.GraphMode]int
	graphPadding, dataPadding int
	own                       RankStats // the experts' time is that of all workers
}

func newFigures() figures {
	return figures{reasons: map[fwd.Reason]int{}, modes: map[fwd.GraphMode]int{}}
}

// observe notes a pass of the target model, or a failed exchange.
func (f *figures) observe(rec *fwd.Record) {
	f.own.Votes += rec.Wait
	f.own.Experts += rec.Waited
	if rec.Err != nil || rec.Phase == warmUpPhase {
		return
	}
	f.own.Forward += rec.Duration
	f.steps++
	if rec.Dummy {
		f.dummies++
	}
	if rec.UBatches > 0 {
		f.split++
	}
	f.reasons[rec.Reason]++
	f.modes[rec.GraphMode]++
	f.graphPadding += rec.NumTokensGraph - rec.NumTokensUnpadded
	f.dataPadding += rec.NumTokens - rec.NumTokensGraph
}

// observeDraft does the same with the draft model. Its passes lie inside those of the target.
func (f *figures) observeDraft(rec *fwd.Record) {
	f.own.Votes += rec.Wait
	f.own.Experts += rec.Waited
	if rec.Err == nil && rec.Phase != warmUpPhase {
		f.draftPasses++
	}
}

// warmUpPhase is what fwd calls the passes of a warm-up.
const warmUpPhase = "warmup"
