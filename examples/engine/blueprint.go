package engine

import (
	"fmt"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
)

// blueprint is a model with what all ranks that run it have in common.
type blueprint struct {
	name  string
	model *model.Model
	// The dispatcher is the same for all ranks: they could not agree on graphs that only some of them have.
	dispatcher *fwd.Dispatcher
	parallel   fwd.ParallelConfig // but for the rank
}

// targetBlueprint returns that of the model which is served.
func (c *Config) targetBlueprint(m *model.Model) (*blueprint, error) {
	return c.blueprint("", m, fwd.ParallelConfig{
		DataParallelSize:       c.DataParallelSize,
		NumUBatches:            c.NumUBatches,
		DecodeUBatchThreshold:  c.DecodeUBatchThreshold,
		PrefillUBatchThreshold: c.PrefillUBatchThreshold,
	}, 1+c.NumSpeculativeTokens)
}

// blueprint returns a model's, with a dispatcher for decode batches of queryLen tokens a request. A full graph of such a
// batch has whole requests, so the default capture sizes are rounded up to them.
func (c *Config) blueprint(name string, m *model.Model, parallel fwd.ParallelConfig, queryLen int) (*blueprint, error) {
	dispatch := fwd.DispatcherConfig{
		Mode:                  c.GraphMode,
		CaptureSizes:          c.CaptureSizes,
		MaxNumSeqs:            c.MaxNumSeqs,
		UniformDecodeQueryLen: queryLen,
	}
	if dispatch.CaptureSizes == nil {
		var err error
		if dispatch.CaptureSizes, err = fwd.RoundCaptureSizes(fwd.DefaultCaptureSizes(maxCapture), queryLen); err != nil {
			return nil, fmt.Errorf("engine: NumSpeculativeTokens is %d: %w", queryLen-1, err)
		}
	}
	if n := m.Weights().Config.Adapters; n > 0 {
		dispatch.LoRA = &fwd.LoRAConfig{MaxLoRAs: n, SpecializeCount: true}
	}
	dispatcher, err := fwd.NewDispatcher(dispatch)
	if err != nil {
		return nil, fmt.Errorf("engine: %w", err)
	}
	return &blueprint{name: name, model: m, dispatcher: dispatcher, parallel: parallel}, nil
}

// draftLayers is how many of the model's layers its draft has.
const draftLayers = 1

// draftBlueprint returns the draft of a model: its first layers, under the same embedding and head. It takes one token of
// each sequence at a time.
func (c *Config) draftBlueprint(m *model.Model) (*blueprint, error) {
	return c.blueprint("draft", model.New(m.Weights().Truncate(draftLayers)), fwd.ParallelConfig{DataParallelSize: c.DataParallelSize}, 1)
}
