// Package sdk holds the tests of fwd that need the OpenTelemetry SDK. They check which spans and metrics a
// Runner emits, when these end, how far their attribute sets are bounded, and what recording costs.
//
// It is a module of its own, with tests only, so that the root module requires no SDK. A test that needs only
// the OpenTelemetry API belongs in the root.
package sdk
