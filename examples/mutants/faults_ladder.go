package main

// ladderFaults are in the engine, where it changes its capture sizes while it serves: the package offers
// what that takes, and an engine can use it wrongly.
var ladderFaults = []fault{
	{
		name: "choice-not-waited-for", kind: ladder, file: "examples/engine/replan.go",
		what: "the ranks change before all have chosen",
		old:  "\t\t\treturn false // it has not chosen yet\n",
		new:  "\t\t\tcontinue\n",
	},
	{
		name: "different-choices-followed", kind: ladder, file: "examples/engine/replan.go",
		what: "ranks that have chosen different sizes change to them",
		old:  "differ = differ || n.sizes != all[0].sizes",
		new:  "differ = differ && n.sizes != all[0].sizes",
	},
	{
		name: "choice-too-early", kind: ladder, file: "examples/engine/replan.go",
		what: "sizes are chosen before so many steps are counted",
		old:  "p.every == 0 || p.steps < p.every {",
		new:  "p.every == 0 || p.steps < p.every/2 {",
	},
	{
		name: "missed-step-not-forgotten", kind: ladder, file: "examples/engine/replan.go",
		what: "ranks that have chosen different sizes don't count anew",
		old:  "\t\tin.counted = in.seen()\n",
		new:  "\t\tin.counted = in.counted\n",
	},
	{
		name: "choice-kept", kind: ladder, file: "examples/engine/replan.go",
		what: "what was chosen once is never chosen again",
		old:  "p.steps, p.chosen, p.agreed = 0, nil, false",
		new:  "p.steps, p.agreed = 0, false",
	},
	{
		name: "ladder-kept-for-restarted", kind: ladder, file: "examples/engine/replan.go",
		what: "the ranks keep their ladder when one of them is started again",
		old:  "\t\tif slices.Equal(in.sizes, in.config.CaptureSizes) {\n",
		new:  "\t\tif len(in.sizes) > 0 {\n",
	},
	{
		name: "other-ladder-is-fatal", kind: ladder, file: "examples/engine/replan.go",
		what: "a rank that has missed a change ends the run",
		old:  "return p.every > 0 && ok &&",
		new:  "return p.every < 0 && ok &&",
	},
	{
		name: "all-captured-again", kind: ladder, file: "examples/engine/replan.go",
		what: "graphs that both ladders have are captured again",
		old:  "\t\tif slices.Contains(in.graphs, g) {\n",
		new:  "\t\tif len(in.graphs) == 0 {\n",
	},
	{
		name: "new-graphs-not-captured", kind: ladder, file: "examples/engine/replan.go",
		what: "the ranks serve before the new graphs are captured",
		old:  "in.warmUp(ctx, kept)",
		new:  "in.warmUp(ctx, append(kept, in.graphs...))",
	},
	{
		name: "largest-size-lost", kind: ladder, file: "examples/engine/replan.go",
		what: "the largest size need not be in the new ladder",
		old:  "Must: must, Unseen",
		new:  "Must: must[1:], Unseen",
	},
	{
		name: "more-graphs-each-time", kind: ladder, file: "examples/engine/replan.go",
		what: "a new ladder has more graphs than the configuration",
		old:  "MaxGraphs: len(in.dispatcher.Captures())",
		new:  "MaxGraphs: 2 * len(in.dispatcher.Captures())",
	},
	{
		name: "runner-of-old-ladder", kind: ladder, file: "examples/engine/replan.go",
		what: "the new graphs are captured by a Runner that never chooses them",
		old:  "in.runner, in.sizes, in.graphs = runner, sizes, graphs",
		new:  "in.sizes, in.graphs = sizes, graphs",
	},
	{
		name: "dropped-graphs-stay", kind: ladder, file: "examples/model/executor.go",
		what: "graphs that the new ladder does not have stay in memory",
		old:  "\t\tif !slices.Contains(stay, fwd.Capture{Mode: mode, Batch: at.key}) {\n",
		new:  "\t\tif slices.Equal(stay, nil) {\n",
	},
	{
		name: "dropped-graphs-with-kept", kind: ladder, file: "examples/model/executor.go",
		what: "graphs that stay are not in the new caches",
		old:  "\t\tif err := cache.Forward(fwd.NewContext(context.Background(), fc)); err != nil {\n",
		new:  "\t\tif err := context.Background().Err(); cache == nil || fc == nil || err != nil {\n",
	},
}
