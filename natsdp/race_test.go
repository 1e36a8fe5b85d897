//go:build race

package natsdp_test

// raceDetector says that tests run with the race detector, in which large groups take minutes.
const raceDetector = true
