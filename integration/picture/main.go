// Picture draws a step of the example engine on four data-parallel ranks: how long they wait for
// each other's votes, and the graph modes, tokens and padding of their passes. It records the step
// from a run of the engine:
//
//	go -C integration run ./picture -o ../testdata/step.svg
//
// The recording is kept beside the picture, in a file whose name ends in .json instead of .svg. It
// can be drawn again:
//
//	go -C integration run ./picture -from ../testdata/step.json -o ../testdata/step.svg
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/forwardctx/fwd/integration/picture/timeline"
)

func main() {
	from := flag.String("from", "", "draw the recording in this JSON `file` (default: record a step)")
	out := flag.String("o", "step.svg", "write to this SVG `file`, and a new recording to a .json beside it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *from, *out); err != nil {
		fmt.Fprintln(os.Stderr, "picture:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, from, out string) error {
	if filepath.Ext(out) != ".svg" {
		return fmt.Errorf("-o is %q, want a name that ends in .svg", out)
	}
	if from == "" {
		spans, err := record(ctx)
		if err != nil {
			return err
		}
		recording, err := encode(spans)
		if err != nil {
			return err
		}
		from = strings.TrimSuffix(out, ".svg") + ".json"
		if err := os.WriteFile(from, recording, 0o644); err != nil {
			return err
		}
	}
	spans, err := read(from)
	if err != nil {
		return err
	}
	svg, err := timeline.SVG(spans)
	if err != nil {
		return err
	}
	return os.WriteFile(out, svg, 0o644)
}

// encode writes spans as a JSON array, one in a line.
func encode(spans []timeline.Span) ([]byte, error) {
	lines := make([][]byte, len(spans))
	for i, s := range spans {
		var err error
		if lines[i], err = json.Marshal(s); err != nil {
			return nil, err
		}
	}
	return fmt.Appendf(nil, "[\n%s\n]\n", bytes.Join(lines, []byte(",\n"))), nil
}

// read reads the spans that encode wrote.
func read(file string) ([]timeline.Span, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var spans []timeline.Span
	if err := json.Unmarshal(data, &spans); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return spans, nil
}
