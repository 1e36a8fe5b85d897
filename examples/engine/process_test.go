// Ranks that share nothing but their coordinators, as processes do.

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
)

// simulated returns a test that runs in simulated time: an exchange times out when a rank stays
// away, and never because the machine is slow.
func simulated(test func(t *testing.T)) func(t *testing.T) {
	return func(t *testing.T) { synctest.Test(t, test) }
}

// fleet is ranks that share nothing but the coordinators of their groups, as processes do. Each has
// its share of the requests.
type fleet struct {
	*testing.T
	model    *model.Model
	cfg      Config
	requests [][]Request // by rank

	target, draft []fwd.Coordinator
}

// outcome is what came of one rank.
type outcome struct {
	engine  *Engine
	results []Result
	stats   Stats
	err     error
}

func newFleet(t *testing.T, cfg Config, requests []Request) *fleet {
	adapters := 0
	for _, r := range requests {
		adapters = max(adapters, r.Adapter)
	}
	size := max(cfg.DataParallelSize, 1)
	f := &fleet{T: t, model: newModel(t, adapters), cfg: cfg, requests: make([][]Request, size)}
	for i, r := range requests {
		f.requests[i%size] = append(f.requests[i%size], r)
	}
	for _, group := range []*[]fwd.Coordinator{&f.target, &f.draft} {
		var err error
		if *group, err = fwd.NewLocalGroup(size); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// config returns the configuration of a rank.
func (f *fleet) config(rank int, rejoin time.Duration) Config {
	cfg := f.cfg
	cfg.Process = &Process{Ranks: []int{rank}, Target: []fwd.Coordinator{f.target[rank]}, Rejoin: rejoin}
	cfg.Process.Same = []Setting{{"x", "1"}, {"y", "2"}}
	if cfg.NumSpeculativeTokens > 0 {
		cfg.Process.Draft = []fwd.Coordinator{f.draft[rank]}
	}
	return cfg
}

// run runs one rank.
func (f *fleet) run(ctx context.Context, cfg Config, requests []Request) outcome {
	e, err := New(f.model, cfg)
	if err != nil {
		return outcome{err: err}
	}
	results, stats, err := e.Run(ctx, requests)
	return outcome{e, results, stats, err}
}

// all runs all ranks, and compares what they have finished with the reference.
func (f *fleet) all(rejoin time.Duration) []outcome {
	return f.each(func(rank int) outcome { return f.run(f.Context(), f.config(rank, rejoin), f.requests[rank]) })
}

// each does the same with ranks that live as they are told.
func (f *fleet) each(live func(rank int) outcome) []outcome {
	f.Helper()
	outcomes := make([]outcome, len(f.requests))
	var wg sync.WaitGroup
	for rank := range outcomes {
		wg.Go(func() { outcomes[rank] = live(rank) })
	}
	wg.Wait()
	for rank, o := range outcomes {
		if o.engine != nil {
			compareAll(f.T, o.engine, f.requests[rank], o.results)
		}
	}
	return outcomes
}

// allFinished fails the test unless every rank has served all its requests.
func (f *fleet) allFinished(outcomes []outcome) {
	f.Helper()
	for rank, o := range outcomes {
		if o.err != nil || o.stats.Finished != len(f.requests[rank]) {
			f.Errorf("rank %d: %v, %d of %d requests finished in %d steps", rank, o.err, o.stats.Finished,
				len(f.requests[rank]), o.stats.Steps)
		}
	}
}

// TestProcesses: in every configuration, as far as any two settings go together, the answers are
// those of the reference, and all ranks stop after the same step.
func TestProcesses(t *testing.T) {
	forCovering(t, func(t *testing.T, cfg Config, adapters int) {
		requests := newRequests(9*cfg.DataParallelSize+1, 20, 10) // one rank has more than the others
		requests[0].Prompt = make([]int, 150)                     // larger than any graph
		f := newFleet(t, cfg, withAdapters(requests, adapters))
		outcomes := f.all(0)
		f.allFinished(outcomes)
		sum := Stats{}
		for rank, o := range outcomes {
			if o.stats.Steps != outcomes[0].stats.Steps || o.stats.FailedSteps != 0 {
				t.Errorf("rank %d took %d steps, rank 0 %d; %d failed", rank, o.stats.Steps, outcomes[0].stats.Steps,
					o.stats.FailedSteps)
			}
			if len(o.stats.Ranks) != 1 || o.stats.Ranks[0].Rank != rank {
				t.Errorf("rank %d has the figures of %+v", rank, o.stats.Ranks)
			}
			sum.SplitPasses += o.stats.SplitPasses
			sum.AcceptedTokens += o.stats.AcceptedTokens
			sum.Replays += o.stats.Replays - o.stats.Captures
			sum.DraftPasses += o.stats.DraftPasses
		}
		for what, got := range map[string]struct{ want, is bool }{
			"split passes":    {cfg.NumUBatches > 1, sum.SplitPasses > 0},
			"accepted tokens": {cfg.NumSpeculativeTokens > 0, sum.AcceptedTokens > 0},
			"replays":         {cfg.GraphMode != fwd.GraphNone, sum.Replays > 0},
			"draft passes":    {cfg.NumSpeculativeTokens > 0, sum.DraftPasses > 0},
		} {
			if got.want != got.is {
				t.Errorf("%s: %t, want %t: %+v", what, got.is, got.want, sum)
			}
		}
	})
}

// TestProcessesIdle: ranks that have nothing to serve keep step with one that has, and none of them
// takes a step for nothing.
func TestProcessesIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise}, newRequests(1, 30, 1))
		f.requests[0][0].MaxTokens = 40
		outcomes := f.all(0)
		f.allFinished(outcomes)
		if o := outcomes[2]; o.stats.Steps != 40 || o.stats.DummyPasses != 40 {
			t.Errorf("an idle rank took %d steps, %d of them dummy, want 40", o.stats.Steps, o.stats.DummyPasses)
		}
		f = newFleet(t, Config{DataParallelSize: 3}, nil)
		for rank, o := range f.all(0) {
			if o.err != nil || o.stats.Steps != 0 {
				t.Errorf("rank %d: %v after %d steps, with nothing to do", rank, o.err, o.stats.Steps)
			}
		}
	})
}

// TestProcessesSleep: requests are not served before they arrive, and no rank takes steps
// meanwhile.
func TestProcessesSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := newRequests(6, 20, 3)
		for i := range requests {
			requests[i].Arrival = time.Duration(i) * time.Second
		}
		for _, dp := range []int{1, 3} {
			f := newFleet(t, Config{DataParallelSize: dp, Speed: 10}, requests)
			outcomes := f.all(0)
			f.allFinished(outcomes)
			for rank, o := range outcomes {
				if o.stats.Duration < 450*time.Millisecond || o.stats.Duration > time.Second || o.stats.Steps > 6*3 {
					t.Errorf("dp %d, rank %d: 5 s at 10 times the speed took %v, in %d steps", dp, rank, o.stats.Duration,
						o.stats.Steps)
				}
			}
		}
	})
}

// atPass makes a rank do something in its nth pass, of a rank without graphs: its warm-up has no
// passes.
func atPass(cfg *Config, nth int64, do func() error) {
	var passes atomic.Int64
	cfg.Middleware = func(int) []fwd.Middleware {
		return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
			return func(ctx context.Context) error {
				if passes.Add(1) == nth {
					if err := do(); err != nil {
						return err
					}
				}
				return next(ctx)
			}
		}}
	}
}

// TestProcessesInterrupt: all ranks stop after the same step when one of them is interrupted, in
// its steps or in its sleep, and those with work left say whose doing it was.
func TestProcessesInterrupt(t *testing.T) {
	stop := errors.New("stop")
	for _, c := range []struct {
		name     string
		requests []Request
		arrival  time.Duration
		steps    int
	}{
		{"in a step", newRequests(90, 50, 30), 0, 20},
		{"asleep", newRequests(3, 5, 5), 10000 * time.Hour, 0},
	} {
		t.Run(c.name, simulated(func(t *testing.T) {
			for i := range c.requests {
				c.requests[i].Arrival = c.arrival
			}
			f := newFleet(t, Config{DataParallelSize: 3, Speed: 1, StopGrace: time.Minute}, c.requests)
			f.requests[2] = nil
			outcomes := f.each(func(rank int) outcome {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				cfg := f.config(rank, time.Hour)
				if rank == 1 {
					atPass(&cfg, 20, func() error { cancel(stop); return nil })
				}
				if rank == 1 && c.arrival > 0 {
					time.AfterFunc(100*time.Millisecond, func() { cancel(stop) })
				}
				return f.run(ctx, cfg, f.requests[rank])
			})
			for rank, o := range outcomes {
				if o.stats.Steps != c.steps {
					t.Errorf("rank %d stopped after %d steps, want %d", rank, o.stats.Steps, c.steps)
				}
			}
			if err := outcomes[0].err; !errors.Is(err, ErrInterrupted) ||
				!strings.Contains(err.Error(), "with rank 1") {
				t.Errorf("rank 0: %v, want ErrInterrupted with rank 1", err)
			}
			if outcomes[1].err != stop || outcomes[2].err != nil {
				t.Errorf("ranks 1 and 2: %v, %v; want %v, and nil of a rank with nothing to do", outcomes[1].err,
					outcomes[2].err, stop)
			}
		}))
	}
}

// TestProcessesInterruptAll: a rank that misses another when it is interrupted itself was
// interrupted, and has not failed.
func TestProcessesInterruptAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := errors.New("stop")
		f := newFleet(t,
			Config{DataParallelSize: 2, ExchangeTimeout: 200 * time.Millisecond, StopGrace: time.Minute},
			newRequests(40, 50, 20))
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, 0)
			if rank == 1 {
				atPass(&cfg, 5, func() error { cancel(stop); return errCrash })
			}
			return f.run(ctx, cfg, f.requests[rank])
		})
		if o := outcomes[0]; o.err != stop || o.stats.Steps != 5 {
			t.Errorf("%v after %d steps, want %v after 5", o.err, o.stats.Steps, stop)
		}
	})
}

var errCrash = errors.New("crash")

func crash() error { return errCrash }

// TestProcessesRankMissing: a rank that goes away ends the run of the others within the exchange
// timeout. They name it, and what they had finished stays right.
func TestProcessesRankMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, Config{DataParallelSize: 3, ExchangeTimeout: 2 * time.Second}, newRequests(60, 50, 60))
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, 0)
			if rank == 1 {
				atPass(&cfg, 28, crash)
			}
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		if err := outcomes[1].err; !errors.Is(err, errCrash) {
			t.Errorf("rank 1: %v, want %v", err, errCrash)
		}
		for _, rank := range []int{0, 2} {
			o := outcomes[rank]
			var rankErr *fwd.RankError
			ok := errors.As(o.err, &rankErr)
			if !ok || !errors.Is(o.err, fwd.ErrRankMissing) || !slices.Equal(rankErr.Ranks, []int{1}) ||
				o.stats.FailedSteps != 1 {
				t.Errorf("rank %d: %v after %d failed steps, want rank 1 missing in the first", rank, o.err,
					o.stats.FailedSteps)
			}
			if o.stats.Steps != 28 || o.stats.Finished == 0 || o.stats.Finished == o.stats.Requests {
				t.Errorf("rank %d: %d steps, %d of %d requests finished", rank, o.stats.Steps, o.stats.Finished,
					o.stats.Requests)
			}
		}
	})
}

// TestProcessesGiveUp: a rank that does not come back is waited for until Rejoin is over.
func TestProcessesGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, Config{DataParallelSize: 2, ExchangeTimeout: 100 * time.Millisecond},
			newRequests(40, 50, 20))
		var left time.Time
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, 500*time.Millisecond)
			if rank == 1 {
				atPass(&cfg, 20, func() error { left = time.Now(); return errCrash })
			}
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		waited := time.Since(left)
		if o := outcomes[0]; !errors.Is(o.err, fwd.ErrRankMissing) || o.stats.FailedSteps < 3 ||
			waited < 600*time.Millisecond || waited > 750*time.Millisecond {
			t.Errorf("%v after %d failed steps in %v", o.err, o.stats.FailedSteps, waited)
		}
	})
}

// TestProcessesOftenMissed: Rejoin is of each time that a rank is missing, not of all of them
// together.
func TestProcessesOftenMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rejoin = time.Second
		f := newFleet(t, Config{DataParallelSize: 2, ExchangeTimeout: 150 * time.Millisecond},
			[]Request{{Prompt: []int{1}, MaxTokens: 100}})
		var left atomic.Int64
		began := time.Now()
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, rejoin)
			if rank == 1 {
				cfg.Process.Target[0] = absent{
					cfg.Process.Target[0],
					func(step uint64) bool { return step%8 == 5 && left.Add(1) > 0 },
				}
			}
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		f.allFinished(outcomes)
		if n := left.Load(); n < 8 || time.Since(began) < rejoin {
			t.Errorf("rank 1 was missing %d times in %v", n, time.Since(began))
		}
		for rank, o := range outcomes {
			if o.stats.FailedSteps != int(left.Load()) {
				t.Errorf("rank %d: %d failed steps, where rank 1 was missing %d times", rank, o.stats.FailedSteps,
					left.Load())
			}
		}
	})
}

// TestProcessesRejoin: a rank goes away in the middle of a step and comes back with nothing but the
// requests that it had not finished. All requests are served, each once.
func TestProcessesRejoin(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		nth  int64 // pass that fails, with those of the draft
	}{
		{"in the first step", Config{DataParallelSize: 2}, 1},
		{"in a step", Config{DataParallelSize: 3}, 21},
		{"in a step with microbatches", Config{DataParallelSize: 2, NumUBatches: 2}, 16},
		{"in a step with guesses", Config{DataParallelSize: 2, NumSpeculativeTokens: 2}, 3*13 + 1},
		{"in a guess", Config{DataParallelSize: 3, NumSpeculativeTokens: 2}, 3*13 + 3},
	} {
		t.Run(c.name, simulated(func(t *testing.T) {
			c.cfg.ExchangeTimeout = time.Second
			f := newFleet(t, c.cfg, newRequests(20*c.cfg.DataParallelSize, 50, 20))
			for rank, o := range f.comeBack(c.nth) {
				// Its peers missed it in one group, and met it at another step, in each of the models' groups.
				if n := o.stats.FailedSteps; n == 0 || n > 6 {
					t.Errorf("rank %d: %d failed steps", rank, n)
				}
			}
		}))
	}
}

// comeBack runs all ranks. Rank 1 goes away in its nth pass and comes back with nothing but the requests
// that it had not finished. All requests must be served, each once.
func (f *fleet) comeBack(nth int64) []outcome {
	f.Helper()
	var mu sync.Mutex
	served := map[int]int{}
	f.cfg.Finished = func(r Result) error {
		mu.Lock()
		defer mu.Unlock()
		served[r.ID]++
		return nil
	}
	outcomes := f.each(func(rank int) outcome {
		cfg := f.config(rank, time.Hour)
		if rank != 1 {
			return f.run(f.Context(), cfg, f.requests[rank])
		}
		life := cfg
		atPass(&life, nth, crash)
		first := f.run(f.Context(), life, f.requests[rank])
		if !errors.Is(first.err, errCrash) {
			f.Errorf("the first life ended with %v, want %v", first.err, errCrash)
		}
		return f.resume(cfg, first, f.requests[rank])
	})
	f.allFinished(outcomes)
	for rank, requests := range f.requests {
		for _, r := range requests {
			if served[r.ID] != 1 {
				f.Errorf("rank %d: request %d was finished %d times", rank, r.ID, served[r.ID])
			}
		}
	}
	return outcomes
}

// resume runs a rank again, with what it had not finished, and returns the outcome of both lives.
func (f *fleet) resume(cfg Config, first outcome, requests []Request) outcome {
	var rest []Request
	for i, r := range first.results {
		if !r.Finished {
			rest = append(rest, requests[i])
		}
	}
	second := f.run(f.Context(), cfg, rest)
	for _, r := range second.results {
		i := slices.IndexFunc(requests, func(q Request) bool { return q.ID == r.ID })
		first.results[i] = r
	}
	second.stats.Finished += first.stats.Finished
	second.results = first.results
	return second
}

// forgetful is a coordinator whose answer gets lost now and then, after the others have had theirs:
// this rank thinks that the exchange failed, and they don't.
type forgetful struct {
	fwd.Coordinator
	warmUps, steps atomic.Int64
	lose           func(warmUp, step int64) bool // the nth answer of either kind
}

func (c *forgetful) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	votes, err := c.Coordinator.Exchange(ctx, v)
	if err != nil {
		return nil, err
	}
	warmUp, step := int64(0), int64(0)
	if v.WarmUp {
		warmUp = c.warmUps.Add(1)
	} else {
		step = c.steps.Add(1)
	}
	if c.lose(warmUp, step) {
		return nil, &fwd.RankError{Err: fwd.ErrRankMissing, Step: votes[0].Step, Ranks: []int{0}}
	}
	return votes, nil
}

// TestProcessesLostAnswers: ranks that have drifted apart, in their steps or in their warm-up, find
// each other again, and the answers are right.
func TestProcessesLostAnswers(t *testing.T) {
	lost := func(c fwd.Coordinator, lose func(warmUp, step int64) bool) fwd.Coordinator {
		return &forgetful{Coordinator: c, lose: lose}
	}
	for name, lose := range map[string]func(p *Process){
		"steps": func(p *Process) {
			p.Target[0] = lost(p.Target[0], func(_, step int64) bool { return step == 5 || step == 15 })
		},
		"warm-up of the model": func(p *Process) {
			p.Target[0] = lost(p.Target[0], func(warmUp, _ int64) bool { return warmUp == 5 || warmUp == 50 })
		},
		"warm-up of the draft": func(p *Process) {
			p.Draft[0] = lost(p.Draft[0], func(warmUp, _ int64) bool { return warmUp == 5 || warmUp == 12 })
		},
	} {
		t.Run(name, simulated(func(t *testing.T) {
			cfg := Config{
				DataParallelSize:     3,
				NumSpeculativeTokens: 2,
				GraphMode:            fwd.GraphFullAndPiecewise,
				ExchangeTimeout:      300 * time.Millisecond,
			}
			f := newFleet(t, cfg, newRequests(60, 60, 20))
			outcomes := f.each(func(rank int) outcome {
				cfg := f.config(rank, time.Hour)
				if rank == 1 {
					lose(cfg.Process)
				}
				return f.run(t.Context(), cfg, f.requests[rank])
			})
			f.allFinished(outcomes)
			if n := outcomes[1].stats.FailedSteps; n == 0 {
				t.Error("no step failed")
			}
		}))
	}
}

// absent is a coordinator whose rank stays away from some steps until the others have given up.
type absent struct {
	fwd.Coordinator
	stayAway func(step uint64) bool
}

func (c absent) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if !c.stayAway(v.Step) {
		return c.Coordinator.Exchange(ctx, v)
	}
	<-ctx.Done()
	return nil, &fwd.RankError{
		Err:   fmt.Errorf("%w: %w", fwd.ErrRankMissing, context.Cause(ctx)),
		Step:  v.Step,
		Ranks: []int{c.Rank()},
	}
}

// TestFinished: each result is handed out once, when it is complete, and an error from there ends
// the run.
func TestFinished(t *testing.T) {
	full := errors.New("disk full")
	for _, dp := range []int{1, 3} {
		requests := newRequests(20, 30, 10)
		var mu sync.Mutex
		var got []Result
		cfg := Config{DataParallelSize: dp, Finished: func(r Result) error {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, r)
			if len(got) == 12 {
				return full
			}
			return nil
		}}
		e := newEngine(t, cfg)
		results, stats, err := e.Run(t.Context(), requests)
		if !errors.Is(err, full) || stats.Finished != len(got) || len(got) < 12 || len(got) == len(requests) {
			t.Errorf("dp %d: %v, %d finished, %d handed out", dp, err, stats.Finished, len(got))
		}
		compareAll(t, e, requests, results)
		for _, r := range got {
			if !r.Finished || !results[r.ID].Finished || !slices.Equal(r.Tokens, results[r.ID].Tokens) {
				t.Errorf("dp %d: request %d was handed out as %+v, the run returned %+v", dp, r.ID, r, results[r.ID])
			}
		}
	}
}

// pair returns the configuration and the requests of a process with two of the ranks.
func (f *fleet) pair(a, b int) (Config, []Request) {
	cfg, other := f.config(a, time.Hour), f.config(b, time.Hour).Process
	cfg.Process.Ranks = append(cfg.Process.Ranks, other.Ranks...)
	cfg.Process.Target = append(cfg.Process.Target, other.Target...)
	cfg.Process.Draft = append(cfg.Process.Draft, other.Draft...)
	return cfg, slices.Concat(f.requests[a], f.requests[b])
}

// TestProcessesOfRanks: ranks that share a process don't wait for each other in a pass, so one of them may
// miss what the other has got.
func TestProcessesOfRanks(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  Config
		lose func(warmUp, step int64) bool
	}{
		"nothing is lost": {Config{NumSpeculativeTokens: 2}, func(_, _ int64) bool { return false }},
		"steps":           {Config{SequenceParallel: 2}, func(_, step int64) bool { return step%10 == 5 }},
		"warm-up":         {Config{}, func(warmUp, _ int64) bool { return warmUp == 5 }},
		"overlapping":     {Config{Overlap: true}, func(_, step int64) bool { return step == 5 }},
	} {
		t.Run(name, simulated(func(t *testing.T) {
			c.cfg.DataParallelSize, c.cfg.GraphMode = 4, fwd.GraphFullAndPiecewise
			c.cfg.ExchangeTimeout = 300 * time.Millisecond
			f := newFleet(t, c.cfg, newRequests(28, 30, 20))
			var wg sync.WaitGroup
			for _, ranks := range [][2]int{{0, 3}, {2, 1}} {
				cfg, requests := f.pair(ranks[0], ranks[1])
				if ranks[1] == 1 {
					cfg.Process.Target[1] = &forgetful{Coordinator: cfg.Process.Target[1], lose: c.lose}
				}
				wg.Go(func() {
					o := f.run(t.Context(), cfg, requests)
					if o.err != nil || o.stats.Finished != len(requests) || len(o.stats.Ranks) != 2 ||
						o.stats.Ranks[0].Rank != ranks[0] || o.stats.Ranks[1].Rank != ranks[1] {
						t.Errorf("ranks %v: %v, %+v", ranks, o.err, o.stats)
					}
					if lost := name != "nothing is lost"; ranks[1] == 1 && (o.stats.FailedSteps > 0) != lost {
						t.Errorf("ranks %v: %d steps failed", ranks, o.stats.FailedSteps)
					}
					compareAll(t, o.engine, requests, o.results)
				})
			}
			wg.Wait()
		}))
	}
}

// TestProcessesOfRanksInterrupted: a process that is interrupted says so, whichever of its ranks was the
// first to know, and the other process says whose doing it was.
func TestProcessesOfRanksInterrupted(t *testing.T) {
	for late := range 2 {
		synctest.Test(t, func(t *testing.T) {
			stop := errors.New("stop")
			f := newFleet(t, Config{DataParallelSize: 4, StopGrace: time.Minute}, newRequests(160, 50, 30))
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			cfg, requests := f.pair(0, 1)
			cfg.Middleware = func(rank int) []fwd.Middleware {
				return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
					return func(ctx context.Context) error {
						if rank == late {
							time.Sleep(2 * time.Millisecond)
						}
						return next(ctx)
					}
				}}
			}
			others, rest := f.pair(2, 3)
			var wg sync.WaitGroup
			wg.Go(func() {
				if o := f.run(t.Context(), others, rest); !errors.Is(o.err, ErrInterrupted) {
					t.Errorf("the other process: %v", o.err)
				}
			})
			// In a pass of the late rank, when the other one has voted for the next step.
			time.AfterFunc(51*time.Millisecond, func() { cancel(stop) })
			if o := f.run(ctx, cfg, requests); o.err != stop || o.stats.Finished == len(requests) {
				t.Errorf("the process that was interrupted: %v, %d finished", o.err, o.stats.Finished)
			}
			wg.Wait()
		})
	}
}

func TestBadProcess(t *testing.T) {
	group, err := fwd.NewLocalGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	zero := []int{0}
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{DataParallelSize: 2, Process: &Process{Ranks: []int{2}, Target: group[1:]}},
			"engine: Process: Ranks is [2], want 0 to 1 for 2 ranks"},
		{Config{DataParallelSize: 2, Process: &Process{}}, "engine: Process: Ranks is empty"},
		{Config{DataParallelSize: 2, Process: &Process{Ranks: []int{1, 0, 1}}},
			"engine: Process: Ranks is [1 0 1], with rank 1 twice"},
		{Config{DataParallelSize: 2, Process: &Process{Ranks: zero}},
			"engine: Process: Target has 0 coordinators for 1 ranks"},
		{Config{DataParallelSize: 2, Process: &Process{Ranks: zero, Target: make([]fwd.Coordinator, 1)}},
			"engine: Process: Target is missing for rank 0"},
		{Config{DataParallelSize: 2, NumSpeculativeTokens: 1, Process: &Process{Ranks: zero, Target: group[:1]}},
			"engine: Process: Draft has 0 coordinators for 1 ranks"},
		{Config{DataParallelSize: 3, Process: &Process{Ranks: zero, Target: group[:1]}},
			"engine: Process: Target is of rank 0 of 2, want rank 0 of 3"},
		{Config{DataParallelSize: 2, Process: &Process{Ranks: zero, Target: group[1:]}},
			"engine: Process: Target is of rank 1 of 2, want rank 0 of 2"},
		{Config{DataParallelSize: 2, Process: &Process{Ranks: zero, Target: group[:1], Rejoin: -1}},
			"engine: Process: Rejoin is -1ns"},
		{Config{DataParallelSize: 2, Coordinators: group, Process: &Process{Ranks: zero, Target: group[:1]}},
			"engine: Process: 2 coordinators and 0 draft coordinators beside it"},
	} {
		if _, err := New(newModel(t, 0), c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want an error with %q", c.cfg.Process, err, c.want)
		}
	}
}
