package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
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
	Waiting         []rankReport   `json:"waiting"` // by rank
	Check           *checkReport   `json:"check,omitempty"`
}

type graphReport struct {
	WarmUp   float64 `json:"warm_up"`
	Captures int     `json:"captures"`
	Replays  int     `json:"replays"`
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
	Experts float64 `json:"experts"`
	Forward float64 `json:"forward"`
}

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
	_, err := fmt.Fprintf(w, "check: %d of %d %srequests agree with the reference\n", c.Agreed, c.Requests, finished)
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
		r.Waiting = append(
			r.Waiting,
			rankReport{
				Rank:    w.Rank,
				Votes:   w.Votes.Seconds(),
				Experts: w.Experts.Seconds(),
				Forward: w.Forward.Seconds(),
			},
		)
	}
	return r
}

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

func (r *report) print(w io.Writer, asJSON bool) error {
	if asJSON {
		out := json.NewEncoder(w)
		out.SetIndent("", "  ")
		return out.Encode(r)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	interrupted := ""
	if r.Interrupted {
		interrupted = ", interrupted"
	}
	fmt.Fprintf(t, "requests\t%d\t%d finished%s\n", r.Requests, r.Finished, interrupted)
	if r.Resumed > 0 {
		fmt.Fprintf(t, "\t%d\tof them finished by an earlier run\n", r.Resumed)
	}
	fmt.Fprintf(t, "steps\t%d\tin %v\n", r.Steps, seconds(r.Seconds))
	if r.FailedSteps > 0 {
		fmt.Fprintf(t, "\t%d\tmore failed: a rank was missing, or out of step\n", r.FailedSteps)
	}
	fmt.Fprintf(t, "tokens\t%d\t%d prompt, %d generated\n", r.Tokens, r.PromptTokens, r.GeneratedTokens)
	fmt.Fprintf(t, "tokens/s\t%.0f\t\n", r.TokensPerSecond)
	total := 0
	for _, n := range r.Passes {
		total += n
	}
	fmt.Fprintf(t, "passes\t%d\t%d of them dummy, to keep step\n", total, r.DummyPasses)
	if r.SplitPasses > 0 {
		fmt.Fprintf(t, "\t%d\tof them split into microbatches, which run without graphs\n", r.SplitPasses)
	}
	printCounts(t, r.Modes, modeMeaning)
	fmt.Fprintf(t, "reasons\t\tfor the mode\n")
	printCounts(t, r.Passes, reasonMeaning)
	fmt.Fprintf(t, "graphs\t%d\tcaptured in %v, %d replays\n", r.Graphs.Captures, seconds(r.Graphs.WarmUp),
		r.Graphs.Replays)
	if s := r.Speculation; s != nil {
		fmt.Fprintf(t, "guesses\t%d\t%d accepted, of a draft model that took %d passes\n", s.Proposed, s.Accepted,
			r.DraftPasses)
	}
	fmt.Fprintf(t, "padding\t%d\ttokens\n", r.Padding.Graph+r.Padding.DP)
	fmt.Fprintf(t, "  graph\t%d\tup to the size of a graph\n", r.Padding.Graph)
	fmt.Fprintf(t, "  dp\t%d\tup to the largest rank\n", r.Padding.DP)
	fmt.Fprintf(t, "waiting\tvotes\texperts\tof forward\n")
	for _, w := range r.Waiting {
		fmt.Fprintf(t, "  rank %d\t%v\t%v\t%v\n", w.Rank, seconds(w.Votes), seconds(w.Experts), seconds(w.Forward))
	}
	return t.Flush()
}

// printCounts prints counts, the largest first, with what each means.
func printCounts(w io.Writer, counts map[string]int, meaning map[string]string) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b]-counts[a], strings.Compare(a, b))
	})
	for _, name := range names {
		fmt.Fprintf(w, "  %s\t%d\t%s\n", name, counts[name], meaning[name])
	}
}

var modeMeaning = map[string]string{
	"NONE":      "eager",
	"PIECEWISE": "graphs between the attention calls",
	"FULL":      "one graph for the whole pass",
}

// reasonMeaning explains the reasons that this engine can have.
var reasonMeaning = map[string]string{
	"exact":         "full graph of a decode batch",
	"relaxed":       "graph for any batch of the size",
	"disabled":      "no graphs at all",
	"no_key":        "no graph for such a batch",
	"too_large":     "larger than any graph",
	"dp_rank":       "another rank had no such graph",
	"full_excluded": "idle, in a step without full graphs",
	"ubatch":        "the pass is split into microbatches",
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond)
}
