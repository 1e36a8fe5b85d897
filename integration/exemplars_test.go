// Tests of exemplars: they lead from a bucket of a histogram to the trace of a step.

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
)

// TestExemplars: what Prometheus scrapes from the configuration to copy has exemplars, and the trace
// of each is a step in Jaeger that has the pass which the exemplar is of.
func TestExemplars(t *testing.T) {
	s := newService(t, "grpc")
	exporter, err := otlpmetricgrpc.New(t.Context(),
		otlpmetricgrpc.WithEndpoint(s.grpc), otlpmetricgrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	provider := sdkmetric.NewMeterProvider(
		sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(time.Hour))),
		sdkmetric.WithResource(resource.NewSchemaless(attribute.String("service.name", s.name))))
	g := newGroup(t, fwd.DispatcherConfig{
		Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{1, 2, 4}, MaxNumSeqs: 4,
	}, fwd.ParallelConfig{}, fwd.WithStepTrace(),
		fwd.WithTracerProvider(s.provider), fwd.WithMeterProvider(provider))
	g.takeAll(t, onAll(tokens(1)))
	g.takeAll(t, onAll(tokens(9)))
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.spans(t) // Jaeger has them

	var found []passExemplar
	eventually(t, func(ctx context.Context) error {
		found, err = passExemplars(ctx, s.metrics, s.name)
		if err == nil && len(found) == 0 {
			err = errors.New("no bucket of fwd_forward_duration_seconds has an exemplar")
		}
		return err
	})
	for _, e := range found {
		spans := s.trace(t, e.traceID)
		pass := slices.IndexFunc(spans, func(s Span) bool { return s.SpanID == e.spanID })
		if steps := named(spans, "fwd.step"); len(steps) != 1 || pass < 0 {
			t.Errorf("exemplar %+v: its trace has %d steps, pass at %d", e, len(steps), pass)
			continue
		}
		rank, _ := spans[pass].Rank()
		if mode := spans[pass].Attributes["fwd.graph.mode"]; mode != e.mode || fmt.Sprint(rank) != e.rank {
			t.Errorf("exemplar %+v is of a pass with mode %v on rank %d", e, mode, rank)
		}
	}
}

// passExemplar is an exemplar of fwd.forward.duration, and the labels of its series.
type passExemplar struct{ traceID, spanID, mode, rank string }

// passExemplars returns the exemplars of a job's passes that Prometheus would scrape.
func passExemplars(ctx context.Context, url, job string) ([]passExemplar, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/openmetrics-text;version=1.0.0") // as Prometheus asks
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	parser, err := textparse.New(body, response.Header.Get("Content-Type"), labels.NewSymbolTable(),
		textparse.ParserOptions{})
	if err != nil {
		return nil, err
	}
	var found []passExemplar
	for {
		entry, err := parser.Next()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		if entry != textparse.EntrySeries {
			continue
		}
		var series labels.Labels
		parser.Labels(&series)
		if series.Get("__name__") != "fwd_forward_duration_seconds_bucket" || series.Get("job") != job {
			continue
		}
		for e := (exemplar.Exemplar{}); parser.Exemplar(&e); {
			found = append(found, passExemplar{
				e.Labels.Get("trace_id"), e.Labels.Get("span_id"),
				series.Get("fwd_graph_mode"), series.Get("fwd_dp_rank"),
			})
		}
	}
}
