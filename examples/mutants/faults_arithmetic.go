package main

// arithmeticFaults get the token counts of the ranks wrong.
var arithmeticFaults = []fault{
	{
		name: "ceil-to-floor", kind: arithmetic, file: "dp.go",
		what: "a division rounds down, not up",
		old:  "\tif a%b != 0 {\n\t\tq++\n\t}\n",
		new:  "",
	},
	{
		name: "share-to-floor", kind: arithmetic, file: "dp.go",
		what: "the share of a worker is rounded down",
		old:  "return int(uint64(n-1)*v.factor>>v.shift) + 1",
		new:  "return int(uint64(n) * v.factor >> v.shift)",
	},
	{
		name: "sp-major-sizes", kind: arithmetic, file: "dp.go",
		what: "local sizes come in SP-major order",
		old: `			for end := i + sp; i < end; i++ {
				out[i] = local
			}
`,
		new: `			for k := range sp {
				out[k*len(m.tokens)+i] = local
			}
			i++
`,
	},
	{
		name: "sp-major-chunks", kind: arithmetic, file: "dp.go",
		what: "the sizes of a chunk come in SP-major order",
		old: `			for end := i + sp; i < end; i++ {
				out[i] = size
			}
`,
		new: `			for k := range sp {
				out[k*len(m.tokens)+i] = size
			}
			i++
`,
	},
	{
		name: "chunk-not-split", kind: arithmetic, file: "dp.go",
		what: "the sizes of a chunk are of the rank's rows, not of a worker's",
		old:  "chunkSize(div.ceil(n), start, maxChunk)",
		new:  "chunkSize(max(n, div.ceil(n)), start, maxChunk)",
	},
	{
		name: "microbatch-not-split", kind: arithmetic, file: "dp.go",
		what: "the local sizes of a microbatch are of the rank's rows, not of a worker's",
		old:  "fill(out, ceilDiv(m.max, sp))",
		new:  "fill(out, m.max)",
	},
	{
		name: "chunk-index-off-by-one", kind: arithmetic, file: "dp.go",
		what: "a round has the sizes of the next one",
		old:  "Sizes: m.AppendChunkedSizes(nil, sp, maxChunk, i),",
		new:  "Sizes: m.AppendChunkedSizes(nil, sp, maxChunk, i+1),",
	},
	{
		name: "finished-rank-sends-nothing", kind: arithmetic, file: "dp.go",
		what: "a rank that is done has size 0 in the rounds that are left",
		old:  "return max(min(maxChunk, local-start), 1)",
		new:  "return max(min(maxChunk, local-start), 0)",
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
		old:  "max(min(end, own), 1)",
		new:  "max(end, 1)",
	},
	{
		name: "lockstep-row-kept", kind: arithmetic, file: "dp.go",
		what: "a row that was sent only to keep step is kept",
		old:  "Keep:  start < own,",
		new:  "Keep:  true,",
	},
	{
		name: "kept-one-round-too-long", kind: arithmetic, file: "dp.go",
		what: "the round that starts where the rows end is kept",
		old:  "Keep:  start < own,",
		new:  "Keep:  start <= own,",
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
		new:  "return ceilDiv(ceilDiv(m.NumTokens(m.rank), sp), maxChunk)",
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
		old:  "m.max = max(m.max, m.tokens[d])",
		new:  "m.max = m.tokens[d]",
	},
	{
		name: "rank-forgotten", kind: arithmetic, file: "dp.go",
		what: "every rank counts its rows as rank 0",
		old:  "m := &DPMetadata{rank: p.DataParallelRank, size:",
		new:  "m := &DPMetadata{size:",
	},
	{
		name: "exclusive-sum", kind: arithmetic, file: "dp.go",
		what: "the running sum starts with zero and lacks its end",
		old:  "\t\t\t\tsum += local\n\t\t\t\traw[i] = float64(sum)\n",
		new:  "\t\t\t\traw[i] = float64(sum)\n\t\t\t\tsum += local\n",
	},
	{
		name: "sum-of-unrounded-shares", kind: arithmetic, file: "dp.go",
		what: "the running sum forgets padding rows",
		old:  "local := int64(div.ceil(n))",
		new:  "local := int64(min(n/sp, div.ceil(n)))",
	},
}
