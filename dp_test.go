// This file tests the token counts of data-parallel ranks and the sizes derived from them.

package fwd_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gonum.org/v1/gonum/mat"

	"github.com/forwardctx/fwd"
)

func TestDPMetadataVectors(t *testing.T) {
	type vector struct {
		Tokens     []int     `json:"num_tokens_across_dp"`
		SP         int       `json:"sp_size"`
		MaxChunk   int       `json:"max_chunk_size_per_rank"`
		ChunkIndex int       `json:"chunk_idx"`
		WantMax    int       `json:"want_max_tokens_across_dp"`
		WantLocal  []int     `json:"want_sp_local_sizes"`
		WantChunk  []int     `json:"want_chunked_sizes"`
		WantCu     []float64 `json:"want_cu_tokens_across_sp"` // beyond an int of 32 bits
	}
	for i, v := range readVectors[vector](t, "dp_metadata.json", 60) {
		parallel := fwd.ParallelConfig{DataParallelSize: len(v.Tokens)}
		m, err := fwd.NewDPMetadata(parallel, v.Tokens[0], vec(v.Tokens...))
		if err != nil {
			t.Errorf("case %d: %v", i, err)
			continue
		}
		got := vector{
			counts(m.NumTokensAcrossDPTo(nil)), v.SP, v.MaxChunk, v.ChunkIndex, m.MaxTokensAcrossDP(),
			m.AppendSPLocalSizes(nil, v.SP), m.AppendChunkedSizes(nil, v.SP, v.MaxChunk, v.ChunkIndex),
			m.CuTokensAcrossSPTo(nil, v.SP).RawVector().Data,
		}
		if diff := cmp.Diff(v, got); diff != "" {
			t.Errorf("case %d (-want +got):\n%s", i, diff)
		}
	}
}

const dpMax = math.MaxInt32 // the largest count of a rank

// dpContext is a context in a pass of a rank among ranks with these tokens.
func dpContext(t *testing.T, rank int, tokens ...int) context.Context {
	t.Helper()
	fc := &fwd.ForwardContext{NumTokens: tokens[rank], DP: dpMetadata(t, rank, tokens...)}
	return fwd.NewContext(t.Context(), fc)
}

// dpChunk is a round without its sizes.
type dpChunk struct {
	Index, Start, Stop int
	Keep               bool
}

func dpChunkOf(c fwd.Chunk) dpChunk { return dpChunk{c.Index, c.Rows.Start, c.Rows.Stop, c.Keep} }

// dpSizes reads the local sizes of ctx.
func dpSizes(t *testing.T, ctx context.Context) []int {
	t.Helper()
	sizes, ok := fwd.LocalSizes(ctx)
	if !ok {
		t.Fatal("there are no local sizes")
	}
	return sizes
}

func TestDPMetadataIsACopy(t *testing.T) {
	t.Parallel()
	across := vec(3, 4)
	m, err := fwd.NewDPMetadata(fwd.ParallelConfig{DataParallelSize: 2, DataParallelRank: 1}, 4, across)
	if err != nil {
		t.Fatal(err)
	}
	across.SetVec(0, 99)
	m.NumTokensAcrossDPTo(nil).SetVec(1, 99)
	got := []int{m.Size(), m.Rank(), m.NumTokens(0), m.NumTokens(1), m.MaxTokensAcrossDP()}
	got = append(got, counts(m.NumTokensAcrossDPTo(nil))...)
	if diff := cmp.Diff([]int{2, 1, 3, 4, 4, 3, 4}, got); diff != "" {
		t.Errorf("the metadata has changed (-want +got):\n%s", diff)
	}
}

// The classic mistake, padded against unpadded: the error shows the rank and both numbers.
func TestDPMetadataMismatch(t *testing.T) {
	t.Parallel()
	parallel := fwd.ParallelConfig{DataParallelSize: 3, DataParallelRank: 2}
	_, err := fwd.NewDPMetadata(parallel, 57, vec(64, 64, 63))
	if !errors.Is(err, fwd.ErrTokenMismatch) {
		t.Fatalf("error %v, want %v", err, fwd.ErrTokenMismatch)
	}
	want := "rank 2 runs 57 tokens, but the counts across ranks say 63"
	if !strings.Contains(err.Error(), want) {
		t.Errorf("the error is %q, want it to say %q", err, want)
	}
	// In this order: present, as many as ranks, the own count, every count. A later mistake does not hide
	// an earlier one.
	for _, tt := range []struct {
		across *mat.VecDense
		want   error
	}{
		{nil, fwd.ErrInvalid},
		{vec(1, 1), fwd.ErrInvalid},
		{mat.NewVecDense(3, []float64{-1, 0.5, 63}), fwd.ErrTokenMismatch},
		{mat.NewVecDense(3, []float64{-1, 0.5, 57}), fwd.ErrInvalid},
	} {
		_, err := fwd.NewDPMetadata(parallel, 57, tt.across)
		if !errors.Is(err, tt.want) {
			t.Errorf("%v: error %v, want %v", tt.across, err, tt.want)
		}
	}
}

// dpExact recomputes one metadata with big integers.
func dpExact(t *testing.T, tokens []int, sp, maxChunk, idx int) {
	t.Helper()
	m := dpMetadata(t, 0, tokens...)
	size := len(tokens) * sp
	local, chunk := m.AppendSPLocalSizes(nil, sp), m.AppendChunkedSizes(nil, sp, maxChunk, idx)
	cu := m.CuTokensAcrossSPTo(nil, sp)
	if len(local) != size || len(chunk) != size || cu.Len() != size {
		t.Fatalf("%d local sizes, %d chunk sizes, %d sums; want %d", len(local), len(chunk), cu.Len(), size)
	}
	big1 := big.NewInt(1)
	sum, most, largest := new(big.Int), new(big.Int), new(big.Int)
	for i := range size {
		n := big.NewInt(int64(tokens[i/sp]))
		if n.Cmp(most) > 0 {
			most.Set(n)
		}
		v, rest := new(big.Int).QuoRem(n, big.NewInt(int64(sp)), new(big.Int))
		if rest.Sign() > 0 {
			v.Add(v, big1)
		}
		if v.Cmp(largest) > 0 {
			largest.Set(v)
		}
		if v.Cmp(big.NewInt(int64(local[i]))) != 0 {
			t.Fatalf("local size %d is %d, want %v", i, local[i], v)
		}
		sum.Add(sum, v)
		if got, accuracy := big.NewFloat(cu.AtVec(i)).Int(nil); accuracy != big.Exact || got.Cmp(sum) != 0 {
			t.Fatalf("sum %d is %v, want %v", i, cu.AtVec(i), sum)
		}
		r := new(big.Int).Mul(big.NewInt(int64(maxChunk)), big.NewInt(int64(idx)))
		r.Sub(v, r)
		if c := big.NewInt(int64(maxChunk)); r.Cmp(c) > 0 {
			r = c
		}
		if r.Sign() <= 0 {
			r = big1
		}
		if r.Cmp(big.NewInt(int64(chunk[i]))) != 0 {
			t.Fatalf("size %d in chunk %d of %d is %d, want %v", i, idx, maxChunk, chunk[i], r)
		}
	}
	if most.Cmp(big.NewInt(int64(m.MaxTokensAcrossDP()))) != 0 {
		t.Errorf("the maximum is %d, want %v", m.MaxTokensAcrossDP(), most)
	}
	chunks, rest := new(big.Int).QuoRem(largest, big.NewInt(int64(maxChunk)), new(big.Int))
	if rest.Sign() > 0 {
		chunks.Add(chunks, big1)
	}
	if chunks.Cmp(big.NewInt(int64(m.NumChunks(sp, maxChunk)))) != 0 {
		t.Errorf("%d chunks of at most %d, want %v", m.NumChunks(sp, maxChunk), maxChunk, chunks)
	}
}

// Everything holds exactly for 1,024 ranks of up to 2^31-1 tokens and SP size 8.
func TestDPExact(t *testing.T) {
	t.Parallel()
	const size, sp = 1024, 8
	random := rand.New(rand.NewPCG(1, 2))
	same, mixed := make([]int, size), make([]int, size)
	for d := range size {
		same[d] = dpMax
		mixed[d] = dpMax - random.IntN(5)
		if d%7 == 0 {
			mixed[d] = random.IntN(3)
		}
		if d%11 == 0 {
			mixed[d] = random.IntN(dpMax)
		}
	}
	for _, tokens := range [][]int{same, mixed} {
		for _, maxChunk := range []int{1, 7, 4096, 1<<28 - 1, 1 << 28, dpMax, math.MaxInt} {
			for _, idx := range []int{0, 1, 3, 1 << 20, dpMax, math.MaxInt} {
				dpExact(t, tokens, sp, maxChunk, idx)
			}
		}
	}
	for range 200 {
		tokens := make([]int, 1+random.IntN(9))
		for d := range tokens {
			tokens[d] = random.IntN(40)
		}
		dpExact(t, tokens, 1+random.IntN(9), 1+random.IntN(9), random.IntN(9))
	}
}

// What Append... appends to, and ...To writes to, stays the caller's.
func TestDPAppendTo(t *testing.T) {
	t.Parallel()
	m := dpMetadata(t, 0, 5, 0, 3)
	prefix := []int{-1, -2}
	if diff := cmp.Diff([]int{-1, -2, 3, 3, 0, 0, 2, 2}, m.AppendSPLocalSizes(prefix, 2)); diff != "" {
		t.Errorf("AppendSPLocalSizes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]int{-1, -2, 1, 1, 1, 1, 1, 1}, m.AppendChunkedSizes(prefix, 2, 2, 1)); diff != "" {
		t.Errorf("AppendChunkedSizes (-want +got):\n%s", diff)
	}
	parent := mat.NewDense(6, 2, nil) // a column of it has increment 2
	column := parent.ColView(1).(*mat.VecDense)
	if got := m.CuTokensAcrossSPTo(column, 2); got != column {
		t.Error("CuTokensAcrossSPTo does not return dst")
	}
	for i, want := range []float64{3, 6, 6, 6, 8, 10} {
		if parent.At(i, 1) != want || parent.At(i, 0) != 0 {
			t.Errorf("row %d is %v, %v; want 0, %v", i, parent.At(i, 0), parent.At(i, 1), want)
		}
	}
	var empty mat.VecDense
	if diff := cmp.Diff([]int{5, 0, 3}, counts(m.NumTokensAcrossDPTo(&empty))); diff != "" || empty.Len() != 3 {
		t.Errorf("into an empty dst (-want +got):\n%s", diff)
	}
	column = mat.NewDense(3, 2, nil).ColView(1).(*mat.VecDense)
	if diff := cmp.Diff([]int{5, 0, 3}, counts(m.NumTokensAcrossDPTo(column))); diff != "" {
		t.Errorf("into a column (-want +got):\n%s", diff)
	}
}

// Local sizes are a property of the derived context alone.
func TestLocalSizesAreInDerivedContexts(t *testing.T) {
	t.Parallel()
	outside := t.Context()
	dpNoSizes(t, "outside a pass", outside)
	pass := dpContext(t, 1, 8, 5, 0)
	dpNoSizes(t, "in the pass", pass)
	type key struct{}
	below := context.WithValue(pass, key{}, "value")

	sp, err := fwd.WithSPLocalSizes(below, 2)
	if err != nil {
		t.Fatal(err)
	}
	chunk, err := fwd.WithChunkedSizes(sp, 2, 3, 1)
	if err != nil {
		t.Fatal(err)
	}
	again, err := fwd.WithSPLocalSizes(chunk, 1)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		dpNoSizes(t, "in the pass, beside derived contexts", pass)
		dpNoSizes(t, "below the pass, beside derived contexts", below)
		for _, tt := range []struct {
			ctx  context.Context
			want []int
		}{
			{sp, []int{4, 4, 3, 3, 0, 0}},
			{context.WithValue(sp, key{}, "below"), []int{4, 4, 3, 3, 0, 0}},
			{chunk, []int{1, 1, 1, 1, 1, 1}},
			{again, []int{8, 5, 0}},
		} {
			if diff := cmp.Diff(tt.want, dpSizes(t, tt.ctx)); diff != "" {
				t.Errorf("local sizes (-want +got):\n%s", diff)
			}
			if fwd.MustFromContext(tt.ctx) != fwd.MustFromContext(pass) {
				t.Error("the derived context has another forward context")
			}
			if tt.ctx.Value(key{}) == nil {
				t.Error("the derived context has lost a value of its parent")
			}
		}
	}
	ctx, cancel := context.WithCancel(pass)
	sp, err = fwd.WithSPLocalSizes(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	if cancel(); sp.Err() == nil {
		t.Error("the derived context does not end with its parent")
	}
}

// Without DP metadata the pass counts as one rank with its own tokens.
func TestLocalSizesWithoutDP(t *testing.T) {
	t.Parallel()
	ctx := fwd.NewContext(t.Context(), &fwd.ForwardContext{NumTokens: 7, NumTokensUnpadded: 5})
	sp, err := fwd.WithSPLocalSizes(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{4, 4}, dpSizes(t, sp)); diff != "" {
		t.Errorf("SP local sizes (-want +got):\n%s", diff)
	}
	chunk, err := fwd.WithChunkedSizes(ctx, 1, 3, 2)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{1}, dpSizes(t, chunk)); diff != "" {
		t.Errorf("chunk sizes (-want +got):\n%s", diff)
	}
	var got []dpChunk
	chunks, err := fwd.Chunks(ctx, 1, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		got = append(got, dpChunkOf(c))
	}
	if diff := cmp.Diff([]dpChunk{{0, 0, 3, true}, {1, 3, 6, true}, {2, 6, 7, true}}, got); diff != "" {
		t.Errorf("chunks (-want +got):\n%s", diff)
	}
	empty := fwd.NewContext(t.Context(), &fwd.ForwardContext{})
	chunks, err = fwd.Chunks(empty, 1, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		t.Errorf("a pass without tokens has chunk %+v", c)
	}
	for name, ctx := range map[string]context.Context{
		"outside": t.Context(), "hidden": fwd.NewContext(ctx, nil),
	} {
		_, err1 := fwd.WithSPLocalSizes(ctx, 1)
		_, err2 := fwd.WithChunkedSizes(ctx, 1, 1, 0)
		_, err3 := fwd.Chunks(ctx, 1, 1)
		for _, err := range []error{err1, err2, err3} {
			if !errors.Is(err, fwd.ErrNoForwardContext) {
				t.Errorf("%s a pass: %v, want %v", name, err, fwd.ErrNoForwardContext)
			}
		}
	}
}

// Over all ranks every row is kept exactly once, the ranks have the same rounds with the same sizes, and
// what a rank computes is what the others think that it sends.
func TestChunks(t *testing.T) {
	t.Parallel()
	for _, tokens := range [][]int{
		{10, 4, 0, 7}, {1, 0, 0}, {0, 1}, {64, 64}, {0, 0}, {33}, {9, 1, 8, 2, 7, 3},
	} {
		for _, sp := range []int{1, 2, 3} {
			for _, maxChunk := range []int{1, 2, 3, 4, 10, 11, 1000, math.MaxInt} {
				t.Run(fmt.Sprintf("%v/sp=%d/chunk=%d", tokens, sp, maxChunk), func(t *testing.T) {
					dpCheckChunks(t, tokens, sp, maxChunk)
				})
			}
		}
	}
}

func dpCheckChunks(t *testing.T, tokens []int, sp, maxChunk int) {
	want := dpMetadata(t, 0, tokens...).NumChunks(sp, maxChunk)
	for rank := range tokens {
		ctx := dpContext(t, rank, tokens...)
		local := (tokens[rank] + sp - 1) / sp
		kept := make([]int, local)
		chunks, err := fwd.Chunks(ctx, sp, maxChunk)
		if err != nil {
			t.Fatal(err)
		}
		rounds := 0
		for chunkCtx, c := range chunks {
			if c.Index != rounds {
				t.Errorf("rank %d: round %d has index %d", rank, rounds, c.Index)
			}
			rounds++
			sizes := dpSizes(t, chunkCtx)
			wantSizes := dpMetadata(t, 0, tokens...).AppendChunkedSizes(nil, sp, maxChunk, c.Index)
			if diff := cmp.Diff(wantSizes, sizes); diff != "" {
				t.Errorf("rank %d: sizes of round %d (-want +got):\n%s", rank, c.Index, diff)
			}
			if diff := cmp.Diff(sizes, c.Sizes); diff != "" {
				t.Errorf("rank %d: round %d has other sizes than its context:\n%s", rank, c.Index, diff)
			}
			if own := sizes[rank*sp]; c.Rows.Len() != own {
				t.Errorf("rank %d computes %v in round %d, and the sizes say %d", rank, c.Rows, c.Index, own)
			}
			if c.Rows.Start < 0 || c.Rows.Len() < 1 || c.Rows.Stop > max(local, 1) {
				t.Errorf("rank %d has rows %v of %d in round %d", rank, c.Rows, local, c.Index)
			}
			if c.Keep {
				for row := c.Rows.Start; row < c.Rows.Stop; row++ {
					kept[row]++
				}
			}
			if fwd.MustFromContext(chunkCtx) != fwd.MustFromContext(ctx) {
				t.Errorf("rank %d: round %d is in another pass", rank, c.Index)
			}
		}
		if rounds != want {
			t.Errorf("rank %d has %d rounds, want %d", rank, rounds, want)
		}
		for row, n := range kept {
			if n != 1 {
				t.Errorf("rank %d keeps row %d of %d %d times", rank, row, local, n)
			}
		}
		dpNoSizes(t, "after the rounds", ctx)
	}
}

// The rounds of ranks with unequal counts, written out.
func TestChunksLockstep(t *testing.T) {
	t.Parallel()
	for rank, want := range [][]dpChunk{
		{{0, 0, 4, true}, {1, 4, 8, true}, {2, 8, 10, true}},
		{{0, 0, 4, true}, {1, 3, 4, false}, {2, 3, 4, false}},
		{{0, 0, 1, false}, {1, 0, 1, false}, {2, 0, 1, false}},
		{{0, 0, 4, true}, {1, 4, 5, true}, {2, 4, 5, false}},
	} {
		chunks, err := fwd.Chunks(dpContext(t, rank, 10, 4, 0, 5), 1, 4)
		if err != nil {
			t.Fatal(err)
		}
		var got []dpChunk
		for range 2 { // the iterator can be used again
			got = nil
			for _, c := range chunks {
				got = append(got, dpChunkOf(c))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("rank %d (-want +got):\n%s", rank, diff)
			}
		}
		for ctx, c := range chunks { // and left early
			if c.Index == 1 {
				if diff := cmp.Diff([]int{4, 1, 1, 1}, dpSizes(t, ctx)); diff != "" {
					t.Errorf("rank %d: sizes of round 1 (-want +got):\n%s", rank, diff)
				}
				break
			}
		}
		n := 0
		for range chunks {
			n++
		}
		if n != 3 {
			t.Errorf("rank %d: %d rounds after an early end, want 3", rank, n)
		}
	}
}

// In a microbatch the rounds are those of the microbatch's tokens.
func TestChunksInUBatch(t *testing.T) {
	t.Parallel()
	fc := &fwd.ForwardContext{
		NumTokens: 10, NumTokensUnpadded: 9, DP: dpMetadata(t, 1, 10, 10),
		UBatches: planSlices([4]int{0, 1, 0, 4}, [4]int{0, 1, 4, 10}),
	}
	ctx := fwd.NewContext(t.Context(), fc)
	outer, err := fwd.WithSPLocalSizes(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	err = fwd.RunUBatches(outer, func(ctx context.Context, i int) error {
		dpNoSizes(t, fmt.Sprintf("at the start of microbatch %d", i), ctx)
		chunks, err := fwd.Chunks(ctx, 1, 5)
		if err != nil {
			return err
		}
		var got []dpChunk
		var sizes [][]int
		for chunkCtx, c := range chunks {
			got, sizes = append(got, dpChunkOf(c)), append(sizes, dpSizes(t, chunkCtx))
			if k, n, ok := fwd.UBatch(chunkCtx); k != i || n != 2 || !ok {
				t.Errorf("in a chunk of microbatch %d: UBatch = %d, %d, %t", i, k, n, ok)
			}
		}
		want := [][]dpChunk{{{0, 0, 4, true}}, {{0, 0, 5, true}, {1, 5, 6, true}}}[i]
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("chunks of microbatch %d (-want +got):\n%s", i, diff)
		}
		if diff := cmp.Diff([][][]int{{{4, 4}}, {{5, 5}, {1, 1}}}[i], sizes); diff != "" {
			t.Errorf("sizes of microbatch %d (-want +got):\n%s", i, diff)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{10, 10}, dpSizes(t, outer)); diff != "" {
		t.Errorf("afterwards, outside (-want +got):\n%s", diff)
	}
}
