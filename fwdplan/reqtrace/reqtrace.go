// Package reqtrace reads traces of requests: when each came, and how many tokens it had and got. It
// reads what people have, compressed with gzip or not:
//
//   - the Azure LLM inference traces of 2023 and 2024: CSV with TIMESTAMP, ContextTokens and
//     GeneratedTokens;
//   - BurstGPT: CSV with Timestamp (in seconds), Request tokens and Response tokens;
//   - Mooncake: lines of JSON with timestamp (in milliseconds), input_length and output_length;
//   - what "vllm bench serve --save-result --save-detailed" saves: JSON with start_times, input_lens
//     and output_lens;
//   - inference-perf's per_request_lifecycle_metrics.json.
package reqtrace

import (
	"bufio"
	"bytes"
	"compress/gzip"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Row is one request of a trace.
type Row struct {
	Time            time.Time // of arrival; from 1970 on if the trace only says how long after its begin
	ContextTokens   int
	GeneratedTokens int
}

// Trace is what [Read] has read.
type Trace struct {
	Format string // "Azure", "BurstGPT", "Mooncake", "vLLM" or "inference-perf"
	Rows   []Row  // by time; at least one
	Failed int    // rows that are left out: they failed, or have no tokens
}

const (
	// MaxTokens is the most that a row may have, of either kind. It keeps a damaged row from taking all
	// memory.
	MaxTokens = 1 << 20

	// MaxRows is the most rows that a trace may have.
	MaxRows = 1 << 25
)

// defaultTrace is made up: bursts of requests, short and long ones mixed, within a minute or so.
//
//go:embed default.csv
var defaultTrace []byte

// Default returns the small trace that is part of the package.
func Default() []Row {
	t, err := Read(bytes.NewReader(defaultTrace))
	if err != nil {
		panic(fmt.Sprintf("reqtrace: the embedded trace: %v", err)) // a test reads it
	}
	return t.Rows
}

// Read reads a trace in any of the formats. An error about a row says its line. A trace that is longer
// than a [time.Duration], 292 years, is an error too.
func Read(r io.Reader) (Trace, error) {
	in := bufio.NewReader(r)
	if magic, err := in.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		unzip, err := gzip.NewReader(in)
		if err != nil {
			return Trace{}, fmt.Errorf("gzip: %w", err)
		}
		in = bufio.NewReader(unzip)
	}
	first, err := firstByte(in)
	if errors.Is(err, io.EOF) {
		return Trace{}, errors.New("line 1: the trace is empty")
	}
	if err != nil {
		return Trace{}, err
	}
	b := &builder{}
	if first == '{' || first == '[' {
		err = b.readJSON(in, first)
	} else {
		err = b.readCSV(in)
	}
	if err != nil {
		return Trace{}, err
	}
	return b.finish()
}

// firstByte returns the first byte of the trace that is no space, without taking it.
func firstByte(in *bufio.Reader) (byte, error) {
	if mark, _ := in.Peek(3); string(mark) == "\ufeff" { // some tools write a byte order mark
		in.Discard(3)
	}
	for n := 1; ; n++ {
		head, err := in.Peek(n)
		if len(head) < n {
			return 0, err // io.EOF if there is nothing but space
		}
		if c := head[n-1]; !strings.ContainsRune(" \t\r\n", rune(c)) || n == in.Size() {
			return c, nil
		}
	}
}

// builder collects the rows of a trace.
type builder struct{ Trace }

// add adds a row, unless it has no tokens.
func (b *builder) add(row Row) error {
	if row.ContextTokens == 0 || row.GeneratedTokens == 0 {
		b.Failed++
		return nil
	}
	if len(b.Rows) == MaxRows {
		return fmt.Errorf("the trace has more than %d rows", MaxRows)
	}
	b.Rows = append(b.Rows, row)
	return nil
}

func (b *builder) finish() (Trace, error) {
	if len(b.Rows) == 0 && b.Failed > 0 {
		return Trace{}, fmt.Errorf("line 1: all %d rows of the trace failed, or have no tokens", b.Failed)
	}
	if len(b.Rows) == 0 {
		return Trace{}, errors.New("line 1: the trace has no rows")
	}
	slices.SortStableFunc(b.Rows, func(a, b Row) int { return a.Time.Compare(b.Time) })
	first, last := b.Rows[0].Time, b.Rows[len(b.Rows)-1].Time
	if span := last.Sub(first); !first.Add(span).Equal(last) { // it does not fit
		return Trace{}, fmt.Errorf("the trace begins at %s and ends at %s, want at most %v hours between them",
			first.Format(time.DateTime), last.Format(time.DateTime), int(span.Hours()))
	}
	return b.Trace, nil
}

// set sets a field of the row from the text in the trace.
type set func(row *Row, name, text string) error

func setContext(row *Row, name, text string) error { return count(&row.ContextTokens, name, text) }

func setGenerated(row *Row, name, text string) error { return count(&row.GeneratedTokens, name, text) }

func count(to *int, name, text string) (err error) {
	if *to, err = strconv.Atoi(text); err != nil || *to < 0 || *to > MaxTokens {
		return fmt.Errorf("%s %.40q is not a whole number from 0 to %d", name, text, MaxTokens)
	}
	return nil
}

// setStamp reads a date and a time of day, with or without fraction and time zone.
func setStamp(row *Row, name, text string) (err error) {
	for _, layout := range []string{time.DateTime, "2006-01-02 15:04:05Z07:00", time.RFC3339} {
		if row.Time, err = time.Parse(layout, text); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s %.40q is not of the form 2006-01-02 15:04:05.0000000, with or without a zone (+00:00)",
		name, text)
}

func setSeconds(row *Row, name, text string) error { return after(row, name, text, time.Second) }

func setMilliseconds(row *Row, name, text string) error {
	return after(row, name, text, time.Millisecond)
}

// after sets the time to that many units after the begin of 1970.
func after(row *Row, name, text string, unit time.Duration) error {
	n, err := strconv.ParseFloat(text, 64)
	if at := n * float64(unit); err != nil || !(at >= 0 && at < math.MaxInt64) {
		return fmt.Errorf("%s %.40q is not a number of %s from 0 to %.4g", name, text,
			map[time.Duration]string{time.Second: "seconds", time.Millisecond: "milliseconds"}[unit],
			math.MaxInt64/float64(unit))
	}
	row.Time = time.Unix(0, int64(math.Round(n*float64(unit)))).UTC()
	return nil
}

// known tells the formats, for errors about traces in no such format.
const known = "known are CSV as of the Azure traces (TIMESTAMP, ContextTokens, GeneratedTokens) and of " +
	"BurstGPT (Timestamp, Request tokens, Response tokens), lines of JSON as of Mooncake (timestamp, " +
	"input_length, output_length), and the JSON of vLLM (start_times, input_lens, output_lens) and of inference-perf " +
	"(start_time, info)"
