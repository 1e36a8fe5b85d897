package fwd_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// vec returns a vector of counts.
func vec(counts ...int) *mat.VecDense {
	v := mat.NewVecDense(len(counts), nil)
	for i, n := range counts {
		v.SetVec(i, float64(n))
	}
	return v
}

// counts returns the elements of a vector of whole numbers.
func counts(v *mat.VecDense) []int {
	c := make([]int, v.Len())
	for i := range c {
		c[i] = int(v.AtVec(i))
	}
	return c
}

func TestDPMetadataVectors(t *testing.T) {
	type vector struct {
		Tokens     []int `json:"num_tokens_across_dp"`
		SP         int   `json:"sp_size"`
		MaxChunk   int   `json:"max_chunk_size_per_rank"`
		ChunkIndex int   `json:"chunk_idx"`
		WantMax    int   `json:"want_max_tokens_across_dp"`
		WantLocal  []int `json:"want_sp_local_sizes"`
		WantChunk  []int `json:"want_chunked_sizes"`
		WantCu     []int `json:"want_cu_tokens_across_sp"`
	}
	for i, v := range readVectors[vector](t, "dp_metadata.json", 60) {
		m, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: len(v.Tokens)}, v.Tokens[0], vec(v.Tokens...))
		if err != nil {
			t.Errorf("case %d: %v", i, err)
			continue
		}
		got := vector{
			counts(m.NumTokensAcrossDPTo(nil)), v.SP, v.MaxChunk, v.ChunkIndex, m.MaxTokensAcrossDP(),
			m.AppendSPLocalSizes(nil, v.SP), m.AppendChunkedSizes(nil, v.SP, v.MaxChunk, v.ChunkIndex), counts(m.CuTokensAcrossSPTo(nil, v.SP)),
		}
		if diff := cmp.Diff(v, got); diff != "" {
			t.Errorf("case %d (-want +got):\n%s", i, diff)
		}
	}
}

func TestAgreeVectors(t *testing.T) {
	type vector struct {
		NumUBatches int `json:"num_ubatches"`
		Ranks       []struct {
			Unpadded     int           `json:"num_tokens_unpadded"`
			Padded       int           `json:"num_tokens_padded"`
			ShouldUBatch bool          `json:"should_ubatch"`
			GraphMode    fwd.GraphMode `json:"graph_mode"`
		} `json:"ranks"`
		WantUBatch bool          `json:"want_should_ubatch"`
		WantTokens []int         `json:"want_num_tokens_across_dp"`
		WantMode   fwd.GraphMode `json:"want_graph_mode"`
	}
	for i, v := range readVectors[vector](t, "coordinate.json", 60) {
		var votes []fwd.Vote
		for _, r := range v.Ranks {
			votes = append(votes, fwd.Vote{Step: 7, NumTokens: r.Unpadded, NumTokensPadded: r.Padded, UBatch: r.ShouldUBatch, GraphMode: r.GraphMode})
		}
		a, err := fwd.Agree(votes, v.NumUBatches)
		if err != nil {
			t.Errorf("case %d: %v", i, err)
			continue
		}
		if a.UBatch != v.WantUBatch || a.GraphMode != v.WantMode || a.Step != 7 {
			t.Errorf("case %d: agreed on %+v, want microbatches %t, %v, step 7", i, a, v.WantUBatch, v.WantMode)
		}
		if diff := cmp.Diff(v.WantTokens, counts(a.NumTokensAcrossDP)); diff != "" {
			t.Errorf("case %d: tokens (-want +got):\n%s", i, diff)
		}
	}
}
