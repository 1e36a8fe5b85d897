// This file compares the package with second, naive implementations, on fuzzed input.

package fwd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

// The second implementations in this file follow the formulas word by word: they search, count and build
// sets where the library calculates, in big integers where the library has to mind overflow.

func naiveInt(n int) *big.Int { return big.NewInt(int64(n)) }

// naiveLocalSizes are ceil(T[d]/s), s times in a row.
func naiveLocalSizes(tokens []int, sp int) []*big.Int {
	var sizes []*big.Int
	for _, n := range tokens {
		quotient, remainder := new(big.Int).DivMod(naiveInt(n), naiveInt(sp), new(big.Int))
		if remainder.Sign() > 0 {
			quotient.Add(quotient, big.NewInt(1))
		}
		for range sp {
			sizes = append(sizes, quotient)
		}
	}
	return sizes
}

// naiveChunked are min(c, v - c·i), and 1 if that is not above 0.
func naiveChunked(local []*big.Int, maxChunk, idx int) []*big.Int {
	var sizes []*big.Int
	for _, v := range local {
		r := new(big.Int).Mul(naiveInt(maxChunk), naiveInt(idx))
		r.Sub(v, r)
		if c := naiveInt(maxChunk); r.Cmp(c) > 0 {
			r = c
		}
		if r.Sign() <= 0 {
			r = big.NewInt(1)
		}
		sizes = append(sizes, r)
	}
	return sizes
}

// naiveCumulative is the inclusive running sum.
func naiveCumulative(sizes []*big.Int) []*big.Int {
	var sums []*big.Int
	sum := new(big.Int)
	for _, v := range sizes {
		sum = new(big.Int).Add(sum, v)
		sums = append(sums, sum)
	}
	return sums
}

func naiveMax(list []*big.Int) *big.Int {
	return slices.MaxFunc(list, (*big.Int).Cmp)
}

// sameInts reports whether got holds exactly the numbers of want.
func sameInts(want []*big.Int, got []int) bool {
	return slices.EqualFunc(want, got, func(w *big.Int, g int) bool { return w.Cmp(naiveInt(g)) == 0 })
}

// sameVec is sameInts for a vector.
func sameVec(want []*big.Int, got *mat.VecDense) bool {
	if got.Len() != len(want) {
		return false
	}
	for i, w := range want {
		g, accuracy := big.NewFloat(got.AtVec(i)).Int(nil)
		if accuracy != big.Exact || g.Cmp(w) != 0 {
			return false
		}
	}
	return true
}

// fuzzTokens makes token counts of 1 to 12 ranks out of data.
func fuzzTokens(data []byte) []int {
	tokens := []int{0}
	if len(data) >= 4 {
		tokens = tokens[:0]
	}
	for ; len(data) >= 4 && len(tokens) < 12; data = data[4:] {
		n := int(binary.LittleEndian.Uint32(data) & math.MaxInt32)
		if data[3]&0x80 != 0 {
			n %= 100 // small counts are the ones on the boundaries
		}
		tokens = append(tokens, n)
	}
	return tokens
}

func FuzzDPArithmetic(f *testing.F) {
	most := []byte{0xff, 0xff, 0xff, 0x7f}
	f.Add([]byte{8, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0}, uint8(0), uint8(0), uint32(3), uint32(1))
	f.Add([]byte{}, uint8(0), uint8(0), uint32(0), uint32(0))
	f.Add(slices.Concat(most, most, []byte{1, 0, 0, 0}), uint8(1), uint8(7),
		uint32(math.MaxInt32-1), uint32(math.MaxInt32))
	f.Add(slices.Concat(most, []byte{0, 0, 0, 0}), uint8(1), uint8(0), uint32(0), uint32(math.MaxInt32))
	f.Add(slices.Concat(most, most), uint8(0), uint8(2), uint32(1<<16), uint32(1<<15))
	f.Add([]byte{7, 0, 0, 0x80, 99, 0, 0, 0x80}, uint8(1), uint8(1), uint32(1), uint32(6))
	f.Fuzz(func(t *testing.T, data []byte, rankByte, spByte uint8, chunk, index uint32) {
		tokens := fuzzTokens(data)
		rank, sp := int(rankByte)%len(tokens), int(spByte%16)+1
		maxChunk, idx := max(int(chunk&math.MaxInt32), 1), int(index&math.MaxInt32)
		across := mat.NewVecDense(len(tokens), nil)
		var wantTokens []*big.Int
		for d, n := range tokens {
			across.SetVec(d, float64(n))
			wantTokens = append(wantTokens, naiveInt(n))
		}
		parallel := fwd.ParallelConfig{DataParallelSize: len(tokens), DataParallelRank: rank}
		m, err := fwd.NewDPMetadata(parallel, tokens[rank], across)
		if err != nil {
			t.Fatalf("rank %d of %v: %v", rank, tokens, err)
		}
		across.Zero() // the metadata has a copy

		local := naiveLocalSizes(tokens, sp)
		chunked := naiveChunked(local, maxChunk, idx)
		if got := m.NumTokensAcrossDPTo(nil); !sameVec(wantTokens, got) {
			t.Errorf("tokens across DP %v, want %v", got.RawVector().Data, wantTokens)
		}
		if got, want := naiveInt(m.MaxTokensAcrossDP()), naiveMax(wantTokens); got.Cmp(want) != 0 {
			t.Errorf("max tokens across DP %v, want %v", got, want)
		}
		if got := m.AppendSPLocalSizes([]int{-1}, sp); got[0] != -1 || !sameInts(local, got[1:]) {
			t.Errorf("SP local sizes of %v for SP size %d: %v, want -1 and %v", tokens, sp, got, local)
		}
		if got := m.AppendChunkedSizes([]int{-1}, sp, maxChunk, idx); got[0] != -1 || !sameInts(chunked, got[1:]) {
			t.Errorf("chunk %d of at most %d of %v for SP size %d: %v, want -1 and %v",
				idx, maxChunk, tokens, sp, got, chunked)
		}
		cumulative := naiveCumulative(local)
		column := mat.NewDense(len(local), 2, nil).ColView(1).(*mat.VecDense) // a vector whose elements lie apart
		for _, dst := range []*mat.VecDense{nil, column} {
			if got := m.CuTokensAcrossSPTo(dst, sp); !sameVec(cumulative, got) {
				t.Errorf("cumulative tokens of %v for SP size %d: %v, want %v",
					tokens, sp, mat.Formatted(got.T()), cumulative)
			}
		}
		checkFuzzRounds(t, m, tokens, local, sp, maxChunk)
	})
}

// checkFuzzRounds checks the rounds of a layer: how many there are, and the rows of each. Only the first few
// are looked at.
func checkFuzzRounds(t *testing.T, m *fwd.DPMetadata, tokens []int, local []*big.Int, sp, maxChunk int) {
	t.Helper()
	const most = 40
	largest, c := naiveMax(local), naiveInt(maxChunk)
	wantChunks := new(big.Int).Add(largest, new(big.Int).Sub(c, big.NewInt(1)))
	wantChunks.Div(wantChunks, c)
	if got := m.NumChunks(sp, maxChunk); naiveInt(got).Cmp(wantChunks) != 0 {
		t.Errorf("%d chunks of at most %d of %v for SP size %d, want %v", got, maxChunk, tokens, sp, wantChunks)
	}
	ctx := fwd.NewContext(context.Background(), &fwd.ForwardContext{NumTokens: tokens[m.Rank()], DP: m})
	rounds, err := fwd.Chunks(ctx, sp, maxChunk)
	if err != nil {
		t.Fatal(err)
	}
	n := local[m.Rank()*sp]
	clip := func(x, limit *big.Int) *big.Int {
		if x.Cmp(limit) > 0 {
			return limit
		}
		return x
	}
	i, kept := 0, new(big.Int)
	for inner, chunk := range rounds {
		start := new(big.Int).Mul(naiveInt(i), c)
		end := clip(new(big.Int).Add(start, c), largest)
		wantStart, wantEnd, keep := new(big.Int), big.NewInt(1), false
		if n.Sign() > 0 {
			wantStart, wantEnd = clip(start, new(big.Int).Sub(n, big.NewInt(1))), clip(end, n)
			keep = start.Cmp(n) < 0
		}
		if chunk.Index != i || chunk.Keep != keep ||
			naiveInt(chunk.Rows.Start).Cmp(wantStart) != 0 || naiveInt(chunk.Rows.Stop).Cmp(wantEnd) != 0 {
			t.Errorf("round %d of %v, at most %d for SP size %d: %+v, want rows %v to %v, keep %t",
				i, tokens, maxChunk, sp, chunk, wantStart, wantEnd, keep)
		}
		if keep {
			kept.Add(kept, naiveInt(chunk.Rows.Len()))
		}
		got, ok := fwd.LocalSizes(inner)
		if !ok || !sameInts(naiveChunked(local, maxChunk, i), got) || !slices.Equal(got, chunk.Sizes) {
			t.Errorf("round %d of %v, at most %d for SP size %d: local sizes %v (%t), %v",
				i, tokens, maxChunk, sp, got, ok, chunk.Sizes)
		}
		if i++; i == most {
			return
		}
	}
	if naiveInt(i).Cmp(wantChunks) != 0 || kept.Cmp(n) != 0 {
		t.Errorf("%d rounds over %v, at most %d for SP size %d, keep %v rows, want %v rounds and %v rows",
			i, tokens, maxChunk, sp, kept, wantChunks, n)
	}
}

// naiveSplit cuts a batch by the array of cumulative starts. It returns nil if a slice would be empty.
func naiveSplit(scheduled []int, padded, reqsPadded, n, split int) (slices, paddedSlices []fwd.UBatchSlice) {
	cu := []int{0}
	for _, tokens := range scheduled {
		cu = append(cu, cu[len(cu)-1]+tokens)
	}
	total := cu[len(cu)-1]
	if split == 0 {
		split = padded / n
	}
	for k := range n {
		start, end := k*split, (k+1)*split
		if k == n-1 {
			end = total
		}
		first, stop := -1, 0
		for _, entry := range cu {
			if entry <= start {
				first++
			}
			if entry < end {
				stop++
			}
		}
		if first >= stop || start >= end {
			return nil, nil
		}
		slices = append(slices, planSlices([4]int{first, stop, start, end})...)
	}
	paddedSlices = append(paddedSlices, slices...)
	paddedSlices[n-1].Requests.Stop, paddedSlices[n-1].Tokens.Stop = reqsPadded, padded
	return slices, paddedSlices
}

func FuzzSplitUBatches(f *testing.F) {
	f.Add([]byte{16, 16, 16, 16}, uint16(0), uint8(0), uint8(2), uint16(0))
	f.Add([]byte{1, 1, 1, 1, 1}, uint16(3), uint8(3), uint8(4), uint16(0))
	f.Add([]byte{200}, uint16(8), uint8(0), uint8(3), uint16(17))
	f.Add([]byte{0, 5, 0, 0, 9, 0}, uint16(0), uint8(0), uint8(2), uint16(5))
	f.Add([]byte{3}, uint16(1000), uint8(0), uint8(2), uint16(0))
	f.Add([]byte{}, uint16(0), uint8(0), uint8(2), uint16(1))
	f.Add([]byte{7, 7}, uint16(0), uint8(0), uint8(14), uint16(0))
	f.Add([]byte{7, 7}, uint16(0), uint8(0), uint8(15), uint16(1))
	f.Add([]byte{7, 7}, uint16(0), uint8(0), uint8(1), uint16(0))
	f.Fuzz(func(t *testing.T, requests []byte, moreTokens uint16, moreReqs, nByte uint8, split uint16) {
		if len(requests) > 64 {
			requests = requests[:64]
		}
		var scheduled []int
		total := 0
		for _, b := range requests {
			scheduled = append(scheduled, int(b))
			total += int(b)
		}
		input := slices.Clone(scheduled)
		padded, reqsPadded := total+int(moreTokens), len(scheduled)+int(moreReqs)
		n, splitPoint := int(nByte%40), int(split)
		got, gotPadded, err := fwd.SplitUBatches(scheduled, padded, reqsPadded, n, splitPoint)
		if !slices.Equal(input, scheduled) {
			t.Errorf("the input is now %v, was %v", scheduled, input)
		}
		if n < 2 {
			if !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%d microbatches: %v", n, err)
			}
			return
		}
		want, wantPadded := naiveSplit(scheduled, padded, reqsPadded, n, splitPoint)
		if want == nil {
			if !errors.Is(err, fwd.ErrInvalid) || got != nil || gotPadded != nil {
				t.Errorf("a split of %v, padded to %d, into %d at %d with an empty slice: %v, %v, %v",
					scheduled, padded, n, splitPoint, got, gotPadded, err)
			}
			return
		}
		if err != nil {
			t.Fatalf("a split of %v, padded to %d, into %d at %d: %v", scheduled, padded, n, splitPoint, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("slices (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(wantPadded, gotPadded); diff != "" {
			t.Errorf("padded slices (-want +got):\n%s", diff)
		}
		checkFuzzTiling(t, scheduled, got, total)
		checkFuzzTiling(t, scheduled, gotPadded, padded)
	})
}

// checkFuzzTiling checks that slices tile [0, total) and that each has the requests whose tokens it has.
func checkFuzzTiling(t *testing.T, scheduled []int, ubatches []fwd.UBatchSlice, total int) {
	t.Helper()
	next, sum := 0, 0
	for k, s := range ubatches {
		if s.Tokens.Start != next || s.IsEmpty() {
			t.Errorf("slice %d is %v, want it to start at token %d", k, s, next)
		}
		next = s.Tokens.Stop
		sum += s.NumTokens()
		start := 0
		for req, tokens := range scheduled {
			shared := min(start+tokens, s.Tokens.Stop) > max(start, s.Tokens.Start)
			has := s.Requests.Start <= req && req < s.Requests.Stop
			if tokens > 0 && shared != has {
				t.Errorf("slice %d, %v, of %v: request %d at token %d shares tokens %t, is there %t",
					k, s, scheduled, req, start, shared, has)
			}
			start += tokens
		}
	}
	if next != total || sum != total {
		t.Errorf("slices %v end at %d with %d tokens, want %d", ubatches, next, sum, total)
	}
}

// naiveAgree is the agreement by its rules: idle ranks are left out of all of them, and without padding each
// rank runs its own tokens. Tokens across DP are a plain list.
func naiveAgree(votes []fwd.Vote, n int) (want fwd.Agreement, across []int) {
	want = fwd.Agreement{Step: votes[0].Step, LowestModeRank: -1, Votes: votes}
	var busy []fwd.Vote
	var ranks []int // of the busy
	for rank, v := range votes {
		across = append(across, v.NumTokensPadded)
		if !v.Idle {
			busy, ranks = append(busy, v), append(ranks, rank)
		}
	}
	want.MaxTokensRank = slices.Index(across, slices.Max(across))
	if want.Idle = len(busy) == 0; want.Idle {
		return want, across
	}
	byMode := func(v, w fwd.Vote) int { return int(v.GraphMode) - int(w.GraphMode) }
	byPadded := func(v, w fwd.Vote) int { return v.NumTokensPadded - w.NumTokensPadded }
	lowest, most := slices.MinFunc(busy, byMode), slices.MaxFunc(busy, byPadded) // of equal ones the first
	want.GraphMode = lowest.GraphMode
	if slices.MaxFunc(busy, byMode).GraphMode != want.GraphMode {
		want.LowestModeRank = ranks[slices.IndexFunc(busy, func(v fwd.Vote) bool {
			return v.GraphMode == want.GraphMode
		})]
	}
	least := slices.MinFunc(busy, func(v, w fwd.Vote) int { return v.NumTokens - w.NumTokens }).NumTokens
	if n >= 2 && !slices.ContainsFunc(busy, func(v fwd.Vote) bool { return !v.UBatch }) {
		last := new(big.Int).Mul(naiveInt(most.NumTokensPadded/n), naiveInt(n-1)) // where the last one starts
		want.UBatch = last.Cmp(naiveInt(least)) < 0
	}
	if want.GraphMode == fwd.GraphNone && !want.UBatch {
		return want, across
	}
	want.MaxTokensRank = ranks[slices.IndexFunc(busy, func(v fwd.Vote) bool {
		return v.NumTokensPadded == most.NumTokensPadded
	})]
	return want, slices.Repeat([]int{most.NumTokensPadded}, len(votes))
}

// naiveOdd returns the ranks whose word is not the most frequent one, of equally frequent ones the first. No
// word counts as not said.
func naiveOdd(words []string) (odd []int) {
	most, times := "", 0
	for _, w := range words {
		n := 0
		for _, other := range words {
			if other == w {
				n++
			}
		}
		if w != "" && n > times {
			most, times = w, n
		}
	}
	for rank, w := range words {
		if w != "" && w != most {
			odd = append(odd, rank)
		}
	}
	return odd
}

// naiveFault says what is wrong with votes that can be: nil, or the error and the ranks that it names.
func naiveFault(votes []fwd.Vote) (odd []int, err error) {
	highest := slices.MaxFunc(votes, func(v, w fwd.Vote) int { return int(v.Step) - int(w.Step) }).Step
	configs, graphs := make([]string, len(votes)), make([]string, len(votes))
	for rank, v := range votes {
		if v.Step != highest {
			odd = append(odd, rank)
		}
		if v.Config != 0 {
			configs[rank] = fmt.Sprint(v.Config)
		}
		if graphs[rank] = "serves"; v.WarmUp {
			graphs[rank] = fmt.Sprint(v.NumTokens, v.NumReqs, v.Uniform, v.NumActiveLoRAs, v.GraphMode)
		}
	}
	if len(odd) > 0 {
		return odd, fwd.ErrLockstep
	}
	if odd := naiveOdd(configs); len(odd) > 0 {
		return odd, fwd.ErrInvalid
	}
	if odd := naiveOdd(graphs); len(odd) > 0 {
		return odd, fwd.ErrLockstep
	}
	return nil, nil
}

// fuzzVotes makes 1 to 16 votes out of data. Some of them can't be.
func fuzzVotes(data []byte) (votes []fwd.Vote, impossible bool) {
	for len(votes) == 0 || len(data) > 0 && len(votes) < 16 {
		var b [8]byte
		data = data[copy(b[:], data):]
		v := fwd.Vote{
			Step: 3, NumTokens: int(binary.LittleEndian.Uint16(b[:])), GraphMode: fwd.GraphMode(b[3] % 3),
			UBatch: b[2]&1 == 0, Idle: b[2]&4 != 0, WarmUp: b[2]&8 != 0, Uniform: b[2]&16 != 0,
			NumReqs: int(b[6] & 7), NumActiveLoRAs: int(b[6] >> 6), Config: uint64(b[7] & 3), Note: uint64(b[7]),
		}
		if b[2]&2 != 0 {
			v.NumTokens <<= 14
		}
		v.NumTokensPadded = v.NumTokens + int(b[4])
		switch b[5] {
		case 255:
			v.NumTokensPadded = v.NumTokens - 1
		case 254:
			v.GraphMode = fwd.GraphFullAndPiecewise
		case 253:
			v.Step++
		case 252:
			v.NumReqs = -v.NumReqs - 1
		case 251:
			v.NumActiveLoRAs = -v.NumActiveLoRAs - 1
		}
		impossible = impossible || b[5] == 255 || b[5] == 254 || b[5] == 252 || b[5] == 251
		votes = append(votes, v)
	}
	return votes, impossible
}

func FuzzAgree(f *testing.F) {
	for i, seed := range []struct {
		data []byte
		n    uint32
	}{
		{[]byte{16, 0, 0, 2, 0, 0, 0, 0 /**/, 12, 0, 0, 1, 4, 0, 0, 0 /**/, 16, 0, 0, 2, 0, 0, 0, 0}, 2},
		{[]byte{0, 1, 0, 0, 0, 0, 0, 0 /**/, 9, 0, 0, 0, 9, 0, 0, 0}, 2},
		{[]byte{64, 0, 0, 0, 0, 0, 0, 0 /**/, 64, 0, 0, 0, 0, 0, 0, 0}, 4},
		{[]byte{64, 0, 1, 0, 0, 0, 0, 0 /**/, 64, 0, 0, 2, 0, 0, 0, 0}, 4},
		{[]byte{255, 255, 2, 0, 255, 0, 0, 0 /**/, 255, 255, 2, 0, 1, 0, 0, 0}, math.MaxInt32},
		{[]byte{3, 0, 0, 0, 0, 255, 0, 0 /**/, 3, 0, 0, 0, 0, 253, 0, 0}, 0},
		{[]byte{3, 0, 0, 0, 0, 0, 0, 0 /**/, 3, 0, 0, 0, 0, 253, 0, 0}, 1},
		{[]byte{3, 0, 0, 0, 0, 254, 0, 0}, 1},
		{[]byte{8, 0, 0, 0, 8, 0, 0, 0 /**/, 16, 0, 0, 0, 0, 0, 0, 0}, 2}, // the last would just be empty
		{[]byte{3, 0, 0, 2, 0, 0, 0, 0 /**/, 3, 0, 0, 1, 0, 0, 0, 0 /**/, 3, 0, 0, 1, 0, 0, 0, 0}, 2},
		{[]byte{3, 0, 0, 2, 0, 0, 0, 1 /**/, 99, 0, 4, 0, 0, 0, 0, 1 /**/, 5, 0, 0, 1, 1, 0, 0, 1}, 2},  // one idle
		{[]byte{3, 0, 4, 2, 0, 0, 0, 1 /**/, 99, 0, 4, 0, 0, 0, 0, 1}, 2},                               // all are
		{[]byte{3, 0, 8, 2, 0, 0, 0, 1 /**/, 3, 0, 8, 2, 0, 0, 65, 1 /**/, 3, 0, 8, 2, 0, 0, 65, 1}, 0}, // warm up
		{[]byte{3, 0, 0, 2, 0, 0, 0, 1 /**/, 3, 0, 0, 2, 0, 0, 0, 2 /**/, 3, 0, 0, 2, 0, 0, 0, 0}, 0},   // config
		{[]byte{48, 48, 48, 48, 48, 48, 48, 48 /**/, 48, 48, 56}, 0},                                    // half
	} {
		f.Add(seed.data, seed.n, uint64(i))
	}
	f.Fuzz(func(t *testing.T, data []byte, numUBatches uint32, seed uint64) {
		votes, impossible := fuzzVotes(data)
		n := int(numUBatches & math.MaxInt32)
		order := rand.New(rand.NewPCG(seed, 0)).Perm(len(votes))
		shuffled := make([]fwd.Vote, len(votes))
		for to, from := range order {
			shuffled[to] = votes[from]
		}
		if impossible {
			if got, err := fwd.Agree(votes, n); !errors.Is(err, fwd.ErrInvalid) || got.NumTokensAcrossDP != nil {
				t.Errorf("%+v agree on %+v, %v; want %v", votes, got, err, fwd.ErrInvalid)
			}
			return
		}
		a, agreed := fuzzAgree(t, votes, n)
		b, again := fuzzAgree(t, shuffled, n)
		if agreed != again {
			t.Errorf("%+v agree: %t, in another order: %t", votes, agreed, again)
		}
		if !agreed || !again {
			return
		}
		if a.GraphMode != b.GraphMode || a.UBatch != b.UBatch || a.Idle != b.Idle ||
			(a.LowestModeRank < 0) != (b.LowestModeRank < 0) {
			t.Errorf("%+v agree on %+v, in another order on %+v", votes, a, b)
		}
		for to, from := range order {
			if x, y := a.NumTokensAcrossDP.AtVec(from), b.NumTokensAcrossDP.AtVec(to); x != y {
				t.Errorf("rank %d of %+v runs %v tokens, as rank %d %v", from, votes, x, to, y)
			}
		}
		if votes[a.MaxTokensRank].NumTokensPadded != shuffled[b.MaxTokensRank].NumTokensPadded {
			t.Errorf("rank %d and, in another order, rank %d set the maximum of %+v",
				a.MaxTokensRank, b.MaxTokensRank, votes)
		}
	})
}

// fuzzAgree compares Agree over votes that can be, and reports whether they agree.
func fuzzAgree(t *testing.T, votes []fwd.Vote, n int) (fwd.Agreement, bool) {
	t.Helper()
	got, err := fwd.Agree(votes, n)
	if odd, wantErr := naiveFault(votes); wantErr != nil {
		var rankErr *fwd.RankError
		if !errors.As(err, &rankErr) || !errors.Is(err, wantErr) || !slices.Equal(rankErr.Ranks, odd) {
			t.Errorf("%+v: %v, want %v of the ranks %v", votes, err, wantErr, odd)
		}
		return got, false
	}
	if err != nil {
		t.Fatalf("%+v: %v", votes, err)
	}
	want, across := naiveAgree(votes, n)
	want.NumTokensAcrossDP = vec(across...)
	if diff := cmp.Diff(want, got, groupAgreement); diff != "" {
		t.Errorf("%+v on %d microbatches (-want +got):\n%s", votes, n, diff)
	}
	return got, true
}

func FuzzGraphModeText(f *testing.F) {
	for _, s := range []string{
		"NONE", "piecewise", "Full", "FULL_DECODE_ONLY", "full_and_piecewise", "", "FULL ", "FULL_AND", "ﬀull",
		"PıECEWISE", "GraphMode(9)", "\xff",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		names := []string{"NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}
		mode, err := fwd.ParseGraphMode(s)
		if i := slices.Index(names, strings.ToUpper(s)); err == nil && (i < 0 || int(mode) != i) {
			t.Errorf("%q is %v", s, mode)
		}
		ascii := strings.Map(func(r rune) rune {
			if 'a' <= r && r <= 'z' {
				r -= 'a' - 'A'
			}
			return r
		}, s)
		if err != nil && slices.Contains(names, ascii) {
			t.Errorf("%q: %v", s, err)
		}
		unmarshaled := fwd.GraphFullDecodeOnly
		if err := unmarshaled.UnmarshalText([]byte(s)); err != nil {
			if mode != fwd.GraphNone || unmarshaled != fwd.GraphFullDecodeOnly ||
				!errors.Is(err, fwd.ErrInvalid) || len(err.Error()) > 400 {
				t.Errorf("%q is %v, unmarshaled %v: %v", s, mode, unmarshaled, err)
			}
			return
		}
		text, err := mode.MarshalText()
		if err != nil || unmarshaled != mode || string(text) != mode.String() ||
			!strings.EqualFold(string(text), s) {
			t.Errorf("%q is %v, unmarshaled %v, and marshals to %q, %v", s, mode, unmarshaled, text, err)
		}
		if again, err := fwd.ParseGraphMode(string(text)); again != mode || err != nil {
			t.Errorf("%v marshals to %q, which is %v, %v", mode, text, again, err)
		}
	})
}

// naiveDispatcher has its keys in sets.
type naiveDispatcher struct {
	cfg     fwd.DispatcherConfig
	decode  fwd.GraphMode
	mixed   fwd.GraphMode
	cases   []int // of adapter counts
	counted []int // those above zero
	keys    map[fwd.GraphMode]map[fwd.BatchDescriptor]bool
}

func newNaiveDispatcher(cfg fwd.DispatcherConfig) *naiveDispatcher {
	cfg.UniformDecodeQueryLen = max(cfg.UniformDecodeQueryLen, 1)
	d := &naiveDispatcher{cfg: cfg, keys: map[fwd.GraphMode]map[fwd.BatchDescriptor]bool{
		fwd.GraphPiecewise: {}, fwd.GraphFull: {},
	}}
	switch cfg.Mode {
	case fwd.GraphFullDecodeOnly:
		d.decode, d.mixed = fwd.GraphFull, fwd.GraphNone
	case fwd.GraphFullAndPiecewise:
		d.decode, d.mixed = fwd.GraphFull, fwd.GraphPiecewise
	default:
		d.decode, d.mixed = cfg.Mode, cfg.Mode
	}
	if lora := cfg.LoRA; lora == nil {
		d.cases = []int{0}
	} else {
		if !lora.Unspecialized {
			d.cases = append(d.cases, 0)
		}
		if lora.SpecializeCount && !lora.Unspecialized {
			for k := 1; k <= lora.MaxLoRAs+1; k++ {
				if k&(k-1) == 0 && k != lora.MaxLoRAs+1 {
					d.counted = append(d.counted, k)
				}
			}
		}
		d.counted = append(d.counted, lora.MaxLoRAs+1)
		d.cases = append(d.cases, d.counted...)
	}
	if cfg.Mode == fwd.GraphNone {
		return d
	}
	for _, size := range cfg.CaptureSizes {
		for _, k := range d.cases {
			if d.mixed != fwd.GraphNone {
				d.keys[d.mixed][d.padded(size, false, k).RelaxForMixedBatchGraphs()] = true
			}
			q := cfg.UniformDecodeQueryLen
			if d.decode == fwd.GraphFull && d.mixed != fwd.GraphFull && size >= q && size <= q*cfg.MaxNumSeqs {
				d.keys[fwd.GraphFull][d.padded(size, true, k)] = true
			}
		}
	}
	return d
}

// padded is the padded descriptor of a batch; n is at most the largest capture size.
func (d *naiveDispatcher) padded(n int, uniform bool, k int) fwd.BatchDescriptor {
	p := 0
	for i := 0; n > 0 && p == 0; i++ {
		if d.cfg.CaptureSizes[i] >= n {
			p = d.cfg.CaptureSizes[i]
		}
	}
	b := fwd.BatchDescriptor{NumTokens: p, HasLoRA: k > 0, NumActiveLoRAs: k}
	if uniform && (d.decode == fwd.GraphFull || d.mixed == fwd.GraphFull) {
		b.NumReqs, b.Uniform = p/d.cfg.UniformDecodeQueryLen, true
	} else {
		b.NumReqs = min(p, d.cfg.MaxNumSeqs)
	}
	return b
}

func (d *naiveDispatcher) effective(k int) int {
	if k == 0 || d.cfg.LoRA == nil {
		return k
	}
	if !d.cfg.LoRA.SpecializeCount {
		return d.cfg.LoRA.MaxLoRAs + 1
	}
	for _, counted := range d.counted {
		if counted >= k {
			return counted
		}
	}
	return k
}

// lookup returns the key under which there is a full graph, and the one under which there is a piecewise
// graph.
func (d *naiveDispatcher) lookup(
	q fwd.DispatchQuery, k int,
) (full, piecewise fwd.BatchDescriptor, reason fwd.Reason) {
	exact := d.padded(q.NumTokens, q.UniformDecode, k)
	relaxed := exact.RelaxForMixedBatchGraphs()
	if d.keys[fwd.GraphFull][exact] {
		full, reason = exact, fwd.ReasonExact
	} else if d.keys[fwd.GraphFull][relaxed] {
		full, reason = relaxed, fwd.ReasonRelaxed
	}
	if d.keys[fwd.GraphPiecewise][relaxed] {
		piecewise = relaxed
	}
	return full, piecewise, reason
}

func (d *naiveDispatcher) dispatch(q fwd.DispatchQuery) (fwd.GraphMode, fwd.BatchDescriptor, fwd.Reason) {
	none, eager := fwd.BatchDescriptor{}, fwd.BatchDescriptor{NumTokens: q.NumTokens}
	if d.cfg.Mode == fwd.GraphNone {
		return fwd.GraphNone, eager, fwd.ReasonDisabled
	}
	if q.NumTokens > slices.Max(d.cfg.CaptureSizes) {
		return fwd.GraphNone, eager, fwd.ReasonTooLarge
	}
	full, piecewise, reason := d.lookup(q, d.effective(q.NumActiveLoRAs))
	if lora := d.cfg.LoRA; lora != nil && q.NumActiveLoRAs > lora.MaxLoRAs {
		full, piecewise = none, none
	}
	crowded := q.NumReqs > d.cfg.MaxNumSeqs
	excluded := fwd.ReasonTooLarge
	if q.ExcludeFull {
		excluded = fwd.ReasonFullExcluded
	}
	switch {
	case full != none && !q.ExcludeFull && !crowded:
		return fwd.GraphFull, full, reason
	case piecewise != none && full != none:
		return fwd.GraphPiecewise, piecewise, excluded
	case piecewise != none:
		return fwd.GraphPiecewise, piecewise, fwd.ReasonRelaxed
	case full != none:
		return fwd.GraphNone, eager, excluded
	}
	for _, k := range d.cases {
		if full, piecewise, _ := d.lookup(q, k); full != none || piecewise != none {
			return fwd.GraphNone, eager, fwd.ReasonLoRA
		}
	}
	return fwd.GraphNone, eager, fwd.ReasonNoKey
}

// checkFuzzCaptures checks that the captures are the naive dispatcher's keys, each once, in capture order.
func checkFuzzCaptures(t *testing.T, d *naiveDispatcher, captures []fwd.Capture) {
	t.Helper()
	got := map[fwd.GraphMode]map[fwd.BatchDescriptor]bool{fwd.GraphPiecewise: {}, fwd.GraphFull: {}}
	for i, c := range captures {
		if got[c.Mode] == nil || got[c.Mode][c.Batch] {
			t.Fatalf("%+v: capture %d, %+v, is of another mode or there twice", d.cfg, i, c)
		}
		got[c.Mode][c.Batch] = true
		if i == 0 {
			continue
		}
		before := captures[i-1]
		if before.Mode > c.Mode || before.Mode == c.Mode && before.Batch.NumTokens < c.Batch.NumTokens {
			t.Errorf("%+v: capture %d, %+v, comes before %+v", d.cfg, i-1, before, c)
		}
	}
	for mode, keys := range d.keys {
		if !maps.Equal(keys, got[mode]) {
			t.Errorf("%+v: captures of %v (-want +got):\n%s", d.cfg, mode, cmp.Diff(keys, got[mode]))
		}
	}
}

// fuzzDispatcher makes a configuration. Sizes are gaps between capture sizes. Of the LoRA byte the upper half
// says what kind, the lower one how many adapters.
func fuzzDispatcher(mode, queryLen uint8, sizes []byte, maxSeqs, lora uint8) (fwd.DispatcherConfig, int) {
	cfg := fwd.DispatcherConfig{
		Mode: fwd.GraphMode(mode % 5), MaxNumSeqs: int(maxSeqs), UniformDecodeQueryLen: int(queryLen%4) + 1,
	}
	if lora&0x70 != 0 {
		cfg.LoRA = &fwd.LoRAConfig{
			MaxLoRAs: int(lora&0xf) + 1, Unspecialized: lora&0x20 != 0, SpecializeCount: lora&0x10 != 0,
		}
	}
	step := 1
	if cfg.Mode >= fwd.GraphFull {
		step = cfg.UniformDecodeQueryLen
	}
	if lora&0x80 != 0 {
		step *= 64 // beyond any table
	}
	size := 0
	for _, b := range sizes[:min(len(sizes), 24)] {
		size += (int(b) + 1) * step
		cfg.CaptureSizes = append(cfg.CaptureSizes, size)
	}
	return cfg, step
}

// newFuzzDispatcher returns the dispatcher of a configuration, or nil if that must be refused and is.
func newFuzzDispatcher(t *testing.T, cfg fwd.DispatcherConfig) *fwd.Dispatcher {
	t.Helper()
	d, err := fwd.NewDispatcher(cfg)
	if cfg.Mode != fwd.GraphNone && (len(cfg.CaptureSizes) == 0 || cfg.MaxNumSeqs == 0) {
		if !errors.Is(err, fwd.ErrInvalid) {
			t.Errorf("%+v: %v", cfg, err)
		}
		return nil
	}
	if err != nil {
		t.Fatalf("%+v: %v", cfg, err)
	}
	return d
}

func FuzzDispatch(f *testing.F) {
	f.Add(uint8(4), uint8(0), []byte{1, 1, 2, 4, 8}, uint8(8), uint8(0),
		[]byte{5, 0, 1, 0, 0, 5, 0, 3, 0, 0, 5, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 1, 0, 0})
	f.Add(uint8(4), uint8(2), []byte{1, 2, 3}, uint8(2), uint8(0x13),
		[]byte{9, 0, 3, 2, 2, 3, 0, 1, 0, 3, 18, 0, 1, 9, 0})
	f.Add(uint8(3), uint8(1), []byte{1, 255, 8}, uint8(200), uint8(0x34),
		[]byte{2, 0, 1, 1, 0, 2, 0, 2, 3, 0, 2, 0, 3, 0, 0})
	f.Add(uint8(2), uint8(1), []byte{3, 4}, uint8(4), uint8(0x21),
		[]byte{4, 0, 1, 0, 4, 4, 0, 3, 1, 5, 4, 0, 1, 3, 0})
	f.Add(uint8(1), uint8(3), []byte{3, 4}, uint8(4), uint8(0x21),
		[]byte{4, 0, 1, 0, 5, 4, 0, 3, 1, 0, 7, 0, 0, 1, 0})
	f.Add(uint8(0), uint8(0), []byte{}, uint8(0), uint8(0), []byte{1, 0, 0, 0, 0})
	f.Add(uint8(1), uint8(0), []byte{250, 250, 250, 250}, uint8(1), uint8(0x80),
		[]byte{0xff, 0x1f, 0, 0, 0, 0x01, 0x20, 0, 0, 0, 0xff, 0xff, 0, 0, 0})
	f.Fuzz(func(t *testing.T, mode, queryLen uint8, sizes []byte, maxSeqs, lora uint8, calls []byte) {
		cfg, step := fuzzDispatcher(mode, queryLen, sizes, maxSeqs, lora)
		d := newFuzzDispatcher(t, cfg)
		if d == nil {
			return
		}
		naive := newNaiveDispatcher(cfg)
		captures := d.Captures()
		checkFuzzCaptures(t, naive, captures)
		size := 0
		if len(cfg.CaptureSizes) > 0 {
			size = slices.Max(cfg.CaptureSizes)
		}
		for ; len(calls) >= 5; calls = calls[5:] {
			q := fwd.DispatchQuery{
				NumTokens:     int(binary.LittleEndian.Uint16(calls)) % (size + 2*step + 1),
				UniformDecode: calls[2]&1 != 0, ExcludeFull: calls[2]&2 != 0, NumActiveLoRAs: int(calls[3] % 20),
				NumReqs: int(calls[4]),
			}
			mode, batch, reason := d.Dispatch(q)
			wantMode, wantBatch, wantReason := naive.dispatch(q)
			if mode != wantMode || batch != wantBatch || reason != wantReason {
				t.Errorf("%+v: Dispatch(%+v) = %v, %+v, %v; want %v, %+v, %v",
					cfg, q, mode, batch, reason, wantMode, wantBatch, wantReason)
			}
			if batch.NumTokens < q.NumTokens {
				t.Errorf("%+v: Dispatch(%+v) has %d tokens", cfg, q, batch.NumTokens)
			}
			if mode != fwd.GraphNone && !slices.Contains(captures, fwd.Capture{Mode: mode, Batch: batch}) {
				t.Errorf("%+v: Dispatch(%+v) = %v, %+v, which is not captured", cfg, q, mode, batch)
			}
		}
	})
}

// fewest is the smallest number of active adapters that finds graphs.
func (d *naiveDispatcher) fewest() int {
	if slices.Contains(d.cases, 0) {
		return 0
	}
	return 1
}

// gaps asks for every batch one by one.
func (d *naiveDispatcher) gaps() (gaps []fwd.Gap) {
	if d.cfg.Mode == fwd.GraphNone {
		return nil
	}
	q := d.cfg.UniformDecodeQueryLen
	for _, decode := range []bool{true, false} {
		step, promised, open := 1, d.mixed, false
		most := max(q*d.cfg.MaxNumSeqs, slices.Max(d.cfg.CaptureSizes))
		if decode {
			step, promised, most = q, d.decode, q*d.cfg.MaxNumSeqs
		}
		for n := step; n <= most; n += step {
			mode, _, reason := d.dispatch(fwd.DispatchQuery{
				NumTokens: n, UniformDecode: decode, NumActiveLoRAs: d.fewest(),
			})
			less := mode < promised
			if last := len(gaps) - 1; less && open && gaps[last].Mode == mode && gaps[last].Reason == reason {
				gaps[last].Tokens.Stop = n + 1
			} else if less {
				gap := fwd.Gap{Tokens: fwd.Range{Start: n, Stop: n + 1}, Decode: decode, Mode: mode, Reason: reason}
				gaps = append(gaps, gap)
			}
			open = less
		}
	}
	return gaps
}

func FuzzGaps(f *testing.F) {
	f.Add(uint8(4), uint8(0), []byte{0, 0, 1, 3, 31}, uint8(42), uint8(0))
	f.Add(uint8(3), uint8(2), []byte{0, 2}, uint8(9), uint8(0x13))
	f.Add(uint8(2), uint8(1), []byte{3, 4}, uint8(40), uint8(0x21))
	f.Add(uint8(1), uint8(3), []byte{2}, uint8(3), uint8(0x70))
	f.Add(uint8(4), uint8(3), []byte{9}, uint8(1), uint8(0))
	f.Add(uint8(0), uint8(0), []byte{1}, uint8(1), uint8(0))
	f.Fuzz(func(t *testing.T, mode, queryLen uint8, sizes []byte, maxSeqs, lora uint8) {
		cfg, _ := fuzzDispatcher(mode, queryLen, sizes[:min(len(sizes), 5)], maxSeqs, lora&0x7f)
		d := newFuzzDispatcher(t, cfg)
		if d == nil {
			return
		}
		if diff := cmp.Diff(newNaiveDispatcher(cfg).gaps(), d.Gaps()); diff != "" {
			t.Errorf("%+v: gaps (-want +got):\n%s", cfg, diff)
		}
	})
}

// naiveAgain is a further pass over the batch of an agreement: the vote of each rank, and whether there can
// be any.
func naiveAgain(d *naiveDispatcher, old []fwd.Vote, multiple int, oneToken bool) (votes []fwd.Vote, ok bool) {
	q := d.cfg.UniformDecodeQueryLen
	for _, v := range old {
		w := v
		w.Config, w.WarmUp, w.UBatch = 0, false, false
		if w.Idle {
			w = fwd.Vote{Step: v.Step, Note: v.Note, Idle: true, Uniform: true, NumTokens: q}
			w.NumActiveLoRAs = d.fewest()
		} else {
			if oneToken {
				w.NumTokens = v.NumReqs
			}
			if w.NumTokens == 0 {
				return nil, false
			}
			w.Uniform = (oneToken || v.Uniform) && w.NumTokens == q*v.NumReqs
		}
		for w.NumTokensPadded = w.NumTokens; w.NumTokensPadded%multiple != 0; w.NumTokensPadded++ {
		}
		w.GraphMode = fwd.GraphNone
		if !w.Eager {
			var batch fwd.BatchDescriptor
			w.GraphMode, batch, _ = d.dispatch(fwd.DispatchQuery{
				NumTokens: w.NumTokensPadded, NumReqs: w.NumReqs, UniformDecode: w.Uniform,
				NumActiveLoRAs: w.NumActiveLoRAs, ExcludeFull: w.ExcludeFull,
			})
			w.NumTokensPadded = batch.NumTokens
		}
		votes = append(votes, w)
	}
	return votes, true
}

// fuzzBatches makes the votes of 1 to 5 ranks, as a target's agreement has them, and a schedule of each.
func fuzzBatches(data []byte, oneToken bool) (votes []fwd.Vote, schedules []fwd.Schedule) {
	for len(votes) < 2 || len(data) > 0 && len(votes) < 5 {
		var b [4]byte
		data = data[copy(b[:], data):]
		v := fwd.Vote{
			Step: 7, NumReqs: int(b[0] % 40), NumActiveLoRAs: int(b[2] >> 6), Uniform: b[2]&1 != 0, Eager: b[2]&6 == 6,
			ExcludeFull: b[2]&8 != 0, Idle: b[2]&48 == 48, UBatch: true, Config: 5, Note: uint64(b[3]),
		}
		each := int(b[1]%5) + 1
		v.NumTokens = v.NumReqs * each
		v.NumTokensPadded = v.NumTokens + int(b[3])
		s := fwd.Schedule{AllowUBatches: true, OneTokenPerRequest: oneToken}
		if !v.Idle {
			if oneToken {
				each = 1
			}
			s.NumScheduledTokens = planRequests(v.NumReqs, each)
		}
		votes, schedules = append(votes, v), append(schedules, s)
	}
	return votes, schedules
}

func FuzzReuse(f *testing.F) {
	f.Add(uint8(4), uint8(0), []byte{0, 0, 1, 3, 7}, uint8(8), uint8(0),
		[]byte{3, 0, 1, 0, 7, 0, 1, 9}, uint8(0), true)
	f.Add(uint8(4), uint8(2), []byte{0, 0, 1, 3}, uint8(8), uint8(0x13),
		[]byte{3, 2, 1, 0, 2, 2, 129, 0}, uint8(0), false)
	f.Add(uint8(1), uint8(1), []byte{3, 7, 3}, uint8(9), uint8(0x21),
		[]byte{3, 2, 0, 0, 2, 2, 48, 0}, uint8(3), true)
	f.Add(uint8(2), uint8(0), []byte{3, 7, 3}, uint8(9), uint8(0),
		[]byte{3, 2, 6, 0, 2, 2, 8, 0}, uint8(1), false)
	f.Add(uint8(0), uint8(0), []byte{}, uint8(0), uint8(0), []byte{0, 0, 48, 0, 0, 0, 48, 0}, uint8(2), false)
	f.Add(uint8(4), uint8(0), []byte{0, 0, 1}, uint8(2), uint8(0),
		[]byte{0, 0, 1, 0, 7, 0, 1, 9}, uint8(0), true)
	f.Fuzz(func(
		t *testing.T, mode, queryLen uint8, sizes []byte, maxSeqs, lora uint8,
		data []byte, multiple uint8, oneToken bool,
	) {
		cfg, _ := fuzzDispatcher(mode, queryLen, sizes, maxSeqs, lora&0x7f)
		d := newFuzzDispatcher(t, cfg)
		if d == nil {
			return
		}
		parallel := fwd.ParallelConfig{NumUBatches: 2, PrefillUBatchThreshold: 1}
		parallel.TokenMultiple = int(multiple%8) + 1
		if _, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(d)); err != nil {
			parallel.TokenMultiple = 1 // its sizes are no multiples
		}
		old, schedules := fuzzBatches(data, oneToken)
		votes, ok := naiveAgain(newNaiveDispatcher(cfg), old, parallel.TokenMultiple, oneToken)
		for rank, s := range schedules {
			parallel.DataParallelSize, parallel.DataParallelRank = len(old), rank
			r, err := fwd.New(fwd.Config{Parallel: parallel}, fwd.WithDispatcher(d))
			if err != nil {
				t.Fatal(err)
			}
			s.Reuse = &fwd.Agreement{Step: 7, Votes: slices.Clone(old)}
			pass, err := r.Plan(t.Context(), s)
			if diff := cmp.Diff(old, s.Reuse.Votes); diff != "" {
				t.Errorf("the votes of the old agreement have changed:\n%s", diff)
			}
			if !ok {
				if !errors.Is(err, fwd.ErrInvalid) {
					t.Errorf("rank %d of %+v: %v, want %v", rank, old, err, fwd.ErrInvalid)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%+v: rank %d of %+v: %v", cfg, rank, old, err)
			}
			want, across := naiveAgree(votes, 0)
			want.NumTokensAcrossDP = vec(across...)
			if diff := cmp.Diff(&want, pass.Agreement, groupAgreement); diff != "" {
				t.Fatalf("%+v: rank %d of %+v (-want +got):\n%s", cfg, rank, old, diff)
			}
			if pass.NumTokens != across[rank] || pass.GraphMode != want.GraphMode || len(pass.UBatches) > 0 ||
				pass.NumTokensUnpadded > pass.NumTokensGraph || pass.NumTokensGraph > pass.NumTokens {
				t.Errorf("rank %d plans %+v, agreed %+v", rank, pass, want)
			}
		}
	})
}

func FuzzCaptureSizes(f *testing.F) {
	f.Add([]byte{1, 2, 4, 8, 16}, uint8(3), uint16(300))
	f.Add([]byte{7}, uint8(4), uint16(0))
	f.Add([]byte{9, 3, 3, 200, 198}, uint8(2), uint16(1))
	f.Add([]byte{}, uint8(0), uint16(257))
	f.Fuzz(func(t *testing.T, data []byte, multiple uint8, most uint16) {
		var sizes []int
		for _, b := range data[:min(len(data), 64)] {
			sizes = append(sizes, int(b))
		}
		input := slices.Clone(sizes)
		got, err := fwd.RoundCaptureSizes(sizes, int(multiple))
		if !slices.Equal(input, sizes) {
			t.Errorf("the input is now %v, was %v", sizes, input)
		}
		var want []int // every multiple that is the next one of some size
		for m := int(multiple); multiple > 0 && len(sizes) > 0 && m <= slices.Max(sizes); m += int(multiple) {
			if slices.ContainsFunc(sizes, func(size int) bool { return size > m-int(multiple) && size <= m }) {
				want = append(want, m)
			}
		}
		refused := multiple == 0 || slices.Contains(sizes, 0) || len(sizes) > 0 && len(want) == 0
		if refused != errors.Is(err, fwd.ErrInvalid) || refused && got != nil ||
			!refused && !slices.Equal(want, got) {
			t.Errorf("%v in multiples of %d: %v, %v; want %v, refused %t", sizes, multiple, got, err, want, refused)
		}

		want = nil
		for n := 1; n <= int(most); n++ {
			if n < 8 && n&(n-1) == 0 || n >= 8 && n < 256 && n%8 == 0 || n >= 256 && n%16 == 0 || n == int(most) {
				want = append(want, n)
			}
		}
		if got := fwd.DefaultCaptureSizes(int(most)); !slices.Equal(want, got) {
			t.Errorf("capture sizes up to %d: %v, want %v", most, got, want)
		}
	})
}
