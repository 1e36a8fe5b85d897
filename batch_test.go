package fwd_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

func TestRelaxVectors(t *testing.T) {
	type vector struct {
		Batch vectorBatch `json:"batch"`
		Want  vectorBatch `json:"want"`
	}
	for _, v := range readVectors[vector](t, "relax.json", 8) {
		if got := v.Batch.descriptor().RelaxForMixedBatchGraphs(); got != v.Want.descriptor() {
			t.Errorf("%+v relaxed is %+v, want %+v", v.Batch.descriptor(), got, v.Want.descriptor())
		}
	}
}

func TestSplitUBatchesVectors(t *testing.T) {
	type slice struct {
		Request [2]int `json:"request"`
		Token   [2]int `json:"token"`
	}
	type vector struct {
		NumScheduledTokens []int   `json:"num_scheduled_tokens"`
		NumTokensPadded    int     `json:"num_tokens_padded"`
		NumReqsPadded      int     `json:"num_reqs_padded"`
		NumUBatches        int     `json:"num_ubatches"`
		SplitPoint         *int    `json:"split_point"`
		Want               []slice `json:"want"`
		WantPadded         []slice `json:"want_padded"`
	}
	convert := func(slices []slice) (u []fwd.UBatchSlice) {
		for _, s := range slices {
			u = append(u, fwd.UBatchSlice{
				Requests: fwd.Range{Start: s.Request[0], Stop: s.Request[1]},
				Tokens:   fwd.Range{Start: s.Token[0], Stop: s.Token[1]},
			})
		}
		return u
	}
	for i, v := range readVectors[vector](t, "ubatch_slices.json", 60) {
		split := 0
		if v.SplitPoint != nil {
			split = *v.SplitPoint
		}
		slices, padded, err := fwd.SplitUBatches(v.NumScheduledTokens, v.NumTokensPadded, v.NumReqsPadded, v.NumUBatches, split)
		if err != nil {
			t.Errorf("case %d: %v; want %v", i, err, v.Want)
			continue
		}
		if diff := cmp.Diff(convert(v.Want), slices); diff != "" {
			t.Errorf("case %d: slices (-want +got):\n%s", i, diff)
		}
		if diff := cmp.Diff(convert(v.WantPadded), padded); diff != "" {
			t.Errorf("case %d: padded (-want +got):\n%s", i, diff)
		}
	}
}

func TestLastUBatchEmptyVectors(t *testing.T) {
	type vector struct {
		Orig   int  `json:"orig"`
		Padded int  `json:"padded"`
		N      int  `json:"n"`
		Want   bool `json:"want"`
	}
	for _, v := range readVectors[vector](t, "last_ubatch_empty.json", 24) {
		if got := fwd.LastUBatchEmpty(v.Orig, v.Padded, v.N); got != v.Want {
			t.Errorf("%d tokens padded to %d in %d microbatches: last empty %t, want %t", v.Orig, v.Padded, v.N, got, v.Want)
		}
	}
}
