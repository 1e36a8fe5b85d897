// Tests with ranks on two hosts, which are network namespaces.

package faults

import (
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"
)

// hosts are two network namespaces with a link between them. Two hosts have no more in common.
type hosts struct {
	*testing.T
	names [2]string
}

// device is each host's end of the link.
const device = "veth0"

// address returns where the other host finds this one.
func address(host int) string { return fmt.Sprint("10.0.0.", host+1) }

var hostPairs atomic.Int64

func newHosts(t *testing.T) *hosts {
	t.Helper()
	needNamespaces(t)
	h, pair := &hosts{T: t}, hostPairs.Add(1)
	for i := range h.names {
		name := fmt.Sprintf("%s-%d-%d", ownName(os.Getpid()), pair, i)
		h.ip("netns", "add", name)
		t.Cleanup(func() { h.ip("netns", "delete", name) })
		h.names[i] = name
	}
	h.ip("link", "add", "name", device, "netns", h.names[0],
		"type", "veth", "peer", "name", device, "netns", h.names[1])
	for i, name := range h.names {
		h.ip("-n", name, "address", "add", address(i)+"/24", "dev", device)
		h.ip("-n", name, "link", "set", "lo", "up")
		h.ip("-n", name, "link", "set", device, "up")
	}
	return h
}

// needNamespaces skips a test if there can be no network namespaces. If CI is true, the test fails
// instead.
func needNamespaces(t *testing.T) {
	t.Helper()
	_, err := exec.LookPath("ip")
	switch {
	case err == nil && os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatalf("network namespaces need root, and ip: user %d, %v", os.Geteuid(), err)
	default:
		t.Skipf("network namespaces need root, and ip: user %d, %v", os.Geteuid(), err)
	}
}

// ip runs the command ip.
func (h *hosts) ip(args ...string) {
	h.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		h.Fatalf("ip %q: %v: %s", args, err, out)
	}
}

// command returns a command that runs on a host.
func (h *hosts) command(host int, args ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", h.names[host]}, args...)...)
}

// startServer starts a NATS server on host 0, and returns its URL.
func (h *hosts) startServer() string {
	h.Helper()
	program, err := os.Executable()
	if err != nil {
		h.Fatal(err)
	}
	server := address(0) + ":4222"
	cmd := h.command(0, program)
	cmd.Env = append(os.Environ(), asServer+"="+server)
	p := start(h.T, "the server", cmd)
	h.Cleanup(p.kill)
	return "nats://" + server
}

// removeStaleNamespaces removes the namespaces of processes that have died.
func removeStaleNamespaces() {
	entries, _ := os.ReadDir("/var/run/netns") // there may be none
	for _, e := range entries {
		if isStale(e.Name()) {
			_ = exec.Command("ip", "netns", "delete", e.Name()).Run()
		}
	}
}

// TestHosts: if the link between two hosts is down for less time than the ranks wait in a step, no
// step is lost. If it is down for longer, steps are lost, and both ranks go on afterwards. No
// connection is closed meanwhile, but nothing comes through.
func TestHosts(t *testing.T) {
	outages(t, time.Second, 3*time.Second, func(t *testing.T, flags string) (g *group, down, up func(rank int)) {
		h := newHosts(t)
		url := h.startServer()
		g = newGroup(t, 2, func(int) string { return url }, flags)
		g.command = func(rank int, args ...string) *exec.Cmd {
			return h.command(rank, append([]string{binary}, args...)...)
		}
		set := func(state string) func(rank int) {
			return func(rank int) { h.ip("-n", h.names[rank], "link", "set", device, state) }
		}
		return g, set("down"), set("up")
	})
}
