package main

// planningFaults are on the way from a schedule to a pass.
var planningFaults = []fault{
	{
		name: "mixed-is-decode", kind: planning, file: "batch.go",
		what: "a batch is uniform decode as soon as one of its requests is",
		old:  "uniform = uniform && n == q",
		new:  "uniform = uniform && reqs > 1 || n == q",
	},
	{
		name: "adapters-forgotten-by-plan", kind: planning, file: "batch.go",
		what: "the dispatcher is not told of the adapters",
		old:  "\t\tNumActiveLoRAs: v.NumActiveLoRAs, ExcludeFull: v.ExcludeFull,\n",
		new:  "\t\tExcludeFull: v.ExcludeFull,\n",
	},
	{
		name: "requests-forgotten-by-plan", kind: planning, file: "batch.go",
		what: "the dispatcher is not told of the requests",
		old:  "NumTokens: tokens, NumReqs: v.NumReqs, UniformDecode",
		new:  "NumTokens: tokens, UniformDecode",
	},
	{
		name: "empty-request-counts", kind: planning, file: "batch.go",
		what: "a request without tokens counts as one",
		old:  "\t\tif n > 0 {\n\t\t\treqs++\n\t\t\tuniform = uniform && n == q\n\t\t}\n",
		new:  "\t\treqs++\n\t\tuniform = uniform && (n == q || n == 0)\n",
	},
	{
		name: "empty-request-is-no-decode", kind: planning, file: "batch.go",
		what: "a decode batch with a request without tokens counts as mixed",
		old:  "\t\t\tuniform = uniform && n == q\n\t\t}\n",
		new:  "\t\t}\n\t\tuniform = uniform && n == q\n",
	},
	{
		name: "zeros-are-not-idle", kind: planning, file: "batch.go",
		what: "a rank whose requests have no tokens does not count as idle",
		old:  "uniform && !s.Prefill, reqs == 0\n",
		new:  "uniform && !s.Prefill, len(s.NumScheduledTokens) == 0\n",
	},
	{
		name: "prefill-ignored", kind: planning, file: "batch.go",
		what: "a prompt of the query length counts as uniform decode",
		old:  "v.Idle = uniform && !s.Prefill,",
		new:  "v.Idle = uniform,",
	},
	{
		name: "tokens-not-rounded", kind: planning, file: "batch.go",
		what: "the tokens of a pass are no multiple of TokenMultiple",
		old:  "tokens, _ := r.parallel.roundUp(v.NumTokens)",
		new:  "tokens := v.NumTokens",
	},
	{
		name: "rounding-voted", kind: planning, file: "batch.go",
		what: "a vote counts rounded tokens as scheduled",
		old:  "\tv.GraphMode, v.NumTokensPadded, d.reason = GraphNone,",
		new:  "\tv.NumTokens = tokens\n\tv.GraphMode, v.NumTokensPadded, d.reason = GraphNone,",
	},
	{
		name: "threshold-of-rounded-tokens", kind: planning, file: "batch.go",
		what: "rounded tokens count for the threshold of microbatches",
		old:  "sum >= threshold",
		new:  "ceilDiv(sum, r.parallel.TokenMultiple)*r.parallel.TokenMultiple >= threshold",
	},
	{
		name: "multiple-unchecked", kind: planning, file: "graphmode.go",
		what: "capture sizes that lose the multiple are accepted",
		old:  "if d.mode != GraphNone && n > 1 {",
		new:  "if d.mode != GraphNone && n > maxCount {",
	},
	{
		name: "note-not-voted", kind: planning, file: "batch.go",
		what: "the engine's own word does not reach the other ranks",
		old:  "= s.ExcludeFull, s.Eager, s.Note\n",
		new:  "= s.ExcludeFull, s.Eager, 0\n",
	},
	{
		name: "decode-is-mixed-phase", kind: planning, file: "batch.go",
		what: "the phase of a decode batch is not said",
		old:  "\tif d.vote.Uniform {\n\t\tpass.Phase = phaseDecode\n\t}\n",
		new:  "",
	},
	{
		name: "dummy-without-adapters", kind: planning, file: "graphmode.go",
		what: "the dummy batch has no adapter though all graphs have one",
		old:  "return min(d.loraCases[0], 1)",
		new:  "return min(d.loraCases[0], 0)",
	},
	{
		name: "dummy-without-request", kind: planning, file: "batch.go",
		what: "a dummy pass has no request",
		old:  "max(d.vote.NumReqs, toInt(d.vote.Idle))",
		new:  "d.vote.NumReqs",
	},
	{
		name: "dummy-above-the-others", kind: planning, file: "batch.go",
		what: "a dummy pass has more tokens without padding than with it",
		old:  "min(d.vote.NumTokens, tokens), //",
		new:  "d.vote.NumTokens, //",
	},
	{
		name: "unfit-agreement-followed", kind: planning, file: "batch.go",
		what: "an agreement that some rank can't follow is not refused",
		old:  "\tif err := r.checkFollow(a); err != nil {\n\t\treturn err\n\t}\n",
		new:  "",
	},
	{
		name: "unfit-agreement-refused-alone", kind: planning, file: "batch.go",
		what: "only the rank that can't follow an agreement refuses it",
		old:  "\tfor rank := range a.Votes {\n\t\ttokens",
		new: `	for rank := range a.Votes {
		if rank != r.parallel.DataParallelRank {
			continue
		}
		tokens`,
	},
	{
		name: "begin-shares-the-slice", kind: planning, file: "batch.go",
		what: "what the caller does to the schedule after Begin changes the pass",
		old:  "\te.draft.lengths = slices.Clone(e.draft.lengths)\n",
		new:  "",
	},
	{
		name: "second-begin-allowed", kind: planning, file: "fwd.go",
		what: "a second exchange may begin before the first has ended",
		old:  "\tif s.open == nil {\n\t\ts.open = e\n",
		new:  "\tif s.open != e {\n\t\ts.open = e\n",
	},
	{
		name: "begin-swallows-a-panic", kind: planning, file: "fwd.go",
		what: "a panic of the coordinator does not come out of Begin's wait",
		old:  "\tif p, ok := e.err.(*panicked); ok {\n\t\tpanic(p.value)\n\t}\n",
		new:  "",
	},
	{
		name: "reuse-of-own-schedule", kind: planning, file: "batch.go",
		what: "a further pass takes adapters and prompts from its schedule, not from the agreement",
		old:  "return r.finish(&own, &a,",
		new:  "return r.finish(d, &a,",
	},
	{
		name: "reuse-of-next-step", kind: planning, file: "batch.go",
		what: "a further pass says that it is of another step",
		old:  "Step: v.Step, NumTokens: v.NumTokens,",
		new:  "Step: v.Step + 1, NumTokens: v.NumTokens,",
	},
	{
		name: "reuse-of-all-tokens", kind: planning, file: "batch.go",
		what: "a further pass of one token per request counts tokens, not requests",
		old:  "\t\tw.NumTokens = v.NumReqs\n",
		new:  "\t\tw.NumTokens = v.NumTokens\n",
	},
	{
		name: "reuse-of-another-batch", kind: planning, file: "batch.go",
		what: "a further pass may have other tokens than the batch of its agreement",
		old:  "(d.vote.NumTokens != own.vote.NumTokens || d.vote.NumReqs != own.vote.NumReqs)",
		new:  "d.vote.NumTokens < 0",
	},
	{
		name: "reuse-exchanges", kind: planning, file: "batch.go",
		what: "a further pass exchanges votes again",
		old:  "\tif s.Reuse != nil || !r.parallel.coordinated() {\n\t\treturn",
		new:  "\tif s.Reuse != nil && len(s.Reuse.Votes) == 0 || !r.parallel.coordinated() {\n\t\treturn",
	},
	{
		name: "reuse-under-rank-0", kind: planning, file: "batch.go",
		what: "the span of a further pass hangs on that of rank 0, not on its caller's",
		old:  "Idle: v.Idle, Note: v.Note,\n\t}\n\tif v.Idle {",
		new:  "Idle: v.Idle, Note: v.Note, SpanContext: v.SpanContext,\n\t}\n\tif v.Idle {",
	},
	{
		name: "warm-up-not-marked", kind: planning, file: "batch.go",
		what: "the votes of warm-up look like those of serving",
		old:  "GraphMode: c.Mode, WarmUp: true,",
		new:  "GraphMode: c.Mode,",
	},
	{
		name: "warm-up-without-end", kind: planning, file: "batch.go",
		what: "the exchange after the last warm-up pass is missing",
		old:  "\t\tif !r.parallel.coordinated() {\n\t\t\treturn\n\t\t}\n\t\tif err := r.exchange",
		new:  "\t\tif r.parallel.DataParallelSize > 0 {\n\t\t\treturn\n\t\t}\n\t\tif err := r.exchange",
	},
	{
		name: "warm-up-goes-on", kind: planning, file: "batch.go",
		what: "warm-up goes on after an error, and the ranks lose step",
		old:  "if !yield(pass, err) || err != nil {",
		new:  "if !yield(pass, err) {",
	},
	{
		name: "size-of-coordinator-ignored", kind: planning, file: "fwd.go",
		what: "a Runner does not take rank and size from its coordinator",
		old:  "if coordinator != nil && c.DataParallelSize == 0 && c.DataParallelRank == 0 {",
		new:  "if coordinator != nil && c.DataParallelSize < 0 {",
	},
	{
		name: "new-graphs-at-step-0", kind: planning, file: "fwd.go",
		what: "a Runner with other graphs begins at the first step again",
		old:  "\tnext := *r\n",
		new:  "\tnext := *r\n\tnext.state = new(state)\n",
	},
	{
		name: "new-graphs-in-old-fingerprint", kind: planning, file: "fwd.go",
		what: "a Runner with other graphs votes as if it had the old ones",
		old:  "\tr.fingerprint = r.newFingerprint()\n",
		new:  "\tr.fingerprint = max(r.fingerprint, 1) | r.newFingerprint()*uint64(1-min(r.fingerprint, 1))\n",
	},
}
