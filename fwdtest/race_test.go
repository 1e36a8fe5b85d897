// This file says whether the race detector is on.

//go:build race

package fwdtest_test

const raceDetector = true
