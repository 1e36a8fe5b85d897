package main

// overlapFaults are in what the engine does ahead of its passes.
var overlapFaults = []fault{
	{
		name: "overlap-same-tokens-again", kind: overlap, file: "examples/engine/scheduler.go",
		what: "the next step computes the tokens again that the pass before it computes",
		old:  "first, known := s.computed+s.coming, s.known()",
		new:  "first, known := s.computed, s.known()",
	},
	{
		name: "overlap-token-not-foreseen", kind: overlap, file: "examples/engine/scheduler.go",
		what: "a request that gets a token from a pass has nothing to compute in the next step",
		old:  "\tif first == known {\n",
		new:  "\tif first < 0 {\n",
	},
	{
		name: "overlap-end-not-foreseen", kind: overlap, file: "examples/engine/overlap.go",
		what: "a request has a place in the step after its last one",
		old:  "len(seq.result.Tokens)+1 == seq.request.MaxTokens {",
		new:  "len(seq.result.Tokens) == seq.request.MaxTokens {",
	},
	{
		name: "overlap-last-pass-taken-for-done", kind: overlap, file: "examples/engine/scheduler.go",
		what: "a rank says that it has finished before its last pass, which may fail",
		old:  "len(s.running) + s.leaving }",
		new:  "len(s.running) }",
	},
	{
		name: "overlap-foreseen-for-ever", kind: overlap, file: "examples/engine/rank.go",
		what: "tokens that a pass has computed are still foreseen after it",
		old:  "= s.seq.computed+s.count, 0\n",
		new:  "= s.seq.computed+s.count, s.seq.coming\n",
	},
	{
		name: "overlap-exchange-left-open", kind: overlap, file: "examples/engine/overlap.go",
		what: "a run ends while an exchange that it has begun goes on",
		old:  "\tif r.next != nil {\n\t\t_, _ = r.next.agree()\n",
		new:  "\tif r.next != nil {\n\t\t_ = r.next.agree\n",
	},
	{
		name: "overlap-hidden-time-waited-for", kind: overlap, file: "examples/engine/stats.go",
		what: "an exchange counts as waited for though a pass ran meanwhile",
		old:  "hidden := min(rec.Wait, f.meanwhile)",
		new:  "hidden := min(rec.Wait, 0*f.meanwhile)",
	},
	{
		name: "overlap-votes-late", kind: overlap, file: "examples/engine/overlap.go",
		what: "a rank votes for the next step only when the pass has run",
		old:  "\tif !ahead {\n",
		new:  "\tif b.ahead {\n",
	},
}
