package main

import (
	"bytes"
	"context"
	_ "embed" // of allgather.c
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

//go:embed allgather.c
var allGatherSource []byte

// mpiMost is how many processes MPI is measured with: they poll, and need tens of megabytes each.
const mpiMost = 64

// mpi measures MPI_Allgather between processes.
type mpi struct {
	dir    string
	failed error // why nothing is measured any more; nil: it is
}

var errNoMPI = errors.New("mpicc and mpirun are not there (Debian: openmpi-bin, libopenmpi-dev)")

// newMPI builds the program, if MPI is installed.
func newMPI(ctx context.Context) (*mpi, error) {
	for _, tool := range []string{"mpicc", "mpirun"} {
		if _, err := exec.LookPath(tool); err != nil {
			return &mpi{failed: errNoMPI}, nil
		}
	}
	dir, err := os.MkdirTemp("", "allgather")
	if err != nil {
		return nil, err
	}
	m := &mpi{dir: dir}
	source := filepath.Join(dir, "allgather.c")
	if err := os.WriteFile(source, allGatherSource, 0o600); err != nil {
		m.remove()
		return nil, err
	}
	_, m.failed = output(ctx, "mpicc", "-std=c99", "-O2", "-o", m.program(), source)
	return m, nil
}

func (m *mpi) program() string { return filepath.Join(m.dir, "allgather") }

func (m *mpi) remove() {
	if m.dir != "" {
		os.RemoveAll(m.dir)
	}
}

// takeTurn measures as many processes as a group has, with the votes of their ranks. After a failure
// it measures nothing more, since MPI is only there to compare with.
func (m *mpi) takeTurn(ctx context.Context, g group, rounds int) (f figures, ok bool) {
	if m.failed != nil || g.processes > mpiMost {
		return f, false
	}
	ctx, cancel := context.WithTimeout(ctx, turnMost)
	defer cancel()
	args := []string{"--oversubscribe"}
	if os.Geteuid() == 0 {
		args = append(args, "--allow-run-as-root")
	}
	args = append(args, "-np", strconv.Itoa(g.processes), m.program(),
		strconv.Itoa(rounds/10+1), strconv.Itoa(rounds), strconv.Itoa(g.per*voteSize))
	out, err := output(ctx, "mpirun", args...)
	if err == nil {
		_, err = fmt.Sscan(out, &f.P50, &f.P99)
	}
	m.failed = err
	return f, err == nil
}

// output runs a program. The error says what it wrote first about what went wrong.
func output(ctx context.Context, name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	// A program that is told to end can end its processes too.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %.200q", name, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// print compares natsdp with MPI, or says why there is nothing to compare.
func (m *mpi) print(w io.Writer, results []result) error {
	if m.failed != nil {
		_, err := fmt.Fprintf(w, "\nMPI_Allgather is not measured: %v\n", m.failed)
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nranks\tMPI_Allgather between processes, p50, p99 (µs)\tnatsdp / MPI, p50")
	for _, r := range results {
		if len(r.mpi) == 0 {
			fmt.Fprintf(table, "%s\tonly up to %d processes\n", r.group, mpiMost)
			continue
		}
		fmt.Fprintf(table, "%s\t%.0f, %.0f\t%.1f\n", r.group, middle(r.mpi, p50), middle(r.mpi, p99),
			ratio(r.natsdp, r.mpi, p50))
	}
	return table.Flush()
}
