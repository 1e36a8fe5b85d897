// Servers that want to know who connects.

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// authority signs certificates for this host, for servers and clients.
type authority struct {
	*testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{T: t, dir: t.TempDir()}
	a.issue("ca")
	return a
}

// issue writes a certificate and its key to files. The first one is the authority's own.
func (a *authority) issue(name string) (certFile, keyFile string) {
	a.Helper()
	check := func(err error) {
		if err != nil {
			a.Helper()
			a.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	c := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  a.cert == nil,
	}
	if a.cert == nil {
		a.cert, a.key = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &key.PublicKey, a.key)
	check(err)
	secret, err := x509.MarshalECPrivateKey(key)
	check(err)
	write := func(file, kind string, bytes []byte) string {
		path := filepath.Join(a.dir, name+file)
		check(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o600))
		return path
	}
	return write(".pem", "CERTIFICATE", der), write(".key", "EC PRIVATE KEY", secret)
}

// TestCredentials: a rank speaks to a server that its authority vouches for, and shows who it is.
// Without that it is refused immediately.
func TestCredentials(t *testing.T) {
	a := newAuthority(t)
	ca := filepath.Join(a.dir, "ca.pem")
	pair, err := tls.LoadX509KeyPair(a.issue("server"))
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM([]byte(readText(t, ca)))
	s := serverOf(
		t,
		&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, TLSTimeout: 5,
			TLSConfig: &tls.Config{
				Certificates: []tls.Certificate{pair},
				ClientCAs:    clients,
				ClientAuth:   tls.RequireAndVerifyClientCert,
			}},
	)
	cert, key := a.issue("rank")
	flags := []string{"-nats", s.ClientURL(), "-dp", "1", "-rank", "0", "-requests", "3", "-check"}
	exit, out, errs := runServe(t, append(flags, "-nats-ca", ca, "-nats-cert", cert, "-nats-key", key)...)
	if exit != 0 || errs != "" || !strings.HasSuffix(out, "check: 3 of 3 requests agree with the reference\n") {
		t.Errorf("exit %d, stderr %q, stdout %s", exit, errs, out)
	}
	for _, c := range []struct {
		flags []string
		want  string
	}{
		{[]string{"-nats-cert", cert, "-nats-key", key}, "certificate signed by unknown authority"},
		{[]string{"-nats-ca", ca}, "certificate required|connection closed by remote after TLS handshake"},
		{[]string{"-nats-ca", ca + "x"}, "ca.pemx: no such file"},
		{[]string{"-nats-ca", ca, "-nats-cert", cert + "x", "-nats-key", key}, "rank.pemx: no such file"},
		{[]string{"-nats-creds", "no-such-file"}, "no-such-file"},
	} {
		if exit, out, errs := runServe(t, append(flags, c.flags...)...); exit != 1 || out != "" ||
			!regexp.MustCompile(c.want).MatchString(errs) {
			t.Errorf("%v: exit %d, stdout %q, stderr %q, want %q", c.flags, exit, out, errs, c.want)
		}
	}
}

// TestServerConfiguration: by nats.conf a run has all that it needs, and the user of one rank can't
// be another.
func TestServerConfiguration(t *testing.T) {
	file, err := filepath.Abs("nats.conf")
	if err != nil {
		t.Fatal(err)
	}
	a := newAuthority(t)
	a.issue("server")
	t.Chdir(a.dir)
	t.Setenv("RANK0_PASSWORD", "zero")
	t.Setenv("RANK1_PASSWORD", "one")
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatal(err)
	}
	opts.Host, opts.Port, opts.NoLog, opts.NoSigs = "127.0.0.1", server.RANDOM_PORT, true, true
	s := serverOf(t, opts)
	as := func(user, rank string) *program {
		return start(
			t,
			"-nats",
			"nats://"+user+"@"+s.Addr().String(),
			"-nats-ca",
			"ca.pem",
			"-dp",
			"2",
			"-rank",
			rank,
			"-spec",
			"1",
			"-requests",
			"8",
			"-check",
			"-json",
		)
	}
	for _, c := range []struct{ user, rank, want string }{
		{"rank0:one", "0", "Authorization Violation"},
		{"rank0:zero", "1", "(?i)permissions violation"},
	} {
		p := as(c.user, c.rank)
		if exit := p.wait(); exit != 1 || !regexp.MustCompile(c.want).MatchString(p.stderr.String()) {
			t.Errorf("rank %s as %s: exit %d, stderr %q, want %s", c.rank, c.user, exit, &p.stderr, c.want)
		}
	}
	for _, p := range []*program{as("rank0:zero", "0"), as("rank1:one", "1")} {
		if r := p.report(); r.Finished != 4 || *r.Check != (checkReport{Requests: 4, Agreed: 4}) {
			t.Errorf("%+v, check %+v", r, r.Check)
		}
	}
}

func serverOf(t *testing.T, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Shutdown)
	if !s.ReadyForConnections(patience) {
		t.Fatal("the server is not ready")
	}
	return s
}
