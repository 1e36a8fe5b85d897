// Package fwd carries the forward context of an inference engine.
package fwd
