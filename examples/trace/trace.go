// Package trace reads request traces: CSV files with a header and the columns TIMESTAMP,
// ContextTokens and GeneratedTokens, as the Azure LLM inference traces have them.
package trace

import (
	"bytes"
	_ "embed"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/forwardctx/fwd/examples/engine"
)

// defaultTrace is made up: bursts of requests, short and long ones mixed, within a minute or so.
//
//go:embed default.csv
var defaultTrace []byte

// Row is one request of a trace.
type Row struct {
	Time            time.Time
	ContextTokens   int
	GeneratedTokens int
}

// MaxTokens is the most that a row may have in either column. It keeps a damaged row from taking
// all memory.
const MaxTokens = 1 << 20

// Default returns the small trace that is part of the program.
func Default() []Row {
	rows, err := Read(bytes.NewReader(defaultTrace))
	if err != nil {
		panic(fmt.Sprintf("trace: the embedded trace: %v", err)) // a test reads it
	}
	return rows
}

// Read returns the rows of a trace by time. Columns may come in any order, and others beside them.
// An error about a row says its line. A trace that is longer than a [time.Duration], 292 years, is
// an error too.
func Read(r io.Reader) ([]Row, error) {
	in := csv.NewReader(r)
	in.TrimLeadingSpace = true
	header, err := in.Read()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("line 1: the trace is empty")
	}
	if err != nil {
		return nil, inLine(err)
	}
	var columns [3]int
	for i, name := range []string{"TIMESTAMP", "ContextTokens", "GeneratedTokens"} {
		columns[i] = slices.IndexFunc(header, func(h string) bool {
			return strings.EqualFold(strings.TrimSpace(strings.TrimPrefix(h, "\ufeff")),
				name) // some tools write a byte order mark
		})
		if columns[i] < 0 {
			return nil, fmt.Errorf("line 1: no column %s in %q", name, header)
		}
	}
	var rows []Row
	for {
		record, err := in.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, inLine(err)
		}
		row, column, err := parse(record, columns)
		if err != nil {
			line, _ := in.FieldPos(column)
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return nil, errors.New("line 1: the trace has a header and no rows")
	}
	slices.SortStableFunc(rows, func(a, b Row) int { return a.Time.Compare(b.Time) })
	first, last := rows[0].Time, rows[len(rows)-1].Time
	if span := last.Sub(first); !first.Add(span).Equal(last) { // it does not fit
		return nil, fmt.Errorf("the trace begins at %s and ends at %s, want at most %v hours between them",
			first.Format(time.DateTime), last.Format(time.DateTime), int(span.Hours()))
	}
	return rows, nil
}

// parse returns a row, or the column that is wrong.
func parse(record []string, columns [3]int) (row Row, column int, err error) {
	stamp := strings.TrimSpace(record[columns[0]])
	if row.Time, err = time.Parse(time.DateTime, stamp); err != nil { // a fraction of seconds is read too
		return row, columns[0], fmt.Errorf("TIMESTAMP %.40q is not of the form 2006-01-02 15:04:05.0000000", stamp)
	}
	for i, count := range []*int{&row.ContextTokens, &row.GeneratedTokens} {
		name, column := [...]string{"ContextTokens", "GeneratedTokens"}[i], columns[i+1]
		text := strings.TrimSpace(record[column])
		if *count, err = strconv.Atoi(text); err != nil || *count < 1 || *count > MaxTokens {
			return row, column, fmt.Errorf("%s %.40q is not a whole number from 1 to %d", name, text, MaxTokens)
		}
	}
	return row, 0, nil
}

// inLine puts the line of a syntax error first, as in all other errors.
func inLine(err error) error {
	if syntax := (*csv.ParseError)(nil); errors.As(err, &syntax) {
		return fmt.Errorf("line %d: %w", syntax.Line, syntax.Err)
	}
	return err
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
