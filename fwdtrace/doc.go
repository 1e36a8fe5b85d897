// Package fwdtrace keeps down what the traces of [fwd] cost, with the SDK of OpenTelemetry: which
// spans are sent, and which are recorded in the first place.
//
// [SkipIdle] holds back the steps in which nobody ran. An engine without requests takes such a step
// again and again, and they say nothing.
//
// [SampleLinked] samples requests and steps alike. They are traces of their own that link to each
// other, since a request takes part in many steps and a step serves many requests. If each trace
// were sampled by itself, most of these links would lead nowhere.
//
//	provider := sdktrace.NewTracerProvider(
//		sdktrace.WithSampler(fwdtrace.SampleLinked(sdktrace.TraceIDRatioBased(0.01))),
//		sdktrace.WithSpanProcessor(fwdtrace.SkipIdle(sdktrace.NewBatchSpanProcessor(exporter))),
//	)
//
// All ranks need the same sampler. None of this keeps anything in memory.
package fwdtrace
