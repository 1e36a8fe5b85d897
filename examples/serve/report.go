package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
)

// report is what serve prints. Times are in seconds.
type report struct {
	Requests        int            `json:"requests"`
	Finished        int            `json:"finished"`
	Interrupted     bool           `json:"interrupted"`
	Seconds         float64        `json:"seconds"`
	Steps           int            `json:"steps"`
	Tokens          int            `json:"tokens"` // prompt and generated
	PromptTokens    int            `json:"prompt_tokens"`
	GeneratedTokens int            `json:"generated_tokens"`
	TokensPerSecond float64        `json:"tokens_per_second"`
	Passes          map[string]int `json:"passes"` // by the reason for their graph mode
	DummyPasses     int            `json:"dummy_passes"`
	Padding         paddingReport  `json:"padding"`
	Waiting         []rankReport   `json:"waiting"` // by rank
	Check           *checkReport   `json:"check,omitempty"`
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

type checkReport struct {
	Requests int `json:"requests"`
	Agreed   int `json:"agreed"`
}

func newReport(s engine.Stats, interrupted bool) *report {
	r := &report{
		Requests:        s.Requests,
		Finished:        s.Finished,
		Interrupted:     interrupted,
		Seconds:         s.Duration.Seconds(),
		Steps:           s.Steps,
		Tokens:          s.PromptTokens + s.GeneratedTokens,
		PromptTokens:    s.PromptTokens,
		GeneratedTokens: s.GeneratedTokens,
		Passes:          map[string]int{},
		DummyPasses:     s.DummyPasses,
		Padding:         paddingReport{Graph: s.GraphPadding, DP: s.DataPadding},
	}
	if r.Seconds > 0 {
		r.TokensPerSecond = float64(r.Tokens) / r.Seconds
	}
	for reason, n := range s.Passes {
		r.Passes[reason.String()] = n
	}
	for d, w := range s.Ranks {
		r.Waiting = append(r.Waiting, rankReport{Rank: d, Votes: w.Votes.Seconds(), Experts: w.Experts.Seconds(), Forward: w.Forward.Seconds()})
	}
	return r
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
	fmt.Fprintf(t, "steps\t%d\tin %v\n", r.Steps, seconds(r.Seconds))
	fmt.Fprintf(t, "tokens\t%d\t%d prompt, %d generated\n", r.Tokens, r.PromptTokens, r.GeneratedTokens)
	fmt.Fprintf(t, "tokens/s\t%.0f\t\n", r.TokensPerSecond)
	total := 0
	for _, n := range r.Passes {
		total += n
	}
	fmt.Fprintf(t, "passes\t%d\t%d of them dummy, to keep step\n", total, r.DummyPasses)
	reasons := make([]string, 0, len(r.Passes))
	for reason := range r.Passes {
		reasons = append(reasons, reason)
	}
	slices.SortFunc(reasons, func(a, b string) int { return r.Passes[b] - r.Passes[a] })
	for _, reason := range reasons {
		fmt.Fprintf(t, "  %s\t%d\t%s\n", reason, r.Passes[reason], meaning[reason])
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

// meaning explains the reasons that this engine can have.
var meaning = map[string]string{
	"exact":     "full graph of a decode batch",
	"relaxed":   "graph for any batch of the size",
	"disabled":  "no graphs at all",
	"no_key":    "no graph for such a batch",
	"too_large": "larger than any graph",
	"dp_rank":   "another rank had no such graph",
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond)
}
