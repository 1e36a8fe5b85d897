// The table of the ladders, and bad flags.

package main

import (
	"bytes"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/forwardctx/fwd/examples/engine"
)

// TestLadders: each list of sizes has a row with its figures.
func TestLadders(t *testing.T) {
	var out, errs bytes.Buffer
	args := strings.Fields("-requests 40 -turns 2 -max-seqs 8 -max-context 4")
	if err := run(t.Context(), args, &out, &errs); err != nil || errs.Len() > 0 {
		t.Fatal(err, &errs)
	}
	number := `[0-9.]+( \([0-9.]+ to [0-9.]+\))?`
	figures := strings.Repeat(` +`+number, 5)
	for _, want := range []string{
		`^20 requests to plan from, 20 to serve, 2 times with each list of sizes\n`,
		`(?m)^default +4` + figures + `$`, `(?m)^plan, at most 4 +4` + figures + `$`,
		`(?m)^plan, at most 2 +2` + figures + `$`,
	} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("no %s in\n%s", want, &out)
		}
	}
}

// TestHalves: the second half begins when its first request arrives.
func TestHalves(t *testing.T) {
	all := []engine.Request{{ID: 0}, {ID: 1, Arrival: 5}, {ID: 2, Arrival: 7}, {ID: 3, Arrival: 9}}
	first, second := halves(all)
	ids := func(requests []engine.Request) (ids []int) {
		for _, r := range requests {
			ids = append(ids, r.ID)
		}
		return ids
	}
	if !slices.Equal(ids(first), []int{0, 1}) || !slices.Equal(ids(second), []int{2, 3}) ||
		second[0].Arrival != 0 || second[1].Arrival != 2 || all[2].Arrival != 7 {
		t.Errorf("%+v, %+v of %+v", first, second, all)
	}
}

func TestMedian(t *testing.T) {
	var l ladder
	for _, n := range []int{7, 1, 4, 3} {
		l.turns = append(l.turns, served{Stats: engine.Stats{Steps: n}})
	}
	steps := func(t *served) float64 { return float64(t.Steps) }
	if got := l.of(1, steps); got != "3.5 (1.0 to 7.0)" {
		t.Errorf("%q", got)
	}
	l.turns = l.turns[:1]
	if got := l.of(0, steps); got != "7" {
		t.Errorf("%q", got)
	}
}

func TestBadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"-requests 1":        "-requests 1",
		"-turns 0":           "-turns 0",
		"-max-context -1":    "-max-context -1",
		"trace.csv":          `arguments ["trace.csv"]`,
		"-trace no-such":     "no-such",
		"-dp -2 -max-seqs 0": "DataParallelSize is -2",
	} {
		var out, errs bytes.Buffer
		err := run(t.Context(), strings.Fields(args), &out, &errs)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}
