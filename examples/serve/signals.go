package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// counts say what became of a signal: of spans, or of the data points of metrics.
type counts struct{ ended, refused, sent, failed atomic.Int64 }

// exported counts n that an exporter had.
func (c *counts) exported(n int64, err error) {
	if err != nil {
		c.failed.Add(n)
	} else {
		c.sent.Add(n)
	}
}

// tally is a reading of counts.
type tally struct{ ended, refused, sent, failed int64 }

func (c *counts) read() tally {
	return tally{c.ended.Load(), c.refused.Load(), c.sent.Load(), c.failed.Load()}
}

// text says what became of a signal when nothing more is sent: what was not sent is lost.
func (s tally) text(what string) string {
	return fmt.Sprintf("%d %s ended, %d sent, %d dropped", s.ended, what, s.sent, s.ended-s.sent)
}

// queueSize returns how many spans may wait to be sent. A span takes about 2 KiB, so this is at most
// 128 MiB.
func queueSize(ranks int) int { return min(8192*ranks, 65536) }

// exportBatch is how many spans are sent together. Collectors take 4 MiB in one message.
const exportBatch = 1024

// spanQueue is a span processor that sends spans in batches. It lets no more wait than it has room
// for, so that what is dropped is known here, where it is counted.
type spanQueue struct {
	sdktrace.SpanProcessor
	exporter sdktrace.SpanExporter
	size     int
	waiting  atomic.Int64
	counts   counts
	problems *problems
}

func newSpanQueue(exporter sdktrace.SpanExporter, size int, p *problems) *spanQueue {
	q := &spanQueue{exporter: exporter, size: size, problems: p}
	q.SpanProcessor = sdktrace.NewBatchSpanProcessor(sending{q},
		sdktrace.WithMaxQueueSize(size), sdktrace.WithMaxExportBatchSize(cmp.Or(min(exportBatch, size/2), 1)))
	return q
}

// OnEnd implements [sdktrace.SpanProcessor].
func (q *spanQueue) OnEnd(s sdktrace.ReadOnlySpan) {
	if !s.SpanContext().IsSampled() {
		return
	}
	q.counts.ended.Add(1)
	if q.waiting.Add(1) > int64(q.size) {
		q.waiting.Add(-1)
		q.counts.refused.Add(1)
		return
	}
	q.SpanProcessor.OnEnd(s)
}

// sending is the exporter of a queue.
type sending struct{ queue *spanQueue }

// ExportSpans implements [sdktrace.SpanExporter].
func (s sending) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	q, n := s.queue, int64(len(spans))
	err := q.exporter.ExportSpans(ctx, spans)
	q.counts.exported(n, err)
	q.waiting.Add(-n)
	return q.problems.note(err)
}

// Shutdown implements [sdktrace.SpanExporter].
func (s sending) Shutdown(ctx context.Context) error { return s.queue.exporter.Shutdown(ctx) }

// pointCounter is an exporter of metrics that several readers share. It counts data points.
type pointCounter struct {
	sdkmetric.Exporter
	counts   counts
	problems *problems
}

// Export implements [sdkmetric.Exporter].
func (c *pointCounter) Export(ctx context.Context, data *metricdata.ResourceMetrics) error {
	n := countPoints(data)
	err := c.Exporter.Export(ctx, data)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		// The reader is shut down. It collects once more, and these points are sums since the start, so
		// nothing is lost with them.
		return nil
	}
	c.counts.ended.Add(n)
	c.counts.exported(n, err)
	return c.problems.note(err)
}

// Shutdown implements [sdkmetric.Exporter]. The exporter holds nothing, and other readers need it.
func (c *pointCounter) Shutdown(context.Context) error { return nil }

// countPoints returns how many data points there are.
func countPoints(data *metricdata.ResourceMetrics) (n int64) {
	for _, scope := range data.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Sum[float64]:
				n += int64(len(d.DataPoints))
			case metricdata.Gauge[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Gauge[float64]:
				n += int64(len(d.DataPoints))
			case metricdata.Histogram[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Histogram[float64]:
				n += int64(len(d.DataPoints))
			}
		}
	}
	return n
}

// observeQueue shows the counts as metrics, under the names that OpenTelemetry has for them. They
// are those of the process, and are sent with the metrics of its first rank.
func (t *telemetry) observeQueue(provider metric.MeterProvider) error {
	if t.conn == nil {
		return nil
	}
	meter := provider.Meter("github.com/forwardctx/fwd/examples/serve")
	counter := func(name, unit, what string) (metric.Int64ObservableCounter, error) {
		return meter.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(what))
	}
	processed, err1 := counter("otel.sdk.processor.span.processed", "{span}",
		"Spans that have ended; with error.type queue_full, those that were dropped.")
	spans, err2 := counter("otel.sdk.exporter.span.exported", "{span}",
		"Spans that were sent; with error.type, those that could not be.")
	points, err3 := counter("otel.sdk.exporter.metric_data_point.exported", "{data_point}",
		"Data points that were sent; with error.type, those that could not be.")
	queued, err4 := meter.Int64ObservableUpDownCounter("otel.sdk.processor.span.queue.size",
		metric.WithUnit("{span}"), metric.WithDescription("Spans that wait to be sent."))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	const processor, exporter, pointExporter = "batching_span_processor", "otlp_grpc_span_exporter",
		"otlp_grpc_metric_exporter"
	_, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s, p := t.spans.counts.read(), t.points.counts.read()
		o.ObserveInt64(processed, s.ended-s.refused, component(processor, ""))
		o.ObserveInt64(processed, s.refused, component(processor, "queue_full"))
		o.ObserveInt64(queued, t.spans.waiting.Load(), component(processor, ""))
		o.ObserveInt64(spans, s.sent, component(exporter, ""))
		o.ObserveInt64(spans, s.failed, component(exporter, "_OTHER"))
		o.ObserveInt64(points, p.sent, component(pointExporter, ""))
		o.ObserveInt64(points, p.failed, component(pointExporter, "_OTHER"))
		return nil
	}, processed, spans, points, queued)
	return err
}

func component(kind, errorType string) metric.ObserveOption {
	attrs := []attribute.KeyValue{
		attribute.String("otel.component.type", kind), attribute.String("otel.component.name", kind+"/0"),
	}
	if errorType != "" {
		attrs = append(attrs, attribute.String("error.type", errorType))
	}
	return metric.WithAttributes(attrs...)
}
