package fwd_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// readVectors reads a file of cases whose expected values the reference system computed, and checks how many there are:
// a file that lost its cases would pass everything.
func readVectors[T any](t *testing.T, name string, want int) []T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	if err != nil {
		t.Fatal(err)
	}
	var cases []T
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if len(cases) != want {
		t.Fatalf("%s has %d cases, want %d", name, len(cases), want)
	}
	return cases
}
