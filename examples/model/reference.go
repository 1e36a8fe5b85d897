package model

import (
	"context"
	"math"

	"gonum.org/v1/gonum/mat"
)

// Generate computes the answer to one prompt alone, token by token, with plain loops: no batch, no
// pages, no ranks, no chunks and no forward context. It shares nothing with the layers but the
// weights, which is the point: if a served request differs from it, the serving is wrong. The
// request uses one adapter, or [NoAdapter]. It returns the greedily sampled tokens and the logits
// of the last one. It ends early with ctx's cause when ctx ends.
func Generate(
	ctx context.Context,
	w *Weights,
	adapter int,
	prompt []int,
	count int,
) (tokens []int, logits []float64, err error) {
	past := make([]referenceCache, len(w.Layers))
	for position := range len(prompt) + count - 1 {
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		token := 0
		if position < len(prompt) {
			token = prompt[position]
		} else {
			token = tokens[position-len(prompt)]
		}
		x := append([]float64(nil), w.Embedding.RawRowView(token)...)
		for l := range w.Layers {
			referenceLayer(w.Config, &w.Layers[l], adapter, &past[l], x)
		}
		if position < len(prompt)-1 {
			continue // nobody reads the scores within the prompt
		}
		logits = times(normed(x, w.FinalNorm), w.Head)
		best := 0
		for i, v := range logits {
			if v > logits[best] {
				best = i
			}
		}
		tokens = append(tokens, best)
	}
	return tokens, logits, nil
}

// referenceCache is the past of one layer: one key and one value per token so far.
type referenceCache struct{ keys, values [][]float64 }

// referenceLayer takes the token x, the one after those in past, through a layer in place.
func referenceLayer(c Config, w *LayerWeights, adapter int, past *referenceCache, x []float64) {
	in := normed(x, w.AttnNorm)
	position := len(past.keys)
	var a Adapter // without one, all updates are empty
	if adapter != NoAdapter {
		a = w.Adapters[adapter-1]
	}
	query := updated(in, w.Q, a.Q)
	key := updated(in, w.K, a.K)
	turn(query, c.Heads, position)
	turn(key, c.Heads, position)
	past.keys = append(past.keys, key)
	past.values = append(past.values, updated(in, w.V, a.V))

	attended := make([]float64, len(x))
	dim := len(x) / c.Heads
	for h := range c.Heads {
		scores := make([]float64, len(past.keys))
		total := 0.0
		for p, key := range past.keys {
			dot := 0.0
			for d := h * dim; d < (h+1)*dim; d++ {
				dot += query[d] * key[d]
			}
			scores[p] = dot / math.Sqrt(float64(dim))
		}
		top := math.Inf(-1)
		for _, s := range scores {
			top = max(top, s)
		}
		for p, s := range scores {
			scores[p] = math.Exp(s - top)
			total += scores[p]
		}
		for p, value := range past.values {
			for d := h * dim; d < (h+1)*dim; d++ {
				attended[d] += scores[p] / total * value[d]
			}
		}
	}
	for i, v := range updated(attended, w.O, a.O) {
		x[i] += v
	}

	in = normed(x, w.MoENorm)
	scores := times(in, w.Router)
	first, second := -1, -1
	for e, s := range scores {
		switch {
		case first < 0 || s > scores[first]:
			first, second = e, first
		case second < 0 || s > scores[second]:
			second = e
		}
	}
	share := 1 / (1 + math.Exp(scores[second]-scores[first]))
	best, next := expert(in, &w.Experts[first]), expert(in, &w.Experts[second])
	for i := range x {
		x[i] += share*best[i] + (1-share)*next[i]
	}
}

func expert(x []float64, w *ExpertWeights) []float64 {
	gate, up := times(x, w.Gate), times(x, w.Up)
	for i, g := range gate {
		gate[i] = g / (1 + math.Exp(-g)) * up[i]
	}
	return times(gate, w.Down)
}

func normed(x, weight []float64) []float64 {
	sum := 0.0
	for _, v := range x {
		sum += v * v
	}
	scale := 1 / math.Sqrt(sum/float64(len(x))+normEpsilon)
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = v * scale * weight[i]
	}
	return out
}

// turn applies rotary positions to one token's query or key.
func turn(x []float64, heads, position int) {
	dim := len(x) / heads
	for h := range heads {
		head := x[h*dim : (h+1)*dim]
		for i := range dim / 2 {
			angle := float64(position) * math.Pow(ropeBase, -2*float64(i)/float64(dim))
			a, b := head[i], head[i+dim/2]
			head[i] = a*math.Cos(angle) - b*math.Sin(angle)
			head[i+dim/2] = b*math.Cos(angle) + a*math.Sin(angle)
		}
	}
}

// updated returns x·w plus the update of x, if there is one.
func updated(x []float64, w *mat.Dense, update LowRank) []float64 {
	out := times(x, w)
	if update.Down == nil {
		return out
	}
	rank, _ := update.Down.Dims()
	for r := range rank {
		dot := 0.0
		for i, v := range x {
			dot += v * update.Down.At(r, i)
		}
		for j := range out {
			out[j] += dot * update.Up.At(r, j)
		}
	}
	return out
}

// times returns the row vector x·w.
func times(x []float64, w *mat.Dense) []float64 {
	_, cols := w.Dims()
	out := make([]float64, cols)
	for i, v := range x {
		for j, weight := range w.RawRowView(i) {
			out[j] += v * weight
		}
	}
	return out
}
