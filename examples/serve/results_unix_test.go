//go:build unix

// Named pipes in the place of a file of results.

package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestResultsPipe: a named pipe that nobody reads is refused immediately.
func TestResultsPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	requests, _ := resultRequests()
	if _, err := openResults(path, requests); err == nil ||
		!strings.Contains(err.Error(), "results "+path+": it is no regular file (p") {
		t.Errorf("%v", err)
	}
}
