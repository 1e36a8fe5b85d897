package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"

	"github.com/forwardctx/fwd"
)

// Setting is something that must be the same in all processes, such as a flag that says what is
// served.
type Setting struct{ Name, Value string }

// greet makes sure, before a warm-up, that all processes have the same settings: each sends a hash
// of its own with a vote. If some differ, the ranks go on to compare one setting after the other, so
// that every rank can name the ranks and the settings.
func (r *rank) greet(ctx context.Context) error {
	p := r.engine.config.Process
	if p == nil || len(p.Same) == 0 || r.engine.config.DataParallelSize == 1 {
		return nil
	}
	all, names := []string{}, []string{}
	for _, s := range p.Same {
		all, names = append(all, s.Name, s.Value), append(names, s.Name)
	}
	odd, first, err := r.compare(ctx, all...)
	if err != nil || odd == nil {
		return err
	}
	differ := fmt.Errorf("engine: ranks %v were not started like rank %d", odd, first)
	if odd, _, err = r.compare(ctx, names...); err != nil || odd != nil {
		return cmp.Or(err, fmt.Errorf("%w: they are of another version of the program", differ))
	}
	var errs []error
	for _, s := range p.Same {
		odd, first, err := r.compare(ctx, s.Value)
		if err != nil {
			return err
		}
		if odd != nil {
			errs = append(errs, fmt.Errorf("engine: ranks %v were started with another %s than rank %d; here it is %s",
				odd, s.Name, first, s.Value))
		}
	}
	return cmp.Or(errors.Join(errs...), differ)
}

// compare returns the ranks whose words are others than most ranks have, and the first rank that has
// what most have; if two have equally many, it is the one that comes first.
func (r *rank) compare(ctx context.Context, words ...string) (odd []int, first int, err error) {
	h := fnv.New64a()
	fmt.Fprintf(h, "%q", words)
	pass, err := r.target.runner.Plan(ctx, fwd.Schedule{Note: h.Sum64() | greeting})
	if err != nil {
		return nil, 0, err
	}
	if err := outOfStep(pass.Agreement, func(note uint64) bool { return note&greeting == 0 }); err != nil {
		return nil, 0, err
	}
	votes := pass.Agreement.Votes
	counts := map[uint64]int{}
	for _, v := range votes {
		counts[v.Note]++
	}
	for rank, v := range votes {
		if counts[v.Note] > counts[votes[first].Note] {
			first = rank
		}
	}
	for rank, v := range votes {
		if v.Note != votes[first].Note {
			odd = append(odd, rank)
		}
	}
	return odd, first, nil
}
