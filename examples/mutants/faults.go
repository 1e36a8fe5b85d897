package main

// faults are the changes, each of a single place. One that no program could notice is no fault: it does not belong here.
var faults = []fault{
	// Arithmetic on the token counts of all ranks.
	{
		name: "ceil-to-floor", kind: arithmetic, file: "dp.go",
		what: "the share of a worker is rounded down",
		old:  "\tif a%b != 0 {\n\t\tq++\n\t}\n",
		new:  "",
	},
	{
		name: "sp-major-sizes", kind: arithmetic, file: "dp.go",
		what: "local sizes come in SP-major order",
		old: `	for _, n := range m.tokens {
		dst = appendRepeated(dst, ceilDiv(n, sp), sp)
	}
`,
		new: `	for range sp {
		for _, n := range m.tokens {
			dst = append(dst, ceilDiv(n, sp))
		}
	}
`,
	},
	{
		name: "sp-major-chunks", kind: arithmetic, file: "dp.go",
		what: "the sizes of a chunk come in SP-major order",
		old: `	for _, n := range m.tokens {
		local, size := ceilDiv(n, sp), 1
		if idx <= local/maxChunk { // else maxChunk·idx is above local, and might overflow
			size = max(min(maxChunk, local-maxChunk*idx), 1)
		}
		dst = appendRepeated(dst, size, sp)
	}
`,
		new: `	for i := range m.numLocal(sp) {
		local := ceilDiv(m.tokens[i%len(m.tokens)], sp)
		dst = append(dst, max(min(maxChunk, local-maxChunk*idx), 1))
	}
`,
	},
	{
		name: "chunk-not-split", kind: arithmetic, file: "dp.go",
		what: "the sizes of a chunk are of the rank's rows, not of a worker's",
		old:  "local, size := ceilDiv(n, sp), 1",
		new:  "local, size := n, 1",
	},
	{
		name: "chunk-index-off-by-one", kind: arithmetic, file: "dp.go",
		what: "a round has the sizes of the next one",
		old:  "m.AppendChunkedSizes(nil, sp, maxChunk, i)), chunk)",
		new:  "m.AppendChunkedSizes(nil, sp, maxChunk, i+1)), chunk)",
	},
	{
		name: "finished-rank-sends-nothing", kind: arithmetic, file: "dp.go",
		what: "a rank that is done has size 0 in the rounds that are left",
		old: `		local, size := ceilDiv(n, sp), 1
		if idx <= local/maxChunk { // else maxChunk·idx is above local, and might overflow
			size = max(min(maxChunk, local-maxChunk*idx), 1)
		}
`,
		new: `		local, size := ceilDiv(n, sp), 0
		if idx <= local/maxChunk {
			size = max(min(maxChunk, local-maxChunk*idx), 0)
		}
`,
	},
	{
		name: "chunk-start-off-by-one", kind: arithmetic, file: "dp.go",
		what: "a round leaves out its first row",
		old:  "start := i * maxChunk",
		new:  "start := i*maxChunk + 1",
	},
	{
		name: "chunk-past-own-rows", kind: arithmetic, file: "dp.go",
		what: "the rows of a round are those of the largest rank",
		old:  "End: max(min(end, own), 1)",
		new:  "End: max(end, 1)",
	},
	{
		name: "lockstep-row-kept", kind: arithmetic, file: "dp.go",
		what: "a row that was sent only to keep step is kept",
		old:  "Keep: start < own}",
		new:  "Keep: true}",
	},
	{
		name: "kept-one-round-too-long", kind: arithmetic, file: "dp.go",
		what: "the round that starts where the rows end is kept",
		old:  "Keep: start < own}",
		new:  "Keep: start <= own}",
	},
	{
		name: "last-chunk-dropped", kind: arithmetic, file: "dp.go",
		what: "the number of rounds is rounded down",
		old:  "return ceilDiv(ceilDiv(m.max, sp), maxChunk)",
		new:  "return ceilDiv(m.max, sp) / maxChunk",
	},
	{
		name: "one-chunk-too-many", kind: arithmetic, file: "dp.go",
		what: "there is a round in which nobody has rows",
		old:  "return ceilDiv(ceilDiv(m.max, sp), maxChunk)",
		new:  "return ceilDiv(m.max, sp)/maxChunk + 1",
	},
	{
		name: "chunks-of-own-rows", kind: arithmetic, file: "dp.go",
		what: "a rank goes through as many rounds as its own rows need",
		old:  "return ceilDiv(ceilDiv(m.max, sp), maxChunk)",
		new:  "return ceilDiv(ceilDiv(m.tokens[m.rank], sp), maxChunk)",
	},
	{
		name: "chunks-of-whole-rank", kind: arithmetic, file: "dp.go",
		what: "the number of rounds is that of a rank with one worker",
		old:  "return ceilDiv(ceilDiv(m.max, sp), maxChunk)",
		new:  "return ceilDiv(m.max, maxChunk)",
	},
	{
		name: "max-is-last", kind: arithmetic, file: "dp.go",
		what: "the last rank's tokens pass for the most",
		old:  "m.max = max(m.max, int(v))",
		new:  "m.max = int(v)",
	},
	{
		name: "rank-forgotten", kind: arithmetic, file: "dp.go",
		what: "every rank counts its rows as rank 0",
		old:  "m := &DPMetadata{rank: p.DataParallelRank, tokens:",
		new:  "m := &DPMetadata{tokens:",
	},
	{
		name: "exclusive-sum", kind: arithmetic, file: "dp.go",
		what: "the running sum starts with zero and lacks its end",
		old:  "\t\t\tsum += local\n\t\t\traw[i] = sum\n",
		new:  "\t\t\traw[i] = sum\n\t\t\tsum += local\n",
	},
	{
		name: "sum-of-unrounded-shares", kind: arithmetic, file: "dp.go",
		what: "the running sum forgets padding rows",
		old:  "local := float64(ceilDiv(n, sp))",
		new:  "local := float64(n) / float64(sp)",
	},

	// What ranks agree on.
	{
		name: "mode-maximum", kind: coordination, file: "dp.go",
		what: "the agreed graph mode is the highest, not the lowest",
		old:  "if v.GraphMode < votes[lowest].GraphMode {",
		new:  "if v.GraphMode > votes[lowest].GraphMode {",
	},
	{
		name: "own-mode-kept", kind: coordination, file: "fwd.go",
		what: "a rank runs the mode that it voted for",
		old:  "r.applyGraph(&pass, query, mode, agreed.GraphMode)",
		new:  "r.applyGraph(&pass, query, mode, mode)",
	},
	{
		name: "padding-skipped-on-one-rank", kind: coordination, file: "dp.go",
		what: "rank 0 is not padded to the others",
		old:  "if a.UBatch || a.GraphMode != GraphNone {",
		new:  "if rank > 0 && (a.UBatch || a.GraphMode != GraphNone) {",
	},
	{
		name: "no-padding-for-graphs", kind: coordination, file: "dp.go",
		what: "ranks that run graphs are not padded to each other",
		old:  "if a.UBatch || a.GraphMode != GraphNone {",
		new:  "if a.UBatch {",
	},
	{
		name: "no-padding-for-microbatches", kind: coordination, file: "dp.go",
		what: "ranks that split without graphs are not padded to each other",
		old:  "if a.UBatch || a.GraphMode != GraphNone {",
		new:  "if a.GraphMode != GraphNone {",
	},
	{
		name: "padding-for-nothing", kind: coordination, file: "dp.go",
		what: "ranks are padded to each other though nothing needs it",
		old:  "if a.UBatch || a.GraphMode != GraphNone {",
		new:  "if maxPadded > 0 {",
	},
	{
		name: "last-maximum", kind: coordination, file: "dp.go",
		what: "the last of the ranks with the most tokens is named, not the first",
		old:  "if v.NumTokensPadded > votes[a.MaxTokensRank].NumTokensPadded {",
		new:  "if v.NumTokensPadded >= votes[a.MaxTokensRank].NumTokensPadded {",
	},
	{
		name: "last-lowest", kind: coordination, file: "dp.go",
		what: "the last of the ranks with the lowest mode is blamed, not the first",
		old:  "if v.GraphMode < votes[lowest].GraphMode {",
		new:  "if v.GraphMode <= votes[lowest].GraphMode {",
	},
	{
		name: "nobody-lowered-the-mode", kind: coordination, file: "fwd.go",
		what: "a pass whose mode another rank lowered keeps its own reason",
		old:  "\tif agreed < own {\n\t\tpass.Reason = ReasonDPRank\n\t}\n",
		new:  "",
	},
	{
		name: "tokens-of-rank-0", kind: coordination, file: "fwd.go",
		what: "every rank takes rank 0's count out of the agreement",
		old:  "pass.NumTokens = int(a.NumTokensAcrossDP.AtVec(r.parallel.DataParallelRank))",
		new:  "pass.NumTokens = int(a.NumTokensAcrossDP.AtVec(0))",
	},
	{
		name: "full-after-piecewise", kind: coordination, file: "fwd.go",
		what: "a rank looks up full graphs where piecewise ones are agreed",
		old:  "query.ExcludeFull = query.ExcludeFull || agreed < GraphFull",
		new:  "query.ExcludeFull = query.ExcludeFull || agreed < GraphPiecewise",
	},
	{
		name: "short-dummy", kind: coordination, file: "fwd.go",
		what: "the dummy pass of an idle rank has one token, whatever a decode request has",
		old:  "[]int{r.dispatcher.queryLen()}, 0",
		new:  "[]int{1}, 0",
	},
	{
		name: "dummy-not-marked", kind: coordination, file: "fwd.go",
		what: "the pass of an idle rank does not say that it is a dummy",
		old:  "\t\tDummy:             dummy,\n",
		new:  "",
	},
	{
		name: "votes-by-arrival", kind: coordination, file: "dp.go",
		what: "votes come in the order of arrival, not of ranks",
		old:  "votes[c.rank] = *v",
		new:  "votes[g.here] = *v",
	},
	{
		name: "step-stays", kind: coordination, file: "dp.go",
		what: "a Runner votes in the same step for ever",
		old:  "\tr.step.Store(step)\n",
		new:  "\tr.step.Store(min(step, 0))\n",
	},
	{
		name: "stale-vote-accepted", kind: coordination, file: "dp.go",
		what: "votes of an earlier step pass for those of this one",
		old:  "own.Step < v.Step || !own.same(v)",
		new:  "!own.same(v)",
	},
	{
		name: "lockstep-unchecked", kind: coordination, file: "dp.go",
		what: "votes of different steps make an agreement",
		old:  "\t\tif v.Step != first.Step {\n\t\t\treturn Agreement{}, lockstepError(votes)\n\t\t}\n",
		new:  "",
	},
	{
		name: "foreign-vote-accepted", kind: coordination, file: "dp.go",
		what: "a rank does not look for its own vote among those that it gets",
		old:  "own.Step < v.Step || !own.same(v)",
		new:  "own.Step < v.Step",
	},

	// Microbatches.
	{
		name: "metadata-swapped", kind: microbatch, file: "batch.go",
		what: "microbatches get each other's attention metadata",
		old:  "u.AttnMetadata = fc.AttnMetadata[i : i+1 : i+1]",
		new:  "u.AttnMetadata = fc.AttnMetadata[len(fc.UBatches)-1-i:][:1]",
	},
	{
		name: "slots-of-first", kind: microbatch, file: "batch.go",
		what: "all microbatches get the slot mapping of the first",
		old:  "u.SlotMapping = fc.SlotMapping[i : i+1 : i+1]",
		new:  "u.SlotMapping = fc.SlotMapping[:1:1]",
	},
	{
		name: "dp-metadata-left", kind: microbatch, file: "batch.go",
		what: "a microbatch has the token counts of the whole pass across ranks",
		old:  "u.DP = fc.DP.withEqual(tokens.Len())",
		new:  "u.DP = fc.DP",
	},
	{
		name: "tokens-left", kind: microbatch, file: "batch.go",
		what: "a microbatch has the token count of the whole pass",
		old:  "\tu.NumTokens = tokens.Len()\n",
		new:  "",
	},
	{
		name: "unpadded-left", kind: microbatch, file: "batch.go",
		what: "the unpadded tokens before a microbatch count as its own",
		old:  "max(fc.NumTokensUnpadded-tokens.Start, 0)",
		new:  "fc.NumTokensUnpadded",
	},
	{
		name: "graph-mode-left", kind: microbatch, file: "batch.go",
		what: "a microbatch runs in the graph mode of the pass",
		old:  "\tu.GraphMode = GraphNone\n",
		new:  "",
	},
	{
		name: "slices-left", kind: microbatch, file: "batch.go",
		what: "a microbatch counts as split itself",
		old:  "\tu.UBatches = nil\n",
		new:  "",
	},
	{
		name: "ubatch-index-zero", kind: microbatch, file: "batch.go",
		what: "every microbatch says that it is the first",
		old:  "fc: value, ubatch: i, ubatches:",
		new:  "fc: value, ubatches:",
	},
	{
		name: "ubatches-in-turn", kind: microbatch, file: "batch.go",
		what: "a microbatch waits until the one before it has returned",
		old:  "group.wg.Go(func() { group.run(i, func() error { return c.runUBatch(ctx, i, fn) }) })",
		new:  "group.run(i, func() error { return c.runUBatch(ctx, i, fn) })",
	},
	{
		name: "split-first-request", kind: microbatch, file: "batch.go",
		what: "a slice that begins with a request includes the one before",
		old:  "reqStart <= s.Tokens.Start",
		new:  "reqStart < s.Tokens.Start",
	},
	{
		name: "split-last-request", kind: microbatch, file: "batch.go",
		what: "a slice that ends with a request includes the one after",
		old:  "reqStart < s.Tokens.Stop",
		new:  "reqStart <= s.Tokens.Stop",
	},
	{
		name: "last-slice-unpadded", kind: microbatch, file: "batch.go",
		what: "the last slice ends with the scheduled tokens",
		old:  "padded[n-1].Requests.Stop, padded[n-1].Tokens.Stop = numReqsPadded, numTokensPadded",
		new:  "padded[n-1].Requests.Stop = numReqsPadded",
	},
	{
		name: "split-rounded-up", kind: microbatch, file: "batch.go",
		what: "microbatches are larger than agreed, and the last may have nothing",
		old:  "split = numTokensPadded / n",
		new:  "split = ceilDiv(numTokensPadded, n)",
	},
	{
		name: "empty-microbatch-allowed", kind: microbatch, file: "dp.go",
		what: "ranks split though one of them has nothing for the last microbatch",
		old:  "if a.UBatch && lastUBatchEmpty(minTokens, maxPadded, numUBatches) {",
		new:  "if a.UBatch && maxPadded < numUBatches {",
	},
	{
		name: "empty-at-border", kind: microbatch, file: "dp.go",
		what: "a last microbatch that begins where the tokens end does not count as empty",
		old:  "return padded/n*(n-1) >= tokens",
		new:  "return padded/n*(n-1) > tokens",
	},
	{
		name: "one-wish-is-enough", kind: microbatch, file: "dp.go",
		what: "ranks split when the last of them wants to",
		old:  "a.UBatch = a.UBatch && v.UBatch",
		new:  "a.UBatch = numUBatches > 1 && v.UBatch",
	},
	{
		name: "thresholds-swapped", kind: microbatch, file: "fwd.go",
		what: "the threshold of prefill applies to decode batches and the other way round",
		old:  "if q.UniformDecode {",
		new:  "if !q.UniformDecode {",
	},
	{
		name: "threshold-exclusive", kind: microbatch, file: "fwd.go",
		what: "a batch of as many tokens as the threshold is not split",
		old:  "q.NumTokens >= threshold",
		new:  "q.NumTokens > threshold",
	},

	// What model code finds in its context.
	{
		name: "outer-sizes-seen", kind: inContext, file: "fwd.go",
		what: "a nested pass sees the local sizes of the outer one",
		old:  "\tx.passContext = passContext{Context: ctx, fc: &x.value, run: x}\n",
		new: `	x.passContext = passContext{Context: ctx, fc: &x.value, run: x}
	if outer := lookup(ctx); outer != nil {
		x.sizes = outer.sizes
	}
`,
	},
	{
		name: "outer-microbatch-seen", kind: inContext, file: "fwd.go",
		what: "a nested pass is in the microbatch of the outer one",
		old:  "\tx.passContext = passContext{Context: ctx, fc: &x.value, run: x}\n",
		new: `	x.passContext = passContext{Context: ctx, fc: &x.value, run: x}
	if outer := lookup(ctx); outer != nil {
		x.ubatch, x.ubatches = outer.ubatch, outer.ubatches
	}
`,
	},
	{
		name: "outer-pass-found", kind: inContext, file: "fwd.go",
		what: "a context derived in a nested pass or a microbatch finds the outermost pass",
		old:  "\tif _, ok := key.(contextKey); ok {\n\t\treturn c\n",
		new: `	if _, ok := key.(contextKey); ok {
		if outer := c.Context.Value(key); outer != nil {
			return outer
		}
		return c
`,
	},
	{
		name: "context-late", kind: inContext, file: "fwd.go",
		what: "the forward context is installed after the forward function has started",
		old:  "\tif handler := x.runner.handler; handler != nil {\n",
		new:  "\tx.fc = nil\n\tdefer func() { x.fc = &x.value }()\n\tif handler := x.runner.handler; handler != nil {\n",
	},
	{
		name: "sizes-leak", kind: inContext, file: "dp.go",
		what: "local sizes change the context that they were derived from",
		old:  "\tderived.Context, derived.sizes = ctx, sizes\n",
		new:  "\tderived.Context, derived.sizes, c.sizes = ctx, sizes, sizes\n",
	},
	{
		name: "token-mismatch-accepted", kind: inContext, file: "dp.go",
		what: "a rank's count across ranks may differ from the tokens of its pass",
		old:  "own != float64(numTokens) {",
		new:  "own < float64(numTokens) {",
	},
	{
		name: "unpadded-is-padded", kind: inContext, file: "fwd.go",
		what: "padding counts as tokens of requests",
		old:  "NumTokensUnpadded: p.NumTokensUnpadded,\n\t\tVirtualEngine:",
		new:  "NumTokensUnpadded: p.NumTokens,\n\t\tVirtualEngine:",
	},
	{
		name: "agreed-pass-cancelled", kind: inContext, file: "fwd.go",
		what: "a pass that the other ranks count on does not run once its context has ended",
		old:  "\tx, err := r.begin(ctx, &p)\n\tif err != nil {\n\t\treturn err\n\t}\n\tx.forward = forward\n",
		new:  "\tx, err := r.begin(ctx, &p)\n\tif err == nil {\n\t\terr = ctx.Err()\n\t}\n\tif err != nil {\n\t\treturn err\n\t}\n\tx.forward = forward\n",
	},

	// Which graph serves a batch, and the cache.
	{
		name: "relaxed-where-exact", kind: graph, file: "graphmode.go",
		what: "a decode batch gets a graph for any batch though its own exists",
		old:  "\tcase full && !q.ExcludeFull && exact:\n",
		new:  "\tcase full && !q.ExcludeFull && exact && d.mixed == GraphNone:\n",
	},
	{
		name: "mixed-is-decode", kind: graph, file: "fwd.go",
		what: "a batch is uniform decode as soon as one of its requests is",
		old:  "UniformDecode:  !slices.ContainsFunc(s.NumScheduledTokens, func(n int) bool { return n != q }),",
		new:  "UniformDecode:  slices.Contains(s.NumScheduledTokens, q),",
	},
	{
		name: "no-adapters-in-descriptor", kind: graph, file: "graphmode.go",
		what: "the descriptor of a batch with adapters does not say so",
		old:  "\tkey := BatchDescriptor{NumTokens: padded, HasLoRA: loras > 0, NumActiveLoRAs: loras}\n",
		new:  "\tkey := BatchDescriptor{NumTokens: padded, HasLoRA: loras < 0}\n",
	},
	{
		name: "adapters-forgotten-by-plan", kind: graph, file: "fwd.go",
		what: "the dispatcher is not told of the adapters",
		old:  "\t\tNumActiveLoRAs: s.NumActiveLoRAs,\n",
		new:  "",
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
		name: "captures-without-adapters", kind: graph, file: "graphmode.go",
		what: "warm-up captures the graphs for the first number of adapters alone",
		old:  "for _, loras := range d.loraCases {",
		new:  "for _, loras := range d.loraCases[:1] {",
	},
	{
		name: "late-capture", kind: graph, file: "graphmode.go",
		what: "an unknown key is captured after warm-up",
		old:  "if !ok && c.closed {",
		new:  "if !ok && c.closed && ctx.Err() != nil {",
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
		old:  "pass.fc.GraphMode != c.mode || len(pass.fc.UBatches) > 0 {",
		new:  "pass.fc.GraphMode != c.mode {",
	},
	{
		name: "capture-not-replayed", kind: graph, file: "graphmode.go",
		what: "the pass that captures a graph has no result",
		old:  "\t\tif graph, err = c.captured(ctx, pass, key); err != nil {\n\t\t\treturn err\n\t\t}\n",
		new:  "\t\tgraph, err = c.captured(ctx, pass, key)\n\t\treturn err\n",
	},

	// Spans and metrics.
	{
		name: "step-trace-under-caller", kind: telemetry, file: "logging.go",
		what: "the spans of a step hang on their callers, not on rank 0's exchange",
		old:  "return trace.ContextWithSpanContext(ctx, a.SpanContext), links",
		new:  "return ctx, links",
	},
	{
		name: "step-trace-of-last-rank", kind: telemetry, file: "dp.go",
		what: "the step hangs on the span of the last rank, which has none",
		old:  "LowestModeRank: -1, SpanContext: first.SpanContext}",
		new:  "LowestModeRank: -1, SpanContext: votes[len(votes)-1].SpanContext}",
	},
	{
		name: "padding-kinds-swapped", kind: telemetry, file: "logging.go",
		what: "padding up to a graph is counted as padding across ranks and the other way round",
		old:  "t.paddingGraph, t.paddingDP = addOptions",
		new:  "t.paddingDP, t.paddingGraph = addOptions",
	},
	{
		name: "padding-all-graph", kind: telemetry, file: "logging.go",
		what: "all padding is put down to the graph",
		old:  "int64(p.NumTokensGraph - p.NumTokensUnpadded)",
		new:  "int64(p.NumTokens - p.NumTokensUnpadded)",
	},
	{
		name: "padded-tokens-measured", kind: telemetry, file: "logging.go",
		what: "the histogram of tokens counts padding",
		old:  "unpadded:     int64(p.NumTokensUnpadded),",
		new:  "unpadded:     int64(p.NumTokens),",
	},
	{
		name: "dummies-inverted", kind: telemetry, file: "logging.go",
		what: "the tokens of dummy passes count as served, and the others as dummy",
		old:  "keyDummy.Bool(dummy == 1)",
		new:  "keyDummy.Bool(dummy == 0)",
	},
	{
		name: "eager-passes-uncounted", kind: telemetry, file: "logging.go",
		what: "passes with graphs are counted as eager, those without are not",
		old:  "if m.key.mode == GraphNone {",
		new:  "if m.key.mode != GraphNone {",
	},
	{
		name: "bucket-of-padding", kind: telemetry, file: "logging.go",
		what: "passes with graphs go into the bucket of a power of two",
		old:  "if p.GraphMode != GraphNone && p.Reason != ReasonUnknown && r.dispatcher != nil {",
		new:  "if p.GraphMode != GraphNone && p.Reason == ReasonUnknown && r.dispatcher != nil {",
	},
	{
		name: "forward-span-open", kind: telemetry, file: "fwd.go",
		what: "the span of a pass is never ended",
		old:  "\tdefer x.span.End(x.span.options...) // directly, so that the SDK notes a panic\n\terr = errPanic\n",
		new:  "\terr = errPanic\n",
	},
	{
		name: "ubatch-spans-alike", kind: telemetry, file: "logging.go",
		what: "the span of a microbatch says that it is the first",
		old:  "keyUBatchIndex.Int(i)",
		new:  "keyUBatchIndex.Int(0)",
	},
	{
		name: "failure-not-shown", kind: telemetry, file: "logging.go",
		what: "the span of a failed pass looks like the others",
		old:  "if err != nil && s.IsRecording() {",
		new:  "if err == errPanic && s.IsRecording() {",
	},
	{
		name: "wait-from-the-vote-on", kind: telemetry, file: "logging.go",
		what: "the time of an exchange is measured from its end",
		old:  "s.t.record(ctx, s.t.coordinate, s.began, ended,",
		new:  "s.t.record(ctx, s.t.coordinate, s.t.now(), ended,",
	},
}
