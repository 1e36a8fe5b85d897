package engine

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/trace"
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
	Ladders                       []Ladder // with Config.Replan: the first and the last ones
	LadderChanges                 int      // how often the ladder changed, also to those that are left out
	Lowered                       []int    // by rank: steps in which it made the others take a lower graph mode
	Slowest                       []Step   // of each rank the slowest steps, at most 8
}

// RankStats are the figures of one rank, without its warm-up. Forward includes Experts, and the
// draft model.
type RankStats struct {
	Rank      int
	Votes     time.Duration // waiting for the other ranks' votes
	Hidden    time.Duration // in exchanges of votes too, but while a pass ran
	Experts   time.Duration // waiting in mixture-of-experts layers for the other ranks' rows
	Forward   time.Duration // in passes
	WaitedFor []Wait        // by rank: whose vote or rows came last
	Sent      []int         // by rank: rows for its experts; a row counts for each expert that it goes to
}

// Wait is how long, and how often, a rank has waited for another.
type Wait struct {
	Votes, Experts         time.Duration
	VoteTimes, ExpertTimes int
}

// Step is what a step was like for one rank.
type Step struct {
	Step     uint64
	Rank     int
	Took     time.Duration // from its vote, or from the end of the pass before, to the end of its pass
	Votes    time.Duration // of Took, waiting for votes
	Work     time.Duration // of Took, in the pass and not waiting for other ranks
	LastRank int           // whose vote came last, or -1
	Reason   fwd.Reason
	Tokens   int
	TraceID  string // if its pass was recorded
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
		s.Ranks = append(s.Ranks, f.rankStats(r.rank, len(r.target.experts)))
		s.Slowest = append(s.Slowest, f.slowest...)
		s.Lowered = mostOf(s.Lowered, f.lowered)
		if p := &r.replan; len(p.ladders) > 0 {
			s.Ladders, s.LadderChanges = p.ladders, p.changes-1 // all ranks have the same
		}
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
	votes, experts, forward   time.Duration // the experts' time is that of all workers
	meanwhile, hidden         time.Duration // from this step's vote until it was waited for; of all exchanges
	lastVotes                 []Wait        // by rank
	lowered                   []int         // by rank
	slowest                   []Step
	draftWaited               time.Duration // in the draft's passes of this step
	traffic                   *traffic
}

// maxSlowest is how many of its slowest steps a rank keeps.
const maxSlowest = 8

func newFigures(ranks int) figures {
	return figures{
		reasons: map[fwd.Reason]int{}, modes: map[fwd.GraphMode]int{},
		lastVotes: make([]Wait, ranks), lowered: make([]int, ranks), traffic: newTraffic(ranks),
	}
}

// rankStats returns the figures of one rank, which has so many workers.
func (f *figures) rankStats(rank, workers int) RankStats {
	s := RankStats{
		Rank: rank, Votes: f.votes, Hidden: f.hidden,
		Experts: f.experts / time.Duration(workers), Forward: f.forward,
		WaitedFor: slices.Clone(f.lastVotes), Sent: f.traffic.sent,
	}
	for other, w := range f.traffic.waits {
		s.WaitedFor[other].Experts = w.Experts / time.Duration(workers)
		s.WaitedFor[other].ExpertTimes = w.ExpertTimes / workers
	}
	return s
}

// mostOf returns the larger of each two counts.
func mostOf(a, b []int) []int {
	most := slices.Clone(b)
	for i, n := range a {
		most[i] = max(most[i], n)
	}
	return most
}

// wait notes the exchange before a pass, and returns how long the rank waited for it. What went by while
// the pass before ran is hidden, and held nobody up.
func (f *figures) wait(rec *fwd.Record) time.Duration {
	hidden := min(rec.Wait, f.meanwhile)
	waited := rec.Wait - hidden
	f.votes += waited
	f.hidden += hidden
	if last := rec.LastRank; f.meanwhile <= rec.Wait && last >= 0 && last != rec.Rank {
		f.lastVotes[last].Votes += waited
		f.lastVotes[last].VoteTimes++
	}
	return waited
}

// noteSlow keeps a pass if it, with the wait for its votes, is among the slowest.
func (f *figures) noteSlow(ctx context.Context, rec *fwd.Record, waited time.Duration, workers int) {
	took := waited + rec.Duration
	if len(f.slowest) == maxSlowest && took <= f.slowest[maxSlowest-1].Took {
		return
	}
	waits := (rec.Waited + f.draftWaited) / time.Duration(workers*max(1, rec.UBatches)) // these overlap
	s := Step{
		Step: rec.Step, Rank: rec.Rank, Took: took, Votes: waited, Work: rec.Duration - waits,
		LastRank: rec.LastRank, Reason: rec.Reason, Tokens: rec.NumTokensUnpadded,
	}
	if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
		s.TraceID = sc.TraceID().String()
	}
	f.slowest = append(f.slowest, s)
	slices.SortStableFunc(f.slowest, func(a, b Step) int { return cmp.Compare(b.Took, a.Took) })
	f.slowest = f.slowest[:min(maxSlowest, len(f.slowest))]
}

// observe notes a pass of the target model. The rank has so many workers. A record of a failed exchange
// may come while a pass runs, on another goroutine.
func (f *figures) observe(ctx context.Context, rec *fwd.Record, workers int) {
	if rec.Phase == warmUpPhase || rec.Err != nil {
		return
	}
	f.noteSlow(ctx, rec, f.wait(rec), workers)
	f.draftWaited = 0
	f.experts += rec.Waited
	f.forward += rec.Duration
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

// observeDraft does the same with the draft model. Its passes lie inside those of the target, and
// reuse their votes.
func (f *figures) observeDraft(rec *fwd.Record) {
	if rec.Err == nil && rec.Phase != warmUpPhase {
		f.experts += rec.Waited
		f.draftWaited += rec.Waited
		f.draftPasses++
	}
}

// warmUpPhase is what fwd calls the passes of a warm-up.
const warmUpPhase = "warmup"
