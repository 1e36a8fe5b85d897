package main

// runningFaults are in what a Runner does with a pass.
var runningFaults = []fault{
	{
		name: "agreed-pass-cancelled", kind: running, file: "fwd.go",
		what: "a pass that the other ranks count on does not run once its context has ended",
		old:  "\tif x.traced == nil {\n\t\treturn x.do(forward)\n\t}\n",
		new: `	if err := ctx.Err(); err != nil {
		r.state.activity.remove(x)
		return err
	}
	if x.traced == nil {
		return x.do(forward)
	}
`,
	},
	{
		name: "idle-pass-runs", kind: running, file: "fwd.go",
		what: "a pass runs though every rank is idle",
		old:  "\tif p.idle() {\n\t\treturn p.use()\n\t}\n",
		new:  "",
	},
	{
		name: "idle-pass-starts", kind: running, file: "fwd.go",
		what: "a pass starts though every rank is idle",
		old:  "if err == nil && p.idle() {",
		new:  "if err == nil && p.idle() && p.NumTokens < 0 {",
	},
	{
		name: "planned-pass-runs-twice", kind: running, file: "fwd.go",
		what: "a planned pass runs as often as it is given to Run",
		old:  "if p.plan != nil && p.plan.used.Swap(true) {",
		new:  "if p.plan != nil && p.plan.used.Load() {",
	},
	{
		name: "planned-pass-runs-elsewhere", kind: running, file: "fwd.go",
		what: "a planned pass runs on another Runner",
		old:  "\tif p.plan.runner != r {\n",
		new:  "\tif p.plan.runner == nil {\n",
	},
	{
		name: "refusal-uses-the-pass-up", kind: running, file: "fwd.go",
		what: "a planned pass that was refused can't run later",
		old:  "\tif err := p.complete(r); err != nil {\n\t\treturn err\n\t}\n",
		new:  "\tif err := p.complete(r); err != nil {\n\t\t_ = p.use()\n\t\treturn err\n\t}\n",
	},
	{
		name: "foreign-pass-reported", kind: running, file: "fwd.go",
		what: "a Runner reports a pass that another one planned",
		old:  "\tif err := r.accept(&p); err != nil {\n\t\treturn err\n\t}\n\tif r.parallel.coordinated() {",
		new:  "\tif err := p.complete(r); err != nil {\n\t\treturn err\n\t}\n\tif r.parallel.coordinated() {",
	},
	{
		name: "pass-reported-twice", kind: running, file: "fwd.go",
		what: "a reported pass can run or be reported again",
		old:  "\tif err := p.use(); err != nil || p.idle() {\n",
		new:  "\tif err := p.belongs(r); err != nil || p.idle() {\n",
	},
	{
		name: "descriptor-disagrees", kind: running, file: "batch.go",
		what: "a descriptor whose adapters disagree is not refused",
		old:  "\tif d.HasLoRA != (d.NumActiveLoRAs > 0) {\n",
		new:  "\tif d.HasLoRA && d.NumActiveLoRAs < 0 {\n",
	},
	{
		name: "unequal-ranks-split", kind: running, file: "fwd.go",
		what: "a pass may be split at tokens that another rank does not have",
		old:  "\tm.checkEqual(&bad)\n\treturn m, bad.err()\n",
		new:  "\treturn m, bad.err()\n",
	},
	{
		name: "synchronized-when-cancelled", kind: running, file: "fwd.go",
		what: "nobody waits for the device once the context has ended",
		old:  "\tif ctx.Done() != nil {\n\t\tctx = context.WithoutCancel(ctx)\n\t}\n",
		new:  "",
	},
	{
		name: "middleware-goes-in-circles", kind: running, file: "fwd.go",
		what: "a middleware that runs another pass of its Runner around next is not refused",
		old:  "\tcase c.inner:\n",
		new:  "\tcase c.inner && c.run == nil:\n",
	},
	{
		name: "no-end-after-an-error", kind: running, file: "fwd.go",
		what: "Start returns no end function with an error",
		old:  "\tx, err := r.begin(ctx, &p)\n\tif err != nil {\n\t\treturn ctx, func(error) {}, err\n",
		new:  "\tx, err := r.begin(ctx, &p)\n\tif err != nil {\n\t\treturn ctx, nil, err\n",
	},
	{
		name: "pass-ends-twice", kind: running, file: "fwd.go",
		what: "a second call of Start's end counts",
		old:  "\tif x.ended.Swap(true) {\n",
		new:  "\tif x.ended.Load() {\n",
	},
	{
		name: "status-without-ranks", kind: running, file: "fwd.go",
		what: "the status does not name the ranks that are waited for",
		old:  "\t\t\ts.Waiting = c.Missing()\n",
		new:  "\t\t\tc.Missing()\n",
	},
	{
		name: "status-of-youngest", kind: running, file: "fwd.go",
		what: "the status says when the youngest pass began, not the oldest",
		old:  "if n == 0 || x.began.until(oldest) > 0 {",
		new:  "if n == 0 || x.began.until(oldest) < 0 {",
	},
	{
		name: "active-for-ever", kind: running, file: "fwd.go",
		what: "a pass that has ended still counts as running",
		old:  "\t\tx.runner.state.activity.remove(x)\n",
		new:  "\t\tx.runner.state.activity.add(x)\n",
	},
	{
		name: "disabled-is-unplanned", kind: running, file: "fwd.go",
		what: "a pass made by hand on a Runner without graphs does not say why it has none",
		old:  "\t\tp.Reason = ReasonDisabled\n",
		new:  "\t\tp.Reason = ReasonUnknown\n",
	},
}
