//go:build unix

// Package faults tests what the ranks of a run must survive when they are processes: some of them
// die, stand still or are taken for dead, and the network between them breaks, is slow, or has
// strangers in it.
//
// This file builds serve, cleans up after earlier runs of the tests, and waits.
package faults

import (
	"errors"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for something that must happen.
const patience = time.Minute

// binary is serve.
var binary string

func TestMain(m *testing.M) {
	if address := os.Getenv(asServer); address != "" {
		serveNATS(address)
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	for _, name := range os.Environ() { // no endpoint from outside
		if name, _, _ = strings.Cut(name, "="); strings.HasPrefix(name, "OTEL_") {
			os.Unsetenv(name)
		}
	}
	removeStale()
	dir := filepath.Join(os.TempDir(), ownName(os.Getpid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		log.Print(err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Setenv("TMPDIR", dir) // so that all files of the tests are there
	binary = filepath.Join(dir, "serve")
	build := exec.Command("go", "build", "-race="+raceDetector(), "-o", binary, "./serve")
	build.Dir = filepath.Join("..", "..", "examples")
	if out, err := build.CombinedOutput(); err != nil {
		log.Printf("building serve: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// raceDetector says whether these tests were built with the race detector. serve is built like
// them.
func raceDetector() string {
	info, ok := debug.ReadBuildInfo()
	race := debug.BuildSetting{Key: "-race", Value: "true"}
	return strconv.FormatBool(ok && slices.Contains(info.Settings, race))
}

// ownPrefix begins the names of things that the kernel does not remove when a process dies:
// directories and network namespaces.
const ownPrefix = "fwd-faults-"

func ownName(pid int) string { return ownPrefix + strconv.Itoa(pid) }

// isStale reports whether a name belongs to a process that has died. Before the tests begin, that
// includes a process that had the same id as this one.
func isStale(name string) bool {
	rest, own := strings.CutPrefix(name, ownPrefix)
	text, _, _ := strings.Cut(rest, "-")
	pid, err := strconv.Atoi(text)
	return own && err == nil && (pid == os.Getpid() || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH))
}

// removeStale removes what earlier runs of these tests left behind when they were killed.
func removeStale() {
	names, _ := fs.Glob(os.DirFS(os.TempDir()), ownPrefix+"*")
	for _, name := range names {
		if isStale(name) {
			os.RemoveAll(filepath.Join(os.TempDir(), name))
		}
	}
	removeStaleNamespaces()
}

// eventually waits until so returns true.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
