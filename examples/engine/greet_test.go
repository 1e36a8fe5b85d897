// Processes that were not started alike.

package engine

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestGreet: ranks that have other settings are named by all ranks, with the settings that differ and
// no others; nobody serves.
func TestGreet(t *testing.T) {
	for _, c := range []struct {
		name string
		same [][]Setting // by rank
		want []string
	}{
		{"one", [][]Setting{{{"x", "1"}, {"y", "2"}}, {{"x", "1"}, {"y", "3"}}, {{"x", "1"}, {"y", "3"}}},
			[]string{"engine: ranks [0] were started with another y than rank 1; here it is "}},
		{"two", [][]Setting{{{"x", "1"}, {"y", "2"}}, {{"x", "2"}, {"y", "2"}}, {{"x", "1"}, {"y", "3"}}},
			[]string{"ranks [1] were started with another x than rank 0",
				"ranks [2] were started with another y than rank 0"}},
		{"another version", [][]Setting{{{"x", "1"}}, {{"x", "1"}, {"y", "2"}}, {{"x", "1"}}},
			[]string{"ranks [1] were not started like rank 0: they are of another version of the program"}},
	} {
		t.Run(c.name, simulated(func(t *testing.T) {
			f := newFleet(t, Config{DataParallelSize: 3}, newRequests(6, 10, 10))
			for rank, o := range f.each(func(rank int) outcome {
				cfg := f.config(rank, time.Hour)
				cfg.Process.Same = c.same[rank]
				return f.run(t.Context(), cfg, f.requests[rank])
			}) {
				if o.err == nil || strings.Count(o.err.Error(), "engine: ") != len(c.want) || o.stats.Steps > 0 {
					t.Errorf("rank %d: %v after %d steps", rank, o.err, o.stats.Steps)
					continue
				}
				for _, want := range c.want {
					if !strings.Contains(o.err.Error(), want) {
						t.Errorf("rank %d: %v, want %q", rank, o.err, want)
					}
				}
			}
		}))
	}
}

// TestGreetAgain: a rank that comes back with another setting is refused by those that serve.
func TestGreetAgain(t *testing.T) {
	t.Run("", simulated(func(t *testing.T) {
		f := newFleet(t, Config{DataParallelSize: 3, ExchangeTimeout: time.Second}, newRequests(60, 50, 20))
		for rank, o := range f.each(func(rank int) outcome {
			cfg := f.config(rank, time.Hour)
			if rank != 1 {
				return f.run(t.Context(), cfg, f.requests[rank])
			}
			life := cfg
			atPass(&life, 21, crash)
			first := f.run(t.Context(), life, f.requests[rank])
			if !errors.Is(first.err, errCrash) {
				t.Errorf("the first life ended with %v, want %v", first.err, errCrash)
			}
			cfg.Process.Same = []Setting{{"x", "1"}, {"y", "5"}}
			return f.run(t.Context(), cfg, f.requests[rank])
		}) {
			if want := "ranks [1] were started with another y than rank 0"; o.err == nil ||
				!strings.Contains(o.err.Error(), want) {
				t.Errorf("rank %d: %v, want %q", rank, o.err, want)
			}
		}
	}))
}
