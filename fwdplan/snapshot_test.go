// This file is about snapshots as data: JSON, sums and differences, and damaged ones.

package fwdplan_test

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// snapshotOf returns a snapshot of uniform decode passes: how many have each size.
func snapshotOf(passes map[int]uint64) fwdplan.Snapshot {
	s, one := fwdplan.Snapshot{}, fwdplan.Snapshot{}
	for tokens, n := range passes {
		one = fwdplan.Snapshot{Ranks: 1, Rows: []fwdplan.Row{{Tokens: tokens, Uniform: true, Passes: n}}}
		var err error
		if s, err = s.Merge(one); err != nil {
			panic(err)
		}
	}
	return s
}

func TestSnapshotJSON(t *testing.T) {
	t.Parallel()
	want := fwdplan.Snapshot{
		Name: "target", Ranks: 4, LeftOut: fwdplan.LeftOut{Failed: 3},
		Rows: []fwdplan.Row{
			{Tokens: 3, Uniform: true, Captured: 4, Passes: 5, Dummies: 1, Nanoseconds: 99},
			{Tokens: 700, Adapters: 2, Passes: 1},
		},
	}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := fwdplan.ReadSnapshot(strings.NewReader(string(data)))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%s became %+v, %v", data, got, err)
	}
	if !strings.Contains(string(data), `"format":"fwdplan.snapshot.1"`) {
		t.Errorf("%s does not say what it is", data)
	}
}

func TestReadSnapshotErrors(t *testing.T) {
	t.Parallel()
	rows := func(rows string) string {
		return `{"format": "fwdplan.snapshot.1", "ranks": 1, "left_out": {}, "rows": [` + rows + "]}"
	}
	for _, c := range []struct{ in, want string }{
		{"", "line 1: the snapshot is empty"},
		{"{\n\"ranks\": 1,\n]", "line 3: invalid character"},
		{rows(`{"tokens": 1, "passes": 1}`)[:60], "line 1: unexpected end"},
		{rows("") + "\n{}", "line 2: invalid character"},
		{`{"ranks": 1}`, `format is "", want "fwdplan.snapshot.1"`},
		{`[]`, "line 1: found a JSON array for the snapshot"},
		{rows("\n{\"tokens\": \"many\", \"passes\": 1}"),
			"line 2: found a JSON string for rows.tokens, want type int"},
		{rows(`{"tokens": 1, "passes": -1}`), "found a JSON number -1 for rows.passes"},
		{rows(`{"tokens": 1, "passes": 1, "speed": 1}`), `unknown field "speed"`},
		{rows(`{"tokens": 0, "passes": 1}`), "rows[0].tokens is 0, want 1 to"},
		{rows(`{"tokens": 2, "passes": 1}, {"tokens": 5, "captured": 4, "passes": 1}`),
			"rows[1].captured is 4, want 0, or 5"},
		{rows(`{"tokens": 2, "adapters": -1, "passes": 1}`), "rows[0].adapters is -1"},
		{rows(`{"tokens": 2, "passes": 0}`), "rows[0] has no passes"},
		{rows(`{"tokens": 2, "passes": 9007199254740992}`), "rows[0] has a number above"},
		{rows(`{"tokens": 2, "passes": 9007199254740991}, {"tokens": 3, "passes": 1}`),
			"rows[0] to rows[1] have more than"},
		{rows(`{"tokens": 2, "passes": 1}, {"tokens": 2, "passes": 1}`), "two rows have tokens 2"},
		{strings.Replace(rows(`{"tokens": 2, "passes": 1}`), `"ranks": 1`, `"ranks": 0`, 1), "ranks is 0"},
	} {
		got, err := fwdplan.ReadSnapshot(strings.NewReader(c.in))
		if err == nil || !errors.Is(err, fwd.ErrInvalid) || !strings.Contains(err.Error(), c.want) ||
			strings.Count(err.Error(), "fwd: ") != 1 {
			t.Errorf("%s: %+v, %v; want an error with %q", c.in, got, err, c.want)
		}
	}
}

func TestSnapshotSums(t *testing.T) {
	t.Parallel()
	a := snapshotOf(map[int]uint64{1: 10, 3: 5})
	b := snapshotOf(map[int]uint64{1: 2, 7: 1})
	b.LeftOut.Failed = 2
	sum, err := a.Merge(b)
	want := snapshotOf(map[int]uint64{1: 12, 3: 5, 7: 1})
	want.LeftOut.Failed = 2
	if err != nil || !reflect.DeepEqual(sum, want) {
		t.Errorf("the sum is %+v, %v; want %+v", sum, err, want)
	}
	if back, err := sum.Sub(a); err != nil || !reflect.DeepEqual(back, b) {
		t.Errorf("the sum without a is %+v, %v; want %+v", back, err, b)
	}
	if reflect.DeepEqual(a, sum) || a.Rows[0].Passes != 10 {
		t.Errorf("merging changed its argument: %+v", a)
	}
	if _, err := a.Sub(sum); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("a later snapshot was subtracted from an earlier one: %v", err)
	}
	other := b
	other.Name = "draft"
	if _, err := a.Merge(other); !errors.Is(err, fwd.ErrInvalid) ||
		!strings.Contains(err.Error(), `name "draft"`) {
		t.Errorf("snapshots of different Runners: %v", err)
	}
	huge := snapshotOf(map[int]uint64{1: 1<<53 - 1})
	if _, err := a.Merge(huge); !errors.Is(err, fwd.ErrInvalid) {
		t.Errorf("a sum that overflows: %v", err)
	}
}

func FuzzReadSnapshot(f *testing.F) {
	f.Add(`{"format":"fwdplan.snapshot.1","ranks":1,"rows":[{"tokens":5,"uniform":true,"passes":300}],` +
		`"left_out":{}}`)
	f.Fuzz(func(t *testing.T, in string) {
		s, err := fwdplan.ReadSnapshot(strings.NewReader(in))
		if err != nil {
			if !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%q: %v does not wrap ErrInvalid", in, err)
			}
			return
		}
		data, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		again, err := fwdplan.ReadSnapshot(strings.NewReader(string(data)))
		if err != nil || len(again.Rows) != len(s.Rows) {
			t.Errorf("%q became %s, %v", in, data, err)
		}
	})
}
