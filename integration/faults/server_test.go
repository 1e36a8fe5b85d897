//go:build unix

// Helpers that run a NATS server, and a test in which it goes away.

package faults

import (
	"log"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// serverOptions returns the options of a server on a free port of the loopback interface.
func serverOptions() *server.Options {
	return &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true}
}

// startServer starts a NATS server, which ends with the test.
func startServer(t *testing.T, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopServer(s) })
	s.Start()
	if !s.ReadyForConnections(patience) {
		t.Fatal("the server does not start")
	}
	return s
}

func stopServer(s *server.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

func portOf(s *server.Server) int { return s.Addr().(*net.TCPAddr).Port }

// at returns the URL of a server, the same for all ranks.
func at(s *server.Server) func(rank int) string {
	return func(int) string { return s.ClientURL() }
}

// asServer is an environment variable that makes the test binary a NATS server at this address, so
// that one can run on another host.
const asServer = "FAULTS_NATS_SERVER"

// serveNATS runs a NATS server until the process is killed.
func serveNATS(address string) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		log.Fatal(err)
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		log.Fatal(err)
	}
	s, err := server.NewServer(&server.Options{Host: host, Port: port})
	if err != nil {
		log.Fatal(err)
	}
	s.Start()
	s.WaitForShutdown()
	os.Exit(0)
}

// TestServerRestarted: if the server is gone for less time than the ranks wait in a step, no step
// is lost.
func TestServerRestarted(t *testing.T) {
	t.Parallel()
	opts := serverOptions()
	s := startServer(t, opts)
	opts.Port = portOf(s) // it is the only one that the ranks know
	g := newGroup(t, 3, at(s), "-exchange-timeout 30s")
	g.startAll()
	for _, part := range []float64{0.2, 0.5} {
		g.reach(part)
		stopServer(s)
		g.standStill(time.Second)
		s = startServer(t, opts)
	}
	g.unharmed()
}
