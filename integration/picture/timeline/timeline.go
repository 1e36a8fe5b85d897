// Package timeline draws a step of data-parallel ranks as an SVG picture: how long each rank waited
// for the others, and what it computed.
package timeline

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Span is one span of a step's trace. Start and End are microseconds and may count from any moment.
type Span struct {
	ID         string         `json:"id"`
	Parent     string         `json:"parent,omitempty"` // the ID of its parent; empty: none
	Name       string         `json:"name"`
	Start      float64        `json:"start"`
	End        float64        `json:"end"`
	Attributes map[string]any `json:"attributes,omitempty"` // strings, bools and numbers
}

// Kinds of spans. A span is of a kind if its name is the kind's, or begins with it and a space.
const (
	Root       = "fwd.step"
	Coordinate = "fwd.coordinate"
	Forward    = "fwd.forward"
	UBatch     = "fwd.ubatch"
	Wait       = "fwd.wait"
)

// Attributes that the picture shows. A span need not have any other ones.
const (
	Rank           = "fwd.dp.rank"
	Step           = "fwd.step"
	Phase          = "fwd.phase"
	Mode           = "fwd.graph.mode"
	Reason         = "fwd.graph.reason"
	Dummy          = "fwd.dummy"
	Tokens         = "fwd.num_tokens"
	Unpadded       = "fwd.num_tokens_unpadded"
	GraphPadding   = "fwd.padding.graph"
	DPPadding      = "fwd.padding.dp"
	MaxTokensRank  = "fwd.dp.max_tokens_rank"
	LowestModeRank = "fwd.dp.lowest_mode_rank"
	LastRank       = "fwd.dp.last_rank" // whose vote came last
	PeerRank       = "fwd.dp.peer_rank" // who is waited for inside a pass
	IdleRanks      = "fwd.idle_ranks"   // how many
	WaitTime       = "fwd.wait_time"    // seconds that a pass waited for other ranks
	UBatchIndex    = "fwd.ubatch.index"
)

// Attributes returns the keys of all attributes that the picture shows.
func Attributes() []string {
	return []string{
		Rank, Step, Phase, Mode, Reason, Dummy, Tokens, Unpadded, GraphPadding, DPPadding,
		MaxTokensRank, LowestModeRank, LastRank, PeerRank, IdleRanks, WaitTime, UBatchIndex,
	}
}

// Kind returns the first word of the span's name.
func (s *Span) Kind() string {
	kind, _, _ := strings.Cut(s.Name, " ")
	return kind
}

// Duration returns how many microseconds the span took.
func (s *Span) Duration() float64 { return s.End - s.Start }

// Int returns a whole number among the attributes. It returns false if there is none.
func (s *Span) Int(key string) (n int, ok bool) {
	switch v := s.Attributes[key].(type) {
	case int:
		return v, true
	case int64:
		return int(v), true
	case float64: // out of JSON
		return int(v), true
	}
	return 0, false
}

// Text returns a string among the attributes, or else the empty one.
func (s *Span) Text(key string) string {
	text, _ := s.Attributes[key].(string)
	return text
}

// Waited returns how many microseconds a pass says it waited for other ranks.
func (s *Span) Waited() float64 {
	seconds, _ := s.Attributes[WaitTime].(float64)
	return seconds * 1e6
}

// IsDummy reports whether the span is the pass of a rank that had nothing to do.
func (s *Span) IsDummy() bool {
	dummy, _ := s.Attributes[Dummy].(bool)
	return dummy
}

// noRank is the rank of spans that are not of any.
const noRank = -1

// row is a row of bars: that of one span, or those of waits or of spans with the same name that don't
// overlap. The latter, and the root's, are thin and have no labels.
type row struct {
	depth int
	thin  bool
	spans []*Span
}

// group is the rows of a rank.
type group struct {
	rank int
	rows []row
}

// step is the spans of a step in the order of the picture.
type step struct {
	spans      []Span
	start, end float64
	groups     []group
}

// newStep arranges spans by rank, below their parents and in the order of their starts.
func newStep(spans []Span) (*step, error) {
	if len(spans) == 0 {
		return nil, errors.New("timeline: no spans")
	}
	st := &step{spans: slices.Clone(spans), start: spans[0].Start, end: spans[0].End}
	slices.SortStableFunc(st.spans, func(a, b Span) int { return cmp.Compare(a.Start, b.Start) })
	byID := map[string]*Span{}
	for i := range st.spans {
		s := &st.spans[i]
		if s.End < s.Start {
			const format = "timeline: span %q (%s) ends at %v, before it starts at %v"
			return nil, fmt.Errorf(format, s.ID, s.Name, s.End, s.Start)
		}
		if byID[s.ID] != nil {
			return nil, fmt.Errorf("timeline: two spans have the id %q", s.ID)
		}
		byID[s.ID] = s
		st.start, st.end = min(st.start, s.Start), max(st.end, s.End)
	}
	if st.end == st.start {
		return nil, errors.New("timeline: the step takes no time")
	}

	tops, children := map[int][]*Span{}, map[string][]*Span{}
	for i := range st.spans {
		s := &st.spans[i]
		parent := byID[s.Parent]
		rank := rankOf(s, byID) // the root has none: the spans of all ranks are below it
		if parent == nil || rankOf(parent, byID) != rank {
			tops[rank] = append(tops[rank], s)
		} else {
			children[s.Parent] = append(children[s.Parent], s)
		}
	}
	drawn := 0
	for _, rank := range slices.Sorted(maps.Keys(tops)) {
		g := group{rank: rank}
		g.add(tops[rank], children, 0)
		st.groups = append(st.groups, g)
		drawn += g.spans()
	}
	if lost := len(spans) - drawn; lost > 0 {
		return nil, fmt.Errorf("timeline: %d of %d spans are their own ancestors", lost, len(spans))
	}
	return st, nil
}

// rankOf returns the rank of a span, or else of its nearest ancestor that has one. A root that is
// neither an exchange nor a pass stands for the step, and so for no rank.
func rankOf(s *Span, byID map[string]*Span) int {
	for range len(byID) { // a damaged trace may have a circle
		if byID[s.Parent] == nil && s.Kind() != Coordinate && s.Kind() != Forward {
			break
		}
		if rank, ok := s.Int(Rank); ok {
			return rank
		}
		if s = byID[s.Parent]; s == nil {
			break
		}
	}
	return noRank
}

// add adds rows for siblings and all that is below them.
func (g *group) add(siblings []*Span, children map[string][]*Span, depth int) {
	first := len(g.rows)
	for _, s := range siblings {
		switch s.Kind() {
		case Coordinate, Forward, UBatch:
			g.rows = append(g.rows, row{depth: depth, spans: []*Span{s}})
		default:
			fits := func(r row) bool {
				last := r.spans[len(r.spans)-1]
				return r.depth == depth && last.Name == s.Name && last.End <= s.Start
			}
			if i := slices.IndexFunc(g.rows[first:], fits); i >= 0 {
				g.rows[first+i].spans = append(g.rows[first+i].spans, s)
			} else {
				g.rows = append(g.rows, row{depth: depth, thin: s.Kind() != Wait, spans: []*Span{s}})
			}
		}
		g.add(children[s.ID], children, depth+1)
	}
}

// spans returns how many spans the group has.
func (g *group) spans() (n int) {
	for _, r := range g.rows {
		n += len(r.spans)
	}
	return n
}

// ofKind returns the spans of a kind, in the order of their starts.
func (st *step) ofKind(kind string) (spans []*Span) {
	for i := range st.spans {
		if s := &st.spans[i]; s.Kind() == kind {
			spans = append(spans, s)
		}
	}
	return spans
}

// lastVote returns the exchange of the rank that voted last, if other ranks waited for it: the one
// that the exchanges name, or else the one that began last.
func (st *step) lastVote() *Span {
	exchanges := st.ofKind(Coordinate)
	if len(exchanges) < 2 {
		return nil
	}
	if last, ok := exchanges[0].Int(LastRank); ok {
		for _, s := range exchanges {
			if rank, ok := s.Int(Rank); ok && rank == last {
				return s
			}
		}
	}
	return exchanges[len(exchanges)-1]
}
