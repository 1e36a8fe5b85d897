package fwdtest

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// misser is a coordinator that names the ranks whose votes it waits for.
type misser interface{ Missing() []int }

// missingGroup returns a group whose coordinators have a method Missing. It skips the check if they
// have none.
func (s suite) missingGroup(t *testing.T, size int) *group {
	t.Helper()
	return groupWith[misser](s.group(t, size), "Missing() []int")
}

// groupWith returns g if its coordinators have a method that they need not have. It skips the check if
// they have none.
func groupWith[M any](g *group, method string) *group {
	g.Helper()
	for _, c := range g.ranks {
		if _, ok := c.(M); !ok {
			g.Skipf("%T has no method %s", c, method)
		}
	}
	return g
}

// missing returns the ranks that one names, which it must do immediately.
func (g *group) missing(rank int) []int {
	g.Helper()
	return immediately(g, rank, "Missing", g.ranks[rank].(misser).Missing)
}

// immediately returns what a method of a rank's coordinator returns.
func immediately[T any](g *group, rank int, name string, method func() T) (result T) {
	g.Helper()
	returned := make(chan T, 1)
	go func() { returned <- method() }()
	select {
	case result = <-returned:
	case <-time.After(atOnce):
		g.Fatalf("%s of rank %d has not returned after %v", name, rank, atOnce)
	}
	return result
}

// misses checks that the ranks in the open round name the others, and that the others name none. Over
// a network they may hear late of ranks that have come, but immediately all the same.
func (g *group) misses(here ...int) {
	g.Helper()
	end := time.Now().Add(atOnce)
	for rank := range g.ranks {
		var want []int
		if slices.Contains(here, rank) {
			want = g.except(here...)
		}
		got := g.missing(rank)
		for !names(got, want) && time.Now().Before(end) {
			time.Sleep(10 * time.Millisecond)
			got = g.missing(rank)
		}
		if !names(got, want) {
			g.Fatalf("rank %d names %#v as missing, want %#v: ranks %v are in the round", rank, got, want, here)
		}
	}
}

// names reports whether got has the wanted ranks, in any order, and is nil if there are none.
func names(got, want []int) bool {
	sorted := slices.Clone(got)
	slices.Sort(sorted)
	return slices.Equal(sorted, want) && (got == nil) == (want == nil)
}

// missingNoneOpen checks that nobody names a rank when no exchange is open, whatever was before.
func (s suite) missingNoneOpen(t *testing.T, size int) {
	g := s.missingGroup(t, size)
	g.misses()
	for range 3 {
		g.together()
		g.misses()
	}
	g.breakStep(g.except(size - 1)...)
	g.misses()
	g.together()
	g.restart(1)
	g.fail(g.begin(t.Context(), g.all()...), fwd.ErrLockstep, 1)
	g.misses()
	g.send(t.Context(), 0, fwd.Vote{Step: g.step + 1, NumReqs: -1}).refused(fwd.ErrInvalid)
	g.again(g.step)
	g.misses()
	g.together()
}

// missingWaiting checks that the ranks which have come name exactly those which have not, in
// whatever order they come.
func (s suite) missingWaiting(t *testing.T, size int) {
	g := s.missingGroup(t, size)
	for _, order := range arrivalOrders(size) {
		var calls []*call
		for i, rank := range order {
			calls = append(calls, g.begin(t.Context(), rank)...)
			if i < size-1 && (size <= 4 || i%(size/4) == 0 || i == size-2) {
				g.pause()
				g.misses(order[:i+1]...)
			}
		}
		g.agree(calls)
		g.misses()
	}
}

// missingAfterBrokenSteps checks that a round which opens after broken ones begins anew: ranks that
// were in those are missing until they come again, and a late rank counts as any other.
func (s suite) missingAfterBrokenSteps(t *testing.T, size int) {
	g := s.missingGroup(t, size)
	g.together()
	g.breakStep(0, 1)
	for _, first := range []int{0, 2, 1, size - 1} {
		ctx, cancel := context.WithCancel(t.Context())
		calls := g.begin(ctx, first)
		g.pause()
		g.misses(first)
		second := (first + 1) % size
		calls = append(calls, g.begin(t.Context(), second)...)
		g.pause()
		if first == 0 {
			g.again(g.step + 1) // which does not disturb the round
		}
		g.misses(first, second)
		cancel()
		g.fail(calls, fwd.ErrRankMissing, g.except(first, second)...)
		g.misses()
	}
	g.together()
	g.misses()
}

// missingAnyTime lets several goroutines ask while the group takes steps as fast as it can. Nobody
// can say which ranks are missing at that moment, but no rank waits for itself, nor for nobody.
func (s suite) missingAnyTime(t *testing.T, size int) {
	g := s.missingGroup(t, size)
	g.whileStepsAreTaken(s.many(1000), g.plausible)
	g.misses()
}

// whileStepsAreTaken lets several goroutines look, again and again while it returns true, as the group
// takes n steps.
func (g *group) whileStepsAreTaken(n int, look func() bool) {
	g.Helper()
	stop := make(chan struct{})
	var looking sync.WaitGroup
	for range 2 {
		looking.Go(func() {
			for look() {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Microsecond):
				}
			}
		})
	}
	g.takeAll(n, noPause)
	close(stop)
	looking.Wait()
}

// plausible reports whether the ranks that each rank names can be missing.
func (g *group) plausible() bool {
	for rank, c := range g.ranks {
		named := c.(misser).Missing()
		sorted := slices.Clone(named)
		slices.Sort(sorted)
		distinct := len(slices.Compact(sorted)) == len(named)
		valid := !slices.ContainsFunc(named, func(r int) bool { return r < 0 || r >= len(g.ranks) || r == rank })
		if named != nil && len(named) == 0 || !distinct || !valid {
			g.Errorf("rank %d names %#v as missing while steps are taken", rank, named)
			return false
		}
	}
	return true
}
