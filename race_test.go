//go:build race

package fwd_test

// raceEnabled says that the race detector is on, under which allocations count differently.
const raceEnabled = true
