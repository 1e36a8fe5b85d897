package fwd_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// goTool runs the go command in the module's root and returns what it prints.
func goTool(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out
}

// within reports whether path is one of the trees or lies in one.
func within(path string, trees ...string) bool {
	return slices.ContainsFunc(trees, func(tree string) bool {
		return path == tree || strings.HasPrefix(path, tree+"/")
	})
}

// A program that links the library pays for what it imports: the telemetry interfaces, and no implementation of them.
func TestDependencies(t *testing.T) {
	deps := strings.Fields(string(goTool(t, "list", "-deps", ".")))
	for _, needed := range []string{"github.com/forwardctx/fwd", "go.opentelemetry.io/otel/trace", "gonum.org/v1/gonum/mat"} {
		if !slices.Contains(deps, needed) {
			t.Fatalf("go list names %d packages, and %s is not among them", len(deps), needed)
		}
	}
	for _, dep := range deps {
		if within(dep, "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters", "google.golang.org/grpc") ||
			strings.Contains(dep, "exporter") {
			t.Errorf("the package depends on %s", dep)
		}
	}
}

// Every requirement of this module is one of its users' module graph too.
func TestDirectRequirements(t *testing.T) {
	var mod struct {
		Module  struct{ Path string }
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(goTool(t, "mod", "edit", "-json"), &mod); err != nil {
		t.Fatal(err)
	}
	if mod.Module.Path != "github.com/forwardctx/fwd" || len(mod.Require) == 0 {
		t.Fatalf("go.mod is that of %q and requires %d modules", mod.Module.Path, len(mod.Require))
	}
	for _, r := range mod.Require {
		if !r.Indirect && !within(r.Path, "go.opentelemetry.io/otel", "github.com/google/go-cmp", "gonum.org/v1/gonum") {
			t.Errorf("go.mod requires %s directly", r.Path)
		}
	}
}

// The root has six files of library code. Everything else has a folder and a module of its own.
func TestRootFiles(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		if name := entry.Name(); strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go") {
			got = append(got, name)
		}
	}
	want := []string{"batch.go", "doc.go", "dp.go", "fwd.go", "graphmode.go", "logging.go"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Go files in the root (-want +got):\n%s", diff)
	}
}
