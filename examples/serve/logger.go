package main

import (
	"context"
	"io"
	"log/slog"

	"go.opentelemetry.io/otel/trace"
)

// newLogger returns a logger of warnings, which name the trace that they belong to.
func newLogger(stderr io.Writer) *slog.Logger {
	return slog.New(inTrace{slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn})})
}

// inTrace is a handler that adds the trace of the context to each record.
type inTrace struct{ slog.Handler }

// Handle implements [slog.Handler].
func (h inTrace) Handle(ctx context.Context, r slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		r = r.Clone()
		r.AddAttrs(slog.String("trace_id", span.TraceID().String()), slog.String("span_id", span.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements [slog.Handler].
func (h inTrace) WithAttrs(attrs []slog.Attr) slog.Handler {
	return inTrace{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements [slog.Handler].
func (h inTrace) WithGroup(name string) slog.Handler { return inTrace{h.Handler.WithGroup(name)} }
