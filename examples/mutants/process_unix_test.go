//go:build unix

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestStartStops: a program that hangs is stopped with the processes that it has started.
func TestStartStops(t *testing.T) {
	dir := t.TempDir()
	script := "sleep 100 & echo $! >child; echo here; wait"
	output, err := start(t.Context(),
		command{name: "sh", args: []string{"-c", script}, dir: dir, timeout: time.Second})
	if !errors.Is(err, context.DeadlineExceeded) || output != "here\n" {
		t.Errorf("%v, %q", err, output)
	}
	text, err := os.ReadFile(filepath.Join(dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	// A killed process stays until someone has asked for its exit status, and that takes init a moment.
	for range 100 {
		if err = syscall.Kill(pid, 0); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	state, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if !strings.Contains(string(state), ") Z ") {
		t.Errorf("process %d still runs", pid)
	}
}

func TestStartFails(t *testing.T) {
	output, err := start(t.Context(),
		command{name: "sh", args: []string{"-c", "echo no >&2; exit 3"}, timeout: time.Minute})
	if !isExit(err) || output != "no\n" {
		t.Errorf("%v, %q", err, output)
	}
	_, err = start(t.Context(), command{name: "no-such-program", timeout: time.Minute})
	if err == nil || isExit(err) {
		t.Errorf("a program that is not there: %v", err)
	}
}
