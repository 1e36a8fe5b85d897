// Ladders serves the second half of a request trace with the default capture sizes, and with sizes that
// were planned from the first half, in turns, and says what each is worth.
//
//	go -C examples run ./ladders -trace FILE
//
// A turn serves the requests once with each list of sizes, each time beginning with another one, so that a
// machine that is busy for a while slows all of them down. Numbers are medians, and the least and the most
// of all turns.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/examples/trace"
	"github.com/forwardctx/fwd/fwdplan"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "ladders:", err)
		os.Exit(1)
	}
}

// bench is what is served, and how.
type bench struct {
	model         *model.Model
	config        engine.Config
	first, second []engine.Request
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("ladders", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("trace", "",
		"`file` with a trace in a format that fwdplan/reqtrace reads (default: a small one that is built in)")
	requests := flags.Int("requests", 2000, "plan from the first half of `N` requests, and serve the second")
	maxContext := flags.Int("max-context", 16, "clip contexts to `N` tokens (0: don't)")
	turns := flags.Int("turns", 5, "serve so many `times` with each list of sizes")
	// The engine counts its steps by size, and never gets as far as to choose other sizes.
	b := bench{config: engine.Config{GraphMode: fwd.GraphFullDecodeOnly, Replan: math.MaxInt}}
	flags.Float64Var(&b.config.Speed, "speed", 0,
		"replay arrivals `X` times as fast as in the trace (0: all arrive at once)")
	flags.IntVar(&b.config.DataParallelSize, "dp", 2, "data-parallel `ranks`")
	flags.IntVar(&b.config.MaxNumSeqs, "max-seqs", 128, "most `requests` of a rank in a step")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b.config.MaxNumBatchedTokens, b.config.NumBlocks = 2*b.config.MaxNumSeqs, 32*b.config.MaxNumSeqs
	if flags.NArg() > 0 || *requests < 2 || *turns < 1 || *maxContext < 0 {
		return fmt.Errorf("-requests %d, -turns %d, -max-context %d, arguments %q: "+
			"want at least 2, 1 and 0, and no arguments", *requests, *turns, *maxContext, flags.Args())
	}
	rows, err := readTrace(*path)
	if err != nil {
		return err
	}
	all := trace.Requests(rows[:min(*requests, len(rows))], *maxContext)
	b.first, b.second = halves(all)
	weights, err := model.NewWeights(model.DefaultConfig())
	if err != nil {
		return err
	}
	b.model = model.New(weights)
	return b.compare(ctx, *turns, stdout)
}

func readTrace(path string) ([]trace.Row, error) {
	if path == "" {
		return trace.Default(), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rows, _, err := trace.Read(f)
	return rows, err
}

// halves cuts requests into two runs. The second begins at 0 too.
func halves(all []engine.Request) (first, second []engine.Request) {
	first, second = all[:len(all)/2], slices.Clone(all[len(all)/2:])
	for i := range second {
		second[i].Arrival -= all[len(all)/2].Arrival
	}
	return first, second
}

// ladder is a list of capture sizes, and how each turn with it went.
type ladder struct {
	name  string
	sizes []int // nil: the engine's default
	turns []served
}

// served is what came of serving the requests once.
type served struct {
	engine.Stats
	cpu time.Duration // also of its warm-up
}

// compare serves with each ladder in turns, and prints the table.
func (b *bench) compare(ctx context.Context, turns int, stdout io.Writer) error {
	ladders, err := b.ladders(ctx)
	if err != nil {
		return err
	}
	for turn := range turns {
		for i := range ladders {
			l := &ladders[(turn+i)%len(ladders)]
			before := cpuTime()
			stats, err := b.serve(ctx, l.sizes, b.second, nil)
			if err != nil {
				return err
			}
			l.turns = append(l.turns, served{stats, cpuTime() - before})
		}
	}
	return b.print(stdout, ladders)
}

// ladders returns the default one, and plans from the first half of the trace.
func (b *bench) ladders(ctx context.Context) ([]ladder, error) {
	var seen fwdplan.Sizes
	stats, err := b.serve(ctx, nil, b.first, seen.Observe)
	if err != nil {
		return nil, err
	}
	all := []ladder{{name: "default"}}
	before := stats.Ladders[0]
	for _, most := range []int{before.Graphs, before.Graphs / 2} {
		plan, err := fwdplan.Choose(seen.Snapshot(), fwdplan.Config{
			MaxGraphs: most, Must: []int{slices.Max(before.Sizes)}, Unseen: true,
			Dispatcher: fwd.DispatcherConfig{Mode: b.config.GraphMode, MaxNumSeqs: b.config.MaxNumSeqs},
		})
		if err != nil {
			return nil, err
		}
		all = append(all, ladder{name: fmt.Sprintf("plan, at most %d", most), sizes: plan.Sizes})
	}
	return all, nil
}

// serve serves requests once.
func (b *bench) serve(ctx context.Context, sizes []int, requests []engine.Request,
	observe func(context.Context, *fwd.Record)) (engine.Stats, error) {
	config := b.config
	config.CaptureSizes, config.Observe = sizes, observe
	e, err := engine.New(b.model, config)
	if err != nil {
		return engine.Stats{}, err
	}
	_, stats, err := e.Run(ctx, requests)
	return stats, err
}

func (b *bench) print(stdout io.Writer, ladders []ladder) error {
	fmt.Fprintf(stdout, "%d requests to plan from, %d to serve, %d times with each list of sizes\n\n",
		len(b.first), len(b.second), len(ladders[0].turns))
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "sizes\tgraphs\twarm-up, ms\tpadding, %\teager, %\tCPU, s\ttokens/s")
	for _, l := range ladders {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.name,
			l.of(0, func(t *served) float64 { return float64(t.Ladders[0].Graphs) }),
			l.of(0, func(t *served) float64 { return float64(t.WarmUp) / float64(time.Millisecond) }),
			l.of(1, func(t *served) float64 {
				return 100 * float64(t.Ladders[0].Padding) / float64(max(t.Ladders[0].Tokens, 1))
			}),
			l.of(1, func(t *served) float64 { return 100 * float64(t.Ladders[0].Eager) / float64(max(t.Steps, 1)) }),
			l.of(2, func(t *served) float64 { return t.cpu.Seconds() }),
			l.of(0, func(t *served) float64 {
				return float64(t.PromptTokens+t.GeneratedTokens) / t.Duration.Seconds()
			}))
	}
	return t.Flush()
}

// of returns a figure of all turns with so many digits: the median, and the least and the most if they
// differ.
func (l *ladder) of(digits int, figure func(*served) float64) string {
	var all []float64
	for i := range l.turns {
		all = append(all, figure(&l.turns[i]))
	}
	slices.Sort(all)
	middle := (all[len(all)/2] + all[(len(all)-1)/2]) / 2
	text := func(v float64) string { return fmt.Sprintf("%.*f", digits, v) }
	least, most := text(all[0]), text(all[len(all)-1])
	if least == most {
		return least
	}
	return fmt.Sprintf("%s (%s to %s)", text(middle), least, most)
}
