package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// sizesOptions are the flags for the sizes of graphs and batches.
type sizesOptions struct {
	capture       captureSizes
	maxSeqs       int
	batchedTokens int
	sizes         string
	replan        int
}

func (o *sizesOptions) define(flags *flag.FlagSet) {
	flags.Var(&o.capture, "capture-sizes",
		"sizes of graphs in tokens, as a `list` 1,2,4,8 or as the name of a\n"+
			"file with such a list or with a plan of fwdplan -json")
	flags.IntVar(&o.replan, "replan", 0,
		"every `N` steps that ran by graphs choose the capture sizes anew from\n"+
			"the sizes of all steps so far, capture the graphs that are missing and\n"+
			"drop those that are not needed any more: at most as many as at the\n"+
			"start, with the same largest size (0: never)")
	flags.IntVar(&o.maxSeqs, "max-seqs", 0, "most `requests` of a rank in a step (0: 16)")
	flags.IntVar(&o.batchedTokens, "batched-tokens", 0, "most `tokens` of a rank in a step (0: 128)")
	flags.StringVar(&o.sizes, "sizes", "", "write to this `file` how many passes there were of each size,\n"+
		"for fwdplan; with -processes, rank R has file.R")
}

func (o *sizesOptions) validate(graph fwd.GraphMode, bad func(string, ...any)) {
	if o.replan < 0 {
		bad("-replan is %d, want at least 0", o.replan)
	}
	if o.replan > 0 && graph == fwd.GraphNone {
		bad("-replan is %d with -graph %v, which has no graphs", o.replan, graph)
	}
	if o.maxSeqs < 0 {
		bad("-max-seqs is %d, want at least 0", o.maxSeqs)
	}
	if o.batchedTokens < 0 {
		bad("-batched-tokens is %d, want at least 0", o.batchedTokens)
	}
}

// captureSizes is the value of -capture-sizes. nil is the engine's default.
type captureSizes struct {
	text  string
	sizes []int
}

// String implements [flag.Value].
func (c *captureSizes) String() string { return c.text }

// Set implements [flag.Value].
func (c *captureSizes) Set(text string) error {
	sizes, err := parseSizes(text)
	if err != nil && !looksLikeList(text) {
		sizes, err = readSizes(text)
	}
	if err != nil {
		return err
	}
	c.text, c.sizes = text, sizes
	return nil
}

func looksLikeList(text string) bool { return strings.Trim(text, "0123456789, -") == "" }

// readSizes reads sizes from a file: a list, or what fwdplan -json prints.
func readSizes(path string) ([]int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var printed struct{ Plan *fwdplan.Plan }
	if json.Unmarshal(data, &printed) != nil || printed.Plan == nil {
		sizes, err := parseSizes(strings.TrimSpace(string(data)))
		if err != nil {
			return nil, fmt.Errorf("%s has neither a list of sizes (%w) nor a plan", path, err)
		}
		return sizes, nil
	}
	if len(printed.Plan.MixedSizes) > 0 {
		return nil, fmt.Errorf("%s has sizes of their own for mixed batches; plan without -separate", path)
	}
	if len(printed.Plan.Sizes) == 0 {
		return nil, fmt.Errorf("%s has a plan without sizes", path)
	}
	return printed.Plan.Sizes, nil
}

// parseSizes reads numbers that are separated by commas, spaces or lines.
func parseSizes(text string) (sizes []int, err error) {
	isGap := func(r rune) bool { return strings.ContainsRune(", \r\n", r) }
	for _, field := range strings.FieldsFunc(text, isGap) {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%.40q is not a size, want a whole number of at least 1", field)
		}
		sizes = append(sizes, n)
	}
	if len(sizes) == 0 {
		return nil, errors.New("no sizes")
	}
	return sizes, nil
}

// sizesFile is where the sizes of passes are written when the run has ended. Its contents are another
// file's until then, so that what was there before is replaced as a whole or not at all.
type sizesFile struct {
	path  string
	part  *os.File
	sizes fwdplan.Sizes
}

func startSizes(path string) (*sizesFile, error) {
	part, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".part-*")
	if err != nil {
		return nil, err
	}
	return &sizesFile{path: path, part: part}, nil
}

// write ends the counting.
func (f *sizesFile) write() error {
	data, err := json.Marshal(f.sizes.Snapshot())
	if err == nil {
		_, err = f.part.Write(append(data, '\n'))
	}
	if err = errors.Join(err, f.part.Close()); err == nil {
		err = os.Rename(f.part.Name(), f.path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(f.part.Name()))
	}
	return err
}
