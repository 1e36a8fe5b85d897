package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestMain lets the test's own executable be a rank, as the command's is.
func TestMain(m *testing.M) {
	if _, ok := os.LookupEnv(jobVariable); ok {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestTable(t *testing.T) {
	var out, errs bytes.Buffer
	if exit := run(t.Context(), []string{"-ranks", "2,3", "-rounds", "50", "-turns", "2"}, &out, &errs); exit != 0 || errs.Len() > 0 {
		t.Fatalf("exit %d, stderr %s", exit, &errs)
	}
	for _, want := range []string{`(?m)^ranks +natsdp p50, p99 \(µs\) +bare `, `(?m)^2 +\d+, \d+ +\d+, \d+ +\d+\.\d\d +\d+\.\d\d$`, `(?m)^3 +[1-9]`} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("no %s in\n%s", want, &out)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"-ranks 1":        `"1" is not a number from 2 to 64`,
		"-ranks 2,,4":     `"" is not a number`,
		"-rounds 0":       "-rounds is 0",
		"-turns -1":       "-turns -1",
		"-rounds 1 extra": `unexpected arguments ["extra"]`,
	} {
		var out, errs bytes.Buffer
		if exit := run(t.Context(), strings.Fields(args), &out, &errs); exit != 2 || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit %d, stderr %s; want 2 and %s", args, exit, &errs, want)
		}
	}
}

// A rank that fails ends the turn, and says which it was.
func TestRankFails(t *testing.T) {
	_, err := takeTurn(t.Context(), job{Kind: "natsdp", URL: "nats://[no-host", Group: "fails", Size: 2, Rounds: 1})
	if err == nil || !strings.Contains(err.Error(), "rank ") {
		t.Errorf("%v, want the rank that failed", err)
	}
}
