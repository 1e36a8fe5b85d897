// Tests of the rules for Prometheus: over recorded runs, each alert fires for its fault, and only for it.

package integration

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
)

// evaluation is the state of rules, which are evaluated after each scrape.
type evaluation struct {
	rules   []rulefmt.Rule
	pending map[string]int // since which scrape the expression of an alert has a result, by alert and labels
	fired   map[string][]string
	firing  map[string]bool
}

func newEvaluation(t *testing.T) *evaluation {
	t.Helper()
	groups, errs := rulefmt.ParseFile("prometheus/rules.yml", false, model.LegacyValidation)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	e := &evaluation{pending: map[string]int{}, fired: map[string][]string{}, firing: map[string]bool{}}
	for _, g := range groups.Groups {
		e.rules = append(e.rules, g.Rules...)
	}
	return e
}

// scraped evaluates the rules at the last scrape.
func (e *evaluation) scraped(t *testing.T, ss *scrapes) {
	t.Helper()
	now := ss.n - 1
	for _, rule := range e.rules {
		var active []string
		for _, s := range ss.vector(t, rule.Expr, now) {
			if rule.Record != "" {
				ss.store(labels.NewBuilder(s.Metric).Set(labels.MetricName, rule.Record).Labels(), s.F)
				continue
			}
			key := rule.Alert + s.Metric.MatchLabels(false, labels.MetricName).String()
			active = append(active, key)
			if _, ok := e.pending[key]; !ok {
				e.pending[key] = now
			}
			if minute(now).Sub(minute(e.pending[key])) >= time.Duration(rule.For) && !e.firing[key] {
				e.firing[key] = true
				e.fired[key] = append(e.fired[key], fmt.Sprint("from ", now))
			}
		}
		if rule.Alert != "" {
			e.resolve(rule.Alert, active, now)
		}
	}
}

// resolve ends those instances of an alert that are not active.
func (e *evaluation) resolve(alert string, active []string, now int) {
	for key := range e.pending {
		if len(key) < len(alert) || key[:len(alert)+1] != alert+"{" || slices.Contains(active, key) {
			continue
		}
		delete(e.pending, key)
		if e.firing[key] {
			delete(e.firing, key)
			e.fired[key] = append(e.fired[key], fmt.Sprint("to ", now-1))
		}
	}
}

// TestRecordings: in a run with all faults, each alert fires once, when its fault is there, and every
// panel of the dashboard shows something; in a run without, no alert fires, and no panel shows a failure.
func TestRecordings(t *testing.T) {
	for _, test := range []struct {
		name   string
		faults bool
		want   map[string][]string
		panels func(t *testing.T, r *recording)
	}{
		{"quiet", false, map[string][]string{}, checkQuietPanels},
		{"faults", true, map[string][]string{
			`FwdRankMissing{fwd_name="target"}`:    {"from 8", "to 12"},
			`FwdWaitShareHigh{fwd_name="target"}`:  {"from 22", "to 28"},
			`FwdEagerShareHigh{fwd_name="target"}`: {"from 40", "to 49"},
			`FwdLateCapture{fwd_name="target"}`:    {"from 53", "to 57"},
			`FwdSpansDropped{job="engine"}`:        {"from 59", "to 63"},
		}, checkPanels},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := newEvaluation(t)
			r := record(t, test.faults, func(r *recording) { e.scraped(t, &r.scrapes) })
			if diff := cmp.Diff(test.want, e.fired); diff != "" {
				t.Errorf("alerts (-want +got):\n%s", diff)
			}
			test.panels(t, r)
		})
	}
}
