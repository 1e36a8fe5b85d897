package model

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/forwardctx/fwd"
	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"
)

// MoE is a mixture of experts with top-2 routing, expert parallelism and sequence parallelism: the
// experts of a layer are spread over the workers of all ranks, each worker takes a share of its
// rank's rows through the layer, and every worker has rows for any expert.
type MoE struct {
	Name   string
	Router *mat.Dense
}

// Workers are the sequence-parallel workers of one rank, the layer object that [MoE] finds under
// its name.
type Workers struct {
	// MaxChunk is the most rows that one worker sends in one exchange. It bounds what a worker must
	// hold of all others.
	MaxChunk int

	Experts []*Experts // of each worker
}

// Experts is one worker's share of a layer's experts.
type Experts struct {
	Worker   int             // among the workers of all ranks: its place among the local sizes
	First    int             // the index of Local[0] among all experts of the layer
	Local    []ExpertWeights // consecutive
	Exchange Exchanger
}

// NewExperts returns the share of worker out of workers: consecutive experts, as evenly as they go.
// With more workers than experts some have none and only send and receive rows. If these are not
// the workers of all ranks, set Worker.
func NewExperts(w *LayerWeights, worker, workers int, x Exchanger) *Experts {
	first, end := worker*len(w.Experts)/workers, (worker+1)*len(w.Experts)/workers
	return &Experts{Worker: worker, First: first, Local: w.Experts[first:end], Exchange: x}
}

// Exchanger moves rows between the workers that share the experts. All workers make the same calls
// in the same order; sizes says how many rows each worker brings. An Exchanger refuses an exchange,
// with an error at every worker, when workers differ in what they are exchanging or in the sizes,
// or when a worker brings another number of rows than it should.
//
// What a worker sends must stay as it is until its next call returns.
type Exchanger interface {
	// Dispatch gives everyone the rows of all workers, in worker order.
	Dispatch(ctx context.Context, at Place, sizes []int, rows Routed) ([]Routed, error)
	// Combine sends parts[w] back to worker w and returns what the workers sent to this one, in worker
	// order.
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

// moePlan is a mixture-of-experts layer laid out for a pass of a certain shape: which worker takes
// which rows in which chunk, how many rows the others bring to it, and room for all of it. The
// shape of a pass follows from its forward context, so a plan serves every pass of the same shape.
type moePlan struct {
	in, out *mat.Dense // the rank's rows
	mixed   *mat.Dense // what out is a view of: all workers' rows
	workers []*workerPlan
}

// plan splits rows among the rank's workers by the SP local sizes. If they don't split evenly
// the last workers get rows of zeros, which take their way through the experts like any other and
// are dropped at the end.
func (m *MoE) plan(ctx context.Context, rows int) (*moePlan, error) {
	workers, err := fwd.Layer[*Workers](ctx, m.Name)
	if err != nil {
		return nil, err
	}
	sp := len(workers.Experts)
	local, err := fwd.WithSPLocalSizes(ctx, sp)
	if err != nil {
		return nil, err
	}
	sizes, ok := fwd.LocalSizes(local)
	if !ok {
		return nil, fmt.Errorf("model: %s: no local sizes in the context", m.Name)
	}
	if mode := fwd.MustFromContext(ctx).GraphMode; mode != fwd.GraphNone &&
		slices.Min(sizes) != slices.Max(sizes) {
		// A graph's exchanges have buffers of one shape: that is why ranks are padded to each other when
		// they run graphs.
		return nil, fmt.Errorf("model: %s: graph mode %v with unequal local sizes %v", m.Name, mode, sizes)
	}
	if err := m.checkShares(ctx, sizes, sp); err != nil {
		return nil, err
	}
	width, _ := m.Router.Dims()
	first := workers.Experts[0].Worker
	if first >= len(sizes) {
		return nil, fmt.Errorf("model: %s: worker %d has no local size among %v", m.Name, first, sizes)
	}
	share := sizes[first]
	if share*sp < rows || (share-1)*sp >= rows {
		return nil, fmt.Errorf("model: %s: %d rows for %d workers of %d rows each", m.Name, rows, sp, share)
	}
	padded := mat.NewDense(share*sp, width, nil)
	p := &moePlan{mixed: mat.NewDense(share*sp, width, nil)}
	p.in, p.out = firstRows(padded, rows), firstRows(p.mixed, rows)
	for s, experts := range workers.Experts {
		w := &workerPlan{experts: experts, router: m.Router}
		chunks, err := fwd.Chunks(ctx, sp, workers.MaxChunk)
		if err != nil {
			return nil, err
		}
		for _, chunk := range chunks {
			at := Place{m.Name, chunk.Index}
			if chunk.Index*workers.MaxChunk >= slices.Max(sizes) {
				return nil, fmt.Errorf("model: %v: nobody has rows for it, the local sizes are %v", at, sizes)
			}
			if chunk.Rows.Start < 0 || chunk.Rows.Stop > share || chunk.Rows.Start >= chunk.Rows.Stop {
				return nil, fmt.Errorf("model: %v: rows [%d, %d) of %d", at, chunk.Rows.Start, chunk.Rows.Stop, share)
			}
			first, end := s*share+chunk.Rows.Start, s*share+chunk.Rows.Stop
			c := chunkPlan{at: at, sizes: chunk.Sizes, in: padded.Slice(first, end, 0, width).(*mat.Dense)}
			if chunk.Keep {
				c.out = p.mixed.Slice(first, end, 0, width).(*mat.Dense)
			}
			w.chunks = append(w.chunks, c)
		}
		p.workers = append(p.workers, w)
	}
	return p, nil
}

// checkShares checks that the workers' rows tile those of all: worker w's are the sizes[w] before
// the running sum at w. So a worker can tell whose a row is from its place among all rows.
func (m *MoE) checkShares(ctx context.Context, sizes []int, sp int) error {
	dp := fwd.MustFromContext(ctx).DP
	if dp == nil {
		return nil
	}
	ends, end := dp.CuTokensAcrossSPTo(nil, sp), 0
	for w, n := range sizes {
		if end += n; ends.AtVec(w) != float64(end) {
			return fmt.Errorf("model: %s: the rows of worker %d end at %v of all, its local sizes %v say %d", m.Name,
				w, ends.AtVec(w), sizes, end)
		}
	}
	return nil
}

// run stores in out, for each row of in, the weighted sum of the outputs of its two experts,
// wherever they live. The rank's workers run at the same time, as those of the other ranks do: they
// meet in every exchange.
func (p *moePlan) run(ctx context.Context) error {
	p.mixed.Zero()
	if len(p.workers) == 1 {
		return p.workers[0].run(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var once sync.Once
	var failed error
	for _, w := range p.workers {
		wg.Go(func() {
			if err := w.run(ctx); err != nil {
				once.Do(func() { failed = err })
				cancel() // the others may wait for this worker
			}
		})
	}
	wg.Wait()
	return failed
}

// workerPlan is what one worker does in a layer, with room for it that all its chunks share.
type workerPlan struct {
	experts *Experts
	router  *mat.Dense
	chunks  []chunkPlan

	scores  mat.Dense
	choice  [][TopK]int
	weights [][TopK]float64
	parts   []*mat.Dense // for each worker
	expert  expertBuffers
}

// chunkPlan is one round of exchanges. out is nil if the worker has run out of rows: it sends
// one again and drops the result, since the others wait for it.
type chunkPlan struct {
	at      Place
	sizes   []int
	in, out *mat.Dense
}

// run takes the worker's rows through the layer in chunks. Every worker of every rank has as many
// as the one with the most rows.
func (w *workerPlan) run(ctx context.Context) error {
	for i := range w.chunks {
		if err := w.chunk(ctx, &w.chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

func (w *workerPlan) chunk(ctx context.Context, c *chunkPlan) error {
	w.route(c.in)
	all, err := w.experts.Exchange.Dispatch(ctx, c.at, c.sizes, Routed{c.in, w.choice})
	if err != nil {
		return err
	}
	for len(w.parts) < len(all) {
		w.parts = append(w.parts, new(mat.Dense))
	}
	for i, routed := range all {
		w.experts.apply(w.parts[i], routed, &w.expert)
	}
	back, err := w.experts.Exchange.Combine(ctx, c.at, c.sizes, w.parts)
	if err != nil {
		return err
	}
	if c.out == nil {
		return nil
	}
	// Every worker sends a full matrix with zeros in place of what others compute. The first choice is
	// added before the second, whoever computed them, so that the sum does not depend on how the
	// experts are spread. A row that came twice would show, since it is added: a copy would hide it.
	for i := range w.choice {
		for k := range TopK {
			for _, part := range back {
				floats.AddScaled(c.out.RawRowView(i), w.weights[i][k], part.RawRowView(i*TopK+k))
			}
		}
	}
	return nil
}

// route chooses the two best experts for each row, best first, and their weights, which sum to one.
func (w *workerPlan) route(x *mat.Dense) {
	w.scores.Reset()
	w.scores.Mul(x, w.router)
	rows, _ := w.scores.Dims()
	w.choice, w.weights = slices.Grow(w.choice[:0], rows)[:rows], slices.Grow(w.weights[:0], rows)[:rows]
	for i := range rows {
		row := w.scores.RawRowView(i)
		for k := range TopK {
			best := floats.MaxIdx(row)
			w.choice[i][k], w.weights[i][k] = best, row[best]
			row[best] = math.Inf(-1)
		}
		softmax(w.weights[i][:])
	}
}

// expertBuffers is room for one expert's work. How many rows choose an expert shows only in the
// pass, so it grows with them.
type expertBuffers struct {
	from, to          []int
	x, gate, up, down mat.Dense
}

// apply runs the local experts over the rows that chose them. Row i·TopK+k of dst is the k-th
// choice of row i, and zero if that expert lives elsewhere.
func (e *Experts) apply(dst *mat.Dense, in Routed, b *expertBuffers) {
	rows, width := in.Rows.Dims()
	dst.Reset()
	dst.ReuseAs(rows*TopK, width)
	for local := range e.Local {
		b.from, b.to = b.from[:0], b.to[:0]
		for i, choice := range in.Experts {
			for k, expert := range choice {
				if expert == e.First+local {
					b.from, b.to = append(b.from, i), append(b.to, i*TopK+k)
				}
			}
		}
		if len(b.from) == 0 {
			continue
		}
		b.x.Reset()
		b.x.ReuseAs(len(b.from), width)
		for i, row := range b.from {
			b.x.SetRow(i, in.Rows.RawRowView(row))
		}
		e.Local[local].forward(b)
		for i, row := range b.to {
			dst.SetRow(row, b.down.RawRowView(i))
		}
	}
}

// forward stores the expert's output for b.x in b.down.
func (e *ExpertWeights) forward(b *expertBuffers) {
	b.gate.Reset()
	b.gate.Mul(&b.x, e.Gate)
	b.up.Reset()
	b.up.Mul(&b.x, e.Up)
	rows, _ := b.gate.Dims()
	for i := range rows {
		gate, up := b.gate.RawRowView(i), b.up.RawRowView(i)
		for j, v := range gate {
			gate[j] = v / (1 + math.Exp(-v)) * up[j] // SiLU
		}
	}
	b.down.Reset()
	b.down.Mul(&b.gate, e.Down)
}
