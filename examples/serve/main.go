// Serve runs a request trace through a small mixture-of-experts model on data-parallel ranks, and
// says what came of it.
//
//	go -C examples run ./serve -check
//	go -C examples run ./serve -check -sp 2 -ubatches 2 -spec 2 -loras 3 -graph FULL_DECODE_ONLY
//	go -C examples run ./serve -processes -check
//
// By default the ranks are goroutines. With -processes each is a process of its own, connected by a
// NATS server that comes with them; with -nats this is one of them, or several (-ranks), and each serves
// its share of the requests:
//
//	go -C examples run ./serve -nats nats://HOST:4222 -dp 2 -rank 0 -results FILE -rejoin 5m
//	go -C examples run ./serve -nats nats://HOST:4222 -dp 2 -rank 1 -results FILE -rejoin 5m
//
// All ranks have the same flags but -rank, -ranks, -results and the credentials; ranks that serve something
// else than the others, or by other graphs, are refused at the start. A rank that dies can be
// started again by the same command: the others wait for it, and it serves what its results file
// lacks. The file nats.conf is a configuration of the server with TLS and a user for each rank. The
// groups are GROUP-target and, with -spec, GROUP-draft. Who a rank is to the server may be in the URL, in
// a file (-nats-creds) or in the environment: NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS. A
// file with credentials may be replaced at any time: a rank that is refused says so, and tries again with
// what the file has then.
//
// With -otlp each rank sends its spans and metrics, as the service serve-rank-N, and the last lines
// say how much was sent. -debug shows metrics, status, profiles and the last passes without a
// collector, -cpuprofile writes a profile that splits by rank and mode, and -flight writes Go's
// execution trace when a rank is missing or a step takes long.
//
// The model computes what its weights say, in float64, and -check recomputes every request alone by
// plain code, so a batch that was padded, chunked, exchanged or cached wrongly shows as a wrong
// answer. Ctrl-C ends a run after the step in flight, with the table so far; ranks that are
// processes all stop when one of them is interrupted. A second Ctrl-C, a second or more after the
// first, ends it immediately.
//
// It exits with 0 when all went well or the run was interrupted, with 1 on an error, or if -check
// found a difference or was itself interrupted, and with 2 for bad flags. After an interrupt -check
// compares what is finished.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() { time.AfterFunc(echo, stop) }) // a signal after that kills
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// echo is for how long after the first signal others are taken for its echo: some programs, such as
// timeout, signal a process and then the group that it is in.
const echo = time.Second

// maxLoRAs is the most adapters that -loras can ask for.
const maxLoRAs = 64

// options are the flags.
type options struct {
	trace      string
	requests   int
	maxContext int
	dp         int
	sp         int
	chunk      int
	loras      int
	graph      fwd.GraphMode
	spec       int
	overlap    bool
	ubatches   int
	decodeUB   int
	prefillUB  int
	speed      float64
	check      bool
	json       bool
	progress   bool

	rankOptions
	telemetryOptions
	sizesOptions
	given map[string]string // flags that are not left to their defaults
}

// flagGroup is a group of flags as the usage shows them.
type flagGroup struct {
	title string
	flags *flag.FlagSet
}

// groups returns the flags in the order in which the usage explains them.
func (o *options) groups() []flagGroup {
	var all []flagGroup
	add := func(title string, define func(*flag.FlagSet)) {
		g := flagGroup{title, flag.NewFlagSet(title, flag.ContinueOnError)}
		define(g.flags)
		all = append(all, g)
	}
	add("Trace: what is served", o.defineTrace)
	add("Ranks and models", o.defineRanks)
	add("Graphs, and sizes of batches", func(flags *flag.FlagSet) {
		o.defineGraphs(flags)
		o.sizesOptions.define(flags)
	})
	add("Microbatches", o.defineUBatches)
	add("Output", o.defineOutput)
	add("Telemetry", o.telemetryOptions.define)
	add("Ranks that are processes, with -processes or -nats", o.defineProcesses)
	add("Many machines: this process is one rank or several, with -nats", o.defineMachines)
	return all
}

func (o *options) defineTrace(flags *flag.FlagSet) {
	flags.StringVar(&o.trace, "trace", "",
		"`file` with a trace of requests: Azure's CSV or another format that\nfwdplan/reqtrace reads "+
			"(default: a small trace that is built in)")
	flags.IntVar(&o.requests, "requests", 0, "serve only the first `N` requests of the trace (0: all)")
	flags.IntVar(&o.maxContext, "max-context", 0, "clip contexts to `N` tokens (0: don't)")
	flags.Float64Var(&o.speed, "speed", 0,
		"replay arrivals `X` times as fast as in the trace\n(0: as fast as possible)")
}

func (o *options) defineRanks(flags *flag.FlagSet) {
	flags.IntVar(&o.dp, "dp", 4, "data-parallel `ranks`")
	flags.IntVar(&o.sp, "sp", 1, "expert-parallel `workers` of each rank,\namong which its rows are split")
	flags.IntVar(&o.chunk, "chunk", 32, "most `rows` that a worker sends in one exchange")
	flags.IntVar(&o.loras, "loras", 0,
		"LoRA `adapters`: request i uses adapter i mod (N+1), and 0 means none")
	flags.IntVar(&o.spec, "spec", 0,
		"speculative decoding: a draft model guesses `K` tokens for each\nrequest and step")
	flags.BoolVar(&o.overlap, "overlap", false,
		"exchange the votes of the next step while a pass runs; not with\n"+
			"-spec, and a rank that is alone has none to exchange")
}

func (o *options) defineGraphs(flags *flag.FlagSet) {
	flags.TextVar(&o.graph, "graph", fwd.GraphFullAndPiecewise,
		"which passes run by graphs: `MODE` NONE, PIECEWISE, FULL,\nFULL_DECODE_ONLY or FULL_AND_PIECEWISE")
}

func (o *options) defineUBatches(flags *flag.FlagSet) {
	flags.IntVar(&o.ubatches, "ubatches", 1,
		"split passes into `N` microbatches that run concurrently")
	flags.IntVar(&o.decodeUB, "decode-ubatch-threshold", 4,
		"split a pass in which all requests decode\nfrom `N` tokens on")
	flags.IntVar(&o.prefillUB, "prefill-ubatch-threshold", 32, "split any other pass from `N` tokens on")
}

func (o *options) defineOutput(flags *flag.FlagSet) {
	flags.BoolVar(&o.check, "check", false, "recompute every request alone and compare")
	flags.BoolVar(&o.json, "json", false, "print the figures as one JSON object")
	flags.BoolVar(&o.progress, "progress", false,
		"with -json: print how far the run has come, too, as lines of JSON\nbefore the figures")
}

const examplesOfUse = `serve runs a request trace through a small mixture-of-experts model on
data-parallel ranks, and says what came of it.

  serve -check
  serve -check -sp 2 -ubatches 2 -spec 2 -loras 3 -graph FULL_DECODE_ONLY
  serve -requests 100 -speed 10 -otlp localhost:4317
  serve -processes -dp 3 -results FILE
  serve -nats nats://HOST:4222 -dp 2 -rank 0 -results FILE -rejoin 5m
  serve -nats nats://HOST:4222 -dp 8 -ranks 0-3
`

// printUsage explains the flags.
func printUsage(w io.Writer, groups []flagGroup) {
	fmt.Fprint(w, examplesOfUse)
	for _, g := range groups {
		fmt.Fprintf(w, "\n%s\n", g.title)
		g.flags.SetOutput(w)
		g.flags.PrintDefaults()
	}
}

// parseFlags returns the options. Flags that are wrong are explained on stderr, with the sentence
// about them last, where it is seen.
func parseFlags(args []string, stdout, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what is wrong is printed below
	groups := o.groups()
	for _, g := range groups {
		g.flags.VisitAll(func(f *flag.Flag) { flags.Var(f.Value, f.Name, f.Usage) })
	}
	if err = flags.Parse(args); err == nil {
		o.given = map[string]string{}
		flags.Visit(func(f *flag.Flag) { o.given[f.Name] = f.Value.String() })
		err = o.validate(flags.Args())
	} else if errors.Is(err, flag.ErrHelp) {
		printUsage(stdout, groups)
	} else {
		err = explainFlags(err)
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stderr, "serve -h explains the flags.\n%v\n", err)
	}
	return o, err
}

func (o *options) validate(rest []string) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("serve: "+format, args...)) }
	if len(rest) > 0 {
		for i := range rest {
			rest[i] = withoutSecrets(rest[i])
		}
		bad("unexpected arguments %q: there are only flags", rest)
	}
	if o.requests < 0 {
		bad("-requests is %d, want at least 0", o.requests)
	}
	if o.maxContext < 0 {
		bad("-max-context is %d, want at least 0", o.maxContext)
	}
	if o.dp < 1 || o.dp > engine.MaxRanks {
		bad("-dp is %d, want 1 to %d", o.dp, engine.MaxRanks)
	}
	if o.sp < 1 || o.sp > engine.MaxSequenceParallel {
		bad("-sp is %d, want 1 to %d", o.sp, engine.MaxSequenceParallel)
	}
	if o.chunk < 1 {
		bad("-chunk is %d, want at least 1", o.chunk)
	}
	if o.loras < 0 || o.loras > maxLoRAs {
		bad("-loras is %d, want 0 to %d", o.loras, maxLoRAs)
	}
	if o.spec < 0 || o.spec > engine.MaxSpeculativeTokens {
		bad("-spec is %d, want 0 to %d", o.spec, engine.MaxSpeculativeTokens)
	}
	if o.overlap && o.spec > 0 {
		bad("-overlap with -spec %d: a step can't be scheduled before it is known how many guesses of the last "+
			"one are right", o.spec)
	}
	if o.ubatches < 1 || o.ubatches > engine.MaxUBatches {
		bad("-ubatches is %d, want 1 to %d", o.ubatches, engine.MaxUBatches)
	}
	if o.decodeUB < 1 {
		bad("-decode-ubatch-threshold is %d, want at least 1", o.decodeUB)
	}
	if o.prefillUB < 1 {
		bad("-prefill-ubatch-threshold is %d, want at least 1", o.prefillUB)
	}
	for _, name := range []string{"decode-ubatch-threshold", "prefill-ubatch-threshold"} {
		if value, given := o.given[name]; given && o.ubatches == 1 {
			bad("-%s is %s: it needs -ubatches of 2 or more", name, value)
		}
	}
	if o.speed < 0 || math.IsNaN(o.speed) || math.IsInf(o.speed, 0) {
		bad("-speed is %v, want a finite number of at least 0", o.speed)
	}
	if o.progress && !o.json {
		bad("-progress needs -json")
	}
	o.sizesOptions.validate(o.graph, bad)
	o.rankOptions.validate(o.dp, o.given, bad)
	o.telemetryOptions.validate(o.dp, o.given, bad)
	return errors.Join(errs...)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (exit int) {
	o, err := parseFlags(args, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	if err := serve(ctx, o, stdout, o.screen(stdout, stderr)); errors.Is(err, errCheck) {
		return 1
	} else if err != nil {
		fmt.Fprintf(stderr, "serve: %v\n", err)
		return 1
	}
	return 0
}

// screen returns the screen for messages, with the progress that was asked for.
func (o *options) screen(stdout, stderr io.Writer) *screen {
	s := newScreen(stderr)
	if o.progress {
		s.lines = stdout
	}
	return s
}

func serve(ctx context.Context, o options, stdout io.Writer, stderr *screen) error {
	if o.processes {
		return serveProcesses(ctx, &o, stdout, stderr)
	}
	messages := io.Writer(stderr)
	if o.ranks[0] > 0 { // all ranks have the same trace
		messages = io.Discard
	}
	requests, fingerprint, err := o.readRequests(messages)
	if err != nil {
		return err
	}
	sizes := model.DefaultConfig()
	sizes.Adapters = o.loras
	weights, err := model.NewWeights(sizes)
	if err != nil {
		return err
	}
	config := engine.Config{
		DataParallelSize:       o.dp,
		SequenceParallel:       o.sp,
		MaxChunk:               o.chunk,
		MaxNumBatchedTokens:    o.batchedTokens,
		MaxNumSeqs:             o.maxSeqs,
		GraphMode:              o.graph,
		CaptureSizes:           o.capture.sizes,
		Replan:                 o.replan,
		NumSpeculativeTokens:   o.spec,
		Overlap:                o.overlap,
		NumUBatches:            o.ubatches,
		DecodeUBatchThreshold:  o.decodeUB,
		PrefillUBatchThreshold: o.prefillUB,
		Speed:                  o.speed,
		Logger:                 newLogger(stderr),
	}
	watch, err := startWatch(ctx, &o, &config, stderr)
	if err != nil {
		return err
	}
	defer watch.stop(stderr)

	var out outcome
	if o.nats != "" {
		config.Process = &engine.Process{Same: o.same(fingerprint)}
		out, err = serveRanks(ctx, &o, config, weights, share(requests, o.ranks, o.dp), stderr)
	} else {
		out.requests = requests
		out.results, out.stats, err = runEngine(ctx, config, weights, requests, stderr)
	}
	watch.runEnded(stderr)
	interrupted := errors.Is(err, engine.ErrInterrupted) ||
		err != nil && ctx.Err() != nil && errors.Is(err, context.Cause(ctx))
	if err != nil && !interrupted {
		return out.explain(explainRanks(err))
	}
	report := newReport(&out, interrupted)
	if o.otlp == "" { // passes may be recorded for -debug or -flight, but nobody can look for them
		report.dropTraces()
	}
	if !o.check {
		return report.print(stdout, o.json)
	}

	if !o.json { // the table is there while the rest is computed
		if err := report.print(stdout, false); err != nil {
			return err
		}
	}
	if interrupted {
		ctx = context.WithoutCancel(ctx) // what is finished is compared; the next signal kills
	}
	checked := check(ctx, weights, out.requests, out.results, stderr)
	report.Check = &checked
	if o.json {
		err = report.print(stdout, true)
	} else {
		err = checked.print(stdout)
	}
	if err == nil {
		err = checked.err()
	}
	return err
}

// outcome is what came of a run.
type outcome struct {
	requests []engine.Request // of this process
	results  []engine.Result
	stats    engine.Stats
	resumed  int // requests that an earlier run had finished
}

// explain adds to an error how far the run got.
func (o *outcome) explain(err error) error {
	if o.stats.Steps == 0 {
		return err
	}
	return fmt.Errorf("%w (after %d steps, %d of %d requests finished)", err, o.stats.Steps,
		o.stats.Finished+o.resumed, len(o.requests))
}

// runEngine serves requests, with a progress bar.
func runEngine(
	ctx context.Context,
	config engine.Config,
	weights *model.Weights,
	requests []engine.Request,
	stderr *screen,
) ([]engine.Result, engine.Stats, error) {
	e, err := engine.New(model.New(weights), config)
	if err != nil {
		return nil, engine.Stats{}, err
	}
	bar := startBar(stderr, func() progress {
		finished, tokens := e.Progress()
		return progress{"serving", finished, len(requests), tokens}
	})
	defer bar.stop()
	return e.Run(ctx, requests)
}

// errCheck ends the program with 1. What there is to say has been said by then.
var errCheck = errors.New("not all requests agree with the reference")

// readRequests returns the requests of the run, with their adapters, and a fingerprint of the trace.
func (o *options) readRequests(stderr io.Writer) (_ []engine.Request, fingerprint string, err error) {
	rows, err := readTrace(o.trace, stderr)
	if err != nil {
		return nil, "", err
	}
	h := fnv.New64a()
	fmt.Fprint(h, rows)
	fingerprint = fmt.Sprintf("one of %d rows with the fingerprint %016x", len(rows), h.Sum64())
	if o.requests > 0 {
		rows = rows[:min(o.requests, len(rows))]
	}
	requests := trace.Requests(rows, o.maxContext)
	for i := range requests {
		requests[i].Adapter = i % (o.loras + 1)
		if _, err := requests[i].ArrivalAt(o.speed); err != nil {
			return nil, "", fmt.Errorf("-speed is %v: %w", o.speed, err)
		}
	}
	return requests, fingerprint, nil
}

func readTrace(path string, stderr io.Writer) ([]trace.Row, error) {
	if path == "" {
		return trace.Default(), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	defer f.Close()
	rows, failed, err := trace.Read(f)
	if err != nil {
		return nil, fmt.Errorf("trace %s: %w", path, err)
	}
	if failed > 0 {
		fmt.Fprintf(stderr, "serve: trace %s: %d of %d calls failed, and are left out\n",
			path, failed, failed+len(rows))
	}
	return rows, nil
}

// check recomputes the finished requests and prints the differences, at most maxDifferences of
// them. Once ctx has ended nothing is compared any more, and what was not compared does not count
// as agreeing.
func check(
	ctx context.Context,
	w *model.Weights,
	requests []engine.Request,
	results []engine.Result,
	stderr *screen,
) checkReport {
	const maxDifferences = 10
	var done counter
	bar := startBar(stderr, func() progress { return progress{"checking", done.get(), len(requests), 0} })
	errs := engine.Check(ctx, w, requests, results, done.add)
	bar.stop()
	c := checkReport{}
	if ctx.Err() != nil {
		fmt.Fprintln(stderr, "serve: check: interrupted before all requests were compared")
	}
	different := 0
	for i, err := range errs {
		if !results[i].Finished {
			c.Unfinished++
			continue
		}
		c.Requests++
		switch {
		case err != nil && ctx.Err() == nil:
			if different++; different <= maxDifferences {
				fmt.Fprintf(stderr, "serve: %v\n", err)
			}
		case err == nil:
			c.Agreed++
		}
	}
	if different > maxDifferences {
		fmt.Fprintf(stderr, "serve: and %d more\n", different-maxDifferences)
	}
	return c
}
