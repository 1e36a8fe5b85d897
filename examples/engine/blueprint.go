package engine

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
)

// blueprint is a model with what all ranks that run it have in common.
type blueprint struct {
	name  string
	model *model.Model
	// The dispatcher is the same for all ranks: they could not agree on graphs that only some of them
	// have.
	dispatcher *fwd.Dispatcher
	config     fwd.DispatcherConfig // of the dispatcher
	parallel   fwd.ParallelConfig   // but for the rank
	ahead      int                  // how many positions its input tokens are ahead of their rows
}

// targetBlueprint returns the blueprint of the model that is served.
func (c *Config) targetBlueprint(m *model.Model) (*blueprint, error) {
	return c.blueprint("", m, fwd.ParallelConfig{
		DataParallelSize:       c.DataParallelSize,
		NumUBatches:            c.NumUBatches,
		DecodeUBatchThreshold:  c.DecodeUBatchThreshold,
		PrefillUBatchThreshold: c.PrefillUBatchThreshold,
	}, 1+c.NumSpeculativeTokens)
}

// blueprint returns a model's, with a dispatcher for decode batches of queryLen tokens a request.
func (c *Config) blueprint(name string, m *model.Model, parallel fwd.ParallelConfig,
	queryLen int) (*blueprint, error) {
	sizes, err := c.captureSizes(queryLen)
	if err != nil {
		return nil, fmt.Errorf("engine: NumSpeculativeTokens is %d: %w", c.NumSpeculativeTokens, err)
	}
	dispatch := fwd.DispatcherConfig{
		Mode:                  c.GraphMode,
		CaptureSizes:          sizes,
		MaxNumSeqs:            c.MaxNumSeqs,
		UniformDecodeQueryLen: queryLen,
	}
	if n := m.Weights().Config.Adapters; n > 0 {
		dispatch.LoRA = &fwd.LoRAConfig{MaxLoRAs: n, SpecializeCount: true}
	}
	dispatcher, err := fwd.NewDispatcher(dispatch)
	if err != nil {
		return nil, fmt.Errorf("engine: %w", err)
	}
	b := &blueprint{name: name, model: m, dispatcher: dispatcher, config: dispatch, parallel: parallel}
	c.printGaps(b)
	return b, nil
}

// captureSizes returns the sizes of a model's graphs. The default ones end with a decode batch of
// all the requests that a step may have, so that every decode batch has a full graph; after it come
// sizes for mixed batches, and for the target's decode batches in its draft. A full graph of a
// decode batch has whole requests, so the sizes are rounded up to those.
func (c *Config) captureSizes(queryLen int) ([]int, error) {
	if c.CaptureSizes != nil {
		return c.CaptureSizes, nil
	}
	decode := queryLen * c.MaxNumSeqs
	sizes := fwd.DefaultCaptureSizes(decode)
	for _, n := range fwd.DefaultCaptureSizes(max(maxCapture, (1+c.NumSpeculativeTokens)*c.MaxNumSeqs)) {
		if n > decode {
			sizes = append(sizes, n)
		}
	}
	return fwd.RoundCaptureSizes(sizes, queryLen)
}

// printGaps says which batches have no graph of the kind that the graph mode promises. Of several
// processes, which have the same, the first does.
func (c *Config) printGaps(b *blueprint) {
	if c.Logger == nil || c.Process != nil && !slices.Contains(c.Process.Ranks, 0) {
		return
	}
	for _, gap := range b.dispatcher.Gaps() {
		c.Logger.Warn("some batches don't run by the graphs that the mode promises; add capture sizes",
			"model", cmp.Or(b.name, "target"), "gap", gap.String())
	}
}

// draftLayers is how many of the model's layers its draft has.
const draftLayers = 1

// draftBlueprint returns the blueprint of a model's draft: the model's first layers, under the same
// embedding and head. It decodes one token of each sequence at a time.
func (c *Config) draftBlueprint(m *model.Model) (*blueprint, error) {
	draft := model.New(m.Weights().Truncate(draftLayers))
	b, err := c.blueprint("draft", draft, fwd.ParallelConfig{DataParallelSize: c.DataParallelSize}, 1)
	if err != nil {
		return nil, err
	}
	b.ahead = ahead
	return b, nil
}
