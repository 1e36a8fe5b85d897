package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// keptPasses is how many records of each rank /debug/passes shows.
const keptPasses = 256

// debugServer shows a run while it goes on.
type debugServer struct {
	listener  net.Listener
	server    *http.Server
	engine    atomic.Pointer[engine.Engine] // nil: not started yet
	ranks     rankList                      // of this process
	recorders []*fwd.Recorder               // in their order
}

// debugAddress returns the address of a rank: without a host it is on this machine alone, and ranks
// that are processes have a port each, but for port 0, which is any free one.
func debugAddress(address string, rank int) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	if !isPort(port) {
		return "", fmt.Errorf("port %q is not a number from 0 to 65535", port)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	n, _ := strconv.Atoi(port)
	if n > 0 {
		n += rank
	}
	return net.JoinHostPort(host, strconv.Itoa(n)), nil
}

func isPort(text string) bool {
	_, err := strconv.ParseUint(text, 10, 16)
	return err == nil
}

// startDebug listens at an address and shows what ranks do.
func startDebug(address string, metrics *prometheus.Registry, ranks rankList) (*debugServer, error) {
	address, err := debugAddress(address, 0)
	if err != nil {
		return nil, err
	}
	d := &debugServer{ranks: ranks}
	for range ranks {
		d.recorders = append(d.recorders, fwd.NewRecorder(keptPasses))
	}
	if d.listener, err = net.Listen("tcp", address); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", index)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", showArgs(os.Args))
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /status", d.status)
	mux.HandleFunc("GET /debug/passes", d.passes)
	d.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = d.server.Serve(d.listener) }() // it ends with stop
	return d, nil
}

func (d *debugServer) stop() { _ = d.server.Close() }

func (d *debugServer) url() string { return fmt.Sprintf("http://%s/", d.listener.Addr()) }

// observe keeps a record.
func (d *debugServer) observe(ctx context.Context, rec *fwd.Record) {
	d.recorders[slices.Index(d.ranks, rec.Rank)].Observe(ctx, rec)
}

// newRegistry returns a registry with the metrics of the Go runtime and the process.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

func index(w http.ResponseWriter, _ *http.Request) {
	_, _ = io.WriteString(w, `serve

/metrics        metrics, as text for Prometheus
/status         what each rank is doing, as JSON
/debug/passes   the last passes of each rank; ?rank=R shows one rank
/debug/pprof/   profiles of Go
`)
}

// rankStatus is what /status says of a rank.
type rankStatus struct {
	Rank       int           `json:"rank"`
	Running    int           `json:"running"` // requests
	Waiting    int           `json:"waiting"`
	BlocksUsed int           `json:"blocks_used"` // of the KV cache
	Blocks     int           `json:"blocks"`
	Target     runnerStatus  `json:"target"`
	Draft      *runnerStatus `json:"draft,omitempty"`
}

// runnerStatus is [fwd.Status].
type runnerStatus struct {
	Step       uint64    `json:"step"`
	Exchanging bool      `json:"exchanging"`
	Missing    []int     `json:"missing_ranks,omitempty"`
	Active     int       `json:"active"` // passes
	Since      time.Time `json:"since,omitzero"`
}

func newRunnerStatus(s fwd.Status) runnerStatus {
	return runnerStatus{s.Step, s.Exchanging, s.Waiting, s.Active, s.Since}
}

func (d *debugServer) status(w http.ResponseWriter, _ *http.Request) {
	all := []rankStatus{}
	if e := d.engine.Load(); e != nil {
		for _, s := range e.Status() {
			status := rankStatus{
				Rank: s.Rank, Running: s.Running, Waiting: s.Waiting, BlocksUsed: s.BlocksUsed, Blocks: s.Blocks,
				Target: newRunnerStatus(s.Target),
			}
			if s.Draft != nil {
				draft := newRunnerStatus(*s.Draft)
				status.Draft = &draft
			}
			all = append(all, status)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	_ = out.Encode(all) // whoever asked has gone
}

// passes shows the last passes, and the exchanges that failed, oldest first.
func (d *debugServer) passes(w http.ResponseWriter, r *http.Request) {
	shown := d.recorders
	if text := r.FormValue("rank"); text != "" {
		rank, err := strconv.Atoi(text)
		i := slices.Index(d.ranks, rank)
		if err != nil || i < 0 {
			http.Error(w, fmt.Sprintf("rank is %q, want one of %v", text, d.ranks), http.StatusBadRequest)
			return
		}
		shown = shown[i : i+1]
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "RANK\tSTEP\tBEGAN\tMODEL\tPHASE\tMODE\tREASON\tREQUESTS\tTOKENS\tPADDED\t"+
		"VOTES\tPASS\tEXPERTS\tLAST\tERROR")
	for _, recorder := range shown {
		records := recorder.Recent()
		for i := range records {
			fmt.Fprintln(out, passLine(&records[i]))
		}
	}
	_ = out.Flush() // whoever asked has gone
}

// passLine returns the cells of a record.
func passLine(rec *fwd.Record) string {
	model, last, failure := "target", "", ""
	if rec.Name != "" {
		model = rec.Name
	}
	if rec.LastRank >= 0 {
		last = strconv.Itoa(rec.LastRank)
	}
	if rec.Err != nil {
		failure = fmt.Sprint(rec.Err)
	}
	began := rec.Began.Format("15:04:05.000000")
	if rec.NumTokens == 0 { // an exchange that failed
		return fmt.Sprintf("%d\t%d\t%s\t%s\t\t\t\t\t\t\t%v\t\t\t%s\t%s",
			rec.Rank, rec.Step, began, model, rec.Wait.Round(time.Microsecond), last, failure)
	}
	return fmt.Sprintf("%d\t%d\t%s\t%s\t%s\t%v\t%v\t%d\t%d\t%d\t%v\t%v\t%v\t%s\t%s",
		rec.Rank, rec.Step, began, model, rec.Phase, rec.GraphMode, rec.Reason, rec.NumReqs,
		rec.NumTokensUnpadded, rec.NumTokens, rec.Wait.Round(time.Microsecond),
		rec.Duration.Round(time.Microsecond), rec.Waited.Round(time.Microsecond), last, failure)
}
