package main

// microbatchFaults split a pass wrongly, or get wrong what its parts see.
var microbatchFaults = []fault{
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
		old:  "\t\tu.DP = &g.dp[i]\n",
		new:  "\t\tu.DP = fc.DP\n",
	},
	{
		name: "tokens-left", kind: microbatch, file: "batch.go",
		what: "a microbatch has the token count of the whole pass",
		old:  "\tu.NumTokens = part.NumTokens()\n",
		new:  "",
	},
	{
		name: "unpadded-left", kind: microbatch, file: "batch.go",
		what: "the unpadded tokens before a microbatch count as its own",
		old:  "max(fc.NumTokensUnpadded-part.Tokens.Start, 0)",
		new:  "fc.NumTokensUnpadded",
	},
	{
		name: "graph-mode-left", kind: inContext, file: "batch.go",
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
		name: "part-left", kind: inContext, file: "batch.go",
		what: "a microbatch says that it covers the whole pass",
		old:  "\tu.Part = part\n",
		new:  "",
	},
	{
		name: "ubatch-index-zero", kind: microbatch, file: "batch.go",
		what: "every microbatch says that it is the first",
		old:  "ubatch: uint16(i), ubatches:",
		new:  "ubatches:",
	},
	{
		name: "ubatches-in-turn", kind: microbatch, file: "batch.go",
		what: "a microbatch waits until the one before it has returned",
		old:  "\t\tgo g.run(i)\n",
		new:  "\t\tg.run(i)\n",
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
		old:  "point := pass.NumTokens / n / r.parallel.TokenMultiple * r.parallel.TokenMultiple",
		new:  "point := ceilDiv(pass.NumTokens, n*r.parallel.TokenMultiple) * r.parallel.TokenMultiple",
	},
	{
		name: "default-split-rounded-up", kind: planning, file: "batch.go",
		what: "the default split point is rounded up",
		old:  "split = numTokensPadded / n",
		new:  "split = ceilDiv(numTokensPadded, n)",
	},
	{
		name: "split-not-at-a-multiple", kind: planning, file: "batch.go",
		what: "a pass is split at a token that is no multiple of TokenMultiple",
		old:  "point := pass.NumTokens / n / r.parallel.TokenMultiple * r.parallel.TokenMultiple",
		new:  "point := pass.NumTokens / n",
	},
	{
		name: "split-too-small", kind: planning, file: "batch.go",
		what: "a pass with fewer tokens than one multiple each is split",
		old:  "a.UBatch && tokens >= n*r.parallel.TokenMultiple {",
		new:  "a.UBatch && tokens >= n {",
	},
	{
		name: "split-with-empty-requests", kind: planning, file: "batch.go",
		what: "the slices of a pass count requests without tokens",
		old:  "slices.DeleteFunc(slices.Clone(d.lengths), func(n int) bool { return n == 0 })",
		new:  "slices.Clone(d.lengths)",
	},
	{
		name: "dummy-not-split", kind: planning, file: "batch.go",
		what: "an idle rank can't split its dummy pass as the others do",
		old:  "\tif pass.Dummy {\n\t\tlengths = []int{pass.NumTokens}\n\t}\n",
		new:  "",
	},
	{
		name: "split-keeps-mode", kind: planning, file: "batch.go",
		what: "a planned pass that is split keeps its graph mode",
		old: `	if pass.GraphMode != GraphNone {
		pass.GraphMode, pass.Reason = GraphNone, ReasonUBatch
	}
`,
		new: "",
	},
	{
		name: "split-by-hand-keeps-mode", kind: planning, file: "fwd.go",
		what: "a pass that was split by hand keeps its graph mode",
		old:  "\tif len(p.UBatches) > 0 {\n\t\tp.GraphMode, p.Reason = GraphNone, ReasonUBatch\n\t}\n",
		new:  "",
	},
	{
		name: "split-loses-descriptor", kind: planning, file: "batch.go",
		what: "a pass that is split has no descriptor",
		old:  "\t\tpass.GraphMode, pass.Reason = GraphNone, ReasonUBatch\n",
		new:  "\t\tpass.GraphMode, pass.Reason, pass.Batch = GraphNone, ReasonUBatch, BatchDescriptor{}\n",
	},
	{
		name: "empty-microbatch-allowed", kind: microbatch, file: "dp.go",
		what: "ranks split though one of them has nothing for the last microbatch",
		old:  "!lastUBatchEmpty(minTokens, maxPadded, numUBatches)",
		new:  "maxPadded >= numUBatches",
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
		name: "thresholds-swapped", kind: microbatch, file: "batch.go",
		what: "the threshold of prefill applies to decode batches and the other way round",
		old:  "\tif v.Uniform {\n\t\tthreshold",
		new:  "\tif !v.Uniform {\n\t\tthreshold",
	},
	{
		name: "threshold-exclusive", kind: microbatch, file: "batch.go",
		what: "a batch of as many tokens as the threshold is not split",
		old:  "sum >= threshold",
		new:  "sum > threshold",
	},
}
