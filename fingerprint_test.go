// This file tests that all ranks are configured alike: the fingerprint in their votes, and what happens to
// ranks that are configured differently or change their graphs.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// setup is a Runner's configuration, as far as it must be equal on all ranks or might seem to.
type setup struct {
	cfg    fwd.Config
	graphs *fwd.DispatcherConfig
	opts   []fwd.Option
}

// newSetup returns a configuration in which nothing is a default.
func newSetup() *setup {
	return &setup{
		cfg: fwd.Config{Name: "target", Parallel: fwd.ParallelConfig{
			DataParallelSize: 4, DataParallelRank: 1, NumUBatches: 2,
			DecodeUBatchThreshold: 33, PrefillUBatchThreshold: 513, TokenMultiple: 6,
		}},
		graphs: &fwd.DispatcherConfig{
			Mode: fwd.GraphFullAndPiecewise, CaptureSizes: []int{6, 12, 24}, MaxNumSeqs: 8,
			UniformDecodeQueryLen: 3, LoRA: &fwd.LoRAConfig{MaxLoRAs: 4},
		},
	}
}

func (s *setup) fingerprint(t *testing.T) uint64 {
	t.Helper()
	opts := s.opts
	if s.graphs != nil {
		opts = append(slices.Clone(opts), fwd.WithDispatcher(planDispatcher(t, *s.graphs)))
	}
	r, err := fwd.New(s.cfg, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return fwd.Fingerprint(r)
}

// differences change a configuration in one thing each.
var differences = map[string]func(s *setup){
	"nothing":                 func(*setup) {},
	"Name":                    func(s *setup) { s.cfg.Name = "draft" },
	"no Name":                 func(s *setup) { s.cfg.Name = "" },
	"DataParallelSize":        func(s *setup) { s.cfg.Parallel.DataParallelSize = 5 },
	"Dense":                   func(s *setup) { s.cfg.Parallel.Dense = true },
	"NumUBatches":             func(s *setup) { s.cfg.Parallel.NumUBatches = 3 },
	"DecodeUBatchThreshold":   func(s *setup) { s.cfg.Parallel.DecodeUBatchThreshold = 513 },
	"PrefillUBatchThreshold":  func(s *setup) { s.cfg.Parallel.PrefillUBatchThreshold = 33 },
	"TokenMultiple":           func(s *setup) { s.cfg.Parallel.TokenMultiple = 3 },
	"step trace":              func(s *setup) { s.opts = append(s.opts, fwd.WithStepTrace()) },
	"no dispatcher":           func(s *setup) { s.graphs = nil },
	"Mode":                    func(s *setup) { s.graphs.Mode = fwd.GraphFullDecodeOnly },
	"a capture size":          func(s *setup) { s.graphs.CaptureSizes[1] = 18 },
	"one capture size less":   func(s *setup) { s.graphs.CaptureSizes = s.graphs.CaptureSizes[:2] },
	"MaxNumSeqs":              func(s *setup) { s.graphs.MaxNumSeqs = 9 },
	"UniformDecodeQueryLen":   func(s *setup) { s.graphs.UniformDecodeQueryLen = 2 },
	"no LoRA":                 func(s *setup) { s.graphs.LoRA = nil },
	"MaxLoRAs":                func(s *setup) { s.graphs.LoRA.MaxLoRAs = 5 },
	"Unspecialized":           func(s *setup) { s.graphs.LoRA.Unspecialized = true },
	"SpecializeCount":         func(s *setup) { s.graphs.LoRA.SpecializeCount = true },
	"no use for graphs, q=3":  func(s *setup) { s.graphs = &fwd.DispatcherConfig{UniformDecodeQueryLen: 3} },
	"no use for graphs, size": func(s *setup) { s.graphs = &fwd.DispatcherConfig{CaptureSizes: []int{6}} },
}

// Each thing that must be equal changes the fingerprint, and no two do so in the same way.
func TestFingerprintDifferences(t *testing.T) {
	t.Parallel()
	seen := map[uint64]string{}
	for name, change := range differences {
		s := newSetup()
		change(s)
		f := s.fingerprint(t)
		if other, ok := seen[f]; ok || f == 0 {
			t.Errorf("%q has the fingerprint %#x of %q", name, f, other)
		}
		seen[f] = name
	}
	// A new field needs a place in the fingerprint, or a reason to have none, and a case above.
	for value, want := range map[any]int{
		fwd.Config{}.Parallel: 7, fwd.LoRAConfig{}: 3,
	} {
		if got := reflect.TypeOf(value).NumField(); got != want {
			t.Errorf("%T has %d fields, and this test knows %d", value, got, want)
		}
	}
	if got := reflect.TypeFor[fwd.DispatcherConfig]().NumField(); got != 5 {
		t.Errorf("a dispatcher's configuration has %d fields, and this test knows 5", got)
	}
}

// What may differ between ranks, and what means the same, does not change the fingerprint.
func TestFingerprintEqual(t *testing.T) {
	t.Parallel()
	want := newSetup().fingerprint(t)
	for name, change := range map[string]func(s *setup){
		"rank":     func(s *setup) { s.cfg.Parallel.DataParallelRank = 3 },
		"layers":   func(s *setup) { s.cfg.Layers = map[string]any{"mlp": 1} },
		"timeout":  func(s *setup) { s.opts = append(s.opts, fwd.WithExchangeTimeout(time.Second)) },
		"observer": func(s *setup) { s.opts = append(s.opts, fwd.WithObserver(fwd.NewRecorder(1).Observe)) },
		"clock":    func(s *setup) { s.opts = append(s.opts, fwd.WithClock(time.Now)) },
		"middleware": func(s *setup) {
			s.opts = append(s.opts, fwd.WithMiddleware(fwd.ProfileLabels()))
		},
		"rank and size of the coordinator": func(s *setup) {
			s.cfg.Parallel.DataParallelSize, s.cfg.Parallel.DataParallelRank = 0, 0
			s.opts = append(s.opts, fwd.WithCoordinator(&groupFake{rank: 2, size: 4}))
		},
	} {
		s := newSetup()
		change(s)
		if got := s.fingerprint(t); got != want {
			t.Errorf("%s: the fingerprint is %#x, want %#x", name, got, want)
		}
	}
	// Defaults are filled in.
	zero := &setup{cfg: fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}}
	full := &setup{
		cfg: fwd.Config{Parallel: fwd.ParallelConfig{
			DataParallelSize: 2, NumUBatches: 1, DecodeUBatchThreshold: 32, PrefillUBatchThreshold: 512,
			TokenMultiple: 1,
		}},
		graphs: &fwd.DispatcherConfig{UniformDecodeQueryLen: 1},
	}
	if got, want := full.fingerprint(t), zero.fingerprint(t); got != want {
		t.Errorf("with the defaults written out the fingerprint is %#x, want %#x", got, want)
	}
}

// The fingerprint is the same in every process and on every architecture. Who changes it parts new ranks from
// old ones, which is a change of the wire.
func TestFingerprintGolden(t *testing.T) {
	t.Parallel()
	zero := &setup{cfg: fwd.Config{Parallel: fwd.ParallelConfig{DataParallelSize: 2}}}
	traced := newSetup()
	traced.cfg.Name = "größer"
	traced.opts = append(traced.opts, fwd.WithStepTrace())
	for i, tt := range []struct {
		s    *setup
		want uint64
	}{
		{zero, 0xcb71c2be82acc90},
		{newSetup(), 0xedeea62a9c7ddf76},
		{traced, 0xda63ef7ad375c62b},
	} {
		if got := tt.s.fingerprint(t); got != tt.want {
			t.Errorf("configuration %d: %#x, want %#x", i, got, tt.want)
		}
	}
	// It is what the votes say.
	tap := &groupTap{Coordinator: &groupFake{size: 2, exchange: answerAt(1, 1)}}
	r, err := fwd.New(zero.cfg, fwd.WithCoordinator(tap))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Plan(t.Context(), planBatch(3)); err != nil || tap.sent.Config != zero.fingerprint(t) {
		t.Errorf("the vote has the fingerprint %#x, %v", tap.sent.Config, err)
	}
}

// Every rank refuses a step in which ranks are configured differently, and says which ones are. Nobody goes
// on alone, and the step after is in lockstep.
func TestConfiguredDifferently(t *testing.T) {
	t.Parallel()
	graphs := func(change func(*fwd.DispatcherConfig)) *fwd.DispatcherConfig {
		cfg := planMixed(1)
		change(&cfg)
		return &cfg
	}
	ubatches := fwd.ParallelConfig{NumUBatches: 2}
	for name, odd := range map[string]setup{
		"capture sizes":  {graphs: graphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes[3] = 6 })},
		"fewer sizes":    {graphs: graphs(func(c *fwd.DispatcherConfig) { c.CaptureSizes = []int{1, 2, 4} })},
		"sequences":      {graphs: graphs(func(c *fwd.DispatcherConfig) { c.MaxNumSeqs = 4 })},
		"mode":           {graphs: graphs(func(c *fwd.DispatcherConfig) { c.Mode = fwd.GraphFullDecodeOnly })},
		"no graphs":      {},
		"microbatches":   {cfg: fwd.Config{Parallel: ubatches}, graphs: graphs(sameGraphs)},
		"token multiple": {cfg: fwd.Config{Parallel: fwd.ParallelConfig{TokenMultiple: 4}}},
		"name":           {cfg: fwd.Config{Name: "draft"}, graphs: graphs(sameGraphs)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			usual := setup{graphs: graphs(sameGraphs)}
			runners := setups(t, usual, odd, usual)
			for step := uint64(1); step <= 3; step++ {
				passes, errs := planStep(t.Context(), runners, func(rank int) fwd.Schedule { return planDecode(rank) })
				for rank, err := range errs {
					groupCheckError(t, rank, err, fwd.ErrInvalid, step, 1)
					if err != nil && !strings.Contains(err.Error(), "configured differently") {
						t.Errorf("rank %d: %v", rank, err)
					}
					if passes[rank].Agreement != nil || passes[rank].NumTokens != 0 {
						t.Errorf("rank %d: a plan %+v beside the error", rank, passes[rank])
					}
				}
			}
		})
	}
}

func sameGraphs(*fwd.DispatcherConfig) {}

// setups makes the Runners of a group.
func setups(t *testing.T, ranks ...setup) (runners []*fwd.Runner) {
	t.Helper()
	for rank, c := range localGroup(t, len(ranks)) {
		var d *fwd.Dispatcher
		if cfg := ranks[rank].graphs; cfg != nil {
			d = planDispatcher(t, *cfg)
		}
		r, err := fwd.New(ranks[rank].cfg, fwd.WithCoordinator(c), fwd.WithDispatcher(d))
		if err != nil {
			t.Fatal(err)
		}
		runners = append(runners, r)
	}
	return runners
}

// A coordinator that carries no fingerprints: a rank refuses an agreement that somebody can't follow.
func TestConfigurationNotSaid(t *testing.T) {
	t.Parallel()
	peer := fwd.Vote{Step: 1, NumTokens: 5, NumTokensPadded: 6, NumReqs: 1, GraphMode: fwd.GraphPiecewise}
	fake := &groupFake{size: 2, exchange: func(v fwd.Vote) ([]fwd.Vote, error) {
		return []fwd.Vote{v, peer}, nil
	}}
	r := groupRunner(t, fake, fwd.WithDispatcher(planDispatcher(t, planMixed(1))))
	pass, err := r.Plan(t.Context(), planBatch(3))
	groupCheckError(t, 0, err, fwd.ErrInvalid, 1, 0)
	for _, text := range []string{"PIECEWISE with 6 tokens", "PIECEWISE with 8 tokens"} {
		if err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("the error %v does not say %q", err, text)
		}
	}
	if pass.Agreement != nil {
		t.Errorf("a plan %+v beside the error", pass)
	}
	peer.Step, peer.NumTokensPadded = 2, 8 // which is a capture size
	if pass, err := r.Plan(t.Context(), planBatch(3)); err != nil || pass.NumTokens != 8 {
		t.Errorf("%d tokens, %v; want 8", pass.NumTokens, err)
	}
	// A rank that could follow refuses too, since the other can't.
	peer.Step, peer.NumActiveLoRAs = 3, 1
	_, err = r.Plan(t.Context(), planBatch(3))
	groupCheckError(t, 0, err, fwd.ErrInvalid, 3, 1)
}

// A Runner that WithGraphs returns goes on at the old one's step. All ranks change in the same step: if one
// changes alone, every rank is told.
func TestWithGraphs(t *testing.T) {
	t.Parallel()
	one := planMixed(1)
	runners, taps := planGroup(t, fwd.ParallelConfig{}, &one, 3)
	planOf(t, runners, planDecode(3), planDecode(3), planDecode(3))
	more := planMixed(1)
	more.CaptureSizes = []int{3, 5, 7}
	d := planDispatcher(t, more)
	change := func(rank int) {
		t.Helper()
		next, err := runners[rank].WithGraphs(d)
		if err != nil {
			t.Fatal(err)
		}
		runners[rank] = next
	}
	change(1)
	_, errs := planStep(t.Context(), runners, func(int) fwd.Schedule { return planDecode(3) })
	for rank, err := range errs {
		groupCheckError(t, rank, err, fwd.ErrInvalid, 2, 1)
	}
	change(0)
	change(2)
	want := planDecoding(planTokens{3, 3, 3, 3}, fwd.GraphFull, fwd.ReasonExact, planUniform(3, 3))
	passes := planOf(t, runners, planDecode(3), planDecode(3), planDecode(3))
	for rank, pass := range passes {
		if diff := planDiff(want, pass); diff != "" || pass.Agreement.Step != 3 || taps[rank].sent.Step != 3 {
			t.Errorf("rank %d plans in step %d (-want +got):\n%s", rank, pass.Agreement.Step, diff)
		}
		if err := runners[rank].Run(t.Context(), pass, nothing); err != nil {
			t.Errorf("rank %d: %v", rank, err)
		}
	}
	// Without graphs.
	d = nil
	for rank := range runners {
		change(rank)
	}
	pass := planOf(t, runners, planDecode(3), planDecode(3), planDecode(3))[0]
	if pass.GraphMode != fwd.GraphNone {
		t.Errorf("without a dispatcher the pass is %+v", pass)
	}
}

// WithGraphs keeps everything else of the Runner, and refuses while an exchange is open.
func TestWithGraphsKeeps(t *testing.T) {
	t.Parallel()
	calls := 0
	recorder := fwd.NewRecorder(1)
	group := localGroup(t, 2)
	r, err := fwd.New(fwd.Config{Name: "m", Layers: map[string]any{"mlp": 3}}, fwd.WithCoordinator(group[0]),
		fwd.WithObserver(recorder.Observe), fwd.WithMiddleware(func(next fwd.ForwardFunc) fwd.ForwardFunc {
			return func(ctx context.Context) error { calls++; return next(ctx) }
		}))
	if err != nil {
		t.Fatal(err)
	}
	d := planDispatcher(t, planMixed(1))
	next, err := r.WithGraphs(d)
	if err != nil {
		t.Fatal(err)
	}
	pass := fwd.Pass{NumTokens: 1, NumTokensAcrossDP: vec(1, 1)}
	err = next.Run(t.Context(), pass, func(ctx context.Context) error {
		layer, err := fwd.Layer[int](ctx, "mlp")
		return errors.Join(err, map[bool]error{true: fmt.Errorf("layer %d", layer)}[layer != 3])
	})
	got := recorder.Recent()
	if err != nil || calls != 1 || len(got) != 1 || got[0].Name != "m" || got[0].Size != 2 {
		t.Errorf("%v, %d calls of the middleware, records %+v", err, calls, got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	wait, err := next.Begin(ctx, planBatch(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := next.WithGraphs(nil); !errors.Is(err, fwd.ErrLockstep) {
		t.Errorf("WithGraphs while an exchange is open: %v, want %v", err, fwd.ErrLockstep)
	}
	cancel()
	if _, err := wait(); !errors.Is(err, fwd.ErrRankMissing) {
		t.Error(err)
	}
	after, err := next.WithGraphs(nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fwd.Status{Step: 1}, after.Status()); diff != "" {
		t.Errorf("afterwards the status (-want +got):\n%s", diff)
	}
}

// A nil Runner's graphs can be set too.
func TestWithGraphsOfNil(t *testing.T) {
	t.Parallel()
	r, err := (*fwd.Runner)(nil).WithGraphs(planDispatcher(t, planMixed(1)))
	if err != nil {
		t.Fatal(err)
	}
	pass, err := r.Plan(t.Context(), planDecode(3))
	if err != nil || pass.GraphMode != fwd.GraphFull {
		t.Errorf("%+v, %v", pass, err)
	}
	// It is a Runner of its own: it does not see the passes of others that were made so.
	other, err := (*fwd.Runner)(nil).WithGraphs(nil)
	if err != nil {
		t.Fatal(err)
	}
	err = r.Run(t.Context(), pass, func(context.Context) error {
		if got, others := r.Status().Active, other.Status().Active; got != 1 || others != 0 {
			t.Errorf("%d passes are active here and %d there, want 1 and 0", got, others)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
