// This file tests Status: what a Runner is doing, also while a pass or an exchange hangs.

package fwd_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/forwardctx/fwd"
)

// checkStatus compares the status of a Runner.
func checkStatus(t *testing.T, when string, r *fwd.Runner, want fwd.Status) {
	t.Helper()
	if diff := cmp.Diff(want, r.Status()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// An open exchange, with the ranks that it waits for where the coordinator knows them.
func TestStatusExchanging(t *testing.T) {
	t.Parallel()
	for _, local := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			group := localGroup(t, 3)
			own := group[0]
			if !local {
				own = &groupTap{Coordinator: group[0]}
			}
			known := func(ranks ...int) []int {
				if local {
					return ranks
				}
				return nil
			}
			r := groupRunner(t, own, fwd.WithExchangeTimeout(0))
			peer := groupRunner(t, group[2], fwd.WithExchangeTimeout(0))
			checkStatus(t, "at first", r, fwd.Status{})
			for step := uint64(1); step <= 2; step++ {
				ctx, cancel := context.WithCancel(t.Context())
				began := time.Now()
				go func() {
					if _, err := r.Plan(ctx, planBatch(1)); err == nil {
						t.Error("an exchange without rank 1 succeeds")
					}
				}()
				synctest.Wait()
				time.Sleep(time.Hour)
				want := fwd.Status{Step: step, Exchanging: true, Waiting: known(1, 2), Since: began}
				checkStatus(t, "while it waits for two", r, want)
				wait, err := peer.Begin(t.Context(), planBatch(1))
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				want.Waiting = known(1)
				checkStatus(t, "while it waits for one", r, want)
				cancel()
				synctest.Wait()
				checkStatus(t, "after it broke", r, fwd.Status{Step: step})
				checkStatus(t, "the peer, of whose outcome nobody has asked yet", peer, fwd.Status{Step: step})
				if _, err := wait(); err == nil {
					t.Error("an exchange without rank 1 succeeds")
				}
				checkStatus(t, "the peer", peer, fwd.Status{Step: step})
			}
		})
	}
}

// Passes that run, and since when the oldest does, on the real time and on a clock of the Runner's own.
func TestStatusActive(t *testing.T) {
	t.Parallel()
	for _, clocked := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			now := time.Now
			var opts []fwd.Option
			if clocked {
				start := time.Now()
				now = func() time.Time { return time.Time{}.Add(time.Since(start)) } // which begins at the zero time
				opts = append(opts, fwd.WithClock(now))
			}
			r, err := fwd.New(fwd.Config{}, opts...)
			if err != nil {
				t.Fatal(err)
			}
			start := func() (began time.Time, end func(error)) {
				t.Helper()
				time.Sleep(time.Second)
				began = now()
				_, end, err := r.Start(t.Context(), fwd.Pass{NumTokens: 1})
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				return began, end
			}
			checkStatus(t, "at first", r, fwd.Status{})
			first, endFirst := start()
			checkStatus(t, "one", r, fwd.Status{Active: 1, Since: first})
			second, endSecond := start()
			third, endThird := start()
			checkStatus(t, "three", r, fwd.Status{Active: 3, Since: first})
			endFirst(nil)
			endFirst(nil)
			checkStatus(t, "without the first", r, fwd.Status{Active: 2, Since: second})
			fourth, endFourth := start()
			endSecond(nil)
			checkStatus(t, "without the second", r, fwd.Status{Active: 2, Since: third})
			endThird(nil)
			checkStatus(t, "the fourth alone", r, fwd.Status{Active: 1, Since: fourth})
			endFourth(errGone)
			checkStatus(t, "none", r, fwd.Status{})
			_ = r.Run(t.Context(), fwd.Pass{NumTokens: 1}, func(context.Context) error {
				checkStatus(t, "inside Run", r, fwd.Status{Active: 1, Since: now()})
				return errGone
			})
			_ = panicOf(func() {
				_ = r.Run(t.Context(), fwd.Pass{}, func(context.Context) error { panic("no") })
			})
			checkStatus(t, "at last", r, fwd.Status{})
		})
	}
}

// An exchange that is open beside a running pass goes before it, and a nil Runner does nothing.
func TestStatusBoth(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		group := localGroup(t, 2)
		r, peer := groupRunner(t, group[0]), groupRunner(t, group[1])
		passes := planOf(t, []*fwd.Runner{r, peer}, planBatch(1), planBatch(1))
		passBegan := time.Now()
		_, end, err := r.Start(t.Context(), passes[0])
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		exchangeBegan := time.Now()
		wait, err := r.Begin(t.Context(), planBatch(1))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		checkStatus(t, "both", r, fwd.Status{
			Step: 2, Exchanging: true, Waiting: []int{1}, Active: 1, Since: exchangeBegan,
		})
		if _, err := peer.Plan(t.Context(), planBatch(1)); err != nil {
			t.Fatal(err)
		}
		checkStatus(t, "the pass alone", r, fwd.Status{Step: 2, Active: 1, Since: passBegan})
		if _, err := wait(); err != nil {
			t.Error(err)
		}
		end(nil)
		checkStatus(t, "neither", r, fwd.Status{Step: 2})
		checkStatus(t, "a nil Runner", nil, fwd.Status{})
	})
}
