// This file says whether the race detector is on.

//go:build race

package main

// raceEnabled says that the race detector is on, which makes everything slower.
const raceEnabled = true
