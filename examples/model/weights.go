package model

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"gonum.org/v1/gonum/mat"
)

const (
	// TopK is the number of experts that serve each token.
	TopK = 2

	normEpsilon = 1e-6
	ropeBase    = 10000.0
)

// Config holds the sizes of a model. [DefaultConfig] returns the one that the examples serve.
type Config struct {
	Layers      int
	Width       int // of the residual stream
	Heads       int // attention heads; each has Width/Heads dimensions, an even number
	Experts     int // of each layer, at least TopK
	ExpertWidth int // hidden width of an expert
	Vocab       int // number of token ids
	Adapters    int // LoRA adapters, numbered from 1
	Seed        uint64
}

// DefaultConfig returns a model small enough that a laptop serves thousands of its tokens a second,
// with every part that a large mixture-of-experts model has. Its tokens are bytes.
func DefaultConfig() Config {
	return Config{Layers: 2, Width: 32, Heads: 2, Experts: 8, ExpertWidth: 64, Vocab: 256, Seed: 1}
}

func (c Config) headDim() int { return c.Width / c.Heads }

func (c Config) validate() error {
	var errs []error
	for _, f := range []struct {
		name       string
		value, min int
	}{
		{"layers", c.Layers, 1}, {"width", c.Width, 2}, {"heads", c.Heads, 1}, {"experts", c.Experts, TopK},
		{"expert width", c.ExpertWidth, 1}, {"vocabulary", c.Vocab, 2}, {"adapters", c.Adapters, 0},
	} {
		if f.value < f.min {
			errs = append(errs, fmt.Errorf("model: %s is %d, want at least %d", f.name, f.value, f.min))
		}
	}
	if len(errs) == 0 && c.Width%(2*c.Heads) != 0 {
		errs = append(
			errs,
			fmt.Errorf("model: width %d is no multiple of 2·%d: rotary positions need heads of even width", c.Width,
				c.Heads),
		)
	}
	return errors.Join(errs...)
}

// Weights holds everything a model has learned; here, what a random generator drew from a fixed
// seed. Matrices are laid out for x·W with one token per row of x. Weights are read-only once made
// and shared by all workers.
type Weights struct {
	Config    Config
	Embedding *mat.Dense // vocab × width
	Layers    []LayerWeights
	FinalNorm []float64
	Head      *mat.Dense // width × vocab
}

// LayerWeights holds the weights of one decoder layer.
type LayerWeights struct {
	AttnNorm   []float64
	Q, K, V, O *mat.Dense // width × width
	MoENorm    []float64
	Router     *mat.Dense // width × experts
	Experts    []ExpertWeights
	Adapters   []Adapter // adapter a at index a-1
}

// ExpertWeights holds the weights of one expert: Down·(silu(Gate·x) ⊙ (Up·x)).
type ExpertWeights struct {
	Gate, Up *mat.Dense // width × expert width
	Down     *mat.Dense // expert width × width
}

// NewWeights draws the weights of a model from c.Seed: the same seed gives the same model.
func NewWeights(c Config) (*Weights, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(c.Seed, 0x6d6f64656c)) // "model"
	// Scaling by 1/sqrt(rows) keeps the variance of x·W that of x.
	draw := func(rows, cols int, gain float64) *mat.Dense {
		return drawMatrix(rng, rows, cols, gain/math.Sqrt(float64(rows)))
	}
	norm := func() []float64 {
		w := make([]float64, c.Width)
		for i := range w {
			w[i] = 1 + 0.1*rng.NormFloat64()
		}
		return w
	}
	w := &Weights{Config: c, Embedding: draw(c.Vocab, c.Width, math.Sqrt(float64(c.Vocab)))}
	for range c.Layers {
		l := LayerWeights{
			AttnNorm: norm(),
			// Queries with a gain make attention look at some positions more than at others: a wrong
			// position, or a key in the wrong slot, then changes the answer visibly.
			Q:       draw(c.Width, c.Width, 2),
			K:       draw(c.Width, c.Width, 1),
			V:       draw(c.Width, c.Width, 1),
			O:       draw(c.Width, c.Width, 1),
			MoENorm: norm(),
			Router:  draw(c.Width, c.Experts, 1),
		}
		for range c.Experts {
			l.Experts = append(l.Experts, ExpertWeights{
				Gate: draw(c.Width, c.ExpertWidth, 1),
				Up:   draw(c.Width, c.ExpertWidth, 1),
				Down: draw(c.ExpertWidth, c.Width, 1),
			})
		}
		w.Layers = append(w.Layers, l)
	}
	w.FinalNorm = norm()
	w.Head = draw(c.Width, c.Vocab, 1)
	w.drawAdapters()
	return w, nil
}

// Truncate returns the weights of a model with the first layers only, which shares all it has with
// the whole: a draft of the model, that needs no training of its own to say the same now and then.
func (w *Weights) Truncate(layers int) *Weights {
	short := *w
	short.Config.Layers, short.Layers = layers, w.Layers[:layers]
	return &short
}

// drawAdapters draws the adapters from a generator of their own: the model without them is the
// same, however many there are.
func (w *Weights) drawAdapters() {
	c := w.Config
	rng := rand.New(rand.NewPCG(c.Seed, 0x6c6f7261)) // "lora"
	update := func() LowRank {
		return LowRank{
			Down: drawMatrix(rng, loraRank, c.Width, 1/math.Sqrt(float64(c.Width))),
			Up:   drawMatrix(rng, loraRank, c.Width, 1),
		}
	}
	for range c.Adapters {
		for l := range w.Layers {
			w.Layers[l].Adapters = append(w.Layers[l].Adapters,
				Adapter{Q: update(), K: update(), V: update(), O: update()})
		}
	}
}

func drawMatrix(rng *rand.Rand, rows, cols int, scale float64) *mat.Dense {
	data := make([]float64, rows*cols)
	for i := range data {
		data[i] = scale * rng.NormFloat64()
	}
	return mat.NewDense(rows, cols, data)
}
