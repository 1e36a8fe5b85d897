// Package fwdplan finds out which capture sizes are worth having. An engine that captures graphs pads
// each batch to the next capture size, and a list of sizes that suits nobody's traffic pads much.
//
// [Sizes] counts the passes of a [fwd.Runner] by their exact size, for a few atomic operations a pass.
// Its [Snapshot] is plain data, which may be stored, merged with others and subtracted from later ones.
//
//	var sizes fwdplan.Sizes
//	runner, err := fwd.New(cfg, fwd.WithObserver(sizes.Observe))
//	...
//	plan, err := fwdplan.Choose(sizes.Snapshot(), fwdplan.Config{MaxGraphs: 16, Must: []int{512}})
//
// [Choose] returns the capture sizes that cost least: no other list with as many graphs costs less for
// the passes of the snapshot. The [Plan] says what its sizes cost, what one graph more or less would
// change, and how much traffic stands behind it. [Evaluate] says the same of any other list of sizes, or
// of the plan on a day that it has not seen.
package fwdplan
