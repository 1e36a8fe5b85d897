// Tests of the instruments as such: their names, kinds, units and bounds, and the events of graphs.

package integration

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	collector "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/grpc"
)

// TestGraphEvents: captures, replays and passes without a graph are as many as the engine says.
func TestGraphEvents(t *testing.T) {
	exporter, url := newPrometheus(t)
	c := config(tracenoop.NewTracerProvider())
	c.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	_, stats := serve(t, c, newRequests(30, 90, 10))
	samples, err := scrape(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]float64{
		"capture": float64(stats.Captures),
		"replay":  float64(stats.Replays),
		"eager":   float64(stats.Modes[fwd.GraphNone]),
	}
	got := sum(samples, "fwd_graph_events_total", nil, "fwd_graph_event")
	if diff := cmp.Diff(want, got); diff != "" || stats.Replays == 0 {
		t.Errorf("graph events (-want +got):\n%s", diff)
	}
}

// receiver keeps the last metrics that came over OTLP.
type receiver struct {
	collector.UnimplementedMetricsServiceServer
	mu   sync.Mutex
	last *collector.ExportMetricsServiceRequest
}

func (r *receiver) Export(
	_ context.Context, in *collector.ExportMetricsServiceRequest,
) (*collector.ExportMetricsServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = in
	return &collector.ExportMetricsServiceResponse{}, nil
}

// newReceiver returns a receiver, and a provider that sends its metrics there when it is shut down.
func newReceiver(t *testing.T) (*receiver, *sdkmetric.MeterProvider) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in, server := &receiver{}, grpc.NewServer()
	collector.RegisterMetricsServiceServer(server, in)
	go func() { _ = server.Serve(listener) }() // until it is stopped
	t.Cleanup(server.Stop)
	exporter, err := otlpmetricgrpc.New(t.Context(),
		otlpmetricgrpc.WithEndpoint(listener.Addr().String()), otlpmetricgrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	reader := sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(time.Hour))
	return in, sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
}

// instrument is what TestInstruments compares.
type instrument struct {
	Kind, Unit string
	Bounds     []float64
}

func newInstrument(m *metrics.Metric) instrument {
	switch data := m.Data.(type) {
	case *metrics.Metric_Histogram:
		return instrument{"histogram", m.Unit, data.Histogram.DataPoints[0].ExplicitBounds}
	case *metrics.Metric_Sum:
		kind := "up-down counter"
		if data.Sum.IsMonotonic {
			kind = "counter"
		}
		if _, ok := data.Sum.DataPoints[0].Value.(*metrics.NumberDataPoint_AsDouble); ok {
			kind += " of doubles"
		}
		return instrument{kind, m.Unit, nil}
	}
	return instrument{Kind: fmt.Sprintf("%T", m.Data)}
}

// TestInstruments: names, kinds, units and bounds, as they go over OTLP.
func TestInstruments(t *testing.T) {
	in, provider := newReceiver(t)
	r := newLongRun(t, provider)
	r.take(t, 3, false, nil)
	r.take(t, 600, false, nil)
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	got := map[string]instrument{}
	for _, r := range in.last.GetResourceMetrics() {
		for _, scope := range r.ScopeMetrics {
			if scope.Scope.Name != fwd.ScopeName || scope.Scope.Version != fwd.Version {
				t.Errorf("scope %q, version %q", scope.Scope.Name, scope.Scope.Version)
			}
			for _, m := range scope.Metrics {
				got[m.Name] = newInstrument(m)
				if m.Description == "" {
					t.Errorf("%s has no description", m.Name)
				}
			}
		}
	}
	var seconds, sizes []float64
	for k := range 24 {
		seconds = append(seconds, 0.00001*float64(int(1)<<k))
	}
	for k := range 21 {
		sizes = append(sizes, float64(int(1)<<k))
	}
	want := map[string]instrument{
		"fwd.forward.duration":    {"histogram", "s", seconds},
		"fwd.forward.tokens":      {"histogram", "{token}", sizes},
		"fwd.padding":             {"counter", "{token}", nil},
		"fwd.coordinate.duration": {"histogram", "s", seconds},
		"fwd.graph.events":        {"counter", "{event}", nil},
		"fwd.forward.active":      {"up-down counter", "{pass}", nil},
		"fwd.wait.time":           {"counter of doubles", "s", nil},
	}
	if diff := cmp.Diff(want, got, approximately); diff != "" {
		t.Errorf("instruments (-want +got):\n%s", diff)
	}
}
