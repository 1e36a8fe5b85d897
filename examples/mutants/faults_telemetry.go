package main

// telemetryFaults get spans, metrics and records wrong.
var telemetryFaults = []fault{
	{
		name: "step-trace-under-caller", kind: telemetry, file: "logging.go",
		what: "the spans of a step hang on their callers, not on rank 0's exchange",
		old:  "return trace.ContextWithSpanContext(ctx, a.SpanContext), links",
		new:  "return ctx, links",
	},
	{
		name: "step-trace-of-last-rank", kind: telemetry, file: "dp.go",
		what: "the step hangs on the span of the last rank, which has none",
		old:  "SpanContext: votes[0].SpanContext,",
		new:  "SpanContext: votes[len(votes)-1].SpanContext,",
	},
	{
		name: "padding-kinds-swapped", kind: telemetry, file: "logging.go",
		what: "padding up to a graph is counted as padding across ranks and the other way round",
		old:  "range []string{\"graph\", \"dp\"} {",
		new:  "range []string{\"dp\", \"graph\"} {",
	},
	{
		name: "padding-all-graph", kind: telemetry, file: "logging.go",
		what: "all padding is put down to the graph",
		old:  "if n := rec.NumTokensGraph - rec.NumTokensUnpadded; n > 0 {",
		new:  "if n := rec.NumTokens - rec.NumTokensUnpadded; n > 0 {",
	},
	{
		name: "padded-tokens-measured", kind: telemetry, file: "logging.go",
		what: "the histogram of tokens counts padding",
		old:  "t.tokens.Record(ctx, int64(rec.NumTokensUnpadded),",
		new:  "t.tokens.Record(ctx, int64(rec.NumTokens),",
	},
	{
		name: "dummies-inverted", kind: telemetry, file: "logging.go",
		what: "the tokens of dummy passes count as served, and the others as dummy",
		old:  "GraphMode(mode).String()), keyDummy.Bool(dummy == 1))}",
		new:  "GraphMode(mode).String()), keyDummy.Bool(dummy == 0))}",
	},
	{
		name: "eager-passes-uncounted", kind: telemetry, file: "logging.go",
		what: "passes with graphs are counted as eager, those without are not",
		old:  "if rec.GraphMode == GraphNone {",
		new:  "if rec.GraphMode != GraphNone {",
	},
	{
		name: "bucket-of-padding", kind: telemetry, file: "logging.go",
		what: "passes with graphs go into the bucket of a power of two",
		old:  "planned := p.GraphMode != GraphNone && p.Reason != ReasonUnknown",
		new:  "planned := p.GraphMode != GraphNone && p.Reason == ReasonUnknown",
	},
	{
		name: "forward-span-open", kind: telemetry, file: "fwd.go",
		what: "the span of a pass is never ended",
		old:  "\tdefer t.span.End(t.span.options...)\n\terr = errPanic\n",
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
		name: "wait-from-the-vote-on", kind: telemetry, file: "fwd.go",
		what: "the time of an exchange is measured from its end",
		old:  "e.wait = max(e.began.until(ended), 0)",
		new:  "e.wait = max(ended.until(ended), 0)",
	},
	{
		name: "negative-wait", kind: telemetry, file: "fwd.go",
		what: "an exchange takes less than no time when the clock goes back",
		old:  "e.wait = max(e.began.until(ended), 0)",
		new:  "e.wait = e.began.until(ended)",
	},
	{
		name: "negative-duration", kind: telemetry, file: "logging.go",
		what: "a pass takes less than no time when the clock goes back",
		old:  "duration := max(run.began.until(ended), 0)",
		new:  "duration := run.began.until(ended)",
	},
	{
		name: "negative-report", kind: telemetry, file: "logging.go",
		what: "a reported pass that ends before it began takes less than no time",
		old:  "duration := max(ended.Sub(began), 0)",
		new:  "duration := ended.Sub(began)",
	},
	{
		name: "waits-not-added", kind: telemetry, file: "logging.go",
		what: "only the last wait of a pass counts",
		old:  "\tx.waited.Add(int64(d))\n",
		new:  "\tx.waited.Store(int64(d))\n",
	},
	{
		name: "own-rank-waited-for", kind: telemetry, file: "logging.go",
		what: "the rank that came last counts as waiting for itself",
		old:  "e.lastRank >= 0 && e.lastRank != t.parallel.DataParallelRank {",
		new:  "e.lastRank >= 0 {",
	},
	{
		name: "wait-kinds-swapped", kind: telemetry, file: "logging.go",
		what: "waits for votes count as waits inside passes and the other way round",
		old:  "\tif k.forward {\n\t\tkind = waitForward\n",
		new:  "\tif !k.forward {\n\t\tkind = waitForward\n",
	},
	{
		name: "queue-counts-twice", kind: telemetry, file: "logging.go",
		what: "the time that a pass waits for the device counts as its own",
		old:  "\tif q.used && began.until(q.last) > 0 {\n\t\tbegan = q.last\n\t}\n",
		new:  "",
	},
	{
		name: "observers-before-the-end", kind: telemetry, file: "fwd.go",
		what: "observers see a pass whose span is still open",
		old:  "\tdefer t.observe(x)\n\tdefer t.span.End(t.span.options...)\n\terr = errPanic\n",
		new:  "\tdefer t.span.End(t.span.options...)\n\tdefer t.observe(x)\n\terr = errPanic\n",
	},
	{
		name: "observers-miss-a-panic", kind: telemetry, file: "fwd.go",
		what: "observers do not see a pass that panicked",
		old:  "\tdefer t.observe(x)\n\tdefer t.span.End(t.span.options...)\n\terr = errPanic\n",
		new: `	defer func() {
		if t.record.Err != errPanic {
			t.observe(x)
		}
	}()
	defer t.span.End(t.span.options...)
	err = errPanic
`,
	},
	{
		name: "record-without-last-rank", kind: telemetry, file: "logging.go",
		what: "a record does not say whose vote came last",
		old:  "rec.Wait, rec.LastRank = p.plan.wait, p.plan.lastRank",
		new:  "rec.Wait = p.plan.wait",
	},
	{
		name: "records-out-of-order", kind: telemetry, file: "logging.go",
		what: "a full Recorder returns its records as they lie in the ring",
		old:  "return slices.Concat(r.records[r.next:], r.records[:r.next])",
		new:  "return slices.Clone(r.records)",
	},
	{
		name: "own-error-words-crowded-out", kind: telemetry, file: "logging.go",
		what: "error types of the callers take the places of the package's own",
		old:  "\tif ownErrorTypes[word] {\n\t\treturn word\n\t}\n",
		new:  "",
	},
	{
		name: "phases-without-bound", kind: telemetry, file: "logging.go",
		what: "every word of the callers becomes a phase of the metrics",
		old:  "return t.phases.bound(word)",
		new:  "return word",
	},
	{
		name: "one-idle-rank-at-most", kind: telemetry, file: "logging.go",
		what: "a span counts one idle rank though there are more",
		old:  "\t\t\tidle++\n",
		new:  "\t\t\tidle = 1\n",
	},
	{
		name: "padding-of-unpadded", kind: telemetry, file: "logging.go",
		what: "the ratio of padding is that to the tokens without padding",
		old:  "float64(max(p.NumTokens, 1))",
		new:  "float64(max(p.NumTokensUnpadded, 1))",
	},
}
