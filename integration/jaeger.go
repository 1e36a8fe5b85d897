// Package integration shows what the spans and metrics of fwd are good for once they are in Jaeger and Prometheus. Its tests
// run the real programs; what they use to read a trace back ([Jaeger]) and to learn from it which rank held up a step
// ([SlowestRank], [LoweringRank]) is here to be copied.
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
	"time"
)

// Span is a span as Jaeger keeps it.
type Span struct {
	TraceID, SpanID, ParentSpanID string // hexadecimal; no parent: empty
	Service, Scope, ScopeVersion  string
	Name                          string
	Start, End                    time.Time
	Attributes                    map[string]any // string, int64, float64 or bool
	Links                         []Link
	Error                         bool   // the status
	Message                       string // of the status
}

// Link is a link from a span to another one.
type Link struct{ TraceID, SpanID string }

// Duration returns how long the span took.
func (s *Span) Duration() time.Duration { return s.End.Sub(s.Start) }

// Jaeger is the query API of Jaeger v2 at an address as http://localhost:16686.
type Jaeger string

// Find returns the ids of at most limit traces of a service that have a span with all these attributes. Values are as
// Jaeger's search box wants them, 3 as "3" and true as "true".
func (j Jaeger) Find(ctx context.Context, service string, tags map[string]string, limit int) ([]string, error) {
	query := url.Values{"service": {service}, "limit": {strconv.Itoa(limit)}, "lookback": {"1h"}}
	if len(tags) > 0 {
		encoded, err := json.Marshal(tags)
		if err != nil {
			return nil, err
		}
		query.Set("tags", string(encoded))
	}
	var found struct{ Data []struct{ TraceID string } }
	if err := j.get(ctx, "/api/traces?"+query.Encode(), func(d *json.Decoder) error { return d.Decode(&found) }); err != nil {
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

// Spans returns the spans of at most limit traces of a service that began since then.
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
		for { // one answer after the other
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

// resourceSpans is OTLP in JSON, as far as it is needed.
type resourceSpans struct {
	Resource   struct{ Attributes attributes }
	ScopeSpans []struct {
		Scope struct{ Name, Version string }
		Spans []struct {
			TraceID, SpanID, ParentSpanID      string
			Name                               string
			StartTimeUnixNano, EndTimeUnixNano int64 `json:",string"`
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
			spans = append(spans, Span{
				TraceID: s.TraceID, SpanID: s.SpanID, ParentSpanID: s.ParentSpanID,
				Service: service, Scope: scope.Scope.Name, ScopeVersion: scope.Scope.Version,
				Name:       s.Name,
				Start:      time.Unix(0, s.StartTimeUnixNano),
				End:        time.Unix(0, s.EndTimeUnixNano),
				Attributes: s.Attributes.decode(),
				Links:      s.Links,
				Error:      s.Status.Code == 2,
				Message:    s.Status.Message,
			})
		}
	}
	return spans
}

type attributes []struct {
	Key   string
	Value struct {
		StringValue *string
		IntValue    *int64 `json:",string"`
		DoubleValue *float64
		BoolValue   *bool
	}
}

func (as attributes) decode() map[string]any {
	values := make(map[string]any, len(as))
	for _, a := range as {
		switch v := a.Value; {
		case v.StringValue != nil:
			values[a.Key] = *v.StringValue
		case v.IntValue != nil:
			values[a.Key] = *v.IntValue
		case v.DoubleValue != nil:
			values[a.Key] = *v.DoubleValue
		case v.BoolValue != nil:
			values[a.Key] = *v.BoolValue
		}
	}
	return values
}
