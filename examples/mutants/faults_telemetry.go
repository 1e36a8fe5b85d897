package main

// telemetryFaults get spans, metrics and records wrong.
var telemetryFaults = []fault{
	{
		name: "step-trace-under-caller", kind: telemetry, file: "logging.go",
		what: "the spans of a step are under their callers, not under the step",
		old:  "return trace.ContextWithSpanContext(ctx, step), links",
		new:  "return ctx, links",
	},
	{
		name: "step-trace-of-last-rank", kind: telemetry, file: "dp.go",
		what: "the step is under the span of the last rank, which has none",
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
		old:  "if n := x.graph - x.unpadded; n > 0 {",
		new:  "if n := x.tokens - x.unpadded; n > 0 {",
	},
	{
		name: "padded-tokens-measured", kind: telemetry, file: "logging.go",
		what: "the histogram of tokens counts padding",
		old:  "t.tokens.Record(ctx, int64(x.unpadded),",
		new:  "t.tokens.Record(ctx, int64(x.tokens),",
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
		old:  "if x.mode == GraphNone {",
		new:  "if x.mode != GraphNone {",
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
		old:  "\tdefer t.span.End(t.span.endOptions()...)\n\terr = errPanic\n",
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
		old:  "\tdefer t.observe(x)\n\tdefer t.span.End(t.span.endOptions()...)\n\terr = errPanic\n",
		new:  "\tdefer t.span.End(t.span.endOptions()...)\n\tdefer t.observe(x)\n\terr = errPanic\n",
	},
	{
		name: "observers-miss-a-panic", kind: telemetry, file: "fwd.go",
		what: "observers do not see a pass that panicked",
		old:  "\tdefer t.observe(x)\n\tdefer t.span.End(t.span.endOptions()...)\n\terr = errPanic\n",
		new: `	defer func() {
		if t.record.Err != errPanic {
			t.observe(x)
		}
	}()
	defer t.span.End(t.span.endOptions()...)
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
		name: "every-reason-in-the-name", kind: telemetry, file: "logging.go",
		what: "the name of a pass has its reason also if all is well",
		old:  "\t\t\t\twords = words[:3]\n",
		new:  "\t\t\t\twords = words[:4]\n",
	},
	{
		name: "model-not-in-the-name", kind: telemetry, file: "logging.go",
		what: "the name of a pass does not say of which model it is",
		old:  "{\"fwd.forward\", t.name, GraphMode(mode)",
		new:  "{\"fwd.forward\", \"\", GraphMode(mode)",
	},
	{
		name: "ubatch-names-alike", kind: telemetry, file: "logging.go",
		what: "all microbatches have the name of the first",
		old:  "\"fwd.ubatch \"+strconv.Itoa(i)",
		new:  "\"fwd.ubatch \"+strconv.Itoa(0)",
	},
	{
		name: "exchange-of-internal-kind", kind: telemetry, file: "logging.go",
		what: "an exchange in a step is a span of kind internal",
		old:  "true, clientKind, trace.WithLinks(links...))",
		new:  "true, trace.WithLinks(links...))",
	},
	{
		name: "wait-of-internal-kind", kind: telemetry, file: "logging.go",
		what: "a wait inside a pass is a span of kind internal",
		old:  "\"fwd.wait\", began, true, clientKind)",
		new:  "\"fwd.wait\", began, true)",
	},
	{
		name: "peer-of-oneself", kind: telemetry, file: "logging.go",
		what: "the rank that came last names itself as its peer",
		old:  "\t\tif e.lastRank != t.parallel.DataParallelRank {\n\t\t\tattrs",
		new:  "\t\tif e.lastRank >= 0 {\n\t\t\tattrs",
	},
	{
		name: "peer-name-ignored", kind: telemetry, file: "logging.go",
		what: "peers have their default names, whatever the caller calls them",
		old:  "\tif t.peerName == nil {\n",
		new:  "\tif t.peerName != nil || cfg.peerName == nil {\n",
	},
	{
		name: "step-mode-missing", kind: telemetry, file: "logging.go",
		what: "the name of a step does not say its mode",
		old:  "s.span.SetName(\"fwd.step \" + mode)",
		new:  "s.span.SetName(\"fwd.step\")",
	},
	{
		name: "idle-step-not-named", kind: telemetry, file: "logging.go",
		what: "a step in which nobody ran has the name of one in mode NONE",
		old:  "\t\t\tmode = stepIdle\n",
		new:  "\t\t\tmode = GraphNone.String()\n",
	},
	{
		name: "idle-step-open", kind: telemetry, file: "logging.go",
		what: "a step in which nobody runs waits for passes",
		old:  "nobody := a.Idle || vote",
		new:  "nobody := vote",
	},
	{
		name: "warm-up-end-open", kind: telemetry, file: "logging.go",
		what: "the step after the last warm-up pass waits for passes",
		old:  "a.Idle || vote.WarmUp && vote.NumTokens == 0 //",
		new:  "a.Idle //",
	},
	{
		name: "step-ends-with-rank-0", kind: telemetry, file: "logging.go",
		what: "a step ends with the first pass in its process",
		old:  "\t\ts.waiting = r.parallel.DataParallelSize\n",
		new:  "\t\ts.waiting = 1\n",
	},
	{
		name: "step-ends-with-the-last-call", kind: telemetry, file: "logging.go",
		what: "a step ends when the last rank says so, not with the latest pass",
		old:  "\tif ended.After(s.until) {\n",
		new:  "\tif true {\n",
	},
	{
		name: "step-of-no-pass-open", kind: telemetry, file: "logging.go",
		what: "a step without a pass stays open when a later one begins",
		old:  "never = slices.Clone(s.planned[:i])",
		new:  "never = nil",
	},
	{
		name: "strangers-hold-up-steps", kind: telemetry, file: "logging.go",
		what: "a step waits for the pass of a rank whose spans nobody records",
		old:  "\t\tn += toInt(!other.inSteps.Load())\n",
		new:  "\t\tn += toInt(other == nil)\n",
	},
	{
		name: "rank-done-twice", kind: telemetry, file: "logging.go",
		what: "a rank whose pass ends late counts twice in its step",
		old:  "\tdone := p.stepDone\n",
		new:  "\tdone := false\n",
	},
	{
		name: "planned-steps-unbounded", kind: telemetry, file: "logging.go",
		what: "steps of which nobody runs a pass stay open without bound",
		old:  "len(s.planned) > maxOpenSteps {",
		new:  "len(s.planned) > 1<<20 {",
	},
	{
		name: "group-steps-unbounded", kind: telemetry, file: "logging.go",
		what: "a step whose rank was started anew stays open",
		old:  "len(g.steps) > maxOpenSteps {",
		new:  "len(g.steps) > 1<<20 {",
	},
	{
		name: "failed-step-looks-well", kind: telemetry, file: "logging.go",
		what: "the step of a failed exchange shows no error",
		old:  "e.step.end(ended, e.err, word)",
		new:  "e.step.end(ended, nil, word)",
	},
	{
		name: "failed-step-ends-late", kind: telemetry, file: "logging.go",
		what: "a step that failed unseen ends when somebody asks",
		old:  "e.joinStep(s.span.times.began.Add(e.wait), word)",
		new:  "e.joinStep(t.now(), word)",
	},
	{
		name: "step-ends-after-observers", kind: telemetry, file: "logging.go",
		what: "observers see the step of their pass open",
		old: "\tif x.plan != nil { // the step's span ends after that of the pass\n" +
			"\t\trun.runner.state.endStep(x.plan, x.telemetry.now())\n\t}\n\tx.tell(&run.passContext)\n",
		new: "\tx.tell(&run.passContext)\n\tif x.plan != nil {\n" +
			"\t\trun.runner.state.endStep(x.plan, x.telemetry.now())\n\t}\n",
	},
	{
		name: "reported-step-open", kind: telemetry, file: "logging.go",
		what: "a step whose pass is reported stays open",
		old:  "\t\tr.state.endStep(x.plan, ended)\n",
		new:  "",
	},
	{
		name: "step-root-in-the-callers-trace", kind: telemetry, file: "logging.go",
		what: "a step with a root of its own is in its caller's trace all the same",
		old:  "\t\toptions = append(options, trace.WithNewRoot())\n",
		new:  "",
	},
	{
		name: "step-root-without-link", kind: telemetry, file: "logging.go",
		what: "a step with a root of its own does not lead to its caller",
		old:  "options = append(options, trace.WithLinks(trace.Link{SpanContext: caller}))",
		new:  "_ = caller",
	},
	{
		name: "draft-opens-a-step", kind: telemetry, file: "logging.go",
		what: "a draft model's pass inside another one opens a step",
		old:  " == 0 || lookup(ctx) != nil {",
		new:  " == 0 {",
	},
	{
		name: "short-waits-have-spans", kind: telemetry, file: "logging.go",
		what: "every wait inside a pass has a span, however short",
		old:  "if d < minWait || ",
		new:  "if d < 0 || ",
	},
	{
		name: "waits-of-100-us-without-span", kind: telemetry, file: "logging.go",
		what: "a wait of exactly 100 µs has no span",
		old:  "if d < minWait || ",
		new:  "if d <= minWait || ",
	},
	{
		name: "waits-without-bound", kind: telemetry, file: "logging.go",
		what: "a pass has a span for each of its waits",
		old:  " || x.waits.Add(1) > maxWaits {",
		new:  " {",
	},
	{
		name: "waits-beside-their-microbatch", kind: telemetry, file: "logging.go",
		what: "a wait of a microbatch is a child of the pass",
		old:  "t.start(ctx, \"fwd.wait\",",
		new:  "t.start(lookup(ctx).run.Context, \"fwd.wait\",",
	},
	{
		name: "last-rank-of-a-refused-exchange", kind: telemetry, file: "fwd.go",
		what: "an exchange that fails names who came last",
		old:  "\tvotes, err := e.ask()\n\treturned = true\n",
		new:  "\tvotes, err := e.ask()\n\treturned = true\n\te.noteLast()\n",
	},
	{
		name: "last-rank-out-of-range", kind: telemetry, file: "fwd.go",
		what: "a rank that does not exist is said to have come last",
		old:  "0 <= last && last < e.runner.parallel.DataParallelSize {",
		new:  "0 <= last {",
	},
	{
		name: "padding-of-unpadded", kind: telemetry, file: "logging.go",
		what: "the ratio of padding is that to the tokens without padding",
		old:  "float64(max(p.NumTokens, 1))",
		new:  "float64(max(p.NumTokensUnpadded, 1))",
	},
}
