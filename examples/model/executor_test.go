// Passes by graphs, and microbatches.

package model

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/mat"
)

// decode returns a pass that decodes one token each of some requests, with tokens of a past of 20
// tokens, in a graph mode.
func decode(layers map[string]any, requests int, mode fwd.GraphMode) (*fwd.ForwardContext, []int) {
	meta := &AttnMeta{Positions: slices.Repeat([]int{20}, requests)}
	slots, tokens := make([]int, requests), make([]int, requests)
	for i := range requests {
		table := []int{i % 4, 4 + i%4, 8, 9, 10, 11 + i%4}
		meta.Seqs = append(meta.Seqs, SeqMeta{Rows: fwd.Range{Start: i, Stop: i + 1}, BlockTable: table})
		slots[i], tokens[i] = table[5]*blockSize, i%50
	}
	fc := &fwd.ForwardContext{
		Layers:       layers,
		AttnMetadata: []map[string]any{{"": meta}},
		SlotMapping:  []map[string]any{{"": slots}},
		NumTokens:    requests, NumTokensUnpadded: requests,
		GraphMode: mode,
		Batch:     fwd.BatchDescriptor{NumTokens: requests},
	}
	if mode == fwd.GraphFull {
		fc.Batch.NumReqs, fc.Batch.Uniform = requests, true
	}
	return fc, tokens
}

// TestReplay: a graph that was captured with one batch gives another batch the same result as an
// eager pass, bit by bit.
func TestReplay(t *testing.T) {
	for _, mode := range []fwd.GraphMode{fwd.GraphPiecewise, fwd.GraphFull} {
		t.Run(mode.String(), func(t *testing.T) {
			m, layers := newTest(t, 3)
			e, err := NewExecutor(m)
			if err != nil {
				t.Fatal(err)
			}
			warmUp, tokens := decode(layers, 4, mode)
			warmUp.AttnMetadata, warmUp.SlotMapping = nil, nil
			if _, err := e.Forward(fwd.NewContext(t.Context(), warmUp), tokens); err != nil {
				t.Fatal(err)
			}
			e.CloseCapture()
			for range 3 {
				fc, tokens := decode(layers, 4, mode)
				ctx := fwd.NewContext(t.Context(), fc)
				got, err := e.Forward(ctx, tokens)
				if err != nil {
					t.Fatal(err)
				}
				got = mat.DenseCopyOf(got)
				want, err := m.Forward(ctx, tokens)
				if err != nil {
					t.Fatal(err)
				}
				if !mat.Equal(got, want) {
					t.Error("a replay differs from an eager pass")
				}
			}
			graphs := 1
			if mode == fwd.GraphPiecewise {
				graphs = 3
			}
			if captures, replays := e.Graphs(); captures != graphs || replays != 4*graphs {
				t.Errorf("%d captures and %d replays, want %d and %d", captures, replays, graphs, 4*graphs)
			}
			late, tokens := decode(layers, 5, mode)
			if _, err := e.Forward(fwd.NewContext(t.Context(), late), tokens); !errors.Is(err, fwd.ErrCaptureClosed) {
				t.Errorf("%v, want %v", err, fwd.ErrCaptureClosed)
			}
		})
	}
}

// TestKeep: graphs that are kept replay without being captured again, others are gone until they are
// captured anew.
func TestKeep(t *testing.T) {
	for mode, graphs := range map[fwd.GraphMode]int{fwd.GraphPiecewise: 3, fwd.GraphFull: 1} {
		t.Run(mode.String(), func(t *testing.T) {
			m, layers := newTest(t, 3)
			e, err := NewExecutor(m)
			if err != nil {
				t.Fatal(err)
			}
			forward := func(requests int) error {
				fc, tokens := decode(layers, requests, mode)
				ctx := fwd.NewContext(t.Context(), fc)
				got, err := e.Forward(ctx, tokens)
				if err != nil {
					return err
				}
				got = mat.DenseCopyOf(got)
				if want, err := m.Forward(ctx, tokens); err != nil || !mat.Equal(got, want) {
					t.Errorf("a replay of %d tokens differs from an eager pass, %v", requests, err)
				}
				return nil
			}
			check := func(captures, replays, rows int) {
				t.Helper()
				if c, r := e.Graphs(); c != captures || r != replays {
					t.Errorf("%d captures and %d replays, want %d and %d", c, r, captures, replays)
				}
				if n := e.Bytes(); n%rows != 0 || n/rows < 8*m.weights.Config.Width {
					t.Errorf("graphs of %d rows take %d bytes", rows, n)
				}
			}
			for requests := 2; requests <= 4; requests++ {
				if err := forward(requests); err != nil {
					t.Fatal(err)
				}
			}
			check(3*graphs, 3*graphs, 2+3+4)
			e.CloseCapture()
			fc, _ := decode(layers, 3, mode)
			if err := e.Keep([]fwd.Capture{{Mode: mode, Batch: fc.Batch}}); err != nil {
				t.Fatal(err)
			}
			check(3*graphs, 3*graphs, 3)
			if err := errors.Join(forward(3), forward(4)); err != nil {
				t.Fatal(err)
			}
			check(4*graphs, 5*graphs, 3+4)
			e.CloseCapture()
			if err := forward(2); !errors.Is(err, fwd.ErrCaptureClosed) {
				t.Errorf("a graph that was not kept: %v, want %v", err, fwd.ErrCaptureClosed)
			}
			if err := errors.Join(forward(3), forward(4)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGraphRefuses: a graph is for the batches that its key describes, and for no others.
func TestGraphRefuses(t *testing.T) {
	for _, c := range []struct {
		name, want string
		mode       fwd.GraphMode
		change     func(fc *fwd.ForwardContext)
	}{
		{"adapters", "a batch with 2 adapters for a graph with 1", fwd.GraphPiecewise,
			func(fc *fwd.ForwardContext) {
				meta := fc.AttnMetadata[0][""].(*AttnMeta)
				meta.Adapters, meta.ActiveAdapters = []int{1, 2, 0, 0}, 2
				fc.Batch.HasLoRA, fc.Batch.NumActiveLoRAs = true, 1
			}},
		{"requests", "request 0 of 4 has 1 tokens, in a graph for 2 requests of 2 tokens each", fwd.GraphFull,
			func(fc *fwd.ForwardContext) {
				fc.Batch.NumReqs = 2
			}},
		{"tokens", "a batch of 4 tokens for a graph of 8", fwd.GraphFull, func(fc *fwd.ForwardContext) {
			fc.NumTokens, fc.Batch.NumTokens = 8, 8
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, layers := newTest(t, 3)
			e, err := NewExecutor(m)
			if err != nil {
				t.Fatal(err)
			}
			fc, tokens := decode(layers, 4, c.mode)
			c.change(fc)
			if _, err := e.Forward(fwd.NewContext(t.Context(), fc), tokens); err == nil ||
				!strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want an error with %q", err, c.want)
			}
		})
	}
}

// split returns a pass in microbatches, all rows of which are of one request.
func split(layers map[string]any, metas ...*AttnMeta) *fwd.ForwardContext {
	fc := &fwd.ForwardContext{Layers: layers}
	for _, meta := range metas {
		first, n := fc.NumTokens, len(meta.Positions)
		fc.NumTokens += n
		fc.UBatches = append(fc.UBatches, fwd.UBatchSlice{
			Requests: fwd.Range{Start: 0, Stop: 1},
			Tokens:   fwd.Range{Start: first, Stop: fc.NumTokens},
		})
		fc.AttnMetadata = append(fc.AttnMetadata, map[string]any{"": meta})
		fc.SlotMapping = append(fc.SlotMapping, map[string]any{"": slices.Repeat([]int{NoSlot}, n)})
	}
	return fc
}

// TestMicrobatchFails: a microbatch that fails before its keys are written does not leave the next
// one waiting for them.
func TestMicrobatchFails(t *testing.T) {
	m, layers := newTest(t, 3)
	fc := split(layers, &AttnMeta{Positions: make([]int, 2)},
		&AttnMeta{Positions: make([]int, 3), After: make(chan struct{})})
	fc.SlotMapping[0][""] = []int{NoSlot} // one is missing
	var failed *fwd.UBatchError
	_, err := m.Forward(fwd.NewContext(t.Context(), fc), make([]int, 5))
	if !errors.As(err, &failed) || failed.Index != 0 || !strings.Contains(err.Error(), "2 rows with 1 slots") {
		t.Errorf("%v, want the error of microbatch 0", err)
	}
	fc = split(layers, &AttnMeta{Positions: make([]int, 2)}, &AttnMeta{Positions: make([]int, 3)})
	if _, err := m.Forward(fwd.NewContext(t.Context(), fc), make([]int, 4)); err == nil ||
		!strings.Contains(err.Error(), "microbatch 1 has rows [2, 5) of 4") {
		t.Errorf("%v, want an error about the missing row", err)
	}
}

// together is an exchange that lets microbatch 0 go on only once microbatch 1 has come, in every
// layer.
type together struct {
	alone
	come map[string]chan struct{} // by layer
}

func (x together) Dispatch(ctx context.Context, at Place, sizes []int, rows Routed) ([]Routed, error) {
	if u, _, _ := fwd.UBatch(ctx); u == 1 {
		close(x.come[at.Layer])
	}
	select {
	case <-x.come[at.Layer]:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return x.alone.Dispatch(ctx, at, sizes, rows)
}

// TestMicrobatchesOverlap: the attention of a microbatch goes on while the one before is in its
// expert exchange.
func TestMicrobatchesOverlap(t *testing.T) {
	m, layers := newTest(t, 100)
	x := together{come: map[string]chan struct{}{}}
	for l := range m.layers {
		x.come[MoEName(l)] = make(chan struct{})
		layers[MoEName(l)].(*Workers).Experts[0].Exchange = x
	}
	written := make(chan struct{})
	fc := split(layers, &AttnMeta{Positions: make([]int, 2)}, &AttnMeta{Positions: make([]int, 2)})
	for i, own := range []AttnMeta{{Positions: make([]int, 2), Written: written},
		{Positions: make([]int, 2), After: written}} {
		fc.AttnMetadata[i][AttentionName(0)] = &own
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := m.Forward(fwd.NewContext(ctx, fc), make([]int, 4)); err != nil {
		t.Error(err)
	}
}

// BenchmarkForward shows what a replay saves: mode NONE plans each pass anew, and of-eager is the
// time as a share of that.
func BenchmarkForward(b *testing.B) {
	for _, requests := range []int{1, 4, 16} {
		var eager float64 // nanoseconds
		for _, mode := range []fwd.GraphMode{fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull} {
			b.Run(fmt.Sprintf("tokens=%d/mode=%v", requests, mode), func(b *testing.B) {
				m, layers := newTest(b, 4)
				e, err := NewExecutor(m)
				if err != nil {
					b.Fatal(err)
				}
				fc, tokens := decode(layers, requests, mode)
				ctx := fwd.NewContext(context.Background(), fc)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := e.Forward(ctx, tokens); err != nil {
						b.Fatal(err)
					}
				}
				perPass := float64(b.Elapsed()) / float64(b.N)
				if mode == fwd.GraphNone {
					eager = perPass
				} else if eager > 0 {
					b.ReportMetric(perPass/eager, "of-eager")
				}
			})
		}
	}
}
