package model

import "gonum.org/v1/gonum/mat"

// loraRank is the rank of every adapter's updates.
const loraRank = 2

// Adapter is what one LoRA adapter changes in the attention of a layer (Hu et al., "LoRA", 2021):
// an update of low rank to each projection. One batch may hold rows of many adapters.
type Adapter struct{ Q, K, V, O LowRank }

// LowRank is the update x·Downᵀ·Up to a projection of x.
type LowRank struct{ Down, Up *mat.Dense } // rank × width

// projection is a weight matrix with the updates of all adapters, adapter a at index a-1.
type projection struct {
	weight  *mat.Dense
	updates []LowRank
}

// forward stores x·W in dst, and for each row of an adapter adds the adapter's update. No adapters:
// nil.
func (p *projection) forward(dst, x *mat.Dense, adapters []int) {
	dst.Mul(x, p.weight)
	for i, adapter := range adapters {
		if adapter != NoAdapter {
			p.updates[adapter-1].addTo(dst.RawRowView(i), x.RawRowView(i))
		}
	}
}

func (u LowRank) addTo(dst, x []float64) {
	for r := range loraRank {
		inner := 0.0
		for j, down := range u.Down.RawRowView(r) {
			inner += x[j] * down
		}
		for j, up := range u.Up.RawRowView(r) {
			dst[j] += inner * up
		}
	}
}
