package main

// contextFaults get wrong what model code finds in its context.
var contextFaults = []fault{
	{
		name: "outer-sizes-seen", kind: inContext, file: "fwd.go",
		what: "a nested pass sees the local sizes of the outer one",
		old:  "\tx.Context, x.fc, x.run = ctx, &x.value, x\n",
		new: `	x.Context, x.fc, x.run = ctx, &x.value, x
	if outer := lookup(ctx); outer != nil {
		x.sizes = outer.sizes
	}
`,
	},
	{
		name: "outer-microbatch-seen", kind: inContext, file: "fwd.go",
		what: "a nested pass is in the microbatch of the outer one",
		old:  "\tx.Context, x.fc, x.run = ctx, &x.value, x\n",
		new: `	x.Context, x.fc, x.run = ctx, &x.value, x
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
		old:  "func (x *run) call(forward ForwardFunc) error {\n",
		new: `func (x *run) call(forward ForwardFunc) error {
	x.fc = &ForwardContext{}
	defer func() { x.fc = &x.value }()
`,
	},
	{
		name: "sizes-leak", kind: inContext, file: "dp.go",
		what: "local sizes change the context that they were derived from",
		old:  "\tderived.Context, derived.sizes = ctx, &derived.list\n",
		new:  "\tderived.Context, derived.sizes, c.sizes = ctx, &derived.list, &derived.list\n",
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
		old:  "v.NumTokens, v.NumTokensUnpadded = p.NumTokens, p.NumTokensUnpadded",
		new:  "v.NumTokens, v.NumTokensUnpadded = p.NumTokens, p.NumTokens",
	},
	{
		name: "part-of-scheduled-requests", kind: inContext, file: "fwd.go",
		what: "the requests of the whole pass are those scheduled, without padding",
		old:  "\treqs := p.Batch.NumReqs\n",
		new:  "\treqs := p.Batch.NumReqs * toInt(p.NumReqs == 0)\n",
	},
	{
		name: "metadata-without-telemetry", kind: inContext, file: "fwd.go",
		what: "what runs below added metadata is no longer in the Runner's pass",
		old:  "\tderived.fc = &fc\n",
		new:  "\tderived.fc, derived.run = &fc, nil\n",
	},
	{
		name: "metadata-dropped", kind: inContext, file: "fwd.go",
		what: "added slot mappings replace the attention metadata by nothing",
		old:  "\tif attn != nil {\n\t\tfc.AttnMetadata",
		new:  "\tif attn != nil || slots != nil {\n\t\tfc.AttnMetadata",
	},
	{
		name: "metadata-not-read", kind: inContext, file: "fwd.go",
		what: "added metadata stands in the forward context, but no layer finds it",
		old:  "\tderived.readMetadata()\n",
		new:  "",
	},
	{
		name: "layers-of-all-lost", kind: inContext, file: "fwd.go",
		what: "metadata that serves every layer serves none",
		old:  "m.byLayer[0], m.all = maps[0], maps[0][\"\"]",
		new:  "m.byLayer[0], m.all = maps[0], nil",
	},
}
