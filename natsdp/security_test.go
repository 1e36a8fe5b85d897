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
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func (a *authority) server(t *testing.T) (certFile, keyFile string) {
	return a.sign(t, "server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
}

func (a *authority) client(t *testing.T) (certFile, keyFile string) {
	return a.sign(t, "client", &x509.Certificate{Subject: pkix.Name{CommonName: "rank"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
}

// With mutual TLS, ranks with a certificate of the authority become a group, and nobody else gets in.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t, "ca"), newAuthority(t, "other")
	cert, key := ca.server(t)
	opts := serverOptions()
	opts.TLS, opts.TLSVerify = true, true
	var err error
	if opts.TLSConfig, err = server.GenTLSConfig(&server.TLSConfigOpts{CertFile: cert, KeyFile: key, CaFile: ca.file, Verify: true}); err != nil {
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
		c, err := natsdp.Join(t.Context(), natsdp.Config{Group: newName(), Size: 1}, natsdp.WithURL(s.ClientURL(), opts...))
		if err == nil {
			c.Close()
		}
		if _, isTLS := errors.AsType[*tls.CertificateVerificationError](err); err == nil || !isTLS && !strings.Contains(err.Error(), "tls") {
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

// rankUsers returns a user for each rank of a group, with the permissions that a rank needs and no others, and one who may
// do anything elsewhere.
func rankUsers(group string, size int) []*server.User {
	base := natsdp.DefaultSubjectPrefix + "." + group
	users := []*server.User{{Username: "elsewhere", Password: "pw", Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"elsewhere.>"}},
	}}}
	for rank := range size {
		users = append(users, &server.User{Username: fmt.Sprint("rank", rank), Password: "pw", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{fmt.Sprintf("%s.*.%d", base, rank)}},
			Subscribe: &server.SubjectPermission{Allow: []string{base + ".all.*", fmt.Sprintf("%s.%d.*", base, rank)}},
		}})
	}
	return users
}

// Who has no credentials gets nowhere, who has some for other subjects neither, and a rank can't speak for another.
func TestCredentials(t *testing.T) {
	t.Parallel()
	const size = 3
	name := newName()
	opts := serverOptions()
	opts.Users = rankUsers(name, size)
	s := startServer(t, opts)
	group := joinAll(t, name, size, func(rank int) []natsdp.Option {
		return at(s, nats.UserInfo(fmt.Sprint("rank", rank), "pw"))(rank)
	})
	together(t, group, 1)

	t.Run("none", func(t *testing.T) {
		for _, url := range []string{s.ClientURL(), strings.Replace(s.ClientURL(), "//", "//rank0:wrong@", 1)} {
			if _, err := natsdp.Join(t.Context(), natsdp.Config{Group: name, Rank: 0, Size: size}, natsdp.WithURL(url)); !errors.Is(err, nats.ErrAuthorization) {
				t.Errorf("joining by %s: %v, want %v", url, err, nats.ErrAuthorization)
			}
		}
		// A client that does not keep to the protocol, and just sends what would break the round.
		conn, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		if _, err := in.ReadString('\n'); err != nil { // INFO
			t.Fatal(err)
		}
		broken := natsdp.ForgeBroken(name, size, 1, 1<<61, 2, 0)
		fmt.Fprintf(conn, "CONNECT {\"verbose\":false}\r\nSUB fwd.dp.> 1\r\nPUB fwd.dp.%s.all.1 %d\r\n%s\r\nPING\r\n", name, len(broken), broken)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if line, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(line, "-ERR 'Authorization") {
			t.Errorf("the server says %q, %v", line, err)
		}
		if line, err := in.ReadString('\n'); err == nil {
			t.Errorf("the server goes on with %q", line)
		}
	})

	// What happens on one's connection while the group takes steps.
	as := func(t *testing.T, user string) (conn *nats.Conn, refused chan error) {
		refused = make(chan error, 100)
		return connect(t, s, nats.UserInfo(user, "pw"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			refused <- err
		})), refused
	}
	forge := func(t *testing.T, conn *nats.Conn, subject string, rank int) {
		for round := uint64(2); round < 6; round++ {
			for _, message := range [][]byte{
				natsdp.ForgeVote(name, size, rank, 1<<61, round, fwd.Vote{Step: round, NumTokensPadded: 999}),
				natsdp.ForgeBroken(name, size, rank, 1<<61, round, (rank+1)%size),
			} {
				if err := conn.Publish(subject, message); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := conn.FlushTimeout(patience); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("elsewhere", func(t *testing.T) {
		conn, refused := as(t, "elsewhere")
		heard, err := conn.SubscribeSync(natsdp.DefaultSubjectPrefix + ".>")
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{"all", "0", "1"} {
			forge(t, conn, fmt.Sprintf("%s.%s.%s.2", natsdp.DefaultSubjectPrefix, name, to), 2)
		}
		together(t, group, 2)
		if msg, err := heard.NextMsg(100 * time.Millisecond); err == nil {
			t.Errorf("somebody else hears %q", msg.Subject)
		}
		select {
		case <-refused:
		case <-time.After(patience):
			t.Error("the server refused nothing")
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err = natsdp.Join(ctx, natsdp.Config{Group: name, Rank: 1, Size: size}, natsdp.WithURL(s.ClientURL(), nats.UserInfo("elsewhere", "pw")))
		if !errors.Is(err, nats.ErrPermissionViolation) || ctx.Err() != nil {
			t.Errorf("joining: %v, want %v, and soon", err, nats.ErrPermissionViolation)
		}
	})

	t.Run("another rank", func(t *testing.T) {
		conn, refused := as(t, "rank2")
		base := natsdp.DefaultSubjectPrefix + "." + name
		forge(t, conn, base+".all.1", 1) // in the name of rank 1, on its subject: the server does not let that through
		for n := range 8 {
			select {
			case <-refused:
			case <-time.After(patience):
				t.Fatalf("the server refused %d of 8 messages", n)
			}
		}
		before := group[0].Stats().Foreign
		forge(t, conn, base+".all.2", 1) // on its own: nobody believes it
		together(t, group, 3)
		if got := group[0].Stats().Foreign - before; got != 8 {
			t.Errorf("rank 0 has counted %d foreign messages, want 8", got)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := natsdp.Join(ctx, natsdp.Config{Group: name, Rank: 1, Size: size}, natsdp.WithURL(s.ClientURL(), nats.UserInfo("rank2", "pw")))
		if !errors.Is(err, nats.ErrPermissionViolation) || ctx.Err() != nil {
			t.Errorf("joining as another rank: %v, want %v, and soon", err, nats.ErrPermissionViolation)
		}
	})
	together(t, group, 4)
}

// What a server has refused before, on a connection that is shared, is not held against a rank that it lets in.
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
	together(t, joinAll(t, name, 1, func(int) []natsdp.Option { return []natsdp.Option{natsdp.WithConn(conn)} }), 1)
}

// Whatever anybody sends on the subjects of a group, short of speaking for a rank in its present life, is counted and ignored. The
// group neither stalls nor is steered.
func TestNoise(t *testing.T) {
	t.Parallel()
	const size, steps = 3, 3000
	s := startServer(t, serverOptions())
	name := newName()
	group := joinAll(t, name, size, at(s))
	base := natsdp.DefaultSubjectPrefix + "." + name
	conn := connect(t, s)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
			}
			round := n % (steps + 2)
			vote := fwd.Vote{Step: round + 1, NumTokensPadded: 999}
			good := natsdp.ForgeVote(name, size, 1, 1<<61, round+1, vote)
			for _, message := range [][]byte{
				good[:len(good)-1], append(good, 0), append([]byte("xx"), good[2:]...), {}, []byte("fw"), // malformed
				append([]byte("fw\x63"), good[3:]...), // another version
				natsdp.ForgeVote("another", size, 1, 1<<61, round+1, vote),
				natsdp.ForgeVote(name, size+1, 1, 1<<61, round+1, vote),
				natsdp.ForgeBroken(name, size-1, 1, 1<<61, round+1, 0),
				natsdp.ForgeVote(name, size, 2, 1<<61, round+1, vote), // on the subject of rank 1
				natsdp.ForgeVote(name, size, 1, 1, round+1, vote),     // of a life that is over
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
		together(t, group, step)
	}
	close(stop)
	<-stopped
	for rank, c := range group {
		stats := c.Stats()
		t.Logf("rank %d: %+v", rank, stats)
		if rank != 1 && (stats.Malformed == 0 || stats.Foreign == 0 || stats.Stale == 0) || stats.Broken != 0 {
			t.Errorf("rank %d has counted %+v", rank, stats)
		}
	}
}
