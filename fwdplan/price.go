package fwdplan

import "slices"

// prices says what passes cost: their tokens, or measured seconds.
type prices struct {
	eagerToken float64
	graph      [kinds]line // with Measured
	eager      [kinds]line // with Measured; empty: no eager pass was measured
	adjusted   int
}

func newPrices(s Snapshot, cfg Config) (p prices, err error) {
	p.eagerToken = cfg.EagerPrice
	if !cfg.Measured {
		return p, nil
	}
	var changed int
	for kind := range kinds {
		p.graph[kind], changed = measured(s, kind, true)
		p.adjusted += changed
		p.eager[kind], changed = measured(s, kind, false)
		p.adjusted += changed
	}
	if len(p.graph[decode]) == 0 && len(p.graph[mixed]) == 0 {
		return p, invalidf("Measured with a snapshot in which no pass with a graph was timed")
	}
	for kind := range kinds {
		other := kinds - 1 - kind
		if len(p.graph[kind]) == 0 {
			p.graph[kind] = p.graph[other]
		}
		if len(p.eager[kind]) == 0 {
			p.eager[kind] = p.eager[other]
		}
	}
	return p, nil
}

// graphPrice returns what a pass of that kind costs with a graph of that size.
func (p *prices) graphPrice(kind, size int) float64 {
	if l := p.graph[kind]; len(l) > 0 {
		return l.at(size)
	}
	return float64(size)
}

// eagerPrice returns what a pass of that kind costs without a graph, and whether it has a price at all.
func (p *prices) eagerPrice(kind, size int) (float64, bool) {
	if l := p.eager[kind]; len(l) > 0 {
		return l.at(size), true
	}
	return p.eagerToken * float64(size), p.eagerToken > 0
}

// line is a price by size, in ascending order of both.
type line []point

type point struct {
	size   int
	price  float64
	weight float64 // passes
}

// measured returns the seconds that passes took by size, made non-decreasing, and how many sizes had
// other times.
func measured(s Snapshot, kind int, captured bool) (line, int) {
	var l line
	for _, r := range s.Rows {
		if r.Uniform != (kind == decode) || (r.Captured > 0) != captured || r.Nanoseconds == 0 {
			continue
		}
		size := r.Captured
		if !captured {
			size = r.Tokens
		}
		l = append(l, point{size, float64(r.Nanoseconds) / 1e9, float64(r.Passes + r.Dummies)})
	}
	slices.SortFunc(l, func(a, b point) int { return a.size - b.size })
	sums := l[:0]
	for _, p := range l {
		if n := len(sums) - 1; n >= 0 && sums[n].size == p.size {
			sums[n].price += p.price
			sums[n].weight += p.weight
		} else {
			sums = append(sums, p)
		}
	}
	for i := range sums {
		sums[i].price /= sums[i].weight
	}
	return sums.rising()
}

// rising returns the non-decreasing line that is closest to l by weighted squares, and how many points it
// moved: neighbours whose prices fall are pooled into their mean.
func (l line) rising() (line, int) {
	type pool struct {
		price, weight float64
		points        int
	}
	var pools []pool
	for _, p := range l {
		pools = append(pools, pool{p.price, p.weight, 1})
		for n := len(pools) - 1; n > 0 && pools[n].price < pools[n-1].price; n-- {
			a, b := pools[n-1], pools[n]
			weight := a.weight + b.weight
			pools[n-1] = pool{(a.price*a.weight + b.price*b.weight) / weight, weight, a.points + b.points}
			pools = pools[:n]
		}
	}
	var rising line
	moved := 0
	for _, pool := range pools {
		for range pool.points {
			p := l[len(rising)]
			if p.price != pool.price {
				moved++
			}
			p.price = pool.price
			rising = append(rising, p)
		}
	}
	return rising, moved
}

// at returns the price of a size: between two points interpolated, below all that of the first, and above
// all in proportion to the last.
func (l line) at(size int) float64 {
	i, found := slices.BinarySearchFunc(l, size, func(p point, size int) int { return p.size - size })
	switch {
	case found:
		return l[i].price
	case i == 0:
		return l[0].price
	case i == len(l):
		last := l[i-1]
		return last.price * float64(size) / float64(last.size)
	}
	a, b := l[i-1], l[i]
	return a.price + (b.price-a.price)*float64(size-a.size)/float64(b.size-a.size)
}
