//go:build unix

// Tests with processes that are no ranks of the run.

package faults

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const password = "nobody-prints-this"

// users returns a user for each rank of a run, who may do what a rank must do, and one who may do
// anything elsewhere.
func users(g *group) []*server.User {
	all := []*server.User{{Username: "elsewhere", Password: password, Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
	}}}
	for rank := range g.ranks {
		base := fmt.Sprintf("%s.%s-target", natsdp.DefaultSubjectPrefix, g.name)
		permissions := &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{fmt.Sprintf("%s.*.%d", base, rank)}},
			Subscribe: &server.SubjectPermission{Allow: []string{base + ".all.*", fmt.Sprintf("%s.%d.*", base, rank)}},
		}
		all = append(all, &server.User{
			Username: fmt.Sprint("rank", rank), Password: password, Permissions: permissions,
		})
	}
	return all
}

// TestOutsiders: a process that may not be a rank, or is too late to be one, is told so. It changes
// nothing for the ranks, and neither does one that sends messages it may not send.
func TestOutsiders(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	as := func(user string) string {
		return fmt.Sprintf("nats://%s@127.0.0.1:%d", user, opts.Port)
	}
	url := func(rank int) string { return as(fmt.Sprintf("rank%d:%s", rank, password)) }
	g := newGroup(t, 3, url, "-exchange-timeout 30s")
	opts.Users = users(g)
	opts.Port = portOf(startServer(t, opts))
	g.startAll()
	g.reach(0.1)

	stop := g.flood(as("elsewhere:" + password))
	defer stop()
	for _, tt := range []struct{ user, want string }{
		{"", "Authorization Violation"},
		{"rank1:wrong", "Authorization Violation"},
		{"elsewhere:" + password, "Permissions Violation"},
		{"rank1:" + password, "another process has this rank"},
	} {
		p := g.startAs(1, as(tt.user), filepath.Join(t.TempDir(), "results"))
		exit, text := p.wait(), p.stderr.String()
		if exit != 1 || !strings.Contains(text, tt.want) || strings.Contains(text, password) {
			t.Errorf("as %q: exit %d, stderr %q; want 1 and %q", tt.user, exit, text, tt.want)
		}
		g.amid()
	}
	g.unharmed()
}

// flood sends what looks like messages of rank 1 to everyone, as a user who may not do so, until
// stop is called.
func (g *group) flood(url string) (stop func()) {
	g.Helper()
	quiet := nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}) // the default one prints
	conn, err := nats.Connect(url, quiet)
	if err != nil {
		g.Fatal(err)
	}
	done, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
				_ = conn.Publish(fmt.Sprintf("%s.%s-target.all.1", natsdp.DefaultSubjectPrefix, g.name), []byte("fw"))
			}
		}
	}()
	return func() {
		close(done)
		<-over
		conn.Close()
	}
}
