// This file tests what a Runner tells without a collector: records, logs and profile labels. What
// spans and metrics show beside them is tested in integration/sdk.

package fwd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// sameError lets go-cmp compare records.
var sameError = cmp.Comparer(func(a, b error) bool { return a == b })

// recordsOf runs f with a Runner of that configuration and returns the records that it left.
func recordsOf(t *testing.T, cfg fwd.Config, f func(r *fwd.Runner), opts ...fwd.Option) []fwd.Record {
	t.Helper()
	recorder := fwd.NewRecorder(8)
	r, err := fwd.New(cfg, append(opts, fwd.WithObserver(recorder.Observe))...)
	if err != nil {
		t.Fatal(err)
	}
	f(r)
	return recorder.Recent()
}

// A record says what a pass was and how it ended, also if it panicked.
func TestRecordOfPass(t *testing.T) {
	t.Parallel()
	errOwn := errors.New("own")
	for name, tt := range map[string]struct {
		forward fwd.ForwardFunc
		want    error
	}{
		"success": {nothing, nil},
		"error":   {func(context.Context) error { return errOwn }, errOwn},
		"panic":   {func(context.Context) error { panic("boom") }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				pass := decodePass()
				pass.Phase = "verify"
				records := recordsOf(t, fwd.Config{Name: "target"}, func(r *fwd.Runner) {
					defer func() { _ = recover() }()
					_ = r.Run(t.Context(), pass, func(ctx context.Context) error {
						time.Sleep(time.Second) // of simulated time
						return tt.forward(ctx)
					})
				})
				if len(records) != 1 {
					t.Fatalf("%d records, want 1", len(records))
				}
				got := records[0]
				if panicked := name == "panic"; panicked != (got.Err != nil && got.Err != tt.want) {
					t.Errorf("the record's error is %v", got.Err)
				}
				if !got.Began.Equal(began) {
					t.Errorf("the pass began at %v, want %v", got.Began, began)
				}
				want := fwd.Record{
					Name: "target", Size: 1, NumTokens: 16, NumTokensUnpadded: 13, NumTokensGraph: 16, NumReqs: 13,
					GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, Batch: pass.Batch, Phase: "verify",
					Began: got.Began, Duration: time.Second, LastRank: -1, Err: got.Err,
				}
				if diff := cmp.Diff(want, got, sameError); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		})
	}
}

// The record of a planned pass has what the ranks agreed on, how long this one waited, and for
// whom.
func TestRecordOfStep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var all [2]fwd.Record
		var wg sync.WaitGroup
		for rank, c := range localGroup(t, 2) {
			wg.Go(func() {
				time.Sleep(time.Duration(rank) * 3 * time.Second) // of simulated time
				records := recordsOf(t, fwd.Config{}, func(r *fwd.Runner) {
					pass, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{rank + 1}, Note: 7})
					if err == nil {
						err = r.Run(t.Context(), pass, nothing)
					}
					if err != nil {
						t.Error(err)
					}
				}, fwd.WithCoordinator(c))
				all[rank] = records[0]
			})
		}
		wg.Wait()
		for rank, got := range all {
			wait := time.Duration(1-rank) * 3 * time.Second
			if got.Rank != rank || got.Size != 2 || got.Step != 1 || got.Wait != wait || got.LastRank != 1 {
				t.Errorf("rank %d: rank %d of %d, step %d, waited %v for rank %d; want %v for rank 1",
					rank, got.Rank, got.Size, got.Step, got.Wait, got.LastRank, wait)
			}
			if len(got.Votes) != 2 || got.Votes[1].NumTokens != 2 || got.Votes[0].Note != 7 {
				t.Errorf("rank %d: votes %+v", rank, got.Votes)
			}
		}
	})
}

// A failed exchange has a record, with little in it. What is refused before it votes or starts has
// none, and neither has a pass that nobody runs.
func TestRecordOfFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		records := recordsOf(t, fwd.Config{Name: "target"}, func(r *fwd.Runner) {
			refused := []error{
				r.Run(t.Context(), fwd.Pass{NumTokens: -1}, nothing),
				r.Run(t.Context(), fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 2)}, nothing),
				r.Report(t.Context(), fwd.Pass{}, began, began, nil),
			}
			_, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{-1}})
			for i, err := range append(refused, err) {
				if err == nil {
					t.Errorf("call %d is not refused", i)
				}
			}
			idle := fwd.Pass{NumTokens: 1, Agreement: &fwd.Agreement{Idle: true, NumTokensAcrossDP: vec(1, 1)}}
			if err := r.Run(t.Context(), idle, nothing); err != nil {
				t.Error(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err = r.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{1}}); !errors.Is(err, fwd.ErrRankMissing) {
				t.Errorf("%v, want %v", err, fwd.ErrRankMissing)
			}
		}, fwd.WithCoordinator(localGroup(t, 2)[1]))
		if len(records) != 1 || !errors.Is(records[0].Err, fwd.ErrRankMissing) {
			t.Fatalf("records %+v, want that of the exchange alone", records)
		}
		want := fwd.Record{
			Name: "target", Rank: 1, Size: 2, Step: 1, Began: began, Wait: time.Second, LastRank: -1,
			Err: records[0].Err,
		}
		if diff := cmp.Diff(want, records[0], sameError); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// The record of a rank that was restarted has the step of the group, as its error has it.
func TestRecordOfRestart(t *testing.T) {
	t.Parallel()
	group := localGroup(t, 2)
	recorder := fwd.NewRecorder(1)
	plan := func(runners ...*fwd.Runner) {
		var wg sync.WaitGroup
		for _, r := range runners {
			wg.Go(func() { _, _ = r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}}) })
		}
		wg.Wait()
	}
	first := groupRunner(t, group[0])
	other := groupRunner(t, group[1])
	for range 3 {
		plan(first, other)
	}
	plan(first, groupRunner(t, group[1], fwd.WithObserver(recorder.Observe)))
	records := recorder.Recent()
	if len(records) != 1 || records[0].Step != 4 || !errors.Is(records[0].Err, fwd.ErrLockstep) {
		t.Errorf("records %+v, want one that is out of step at step 4", records)
	}
}

// A Recorder keeps the last records, oldest first, and what it returned before stays as it was.
func TestRecorder(t *testing.T) {
	t.Parallel()
	r := fwd.NewRecorder(3)
	steps := func() (steps []uint64) {
		for _, rec := range r.Recent() {
			steps = append(steps, rec.Step)
		}
		return steps
	}
	rec := &fwd.Record{}
	for i, want := range [][]uint64{nil, {1}, {1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}, {4, 5, 6}, {5, 6, 7}} {
		if rec.Step = uint64(i); i > 0 {
			r.Observe(t.Context(), rec)
		}
		if diff := cmp.Diff(want, steps()); diff != "" {
			t.Errorf("after %d (-want +got):\n%s", i, diff)
		}
	}
	before := r.Recent()
	r.Observe(t.Context(), &fwd.Record{Step: 99})
	if before[0].Step != 5 {
		t.Errorf("a record that was returned has changed to step %d", before[0].Step)
	}
	for _, n := range []int{0, -1} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.HasPrefix(got, "fwd: ") {
					t.Errorf("NewRecorder(%d) panics with %q", n, got)
				}
			}()
			fwd.NewRecorder(n)
		}()
	}
}

// A record as a log value is a group of what applies, under the names that spans have.
func TestRecordLogValue(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		rec  fwd.Record
		want map[string]any
	}{
		"pass": {
			fwd.Record{
				Size: 1, NumTokens: 3, NumTokensUnpadded: 3, NumTokensGraph: 3, LastRank: -1, Duration: time.Second,
			},
			map[string]any{
				"fwd.num_tokens": 3.0, "fwd.num_tokens_unpadded": 3.0, "fwd.graph.mode": "NONE",
				"fwd.graph.reason": "unplanned", "fwd.dummy": false, "fwd.duration": 1e9,
			},
		},
		"pass of a step": {
			fwd.Record{
				Name: "target", Rank: 1, Size: 2, Step: 4,
				NumTokens: 8, NumTokensUnpadded: 3, NumTokensGraph: 4, NumReqs: 2,
				GraphMode: fwd.GraphFull, Reason: fwd.ReasonExact, UBatches: 2, Dummy: true, Phase: "decode",
				Batch: fwd.BatchDescriptor{NumTokens: 8, NumReqs: 8, Uniform: true, HasLoRA: true, NumActiveLoRAs: 3},
				Wait:  time.Minute, Duration: time.Second, Waited: time.Millisecond, LastRank: 0, Err: fwd.ErrLayer,
			},
			map[string]any{
				"fwd.name": "target", "fwd.dp.rank": 1.0, "fwd.dp.size": 2.0, "fwd.step": 4.0, "fwd.num_tokens": 8.0,
				"fwd.num_tokens_unpadded": 3.0, "fwd.num_reqs": 2.0, "fwd.padding.graph": 1.0, "fwd.padding.dp": 4.0,
				"fwd.graph.mode": "FULL", "fwd.graph.reason": "exact", "fwd.ubatches": 2.0, "fwd.dummy": true,
				"fwd.phase": "decode", "fwd.wait": 6e10, "fwd.duration": 1e9, "fwd.wait_time": 0.001,
				"fwd.batch.uniform": true, "fwd.batch.num_reqs": 8.0, "fwd.batch.num_active_loras": 3.0,
				"fwd.padding.ratio": 0.625,
				"fwd.dp.last_rank":  0.0, "error.type": "layer",
			},
		},
		"failed exchange": {
			fwd.Record{
				Size: 2, Step: 4, Wait: time.Second, LastRank: -1, Err: &fwd.RankError{Err: fwd.ErrRankMissing},
			},
			map[string]any{
				"fwd.dp.rank": 0.0, "fwd.dp.size": 2.0, "fwd.step": 4.0, "fwd.wait": 1e9, "error.type": "rank_missing",
			},
		},
	} {
		var out bytes.Buffer
		slog.New(slog.NewJSONHandler(&out, nil)).Info("", "pass", &tt.rec)
		var got struct{ Pass map[string]any }
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, got.Pass); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// logLines are the lines of a log, each with its level and message.
func logLines(t *testing.T, level slog.Level, f func(log *slog.Logger)) (lines []string) {
	t.Helper()
	var out bytes.Buffer
	f(slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: level})))
	for line := range strings.Lines(out.String()) {
		var got struct {
			Level, Msg string
			Error      string
		}
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatal(err)
		}
		if got.Error != "" {
			got.Msg += ": error"
		}
		lines = append(lines, got.Level+" "+got.Msg)
	}
	return lines
}

// The log has failures at Warn and every pass at Debug.
func TestLoggerLevels(t *testing.T) {
	t.Parallel()
	const (
		pass     = "DEBUG forward pass"
		failed   = "WARN forward pass failed: error"
		exchange = "WARN exchange of votes failed: error"
		capture  = "WARN capture after warm-up refused: error"
	)
	for level, want := range map[slog.Level][]string{
		slog.LevelDebug: {pass, failed, failed, exchange, capture, failed},
		slog.LevelInfo:  {failed, failed, exchange, capture, failed},
		slog.LevelWarn:  {failed, failed, exchange, capture, failed},
		slog.LevelError: nil,
	} {
		got := logLines(t, level, func(log *slog.Logger) {
			opts := append(providers()["noop"], fwd.WithLogger(log), fwd.WithCoordinator(localGroup(t, 2)[0]))
			r, err := fwd.New(fwd.Config{}, opts...)
			if err != nil {
				t.Fatal(err)
			}
			if enabled := r.Enabled(t.Context()); enabled != (level < slog.LevelError) {
				t.Errorf("with a log at %v a Runner is enabled: %t", level, enabled)
			}
			p := fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 1)}
			_ = r.Run(t.Context(), p, nothing)
			_ = r.Run(t.Context(), p, func(context.Context) error { return fwd.ErrLayer })
			func() {
				defer func() { _ = recover() }()
				_ = r.Run(t.Context(), p, func(context.Context) error { panic("boom") })
			}()
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, _ = r.Plan(ctx, fwd.Schedule{})
			cache := cacheNew(t, fwd.GraphFull, nothing,
				func(context.Context, fwd.BatchDescriptor) (fwd.ForwardFunc, error) { return nothing, nil })
			cache.CloseCapture()
			p.GraphMode = fwd.GraphFull
			_ = r.Run(t.Context(), p, cache.Forward)
		})
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", level, diff)
		}
	}
}

// A Runner is enabled if an observer or a log would see its passes; nil ones are none.
func TestEnabled(t *testing.T) {
	t.Parallel()
	if (*fwd.Runner)(nil).Enabled(t.Context()) {
		t.Error("a nil Runner is enabled")
	}
	log, observe := slog.New(slog.DiscardHandler), func(context.Context, *fwd.Record) {}
	for name, tt := range map[string]struct {
		opt  fwd.Option
		want bool
	}{
		"observer":                 {fwd.WithObserver(observe), true},
		"nil observer":             {fwd.WithObserver(nil), false},
		"nil log":                  {fwd.WithLogger(nil), false},
		"log that discards it all": {fwd.WithLogger(log), false},
	} {
		for provider, opts := range providers() {
			r, err := fwd.New(fwd.Config{}, append(opts, tt.opt)...)
			if err != nil {
				t.Fatal(err)
			}
			if got := r.Enabled(t.Context()); got != tt.want {
				t.Errorf("%s, provider %s: enabled %t, want %t", name, provider, got, tt.want)
			}
		}
	}
}

// The log says when a rank was restarted, and when one came late to a broken step.
func TestLoggerRestarts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		group := localGroup(t, 2)
		got := logLines(t, slog.LevelInfo, func(log *slog.Logger) {
			runner := func(rank int, opts ...fwd.Option) *fwd.Runner {
				return groupRunner(t, group[rank], append(opts, fwd.WithExchangeTimeout(time.Second))...)
			}
			step := func(ranks ...*fwd.Runner) {
				var wg sync.WaitGroup
				for i, r := range ranks {
					wg.Go(func() {
						time.Sleep(time.Duration(i) * time.Millisecond) // of simulated time
						_, _ = r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}})
					})
				}
				wg.Wait()
			}
			logged, other := runner(0, fwd.WithLogger(log)), runner(1)
			step(other)             // step 1 breaks without the logged rank, which then comes late
			step(logged, other)     // and all votes again
			step(logged, other)     // as it should be
			step(logged, runner(1)) // rank 1 was restarted
		})
		want := []string{
			"WARN rank came late and goes on at the group's step", "WARN exchange of votes failed: error",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// ProfileLabels sets labels for what runs inside a pass, and leaves the pass's context fast to look
// up.
func TestProfileLabels(t *testing.T) {
	t.Parallel()
	parallel := fwd.ParallelConfig{DataParallelSize: 4, DataParallelRank: 3}
	cfg := fwd.Config{Name: "target", Parallel: parallel}
	// Middleware inside the labels looks up in a context of the package's own, which is fast.
	inside := func(next fwd.ForwardFunc) fwd.ForwardFunc {
		return func(ctx context.Context) error {
			own := fmt.Sprintf("%T", fwd.NewContext(ctx, &fwd.ForwardContext{}))
			if got := fmt.Sprintf("%T", ctx); got != own {
				t.Errorf("below the labels the context is a %s, want a %s", got, own)
			}
			return next(ctx)
		}
	}
	r, err := fwd.New(cfg, fwd.WithMiddleware(fwd.ProfileLabels(), inside))
	if err != nil {
		t.Fatal(err)
	}
	pass := passOf("pass", 2)
	pass.GraphMode, pass.Dummy, pass.NumTokensAcrossDP = fwd.GraphFull, true, vec(2, 2, 2, 2)
	err = r.Run(t.Context(), pass, func(ctx context.Context) error {
		got := map[string]string{}
		pprof.ForLabels(ctx, func(key, value string) bool { got[key] = value; return true })
		want := map[string]string{
			"fwd.name": "target", "fwd.graph.mode": "FULL", "fwd.dp.rank": "3", "fwd.dummy": "true",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
		passCheck(t, "below the labels", ctx, "pass", 2, nil, -1)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	// In a chain of its own it passes through what is in no pass.
	outside := fwd.ProfileLabels()(func(ctx context.Context) error {
		pprof.ForLabels(ctx, func(key, value string) bool { t.Errorf("label %s=%s", key, value); return true })
		return fwd.ErrLayer
	})
	if err := outside(t.Context()); err != fwd.ErrLayer {
		t.Errorf("outside a pass: %v, want the function's error", err)
	}
}

// Report refuses what Run would refuse, uses a planned pass up, and says nothing about err.
func TestReport(t *testing.T) {
	t.Parallel()
	began := time.Unix(100, 0)
	report := func(r *fwd.Runner, p fwd.Pass) error {
		return r.Report(t.Context(), p, began, began.Add(time.Second), errors.New("the pass's own"))
	}
	records := recordsOf(t, fwd.Config{}, func(r *fwd.Runner) {
		pass, err := r.Plan(t.Context(), fwd.Schedule{NumScheduledTokens: []int{1}})
		if err != nil {
			t.Fatal(err)
		}
		if err := report(nil, pass); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("by another Runner: %v, want %v", err, fwd.ErrInvalid)
		}
		if err := report(r, pass); err != nil {
			t.Error(err)
		}
		if err := report(r, pass); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("a second time: %v, want %v", err, fwd.ErrInvalid)
		}
		if err := r.Run(t.Context(), pass, nothing); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("run after it was reported: %v, want %v", err, fwd.ErrInvalid)
		}
		if err := report(r, fwd.Pass{NumTokens: -1}); !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("a bad pass: %v, want %v", err, fwd.ErrInvalid)
		}
	})
	if len(records) != 1 || records[0].Duration != time.Second || !records[0].Began.Equal(began) ||
		records[0].Err == nil {
		t.Errorf("records %+v, want the one that was reported", records)
	}
	two, err := fwd.New(fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}})
	if err != nil {
		t.Fatal(err)
	}
	err = report(two, fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(2, 1)})
	if !errors.Is(err, fwd.ErrTokenMismatch) {
		t.Errorf("another rank's tokens: %v, want %v", err, fwd.ErrTokenMismatch)
	}
	if err := report(two, fwd.Pass{NumTokens: 1}); err != nil {
		t.Errorf("without counts: %v", err)
	}
}

// Passes that run and passes that are reported share a device too, on the real clock as on any other.
func TestQueueOfRunAndReport(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		records := recordsOf(t, fwd.Config{}, func(r *fwd.Runner) {
			pass := fwd.Pass{NumTokens: 1}
			for range 3 {
				began := time.Now()
				if err := r.Run(t.Context(), pass, func(context.Context) error {
					time.Sleep(time.Second) // of simulated time
					return nil
				}); err != nil {
					t.Error(err)
				}
				time.Sleep(2 * time.Second)
				if err := r.Report(t.Context(), pass, began, time.Now(), nil); err != nil { // begun before the other
					t.Error(err)
				}
			}
		}, fwd.WithQueue(new(fwd.Queue)))
		var got []time.Duration
		for _, rec := range records {
			got = append(got, rec.Duration/time.Second)
		}
		if diff := cmp.Diff([]time.Duration{1, 2, 1, 2, 1, 2}, got); diff != "" {
			t.Errorf("seconds (-want +got):\n%s", diff)
		}
	})
}

// Reported passes may lie in any time, with a clock and without: only what is between them counts.
func TestQueueOfReportsInAnyTime(t *testing.T) {
	t.Parallel()
	for _, began := range []time.Time{
		{}, time.Unix(0, 0), time.Now(), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		for name, opts := range map[string][]fwd.Option{
			"no clock": nil, "clock": {fwd.WithClock(func() time.Time { return began })},
		} {
			records := recordsOf(t, fwd.Config{}, func(r *fwd.Runner) {
				for k := range 3 { // each begins a second after the one before, and takes two
					start, end := began.Add(time.Duration(k)*time.Second), began.Add(time.Duration(2*k+2)*time.Second)
					if err := r.Report(t.Context(), fwd.Pass{NumTokens: 1}, start, end, nil); err != nil {
						t.Error(err)
					}
				}
			}, append(opts, fwd.WithQueue(new(fwd.Queue)))...)
			for _, rec := range records {
				if rec.Duration != 2*time.Second {
					t.Errorf("%s, from %v: pass of %v took %v, want 2 s", name, began, rec.Began, rec.Duration)
				}
			}
		}
	}
}
