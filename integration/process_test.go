// Helpers: Jaeger as a process. Most tests share one.

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long anything is waited for.
const patience = time.Minute

var binary string // Jaeger's

// shared is the Jaeger of most tests. Each of them uses service names of its own.
var shared *process

func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	for _, name := range os.Environ() { // no endpoint, sampler or limit from outside
		if name, _, _ = strings.Cut(name, "="); strings.HasPrefix(name, "OTEL_") {
			os.Unsetenv(name)
		}
	}
	if err := countDrops(); err != nil {
		log.Print(err)
		return 1
	}
	// The first build takes minutes. It is not part of the time that tests have.
	build := exec.Command("go", "run", ".")
	build.Dir, build.Stderr = "jaeger", os.Stderr
	out, err := build.Output()
	if err != nil {
		log.Printf("building Jaeger: %v", err)
		return 1
	}
	binary = strings.TrimSpace(string(out))
	if shared, err = startJaeger(); err != nil {
		log.Print(err)
		return 1
	}
	defer shared.stop()
	return m.Run()
}

// process is a running Jaeger.
type process struct {
	query      Jaeger
	grpc, http string // OTLP endpoints, host:port
	metrics    string // URL
	command    *exec.Cmd
	log        bytes.Buffer
	exited     chan struct{}
	once       sync.Once
}

// startJaeger starts Jaeger with the configuration that users copy, on ports that are free.
func startJaeger() (*process, error) {
	var errs []error
	for range 3 { // somebody else may take a port between our look and Jaeger's
		p, err := tryJaeger()
		if err == nil {
			return p, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func tryJaeger() (*process, error) {
	ports, err := freePorts(5)
	if err != nil {
		return nil, err
	}
	config, err := filepath.Abs("jaeger.yaml")
	if err != nil {
		return nil, err
	}
	p := &process{
		query:   Jaeger("http://127.0.0.1:" + ports[0]),
		grpc:    "127.0.0.1:" + ports[2],
		http:    "127.0.0.1:" + ports[3],
		metrics: "http://127.0.0.1:" + ports[4] + "/metrics",
		command: exec.Command(binary, "--config", config),
		exited:  make(chan struct{}),
	}
	p.command.Env = append(os.Environ(), "JAEGER_LISTEN_HOST=127.0.0.1", "SPANMETRICS_FLUSH_INTERVAL=200ms",
		"QUERY_HTTP_PORT="+ports[0], "QUERY_GRPC_PORT="+ports[1],
		"OTLP_GRPC_PORT="+ports[2], "OTLP_HTTP_PORT="+ports[3], "PROMETHEUS_PORT="+ports[4])
	p.command.Stdout, p.command.Stderr = &p.log, &p.log
	dieWithParent(p.command)
	started := make(chan error)
	go func() {
		// The kernel watches over the thread that started the process, so this one must stay.
		runtime.LockOSThread()
		err := p.command.Start()
		started <- err
		if err == nil {
			_ = p.command.Wait() // how it ended is of no interest: stop kills it
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		if _, err = p.query.Find(ctx, "nobody", nil, 1); err == nil && p.ready() {
			return p, nil
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("jaeger has ended: %s", &p.log)
		case <-ctx.Done():
			p.stop()
			return nil, fmt.Errorf("jaeger does not answer: %w: %s", err, &p.log)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ready reports whether everything is listening, not only the query API.
func (p *process) ready() bool {
	for _, address := range []string{p.grpc, p.http} {
		connection, err := net.Dial("tcp", address)
		if err != nil {
			return false
		}
		connection.Close()
	}
	response, err := http.Get(p.metrics)
	if err != nil {
		return false
	}
	response.Body.Close()
	return true
}

// kill ends Jaeger immediately.
func (p *process) kill() {
	_ = p.command.Process.Kill() // it may have ended
	<-p.exited
}

// stop ends Jaeger.
func (p *process) stop() {
	p.once.Do(func() {
		_ = p.command.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(10 * time.Second):
			p.kill()
		}
	})
}

// freePorts returns ports that nobody listens on now.
func freePorts(n int) ([]string, error) {
	ports := make([]string, n)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		if _, ports[i], err = net.SplitHostPort(l.Addr().String()); err != nil {
			return nil, err
		}
	}
	return ports, nil
}

// eventually calls check until it returns nil. Its last error is the test's.
func eventually(t *testing.T, check func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
