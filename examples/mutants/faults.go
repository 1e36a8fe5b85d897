package main

import "slices"

// faults are the changes, each of a single place of the package, or of the engine where that overlaps its
// steps. A fault that no program could notice does not belong
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
	overlapFaults,
	ladderFaults,
)
