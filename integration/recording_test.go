// Helpers: a run of Runners and of the engine that is scraped each minute, with all faults that an
// alert is for, or with none.

package integration

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// What happens in a minute of a recording: stepsInMinute steps, in which each rank decodes, each pass
// takes passTook, and ranks 0 to 2 wait for rank 3. Ranks 0 to 2 have three requests and rank 3 has
// two, so all are padded to the graph for four.
const (
	stepsInMinute = 10
	passTook      = 20 * time.Millisecond
	shortWait     = 2 * time.Millisecond
	longWait      = 20 * time.Millisecond
)

// The minutes of a recording, and of the faults in it, each of which begins when the alerts of the one
// before have recovered.
const (
	firstStep    = 2 // before it the ranks warm up
	quietTo      = 20
	missingAt    = 8
	slowFrom     = 15 // the waits are long
	slowTo       = 27
	eagerFrom    = 34 // ranks 0 and 1 have batches that are larger than every graph
	eagerTo      = 46
	captureAt    = 53 // a cache has lost its graphs
	dropAt       = 59 // spans are dropped, and others can't be sent
	failAt       = 60 // a pass fails
	withFaultsTo = 66
)

// recording is a run that is scraped each minute of a clock that the test holds.
type recording struct {
	scrapes scrapes
	clock   clock
	group   *group
	caches  []*fwd.GraphCache // of each rank
	wait    time.Duration     // for the vote of rank 3
	spans   *service
	minutes int
	serving [][]sample // scrapes of a running engine, which are spread over the minutes
	urls    []string
	earlier map[string]bool // series of OpenTelemetry's own metrics that are of other tests
}

// clock is a time that moves when the test says so.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// record returns a recording, with or without faults. After each scrape it calls scraped.
func record(t *testing.T, faults bool, scraped func(r *recording)) *recording {
	t.Helper()
	r := newRecording(t)
	r.minutes = quietTo + 1
	if faults {
		r.minutes = withFaultsTo + 1
	}
	r.scrape(t)
	scraped(r)
	r.warmUp(t, func() { r.scrape(t); scraped(r) })
	for minute := firstStep; minute < r.minutes; minute++ {
		r.minute(t, minute, faults)
		scraped(r)
	}
	return r
}

func newRecording(t *testing.T) *recording {
	t.Helper()
	r := &recording{wait: shortWait, earlier: map[string]bool{}}
	r.clock.now = time.Now().Add(-10 * time.Minute) // Jaeger finds no spans in the future
	r.serving = scrapesOfEngine(t)
	exporter, url := newPrometheus(t)
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	own := serveMetrics(t, ownRegistry)
	samples, err := scrape(t.Context(), own)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range samples {
		r.earlier[s.name+s.labels["otel_component_name"]] = true
	}
	r.urls = []string{url, own}
	r.spans = newService(t, "grpc")
	r.group = newGroupOf(t, fwd.DispatcherConfig{
		Mode: fwd.GraphFull, CaptureSizes: []int{1, 2, 4, 8}, MaxNumSeqs: 8,
	}, fwd.ParallelConfig{}, func() []fwd.Option {
		return []fwd.Option{
			fwd.WithMeterProvider(meters), fwd.WithTracerProvider(r.spans.provider),
			fwd.WithClock(r.clock.Now), fwd.WithStepTrace(),
		}
	})
	r.group.before = func(rank int) {
		if rank == lastRank {
			r.clock.advance(r.wait)
		}
	}
	for range ranks {
		r.caches = append(r.caches, r.newCache(t))
	}
	return r
}

// newCache returns graphs of a model that takes its time.
func (r *recording) newCache(t *testing.T) *fwd.GraphCache {
	t.Helper()
	model := func(context.Context) error { r.clock.advance(passTook); return nil }
	cache, err := fwd.NewGraphCache(fwd.GraphFull, model,
		func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return model, nil })
	if err != nil {
		t.Fatal(err)
	}
	return cache
}

// warmUp captures all graphs on all ranks. It calls midway when rank 0 has half of them.
func (r *recording) warmUp(t *testing.T, midway func()) {
	t.Helper()
	errs := make([]error, ranks)
	var wg sync.WaitGroup
	for rank, runner := range r.group.runners {
		wg.Go(func() {
			n := 0
			for pass, err := range runner.WarmUp(t.Context()) {
				if err == nil {
					err = runner.Run(t.Context(), pass, r.caches[rank].Forward)
				}
				if err != nil {
					errs[rank] = err
					return
				}
				if n++; n == 2 && rank == 0 {
					midway()
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// minute takes the steps of a minute, and scrapes during the last pass of rank 0.
func (r *recording) minute(t *testing.T, minute int, faults bool) {
	t.Helper()
	schedules := []fwd.Schedule{sequences(3), sequences(3), sequences(3), sequences(2)}
	fails := 0
	r.wait = shortWait
	switch {
	case !faults:
	case minute == missingAt:
		r.missRank(t, schedules)
	case minute >= slowFrom && minute <= slowTo:
		r.wait = longWait
	case minute >= eagerFrom && minute <= eagerTo:
		schedules[0], schedules[1] = tokens(9), tokens(9)
	case minute == captureAt:
		r.caches[2] = r.newCache(t)
	case minute == dropAt:
		dropSpans(t)
	case minute == failAt:
		fails = 1
	}
	for i := range stepsInMinute {
		err := r.group.takeInOrder(t.Context(), schedules, func(ctx context.Context, rank int) error {
			if i == stepsInMinute-1 && rank == 0 {
				r.scrape(t)
			}
			if i < fails && rank == 2 {
				return &layerError{}
			}
			return r.caches[rank].Forward(ctx)
		})
		if failed := errors.As(err, new(*layerError)); (err != nil) != failed || failed != (i < fails) {
			t.Fatal(err)
		}
	}
}

// missRank takes a step in which rank 3 does not vote before the others lose patience.
func (r *recording) missRank(t *testing.T, schedules []fwd.Schedule) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var waits []func() (fwd.Pass, error)
	for rank := range lastRank {
		wait, err := r.group.runners[rank].Begin(ctx, schedules[rank])
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, wait)
	}
	r.clock.advance(r.wait)
	cancel()
	for rank, wait := range waits {
		if _, err := wait(); !errors.Is(err, fwd.ErrRankMissing) {
			t.Fatalf("rank %d: %v", rank, err)
		}
	}
}

// dropSpans ends spans that find the queue full, and one that can't be sent.
func dropSpans(t *testing.T) {
	t.Helper()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	nobody, err := otlptracegrpc.New(t.Context(), otlptracegrpc.WithEndpoint("127.0.0.1:"+ports[0]),
		otlptracegrpc.WithInsecure(), otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	unsent := sdktrace.NewTracerProvider(sdktrace.WithBatcher(nobody))
	_, span := unsent.Tracer("").Start(t.Context(), "unsent")
	span.End()
	_ = unsent.Shutdown(t.Context()) // the counts say that it failed

	dropping := sdktrace.NewTracerProvider(sdktrace.WithBatcher(newBlocked(t),
		sdktrace.WithMaxQueueSize(1), sdktrace.WithMaxExportBatchSize(1)))
	for range 10 {
		_, span := dropping.Tracer("").Start(t.Context(), "dropped")
		span.End()
	}
}

// scrape scrapes everything, as the job "engine".
func (r *recording) scrape(t *testing.T) {
	t.Helper()
	if err := r.spans.provider.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := slices.Clone(r.serving[r.scrapes.n*len(r.serving)/r.minutes])
	for _, url := range r.urls {
		samples, err := scrape(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range samples {
			if !r.earlier[s.name+s.labels["otel_component_name"]] {
				all = append(all, s)
			}
		}
	}
	var labelled []sample
	for _, s := range all {
		l := maps.Clone(s.labels)
		l["job"], l["instance"] = "engine", "localhost:6060"
		labelled = append(labelled, sample{s.name, l, s.value})
	}
	r.scrapes.add(labelled)
}

// scrapesOfEngine returns what is scraped of an engine after each pass of rank 0: the metrics of
// requests. Those of passes are left out, since their clock is not the test's.
func scrapesOfEngine(t *testing.T) [][]sample {
	t.Helper()
	exporter, url := newPrometheus(t)
	c := config(tracenoop.NewTracerProvider())
	c.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	var all [][]sample
	again := func() error {
		samples, err := scrape(t.Context(), url)
		var kept []sample
		for _, s := range samples {
			if strings.HasPrefix(s.name, "serve_") || strings.HasPrefix(s.name, "gen_ai_") {
				kept = append(kept, s)
			}
		}
		all = append(all, kept)
		return err
	}
	c.Middleware = inRank(0, func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error { return errors.Join(next(ctx), again()) }
	})
	serve(t, c, newRequests(30, 90, 40))
	return all
}
