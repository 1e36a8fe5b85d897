// This file gives tests what the package keeps to itself.

package fwd

// LastUBatchEmpty is tested by itself: the vectors have cases that no agreement reaches.
var LastUBatchEmpty = lastUBatchEmpty
