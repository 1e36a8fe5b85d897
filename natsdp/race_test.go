// This file says whether the race detector is on.

//go:build race

package natsdp

const RaceDetector = true
