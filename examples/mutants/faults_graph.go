package main

// graphFaults get wrong which graph serves a batch, or how the cache captures and replays it.
var graphFaults = []fault{
	{
		name: "relaxed-where-exact", kind: graph, file: "graphmode.go",
		what: "a decode batch gets a graph for any batch though its own exists",
		old:  "\tcase full && !q.ExcludeFull && exact:\n",
		new:  "\tcase full && !q.ExcludeFull && exact && d.mixed == GraphNone:\n",
	},
	{
		name: "no-adapters-in-descriptor", kind: graph, file: "graphmode.go",
		what: "the descriptor of a batch with adapters does not say so",
		old:  "\tkey := BatchDescriptor{NumTokens: padded, HasLoRA: loras > 0, NumActiveLoRAs: loras}\n",
		new:  "\tkey := BatchDescriptor{NumTokens: padded, HasLoRA: loras < 0}\n",
	},
	{
		name: "next-capture-size", kind: graph, file: "graphmode.go",
		what: "a batch of exactly a capture size is padded to the next one",
		old:  "for len(d.padded) <= min(size, maxPadded) {",
		new:  "for len(d.padded) < min(size, maxPadded) {",
	},
	{
		name: "requests-of-one-token", kind: graph, file: "graphmode.go",
		what: "the key of a decode batch counts its tokens as requests",
		old:  "key.NumReqs, key.Uniform = padded/d.q, true",
		new:  "key.NumReqs, key.Uniform = padded, true",
	},
	{
		name: "full-not-excluded", kind: graph, file: "graphmode.go",
		what: "a mixed batch gets a full graph that it can't use",
		old:  "\tcase full && !q.ExcludeFull:\n",
		new:  "\tcase full:\n",
	},
	{
		name: "too-many-requests-in-full", kind: graph, file: "graphmode.go",
		what: "more requests than MaxNumSeqs get a full graph, which has no room for them",
		old:  "if !q.ExcludeFull && q.NumReqs > d.maxSeqs {",
		new:  "if !q.ExcludeFull && q.NumReqs > maxCount {",
	},
	{
		name: "room-for-one-less", kind: graph, file: "graphmode.go",
		what: "a batch of MaxNumSeqs requests gets no full graph",
		old:  "if !q.ExcludeFull && q.NumReqs > d.maxSeqs {",
		new:  "if !q.ExcludeFull && q.NumReqs >= d.maxSeqs {",
	},
	{
		name: "too-many-requests-excluded", kind: graph, file: "graphmode.go",
		what: "a batch with too many requests for a full graph does not say so",
		old:  "q.ExcludeFull, excluded = true, ReasonTooLarge",
		new:  "q.ExcludeFull, excluded = true, ReasonFullExcluded",
	},
	{
		name: "too-many-adapters-in-graph", kind: graph, file: "graphmode.go",
		what: "one adapter more than MaxLoRAs gets a graph",
		old:  "if k > d.lora.MaxLoRAs { //",
		new:  "if k > d.lora.MaxLoRAs+1 { //",
	},
	{
		name: "most-adapters-refused", kind: graph, file: "graphmode.go",
		what: "a batch with MaxLoRAs adapters gets no graph",
		old:  "if k > d.lora.MaxLoRAs { //",
		new:  "if k >= d.lora.MaxLoRAs { //",
	},
	{
		name: "captures-without-adapters", kind: graph, file: "graphmode.go",
		what: "warm-up captures the graphs for the first number of adapters alone",
		old:  "for _, loras := range d.loraCases {",
		new:  "for _, loras := range d.loraCases[:1] {",
	},
	{
		name: "gap-one-too-short", kind: graph, file: "graphmode.go",
		what: "a gap leaves out its last token count",
		old:  "gap := Gap{Range{next, last + 1}, decode, mode, reason}",
		new:  "gap := Gap{Range{next, last}, decode, mode, reason}",
	},
	{
		name: "last-gap-missed", kind: graph, file: "graphmode.go",
		what: "nobody looks for gaps above the largest capture size",
		old:  "range append(slices.Clone(d.sizes), largest) {",
		new:  "range d.sizes {",
	},
	{
		name: "gap-from-no-batch", kind: graph, file: "graphmode.go",
		what: "a gap of decode batches begins with a token count that none can have",
		old:  "\t\tnext = last + step\n",
		new:  "\t\tnext = last + 1\n",
	},
	{
		name: "decode-gaps-missed", kind: graph, file: "graphmode.go",
		what: "decode batches are held to what the mode promises mixed ones",
		old:  "\t\tpromised = d.mode.DecodeMode()\n",
		new:  "\t\tpromised = d.mixed\n",
	},
	{
		name: "default-sizes-without-max", kind: graph, file: "graphmode.go",
		what: "the default capture sizes may end below the largest batch",
		old:  "\tif max >= 1 {\n\t\tsizes = append(sizes, max)\n\t}\n",
		new:  "",
	},
	{
		name: "late-capture", kind: graph, file: "graphmode.go",
		what: "an unknown key is captured after warm-up",
		old:  "\tif c.closed {\n",
		new:  "\tif c.closed && within != nil {\n",
	},
	{
		name: "graph-of-other-mode", kind: graph, file: "graphmode.go",
		what: "a cache replays passes of any mode",
		old:  "pass.fc.GraphMode != c.mode ||",
		new:  "pass.fc.GraphMode == GraphNone ||",
	},
	{
		name: "split-pass-replayed", kind: graph, file: "graphmode.go",
		what: "a cache replays passes that are split into microbatches",
		old:  " || len(pass.fc.UBatches) > 0 || ",
		new:  " || ",
	},
	{
		name: "eager-pass-replayed", kind: graph, file: "graphmode.go",
		what: "a cache replays passes that ask for the model's eager code",
		old:  " || pass.fc.SkipCompiled {",
		new:  " {",
	},
	{
		name: "capture-not-replayed", kind: graph, file: "graphmode.go",
		what: "the pass that captures a graph has no result",
		old:  "\t\tif g, err = c.captured(ctx, pass, key); err != nil {\n\t\t\treturn err\n\t\t}\n",
		new:  "\t\tg, err = c.captured(ctx, pass, key)\n\t\treturn err\n",
	},
	{
		name: "unfit-key-captured", kind: graph, file: "graphmode.go",
		what: "a graph is captured for a descriptor that disagrees with itself",
		old:  "if key.check(&bad); len(bad) > 0 {",
		new:  "if key.check(&bad); len(bad) > 16 {",
	},
	{
		name: "own-capture-awaited", kind: graph, file: "graphmode.go",
		what: "a capture that asks for the key that it captures waits for itself",
		old:  "\t\t\tif outer == flight {\n",
		new:  "\t\t\tif outer == flight && ctx.Err() != nil {\n",
	},
	{
		name: "replays-overlap", kind: graph, file: "graphmode.go",
		what: "passes replay the same graph concurrently, though they share its buffers",
		old:  "turn: make(chan struct{}, 1)}",
		new:  "turn: make(chan struct{}, 100)}",
	},
	{
		name: "turn-kept-after-a-panic", kind: graph, file: "graphmode.go",
		what: "nobody replays a graph again after a panic in it",
		old:  "\tdefer g.giveBack()\n\tpass.traced().event(ctx, eventReplay)\n\treturn g.replay(ctx)\n",
		new: `	pass.traced().event(ctx, eventReplay)
	err := g.replay(ctx)
	g.giveBack()
	return err
`,
	},
	{
		name: "ended-pass-not-replayed", kind: graph, file: "graphmode.go",
		what: "a pass whose context has ended does not replay even if it need not wait",
		old:  "func (g *graph) take(ctx context.Context) error {\n",
		new: `func (g *graph) take(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
`,
	},
}
