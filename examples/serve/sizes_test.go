// Tests of the sizes of graphs and batches: what the flags take, and what is written about a run.

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/forwardctx/fwd/fwdplan"
	"github.com/google/go-cmp/cmp"
)

// TestCaptureSizes: -capture-sizes takes a list, or a file with a list or a plan.
func TestCaptureSizes(t *testing.T) {
	for name, c := range map[string]struct {
		text, file string // the file's contents, if text is empty
		want       []int
		err        string
	}{
		"list":           {text: "1,2, 8", want: []int{1, 2, 8}},
		"one":            {text: "16", want: []int{16}},
		"nothing":        {text: "", file: " ", err: "no sizes"},
		"zero":           {text: "1,0", err: `"0" is not a size`},
		"negative":       {text: "-4", err: `"-4" is not a size`},
		"no such file":   {text: "nowhere/sizes", err: "no such file"},
		"file":           {file: "1\n2,4\n", want: []int{1, 2, 4}},
		"plan":           {file: `{"plan":{"sizes":[3,16]}}`, want: []int{3, 16}},
		"separate sizes": {file: `{"plan":{"sizes":[3],"mixed_sizes":[4]}}`, err: "of their own for mixed batches"},
		"no plan":        {file: `{"plan":{}}`, err: "a plan without sizes"},
		"another file":   {file: `{"passes":3}`, err: "neither a list of sizes"},
	} {
		t.Run(name, func(t *testing.T) {
			text := c.text
			if text == "" {
				text = filepath.Join(t.TempDir(), "sizes")
				if err := os.WriteFile(text, []byte(c.file), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var got captureSizes
			err := got.Set(text)
			if c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) || c.err == "" && err != nil {
				t.Errorf("%v, want %q", err, c.err)
			}
			if diff := cmp.Diff(c.want, got.sizes); diff != "" {
				t.Errorf("sizes (-want +got):\n%s", diff)
			}
		})
	}
}

// TestSizes: what a run saw goes into a file, from which a plan is made, with which the next run pads
// less.
func TestSizes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sizes.json")
	serve := func(args ...string) (r report) {
		exit, out, errs := runServe(t, append(args, "-requests", "60", "-max-context", "20", "-json")...)
		if err := json.Unmarshal([]byte(out), &r); err != nil || exit != 0 {
			t.Fatalf("exit %d, %v, stderr %q", exit, err, errs)
		}
		return r
	}
	before := serve("-sizes", file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var seen fwdplan.Snapshot
	if err := json.Unmarshal(data, &seen); err != nil {
		t.Fatal(err)
	}
	passes := uint64(0)
	for _, row := range seen.Rows {
		passes += row.Passes + row.Dummies
	}
	if want := uint64(before.Steps * 4); passes != want || seen.Ranks != 4 {
		t.Errorf("%d passes of %d ranks in %s, want %d of 4", passes, seen.Ranks, data, want)
	}
	plan, err := fwdplan.Choose(seen, fwdplan.Config{MaxGraphs: 12, Must: []int{16}})
	if err != nil {
		t.Fatal(err)
	}
	text, _ := json.Marshal(plan.Sizes)
	after := serve("-capture-sizes", strings.Trim(string(text), "[]"))
	if after.Padding.Graph >= before.Padding.Graph {
		t.Errorf("sizes %s pad %d tokens, the default ones %d", text, after.Padding.Graph, before.Padding.Graph)
	}
	if left, err := filepath.Glob(file + ".*"); err != nil || len(left) > 0 {
		t.Errorf("%v beside the file, %v", left, err)
	}
}

// TestReplan: the answers stay right while the graphs change, and the figures say what that was worth.
func TestReplan(t *testing.T) {
	args := strings.Fields("-check -json -dp 3 -requests 90 -max-context 20 -spec 1 -replan 30")
	for _, processes := range []bool{false, true} {
		if processes {
			args = append(args, "-processes")
		}
		p := start(t, args...)
		r := p.report()
		if *r.Check != (checkReport{Requests: 90, Agreed: 90}) || r.LadderChanges == 0 || r.FailedSteps > 0 {
			t.Errorf("%v: check %+v, %d changes, %d failed steps", args, r.Check, r.LadderChanges, r.FailedSteps)
		}
		steps, captured := 0, 0
		for _, l := range r.Ladders {
			steps += l.Steps
			captured += l.Captured
		}
		if steps != r.Steps || captured <= r.Ladders[0].Graphs {
			t.Errorf("%v: %d steps of ladders, %d in all; ladders %+v", args, steps, r.Steps, r.Ladders)
		}
	}
	for args, want := range map[string]string{
		"-replan -1":            "serve: -replan is -1, want at least 0",
		"-replan 9 -graph NONE": "serve: -replan is 9 with -graph NONE, which has no graphs",
	} {
		if exit, _, errs := runServe(t, strings.Fields(args)...); exit != 2 || !strings.Contains(errs, want) {
			t.Errorf("%s: exit %d, stderr %q", args, exit, errs)
		}
	}
}
