// This file tests the command: its table, its flags, and that both sides carry the same bytes.

package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/natsdp"
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
	args := []string{"-ranks", "2,3", "-rounds", "50", "-turns", "2"}
	if exit := run(t.Context(), args, &out, &errs); exit != 0 || errs.Len() > 0 {
		t.Fatalf("exit %d, stderr %s", exit, &errs)
	}
	for _, want := range []string{
		`(?m)^ranks +natsdp p50, p99 \(µs\) +bare `,
		`(?m)^2 +\d+, \d+ +\d+, \d+ +\d+\.\d\d +\d+\.\d\d$`,
		`(?m)^3 +[1-9]`,
	} {
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
		exit := run(t.Context(), strings.Fields(args), &out, &errs)
		if exit != 2 || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit %d, stderr %s; want 2 and %s", args, exit, &errs, want)
		}
	}
}

// A vote of natsdp and a message of bare have the same length on the wire.
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
	heard, err := conn.SubscribeSync(">")
	if err == nil {
		err = conn.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range kinds {
		j := job{Kind: kind, URL: s.ClientURL(), Group: "same", Size: 1}
		round, end, err := j.start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = round(t.Context(), 2)
		end()
		if err != nil {
			t.Fatal(err)
		}
		// Of the messages to the whole group, those of joining and leaving are shorter.
		longest := 0
		for {
			msg, err := heard.NextMsg(200 * time.Millisecond)
			if err != nil {
				break
			}
			if kind == "bare" && !strings.HasPrefix(msg.Subject, "bare.") {
				continue
			}
			longest = max(longest, len(msg.Data))
		}
		if longest != voteSize {
			t.Errorf("the longest message of %s has %d bytes, want %d", kind, longest, voteSize)
		}
	}
}

// A rank that fails ends the turn, and the error says which it was.
func TestRankFails(t *testing.T) {
	j := job{Kind: "natsdp", URL: "nats://[no-host", Group: "fails", Size: 2, Rounds: 1}
	_, err := takeTurn(t.Context(), j)
	if err == nil || !strings.Contains(err.Error(), "rank ") {
		t.Errorf("%v, want the rank that failed", err)
	}
}
