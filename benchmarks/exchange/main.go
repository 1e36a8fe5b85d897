// Exchange measures what a step's exchange of votes costs, beside the least that it could cost.
//
//	go -C benchmarks run ./exchange
//	go -C benchmarks run ./exchange -goroutines -ranks 2,4,8,16,32,64,128,256 -rounds 100
//	go -C benchmarks run ./exchange -ranks 32,32x8 -rounds 100
//
// Each rank is a process of its own with its own connection to one NATS server on loopback, or a
// goroutine with its own connection, or processes have several ranks each, which share a connection.
// natsdp exchanges votes. Its baseline does that in the same way over core NATS, with messages of
// the same length, and without steps, deadlines, or anything for lost messages: in a small group each
// sends to all, which is called bare; in a large one each sends to one, which sends all in one message
// to all, which is called gather. Where mpicc and mpirun are installed, MPI_Allgather moves the same
// votes between processes, without a broker. All take turns in the same run. The table says how long
// they took, and compares them by the median of the ratios of all turns.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the next signal kills
	if text, ok := os.LookupEnv(jobVariable); ok {
		if err := workAsProcess(ctx, text, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "exchange:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags.
type options struct {
	groups     []group
	goroutines bool
	rounds     int
	turns      int
}

// group is processes, or goroutines, with some ranks each.
type group struct{ processes, per int }

func (g group) size() int { return g.processes * g.per }

func (g group) String() string {
	if g.per == 1 {
		return strconv.Itoa(g.processes)
	}
	return fmt.Sprintf("%dx%d", g.processes, g.per)
}

// mostRanks bounds a group: each rank of it gets all votes.
const mostRanks = 1024

// parseGroup reads a number of ranks, such as 32, or of processes and ranks of each, such as 32x8.
func parseGroup(text string) (group, error) {
	processes, per, several := strings.Cut(text, "x")
	if !several {
		per = "1"
	}
	p, err := strconv.Atoi(processes)
	n, err2 := strconv.Atoi(per)
	if err != nil || err2 != nil || p < 2 || n < 1 || p > mostRanks || n > mostRanks/p {
		return group{}, fmt.Errorf("%q is not a number from 2 to %d, "+
			"and not PROCESSESxRANKS with at most so many ranks in all", text, mostRanks)
	}
	return group{p, n}, nil
}

func parseFlags(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("exchange", flag.ContinueOnError)
	flags.SetOutput(stderr)
	o.groups = []group{{2, 1}, {4, 1}, {8, 1}}
	const usage = "`groups`, separated by commas: numbers of ranks, or PROCESSESxRANKS for processes with\n" +
		"several ranks each, such as 32x8 (default 2,4,8)"
	flags.Func("ranks", usage, func(s string) error {
		o.groups = nil
		for field := range strings.SplitSeq(s, ",") {
			g, err := parseGroup(field)
			if err != nil {
				return err
			}
			o.groups = append(o.groups, g)
		}
		return nil
	})
	flags.BoolVar(&o.goroutines, "goroutines", false, "no processes: goroutines with a connection each")
	flags.IntVar(&o.rounds, "rounds", 10_000, "`rounds` that each turn takes")
	flags.IntVar(&o.turns, "turns", 5, "`turns` of natsdp and what it is compared with")
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
