// This file lists faults with calls that must be refused.

package fwdtest_test

import (
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"

	"github.com/forwardctx/fwd"
)

// refusedFaults are faults with votes that can't be right, and with second calls.
var refusedFaults = []fault{
	{"sends what it should refuse",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			return c.Exchange(ctx, valid(v))
		}), `rank 0 in step 1: .*; want error fwd: invalid`, []string{"Refused/InvalidVote"}},
	{"sends what it refuses",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			votes, err := c.Exchange(ctx, v)
			if errors.Is(err, fwd.ErrInvalid) {
				go c.Exchange(ctx, valid(v))
			}
			return votes, err
		}), `rank 1 in step 1 returned .*; want it to wait`, []string{"Refused/InvalidVote"}},
	{"does not check NumReqs",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			v.NumReqs = valid(v).NumReqs
			return c.Exchange(ctx, v)
		}), `rank 0 in step 1.*; want error fwd: invalid|has not returned`, []string{"Refused/InvalidVote"}},
	{"does not check NumActiveLoRAs",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			v.NumActiveLoRAs = valid(v).NumActiveLoRAs
			return c.Exchange(ctx, v)
		}), `rank 0 in step 1.*; want error fwd: invalid|has not returned`, []string{"Refused/InvalidVote"}},
	{"does not check counts above 2^31-1",
		without(func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			v.NumReqs = min(v.NumReqs, math.MaxInt32)
			return c.Exchange(ctx, v)
		}), `rank 0 in step 1.*; want error fwd: invalid|has not returned`, []string{"Refused/InvalidVote"}},
	{"lets a second call disturb the round", inRanks(func() exchange {
		var stop atomic.Pointer[context.CancelFunc]
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			ctx, cancel := context.WithCancel(ctx)
			if first := stop.Swap(&cancel); first != nil {
				(*first)()
			}
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d (returned .*want it to wait|has not returned)`, []string{"Refused/SecondCall"}},
	{"lets a second call wait", inRanks(func() exchange {
		var mu sync.Mutex
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			mu.Lock()
			defer mu.Unlock()
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d has not returned after 2s`, []string{"Refused/SecondCall"}},
	{"takes a second call for the next step", inRanks(func() exchange {
		var last atomic.Uint64
		return func(c fwd.Coordinator, ctx context.Context, v fwd.Vote) ([]fwd.Vote, error) {
			if v.Step == last.Load() {
				v.Step++
			}
			last.Store(v.Step)
			return c.Exchange(ctx, v)
		}
	}), `rank 0 in step \d has not returned after 2s`,
		[]string{"Refused/SecondCallAfterTheRound", "Refused/SecondCallAfterABrokenRound"}},
}

// valid makes a valid vote of one that is not.
func valid(v fwd.Vote) fwd.Vote {
	v.NumTokens = min(max(v.NumTokens, 0), math.MaxInt32)
	v.NumTokensPadded = min(max(v.NumTokensPadded, v.NumTokens), math.MaxInt32)
	v.NumReqs = min(max(v.NumReqs, 0), math.MaxInt32)
	v.NumActiveLoRAs = min(max(v.NumActiveLoRAs, 0), math.MaxInt32)
	if !v.GraphMode.ValidRuntime() {
		v.GraphMode = fwd.GraphNone
	}
	return v
}
