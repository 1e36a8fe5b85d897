package fwdtrace

import (
	"context"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// SkipIdle returns a span processor that passes spans on to next when they end, but for those of
// steps in which nobody ran: their fwd.step IDLE, and the fwd.coordinate of every rank. Each of these
// spans says so itself, so nothing is held back to wait for others. Failed spans, and those of a
// warm-up, are always passed on. It panics if next is nil.
func SkipIdle(next sdktrace.SpanProcessor) sdktrace.SpanProcessor {
	if next == nil {
		panic("fwdtrace: SkipIdle(nil): want a span processor")
	}
	return &skipIdle{next}
}

type skipIdle struct{ next sdktrace.SpanProcessor }

// OnStart implements [sdktrace.SpanProcessor]. A span that starts may become any.
func (p *skipIdle) OnStart(parent context.Context, s sdktrace.ReadWriteSpan) {
	p.next.OnStart(parent, s)
}

// OnEnd implements [sdktrace.SpanProcessor].
func (p *skipIdle) OnEnd(s sdktrace.ReadOnlySpan) {
	if !isIdle(s) {
		p.next.OnEnd(s)
	}
}

// Shutdown implements [sdktrace.SpanProcessor].
func (p *skipIdle) Shutdown(ctx context.Context) error { return p.next.Shutdown(ctx) }

// ForceFlush implements [sdktrace.SpanProcessor].
func (p *skipIdle) ForceFlush(ctx context.Context) error { return p.next.ForceFlush(ctx) }

// isIdle reports whether a span is of a step in which all ranks were idle. A dummy pass is in a step
// in which some rank was not.
func isIdle(s sdktrace.ReadOnlySpan) bool {
	if s.InstrumentationScope().Name != fwd.ScopeName || s.Status().Code == codes.Error {
		return false
	}
	var idle, size int64
	for _, a := range s.Attributes() {
		switch a.Key {
		case idleRanks:
			idle = a.Value.AsInt64()
		case dpSize:
			size = a.Value.AsInt64()
		}
	}
	return idle > 0 && idle == size
}

// The attributes that fwd sets.
const (
	idleRanks = attribute.Key("fwd.idle_ranks")
	dpSize    = attribute.Key("fwd.dp.size")
)
