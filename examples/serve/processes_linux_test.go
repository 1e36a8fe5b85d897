// Processes that end in ways that only Linux tells their parent.

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// children returns the processes that a program has started and that still run, by rank.
func (p *program) children() map[int]int {
	p.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		p.Fatal(err)
	}
	ranks := map[int]int{}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := bytes.Cut(stat, []byte(") ")) // after the name
		fields := strings.Fields(string(rest))
		if fields[0] == "Z" || fields[1] != strconv.Itoa(p.cmd.Process.Pid) {
			continue
		}
		args, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			p.Fatal(err)
		}
		for arg := range strings.SplitSeq(string(args), "\x00") {
			if value, ok := strings.CutPrefix(arg, "-rank="); ok {
				rank, err := strconv.Atoi(value)
				if err != nil {
					p.Fatal(err)
				}
				ranks[rank] = pid
			}
		}
	}
	return ranks
}

// gone reports whether none of processes runs any more.
func gone(ranks map[int]int) bool {
	for _, pid := range ranks {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err == nil && !bytes.Contains(stat, []byte(") Z ")) {
			return false
		}
	}
	return true
}

// TestProcessesKilled: a rank that dies ends the run, long before the others miss it, and nobody is
// left. What they say then is not shown.
func TestProcessesKilled(t *testing.T) {
	results := filepath.Join(t.TempDir(), "results")
	p := start(t, strings.Fields("-processes -dp 3 -speed 2 -exchange-timeout 1h -results "+results)...)
	eventually(t, "results of rank 2", hasResults(results+".2", 3))
	ranks := p.children()
	if len(ranks) != 3 {
		t.Fatalf("the processes are %v, want 3", ranks)
	}
	if err := syscall.Kill(ranks[2], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	exit := p.wait()
	if exit != 1 || p.stdout.Len() > 0 || p.complaints() != "serve: rank 2: signal: killed\n" {
		t.Errorf("exit %d, stdout %q, stderr %q", exit, &p.stdout, &p.stderr)
	}
	if !gone(ranks) {
		t.Errorf("some of the processes %v are left", ranks)
	}
}

// TestProcessesLauncherKilled: the processes don't outlive the one that started them, whatever they
// wait for.
func TestProcessesLauncherKilled(t *testing.T) {
	p := start(t, "-processes", "-dp", "2", "-speed", "0.01", "-exchange-timeout", "1h", "-join-timeout", "1h")
	var ranks map[int]int
	eventually(t, "all processes run", func() bool {
		ranks = p.children()
		return len(ranks) == 2
	})
	p.signal(syscall.SIGKILL)
	p.wait()
	eventually(t, "the processes are gone", func() bool { return gone(ranks) })
}
