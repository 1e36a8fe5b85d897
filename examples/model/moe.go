package model

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"
)

// MoE is a mixture of experts with top-2 routing and expert parallelism: the experts of a layer are spread over all workers,
// and every worker has rows for any of them.
type MoE struct {
	Name   string
	Router *mat.Dense
}

// Experts is one worker's share of a layer's experts, the layer object that [MoE] finds under its name.
type Experts struct {
	First    int             // the index of Local[0] among all experts of the layer
	Local    []ExpertWeights // consecutive
	MaxChunk int             // the most rows that one worker sends at once; bounds what a worker must hold of all others
	Exchange Exchanger
}

// NewExperts returns the share of worker out of workers: consecutive experts, as evenly as they go. With more workers than
// experts some have none and only send and receive rows.
func NewExperts(w *LayerWeights, worker, workers, maxChunk int, x Exchanger) *Experts {
	first, end := worker*len(w.Experts)/workers, (worker+1)*len(w.Experts)/workers
	return &Experts{First: first, Local: w.Experts[first:end], MaxChunk: maxChunk, Exchange: x}
}

// Exchanger moves rows between the workers that share the experts. All workers make the same calls in the same order; sizes
// says how many rows each worker brings. An Exchanger refuses an exchange, with an error at every worker, when workers
// differ in what they are exchanging or in the sizes, or when a worker brings another number of rows than it should.
//
// What a worker sends must stay as it is until its next call returns.
type Exchanger interface {
	// Dispatch gives everyone the rows of all workers, in worker order.
	Dispatch(ctx context.Context, at Place, sizes []int, rows Routed) ([]Routed, error)
	// Combine sends parts[w] back to worker w and returns what the workers sent to this one, in worker order.
	Combine(ctx context.Context, at Place, sizes []int, parts []*mat.Dense) ([]*mat.Dense, error)
}

// Place says where in a pass an exchange happens, so that workers which lost step find out.
type Place struct {
	Layer string
	Chunk int
}

func (p Place) String() string { return fmt.Sprintf("%s chunk %d", p.Layer, p.Chunk) }

// Routed is a chunk of rows with the experts that the router chose for each.
type Routed struct {
	Rows    *mat.Dense
	Experts [][TopK]int
}

// Forward returns, for each row of x, the weighted sum of the outputs of its two experts, wherever they live. The rows go
// out in chunks, and every worker goes through as many chunks as the one with the most rows: a worker that has run out sends
// a row again and drops the result, since the others wait for it.
func (m *MoE) Forward(ctx context.Context, x *mat.Dense) (*mat.Dense, error) {
	experts, err := fwd.Layer[*Experts](ctx, m.Name)
	if err != nil {
		return nil, err
	}
	if err := m.checkShapes(ctx); err != nil {
		return nil, err
	}
	rows, width := x.Dims()
	out := mat.NewDense(rows, width, nil)
	chunks, err := fwd.Chunks(ctx, 1, experts.MaxChunk)
	if err != nil {
		return nil, err
	}
	for ctx, chunk := range chunks {
		if chunk.Start < 0 || chunk.End > rows || chunk.Start >= chunk.End {
			return nil, fmt.Errorf("model: %s chunk %d: rows [%d, %d) of %d", m.Name, chunk.Index, chunk.Start, chunk.End, rows)
		}
		part := x.Slice(chunk.Start, chunk.End, 0, width).(*mat.Dense)
		mixed, err := m.chunk(ctx, experts, Place{m.Name, chunk.Index}, part)
		if err != nil {
			return nil, err
		}
		if chunk.Keep {
			kept := out.Slice(chunk.Start, chunk.End, 0, width).(*mat.Dense)
			kept.Add(kept, mixed) // every row is kept once; one that came twice would show, where a copy would hide it
		}
	}
	return out, nil
}

// checkShapes makes sure that a pass which runs a graph has the same number of rows on all workers. A captured exchange has
// buffers of one shape: that is why ranks are padded to each other when they run graphs.
func (m *MoE) checkShapes(ctx context.Context) error {
	mode := fwd.MustFromContext(ctx).GraphMode
	if mode == fwd.GraphNone {
		return nil
	}
	ctx, err := fwd.WithSPLocalSizes(ctx, 1)
	if err != nil {
		return err
	}
	if sizes, _ := fwd.LocalSizes(ctx); slices.Min(sizes) != slices.Max(sizes) {
		return fmt.Errorf("model: %s: graph mode %v with unequal local sizes %v", m.Name, mode, sizes)
	}
	return nil
}

func (m *MoE) chunk(ctx context.Context, experts *Experts, at Place, x *mat.Dense) (*mat.Dense, error) {
	sizes, ok := fwd.LocalSizes(ctx)
	if !ok {
		return nil, fmt.Errorf("model: %v: no local sizes in the context", at)
	}
	choice, weights := m.route(x)
	all, err := experts.Exchange.Dispatch(ctx, at, sizes, Routed{x, choice})
	if err != nil {
		return nil, err
	}
	parts := make([]*mat.Dense, len(all))
	for w, routed := range all {
		parts[w] = experts.apply(routed)
	}
	back, err := experts.Exchange.Combine(ctx, at, sizes, parts)
	if err != nil {
		return nil, err
	}

	// Every worker sends a full matrix with zeros in place of what others compute. The first choice is added before the
	// second, whoever computed them, so that the sum does not depend on how the experts are spread.
	rows, width := x.Dims()
	out := mat.NewDense(rows, width, nil)
	for i := range rows {
		for k := range TopK {
			for _, part := range back {
				floats.AddScaled(out.RawRowView(i), weights[i][k], part.RawRowView(i*TopK+k))
			}
		}
	}
	return out, nil
}

// route returns the two best experts for each row, best first, and their weights, which sum to one.
func (m *MoE) route(x *mat.Dense) (choice [][TopK]int, weights [][TopK]float64) {
	var scores mat.Dense
	scores.Mul(x, m.Router)
	rows, _ := scores.Dims()
	choice, weights = make([][TopK]int, rows), make([][TopK]float64, rows)
	for i := range rows {
		row := scores.RawRowView(i)
		for k := range TopK {
			best := floats.MaxIdx(row)
			choice[i][k], weights[i][k] = best, row[best]
			row[best] = math.Inf(-1)
		}
		softmax(weights[i][:])
	}
	return choice, weights
}

// apply runs the local experts over the rows that chose them. Row i·TopK+k of the result is the k-th choice of row i, and
// zero where that expert lives elsewhere.
func (e *Experts) apply(in Routed) *mat.Dense {
	rows, width := in.Rows.Dims()
	out := mat.NewDense(rows*TopK, width, nil)
	for local := range e.Local {
		var from, to []int
		for i, choice := range in.Experts {
			for k, expert := range choice {
				if expert == e.First+local {
					from, to = append(from, i), append(to, i*TopK+k)
				}
			}
		}
		if len(from) == 0 {
			continue
		}
		x := mat.NewDense(len(from), width, nil)
		for i, row := range from {
			x.SetRow(i, in.Rows.RawRowView(row))
		}
		y := e.Local[local].forward(x)
		for i, row := range to {
			out.SetRow(row, y.RawRowView(i))
		}
	}
	return out
}

func (e *ExpertWeights) forward(x *mat.Dense) *mat.Dense {
	var gate, up, down mat.Dense
	gate.Mul(x, e.Gate)
	up.Mul(x, e.Up)
	gate.Apply(func(_, _ int, v float64) float64 { return v / (1 + math.Exp(-v)) }, &gate) // SiLU
	gate.MulElem(&gate, &up)
	down.Mul(&gate, e.Down)
	return &down
}
