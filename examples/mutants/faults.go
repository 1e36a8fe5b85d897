package main

import "slices"

// faults are the changes, each of a single place. A fault that no program could notice does not belong
// here.
var faults = slices.Concat(
	arithmeticFaults,
	coordinationFaults,
	planningFaults,
	microbatchFaults,
	contextFaults,
	runningFaults,
	graphFaults,
	telemetryFaults,
	ladderFaults,
)
