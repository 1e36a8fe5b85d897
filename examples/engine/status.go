package engine

import "github.com/forwardctx/fwd"

// RankStatus is what a rank is doing.
type RankStatus struct {
	Rank             int
	Running, Waiting int // requests: in the batch, and arrived
	BlocksUsed       int // of the KV cache
	Blocks           int

	Target fwd.Status
	Draft  *fwd.Status // nil: there is none
}

// Status returns what the ranks of this process are doing in the current run, or did last in the
// last one. It may be called at any time, also while a pass hangs, and returns nil before the first
// run.
func (e *Engine) Status() []RankStatus {
	run := e.latest.Load()
	if run == nil {
		return nil
	}
	var all []RankStatus
	for _, r := range run.ranks {
		s := RankStatus{
			Rank:       r.rank,
			Running:    int(r.load.running.Load()),
			Waiting:    int(r.load.waiting.Load()),
			BlocksUsed: int(r.load.blocks.Load()),
			Blocks:     int(r.load.allBlocks),
			Target:     r.target.shown.Load().Status(),
		}
		if r.draft != nil {
			draft := r.draft.shown.Load().Status()
			s.Draft = &draft
		}
		all = append(all, s)
	}
	return all
}
