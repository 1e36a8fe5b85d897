// Ranks that are started with different flags: which are refused, and which may differ.

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// runRanks runs ranks, each with its own flags beside the common ones, and returns how they exit and
// what they say.
func runRanks(t *testing.T, common []string, flags ...[]string) (exits []int, messages []string) {
	t.Helper()
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	defer nats.Shutdown()
	exits, messages = make([]int, len(flags)), make([]string, len(flags))
	var wg sync.WaitGroup
	for rank, own := range flags {
		wg.Go(func() {
			place := fmt.Sprintf("-nats %s -dp %d -rank %d -json", nats.ClientURL(), len(flags), rank)
			var out, errs bytes.Buffer
			exits[rank] = run(t.Context(), slices.Concat(strings.Fields(place), common, own), &out, &errs)
			messages[rank] = errs.String()
		})
	}
	wg.Wait()
	return exits, messages
}

// TestOtherFlags: every rank names the ranks that serve something else, and the flag.
func TestOtherFlags(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trace.csv")
	text := "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00,5,5\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		odd  string // flags of rank 1
		want string // what all say
	}{
		{"-requests 6", "ranks [1] were started with another -requests than rank 0; here it is "},
		{"-max-context 9", "ranks [1] were started with another -max-context than rank 0; here it is "},
		{"-speed 1e6 -chunk 3", "ranks [1] were started with another -speed than rank 0; here it is "},
		{"-chunk 3 -speed 1e6", "ranks [1] were started with another -chunk than rank 0; here it is "},
		{"-trace " + path, "ranks [1] were started with another -trace than rank 0; here it is one of "},
		{"-loras 2", "not like the others: ranks [1]): compare their flags -graph, -loras, "},
		{"-graph NONE", "not like the others: ranks [1]): compare their flags -graph, "},
	} {
		t.Run(c.odd, func(t *testing.T) {
			t.Parallel()
			exits, messages := runRanks(t, []string{"-max-context", "16"}, []string{"-requests", "12"},
				append([]string{"-requests", "12"}, strings.Fields(c.odd)...), []string{"-requests", "12"})
			for rank, message := range messages {
				if exits[rank] != 1 || !strings.Contains(message, c.want) {
					t.Errorf("rank %d: exit %d, stderr %q, want 1 and %q", rank, exits[rank], message, c.want)
				}
			}
		})
	}
}

// TestOverlapMayDiffer: ranks that overlap their steps and ranks that don't serve together.
func TestOverlapMayDiffer(t *testing.T) {
	t.Parallel()
	exits, messages := runRanks(t, strings.Fields("-requests 20 -max-context 30 -check"),
		[]string{"-overlap"}, nil, []string{"-overlap"})
	for rank, message := range messages {
		if exits[rank] != 0 || warning.ReplaceAllString(message, "") != "" {
			t.Errorf("rank %d: exit %d, stderr %q", rank, exits[rank], message)
		}
	}
}
