// Fwdplan says which capture sizes are worth having for the traffic in snapshots of a fwdplan.Sizes.
//
//	go -C fwdplan run ./cmd/fwdplan -graphs 16 -must 512 -compare default monday.json tuesday.json
//
// Several snapshots of the same engine, of other ranks or days, count together. "-" is standard input.
//
// It exits with 0 when all went well, with 1 on an error, and with 2 for a command line that is wrong.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

func main() { os.Exit(start(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// start runs the command and returns its exit status.
func start(args []string, stdin io.Reader, stdout, stderr io.Writer) (exit int) {
	err := run(args, stdin, stdout)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, new(usageError)):
		fmt.Fprintf(stderr, "fwdplan -h explains the flags.\nfwdplan: %v\n", err)
		return 2
	}
	fmt.Fprintln(stderr, "fwdplan:", err)
	return 1
}

// usageError says that the command line is wrong.
type usageError struct{ error }

// options are what the command line says.
type options struct {
	config  fwdplan.Config
	compare []string
	judge   string
	svg     string
	json    bool
	paths   []string
}

// result is what -json prints.
type result struct {
	Plan     fwdplan.Plan `json:"plan"`
	Compared []compared   `json:"compared"`
	Judged   []compared   `json:"judged,omitempty"` // on the snapshot of -judge
}

type compared struct {
	Name string `json:"name"`
	fwdplan.Ladder
	fwdplan.Outcome
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	o, err := parse(args, stdout)
	if err != nil {
		return err
	}
	snapshot, err := readAll(o.paths, stdin)
	if err != nil {
		return err
	}
	var r result
	if r.Plan, err = fwdplan.Choose(snapshot, o.config); err != nil {
		return err
	}
	ladders := []compared{{Name: "plan", Ladder: r.Plan.Ladder}}
	for _, text := range o.compare {
		ladder, err := parseLadder(text, r.Plan, o.config)
		if err != nil {
			return fmt.Errorf("-compare %s: %w", text, err)
		}
		ladders = append(ladders, compared{Name: text, Ladder: ladder})
	}
	if r.Compared, err = evaluate(snapshot, o.config, ladders); err != nil {
		return err
	}
	if o.judge != "" {
		other, err := readAll([]string{o.judge}, stdin)
		if err != nil {
			return err
		}
		if r.Judged, err = evaluate(other, o.config, ladders); err != nil {
			return fmt.Errorf("-judge %s: %w", o.judge, err)
		}
	}
	if o.svg != "" {
		if err := os.WriteFile(o.svg, picture(snapshot, &r), 0o644); err != nil {
			return err
		}
	}
	if o.json {
		out := json.NewEncoder(stdout)
		out.SetIndent("", "  ")
		return out.Encode(r)
	}
	_, err = io.WriteString(stdout, table(snapshot, &r, &o))
	return err
}

// parse returns the options. Help that is asked for goes to stdout.
func parse(args []string, stdout io.Writer) (options, error) {
	var o options
	c := &o.config
	flags := flag.NewFlagSet("fwdplan", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what is wrong is in the error
	usage := func() {
		flags.SetOutput(stdout)
		fmt.Fprint(stdout,
			"usage: fwdplan [flags] SNAPSHOT...\n\nThe capture sizes that cost least for the passes in "+
				"the snapshots, \"-\" being standard input.\n\n")
		flags.PrintDefaults()
	}
	flags.IntVar(&c.MaxGraphs, "graphs", 0, "at most this many `graphs`; 16, or with -price as many as pay")
	flags.Float64Var(&c.GraphPrice, "price", 0,
		"what a graph costs, in padded `tokens` (with -measured: seconds)")
	flags.IntVar(&c.Multiple, "multiple", 0, "sizes are multiples of `N`; the query length if 0")
	flags.Func("must", "`sizes` that must be there, such as 256,512", func(s string) (err error) {
		c.Must, err = numbers(s)
		return err
	})
	flags.IntVar(&c.Max, "max", 0, "the largest `size` worth a graph; that of -must or the largest seen if 0")
	flags.BoolVar(&c.Measured, "measured", false, "passes cost the time that they took, not their tokens")
	flags.Float64Var(&c.EagerPrice, "eager-price", 0,
		"what a `token` costs without a graph, if it costs 1 with one; "+
			"if 0, all passes up to -max get graphs")
	flags.BoolVar(&c.Unseen, "unseen", false, "allow for sizes that were not seen")
	flags.BoolVar(&c.Separate, "separate", false, "one list for decode batches, one for mixed batches")
	d := &c.Dispatcher
	flags.TextVar(&d.Mode, "mode", fwd.GraphPiecewise, "the dispatcher's graph `mode`")
	flags.IntVar(&d.MaxNumSeqs, "max-seqs", 0, "the dispatcher's most `requests` in a batch; 0: no limit")
	flags.IntVar(&d.UniformDecodeQueryLen, "query-len", 1, "`tokens` of a request in a uniform decode batch")
	loras := flags.Int("max-loras", 0, "the dispatcher's most active `adapters`; 0: none")
	byCount := flags.Bool("lora-counts", false, "the dispatcher has graphs by the number of adapters")
	flags.Func("compare", "a `list` to set beside the plan, such as default or 1,2,4,8...; may be repeated",
		func(s string) error { o.compare = append(o.compare, split(s)...); return nil })
	flags.StringVar(&o.judge, "judge", "", "a `snapshot` that the plan has not seen, to judge it on")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	flags.StringVar(&o.svg, "svg", "", "draw a picture into this `file`")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		usage()
		return o, err
	} else if err != nil {
		return o, usageError{err}
	}
	if o.paths = flags.Args(); len(o.paths) == 0 {
		return o, usageError{errors.New("which snapshots? Give their files, or - for standard input")}
	}
	if *loras > 0 {
		d.LoRA = &fwd.LoRAConfig{MaxLoRAs: *loras, SpecializeCount: *byCount}
	}
	if c.MaxGraphs == 0 && c.GraphPrice == 0 {
		c.MaxGraphs = 16
	}
	return o, nil
}

// readAll returns the snapshots of the files, merged.
func readAll(paths []string, stdin io.Reader) (fwdplan.Snapshot, error) {
	var sum fwdplan.Snapshot
	for _, path := range paths {
		s, err := read(path, stdin)
		if err == nil {
			sum, err = sum.Merge(s)
		}
		if err != nil {
			return sum, fmt.Errorf("%s: %w", path, err)
		}
	}
	return sum, nil
}

func read(path string, stdin io.Reader) (fwdplan.Snapshot, error) {
	if path == "-" {
		return fwdplan.ReadSnapshot(stdin)
	}
	f, err := os.Open(path)
	if err != nil {
		return fwdplan.Snapshot{}, errors.Unwrap(err) // without the path, which stands before it
	}
	defer f.Close()
	return fwdplan.ReadSnapshot(f)
}

func evaluate(s fwdplan.Snapshot, cfg fwdplan.Config, ladders []compared) ([]compared, error) {
	ladders = slices.Clone(ladders)
	for i := range ladders {
		var err error
		if ladders[i].Outcome, err = fwdplan.Evaluate(s, cfg, ladders[i].Ladder); err != nil {
			return nil, fmt.Errorf("%s: %w", ladders[i].Name, err)
		}
	}
	return ladders, nil
}

// split splits "default,1,2,4" into the lists that it names: "default" and "1,2,4".
func split(text string) (lists []string) {
	numbers := false
	for word := range strings.SplitSeq(text, ",") {
		word = strings.TrimSpace(word)
		if number := word != "default"; number && numbers {
			lists[len(lists)-1] += "," + word
		} else {
			lists = append(lists, word)
			numbers = number
		}
	}
	return lists
}

// parseLadder returns the sizes of a list: "default" is vLLM's up to the plan's largest, and "..." goes on
// up to there as the last two numbers do.
func parseLadder(text string, plan fwdplan.Plan, cfg fwdplan.Config) (fwdplan.Ladder, error) {
	largest := cfg.Max
	for _, sizes := range [][]int{plan.Sizes, plan.MixedSizes} {
		if len(sizes) > 0 {
			largest = max(largest, sizes[len(sizes)-1])
		}
	}
	if text == "default" {
		multiple := max(cfg.Multiple, cfg.Dispatcher.UniformDecodeQueryLen, 1)
		sizes, err := fwd.RoundCaptureSizes(fwd.DefaultCaptureSizes(largest), multiple)
		return ladderOf(sizes, cfg), err
	}
	list, goesOn := strings.CutSuffix(text, "...")
	sizes, err := numbers(strings.TrimSuffix(list, ","))
	if err != nil {
		return fwdplan.Ladder{}, err
	}
	if goesOn {
		if sizes, err = goOn(sizes, largest); err != nil {
			return fwdplan.Ladder{}, err
		}
	}
	return ladderOf(sizes, cfg), nil
}

// goOn doubles the last size if that is what the list did before, and otherwise adds as much as before.
func goOn(sizes []int, largest int) ([]int, error) {
	n := len(sizes)
	if n < 2 || sizes[n-1] <= sizes[n-2] || sizes[n-2] < 1 {
		return nil, errors.New(`"..." needs two ascending sizes before it`)
	}
	double, step := sizes[n-1] == 2*sizes[n-2], sizes[n-1]-sizes[n-2]
	for last := sizes[n-1]; ; sizes = append(sizes, last) {
		if double {
			step = last
		}
		if last += step; last > largest {
			return sizes, nil
		}
	}
}

// ladderOf returns the ladder that has the same sizes for all batches.
func ladderOf(sizes []int, cfg fwdplan.Config) fwdplan.Ladder {
	if cfg.Separate {
		return fwdplan.Ladder{Sizes: sizes, MixedSizes: sizes}
	}
	return fwdplan.Ladder{Sizes: sizes}
}

// numbers parses "1,2,4".
func numbers(text string) (list []int, err error) {
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(word))
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%.40q is not a size, a whole number from 1", word)
		}
		list = append(list, n)
	}
	return list, nil
}
