// This file tests who gets in, and what others can do to a group.

package natsdp_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// authority signs certificates.
type authority struct {
	dir  string
	file string // with its own certificate
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	a.file, _ = a.sign(t, name, template)
	return a
}

// sign writes a certificate and its key to files. The first one is the authority's own.
func (a *authority) sign(t *testing.T, name string, template *x509.Certificate) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		a.key = key
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(a.dir, name+".pem"), filepath.Join(a.dir, name+".key")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: der},
		keyFile:  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func (a *authority) server(t *testing.T) (certFile, keyFile string) {
	return a.sign(t, "server", &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

func (a *authority) client(t *testing.T) (certFile, keyFile string) {
	return a.sign(t, "client", &x509.Certificate{
		Subject:     pkix.Name{CommonName: "rank"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// With mutual TLS, ranks with a certificate of the authority become a group, and nobody else gets
// in.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t, "ca"), newAuthority(t, "other")
	cert, key := ca.server(t)
	opts := serverOptions()
	opts.TLS, opts.TLSVerify = true, true
	var err error
	files := &server.TLSConfigOpts{CertFile: cert, KeyFile: key, CaFile: ca.file, Verify: true}
	if opts.TLSConfig, err = server.GenTLSConfig(files); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, opts)
	cert, key = ca.client(t)
	group := joinAll(t, newName(), 3, at(s, nats.RootCAs(ca.file), nats.ClientCert(cert, key)))
	for step := uint64(1); step <= 20; step++ {
		together(t, group, step)
	}

	foreignCert, foreignKey := other.client(t)
	for name, opts := range map[string][]nats.Option{
		"no certificate":                     {nats.RootCAs(ca.file)},
		"a certificate of another authority": {nats.RootCAs(ca.file), nats.ClientCert(foreignCert, foreignKey)},
		"a server that is not trusted":       {nats.RootCAs(other.file), nats.ClientCert(cert, key)},
	} {
		began := time.Now()
		cfg := natsdp.Config{Group: newName(), Size: 1}
		c, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(s.ClientURL(), opts...))
		if err == nil {
			c.Close()
		}
		var untrusted *tls.CertificateVerificationError
		if err == nil || !errors.As(err, &untrusted) && !strings.Contains(err.Error(), "tls") {
			t.Errorf("%s: joined with %v, want a refusal of TLS", name, err)
		}
		if took := time.Since(began); took > patience/2 {
			t.Errorf("%s: the refusal took %v", name, took)
		}
	}
	for step := uint64(21); step <= 25; step++ {
		together(t, group, step)
	}
}

// rankUsers returns a user for each rank of a group, who has exactly the permissions that a rank
// needs, and one who may do anything elsewhere.
func rankUsers(group string, size int) []*server.User {
	base := natsdp.DefaultSubjectPrefix + "." + group
	users := []*server.User{{Username: "elsewhere", Password: "pw", Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
	}}}
	for rank := range size {
		own := []string{base + ".all.*", fmt.Sprintf("%s.%d.*", base, rank)}
		users = append(users, &server.User{
			Username: fmt.Sprint("rank", rank), Password: "pw",
			Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: []string{fmt.Sprintf("%s.*.%d", base, rank)}},
				Subscribe: &server.SubjectPermission{Allow: own},
			},
		})
	}
	return users
}

// guarded is a group on a server that lets each rank do only what it needs.
type guarded struct {
	*testing.T
	server *server.Server
	name   string
	group  []*natsdp.Coordinator
}

func newGuarded(t *testing.T, size int) *guarded {
	t.Helper()
	g := &guarded{T: t, name: newName()}
	opts := serverOptions()
	opts.Users = rankUsers(g.name, size)
	g.server = startServer(t, opts)
	g.group = joinAll(t, g.name, size, func(rank int) []natsdp.Option {
		return at(g.server, nats.UserInfo(fmt.Sprint("rank", rank), "pw"))(rank)
	})
	together(t, g.group, 1)
	return g
}

// as returns a connection of a user, and what the server refuses to it.
func (g *guarded) as(user string) (conn *nats.Conn, refused chan error) {
	refused = make(chan error, 100)
	note := func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err }
	return connect(g.T, g.server, nats.UserInfo(user, "pw"), nats.ErrorHandler(note)), refused
}

// forge publishes 8 messages of a rank that would disturb the group's rounds.
func (g *guarded) forge(conn *nats.Conn, subject string, rank int) {
	g.Helper()
	size := len(g.group)
	for round := uint64(2); round < 6; round++ {
		vote := fwd.Vote{Step: round, NumTokensPadded: 999}
		for _, message := range [][]byte{
			natsdp.ForgeVote(g.name, size, rank, natsdp.LaterEpoch(), round, vote),
			natsdp.ForgeBroken(g.name, size, rank, natsdp.LaterEpoch(), round, (rank+1)%size),
		} {
			if err := conn.Publish(subject, message); err != nil {
				g.Fatal(err)
			}
		}
	}
	if err := conn.FlushTimeout(patience); err != nil {
		g.Fatal(err)
	}
}

// notAllowed checks that a user can't join as rank 1, and learns it soon.
func (g *guarded) notAllowed(user string) {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), patience)
	defer cancel()
	cfg := natsdp.Config{Group: g.name, Rank: 1, Size: len(g.group)}
	_, err := natsdp.Join(ctx, cfg, natsdp.WithURL(g.server.ClientURL(), nats.UserInfo(user, "pw")))
	if !errors.Is(err, nats.ErrPermissionViolation) || ctx.Err() != nil {
		g.Errorf("joining as %s: %v, want %v, and soon", user, err, nats.ErrPermissionViolation)
	}
}

// Without credentials nobody gets in.
func TestNoCredentials(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, 3)
	url := g.server.ClientURL()
	cfg := natsdp.Config{Group: g.name, Rank: 0, Size: 3}
	for _, url := range []string{url, strings.Replace(url, "//", "//rank0:wrong@", 1)} {
		if _, err := natsdp.Join(t.Context(), cfg, natsdp.WithURL(url)); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("joining by %s: %v, want %v", url, err, nats.ErrAuthorization)
		}
	}
	// A client that does not keep to the protocol just sends what would break the round.
	conn, err := net.Dial("tcp", g.server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	if _, err := in.ReadString('\n'); err != nil { // INFO
		t.Fatal(err)
	}
	broken := natsdp.ForgeBroken(g.name, 3, 1, natsdp.LaterEpoch(), 2, 0)
	fmt.Fprintf(conn, "CONNECT {\"verbose\":false}\r\nSUB fwd.dp.> 1\r\n")
	fmt.Fprintf(conn, "PUB fwd.dp.%s.all.1 %d\r\n%s\r\nPING\r\n", g.name, len(broken), broken)
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if line, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(line, "-ERR 'Authorization") {
		t.Errorf("the server says %q, %v", line, err)
	}
	if line, err := in.ReadString('\n'); err == nil {
		t.Errorf("the server goes on with %q", line)
	}
	together(t, g.group, 2)
}

// A user of other subjects neither hears nor disturbs the group.
func TestCredentialsForOtherSubjects(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, 3)
	conn, refused := g.as("elsewhere")
	heard, err := conn.SubscribeSync(natsdp.DefaultSubjectPrefix + ".>")
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"all", "0", "1"} {
		g.forge(conn, fmt.Sprintf("%s.%s.%s.2", natsdp.DefaultSubjectPrefix, g.name, to), 2)
	}
	together(t, g.group, 2)
	if msg, err := heard.NextMsg(100 * time.Millisecond); err == nil {
		t.Errorf("a user of other subjects hears %q", msg.Subject)
	}
	select {
	case <-refused:
	case <-time.After(patience):
		t.Error("the server refused nothing")
	}
	g.notAllowed("elsewhere")
	together(t, g.group, 3)
}

// A rank can't speak for another.
func TestCredentialsOfAnotherRank(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, 3)
	conn, refused := g.as("rank2")
	base := natsdp.DefaultSubjectPrefix + "." + g.name
	g.forge(conn, base+".all.1", 1) // as rank 1, on its subject: the server does not let that through
	for n := range 8 {
		select {
		case <-refused:
		case <-time.After(patience):
			t.Fatalf("the server refused %d of 8 messages", n)
		}
	}
	before := g.group[0].Stats().Foreign
	g.forge(conn, base+".all.2", 1) // as rank 1, on its own subject: nobody believes it
	together(t, g.group, 2)
	if got := g.group[0].Stats().Foreign - before; got != 8 {
		t.Errorf("rank 0 has counted %d foreign messages, want 8", got)
	}
	g.notAllowed("rank2")
	together(t, g.group, 3)
}

// On a shared connection, what the server has refused before does not keep a rank from joining that
// it lets in.
func TestRefusedBefore(t *testing.T) {
	t.Parallel()
	name := newName()
	opts := serverOptions()
	opts.Users = rankUsers(name, 1)
	s := startServer(t, opts)
	conn := connect(t, s, nats.UserInfo("rank0", "pw"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := natsdp.Join(ctx, natsdp.Config{Group: name, Rank: 1, Size: 2}, natsdp.WithConn(conn))
	if !errors.Is(err, nats.ErrPermissionViolation) || ctx.Err() != nil {
		t.Errorf("joining as another rank: %v, want %v, and soon", err, nats.ErrPermissionViolation)
	}
	group := joinAll(t, name, 1, func(int) []natsdp.Option {
		return []natsdp.Option{natsdp.WithConn(conn)}
	})
	together(t, group, 1)
}

// Whatever anybody sends on the subjects of a group is counted and ignored, unless it speaks for a
// rank in its present life. It neither stalls nor steers the group.
func TestNoise(t *testing.T) {
	t.Parallel()
	const size, steps = 3, 3000
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, size, at(s))
	base := natsdp.DefaultSubjectPrefix + "." + name
	conn := connect(t, s)
	// The noise keeps pace with the steps: a flood that no rank can read would only show how fast the
	// machine is.
	began, stopped := make(chan uint64, 4), make(chan struct{})
	go func() {
		defer close(stopped)
		for round := range began {
			vote := fwd.Vote{Step: round + 1, NumTokensPadded: 999}
			good := natsdp.ForgeVote(name, size, 1, natsdp.LaterEpoch(), round+1, vote)
			for _, message := range [][]byte{
				good[:len(good)-1], append(good, 0), {}, []byte("fw"), // malformed
				append([]byte("xx"), good[2:]...),     // likewise
				append([]byte("fw\x63"), good[3:]...), // another version
				natsdp.ForgeVote("another", size, 1, natsdp.LaterEpoch(), round+1, vote),
				natsdp.ForgeVote(name, size+1, 1, natsdp.LaterEpoch(), round+1, vote),
				natsdp.ForgeBroken(name, size-1, 1, natsdp.LaterEpoch(), round+1, 0),
				natsdp.ForgeVote(name, size, 2, natsdp.LaterEpoch(), round+1, vote), // on the subject of rank 1
				natsdp.ForgeVote(name, size, 1, 1, round+1, vote),                   // of a life that is over
				natsdp.ForgeBroken(name, size, 1, 1, round+1, 0),
			} {
				_ = conn.Publish(base+".all.1", message)
				_ = conn.Publish(base+".0.1", message)
			}
			_ = conn.Publish(base+".all.x", good)
			_ = conn.Publish(base+".all.-1", good)
			_ = conn.Publish(base+".0.99999999999999999999", good)
		}
	}()
	for step := uint64(1); step <= steps; step++ {
		began <- step + step%3 - 1 // for rounds that are over, open, and to come
		together(t, group, step)
	}
	close(began)
	<-stopped
	for rank, c := range group {
		stats := c.Stats()
		t.Logf("rank %d: %+v", rank, stats)
		silent := stats.Malformed == 0 || stats.Foreign == 0 || stats.Stale == 0
		if rank != 1 && silent || stats.Broken != 0 {
			t.Errorf("rank %d has counted %+v", rank, stats)
		}
	}
}

// While a rank can't look at its messages, those that it keeps are bounded in bytes, not only in
// number, and it is together with the others afterwards.
func TestQueueIsBounded(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, 2, at(s))
	together(t, group, 1)
	overrun(t, s, name, group[0])
	together(t, group, 2)
}

// overrun keeps a rank from looking at its messages until some are dropped.
func overrun(t *testing.T, s *server.Server, name string, c *natsdp.Coordinator) {
	t.Helper()
	defer natsdp.Pause(c)()
	conn := connect(t, s)
	for range 64 {
		_ = conn.Publish(natsdp.DefaultSubjectPrefix+"."+name+".all.1", make([]byte, 1<<19))
	}
	if err := conn.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a message that is dropped", func() bool { return natsdp.Dropped(c) > 0 })
}
