// This file tests that the suite sees how ranks come apart.

package fwdtest

import (
	"slices"
	"testing"

	"github.com/forwardctx/fwd"
)

func TestApart(t *testing.T) {
	const alone, others, all = "100", "011", "111"
	for _, tt := range []struct {
		name  string
		steps []string // on which ranks each is complete
		apart bool
	}{
		{"whole", []string{all, all, all}, false},
		{"one step", []string{all, alone, "000", all}, false},
		{"every other step", []string{alone, all, alone, "000", alone}, false},
		{"other pairs", []string{"110", "101"}, true}, // of the ranks 1 and 2
		{"the same rank twice", []string{all, alone, alone}, true},
		{"then the others", []string{alone, others}, true},
		{"pairs without a rank in common", []string{"1000", "1110", "1110"}, true},
		{"never the same pair", []string{"1100", "1111", "0011"}, false},
	} {
		h := newHistory(len(tt.steps[0]))
		for i, on := range tt.steps {
			for rank, complete := range on {
				if complete == '1' {
					v := (&group{}).vote(0, uint64(i+1))
					votes := slices.Repeat([]fwd.Vote{v}, h.size)
					if _, err := h.outcome(rank, v, votes, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if err := h.apart(); (err != nil) != tt.apart {
			t.Errorf("%s, %q: %v, want an error: %t", tt.name, tt.steps, err, tt.apart)
		}
	}
}
