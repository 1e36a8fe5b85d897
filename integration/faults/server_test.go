//go:build unix

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

// serverOptions are those of a server on a free port of the loopback interface.
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

// asServer is an environment variable that makes the test binary a NATS server at this address, for other hosts than this one.
const asServer = "FAULTS_NATS_SERVER"

// serveNATS is a NATS server until it is killed.
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

// TestServerRestarted: a server that is gone for less time than the ranks wait in a step costs no step.
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
