// This file tests the command: its table, its flags, and that natsdp and baselines carry the same
// bytes.

package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/natsdp"
	"github.com/google/go-cmp/cmp"
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
	for args, wants := range map[string][]string{
		"-ranks 2,3x2": {
			`(?m)^ranks +joined +natsdp +baseline +ratio +delivered +again$`,
			`(?m)^2 +\d+\.\d\d s +\d+, \d+ +bare \d+, \d+ +\d+\.\d\d, \d+\.\d\d +\d\.\d +\d+$`,
			`(?m)^3x2 +\d+\.\d\d s +[1-9]\d*, \d+ +bare [1-9]`,
			`(?m)^p50: 2 ranks / bare +\d+\.\d\d +1\.25 +(met|missed)$`,
		},
		"-goroutines -ranks 16": {
			`(?m)^16 +\d+\.\d\d s +[1-9]\d*, \d+ +gather [1-9]\d*, \d+ +\d+\.\d\d, \d+\.\d\d +\d+\.\d +\d+$`,
			`(?m)^delivered: 16 ranks +\d+\.\d\d +4 +(met|missed)$`,
		},
	} {
		t.Run(args, func(t *testing.T) {
			var out, errs bytes.Buffer
			args := append(strings.Fields(args), "-rounds", "50", "-turns", "2")
			if exit := run(t.Context(), args, &out, &errs); exit != 0 || errs.Len() > 0 {
				t.Fatalf("exit %d, stderr %s", exit, &errs)
			}
			for _, want := range append(wants, `MPI_Allgather`) {
				if !regexp.MustCompile(want).MatchString(out.String()) {
					t.Errorf("no %s in\n%s", want, &out)
				}
			}
			for line := range strings.Lines(out.String()) {
				if n := len([]rune(line)); n > 81 {
					t.Errorf("a line of %d columns: %s", n-1, line)
				}
			}
		})
	}
}

func TestFlags(t *testing.T) {
	for args, want := range map[string]options{
		"": {groups: []group{{2, 1}, {4, 1}, {8, 1}}, rounds: 10_000, turns: 5},
		"-ranks 2,1024,32x8 -goroutines -rounds 7 -turns 1": {
			groups: []group{{2, 1}, {1024, 1}, {32, 8}}, goroutines: true, rounds: 7, turns: 1,
		},
	} {
		var errs bytes.Buffer
		got, err := parseFlags(strings.Fields(args), &errs)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(options{}, group{})); err != nil || diff != "" {
			t.Errorf("%q: %v, stderr %s (-want +got)\n%s", args, err, &errs, diff)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"-ranks 1":        `"1" is not a number from 2 to 1024`,
		"-ranks 1025":     `"1025" is not a number from 2 to 1024`,
		"-ranks 2,,4":     `"" is not a number`,
		"-ranks 1x8":      `"1x8" is not a number`,
		"-ranks 8x0":      `"8x0" is not a number`,
		"-ranks 8x":       `"8x" is not a number`,
		"-ranks 32x33":    `"32x33" is not a number`,
		"-rounds 0":       "-rounds is 0",
		"-turns -1":       "-turns -1",
		"-rounds 1 extra": `unexpected arguments ["extra"]`,
	} {
		var out, errs bytes.Buffer
		exit := run(t.Context(), strings.Fields(args), &out, &errs)
		if exit != 2 || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit %d, stderr %s; want 2 and %s", args, exit, &errs, want)
		}
	}
}

// A message of a baseline is as long as one of natsdp with the same votes.
func TestSameBytes(t *testing.T) {
	s, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer stopServer(s)
	conn, err := natsdp.Connect(t.Context(), s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for name, test := range map[string]struct {
		group   group
		kind    string
		subject string
		votes   int // in a message
	}{
		"one":       {group{2, 1}, "natsdp", "fwd.dp.one.all.*", 1},
		"two":       {group{2, 2}, "natsdp", "fwd.dp.two.all.*", 2},
		"hub":       {group{16, 1}, "natsdp", "fwd.dp.hub.all.*", 16},
		"bare":      {group{2, 1}, "bare", "bare.bare.all", 1},
		"bareTwo":   {group{2, 2}, "bare", "bare.bareTwo.all", 2},
		"gathered":  {group{16, 1}, "gather", "bare.gathered.one", 1},
		"published": {group{16, 1}, "gather", "bare.published.all", 16},
	} {
		heard, err := conn.SubscribeSync(test.subject)
		if err == nil {
			err = conn.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
		j := job{
			Kind: test.kind, Group: name, URL: s.ClientURL(), Monitor: "http://" + s.MonitorAddr().String(),
			Size: test.group.size(), Rounds: 50,
		}
		if _, err := takeTurn(t.Context(), j, test.group, true); err != nil {
			t.Fatal(err)
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		lengths := map[int]int{}
		for {
			msg, err := heard.NextMsg(time.Millisecond)
			if err != nil {
				break
			}
			lengths[len(msg.Data)]++
		}
		// Joining and leaving have messages of other lengths. A rank of natsdp that votes again before its
		// vote is sent sends both in one.
		want, two := messageSize(test.votes), messageSize(2*test.votes)
		if lengths[want]+lengths[two] == 0 {
			t.Errorf("%s: no message of %d or %d bytes; numbers by length: %v", name, want, two, lengths)
		}
	}
}

// A rank that fails ends the turn, and the error says which it was.
func TestRankFails(t *testing.T) {
	j := job{Kind: "natsdp", URL: "nats://[no-host", Group: "fails", Size: 2, Rounds: 1}
	for _, goroutines := range []bool{false, true} {
		_, err := takeTurn(t.Context(), j, group{2, 1}, goroutines)
		if err == nil || !strings.Contains(err.Error(), "ranks [") {
			t.Errorf("goroutines %v: %v, want the rank that failed", goroutines, err)
		}
	}
}
