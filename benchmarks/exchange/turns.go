package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// hubFrom is the number of ranks from which on natsdp has a hub, and the baseline gathers.
const hubFrom = 16

// turnMost is how long a turn may take.
const turnMost = 10 * time.Minute

// result is what a group has taken, in each turn.
type result struct {
	group                 group
	natsdp, baseline, mpi []figures
}

func (r *result) baselineName() string {
	if r.group.size() < hubFrom {
		return "bare"
	}
	return "gather"
}

// measure lets natsdp and what it is compared with take turns in each group, and prints the tables.
func measure(ctx context.Context, o options, stdout io.Writer) error {
	s, err := startServer()
	if err != nil {
		return err
	}
	defer stopServer(s)
	m, err := newMPI(ctx)
	if err != nil {
		return err
	}
	defer m.remove()
	results := make([]result, len(o.groups))
	for turn := range o.turns {
		for i, g := range o.groups {
			r := &results[i]
			r.group = g
			take := func(kind string, to *[]figures) error {
				f, err := takeTurn(ctx, job{
					Kind: kind, Group: fmt.Sprintf("%s-%d-%d", kind, i, turn),
					URL: s.ClientURL(), Monitor: "http://" + s.MonitorAddr().String(),
					Size: g.size(), Rounds: o.rounds,
				}, g, o.goroutines)
				if err != nil {
					return fmt.Errorf("%s with %s ranks: %w", kind, g, err)
				}
				*to = append(*to, f)
				return nil
			}
			if err := take("natsdp", &r.natsdp); err != nil {
				return err
			}
			if err := take(r.baselineName(), &r.baseline); err != nil {
				return err
			}
			if f, ok := m.takeTurn(ctx, g, o.rounds); ok {
				r.mpi = append(r.mpi, f)
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	if err := printTable(stdout, results); err != nil {
		return err
	}
	if err := m.print(stdout, results); err != nil {
		return err
	}
	return printGoals(stdout, results)
}

// startServer starts a NATS server on free ports of loopback.
func startServer() (*server.Server, error) {
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
		HTTPHost: "127.0.0.1", HTTPPort: server.RANDOM_PORT,
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

// takeTurn runs the processes of a group. It returns the figures of rank 0, which are those of all,
// since no rank is ever more than a round ahead, but for those that are about all ranks.
func takeTurn(ctx context.Context, j job, g group, goroutines bool) (figures, error) {
	ctx, cancel := context.WithTimeout(ctx, turnMost)
	defer cancel()
	do := startProcess
	if goroutines {
		do = work
	}
	j.Began = time.Now()
	all := make([]figures, g.processes)
	errs := make([]error, g.processes)
	var wg sync.WaitGroup
	for p := range g.processes {
		j := j
		j.Ranks = make([]int, g.per)
		for i := range j.Ranks {
			j.Ranks[i] = p*g.per + i
		}
		wg.Go(func() {
			if all[p], errs[p] = do(ctx, j); errs[p] != nil {
				errs[p] = fmt.Errorf("ranks %v: %w", j.Ranks, errs[p])
				cancel() // the others wait for it
			}
		})
	}
	wg.Wait()
	f := all[0]
	for _, other := range all[1:] {
		f.Joined = max(f.Joined, other.Joined)
		f.Resent += other.Resent
	}
	return f, errors.Join(errs...)
}

// startProcess does a job in a process of its own.
func startProcess(ctx context.Context, j job) (f figures, err error) {
	program, err := os.Executable()
	if err != nil {
		return f, err
	}
	text, err := json.Marshal(j)
	if err != nil {
		return f, err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = append(os.Environ(), jobVariable+"="+string(text))
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return f, err
	}
	return f, json.Unmarshal(out.Bytes(), &f)
}
