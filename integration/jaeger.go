// Package integration shows what the spans and metrics of fwd are good for once they are in Jaeger
// and Prometheus. Its tests run the real programs. The code that reads a trace back ([Jaeger]), and
// that finds out which rank held up a step ([SlowestRank], [LoweringRank]), is here to be copied.
package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// Span is a span as Jaeger keeps it.
type Span struct {
	// The ids are hexadecimal. A span without a parent has an empty ParentSpanID.
	TraceID, SpanID, ParentSpanID string

	Service, Scope, ScopeVersion string

	Name       string
	Kind       trace.SpanKind
	Start, End time.Time
	Links      []Link

	// Attributes are of type string, int64, float64, bool, or []any with elements of these types.
	Attributes map[string]any

	// Error says that the status is Error. Message is the text of the status.
	Error   bool
	Message string

	// Warnings are what Jaeger itself says about the span. For example, if a span does not lie inside its
	// parent, Jaeger assumes that their clocks differ.
	Warnings []string
}

// Link is a link from a span to another one.
type Link struct{ TraceID, SpanID string }

// Operation returns the first word of the span's name, such as fwd.forward. The other words say how it
// went.
func (s *Span) Operation() string {
	operation, _, _ := strings.Cut(s.Name, " ")
	return operation
}

// Rank returns the rank that the span is of. A microbatch has none; its parent has.
func (s *Span) Rank() (rank int, ok bool) { return s.int("fwd.dp.rank") }

func (s *Span) int(key string) (n int, ok bool) {
	i, ok := s.Attributes[key].(int64)
	return int(i), ok
}

// Duration returns how long the span took.
func (s *Span) Duration() time.Duration { return s.End.Sub(s.Start) }

// Jaeger is the address of Jaeger v2's query API, such as http://localhost:16686.
type Jaeger string

// Find returns the ids of at most limit traces of a service that have a span with all these
// attributes. The values are written as in Jaeger's search box: 3 as "3" and true as "true".
func (j Jaeger) Find(
	ctx context.Context, service string, tags map[string]string, limit int,
) ([]string, error) {
	query := url.Values{"service": {service}, "limit": {strconv.Itoa(limit)}, "lookback": {"1h"}}
	if len(tags) > 0 {
		encoded, err := json.Marshal(tags)
		if err != nil {
			return nil, err
		}
		query.Set("tags", string(encoded))
	}
	var found struct{ Data []struct{ TraceID string } }
	err := j.get(ctx, "/api/traces?"+query.Encode(), func(d *json.Decoder) error { return d.Decode(&found) })
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(found.Data))
	for i, trace := range found.Data {
		ids[i] = trace.TraceID
	}
	return ids, nil
}

// Trace returns the spans of a trace.
func (j Jaeger) Trace(ctx context.Context, id string) ([]Span, error) {
	return j.spans(ctx, "/api/v3/traces/"+id)
}

// Spans returns the spans of at most limit traces of a service that began at since or later.
func (j Jaeger) Spans(ctx context.Context, service string, since time.Time, limit int) ([]Span, error) {
	query := url.Values{
		"query.service_name":   {service},
		"query.start_time_min": {since.UTC().Format(time.RFC3339Nano)},
		"query.start_time_max": {time.Now().Add(time.Minute).UTC().Format(time.RFC3339Nano)},
		"query.num_traces":     {strconv.Itoa(limit)},
	}
	return j.spans(ctx, "/api/v3/traces?"+query.Encode())
}

func (j Jaeger) spans(ctx context.Context, path string) ([]Span, error) {
	var spans []Span
	err := j.get(ctx, path, func(d *json.Decoder) error {
		for { // the answer is a sequence of JSON values
			var part struct {
				Result struct{ ResourceSpans []resourceSpans }
			}
			if err := d.Decode(&part); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			for _, r := range part.Result.ResourceSpans {
				spans = r.appendTo(spans)
			}
		}
	})
	return spans, err
}

func (j Jaeger) get(ctx context.Context, path string, decode func(*json.Decoder) error) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, string(j)+path, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusNotFound {
		return nil // nothing found, or not yet
	}
	if response.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return fmt.Errorf("jaeger: %s: %s: %s", path, response.Status, body)
	}
	if err := decode(json.NewDecoder(response.Body)); err != nil {
		return fmt.Errorf("jaeger: %s: %w", path, err)
	}
	return nil
}

// resourceSpans is the part of OTLP in JSON that is needed here.
type resourceSpans struct {
	Resource   struct{ Attributes attributes }
	ScopeSpans []struct {
		Scope struct{ Name, Version string }
		Spans []struct {
			TraceID, SpanID, ParentSpanID      string
			Name                               string
			Kind                               trace.SpanKind // OTLP has the same numbers
			StartTimeUnixNano, EndTimeUnixNano int64          `json:",string"`
			Attributes                         attributes
			Links                              []Link
			Status                             struct {
				Code    int
				Message string
			}
		}
	}
}

func (r *resourceSpans) appendTo(spans []Span) []Span {
	service, _ := r.Resource.Attributes.decode()["service.name"].(string)
	for _, scope := range r.ScopeSpans {
		for _, s := range scope.Spans {
			attributes := s.Attributes.decode()
			spans = append(spans, Span{
				TraceID: s.TraceID, SpanID: s.SpanID, ParentSpanID: s.ParentSpanID,
				Service: service, Scope: scope.Scope.Name, ScopeVersion: scope.Scope.Version,
				Name:       s.Name,
				Kind:       s.Kind,
				Start:      time.Unix(0, s.StartTimeUnixNano),
				End:        time.Unix(0, s.EndTimeUnixNano),
				Warnings:   takeWarnings(attributes),
				Attributes: attributes,
				Links:      s.Links,
				Error:      s.Status.Code == 2,
				Message:    s.Status.Message,
			})
		}
	}
	return spans
}

// takeWarnings takes Jaeger's own attribute away from those of a span.
func takeWarnings(attributes map[string]any) (warnings []string) {
	const key = "@jaeger@warnings"
	all, _ := attributes[key].([]any)
	for _, w := range all {
		if text, ok := w.(string); ok {
			warnings = append(warnings, text)
		}
	}
	delete(attributes, key)
	return warnings
}

type attributes []struct {
	Key   string
	Value value
}

func (as attributes) decode() map[string]any {
	values := make(map[string]any, len(as))
	for _, a := range as {
		values[a.Key] = a.Value.decode()
	}
	return values
}

type value struct {
	StringValue *string
	IntValue    *int64 `json:",string"`
	DoubleValue *float64
	BoolValue   *bool
	ArrayValue  *struct{ Values []value }
}

func (v *value) decode() any {
	switch {
	case v.StringValue != nil:
		return *v.StringValue
	case v.IntValue != nil:
		return *v.IntValue
	case v.DoubleValue != nil:
		return *v.DoubleValue
	case v.BoolValue != nil:
		return *v.BoolValue
	case v.ArrayValue != nil:
		all := make([]any, len(v.ArrayValue.Values))
		for i := range all {
			all[i] = v.ArrayValue.Values[i].decode()
		}
		return all
	}
	return nil
}
