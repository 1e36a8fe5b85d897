package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
)

// report is what serve prints. Times are in seconds.
type report struct {
	Requests        int            `json:"requests"`
	Finished        int            `json:"finished"`
	Resumed         int            `json:"resumed,omitempty"` // of the finished ones, those of an earlier run
	Interrupted     bool           `json:"interrupted"`
	Seconds         float64        `json:"seconds"`
	Steps           int            `json:"steps"`
	FailedSteps     int            `json:"failed_steps,omitempty"`
	Tokens          int            `json:"tokens"` // prompt and generated
	PromptTokens    int            `json:"prompt_tokens"`
	GeneratedTokens int            `json:"generated_tokens"`
	TokensPerSecond float64        `json:"tokens_per_second"`
	Passes          map[string]int `json:"passes"` // by the reason for their graph mode
	Modes           map[string]int `json:"modes"`  // passes by their graph mode
	DummyPasses     int            `json:"dummy_passes"`
	SplitPasses     int            `json:"split_passes"` // into microbatches
	DraftPasses     int            `json:"draft_passes"` // of the draft model, in the steps of the others
	Graphs          graphReport    `json:"graphs"`
	Speculation     *specReport    `json:"speculation,omitempty"`
	Padding         paddingReport  `json:"padding"`
	Waiting         []rankReport   `json:"waiting"`           // by rank
	HeldUp          []heldUpReport `json:"held_up"`           // by the rank that the others waited for
	Ladders         []ladderReport `json:"ladders,omitempty"` // with -replan, in the order of their use
	LadderChanges   int            `json:"ladder_changes,omitempty"`
	Lowered         []int          `json:"lowered"` // by rank: steps in which it lowered the others' graph mode
	Sent            []sentReport   `json:"sent"`
	Slowest         []stepReport   `json:"slowest"` // steps, the slowest first
	Check           *checkReport   `json:"check,omitempty"`
}

type graphReport struct {
	WarmUp   float64 `json:"warm_up"`
	Captures int     `json:"captures"`
	Replays  int     `json:"replays"`
}

// ladderReport says what a list of capture sizes was worth while it was in use.
type ladderReport struct {
	Sizes    []int   `json:"sizes"`
	Graphs   int     `json:"graphs"`   // of a rank
	Captured int     `json:"captured"` // of these, the ones that were not there before
	Bytes    int     `json:"bytes"`    // of the graphs of a rank
	Seconds  float64 `json:"seconds"`  // of capturing
	Steps    int     `json:"steps"`
	Eager    int     `json:"eager_steps"` // of these, without a graph
	Tokens   int     `json:"tokens"`      // of the largest rank, in the steps with a graph
	Padding  int     `json:"padding"`     // of these steps, to the size of the graph
}

type specReport struct {
	Proposed int `json:"proposed"`
	Accepted int `json:"accepted"`
}

type paddingReport struct {
	Graph int `json:"graph"`
	DP    int `json:"dp"`
}

type rankReport struct {
	Rank    int     `json:"rank"`
	Votes   float64 `json:"votes"`
	Hidden  float64 `json:"hidden,omitempty"` // of exchanges too, but while a pass ran
	Experts float64 `json:"experts"`
	Forward float64 `json:"forward"`
}

// heldUpReport says how long the other ranks have waited for one, all waits added up, and how often.
type heldUpReport struct {
	Rank        int     `json:"rank"`
	Votes       float64 `json:"votes"`
	VoteTimes   int     `json:"vote_times"`
	Experts     float64 `json:"experts"`
	ExpertTimes int     `json:"expert_times"`
}

// sentReport says how many rows of a rank went to the experts of a rank.
type sentReport struct {
	From int `json:"from"`
	To   int `json:"to"`
	Rows int `json:"rows"`
}

// stepReport is a slow step, as the rank that worked the longest in it saw it.
type stepReport struct {
	Step     uint64  `json:"step"`
	Rank     int     `json:"rank"`
	Took     float64 `json:"took"`
	Votes    float64 `json:"votes"` // of these, waiting for the others' votes
	Work     float64 `json:"work"`  // and in the pass, without waiting
	LastRank int     `json:"last_rank"`
	Reason   string  `json:"reason"`
	Tokens   int     `json:"tokens"`
	Trace    string  `json:"trace,omitempty"`
}

// numSlowest is how many steps a report has.
const numSlowest = 3

// checkReport is what -check found.
type checkReport struct {
	Requests   int `json:"requests"` // finished
	Agreed     int `json:"agreed"`
	Unfinished int `json:"unfinished,omitempty"` // after an interrupt
}

func (c *checkReport) print(w io.Writer) error {
	finished := ""
	if c.Unfinished > 0 {
		finished = "finished "
	}
	_, err := fmt.Fprintf(w, "check: %d of %d %srequests agree with the reference\n", c.Agreed, c.Requests,
		finished)
	return err
}

func (c *checkReport) err() error {
	if c.Agreed < c.Requests {
		return errCheck
	}
	return nil
}

func newReport(o *outcome, interrupted bool) *report {
	s := &o.stats
	r := &report{
		Requests:        len(o.requests),
		Finished:        s.Finished + o.resumed,
		Resumed:         o.resumed,
		Interrupted:     interrupted,
		Seconds:         s.Duration.Seconds(),
		Steps:           s.Steps,
		FailedSteps:     s.FailedSteps,
		Tokens:          s.PromptTokens + s.GeneratedTokens,
		PromptTokens:    s.PromptTokens,
		GeneratedTokens: s.GeneratedTokens,
		Passes:          map[string]int{},
		Modes:           map[string]int{},
		DummyPasses:     s.DummyPasses,
		SplitPasses:     s.SplitPasses,
		DraftPasses:     s.DraftPasses,
		Graphs:          graphReport{WarmUp: s.WarmUp.Seconds(), Captures: s.Captures, Replays: s.Replays},
		Padding:         paddingReport{Graph: s.GraphPadding, DP: s.DataPadding},
		LadderChanges:   s.LadderChanges,
	}
	for _, l := range s.Ladders {
		r.Ladders = append(r.Ladders, ladderReport{
			Sizes: l.Sizes, Graphs: l.Graphs, Captured: l.Captured, Bytes: l.Bytes, Seconds: l.Capture.Seconds(),
			Steps: l.Steps, Eager: l.Eager, Tokens: l.Tokens, Padding: l.Padding,
		})
	}
	if r.Seconds > 0 {
		r.TokensPerSecond = float64(r.Tokens) / r.Seconds
	}
	for reason, n := range s.Passes {
		r.Passes[reason.String()] = n
	}
	for mode, n := range s.Modes {
		r.Modes[mode.String()] = n
	}
	if s.DraftPasses > 0 {
		r.Speculation = &specReport{Proposed: s.ProposedTokens, Accepted: s.AcceptedTokens}
	}
	for _, w := range s.Ranks {
		r.Waiting = append(r.Waiting, rankReport{
			Rank: w.Rank, Votes: w.Votes.Seconds(), Hidden: w.Hidden.Seconds(),
			Experts: w.Experts.Seconds(), Forward: w.Forward.Seconds(),
		})
		heldUp := make([]heldUpReport, len(w.WaitedFor))
		for rank, wait := range w.WaitedFor {
			heldUp[rank] = heldUpReport{
				rank, wait.Votes.Seconds(), wait.VoteTimes, wait.Experts.Seconds(), wait.ExpertTimes,
			}
		}
		r.HeldUp = addHeldUp(r.HeldUp, heldUp)
		for to, rows := range w.Sent {
			if rows > 0 {
				r.Sent = append(r.Sent, sentReport{w.Rank, to, rows})
			}
		}
	}
	r.Lowered = s.Lowered
	for _, p := range s.Slowest {
		r.Slowest = append(r.Slowest, stepReport{
			Step: p.Step, Rank: p.Rank, Took: p.Took.Seconds(), Votes: p.Votes.Seconds(), Work: p.Work.Seconds(),
			LastRank: p.LastRank, Reason: p.Reason.String(), Tokens: p.Tokens, Trace: p.TraceID,
		})
	}
	r.Slowest = slowestOf(r.Slowest)
	return r
}

// dropTraces leaves out the traces of the slowest steps.
func (r *report) dropTraces() {
	for i := range r.Slowest {
		r.Slowest[i].Trace = ""
	}
}

// addHeldUp adds waits for the same ranks.
func addHeldUp(a, b []heldUpReport) []heldUpReport {
	if a == nil {
		return slices.Clone(b)
	}
	for i, h := range b {
		a[i].Votes += h.Votes
		a[i].VoteTimes += h.VoteTimes
		a[i].Experts += h.Experts
		a[i].ExpertTimes += h.ExpertTimes
	}
	return a
}

// slowestOf returns the slowest steps, each once. It was as slow as for the rank for which it took
// the longest, and is shown as of the one that worked the longest in it.
func slowestOf(all []stepReport) []stepReport {
	var steps []stepReport
	for _, s := range all {
		i := slices.IndexFunc(steps, func(other stepReport) bool { return other.Step == s.Step })
		if i < 0 {
			steps = append(steps, s)
			continue
		}
		slow, busy := steps[i], steps[i]
		if s.Took > slow.Took {
			slow = s
		}
		if s.Work > busy.Work {
			busy = s
		}
		if steps[i] = busy; slow.late() {
			steps[i] = slow
		}
		steps[i].Took = slow.Took
	}
	slices.SortStableFunc(steps, func(a, b stepReport) int { return cmp.Compare(b.Took, a.Took) })
	return steps[:min(numSlowest, len(steps))]
}

// late reports whether most of the step went by until the last vote came.
func (s *stepReport) late() bool { return s.LastRank >= 0 && s.Votes > s.Took/2 }

// mergeReports returns the report of all ranks from those of each, which are processes.
func mergeReports(ranks []*report) *report {
	all := &report{Passes: map[string]int{}, Modes: map[string]int{}}
	for _, r := range ranks {
		all.add(r)
	}
	if all.Seconds > 0 {
		all.TokensPerSecond = float64(all.Tokens) / all.Seconds
	}
	return all
}

// add adds a rank's report. All ranks take the same steps at the same time; what else there is,
// each has for itself.
func (r *report) add(rank *report) {
	r.Interrupted = r.Interrupted || rank.Interrupted
	r.Seconds = max(r.Seconds, rank.Seconds)
	if rank.Steps > r.Steps || r.Ladders == nil { // all ranks have the same, but for steps that one has missed
		r.Ladders, r.LadderChanges = rank.Ladders, rank.LadderChanges
	}
	r.Steps = max(r.Steps, rank.Steps)
	r.FailedSteps = max(r.FailedSteps, rank.FailedSteps)
	r.Graphs.WarmUp = max(r.Graphs.WarmUp, rank.Graphs.WarmUp)
	r.Requests += rank.Requests
	r.Finished += rank.Finished
	r.Resumed += rank.Resumed
	r.Tokens += rank.Tokens
	r.PromptTokens += rank.PromptTokens
	r.GeneratedTokens += rank.GeneratedTokens
	r.DummyPasses += rank.DummyPasses
	r.SplitPasses += rank.SplitPasses
	r.DraftPasses += rank.DraftPasses
	r.Graphs.Captures += rank.Graphs.Captures
	r.Graphs.Replays += rank.Graphs.Replays
	r.Padding.Graph += rank.Padding.Graph
	r.Padding.DP += rank.Padding.DP
	r.Waiting = append(r.Waiting, rank.Waiting...)
	r.HeldUp = addHeldUp(r.HeldUp, rank.HeldUp)
	r.Sent = append(r.Sent, rank.Sent...)
	r.Slowest = slowestOf(append(r.Slowest, rank.Slowest...))
	for i, n := range rank.Lowered {
		if i == len(r.Lowered) {
			r.Lowered = append(r.Lowered, 0)
		}
		r.Lowered[i] = max(r.Lowered[i], n)
	}
	for reason, n := range rank.Passes {
		r.Passes[reason] += n
	}
	for mode, n := range rank.Modes {
		r.Modes[mode] += n
	}
	if s := rank.Speculation; s != nil {
		if r.Speculation == nil {
			r.Speculation = &specReport{}
		}
		r.Speculation.Proposed += s.Proposed
		r.Speculation.Accepted += s.Accepted
	}
	if c := rank.Check; c != nil {
		if r.Check == nil {
			r.Check = &checkReport{}
		}
		r.Check.Requests += c.Requests
		r.Check.Agreed += c.Agreed
		r.Check.Unfinished += c.Unfinished
	}
}
