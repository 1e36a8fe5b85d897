package engine

// blockAllocator hands out the blocks of a rank's KV cache. The caches of all layers have the same
// blocks: one block table serves every layer.
type blockAllocator struct {
	free      []int
	blockSize int
}

func newBlockAllocator(blocks, blockSize int) *blockAllocator {
	a := &blockAllocator{blockSize: blockSize}
	for b := range blocks {
		a.free = append(a.free, b)
	}
	return a
}

// blocksFor returns how many blocks hold so many tokens.
func blocksFor(tokens, blockSize int) int { return (tokens + blockSize - 1) / blockSize }

// allocate returns blocks for so many tokens, or false if there aren't enough.
func (a *blockAllocator) allocate(tokens int) ([]int, bool) {
	keep := len(a.free) - blocksFor(tokens, a.blockSize)
	if keep < 0 {
		return nil, false
	}
	blocks := append([]int(nil), a.free[keep:]...)
	a.free = a.free[:keep]
	return blocks, true
}

func (a *blockAllocator) release(blocks []int) { a.free = append(a.free, blocks...) }
