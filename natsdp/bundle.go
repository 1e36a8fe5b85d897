package natsdp

import (
	"bytes"
	"iter"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
)

// bundles packs messages into bundles of at most so many bytes, and leaves a message alone that would
// be the only one.
func bundles(head message, messages [][]byte, most int) (packed [][]byte) {
	head.kind = kindBundle
	for len(messages) > 0 {
		n, size := 0, headerSize
		for n < len(messages) && (n == 0 || size+4+len(messages[n]) <= most) {
			size += 4 + len(messages[n])
			n++
		}
		if n == 1 {
			packed = append(packed, messages[0])
		} else {
			b := append(make([]byte, 0, size), head.encode()...)
			for _, msg := range messages[:n] {
				b = append(be.AppendUint32(b, uint32(len(msg))), msg...)
			}
			packed = append(packed, b)
		}
		messages = messages[n:]
	}
	return packed
}

// unbundle returns the messages of a bundle, or the only one that there is. What is damaged is one
// too, so that its receiver counts it.
func unbundle(data []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		if !isBundle(data) {
			yield(data)
			return
		}
		for rest := data[headerSize:]; len(rest) > 0; {
			var msg []byte
			if msg, rest = cutMessage(rest); !yield(msg) {
				return
			}
		}
	}
}

// cutMessage cuts the first message off the rest of a bundle, or all of it if that is damaged.
func cutMessage(rest []byte) (msg, after []byte) {
	if len(rest) < 4 || uint64(be.Uint32(rest)) > uint64(len(rest)-4) {
		return rest, nil
	}
	n := 4 + int(be.Uint32(rest))
	return rest[4:n], rest[n:]
}

func isBundle(data []byte) bool {
	return len(data) > headerSize && string(data[:len(magic)]) == magic && data[2] == version &&
		kind(data[3]) == kindBundle
}

// hear hands what a speaker has said to those members of this process that it is for.
func hear(members []*member, from *speaker, direct bool, data []byte) {
	at, first := time.Now(), members[0]
	throughHub := first.hasHub() && from.has(first.hub)
	if throughHub {
		if t := readTable(data, first.group, first.size, at); t != nil {
			members = slices.DeleteFunc(slices.Clone(members), func(m *member) bool { return m.takeTable(t) })
		}
		if len(members) == 0 {
			return
		}
	}
	var read message // one for all, since the members keep none
	for data := range unbundle(data) {
		rank, known := sayer(data)
		if !known || !throughHub && !from.has(rank) {
			rank = from.runs[0].first // whose message it is not, so nobody believes it
		}
		read = message{raw: data, at: at}
		err := read.read(first.group, first.size, rank)
		for _, m := range members {
			m.take(rank, direct, &read, err)
		}
	}
}

// table is the votes of all ranks in a round, in one bundle, which agree: as the hub passes them on if
// nothing has gone wrong. A rank sees with a glance at it whether they complete its round. Nobody
// changes it, since all ranks of a process share it.
type table struct {
	votes  []fwd.Vote // by rank
	epochs []uint64   // by rank
	data   []byte     // the bundle
	starts []int      // of the votes in data, by rank
	last   int        // the rank whose vote came last
	most   message    // what all say, and the highest of the numbers that may differ
}

// readTable reads a bundle. It returns nil if that is no table, and must be taken vote by vote.
func readTable(data []byte, group uint64, size int, at time.Time) *table {
	if !isBundle(data) || len(data) < headerSize+size*(4+headerSize+voteSize) {
		return nil
	}
	t := &table{
		votes: make([]fwd.Vote, size), epochs: make([]uint64, size),
		data: data, starts: make([]int, size), last: -1,
	}
	count := 0
	var vote message
	for rest := data[headerSize:]; len(rest) > 0; count++ {
		start := len(data) - len(rest) + 4
		raw, after := cutMessage(rest)
		rest = after
		vote = message{at: at}
		body, err := vote.decodeHeader(raw)
		if err != nil || vote.kind != kindVote || vote.group != group || vote.size != size ||
			vote.decodeBody(body) != nil || !t.add(&vote, start) {
			return nil
		}
	}
	if count < size {
		return nil
	}
	return t
}

// add adds a vote. It returns false if that does not agree with those before, or does more than complete
// a round.
func (t *table) add(vote *message, start int) bool {
	if t.last < 0 {
		t.most = *vote
	}
	most, rank := &t.most, vote.rank
	if vote.asks || vote.broken || vote.epoch == 0 || t.epochs[rank] != 0 ||
		vote.round != most.round || vote.vote.Step != most.vote.Step || vote.lives != most.lives {
		return false
	}
	t.votes[rank], t.epochs[rank], t.starts[rank], t.last = vote.vote, vote.epoch, start, rank
	most.step, most.epoch = max(most.step, vote.step), max(most.epoch, vote.epoch)
	return true
}

// takeTable takes the votes of all ranks together if they complete the open round. Otherwise it does
// nothing, and returns false: they must be taken one by one.
func (m *member) takeTable(t *table) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.completedBy(t) {
		return false
	}
	votes := t.votes
	if hasSpan(m.vote.SpanContext) { // which is remote in the table, and may lack its trace state
		votes = slices.Clone(votes)
		votes[m.rank] = m.vote
	}
	m.open.last = t.last
	m.end(ending{complete: true}, m.last, outcome{votes: votes})
	m.signal()
	return true
}

// completedBy reports whether the votes of a table, taken one by one, would complete the open round
// and do nothing else. If this rank's vote is there as it was said, all are for its round and step, and
// count the lives that it counts. A vote that begins as it was said is the same, since it says how long
// it is. The hub has votes already.
func (m *member) completedBy(t *table) bool {
	return m.waiting && !m.down && m.open.count == 0 && bytes.HasPrefix(t.data[t.starts[m.rank]:], m.said) &&
		m.knows(t.epochs) && m.credible(&t.most)
}

// knows reports whether the lives of the other ranks that count are these.
func (m *member) knows(epochs []uint64) bool {
	before, after := m.rank, m.rank+1
	return slices.Equal(epochs[:before], m.epochs[:before]) && slices.Equal(epochs[after:], m.epochs[after:])
}
