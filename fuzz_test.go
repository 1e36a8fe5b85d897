// This file compares the package with second, naive implementations, on fuzzed input.

package fwd_test

import (
	"context"
	"encoding/binary"
	"errors"
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

// The second implementations in this file follow the formulas word by word: they search, count and build sets where the
// library calculates, in big integers where the library has to mind overflow.

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

// naiveChunked are min(c, v - c·i), and 1 where that is not above 0.
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
	f.Add(slices.Concat(most, most, []byte{1, 0, 0, 0}), uint8(1), uint8(7), uint32(math.MaxInt32-1), uint32(math.MaxInt32))
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
		m, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: len(tokens), DataParallelRank: rank}, tokens[rank], across)
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
			t.Errorf("chunk %d of at most %d of %v for SP size %d: %v, want -1 and %v", idx, maxChunk, tokens, sp, got, chunked)
		}
		cumulative := naiveCumulative(local)
		column := mat.NewDense(len(local), 2, nil).ColView(1).(*mat.VecDense) // a vector whose elements lie apart
		for _, dst := range []*mat.VecDense{nil, column} {
			if got := m.CuTokensAcrossSPTo(dst, sp); !sameVec(cumulative, got) {
				t.Errorf("cumulative tokens of %v for SP size %d: %v, want %v", tokens, sp, mat.Formatted(got.T()), cumulative)
			}
		}
		checkFuzzRounds(t, m, tokens, local, sp, maxChunk)
	})
}

// checkFuzzRounds checks the rounds of a layer: how many there are, and the rows of each. Only the first few are looked at.
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
		if chunk.Index != i || chunk.Keep != keep || naiveInt(chunk.Start).Cmp(wantStart) != 0 || naiveInt(chunk.End).Cmp(wantEnd) != 0 {
			t.Errorf("round %d of %v, at most %d for SP size %d: %+v, want rows %v to %v, keep %t", i, tokens, maxChunk, sp, chunk, wantStart, wantEnd, keep)
		}
		if keep {
			kept.Add(kept, naiveInt(chunk.End-chunk.Start))
		}
		if got, ok := fwd.LocalSizes(inner); !ok || !sameInts(naiveChunked(local, maxChunk, i), got) {
			t.Errorf("round %d of %v, at most %d for SP size %d: local sizes %v (%t)", i, tokens, maxChunk, sp, got, ok)
		}
		if i++; i == most {
			return
		}
	}
	if naiveInt(i).Cmp(wantChunks) != 0 || kept.Cmp(n) != 0 {
		t.Errorf("%d rounds over %v, at most %d for SP size %d, keep %v rows, want %v rounds and %v rows", i, tokens, maxChunk, sp, kept, wantChunks, n)
	}
}

// naiveSplit cuts a batch by the array of cumulative starts. It returns nil where a slice would be empty.
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
		slices = append(slices, fwd.UBatchSlice{Requests: fwd.Range{Start: first, Stop: stop}, Tokens: fwd.Range{Start: start, Stop: end}})
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
		padded, reqsPadded, n, splitPoint := total+int(moreTokens), len(scheduled)+int(moreReqs), int(nByte%40), int(split)
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
				t.Errorf("a split of %v, padded to %d, into %d at %d with an empty slice: %v, %v, %v", scheduled, padded, n, splitPoint, got, gotPadded, err)
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
				t.Errorf("slice %d, %v, of %v: request %d at token %d shares tokens %t, is there %t", k, s, scheduled, req, start, shared, has)
			}
			start += tokens
		}
	}
	if next != total || sum != total {
		t.Errorf("slices %v end at %d with %d tokens, want %d", ubatches, next, sum, total)
	}
}

// naiveAgree is the agreement by its four rules, tokens across DP as a plain list.
func naiveAgree(votes []fwd.Vote, n int) (want fwd.Agreement, across []int) {
	var us, ps []int
	var modes []fwd.GraphMode
	all := true
	for _, v := range votes {
		us, ps, modes = append(us, v.NumTokens), append(ps, v.NumTokensPadded), append(modes, v.GraphMode)
		all = all && v.UBatch
	}
	maxPadded, lowest := slices.Max(ps), slices.Min(modes)
	want = fwd.Agreement{Step: votes[0].Step, GraphMode: lowest, MaxTokensRank: slices.Index(ps, maxPadded), LowestModeRank: -1}
	if slices.Max(modes) != lowest {
		want.LowestModeRank = slices.Index(modes, lowest)
	}
	if all && n >= 2 {
		last := new(big.Int).Mul(naiveInt(maxPadded/n), naiveInt(n-1)) // where the last microbatch starts
		want.UBatch = last.Cmp(naiveInt(slices.Min(us))) < 0
	}
	for _, p := range ps {
		if lowest != fwd.GraphNone || want.UBatch {
			p = maxPadded
		}
		across = append(across, p)
	}
	return want, across
}

// fuzzVotes makes 1 to 16 votes out of data, and says which errors they deserve.
func fuzzVotes(data []byte) (votes []fwd.Vote, bad []error) {
	for len(votes) == 0 || len(data) > 0 && len(votes) < 16 {
		var b [6]byte
		data = data[copy(b[:], data):]
		v := fwd.Vote{Step: 3, NumTokens: int(binary.LittleEndian.Uint16(b[:])), UBatch: b[2]&1 == 0, GraphMode: fwd.GraphMode(b[3] % 3)}
		if b[2]&2 != 0 {
			v.NumTokens <<= 14
		}
		v.NumTokensPadded = v.NumTokens + int(b[4])
		switch b[5] {
		case 255:
			v.NumTokensPadded = v.NumTokens - 1
			bad = append(bad, fwd.ErrInvalid)
		case 254:
			v.GraphMode = fwd.GraphFullAndPiecewise
			bad = append(bad, fwd.ErrInvalid)
		case 253:
			v.Step++
		}
		if len(votes) > 0 && votes[0].Step != v.Step {
			bad = append(bad, fwd.ErrLockstep)
		}
		votes = append(votes, v)
	}
	return votes, bad
}

func FuzzAgree(f *testing.F) {
	f.Add([]byte{16, 0, 0, 2, 0, 0 /**/, 12, 0, 0, 1, 4, 0 /**/, 16, 0, 0, 2, 0, 0}, uint32(2), uint64(1))
	f.Add([]byte{0, 1, 0, 0, 0, 0 /**/, 9, 0, 0, 0, 9, 0}, uint32(2), uint64(2))
	f.Add([]byte{64, 0, 0, 0, 0, 0 /**/, 64, 0, 0, 0, 0, 0}, uint32(4), uint64(3))
	f.Add([]byte{64, 0, 1, 0, 0, 0 /**/, 64, 0, 0, 2, 0, 0}, uint32(4), uint64(4))
	f.Add([]byte{255, 255, 2, 0, 255, 0 /**/, 255, 255, 2, 0, 1, 0}, uint32(math.MaxInt32), uint64(5))
	f.Add([]byte{3, 0, 0, 0, 0, 255 /**/, 3, 0, 0, 0, 0, 253}, uint32(0), uint64(6))
	f.Add([]byte{3, 0, 0, 0, 0, 0 /**/, 3, 0, 0, 0, 0, 253}, uint32(1), uint64(7))
	f.Add([]byte{3, 0, 0, 0, 0, 254}, uint32(1), uint64(8))
	f.Add([]byte{8, 0, 0, 0, 8, 0 /**/, 16, 0, 0, 0, 0, 0}, uint32(2), uint64(9)) // the last microbatch would just be empty
	f.Add([]byte{3, 0, 0, 2, 0, 0 /**/, 3, 0, 0, 1, 0, 0 /**/, 3, 0, 0, 1, 0, 0}, uint32(2), uint64(10))
	f.Fuzz(func(t *testing.T, data []byte, numUBatches uint32, seed uint64) {
		votes, bad := fuzzVotes(data)
		n := int(numUBatches & math.MaxInt32)
		order := rand.New(rand.NewPCG(seed, 0)).Perm(len(votes))
		shuffled := make([]fwd.Vote, len(votes))
		for to, from := range order {
			shuffled[to] = votes[from]
		}
		for _, votes := range [][]fwd.Vote{votes, shuffled} {
			got, err := fwd.Agree(votes, n)
			if len(bad) > 0 {
				if !slices.ContainsFunc(bad, func(want error) bool { return errors.Is(err, want) }) || got.NumTokensAcrossDP != nil {
					t.Errorf("%+v agree on %+v, %v; want one of %v", votes, got, err, bad)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%+v: %v", votes, err)
			}
			want, across := naiveAgree(votes, n)
			if diff := cmp.Diff(across, counts(got.NumTokensAcrossDP)); diff != "" {
				t.Errorf("%+v: tokens across DP (-want +got):\n%s", votes, diff)
			}
			got.NumTokensAcrossDP = nil
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%+v: agreement (-want +got):\n%s", votes, diff)
			}
		}
		if len(bad) > 0 {
			return
		}
		a, _ := fwd.Agree(votes, n)
		b, _ := fwd.Agree(shuffled, n)
		if a.GraphMode != b.GraphMode || a.UBatch != b.UBatch || (a.LowestModeRank < 0) != (b.LowestModeRank < 0) {
			t.Errorf("%+v agree on %+v, in another order on %+v", votes, a, b)
		}
		for to, from := range order {
			if a.NumTokensAcrossDP.AtVec(from) != b.NumTokensAcrossDP.AtVec(to) {
				t.Errorf("rank %d of %+v runs %v tokens, as rank %d %v", from, votes, a.NumTokensAcrossDP.AtVec(from), to, b.NumTokensAcrossDP.AtVec(to))
			}
		}
		if votes[a.MaxTokensRank].NumTokensPadded != shuffled[b.MaxTokensRank].NumTokensPadded {
			t.Errorf("rank %d and, in another order, rank %d set the maximum of %+v", a.MaxTokensRank, b.MaxTokensRank, votes)
		}
	})
}

func FuzzGraphModeText(f *testing.F) {
	for _, s := range []string{"NONE", "piecewise", "Full", "FULL_DECODE_ONLY", "full_and_piecewise", "", "FULL ", "FULL_AND", "ﬀull", "PıECEWISE", "GraphMode(9)", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		names := []string{"NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}
		mode, err := fwd.ParseGraphMode(s)
		if i := slices.Index(names, strings.ToUpper(s)); i < 0 && err == nil || i >= 0 && err == nil && int(mode) != i {
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
			if mode != fwd.GraphNone || unmarshaled != fwd.GraphFullDecodeOnly || !errors.Is(err, fwd.ErrInvalid) || len(err.Error()) > 400 {
				t.Errorf("%q is %v, unmarshaled %v: %v", s, mode, unmarshaled, err)
			}
			return
		}
		text, err := mode.MarshalText()
		if err != nil || unmarshaled != mode || string(text) != mode.String() || !strings.EqualFold(string(text), s) {
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
	d := &naiveDispatcher{cfg: cfg, keys: map[fwd.GraphMode]map[fwd.BatchDescriptor]bool{fwd.GraphPiecewise: {}, fwd.GraphFull: {}}}
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
			if d.decode == fwd.GraphFull && d.mixed != fwd.GraphFull && size >= cfg.UniformDecodeQueryLen && size <= cfg.UniformDecodeQueryLen*cfg.MaxNumSeqs {
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

// lookup returns the key under which there is a full graph, and the one under which there is a piecewise graph.
func (d *naiveDispatcher) lookup(q fwd.DispatchQuery, k int) (full, piecewise fwd.BatchDescriptor, reason fwd.Reason) {
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
	switch {
	case full != none && !q.ExcludeFull:
		return fwd.GraphFull, full, reason
	case piecewise != none && full != none:
		return fwd.GraphPiecewise, piecewise, fwd.ReasonFullExcluded
	case piecewise != none:
		return fwd.GraphPiecewise, piecewise, fwd.ReasonRelaxed
	case full != none:
		return fwd.GraphNone, eager, fwd.ReasonFullExcluded
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
		if before := captures[i-1]; before.Mode > c.Mode || before.Mode == c.Mode && before.Batch.NumTokens < c.Batch.NumTokens {
			t.Errorf("%+v: capture %d, %+v, comes before %+v", d.cfg, i-1, before, c)
		}
	}
	for mode, keys := range d.keys {
		if !maps.Equal(keys, got[mode]) {
			t.Errorf("%+v: captures of %v (-want +got):\n%s", d.cfg, mode, cmp.Diff(keys, got[mode]))
		}
	}
}

func FuzzDispatch(f *testing.F) {
	f.Add(uint8(4), uint8(0), []byte{1, 1, 2, 4, 8}, uint8(8), uint8(0), []byte{5, 0, 1, 0, 5, 0, 3, 0, 5, 0, 0, 0, 17, 0, 0, 0, 0, 0, 1, 0})
	f.Add(uint8(4), uint8(2), []byte{1, 2, 3}, uint8(2), uint8(0x13), []byte{9, 0, 3, 2, 3, 0, 1, 0, 18, 0, 1, 9})
	f.Add(uint8(3), uint8(1), []byte{1, 255, 8}, uint8(200), uint8(0x34), []byte{2, 0, 1, 1, 2, 0, 2, 3, 2, 0, 3, 0})
	f.Add(uint8(2), uint8(1), []byte{3, 4}, uint8(4), uint8(0x21), []byte{4, 0, 1, 0, 4, 0, 3, 1})
	f.Add(uint8(1), uint8(3), []byte{3, 4}, uint8(4), uint8(0x21), []byte{4, 0, 1, 0, 4, 0, 3, 1, 7, 0, 0, 1})
	f.Add(uint8(0), uint8(0), []byte{}, uint8(0), uint8(0), []byte{1, 0, 0, 0})
	f.Add(uint8(1), uint8(0), []byte{250, 250, 250, 250}, uint8(1), uint8(0x80), []byte{0xff, 0x1f, 0, 0, 0x01, 0x20, 0, 0, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, mode, queryLen uint8, sizes []byte, maxSeqs, lora uint8, calls []byte) {
		cfg := fwd.DispatcherConfig{Mode: fwd.GraphMode(mode % 5), MaxNumSeqs: int(maxSeqs), UniformDecodeQueryLen: int(queryLen%4) + 1}
		// The upper half of the LoRA byte says what kind, the lower how many adapters.
		if lora&0x70 != 0 {
			cfg.LoRA = &fwd.LoRAConfig{MaxLoRAs: int(lora&0xf) + 1, Unspecialized: lora&0x20 != 0, SpecializeCount: lora&0x10 != 0}
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
		d, err := fwd.NewDispatcher(cfg)
		if cfg.Mode != fwd.GraphNone && (len(cfg.CaptureSizes) == 0 || cfg.MaxNumSeqs == 0) {
			if !errors.Is(err, fwd.ErrInvalid) {
				t.Errorf("%+v: %v", cfg, err)
			}
			return
		}
		if err != nil {
			t.Fatalf("%+v: %v", cfg, err)
		}
		naive := newNaiveDispatcher(cfg)
		captures := d.Captures()
		checkFuzzCaptures(t, naive, captures)
		for ; len(calls) >= 4; calls = calls[4:] {
			q := fwd.DispatchQuery{
				NumTokens:     int(binary.LittleEndian.Uint16(calls)) % (size + 2*step + 1),
				UniformDecode: calls[2]&1 != 0, ExcludeFull: calls[2]&2 != 0, NumActiveLoRAs: int(calls[3] % 20),
			}
			mode, batch, reason := d.Dispatch(q)
			wantMode, wantBatch, wantReason := naive.dispatch(q)
			if mode != wantMode || batch != wantBatch || reason != wantReason {
				t.Errorf("%+v: Dispatch(%+v) = %v, %+v, %v; want %v, %+v, %v", cfg, q, mode, batch, reason, wantMode, wantBatch, wantReason)
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
		if refused != errors.Is(err, fwd.ErrInvalid) || !refused && !slices.Equal(want, got) || refused && got != nil {
			t.Errorf("%v in multiples of %d: %v, %v; want %v, refused %t", sizes, multiple, got, err, want, refused)
		}

		want = nil
		for n := 1; n <= int(most); n++ {
			if n < 8 && n&(n-1) == 0 || n >= 8 && n < 256 && n%8 == 0 || n >= 256 && n%16 == 0 {
				want = append(want, n)
			}
		}
		if got := fwd.DefaultCaptureSizes(int(most)); !slices.Equal(want, got) {
			t.Errorf("capture sizes up to %d: %v, want %v", most, got, want)
		}
	})
}
