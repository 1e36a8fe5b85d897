// This file tests that the suite looks at every field of a vote.

package fwdtest

import (
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/forwardctx/fwd"
)

// fullVote returns a random vote in which no field is zero.
func fullVote(t *testing.T) fwd.Vote {
	t.Helper()
	random := rand.New(rand.NewPCG(3, 4))
	for range 100_000 {
		v := randomVote(random, 7)
		full := v.SpanContext.IsValid()
		for i := range reflect.TypeFor[fwd.Vote]().NumField() {
			full = full && !reflect.ValueOf(v).Field(i).IsZero()
		}
		if full {
			return v
		}
	}
	t.Fatal("some field of a random vote is always zero")
	return fwd.Vote{}
}

// A random vote sets every field, and two votes that differ in a single one are told apart.
func TestEveryField(t *testing.T) {
	full := fullVote(t)
	if err := differ([]fwd.Vote{full}, []fwd.Vote{full}); err != nil {
		t.Error(err)
	}
	for i := range reflect.TypeFor[fwd.Vote]().NumField() {
		name := reflect.TypeFor[fwd.Vote]().Field(i).Name
		lacking := full
		reflect.ValueOf(&lacking).Elem().Field(i).SetZero()
		err := differ([]fwd.Vote{lacking}, []fwd.Vote{full})
		if err == nil || !strings.Contains(err.Error(), "has "+name+" ") || strings.Contains(err.Error(), ";") {
			t.Errorf("a vote without %s: %v, want an error that names it alone", name, err)
		}
	}
}

// Whether a span context is remote is not part of what a vote says: it is on some ranks alone.
func TestRemoteIsNotSaid(t *testing.T) {
	v := fullVote(t)
	w := v
	w.SpanContext = v.SpanContext.WithRemote(!v.SpanContext.IsRemote())
	if err := differ([]fwd.Vote{v}, []fwd.Vote{w}); err != nil {
		t.Error(err)
	}
}

// Random votes are such as a coordinator must carry.
func TestRandomVotesAreValid(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 10_000 {
		if v := randomVote(random, 1); v.Validate(0) != nil {
			t.Fatalf("%+v: %v", v, v.Validate(0))
		}
	}
}
