// This file gives tests what the package keeps to itself.

package fwd

// LastUBatchEmpty is tested by itself: the vectors have cases that no agreement reaches.
var LastUBatchEmpty = lastUBatchEmpty

// Fingerprint is tested by itself: a dense rank and a rank alone send it to nobody.
var Fingerprint = (*Runner).newFingerprint
