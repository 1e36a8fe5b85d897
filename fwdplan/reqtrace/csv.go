package reqtrace

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// column is a column of a CSV format.
type column struct {
	name string
	set  set
}

var csvFormats = []struct {
	name    string
	columns []column
}{
	{"Azure", []column{
		{"TIMESTAMP", setStamp}, {"ContextTokens", setContext}, {"GeneratedTokens", setGenerated}}},
	{"BurstGPT", []column{
		{"Timestamp", setSeconds}, {"Request tokens", setContext}, {"Response tokens", setGenerated}}},
}

// readCSV reads a header and rows. Columns may come in any order, and others beside them.
func (b *builder) readCSV(r io.Reader) error {
	in := csv.NewReader(r)
	in.TrimLeadingSpace = true
	in.ReuseRecord = true
	header, err := in.Read()
	if errors.Is(err, io.EOF) {
		return errors.New("line 1: the trace is empty")
	}
	if err != nil {
		return inLine(err)
	}
	columns, at, err := b.recognize(header)
	if err != nil {
		return err
	}
	for {
		record, err := in.Read()
		if errors.Is(err, io.EOF) && len(b.Rows)+b.Failed == 0 {
			return errors.New("line 1: the trace has a header and no rows")
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return inLine(err)
		}
		var row Row
		for i, c := range columns {
			if err := c.set(&row, c.name, strings.TrimSpace(record[at[i]])); err != nil {
				line, _ := in.FieldPos(at[i])
				return fmt.Errorf("line %d: %w", line, err)
			}
		}
		if err := b.add(row); err != nil {
			return err
		}
	}
}

// recognize finds the format that has its columns in the header, and says where they are.
func (b *builder) recognize(header []string) (columns []column, at []int, err error) {
	var missing string // in the format that is closest
	most := -1
	for _, f := range csvFormats {
		at, lacks := make([]int, len(f.columns)), ""
		found := 0
		for i, c := range f.columns {
			at[i] = slices.IndexFunc(header, func(h string) bool {
				return strings.EqualFold(strings.TrimSpace(h), c.name)
			})
			if at[i] >= 0 {
				found++
			} else if lacks == "" {
				lacks = c.name
			}
		}
		if lacks == "" {
			b.Format = f.name
			return f.columns, at, nil
		}
		if found > most {
			most, missing = found, lacks
		}
	}
	return nil, nil, fmt.Errorf("line 1: no column %s in %.200q; %s", missing, header, known)
}

// inLine puts the line of a syntax error first, as in all other errors.
func inLine(err error) error {
	if syntax := (*csv.ParseError)(nil); errors.As(err, &syntax) {
		return fmt.Errorf("line %d: %w", syntax.Line, syntax.Err)
	}
	return err
}
