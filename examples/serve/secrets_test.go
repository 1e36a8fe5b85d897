// Who a rank is to the server: where that may stand, and that no secret of it is ever printed.

package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"
)

// secret is what must not be printed, in any form of URL, file or variable.
const secret = "s3cret"

// doorkeeper is a server that lets in whoever knows its secret, in one of the ways that there are.
type doorkeeper struct {
	mu   sync.Mutex
	came []string      // how each client tried
	user nkeys.KeyPair // whose credentials it lets in
}

// Check implements [server.Authentication].
func (d *doorkeeper) Check(client server.ClientAuthentication) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := client.GetOpts()
	switch {
	case o.Sig != "":
		d.came = append(d.came, "credentials")
		signature, err := base64.RawURLEncoding.DecodeString(o.Sig)
		return err == nil && d.user.Verify(client.GetNonce(), signature) == nil
	case o.Token != "":
		d.came = append(d.came, "token")
		return o.Token == secret
	default:
		d.came = append(d.came, "user "+o.Username)
		return o.Password == secret
	}
}

// visits returns how clients have tried since the last call, each way once.
func (d *doorkeeper) visits() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	came := slices.Compact(d.came)
	d.came = nil
	return came
}

// newDoorkeeper starts a server, and returns where it is.
func newDoorkeeper(t *testing.T) (d *doorkeeper, address string) {
	t.Helper()
	d = &doorkeeper{user: newUser(t)}
	s := serverOf(t, &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		CustomClientAuthentication: d, AlwaysEnableNonce: true})
	return d, s.Addr().String()
}

func newUser(t *testing.T) nkeys.KeyPair {
	t.Helper()
	user, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	return user
}

// writeCreds writes the credentials of a user to a file, in place of what was there.
func writeCreds(t *testing.T, path string, user nkeys.KeyPair) {
	t.Helper()
	seed, err := user.Seed()
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("-----BEGIN NATS USER JWT-----\n%s\n------END NATS USER JWT------\n\n"+
		"-----BEGIN USER NKEY SEED-----\n%s\n------END USER NKEY SEED------\n", secret, seed)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// setLogin sets the environment variables of a login, NAME=value, and no others.
func setLogin(t *testing.T, variables ...string) {
	t.Helper()
	for _, name := range loginVariables {
		t.Setenv(name, "")
	}
	for _, v := range variables {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
}

// TestLogin: a rank says who it is in each of the ways that there are, and what the flags say goes
// before the environment.
func TestLogin(t *testing.T) {
	d, address := newDoorkeeper(t)
	creds := filepath.Join(t.TempDir(), "rank0.creds")
	writeCreds(t, creds, d.user)
	for _, c := range []struct {
		name  string
		env   []string
		flags []string
		want  string // how it comes
	}{
		{"user in the environment", []string{"NATS_USER=rank0", "NATS_PASSWORD=" + secret}, nil, "user rank0"},
		{"token in the environment", []string{"NATS_TOKEN=" + secret}, nil, "token"},
		{"file in the environment", []string{"NATS_CREDS=" + creds}, nil, "credentials"},
		{"file", []string{"NATS_USER=u", "NATS_PASSWORD=wrong"}, []string{"-nats-creds", creds}, "credentials"},
		{"URL", []string{"NATS_TOKEN=wrong", "NATS_CREDS=none"},
			[]string{"-nats", "rank1:" + secret + "@" + address}, "user rank1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			setLogin(t, c.env...)
			args := []string{"-nats", address, "-dp", "1", "-rank", "0", "-requests", "3", "-spec", "1", "-check",
				"-join-timeout", "20s"}
			exit, out, errs := runServe(t, append(args, c.flags...)...)
			const want = "check: 3 of 3 requests agree with the reference\n"
			if exit != 0 || errs != "" || !strings.HasSuffix(out, want) {
				t.Errorf("exit %d, stderr %q, stdout %s", exit, errs, out)
			}
			if came := d.visits(); !slices.Equal(came, []string{c.want}) {
				t.Errorf("it came as %q, want %q", came, c.want)
			}
		})
	}
	t.Run("processes", func(t *testing.T) { // they have a server of their own
		setLogin(t, "NATS_CREDS=none", "NATS_TOKEN="+secret)
		if r := start(t, "-processes", "-dp", "2", "-requests", "3", "-json").report(); r.Finished != 3 {
			t.Errorf("%+v", r)
		}
	})
}

// TestLoginRotated: a rank whose credentials are refused says so, and goes on with those that the file
// has later.
func TestLoginRotated(t *testing.T) {
	d, address := newDoorkeeper(t)
	creds := filepath.Join(t.TempDir(), "rank0.creds")
	writeCreds(t, creds, newUser(t))
	setLogin(t, "NATS_CREDS="+creds)
	p := start(t, "-nats", address, "-dp", "1", "-rank", "0", "-requests", "3", "-json", "-join-timeout", "1h")
	eventually(t, "it is refused twice", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.came) >= 2
	})
	writeCreds(t, creds, d.user)
	exit := p.wait()
	if errs := p.stderr.String(); exit != 0 || !strings.Contains(errs, "cannot connect yet") ||
		!strings.Contains(errs, "Authorization Violation") || strings.Contains(errs, secret) {
		t.Errorf("exit %d, stderr %q", exit, errs)
	}
}

// TestBadLogin: ways that don't go together are refused, without a word of what is in them.
func TestBadLogin(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	const creds = "-----BEGIN NATS USER JWT-----\n" + secret + "\n------END NATS USER JWT------\n"
	_, address := newDoorkeeper(t)
	for _, c := range []struct {
		env   []string
		flags string
		exit  int
		want  string
	}{
		{[]string{"NATS_USER=" + secret}, "", 2, "serve: NATS_USER is set without NATS_PASSWORD: they need "},
		{[]string{"NATS_PASSWORD=" + secret}, "", 2, "serve: NATS_PASSWORD is set without NATS_USER: they need "},
		{[]string{"NATS_TOKEN=" + secret, "NATS_CREDS=" + secret}, "", 2,
			"serve: NATS_TOKEN and NATS_CREDS are set: give one of them"},
		{[]string{"NATS_USER=u", "NATS_PASSWORD=" + secret, "NATS_TOKEN=" + secret}, "", 2,
			"serve: NATS_USER and NATS_TOKEN are set: "},
		{nil, "-nats u:" + secret + "@" + address + " -nats-creds file", 2,
			"serve: -nats-creds is file beside a user or a token in -nats xxxxx@" + address + ": give one of them"},
		{[]string{"NATS_CREDS=" + creds}, "", 1, "serve: NATS_CREDS: the file that it names can't be read: "},
		{[]string{"NATS_CREDS=" + junk}, "", 1, "serve: -nats " + address + ": group serve-"},
		{[]string{"NATS_USER=u", "NATS_PASSWORD=" + secret + "?"}, "", 1, "Authorization Violation"},
		{[]string{"NATS_TOKEN=" + secret + "?"}, "", 1, "Authorization Violation"},
	} {
		setLogin(t, c.env...)
		args := append([]string{"-nats", address, "-dp", "1", "-rank", "0"}, strings.Fields(c.flags)...)
		exit, out, errs := runServe(t, args...)
		if exit != c.exit || out != "" || !strings.Contains(errs, c.want) || strings.Contains(errs, secret) {
			t.Errorf("%q %s: exit %d, stdout %q, stderr %q, want %d and %q",
				c.env, c.flags, exit, out, errs, c.exit, c.want)
		}
	}
}

// TestSecrets: what may be a password or a token is not printed, wherever it stands in -nats, or where
// -nats was meant.
func TestSecrets(t *testing.T) {
	for _, c := range []struct{ url, want string }{
		{"nats://s3cret@127.0.0.1:1",
			"-nats nats://xxxxx@127.0.0.1:1: group serve-target: nats: no servers available"},
		{"nats://rank0:s3cret@127.0.0.1:1,nats://rank0:s3cret@127.0.0.1:2",
			"-nats nats://xxxxx@127.0.0.1:1,nats://xxxxx@127.0.0.1:2: group serve-target: nats: no servers"},
		{"nats://rank0:%s3cret@127.0.0.1:1",
			"-nats nats://xxxxx@127.0.0.1:1: group serve-target: fwd: invalid: URL 1 of 1"},
		{"nats://rank0:a/s3cret@127.0.0.1:1",
			"-nats nats://xxxxx@127.0.0.1:1: group serve-target: fwd: invalid: URL 1 of 1"},
		{"nats://rank0:a,s3cret@127.0.0.1:1", "-nats nats://xxxxx@127.0.0.1:1: "},
		{"rank0:s3cret@127.0.0.1:1", "-nats xxxxx@127.0.0.1:1: group serve-target: nats: no servers available"},
		{"rank0:a\ns3cret@127.0.0.1:1", "-nats xxxxx@127.0.0.1:1: "},
	} {
		t.Run(c.url, func(t *testing.T) {
			t.Parallel()
			exit, _, errs := runServe(t, "-nats", c.url, "-dp", "2", "-rank", "0", "-join-timeout", "300ms")
			if exit != 1 || !strings.Contains(errs, c.want) || strings.Contains(errs, secret) {
				t.Errorf("exit %d, stderr %q, want %q", exit, errs, c.want)
			}
		})
	}
	const url = "nats://rank0:a b" + secret + "@127.0.0.1:1"
	for _, c := range []struct {
		args []string
		exit int
		want string
	}{
		{[]string{"-nats", url, "-h"}, 0, "-nats-creds file"},
		{[]string{"-nats", url, "-processes"}, 2, "-nats is nats://xxxxx@127.0.0.1:1 beside -processes"},
		{[]string{"-nats", url}, 2, "-nats is nats://xxxxx@127.0.0.1:1 without a -rank"},
		{[]string{url}, 2, `unexpected arguments ["nats://xxxxx@127.0.0.1:1"]`},
		{[]string{"-nats" + url}, 2, "flag provided but not defined:xxxxx@127.0.0.1:1"},
		{[]string{"-rank", url}, 2, `invalid value "xxxxx@127.0.0.1:1" for flag -rank`},
		{[]string{"-graph", url}, 2, `invalid value "xxxxx@127.0.0.1:1" is none of`},
		{[]string{"-check=" + url}, 2, `invalid boolean value "xxxxx@127.0.0.1:1" for -check`},
		{[]string{"---" + url}, 2, "bad flag syntax:xxxxx@127.0.0.1:1"},
	} {
		exit, out, errs := runServe(t, c.args...)
		if exit != c.exit || !strings.Contains(out+errs, c.want) || strings.Contains(out+errs, secret) {
			t.Errorf("%q: exit %d, stdout %q, stderr %q, want %d and %q", c.args, exit, out, errs, c.exit, c.want)
		}
	}
}

// TestArgsWithoutSecrets: the arguments of the process, as -debug shows them, are those that may be seen.
func TestArgsWithoutSecrets(t *testing.T) {
	w := httptest.NewRecorder()
	showArgs([]string{
		"serve", "-nats", "nats://u:" + secret + "@host", "-nats=" + secret + "@host", "-dp", "1",
	})(w, nil)
	if want := "serve\x00-nats\x00nats://xxxxx@host\x00xxxxx@host\x00-dp\x001"; w.Body.String() != want {
		t.Errorf("%q, want %q", w.Body, want)
	}
}

// TestLogRanks: the log says for whom a rank waits, that another process has its rank, and that the
// connection is lost.
func TestLogRanks(t *testing.T) {
	t.Parallel()
	nats, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var logs [3]syncBuffer
	var ranks sync.WaitGroup
	defer ranks.Wait()
	defer cancel()
	begin := func(process, rank int) {
		args := fmt.Sprintf("-nats %s -dp 2 -rank %d -speed 1 -exchange-timeout 1h", nats.ClientURL(), rank)
		ranks.Go(func() { run(ctx, strings.Fields(args), io.Discard, &logs[process]) })
	}
	says := func(process int, what string) {
		t.Helper()
		line := regexp.MustCompile(`(?m)^time=\S+ level=(WARN|ERROR) ` + what)
		eventually(t, what, func() bool { return line.MatchString(logs[process].String()) })
	}
	before := nats.NumSubscriptions()
	begin(0, 0)
	says(0, `msg="waiting for ranks" group=serve-target rank=0 missing=\[1\]$`)
	begin(1, 1)
	eventually(t, "both listen", func() bool { return nats.NumSubscriptions() == before+4 })
	begin(2, 0)
	says(2, `msg="this rank takes no further part" group=serve-target rank=0 error="natsdp: another process`)
	nats.Shutdown()
	says(0, `msg="the connection has changed" group=serve-target rank=0 status=RECONNECTING$`)
	says(1, `msg="the connection has changed" group=serve-target rank=1 status=RECONNECTING$`)
}
