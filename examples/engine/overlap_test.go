// Steps that are begun while the pass of the one before runs: they are the steps that there would have
// been without that, nothing is lost if one fails, and what is hidden is counted.

package engine

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/google/go-cmp/cmp"
)

// TestOverlapSameSteps: the steps are the same as without overlap, pass for pass, and so are the
// answers.
func TestOverlapSameSteps(t *testing.T) {
	for name, cfg := range map[string]Config{
		"two ranks":         {DataParallelSize: 2, GraphMode: fwd.GraphFullAndPiecewise},
		"four ranks":        {DataParallelSize: 4, SequenceParallel: 2, MaxChunk: 7, GraphMode: fwd.GraphFull},
		"microbatches":      {DataParallelSize: 3, NumUBatches: 2, GraphMode: fwd.GraphFullDecodeOnly},
		"few requests":      {DataParallelSize: 2, MaxNumSeqs: 2, GraphMode: fwd.GraphFullAndPiecewise},
		"few tokens":        {DataParallelSize: 2, MaxNumBatchedTokens: 3},
		"hardly any blocks": {DataParallelSize: 2, NumBlocks: 9, GraphMode: fwd.GraphPiecewise},
		"more than ranks":   {DataParallelSize: 13},
		"alone":             {GraphMode: fwd.GraphFullAndPiecewise},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			requests := withAdapters(newRequests(23, 90, 12), 2)
			want := serve(t, cfg, requests)
			cfg.Overlap = true
			got := serve(t, cfg, requests)
			count := func(s Stats) []any {
				return []any{
					s.Steps, s.Passes, s.Modes, s.DummyPasses, s.SplitPasses, s.GraphPadding, s.DataPadding,
					s.Captures, s.Replays, s.Lowered,
				}
			}
			if diff := cmp.Diff(count(want), count(got)); diff != "" {
				t.Errorf("(-without +with)\n%s", diff)
			}
		})
	}
}

// TestOverlapExchanges: beside those of the steps there is one exchange in which nobody has anything
// to run, since a rank's last pass could still fail when it voted, and one that ends the run.
func TestOverlapExchanges(t *testing.T) {
	const dp = 3
	group, _, steps := countAll(t, dp)
	stats := serve(t, Config{DataParallelSize: dp, Coordinators: group, Overlap: true}, newRequests(20, 40, 20))
	if got, want := int(steps.Load()), dp*(stats.Steps+2); got != want {
		t.Errorf("%d exchanges of %d ranks in %d steps, want %d", got, dp, stats.Steps, want)
	}
}

// slow is a coordinator whose votes take their time.
type slow struct {
	fwd.Coordinator
	by time.Duration
}

func (c slow) Exchange(ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
	if !v.WarmUp && v.Note&greeting == 0 {
		time.Sleep(c.by)
	}
	return c.Coordinator.Exchange(ctx, v)
}

// take makes each pass of a rank without graphs take so long.
func take(cfg *Config, long time.Duration) {
	cfg.Middleware = func(int) []fwd.Middleware {
		return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
			return func(ctx context.Context) error {
				time.Sleep(long)
				return next(ctx)
			}
		}}
	}
}

// TestOverlapHidden: what an exchange takes is hidden as far as a pass runs meanwhile, the rest is
// waited for, and the run is shorter by what is hidden.
func TestOverlapHidden(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		pass, votes    time.Duration
		overlap        bool
		hidden, waited time.Duration // in each step but the first
	}{
		{100 * ms, 30 * ms, false, 0, 30 * ms},
		{100 * ms, 30 * ms, true, 30 * ms, 0},
		{20 * ms, 30 * ms, true, 20 * ms, 10 * ms},
	} {
		t.Run(fmt.Sprintf("pass=%v/votes=%v/overlap=%t", c.pass, c.votes, c.overlap), simulated(func(t *testing.T) {
			requests := []Request{{ID: 0, Prompt: []int{1}, MaxTokens: 11}, {ID: 1, Prompt: []int{2}, MaxTokens: 7}}
			f := newFleet(t, Config{DataParallelSize: 2, Overlap: c.overlap}, requests)
			outcomes := f.each(func(rank int) outcome {
				cfg := f.config(rank, 0)
				cfg.Process.Target[0] = slow{cfg.Process.Target[0], c.votes}
				take(&cfg, c.pass)
				return f.run(t.Context(), cfg, f.requests[rank])
			})
			f.allFinished(outcomes)
			for rank, o := range outcomes {
				const more = 10 // steps after the first
				r := o.stats.Ranks[0]
				if hidden, waited := more*c.hidden, c.votes+more*c.waited; o.stats.Steps != 1+more ||
					r.Hidden != hidden || r.Votes != waited {
					t.Errorf("rank %d: %d steps, %v hidden and %v waited for, want %d, %v and %v",
						rank, o.stats.Steps, r.Hidden, r.Votes, 1+more, hidden, waited)
				}
				heldUp := 0
				for _, w := range r.WaitedFor {
					heldUp += w.VoteTimes
				}
				if heldUp > 1+more || c.waited == 0 && heldUp > 1 {
					t.Errorf("rank %d was held up %d times", rank, heldUp)
				}
				ends := 1 + toInt(c.overlap) // exchanges after the last pass begins
				longest := c.votes + (1+more)*(c.pass+c.waited) + time.Duration(ends)*c.votes
				if o.stats.Duration > longest {
					t.Errorf("rank %d: it took %v, want at most %v", rank, o.stats.Duration, longest)
				}
			}
		}))
	}
}

func toInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestOverlapSleep: ranks sleep until the next request arrives, and no longer, though they have said
// how long before a pass ran.
func TestOverlapSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pass = 40 * time.Millisecond
		requests := newRequests(6, 20, 1)
		for i := range requests {
			requests[i].Arrival, requests[i].MaxTokens = time.Duration(i)*time.Second, 2
		}
		f := newFleet(t, Config{DataParallelSize: 2, Speed: 10, Overlap: true}, requests)
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, 0)
			take(&cfg, pass)
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		f.allFinished(outcomes)
		for rank, o := range outcomes {
			if want := 500*time.Millisecond + 2*pass; o.stats.Duration != want || o.stats.Steps != 6*2 {
				t.Errorf("rank %d: %v and %d steps, want %v and %d", rank, o.stats.Duration, o.stats.Steps, want, 6*2)
			}
		}
	})
}

// TestOverlapMixed: it does not matter which ranks overlap.
func TestOverlapMixed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise}, newRequests(40, 50, 20))
		outcomes := f.each(func(rank int) outcome {
			cfg := f.config(rank, 0)
			cfg.Overlap = rank == 1
			return f.run(t.Context(), cfg, f.requests[rank])
		})
		f.allFinished(outcomes)
		for rank, o := range outcomes {
			if o.stats.Steps != outcomes[0].stats.Steps || o.stats.FailedSteps != 0 {
				t.Errorf("rank %d: %d steps, rank 0 %d; %d failed", rank, o.stats.Steps, outcomes[0].stats.Steps,
					o.stats.FailedSteps)
			}
		}
	})
}

// TestOverlapRankFails: a rank that fails in a pass ends the run with its own error, though all have
// voted for the next step, and nothing is left of that.
func TestOverlapRankFails(t *testing.T) {
	broken := errors.New("broken layer")
	for _, dp := range []int{2, 4} {
		for _, at := range []int64{1, 5, 20} {
			cfg := Config{DataParallelSize: dp, ExchangeTimeout: time.Hour, Overlap: true}
			var passes atomic.Int64
			cfg.Middleware = func(rank int) []fwd.Middleware {
				return []fwd.Middleware{func(next fwd.ForwardFunc) fwd.ForwardFunc {
					return func(ctx context.Context) error {
						if rank == dp-1 && passes.Add(1) == at {
							return broken
						}
						return next(ctx)
					}
				}}
			}
			group, err := fwd.NewLocalGroup(dp)
			if err != nil {
				t.Fatal(err)
			}
			for i := range group {
				group[i] = slow{group[i], 0} // not known as one of a local group: it needs a goroutine
			}
			cfg.Coordinators = group
			e, requests := newEngine(t, cfg), newRequests(20, 50, 20)
			results, stats, err := e.Run(t.Context(), requests)
			if !errors.Is(err, broken) || stats.Steps != int(at)-1 {
				t.Errorf("dp %d: %v after %d steps, want %v after %d", dp, err, stats.Steps, broken, at-1)
			}
			compareAll(t, e, requests, results)
			for _, r := range e.latest.Load().ranks {
				if s := r.target.runner.Status(); s.Exchanging || s.Active != 0 {
					t.Errorf("dp %d: rank %d is left with %+v", dp, r.rank, s)
				}
			}
		}
	}
}

// TestOverlapInterrupt: all ranks stop after the same step.
func TestOverlapInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := errors.New("stop")
		cfg := Config{DataParallelSize: 3, StopGrace: time.Minute, Overlap: true}
		f := newFleet(t, cfg, newRequests(90, 50, 30))
		outcomes := f.each(func(rank int) outcome {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			cfg := f.config(rank, time.Hour)
			if rank == 1 {
				atPass(&cfg, 20, func() error { cancel(stop); return nil })
			}
			return f.run(ctx, cfg, f.requests[rank])
		})
		for rank, o := range outcomes {
			if o.stats.Steps != 21 { // the votes for this one were on their way
				t.Errorf("rank %d stopped after %d steps, want 21", rank, o.stats.Steps)
			}
			if wants := []error{ErrInterrupted, stop, ErrInterrupted}; !errors.Is(o.err, wants[rank]) {
				t.Errorf("rank %d: %v, want %v", rank, o.err, wants[rank])
			}
		}
	})
}

// TestOverlapRejoin: a rank goes away in a pass, though it has voted for the next step, and comes back
// with the requests that it had not finished. All are served, each once, also if it was its last pass
// and the other ranks have nothing left.
func TestOverlapRejoin(t *testing.T) {
	for _, c := range []struct {
		name    string
		dp      int
		answers int // tokens of each answer of the others
		nth     int64
	}{
		{"in the first pass", 2, 0, 1},
		{"in a pass", 3, 0, 21},
		{"in the last pass", 2, 3, 12},
		{"in the last pass, with two others", 3, 3, 12},
	} {
		t.Run(c.name, simulated(func(t *testing.T) {
			requests := newRequests(20*c.dp, 50, 20)
			if c.answers > 0 {
				requests = requests[:c.dp]
				for rank := range requests {
					requests[rank].Prompt, requests[rank].MaxTokens = []int{rank}, c.answers
				}
				requests[1].MaxTokens = int(c.nth)
			}
			cfg := Config{DataParallelSize: c.dp, ExchangeTimeout: time.Second, Overlap: true}
			newFleet(t, cfg, requests).comeBack(c.nth)
		}))
	}
}

// TestOverlapFailedSteps: if a step fails that was begun during a pass, the pass counts, and what was
// scheduled for the step is scheduled again.
func TestOverlapFailedSteps(t *testing.T) {
	for _, c := range []struct {
		name  string
		wrap  func(c fwd.Coordinator) fwd.Coordinator
		fails func(rank int) bool // for this rank too
	}{
		{"a rank stays away", func(c fwd.Coordinator) fwd.Coordinator {
			return absent{c, func(step uint64) bool { return step%8 == 5 }}
		}, func(int) bool { return true }},
		{"an answer is lost", func(c fwd.Coordinator) fwd.Coordinator {
			return &forgetful{Coordinator: c, lose: func(_, step int64) bool { return step%8 == 5 }}
		}, func(rank int) bool { return rank == 1 }},
	} {
		t.Run(c.name, simulated(func(t *testing.T) {
			cfg := Config{DataParallelSize: 3, ExchangeTimeout: 300 * time.Millisecond, Overlap: true, NumBlocks: 40}
			f := newFleet(t, cfg, newRequests(60, 60, 20))
			outcomes := f.each(func(rank int) outcome {
				cfg := f.config(rank, time.Hour)
				take(&cfg, 10*time.Millisecond)
				if rank == 1 {
					cfg.Process.Target[0] = c.wrap(cfg.Process.Target[0])
				}
				return f.run(t.Context(), cfg, f.requests[rank])
			})
			f.allFinished(outcomes)
			for rank, o := range outcomes {
				if c.fails(rank) != (o.stats.FailedSteps >= 3) {
					t.Errorf("rank %d: %d failed steps", rank, o.stats.FailedSteps)
				}
				if s := o.engine.latest.Load().ranks[0].scheduler; len(s.blocks.free) != 40 || s.unfinished() != 0 {
					t.Errorf("rank %d: %d of 40 blocks are free, %d requests left", rank, len(s.blocks.free), s.unfinished())
				}
			}
		}))
	}
}

// TestOverlapSchedule: what a step will have done is what the next schedule builds on, and the next one
// when it has done it is the same.
func TestOverlapSchedule(t *testing.T) {
	one := func(maxSeqs int, lengths ...[2]int) *scheduler {
		s := &scheduler{blocks: newBlockAllocator(4, 16), budget: 8, maxSeqs: maxSeqs}
		for _, l := range lengths {
			request := &Request{Prompt: make([]int, l[0]), MaxTokens: l[1]}
			s.waiting = append(s.waiting, &sequence{request: request, result: &Result{}})
		}
		return s
	}
	for name, make := range map[string]func() *scheduler{
		"a prompt in pieces":     func() *scheduler { return one(4, [2]int{19, 3}) },
		"one after another":      func() *scheduler { return one(1, [2]int{5, 1}, [2]int{3, 2}, [2]int{1, 1}) },
		"side by side":           func() *scheduler { return one(2, [2]int{9, 2}, [2]int{2, 4}, [2]int{8, 1}) },
		"blocks of one who ends": func() *scheduler { return one(4, [2]int{33, 1}, [2]int{20, 2}) },
	} {
		t.Run(name, func(t *testing.T) {
			plain, ahead := make(), make()
			next := ahead.schedule(time.Time{})
			for n := 0; len(next) > 0; n++ {
				if n > 20 {
					t.Fatal("it does not end")
				}
				now := plain.schedule(time.Time{})
				if diff := cmp.Diff(shape(now), shape(next)); diff != "" {
					t.Fatalf("step %d (-without +with)\n%s", n, diff)
				}
				ahead.foresee(next)
				left := ahead.unfinished()
				later := ahead.schedule(time.Time{})
				for _, s := range []struct {
					*scheduler
					step []scheduled
				}{{plain, now}, {ahead, next}} {
					for _, part := range s.step {
						part.seq.computed, part.seq.coming = part.seq.computed+part.count, 0
						if part.seq.computed < part.seq.known() {
							continue
						}
						part.seq.result.Tokens = append(part.seq.result.Tokens, 0)
						if len(part.seq.result.Tokens) == part.seq.request.MaxTokens {
							s.finish(part.seq)
						}
					}
				}
				if plain.unfinished() > left || plain.unfinished() != ahead.unfinished() {
					t.Fatalf("step %d leaves %d requests, %d were foreseen and %d are there", n, plain.unfinished(), left,
						ahead.unfinished())
				}
				next = later
			}
			if len(ahead.blocks.free) != 4 || ahead.unfinished() != 0 {
				t.Errorf("%d of 4 blocks free, %d requests left", len(ahead.blocks.free), ahead.unfinished())
			}
		})
	}
}

// shape returns the tokens of a step.
func shape(step []scheduled) (tokens [][2]int) {
	for _, s := range step {
		tokens = append(tokens, [2]int{s.first, s.count})
	}
	return tokens
}
