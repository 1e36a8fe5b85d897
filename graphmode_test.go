package fwd_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// vectorBatch is a descriptor as the vector files write it; a null num_reqs is any number.
type vectorBatch struct {
	NumTokens      int  `json:"num_tokens"`
	NumReqs        *int `json:"num_reqs"`
	Uniform        bool `json:"uniform"`
	HasLoRA        bool `json:"has_lora"`
	NumActiveLoRAs int  `json:"num_active_loras"`
}

func (b vectorBatch) descriptor() fwd.BatchDescriptor {
	d := fwd.BatchDescriptor{NumTokens: b.NumTokens, Uniform: b.Uniform, HasLoRA: b.HasLoRA, NumActiveLoRAs: b.NumActiveLoRAs}
	if b.NumReqs != nil {
		d.NumReqs = *b.NumReqs
	}
	return d
}

func TestGraphModeVectors(t *testing.T) {
	type vector struct {
		Mode            fwd.GraphMode          `json:"mode"`
		DecodeMode      fwd.GraphMode          `json:"decode_mode"`
		MixedMode       fwd.GraphMode          `json:"mixed_mode"`
		SeparateRoutine bool                   `json:"separate_routine"`
		MaxMode         fwd.GraphMode          `json:"max_mode"`
		HasFull         bool                   `json:"has_full"`
		HasPiecewise    bool                   `json:"has_piecewise"`
		RequiresPieces  bool                   `json:"requires_piecewise_compilation"`
		ValidRuntime    bool                   `json:"valid_runtime_mode"`
		HasMode         map[fwd.GraphMode]bool `json:"has_mode"`
	}
	for _, want := range readVectors[vector](t, "graph_modes.json", 5) {
		m := want.Mode
		got := vector{
			m, m.DecodeMode(), m.MixedMode(), m.SeparateRoutine(), m.MaxMode(), m.HasFullGraphs(), m.HasPiecewiseGraphs(),
			m.HasPiecewiseGraphs(), m.ValidRuntime(), map[fwd.GraphMode]bool{},
		}
		for _, r := range []fwd.GraphMode{fwd.GraphNone, fwd.GraphPiecewise, fwd.GraphFull} {
			got.HasMode[r] = m.HasMode(r)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", m, diff)
		}
	}
}

func TestDispatcherVectors(t *testing.T) {
	type vector struct {
		Mode           fwd.GraphMode `json:"mode"`
		CaptureSizes   []int         `json:"capture_sizes"`
		MaxNumSeqs     int           `json:"max_num_seqs"`
		QueryLen       int           `json:"uniform_decode_query_len"`
		MaxLoRAs       *int          `json:"max_loras"`
		SpecializeLoRA bool          `json:"specialize_lora"`
		SpecializeNum  bool          `json:"specialize_active_lora"`
		Calls          []struct {
			NumTokens      int           `json:"num_tokens"`
			UniformDecode  bool          `json:"uniform_decode"`
			NumActiveLoRAs int           `json:"num_active_loras"`
			DisableFull    bool          `json:"disable_full"`
			WantMode       fwd.GraphMode `json:"want_mode"`
			WantBatch      vectorBatch   `json:"want_batch"`
		} `json:"calls"`
		WantCaptures []struct {
			Mode       fwd.GraphMode `json:"mode"`
			TokensDesc []int         `json:"num_tokens_desc"`
			Keys       []vectorBatch `json:"keys"`
		} `json:"want_captures"`
	}
	for i, v := range readVectors[vector](t, "dispatcher.json", 24) {
		cfg := fwd.DispatcherConfig{Mode: v.Mode, CaptureSizes: v.CaptureSizes, MaxNumSeqs: v.MaxNumSeqs, UniformDecodeQueryLen: v.QueryLen}
		if v.MaxLoRAs != nil {
			cfg.LoRA = &fwd.LoRAConfig{MaxLoRAs: *v.MaxLoRAs, Unspecialized: !v.SpecializeLoRA, SpecializeCount: v.SpecializeNum}
		}
		d, err := fwd.NewDispatcher(cfg)
		if err != nil {
			t.Errorf("case %d: %v", i, err)
			continue
		}
		for _, call := range v.Calls {
			q := fwd.DispatchQuery{NumTokens: call.NumTokens, UniformDecode: call.UniformDecode, NumActiveLoRAs: call.NumActiveLoRAs, ExcludeFull: call.DisableFull}
			mode, batch, reason := d.Dispatch(q)
			if mode != call.WantMode || batch != call.WantBatch.descriptor() {
				t.Errorf("case %d, %+v: Dispatch(%+v) = %v, %+v (%v), want %v, %+v", i, cfg, q, mode, batch, reason, call.WantMode, call.WantBatch.descriptor())
			}
		}
		var want []fwd.Capture
		var wantTokens []int
		for _, c := range v.WantCaptures {
			wantTokens = append(wantTokens, c.TokensDesc...)
			for _, key := range c.Keys {
				want = append(want, fwd.Capture{Mode: c.Mode, Batch: key.descriptor()})
			}
		}
		got := d.Captures()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("case %d: captures (-want +got):\n%s", i, diff)
		}
		for k, c := range got {
			if c.Batch.NumTokens != wantTokens[k] {
				t.Errorf("case %d: capture %d has %d tokens, want %d", i, k, c.Batch.NumTokens, wantTokens[k])
			}
		}
	}
}
