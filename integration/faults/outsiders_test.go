//go:build unix

package faults

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const password = "nobody-prints-this"

// users returns a user for each rank of a run, who may do what a rank has to, and one who may do anything elsewhere.
func users(g *group) []*server.User {
	all := []*server.User{{Username: "elsewhere", Password: password, Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
	}}}
	for rank := range g.ranks {
		var publish, subscribe []string
		for _, name := range []string{"target", "finish"} {
			base := fmt.Sprintf("%s.%s-%s", natsdp.DefaultSubjectPrefix, g.name, name)
			publish = append(publish, fmt.Sprintf("%s.*.%d", base, rank))
			subscribe = append(subscribe, base+".all.*", fmt.Sprintf("%s.%d.*", base, rank))
		}
		all = append(all, &server.User{Username: fmt.Sprint("rank", rank), Password: password, Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: publish},
			Subscribe: &server.SubjectPermission{Allow: subscribe},
		}})
	}
	return all
}

// TestOutsiders: whoever wants to be a rank and may not, or not any more, is told so and changes nothing for those who are, and
// neither does one who sends what is not allowed.
func TestOutsiders(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	as := func(user string) string {
		return fmt.Sprintf("nats://%s@127.0.0.1:%d", user, opts.Port)
	}
	g := newGroup(t, 3, func(rank int) string { return as(fmt.Sprintf("rank%d:%s", rank, password)) }, "-exchange-timeout 30s")
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
		p := g.startAs(1, as(tt.user), g.files[1]) // which it does not come to open
		if exit, text := p.wait(), p.stderr.String(); exit != 1 || !strings.Contains(text, tt.want) || strings.Contains(text, password) {
			t.Errorf("as %q: exit %d, stderr %q; want 1 and %q", tt.user, exit, text, tt.want)
		}
		g.amid()
	}
	g.unharmed()
}

// flood sends what looks like messages of rank 1 to everyone, as a user who may not, until the function that it returns is called.
func (g *group) flood(url string) (stop func()) {
	g.Helper()
	conn, err := nats.Connect(url, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // the default one prints
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
