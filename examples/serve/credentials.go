package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats.go"
)

// login is how a rank shows a NATS server who it is, unless the URL says so: by a name and a password,
// by a token or by a file with credentials.
type login struct {
	user, password, token string
	creds                 string
	credsFrom             string // what named the file
}

// The environment variables that a login may come from. Anybody on a host can read a process list, and
// so a secret in a flag; these only the process's own user.
const (
	envUser, envPassword = "NATS_USER", "NATS_PASSWORD"
	envToken             = "NATS_TOKEN"
	envCreds             = "NATS_CREDS"
)

var loginVariables = []string{envUser, envPassword, envToken, envCreds}

// findLogin takes the login from the flags or, if they say nothing, from the environment. No error has
// a value of the environment in it.
func (o *rankOptions) findLogin(bad func(format string, args ...any)) {
	switch inURL := strings.Contains(o.nats, "@"); {
	case inURL && o.natsCreds != "":
		bad("-nats-creds is %s beside a user or a token in -nats %s: give one of them",
			o.natsCreds, withoutSecrets(o.nats))
		return
	case o.natsCreds != "":
		o.login = login{creds: o.natsCreds, credsFrom: "-nats-creds"}
		return
	case inURL || o.nats == "":
		return
	}
	o.login = login{
		user: os.Getenv(envUser), password: os.Getenv(envPassword), token: os.Getenv(envToken),
		creds: os.Getenv(envCreds), credsFrom: envCreds,
	}
	if (o.login.user == "") != (o.login.password == "") {
		is, not := envUser, envPassword
		if o.login.user == "" {
			is, not = not, is
		}
		bad("%s is set without %s: they need each other (a token is given by %s)", is, not, envToken)
	}
	var set []string
	for _, name := range []string{envUser, envToken, envCreds} {
		if os.Getenv(name) != "" {
			set = append(set, name)
		}
	}
	if len(set) > 1 {
		bad("%s are set: give one of them, or say in -nats or -nats-creds who this rank is",
			strings.Join(set, " and "))
	}
}

// withoutLogin returns an environment for ranks that need no login.
func withoutLogin(environment []string) []string {
	return slices.DeleteFunc(slices.Clone(environment), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(loginVariables, name)
	})
}

// check returns an error if the file with credentials can't be read. If the environment names it, the
// error does not: perhaps it has the credentials themselves.
func (l *login) check() error {
	if l.creds == "" {
		return nil
	}
	f, err := os.Open(l.creds)
	if err == nil {
		return f.Close()
	}
	if path := (*fs.PathError)(nil); errors.As(err, &path) && l.credsFrom == envCreds {
		err = fmt.Errorf("the file that it names can't be read: %w", path.Err)
	}
	return fmt.Errorf("%s: %w", l.credsFrom, err)
}

// connection returns how this process reaches the server, who it is and who the server has to be. nats
// reads files again for each attempt. So a refusal of credentials in a file need not last, and the rank
// keeps trying.
func (o *options) connection() []natsdp.Option {
	opts := []nats.Option{nats.Name(fmt.Sprintf("serve: rank %v of %d", o.ranks, o.dp))}
	var joining []natsdp.Option
	switch l := o.login; {
	case l.creds != "":
		opts = append(opts, nats.UserCredentials(l.creds))
		joining = append(joining, natsdp.WithRotatedCredentials())
	case l.token != "":
		opts = append(opts, nats.Token(l.token))
	case l.user != "":
		opts = append(opts, nats.UserInfo(l.user, l.password))
	}
	if o.natsCA != "" {
		opts = append(opts, nats.RootCAs(o.natsCA))
	}
	if o.natsCert != "" {
		opts = append(opts, nats.ClientCert(o.natsCert, o.natsKey))
	}
	return append(joining, natsdp.WithURL(o.nats, opts...))
}

// userinfo is all that may be a name, a password or a token in a URL, or in what was meant as one.
var userinfo = regexp.MustCompile(`(?s)^([A-Za-z]+://)?.*@`)

// nextURL is where the next URL of a list begins.
var nextURL = regexp.MustCompile(`,[A-Za-z]+://`)

// withoutSecrets returns URLs as they may be printed.
func withoutSecrets(urls string) string {
	begin, shown := 0, ""
	for _, at := range nextURL.FindAllStringIndex(urls, -1) {
		shown += userinfo.ReplaceAllString(urls[begin:at[0]], "${1}xxxxx@") + ","
		begin = at[0] + 1
	}
	return shown + userinfo.ReplaceAllString(urls[begin:], "${1}xxxxx@")
}

// quotedSecret is the part of an error of package flag that may be a URL with a secret: it stands after
// a quote, or after the colon that ends the sentence.
var quotedSecret = regexp.MustCompile(`(?s)^([^":]*[":]).*@`)

// explainFlags returns an error of package flag as it may be printed: the argument that it shows may be
// a URL.
func explainFlags(err error) error {
	return errors.New("serve: " + quotedSecret.ReplaceAllString(err.Error(), "${1}xxxxx@"))
}

// showArgs shows the arguments of a process as net/http/pprof does, without secrets.
func showArgs(args []string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		var shown []string
		for _, arg := range args {
			shown = append(shown, withoutSecrets(arg))
		}
		_, _ = io.WriteString(w, strings.Join(shown, "\x00")) // whoever asked has gone
	}
}
