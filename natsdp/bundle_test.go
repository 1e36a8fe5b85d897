// This file tests and measures how bundles with the votes of all ranks are taken.

package natsdp

import (
	"fmt"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
)

// bundleOf returns ranks that wait in their first round, and the bundle with the votes of all.
func bundleOf(size int) (members []*member, bundle []byte) {
	var said [][]byte
	for rank := range size {
		m := newMember("sim", rank, size, func(int, []byte) {})
		m.phase = joined
		members = append(members, m)
	}
	for _, m := range members {
		for _, other := range members {
			if other != m {
				m.setEpoch(other.rank, other.epoch)
			}
		}
		if err := m.begin(fwd.Vote{Step: 1, NumTokens: 1, NumTokensPadded: 8, NumReqs: 1}); err != nil {
			panic(err)
		}
		said = append(said, m.said)
	}
	return members, bundles(members[0].message(kindBundle), said, defaultPayload)[0]
}

// BenchmarkBundle takes the votes of all ranks, for one rank and for eight of a process.
func BenchmarkBundle(b *testing.B) {
	for _, size := range []int{16, 256} {
		for _, per := range []int{1, 8} {
			b.Run(fmt.Sprintf("ranks=%d/per=%d", size, per), func(b *testing.B) {
				members, bundle := bundleOf(size)
				hub, process := newSpeaker([]int{0}), members[1:1+per]
				b.ReportAllocs()
				for b.Loop() {
					hear(process, hub, false, bundle)
					for _, m := range process {
						<-m.outcome
						m.round, m.waiting = 0, true
					}
				}
			})
		}
	}
}

func BenchmarkReadTable(b *testing.B) {
	members, bundle := bundleOf(256)
	at := time.Now()
	for b.Loop() {
		if readTable(bundle, members[0].group, 256, at) == nil {
			b.Fatal("no table")
		}
	}
}
