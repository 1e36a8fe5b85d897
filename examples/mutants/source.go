package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// fault is one change that makes the package wrong.
type fault struct {
	name string
	kind kind
	what string // is wrong, in a few words
	file string // of the package, or its path from there
	old  string // what stands there, once
	new  string // what stands there instead
}

// kind is what part of the package a fault is in.
type kind string

const (
	arithmetic   kind = "arithmetic"   // of token counts across ranks
	coordination kind = "coordination" // what ranks agree on
	protocol     kind = "protocol"     // how ranks come to agree, also with idle ones
	planning     kind = "planning"     // from a schedule to a pass
	microbatch   kind = "microbatch"   // splitting a pass, and what its parts see
	inContext    kind = "context"      // what model code finds in its context
	running      kind = "running"      // what a Runner does with a pass
	graph        kind = "graph"        // which graph serves a batch, and the cache
	telemetry    kind = "telemetry"    // spans and metrics
	overlap      kind = "overlap"      // what the engine does ahead of its passes
	ladder       kind = "ladder"       // how the engine changes its capture sizes
)

// carriesAnswers reports whether faults of this kind must show in what an engine computes or emits, not
// only in unit tests.
func (k kind) carriesAnswers() bool {
	return k == arithmetic || k == coordination || k == microbatch
}

// control is the absence of a fault.
var control = fault{name: "control", kind: "none", what: "nothing is wrong"}

// apply returns source with the fault in it. The text to replace must stand there exactly once: otherwise
// the package has changed, and the fault must follow it.
func (f *fault) apply(source string) (string, error) {
	if f.old == "" || f.old == f.new {
		return "", fmt.Errorf("fault %s changes nothing", f.name)
	}
	if n := strings.Count(source, f.old); n != 1 {
		return "", fmt.Errorf("fault %s: want its text once in %s, found it %d times:\n%s",
			f.name, f.file, n, indent(f.old, "\t| "))
	}
	return strings.Replace(source, f.old, sameLines(f.old, f.new), 1), nil
}

// line returns the number of the first changed line of source.
func (f *fault) line(source string) int {
	return 1 + strings.Count(source[:strings.Index(source, f.old)], "\n")
}

func indent(text, prefix string) string {
	return prefix + strings.ReplaceAll(text, "\n", "\n"+prefix)
}

// sources are the files that faults are in, by name.
type sources map[string]string

// readSources reads the files that faults are in.
func readSources(dir string) (sources, error) {
	s := sources{}
	for _, f := range faults {
		if _, ok := s[f.file]; ok {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, f.file))
		if err != nil {
			return nil, fmt.Errorf("fault %s: %w", f.name, err)
		}
		s[f.file] = string(text)
	}
	return s, nil
}

// checkAll returns what keeps faults from being applied.
func (s sources) checkAll(faults []fault) error {
	var errs []error
	for _, f := range faults {
		_, err := f.apply(s[f.file])
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// overlay writes the faulty file and an overlay that puts it in place of the package's to dir, and returns
// the path of the overlay. The control has an empty one.
func (s sources) overlay(f *fault, root, dir string) (path string, err error) {
	replace := map[string]string{}
	if f.file != "" {
		text, err := f.apply(s[f.file])
		if err != nil {
			return "", err
		}
		faulty := filepath.Join(dir, filepath.Base(f.file))
		if err := os.WriteFile(faulty, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(root, f.file)] = faulty
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, text, 0o600)
}

// list prints faults, each with its place and, if asked for, with the change.
func list(w io.Writer, src sources, faults []fault, changes bool) error {
	if err := src.checkAll(faults); err != nil {
		return err
	}
	for _, f := range faults {
		place := fmt.Sprintf("%s:%d", f.file, f.line(src[f.file]))
		if _, err := fmt.Fprintf(w, "%-28s %-12s %-16s %s\n", f.name, f.kind, place, f.what); err != nil {
			return err
		}
		if !changes {
			continue
		}
		if _, err := fmt.Fprintf(w, "%s\n%s\n\n", indent(f.old, "\t- "), indent(f.new, "\t+ ")); err != nil {
			return err
		}
	}
	return nil
}

// modules are the directories of the modules that are built.
type modules struct{ root, examples, sdk string }

func findModules(ctx context.Context) (modules, error) {
	const fwd = "github.com/forwardctx/fwd"
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", fwd, fwd+"/examples").Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return modules{}, fmt.Errorf("the command must run within the examples module: %w", err)
	}
	dirs := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(dirs) != 2 {
		return modules{}, fmt.Errorf("go list says that the modules are in %q", dirs)
	}
	return modules{root: dirs[0], examples: dirs[1], sdk: filepath.Join(dirs[0], "integration", "sdk")}, nil
}
