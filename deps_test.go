// This file tests what an adopter gets with the package: modules, packages and files.

package fwd_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// goTool runs the go command in the module's root and returns what it prints. The command reads go.mod, also
// when these tests run with the requirements of another file (go test -modfile).
func goTool(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(cmd.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// linked are the modules whose code becomes part of a program that imports the package.
var linked = []string{
	"github.com/cespare/xxhash/v2",
	"github.com/forwardctx/fwd",
	"github.com/go-logr/logr",
	"github.com/go-logr/stdr",
	"go.opentelemetry.io/auto/sdk", // for tracing by eBPF; otel imports it, and it is not the OpenTelemetry SDK
	"go.opentelemetry.io/otel",
	"go.opentelemetry.io/otel/metric",
	"go.opentelemetry.io/otel/trace",
	"gonum.org/v1/gonum",
}

// A program pays for the code that it links: the telemetry interfaces, and no implementation of them.
func TestLinkedModules(t *testing.T) {
	t.Parallel()
	const format = "{{with .Module}}{{.Path}}{{end}}"
	got := strings.Fields(goTool(t, "list", "-deps", "-f", format, "."))
	slices.Sort(got)
	if diff := cmp.Diff(linked, slices.Compact(got)); diff != "" {
		t.Errorf("modules of go list -deps (-want +got):\n%s", diff)
	}
}

// The requirements of go.mod enter the module graph of everyone who requires this module. They are the linked
// modules, and one for tests.
func TestRequirements(t *testing.T) {
	t.Parallel()
	var mod struct {
		Module    struct{ Path string }
		Toolchain string
		Require   []struct {
			Path     string
			Indirect bool
		}
		Replace, Exclude, Tool []any
	}
	if err := json.Unmarshal([]byte(goTool(t, "mod", "edit", "-json")), &mod); err != nil {
		t.Fatal(err)
	}
	got, direct := []string{mod.Module.Path}, []string{}
	for _, r := range mod.Require {
		got = append(got, r.Path)
		if !r.Indirect {
			direct = append(direct, r.Path)
		}
	}
	slices.Sort(got)
	slices.Sort(direct)
	want := append([]string{"github.com/google/go-cmp"}, linked...)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("modules in go.mod (-want +got):\n%s", diff)
	}
	want = []string{
		"github.com/google/go-cmp", "go.opentelemetry.io/otel", "go.opentelemetry.io/otel/metric",
		"go.opentelemetry.io/otel/trace", "gonum.org/v1/gonum",
	}
	if diff := cmp.Diff(want, direct); diff != "" {
		t.Errorf("direct requirements in go.mod (-want +got):\n%s", diff)
	}
	if n := len(mod.Replace) + len(mod.Exclude) + len(mod.Tool); n > 0 || mod.Toolchain != "" {
		t.Errorf("go.mod has %d lines of replace, exclude or tool, and toolchain %q; want none", n, mod.Toolchain)
	}
}

// The tests with the SDK are in integration/sdk, so that neither file of the root names it.
func TestNoSDK(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "go.opentelemetry.io/otel/trace ") {
			t.Errorf("%s does not name go.opentelemetry.io/otel/trace", name)
		}
		sdk := regexp.MustCompile(`(?m)^.*(opentelemetry\.io/otel/(sdk|exporters)|google\.golang\.org/grpc).*$`)
		for _, line := range sdk.FindAllString(string(text), -1) {
			t.Errorf("%s: %s", name, line)
		}
	}
}

// The root has six files of library code. Everything else has a folder and a module of its own.
func TestRootFiles(t *testing.T) {
	t.Parallel()
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
