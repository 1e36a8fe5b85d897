package engine

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/fwdplan"
)

// With Config.Replan the ranks choose their capture sizes anew while they serve.
//
// Each rank counts the steps by size, for each of its models. The votes of a step say its size, and
// all ranks have the same votes, so all of them count the same and choose the same sizes, again and
// again, each time from all that they have counted. When a rank has chosen, the notes with its votes
// have a hash of its choice. As soon as the notes of all ranks have the same one, they change, all
// after the same step: each gives its Runners the new graphs, whose fingerprint is in its votes from
// then on, and they warm up those that are new. If the hashes differ, a rank has missed the votes of
// a step, and all count anew.
//
// A rank that was started again has counted nothing, and its sizes are those of the configuration.
// So whenever the ranks are out of step, they go back to these, warm up together, and count anew.

// Ladder is a list of capture sizes of the model that is served, and what it was worth while it was
// in use. Graphs, Captured, Bytes and Capture include those of the draft model.
type Ladder struct {
	Sizes    []int
	Graphs   int           // of a rank
	Captured int           // of these, the ones that had to be captured; the others were there
	Bytes    int           // of the tensors of a rank's graphs
	Capture  time.Duration // how long capturing took

	Steps, Eager    int // with this ladder; of these, the ones without a graph
	Tokens, Padding int // of the steps with a graph: tokens of the largest rank, and what its graph adds
}

// maxLadders is how many ladders of a run are kept: the first one and the last ones.
const maxLadders = 8

// replan is what a rank knows about its next capture sizes.
type replan struct {
	every  int     // steps; 0: never
	steps  int     // since the last choice
	chosen [][]int // sizes by model; nil: not chosen yet
	hash   uint64  // of chosen
	agreed bool    // all ranks have chosen the same: they change before the next step

	strangers int // exchanges in a row that failed because ranks had different graphs

	ladders []Ladder
	changes int              // of ladders, also of those that are not kept
	began   fwdplan.Snapshot // of the steps before the last ladder
}

// observe counts a step, if it has run by a graph: the others say nothing about which graphs are worth
// having. The ranks have agreed on the mode, so all count the same.
func (p *replan) observe(rec *fwd.Record) {
	if rec.Err == nil && rec.Phase != warmUpPhase && rec.GraphMode != fwd.GraphNone {
		p.steps++
	}
}

// hear learns from the notes of a step what the ranks have chosen. It reports whether they have
// chosen different sizes.
func (p *replan) hear(all notes) (differ bool) {
	for _, n := range all {
		if n.sizes == 0 {
			return false // it has not chosen yet
		}
		differ = differ || n.sizes != all[0].sizes
	}
	p.agreed = !differ
	return differ
}

// choice returns a hash of the sizes that this rank has chosen, or 0 if it has counted too few steps.
func (r *rank) choice() uint64 {
	p := &r.replan
	if p.every == 0 || p.steps < p.every {
		return 0
	}
	if p.chosen == nil {
		for _, in := range r.instances() {
			p.chosen = append(p.chosen, in.choose())
		}
		h := fnv.New64a()
		fmt.Fprint(h, p.chosen)
		p.hash = max(h.Sum64()%(1<<sizesBits), 1) // 0 is no choice
	}
	return p.hash
}

// hear learns from the notes of a step. If the ranks have chosen different sizes, all count anew.
func (r *rank) hear(all notes) {
	if r.replan.hear(all) {
		r.countAnew()
	}
}

// chooseLater lets the rank choose again after the next steps.
func (p *replan) chooseLater() { p.steps, p.chosen, p.agreed = 0, nil, false }

// countAnew forgets the steps counted so far.
func (r *rank) countAnew() {
	r.replan.chooseLater()
	for _, in := range r.instances() {
		in.counted = in.seen()
	}
}

// change changes to the sizes that all ranks have chosen.
func (r *rank) change(ctx context.Context) error {
	ctx, span := r.startWarmUp(ctx)
	defer span.End()
	began := time.Now()
	for i, in := range r.instances() {
		if slices.Equal(r.replan.chosen[i], in.sizes) {
			continue
		}
		kept, err := in.use(r.replan.chosen[i])
		if err != nil {
			return err
		}
		if err := in.warmUp(ctx, kept); err != nil {
			return err
		}
	}
	r.replan.chooseLater()
	r.beginLadder(time.Since(began))
	return nil
}

// fallBack changes to the sizes of the configuration, whose graphs are captured by the warm-up.
func (r *rank) fallBack() error {
	for _, in := range r.instances() {
		if slices.Equal(in.sizes, in.config.CaptureSizes) {
			continue
		}
		if _, err := in.use(in.config.CaptureSizes); err != nil {
			return err
		}
	}
	return nil
}

// beginLadder notes that the rank has its graphs, if they are others than before.
func (r *rank) beginLadder(took time.Duration) {
	p := &r.replan
	l := Ladder{Sizes: r.target.sizes, Capture: took}
	for _, in := range r.instances() {
		l.Graphs += len(in.graphs)
		l.Captured += in.missing
		l.Bytes += in.executor.Bytes()
		in.missing = 0
	}
	if p.every == 0 || len(p.ladders) > 0 && l.Captured == 0 && l.Graphs == p.ladders[len(p.ladders)-1].Graphs {
		return
	}
	r.endLadder()
	p.began = r.target.seen()
	if len(p.ladders) == maxLadders {
		p.ladders = slices.Delete(p.ladders, 1, 2)
	}
	p.ladders = append(p.ladders, l)
	p.changes++
}

// endLadder notes what the ladder in use was worth.
func (r *rank) endLadder() {
	p := &r.replan
	if len(p.ladders) == 0 {
		return
	}
	seen, _ := r.target.seen().Sub(p.began) // which has counted less
	p.ladders[len(p.ladders)-1].count(seen)
}

// count fills in what a snapshot says about the steps.
func (l *Ladder) count(seen fwdplan.Snapshot) {
	l.Steps, l.Eager, l.Tokens, l.Padding = int(seen.LeftOut.NoGraph), int(seen.LeftOut.NoGraph), 0, 0
	for _, row := range seen.Rows {
		n := int(row.Passes + row.Dummies)
		l.Steps += n
		if row.Captured == 0 {
			l.Eager += n
			continue
		}
		l.Tokens += n * row.Tokens
		l.Padding += n * (row.Captured - row.Tokens)
	}
}

// seen returns the steps counted so far.
func (in *instance) seen() fwdplan.Snapshot {
	if in.counts == nil {
		return fwdplan.Snapshot{}
	}
	return in.counts.Snapshot()
}

// choose returns the capture sizes that are best for the counted steps: at most as many graphs as in the
// configuration, with the same largest size, and with a full graph for every decode batch if those had
// one. It goes by tokens alone, since times differ by rank. It returns the sizes in use if others are
// not better, or if no graph could serve the steps.
func (in *instance) choose() []int {
	seen, err := in.seen().Sub(in.counted)
	if err != nil {
		return in.sizes
	}
	dispatch := in.config
	if !dispatch.Mode.HasFullGraphs() {
		dispatch.UniformDecodeQueryLen = 1 // then sizes need not be multiples of it
	}
	decode := max(dispatch.UniformDecodeQueryLen, 1) * dispatch.MaxNumSeqs
	must := []int{slices.Max(dispatch.CaptureSizes)}
	if decode < must[0] && slices.Contains(dispatch.CaptureSizes, decode) {
		must = append(must, decode)
	}
	cfg := fwdplan.Config{
		MaxGraphs: len(in.dispatcher.Captures()), Must: must, Unseen: true, Dispatcher: dispatch,
	}
	plan, err := fwdplan.Choose(seen, cfg)
	if err != nil {
		return in.sizes
	}
	now, err := fwdplan.Evaluate(seen, cfg, fwdplan.Ladder{Sizes: in.sizes})
	if err != nil || now.Cost <= plan.Cost {
		return in.sizes
	}
	return plan.Sizes
}

// use changes to other capture sizes, and returns the graphs that stay.
func (in *instance) use(sizes []int) (kept []fwd.Capture, err error) {
	cfg := in.config
	cfg.CaptureSizes = sizes
	dispatcher, err := fwd.NewDispatcher(cfg)
	if err != nil {
		return nil, err
	}
	runner, err := in.runner.WithGraphs(dispatcher)
	if err != nil {
		return nil, err
	}
	graphs := dispatcher.Captures()
	for _, g := range graphs {
		if slices.Contains(in.graphs, g) {
			kept = append(kept, g)
		}
	}
	in.runner, in.sizes, in.graphs = runner, sizes, graphs
	in.missing = len(graphs) - len(kept)
	in.shown.Store(runner)
	return kept, in.executor.Keep(kept)
}

// mostStrangers is how many exchanges in a row may fail because the ranks have different graphs. One
// does if a rank was started again or has missed a change: so all learn of it.
const mostStrangers = 3

// isStranger reports whether an exchange failed because the ranks have different graphs, which
// happens when one of them was started again, or has missed a change.
func (p *replan) isStranger(err error) bool {
	_, ok := errors.AsType[*fwd.RankError](err)
	return p.every > 0 && ok && errors.Is(err, fwd.ErrInvalid)
}
