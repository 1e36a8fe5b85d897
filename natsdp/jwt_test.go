// This file tests credentials in files, which operators and accounts sign.

package natsdp_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// operator signs accounts, which sign users: what NATS calls decentralized authentication.
type operator struct {
	*testing.T
	key      nkeys.KeyPair
	accounts *server.MemAccResolver
}

func newOperator(t *testing.T) *operator {
	o := &operator{T: t, accounts: &server.MemAccResolver{}}
	o.key, _ = o.pair(nkeys.CreateOperator)
	return o
}

func (o *operator) check(err error) {
	o.Helper()
	if err != nil {
		o.Fatal(err)
	}
}

func (o *operator) pair(create func() (nkeys.KeyPair, error)) (key nkeys.KeyPair, public string) {
	o.Helper()
	key, err := create()
	o.check(err)
	public, err = key.PublicKey()
	o.check(err)
	return key, public
}

// server starts a server that trusts the operator.
func (o *operator) server() *server.Server {
	_, system := o.account()
	public, err := o.key.PublicKey()
	o.check(err)
	opts := serverOptions()
	opts.TrustedKeys, opts.AccountResolver, opts.SystemAccount = []string{public}, o.accounts, system
	return startServer(o.T, opts)
}

// account makes an account, whose subjects are its own.
func (o *operator) account() (key nkeys.KeyPair, public string) {
	key, public = o.pair(nkeys.CreateAccount)
	token, err := jwt.NewAccountClaims(public).Encode(o.key)
	o.check(err)
	o.check(o.accounts.Store(public, token))
	return key, public
}

// user writes the credentials of a user of an account to a file.
func (o *operator) user(account nkeys.KeyPair, validFor time.Duration) (file string) {
	key, public := o.pair(nkeys.CreateUser)
	claims := jwt.NewUserClaims(public)
	claims.Expires = time.Now().Add(validFor).Unix()
	token, err := claims.Encode(account)
	o.check(err)
	seed, err := key.Seed()
	o.check(err)
	text, err := jwt.FormatUserConfig(token, seed)
	o.check(err)
	file = filepath.Join(o.TempDir(), "user.creds")
	o.check(os.WriteFile(file, text, 0o600))
	return file
}

// Ranks with the credentials of one account become a group. Those of another account meet nobody of
// it. Credentials that nobody trusts, or that have expired, let nobody in.
func TestCredentialsFile(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	s := o.server()
	account, _ := o.account()
	name := newName()
	group := joinAll(t, name, 3, func(rank int) []natsdp.Option {
		return at(s, nats.UserCredentials(o.user(account, time.Hour)))(rank)
	})
	for step := uint64(1); step <= 20; step++ {
		together(t, group, step)
	}

	stranger := newOperator(t)
	strange, _ := stranger.account()
	for what, c := range map[string]struct {
		file string
		want error
	}{
		"of an operator whom the server does not trust": {stranger.user(strange, time.Hour), nats.ErrAuthorization},
		"that have expired":                             {o.user(account, -time.Minute), nats.ErrAuthorization},
		"in a file that is not there":                   {filepath.Join(t.TempDir(), "none"), os.ErrNotExist},
	} {
		_, err := natsdp.Join(t.Context(), natsdp.Config{Group: name, Rank: 1, Size: 3},
			at(s, nats.UserCredentials(c.file))(1)...)
		if !errors.Is(err, c.want) {
			t.Errorf("credentials %s: %v, want %v", what, err, c.want)
		}
	}
	other, _ := o.account()
	conn := connect(t, s, nats.UserCredentials(o.user(other, time.Hour)))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := natsdp.Join(ctx, natsdp.Config{Group: name, Rank: 1, Size: 3}, natsdp.WithConn(conn))
	if !errors.Is(err, fwd.ErrRankMissing) {
		t.Errorf("in another account: %v, want %v", err, fwd.ErrRankMissing)
	}

	for step := uint64(21); step <= 25; step++ {
		together(t, group, step)
	}
	if stats := group[1].Stats(); stats.Foreign != 0 || stats.Broken != 0 {
		t.Errorf("the group was disturbed: %+v", stats)
	}
}
