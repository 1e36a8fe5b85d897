package fwdplan

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/forwardctx/fwd"
)

// Snapshot is what a [Sizes] has counted, or several of them together. It is plain data, and goes to
// JSON and back. The zero value has no passes.
type Snapshot struct {
	Name    string  `json:"name,omitempty"` // of the Runner, Config.Name
	Ranks   int     `json:"ranks"`          // data-parallel ranks of the Runner
	Rows    []Row   `json:"rows"`           // by size; no two with the same first four fields
	LeftOut LeftOut `json:"left_out"`
}

// Row counts passes that are alike.
type Row struct {
	Tokens   int  `json:"tokens"`             // the size: the most tokens of any busy rank, without padding
	Uniform  bool `json:"uniform,omitempty"`  // every busy rank had a uniform decode batch
	Adapters int  `json:"adapters,omitempty"` // that the graph serves, or of this rank's batch if it has none
	Captured int  `json:"captured,omitempty"` // the capture size that the pass ran in; 0: without a graph

	Passes  uint64 `json:"passes"`            // in which this rank had a batch of its own
	Dummies uint64 `json:"dummies,omitempty"` // in which it only kept step with the other ranks

	// Nanoseconds is how long these passes took together.
	Nanoseconds uint64 `json:"nanoseconds,omitempty"`
}

// LeftOut counts records that are in no row.
type LeftOut struct {
	Failed  uint64 `json:"failed,omitempty"`   // passes and exchanges
	NoBatch uint64 `json:"no_batch,omitempty"` // warm-up, and other passes that serve nobody
	NoGraph uint64 `json:"no_graph,omitempty"` // no capture size would help: split, eager by choice, ...
	Other   uint64 `json:"other,omitempty"`    // of a Runner with another name or number of ranks
	Beyond  uint64 `json:"beyond,omitempty"`   // above 2^23 tokens or 2^16 adapters, or of too many kinds
}

// format marks a stored snapshot.
const format = "fwdplan.snapshot.1"

// stored is a snapshot in JSON. The embedded type has no methods.
type stored struct {
	Format string `json:"format"`
	plain
}

type plain Snapshot

// MarshalJSON implements [json.Marshaler].
func (s Snapshot) MarshalJSON() ([]byte, error) { return json.Marshal(stored{format, plain(s)}) }

// UnmarshalJSON implements [json.Unmarshaler]. It refuses what no Sizes can have counted, with an error
// that wraps [fwd.ErrInvalid] and names the field, and leaves s as it is then.
func (s *Snapshot) UnmarshalJSON(data []byte) error {
	in := json.NewDecoder(bytes.NewReader(data))
	in.DisallowUnknownFields()
	var read stored
	if err := in.Decode(&read); err != nil {
		return err
	}
	if read.Format != format {
		return invalidf("format is %.40q, want %q", read.Format, format)
	}
	snap := Snapshot(read.plain)
	if err := snap.check(); err != nil {
		return err
	}
	*s = snap
	return nil
}

// maxSnapshot bounds what is read as a snapshot: more than a full Sizes gives.
const maxSnapshot = 64 << 20

// ReadSnapshot reads one snapshot in JSON, and nothing after it. Its errors say the line or the field.
// They wrap [fwd.ErrInvalid] unless reading failed.
func ReadSnapshot(r io.Reader) (Snapshot, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxSnapshot+1))
	if err != nil {
		return Snapshot{}, err
	}
	if len(data) > maxSnapshot {
		return Snapshot{}, invalidf("the snapshot has more than %d bytes", maxSnapshot)
	}
	space := len(data) - len(bytes.TrimLeft(data, " \t\r\n"))
	if space == len(data) {
		return Snapshot{}, invalidf("line 1: the snapshot is empty")
	}
	var s Snapshot
	err = json.Unmarshal(data, &s)
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		return Snapshot{}, invalidf("line %d: %v", lineOf(data, syntax.Offset), err)
	}
	if typed := (*json.UnmarshalTypeError)(nil); errors.As(err, &typed) {
		return Snapshot{}, invalidf("line %d: found a JSON %s for %s, want type %v",
			lineOf(data, int64(space)+typed.Offset), typed.Value,
			cmp.Or(strings.TrimPrefix(typed.Field, "plain."), "the snapshot"), typed.Type)
	}
	if err != nil && !errors.Is(err, fwd.ErrInvalid) {
		err = invalidf("%v", err)
	}
	return s, err
}

func lineOf(data []byte, offset int64) int {
	return 1 + bytes.Count(data[:min(max(offset, 0), int64(len(data)))], []byte("\n"))
}

// maxNumber bounds every count, so that sums and prices of passes are exact in a float64.
const maxNumber = 1<<53 - 1

// check refuses what no Sizes can have counted.
func (s *Snapshot) check() error {
	if s.Ranks < 0 || s.Ranks == 0 && len(s.Rows) > 0 {
		return invalidf("ranks is %d, want at least 1", s.Ranks)
	}
	var passes, nanos uint64
	for i, r := range s.Rows {
		switch {
		case r.Tokens < 1 || r.Tokens > maxTokens:
			return invalidf("rows[%d].tokens is %d, want 1 to %d", i, r.Tokens, maxTokens)
		case r.Captured != 0 && (r.Captured < r.Tokens || r.Captured > maxTokens):
			return invalidf("rows[%d].captured is %d, want 0, or %d (its tokens) to %d",
				i, r.Captured, r.Tokens, maxTokens)
		case r.Adapters < 0 || r.Adapters > maxAdapters:
			return invalidf("rows[%d].adapters is %d, want 0 to %d", i, r.Adapters, maxAdapters)
		case r.Passes > maxNumber || r.Dummies > maxNumber || r.Nanoseconds > maxNumber:
			return invalidf("rows[%d] has a number above %d", i, uint64(maxNumber))
		case r.Passes+r.Dummies == 0:
			return invalidf("rows[%d] has no passes", i)
		}
		if passes += r.Passes + r.Dummies; passes > maxNumber {
			return invalidf("rows[0] to rows[%d] have more than %d passes", i, uint64(maxNumber))
		}
		if nanos += r.Nanoseconds; nanos > maxNumber {
			return invalidf("rows[0] to rows[%d] have more than %d nanoseconds", i, uint64(maxNumber))
		}
	}
	sorted := slices.Clone(s.Rows)
	sortRows(sorted)
	for i := 1; i < len(sorted); i++ {
		if r := sorted[i]; compareRows(sorted[i-1], r) == 0 {
			return invalidf("two rows have tokens %d, uniform %t, adapters %d, captured %d",
				r.Tokens, r.Uniform, r.Adapters, r.Captured)
		}
	}
	return nil
}

// Merge returns what both have counted together: of other ranks, or other days. It returns an error that
// wraps [fwd.ErrInvalid] if they are of Runners with different names or numbers of ranks. A snapshot
// without rows fits any other.
func (s Snapshot) Merge(other Snapshot) (Snapshot, error) {
	return s.combine(other, "merge", func(a, b uint64) (uint64, bool) { return a + b, a+b <= maxNumber })
}

// Sub returns what was counted since an earlier snapshot of the same Sizes, or of the same ones merged.
// It returns an error that wraps [fwd.ErrInvalid] if earlier is of another Runner, or has counted more.
func (s Snapshot) Sub(earlier Snapshot) (Snapshot, error) {
	return s.combine(earlier, "subtract", func(a, b uint64) (uint64, bool) { return a - b, b <= a })
}

// operation combines two counts. ok is false if there is no such count.
type operation func(a, b uint64) (result uint64, ok bool)

// combine applies an operation to every count of two snapshots.
func (s Snapshot) combine(other Snapshot, verb string, op operation) (Snapshot, error) {
	sum := Snapshot{Name: s.Name, Ranks: s.Ranks, LeftOut: s.LeftOut}
	switch {
	case s.Ranks == 0 && len(s.Rows) == 0:
		sum.Name, sum.Ranks = other.Name, other.Ranks
	case other.Ranks == 0 && len(other.Rows) == 0:
	case s.Name != other.Name || s.Ranks != other.Ranks:
		return Snapshot{}, invalidf("can't %s snapshots of different Runners: name %q with %d ranks, "+
			"name %q with %d", verb, s.Name, s.Ranks, other.Name, other.Ranks)
	}
	rows := make(map[Row]Row, len(s.Rows)+len(other.Rows)) // by kind
	for _, r := range s.Rows {
		rows[r.kind()] = r
	}
	for _, r := range other.Rows {
		was, known := rows[r.kind()]
		if !known {
			was = r.kind()
		}
		row := was
		if !op.apply([]*uint64{&row.Passes, &row.Dummies, &row.Nanoseconds}, r.Passes, r.Dummies, r.Nanoseconds) {
			return Snapshot{}, invalidf("can't %s passes of %d tokens: %d and %d, dummies %d and %d, in %d and %d ns",
				verb, r.Tokens, was.Passes, r.Passes, was.Dummies, r.Dummies, was.Nanoseconds, r.Nanoseconds)
		}
		rows[r.kind()] = row
	}
	for _, r := range rows {
		if r.Passes+r.Dummies > 0 {
			sum.Rows = append(sum.Rows, r)
		}
	}
	sortRows(sum.Rows)
	l, o := &sum.LeftOut, other.LeftOut
	if !op.apply([]*uint64{&l.Failed, &l.NoBatch, &l.NoGraph, &l.Other, &l.Beyond},
		o.Failed, o.NoBatch, o.NoGraph, o.Other, o.Beyond) {
		return Snapshot{}, invalidf("can't %s what was left out: %+v and %+v", verb, s.LeftOut, o)
	}
	return sum, sum.check()
}

// apply combines each of the counts with its other, and reports whether all have a result.
func (op operation) apply(counts []*uint64, others ...uint64) bool {
	all := true
	for i, count := range counts {
		result, ok := op(*count, others[i])
		*count, all = result, all && ok
	}
	return all
}

// kind returns the row without its counts.
func (r Row) kind() Row {
	return Row{Tokens: r.Tokens, Uniform: r.Uniform, Adapters: r.Adapters, Captured: r.Captured}
}

func compareRows(a, b Row) int {
	uniform := 0
	if a.Uniform != b.Uniform {
		uniform = 1
		if a.Uniform {
			uniform = -1
		}
	}
	return cmp.Or(cmp.Compare(a.Tokens, b.Tokens), uniform,
		cmp.Compare(a.Adapters, b.Adapters), cmp.Compare(a.Captured, b.Captured))
}

func sortRows(rows []Row) { slices.SortFunc(rows, compareRows) }

// invalidf returns an error that wraps [fwd.ErrInvalid].
func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", fwd.ErrInvalid, fmt.Sprintf(format, args...))
}
