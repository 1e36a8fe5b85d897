// This file says whether the race detector is on.

//go:build !race

package fwdplan_test

// raceEnabled says that the race detector is on. It makes the code under test allocate more.
const raceEnabled = false
