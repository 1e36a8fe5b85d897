// Exchange measures what a step's exchange of votes costs between processes, beside the least that
// it could cost.
//
//	go -C benchmarks run ./exchange
//
// Each rank is a process of its own with its own connection to one NATS server on loopback. natsdp
// exchanges votes; bare is an all-gather of messages of the same length over core NATS, without
// steps, deadlines, or anything for lost messages. The two take turns in the same run. The table
// says how long they took, and compares them by the median of the ratios of all turns.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the next signal kills
	if job, ok := os.LookupEnv(jobVariable); ok {
		if err := work(ctx, job, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "exchange:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags.
type options struct {
	sizes  []int
	rounds int
	turns  int
}

func parseFlags(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("exchange", flag.ContinueOnError)
	flags.SetOutput(stderr)
	o.sizes = []int{2, 4, 8}
	flags.Func("ranks", "`numbers` of ranks, separated by commas (default 2,4,8)", func(s string) error {
		o.sizes = nil
		for field := range strings.SplitSeq(s, ",") {
			n, err := strconv.Atoi(field)
			if err != nil || n < 2 || n > 64 {
				return fmt.Errorf("%q is not a number from 2 to 64", field)
			}
			o.sizes = append(o.sizes, n)
		}
		return nil
	})
	flags.IntVar(&o.rounds, "rounds", 10_000, "`rounds` that each turn takes")
	flags.IntVar(&o.turns, "turns", 5, "`turns` of natsdp and bare")
	if err := flags.Parse(args); err != nil {
		return o, err // flags has printed it
	}
	switch {
	case flags.NArg() > 0:
		err = fmt.Errorf("exchange: unexpected arguments %q; there are only flags", flags.Args())
	case o.rounds < 1 || o.turns < 1:
		err = fmt.Errorf("exchange: -rounds is %d and -turns %d, want at least 1", o.rounds, o.turns)
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
	}
	return o, err
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (exit int) {
	o, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	if err := measure(ctx, o, stdout); err != nil {
		fmt.Fprintln(stderr, "exchange:", err)
		return 1
	}
	return 0
}

// measure lets natsdp and bare take turns, and prints the table.
func measure(ctx context.Context, o options, stdout io.Writer) error {
	s, err := startServer()
	if err != nil {
		return err
	}
	defer stopServer(s)
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ranks\tnatsdp p50, p99 (µs)\tbare p50, p99 (µs)\tratio p50\tratio p99")
	for _, size := range o.sizes {
		var took [len(kinds)][]figures
		for turn := range o.turns {
			for i, kind := range kinds {
				j := job{Kind: kind, URL: s.ClientURL(), Size: size, Rounds: o.rounds}
				j.Group = fmt.Sprintf("bench-%s-%d-%d", kind, size, turn)
				f, err := takeTurn(ctx, j)
				if err != nil {
					return fmt.Errorf("%s with %d ranks: %w", kind, size, err)
				}
				took[i] = append(took[i], f)
			}
		}
		p50 := func(f figures) float64 { return f.P50 }
		p99 := func(f figures) float64 { return f.P99 }
		fmt.Fprintf(table, "%d\t%.0f, %.0f\t%.0f, %.0f\t%.2f\t%.2f\n", size,
			middle(took[0], p50), middle(took[0], p99), middle(took[1], p50), middle(took[1], p99),
			ratio(took[0], took[1], p50), ratio(took[0], took[1], p99))
	}
	return table.Flush()
}

// startServer starts a NATS server on a free port of loopback.
func startServer() (*server.Server, error) {
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
	})
	if err != nil {
		return nil, err
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		stopServer(s)
		return nil, errors.New("the NATS server does not start")
	}
	return s, nil
}

func stopServer(s *server.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

// figures say how long a round took, in µs.
type figures struct{ P50, P99 float64 }

func middle(all []figures, of func(figures) float64) float64 {
	values := make([]float64, len(all))
	for i, f := range all {
		values[i] = of(f)
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// ratio returns the middle one of the ratios of turns that followed each other: what else the
// machine did was about the same then.
func ratio(a, b []figures, of func(figures) float64) float64 {
	ratios := make([]figures, len(a))
	for i := range a {
		ratios[i].P50 = of(a[i]) / of(b[i])
	}
	return middle(ratios, func(f figures) float64 { return f.P50 })
}

// takeTurn runs the ranks of a job as processes. It returns the figures of rank 0, which are those
// of all: no rank is ever more than a round ahead.
func takeTurn(ctx context.Context, j job) (figures, error) {
	program, err := os.Executable()
	if err != nil {
		return figures{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	outs := make([]bytes.Buffer, j.Size)
	errs := make([]error, j.Size)
	var wg sync.WaitGroup
	for rank := range j.Size {
		j := j
		j.Rank = rank
		text, err := json.Marshal(j)
		if err != nil {
			return figures{}, err
		}
		wg.Go(func() {
			cmd := exec.CommandContext(ctx, program)
			cmd.Env = append(os.Environ(), jobVariable+"="+string(text))
			cmd.Stdout, cmd.Stderr = &outs[rank], os.Stderr
			if errs[rank] = cmd.Run(); errs[rank] != nil {
				errs[rank] = fmt.Errorf("rank %d: %w", rank, errs[rank])
				cancel() // the others wait for it
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return figures{}, err
	}
	var f figures
	return f, json.Unmarshal(outs[0].Bytes(), &f)
}
