// Package trace makes requests for the engine from traces of requests, which the package
// [github.com/forwardctx/fwd/fwdplan/reqtrace] reads in many formats.
package trace

import (
	"io"
	"math/rand/v2"

	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/fwdplan/reqtrace"
)

// Row is one request of a trace.
type Row = reqtrace.Row

// MaxTokens is the most that a row may have of either kind of tokens.
const MaxTokens = reqtrace.MaxTokens

// Default returns the small trace that is part of the program.
func Default() []Row { return reqtrace.Default() }

// Read returns the rows of a trace by time, without those of failed calls, and how many these are. The
// trace may have any format that [reqtrace.Read] knows.
func Read(r io.Reader) (rows []Row, failed int, err error) {
	t, err := reqtrace.Read(r)
	return t.Rows, t.Failed, err
}

// Requests turns rows into requests, with contexts clipped to maxContext (0: not clipped). A trace
// says how long a prompt was and not what was in it: the prompt's bytes are drawn from a generator
// seeded with the request's number, so every run serves the same prompts.
func Requests(rows []Row, maxContext int) []engine.Request {
	requests := make([]engine.Request, len(rows))
	for i, row := range rows {
		length := row.ContextTokens
		if maxContext > 0 {
			length = min(length, maxContext)
		}
		rng := rand.New(rand.NewPCG(uint64(i), 0x7072_6f6d_7074)) // "prompt"
		prompt := make([]int, length)
		for p := range prompt {
			prompt[p] = rng.IntN(256)
		}
		requests[i] = engine.Request{
			ID:        i,
			Arrival:   max(0, row.Time.Sub(rows[0].Time)),
			Prompt:    prompt,
			MaxTokens: row.GeneratedTokens,
		}
	}
	return requests
}
