// Proof shows what planned capture sizes are worth on real traffic. It simulates an engine on a trace of
// requests, without a model, chooses capture sizes from the first half of the trace, and judges them on the
// second half, which the plan has not seen.
//
//	go -C fwdplan run ./proof [-speeds 4,16,40] [TRACE]
//
// The trace may be in any format that the package reqtrace reads; "-" is standard input. Without one, the
// small trace of that package is served.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
	"github.com/forwardctx/fwd/fwdplan/reqtrace"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "proof:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	e := engine{}
	var speeds []float64
	flags := flag.NewFlagSet("proof", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&e.ranks, "ranks", 4, "data-parallel ranks")
	flags.IntVar(&e.budget, "batched-tokens", 2048, "most `tokens` of a rank in a step")
	flags.IntVar(&e.maxSeqs, "max-seqs", 512,
		"most `requests` of a rank in a step; also the largest capture size")
	flags.DurationVar(&e.step, "step", 10*time.Millisecond, "what every step takes")
	flags.DurationVar(&e.token, "token", 10*time.Microsecond,
		"what each token of the largest rank adds to a step")
	save := flags.String("save", "",
		"write the snapshots of both halves at the last speed into this `folder`, as first.json "+
			"and second.json")
	text := flags.String("speeds", "4,16,40",
		"how much faster than in the trace requests come, a list of `numbers`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if e.ranks < 1 || e.maxSeqs < 1 || e.budget < e.maxSeqs || e.step <= 0 || e.token < 0 || e.ranks > 1<<12 {
		return fmt.Errorf("-ranks %d, -batched-tokens %d, -max-seqs %d, -step %v, -token %v: want 1 to %d ranks, "+
			"at least as many tokens as requests, and steps that take time",
			e.ranks, e.budget, e.maxSeqs, e.step, e.token, 1<<12)
	}
	for word := range strings.SplitSeq(*text, ",") {
		speed, err := strconv.ParseFloat(strings.TrimSpace(word), 64)
		if err != nil || !(speed >= 1e-3 && speed <= 1e6) {
			return fmt.Errorf("-speeds: %.40q is not a number from 0.001 to 1000000", word)
		}
		speeds = append(speeds, speed)
	}
	if flags.NArg() > 1 {
		return fmt.Errorf("%d traces, want one", flags.NArg())
	}
	rows, err := readTrace(flags.Arg(0), stdin)
	if err != nil {
		return err
	}
	for _, speed := range speeds {
		e.speed = speed
		first, second, err := e.run(ctx, rows)
		if err == nil {
			err = e.prove(first, second, stdout)
		}
		if err == nil && *save != "" {
			err = errors.Join(write(*save, "first.json", first), write(*save, "second.json", second))
		}
		if err != nil {
			return fmt.Errorf("at %g times the trace's speed: %w", speed, err)
		}
	}
	return nil
}

func write(folder, name string, s fwdplan.Snapshot) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, name), data, 0o644)
}

func readTrace(path string, stdin io.Reader) ([]reqtrace.Row, error) {
	if path == "" {
		return reqtrace.Default(), nil
	}
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	t, err := reqtrace.Read(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t.Rows, nil
}

// prove prints the table for one speed.
func (e *engine) prove(first, second fwdplan.Snapshot, stdout io.Writer) error {
	cfg := fwdplan.Config{
		Must:       []int{e.maxSeqs},
		Unseen:     true,
		Dispatcher: fwd.DispatcherConfig{Mode: fwd.GraphFullDecodeOnly, MaxNumSeqs: e.maxSeqs},
	}
	var powers []int
	for size := 1; size < e.maxSeqs; size *= 2 {
		powers = append(powers, size)
	}
	ladders := []struct {
		name  string
		sizes []int
	}{{"default", fwd.DefaultCaptureSizes(e.maxSeqs)}, {"powers of two", append(powers, e.maxSeqs)}}
	for _, graphs := range []int{8, 16, 24, 51} {
		cfg.MaxGraphs = graphs
		plan, err := fwdplan.Choose(first, cfg)
		if err != nil {
			return fmt.Errorf("the first half: %w", err)
		}
		ladders = append(ladders, struct {
			name  string
			sizes []int
		}{fmt.Sprintf("plan, at most %d", graphs), plan.Sizes})
	}
	fmt.Fprintf(stdout, "%g times as fast as the trace: %d decode steps in the first half, %d in the second\n",
		e.speed,
		decodeSteps(first), decodeSteps(second))
	fmt.Fprintf(stdout, "%-18s %6s %17s %15s %12s\n",
		"", "graphs", "padding, 1st half", "2nd half", "eager steps")
	for _, l := range ladders {
		seen, err := fwdplan.Evaluate(first, cfg, fwdplan.Ladder{Sizes: l.sizes})
		if err != nil {
			return err
		}
		unseen, err := fwdplan.Evaluate(second, cfg, fwdplan.Ladder{Sizes: l.sizes})
		if err != nil {
			return fmt.Errorf("the second half: %w", err)
		}
		fmt.Fprintf(stdout, "%-18s %6d %16.2f%% %14.2f%% %11.1f%%\n", l.name, unseen.Graphs,
			100*seen.Decode.PaddingRatio(), 100*unseen.Decode.PaddingRatio(), 100*unseen.All().EagerRatio())
	}
	fmt.Fprintln(stdout)
	return nil
}

func decodeSteps(s fwdplan.Snapshot) (n uint64) {
	for _, r := range s.Rows {
		if r.Uniform {
			n += r.Passes + r.Dummies
		}
	}
	return n
}
