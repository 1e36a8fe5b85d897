package main

// coordinationFaults get wrong what ranks agree on, or how they come to agree.
var coordinationFaults = []fault{
	{
		name: "mode-maximum", kind: coordination, file: "dp.go",
		what: "the agreed graph mode is the highest, not the lowest",
		old:  "if v.GraphMode < votes[lowest].GraphMode {",
		new:  "if v.GraphMode > votes[lowest].GraphMode {",
	},
	{
		name: "own-mode-kept", kind: coordination, file: "batch.go",
		what: "a rank runs the mode that it voted for",
		old:  "GraphMode:         a.GraphMode,",
		new:  "GraphMode:         d.vote.GraphMode,",
	},
	{
		name: "padding-skipped-on-one-rank", kind: coordination, file: "dp.go",
		what: "rank 0 is not padded to the others",
		old:  "\t\t\tacross[rank] = float64(maxPadded)\n",
		new: `			across[rank] = float64(maxPadded)
			if rank == 0 {
				across[rank] = float64(a.Votes[rank].NumTokensPadded)
			}
`,
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
		old:  "if v.NumTokensPadded > maxPadded {",
		new:  "if v.NumTokensPadded >= maxPadded {",
	},
	{
		name: "last-lowest", kind: coordination, file: "dp.go",
		what: "the last of the ranks with the lowest mode is blamed, not the first",
		old:  "if v.GraphMode < votes[lowest].GraphMode {",
		new:  "if v.GraphMode <= votes[lowest].GraphMode {",
	},
	{
		name: "nobody-lowered-the-mode", kind: coordination, file: "batch.go",
		what: "a pass whose mode another rank lowered keeps its own reason",
		old:  "\tif a.GraphMode < d.vote.GraphMode {\n\t\tpass.Reason = ReasonDPRank\n\t}\n",
		new:  "",
	},
	{
		name: "tokens-of-rank-0", kind: coordination, file: "batch.go",
		what: "every rank takes rank 0's count out of the agreement",
		old:  "\ttokens := int(a.NumTokensAcrossDP.AtVec(rank))\n\tpass := Pass{\n",
		new:  "\ttokens := int(a.NumTokensAcrossDP.AtVec(min(rank, 0)))\n\tpass := Pass{\n",
	},
	{
		name: "full-after-piecewise", kind: coordination, file: "batch.go",
		what: "a rank looks up full graphs where piecewise ones are agreed",
		old:  "q.ExcludeFull = q.ExcludeFull || a.GraphMode < GraphFull",
		new:  "q.ExcludeFull = q.ExcludeFull || a.GraphMode < GraphPiecewise",
	},
	{
		name: "short-dummy", kind: coordination, file: "batch.go",
		what: "the dummy pass of an idle rank has one token, whatever a decode request has",
		old:  "NumTokens: r.dispatcher.queryLen(), NumActiveLoRAs:",
		new:  "NumTokens: 1, NumActiveLoRAs:",
	},
	{
		name: "dummy-not-marked", kind: coordination, file: "batch.go",
		what: "the pass of an idle rank does not say that it is a dummy",
		old:  "\t\tDummy:             d.vote.Idle,\n",
		new:  "",
	},
	{
		name: "votes-by-arrival", kind: coordination, file: "dp.go",
		what: "votes come in the order of arrival, not of ranks",
		old:  "c.votes[c.rank] = *v",
		new:  "c.votes[g.here] = *v",
	},
	{
		name: "step-stays", kind: coordination, file: "fwd.go",
		what: "a Runner votes in the same step for ever",
		old:  "s.open, s.step = nil, step",
		new:  "s.open, s.step = nil, min(step, 0)",
	},
	{
		name: "stale-vote-accepted", kind: coordination, file: "fwd.go",
		what: "votes of an earlier step pass for those of this one",
		old:  "own.Step < vote.Step || !own.same(vote)",
		new:  "!own.same(vote)",
	},
	{
		name: "foreign-vote-accepted", kind: coordination, file: "fwd.go",
		what: "a rank does not look for its own vote among those that it gets",
		old:  "own.Step < vote.Step || !own.same(vote)",
		new:  "own.Step < vote.Step",
	},
	{
		name: "lockstep-unchecked", kind: coordination, file: "dp.go",
		what: "votes of different steps make an agreement",
		old:  "\tcase !steps:\n\t\treturn lockstepError(votes)\n",
		new:  "",
	},
	{
		name: "idle-lowers-mode", kind: protocol, file: "dp.go",
		what: "the dummy batch of an idle rank lowers the graph mode of the others",
		old:  "\t\tif v.Idle {\n\t\t\tcontinue\n\t\t}\n",
		new: `		if v.Idle {
			if !a.Idle && v.GraphMode < votes[lowest].GraphMode {
				lowest = rank
			}
			continue
		}
`,
	},
	{
		name: "idle-forbids-microbatches", kind: protocol, file: "dp.go",
		what: "nobody splits while a rank is idle",
		old:  "\t\tif v.Idle {\n\t\t\tcontinue\n\t\t}\n",
		new:  "\t\tif v.Idle {\n\t\t\ta.UBatch = false\n\t\t\tcontinue\n\t\t}\n",
	},
	{
		name: "idle-raises-padding", kind: protocol, file: "dp.go",
		what: "busy ranks are padded to the dummy batch of an idle one",
		old:  "\t\tif v.Idle {\n\t\t\tcontinue\n\t\t}\n",
		new: `		if v.Idle {
			maxPadded = max(maxPadded, v.NumTokensPadded)
			continue
		}
`,
	},
	{
		name: "idle-counts-as-minimum", kind: protocol, file: "dp.go",
		what: "the few tokens of a dummy batch make the last microbatch look empty",
		old:  "\t\tif v.Idle {\n\t\t\tcontinue\n\t\t}\n",
		new:  "\t\tif v.Idle {\n\t\t\tminTokens = min(minTokens, v.NumTokens)\n\t\t\tcontinue\n\t\t}\n",
	},
	{
		name: "idle-has-most-tokens", kind: protocol, file: "dp.go",
		what: "an idle rank is named for the most tokens though the others are padded",
		old:  "\t\tfor rank := range across {\n\t\t\tacross[rank] = float64(maxPadded)\n\t\t}\n",
		new: `		for rank := range across {
			across[rank] = float64(maxPadded)
			if a.Votes[rank].NumTokensPadded > a.Votes[a.MaxTokensRank].NumTokensPadded {
				a.MaxTokensRank = rank
			}
		}
`,
	},
	{
		name: "mode-of-idle-ranks", kind: protocol, file: "dp.go",
		what: "ranks that are all idle agree on the graph mode of rank 0's dummy batch",
		old:  "\tif !a.Idle {\n\t\ta.GraphMode = votes[lowest].GraphMode\n\t}\n",
		new:  "\ta.GraphMode = votes[lowest].GraphMode\n",
	},
	{
		name: "fingerprint-without-name", kind: protocol, file: "dp.go",
		what: "models of different names count as configured alike",
		old:  "\tf.text(r.name)\n",
		new:  "",
	},
	{
		name: "fingerprint-without-multiple", kind: protocol, file: "dp.go",
		what: "ranks that round to different multiples count as configured alike",
		old:  "c.PrefillUBatchThreshold, c.TokenMultiple, toInt(r.stepTrace))",
		new:  "c.PrefillUBatchThreshold, toInt(r.stepTrace))",
	},
	{
		name: "fingerprint-without-step-trace", kind: protocol, file: "dp.go",
		what: "ranks with and without the step trace count as configured alike",
		old:  "c.PrefillUBatchThreshold, c.TokenMultiple, toInt(r.stepTrace))",
		new:  "c.PrefillUBatchThreshold, c.TokenMultiple)",
	},
	{
		name: "fingerprint-without-sizes", kind: protocol, file: "graphmode.go",
		what: "ranks with different capture sizes count as configured alike",
		old:  "\tf.ints(d.sizes...)\n",
		new:  "",
	},
	{
		name: "fingerprint-not-voted", kind: protocol, file: "fwd.go",
		what: "votes say nothing of the configuration",
		old:  "\te.draft.vote.Config = r.fingerprint\n",
		new:  "",
	},
	{
		name: "fingerprint-not-compared", kind: protocol, file: "dp.go",
		what: "ranks of different configurations agree",
		old:  "\tcase !configs:\n",
		new:  "\tcase !configs && len(votes) == 0:\n",
	},
	{
		name: "silence-is-a-fingerprint", kind: protocol, file: "dp.go",
		what: "a vote that does not say how its rank is configured counts as another configuration",
		old:  "\t\tif v.Config != 0 {\n",
		new:  "\t\tif v.Config != 0 || rank > 0 {\n",
	},
	{
		name: "majority-named", kind: protocol, file: "dp.go",
		what: "the ranks that are like most are named as the odd ones",
		old:  "ok && k != most {",
		new:  "ok && k == most {",
	},
	{
		name: "first-of-equals-named", kind: protocol, file: "dp.go",
		what: "of equally many ranks the first are named, not those that differ from them",
		old:  "counts[k] > times {",
		new:  "counts[k] >= times {",
	},
	{
		name: "zero-key-ahead", kind: protocol, file: "dp.go",
		what: "of equally many ranks those that serve count as most, not the first",
		old:  "\ttimes := 0 //",
		new:  "\ttimes := counts[most] //",
	},
	{
		name: "warm-up-not-compared", kind: protocol, file: "dp.go",
		what: "a rank that warms up agrees with one that serves",
		old:  "kinds = kinds && v.WarmUp == first.WarmUp && (",
		new:  "kinds = kinds && (v.WarmUp != first.WarmUp || ",
	},
	{
		name: "warm-up-graphs-not-compared", kind: protocol, file: "dp.go",
		what: "ranks warm up different graphs together",
		old:  " && (!v.WarmUp || v.warmUpGraph() == first.warmUpGraph())\n",
		new:  "\n",
	},
	{
		name: "warm-up-adapters-not-compared", kind: protocol, file: "dp.go",
		what: "ranks warm up graphs of different numbers of adapters together",
		old:  "v.NumTokens, v.NumReqs, v.NumActiveLoRAs, v.Uniform, v.GraphMode}",
		new:  "v.NumTokens, v.NumReqs, 0, v.Uniform, v.GraphMode}",
	},
	{
		name: "late-rank-stays-behind", kind: protocol, file: "fwd.go",
		what: "a rank that came late to a broken step does not go on from the group's step",
		old:  "step = max(step, a.Step) //",
		new:  "step = min(step, a.Step) //",
	},
	{
		name: "refusal-costs-a-step", kind: protocol, file: "fwd.go",
		what: "a vote that is refused before it is sent uses the step up",
		old:  "\t\tstep-- // refused",
		new:  "\t\tstep += 0 // refused",
	},
	{
		name: "group-step-ignored", kind: protocol, file: "fwd.go",
		what: "a rank that is out of step does not go on from the group's step",
		old:  "\t\treturn e.Step\n",
		new:  "\t\treturn min(step, e.Step)\n",
	},
	{
		name: "missing-includes-self", kind: protocol, file: "dp.go",
		what: "a rank that waits counts as missing itself",
		old:  "\t\tif !other.here {\n\t\t\tranks = append",
		new:  "\t\tif !other.here || other == c {\n\t\t\tranks = append",
	},
	{
		name: "last-is-rank-0", kind: protocol, file: "dp.go",
		what: "rank 0 is said to have come last, whoever did",
		old:  "\tg.end(c, c.rank, step, nil)\n",
		new:  "\tg.end(c, 0, step, nil)\n",
	},
	{
		name: "last-survives-a-broken-step", kind: protocol, file: "dp.go",
		what: "a rank names who came last although the step broke",
		old:  "c.here, c.last, c.lastRank = false, step, last",
		new:  "c.here, c.last, c.lastRank = false, step, max(c.lastRank, last)",
	},
	{
		name: "begin-without-timeout", kind: protocol, file: "dp.go",
		what: "the timeout of a begun exchange never breaks the round",
		old:  "\tif deadline != 0 {\n\t\tc.begun.deadline",
		new:  "\tif deadline != 0 && v == nil {\n\t\tc.begun.deadline",
	},
	{
		name: "begin-without-cancel", kind: protocol, file: "dp.go",
		what: "the end of the context that an exchange was begun with does not break the round",
		old:  "\tif ctx.Done() != nil {\n\t\tround := c.round\n",
		new:  "\tif ctx.Done() != nil && v == nil {\n\t\tround := c.round\n",
	},
}
