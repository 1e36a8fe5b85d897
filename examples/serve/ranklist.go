package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/forwardctx/fwd/examples/engine"
)

// rankList is some ranks, in order: the value of -ranks.
type rankList []int

// String implements [flag.Value]. Ranks in a row are a range.
func (l rankList) String() string {
	var parts []string
	for i := 0; i < len(l); {
		end := i + 1
		for end < len(l) && l[end] == l[end-1]+1 {
			end++
		}
		if end == i+1 {
			parts = append(parts, strconv.Itoa(l[i]))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", l[i], l[end-1]))
		}
		i = end
	}
	return strings.Join(parts, ",")
}

// Set implements [flag.Value].
func (l *rankList) Set(text string) error {
	var ranks rankList
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err1 := parseRank(from)
		last, err2 := parseRank(to)
		if err1 != nil || err2 != nil || first > last {
			return fmt.Errorf("%.40q is no rank from 0 to %d, and no range of them such as 0-3", part,
				engine.MaxRanks-1)
		}
		for rank := first; rank <= last; rank++ {
			if slices.Contains(ranks, rank) {
				return fmt.Errorf("rank %d is in it twice", rank)
			}
			ranks = append(ranks, rank)
		}
	}
	slices.Sort(ranks)
	*l = ranks
	return nil
}

// parseRank reads a rank that an engine can have.
func parseRank(text string) (int, error) {
	rank, err := strconv.ParseUint(text, 10, 31)
	if err == nil && rank >= engine.MaxRanks {
		err = strconv.ErrRange
	}
	return int(rank), err
}
