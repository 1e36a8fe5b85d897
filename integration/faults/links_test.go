//go:build unix

// Tests with links to the server that break or are slow.

package faults

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// link is a proxy through which a rank reaches the server.
type link struct {
	*testing.T
	*toxiproxy.Proxy
}

// newLinks returns a link for each of n ranks.
func newLinks(t *testing.T, n int) []link {
	t.Helper()
	upstream := startServer(t, serverOptions()).Addr().String()
	owner := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	links := make([]link, n)
	for rank := range links {
		links[rank] = link{t, toxiproxy.NewProxy(owner, fmt.Sprint("rank", rank), "127.0.0.1:0", upstream)}
		if err := links[rank].Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(links[rank].Stop)
	}
	return links
}

// through returns the URLs of the server as the ranks see it.
func through(links []link) func(rank int) string {
	return func(rank int) string { return "nats://" + links[rank].Listen }
}

// These are the directions of a link: what its rank says, and what it hears.
const (
	says  = "upstream"
	hears = "downstream"
)

// poison makes a link bad in some directions, in one of toxiproxy's ways, until heal is called.
func (l link) poison(toxic, attributes string, directions ...string) (heal func()) {
	l.Helper()
	var names []string
	for _, stream := range directions {
		text := fmt.Sprintf(`{"type":%q,"stream":%q,"attributes":{%s}}`, toxic, stream, attributes)
		added, err := l.Toxics.AddToxicJson(strings.NewReader(text))
		if err != nil {
			l.Fatal(err)
		}
		names = append(names, added.Name)
	}
	return func() {
		l.Helper()
		for _, name := range names {
			if err := l.Toxics.RemoveToxic(context.Background(), name); err != nil {
				l.Fatal(err)
			}
		}
	}
}

// TestLinkCut: if a connection is closed, and can't be made again for less time than the ranks wait
// in a step, no step is lost. Otherwise steps are lost, and all ranks go on afterwards.
func TestLinkCut(t *testing.T) {
	cut := func(t *testing.T, flags string) (g *group, down, up func(rank int)) {
		links := newLinks(t, 3)
		down = func(rank int) { links[rank].Stop() }
		up = func(rank int) {
			if err := links[rank].Start(); err != nil {
				t.Fatal(err)
			}
		}
		return newGroup(t, len(links), through(links), flags), down, up
	}
	outages(t, 500*time.Millisecond, 2500*time.Millisecond, cut)
}

// TestLinkOneWay: if a rank hears the others and is not heard, or the other way round, for less time than
// the ranks wait in a step, no step is lost. Otherwise steps are lost, no rank goes on alone, and all go on
// afterwards. What gets lost is a part of a stream, so the connection breaks when the link is whole again.
func TestLinkOneWay(t *testing.T) {
	t.Parallel()
	for what, direction := range map[string]string{"not heard": says, "deaf": hears} {
		t.Run(what, func(t *testing.T) {
			oneWay := func(t *testing.T, flags string) (g *group, down, up func(rank int)) {
				links, heal := newLinks(t, 3), make([]func(), 3)
				down = func(rank int) { heal[rank] = links[rank].poison("timeout", `"timeout":0`, direction) }
				up = func(rank int) { heal[rank]() }
				return newGroup(t, len(links), through(links), flags), down, up
			}
			outages(t, 500*time.Millisecond, 2500*time.Millisecond, oneWay)
		})
	}
}

// TestLinkReset: connections that are reset again and again, whenever something goes through them,
// cost no step.
func TestLinkReset(t *testing.T) {
	t.Parallel()
	links := newLinks(t, 3)
	g := newGroup(t, len(links), through(links), "-exchange-timeout 30s")
	g.startAll()
	g.reach(0.1)
	for i := range 6 {
		heal := links[i%len(links)].poison("reset_peer", `"timeout":0`, says, hears)
		g.standStill(200 * time.Millisecond)
		heal()
		g.goOn()
	}
	g.unharmed()
}

// TestLinkSlow: links with a delay of 100 ms in both directions, or of 5 KB/s, make all steps slow,
// and no step fails.
func TestLinkSlow(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		toxic, attributes string
		requests          int
		atLeast           time.Duration // that takes: there is a step for each token of the longest answer
	}{
		{"latency", `"latency":100`, 1, 27 * 200 * time.Millisecond},
		{"bandwidth", `"rate":5`, 40, 96 * 20 * time.Millisecond},
	} {
		t.Run(tt.toxic, func(t *testing.T) {
			t.Parallel()
			links := newLinks(t, 2)
			for _, l := range links {
				l.poison(tt.toxic, tt.attributes, says, hears)
			}
			g := newGroup(t, len(links), through(links), "-exchange-timeout 30s")
			g.requests = tt.requests
			began := time.Now()
			g.startAll()
			g.unharmed()
			if took := time.Since(began); took < tt.atLeast {
				t.Errorf("the run took %v, want at least %v", took, tt.atLeast)
			}
		})
	}
}
