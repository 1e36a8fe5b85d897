// Tests of the dashboard for Grafana: its schema, its layout, what its panels show of recorded runs, and
// that its links find traces in Jaeger.

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	grafanaprometheus "github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/prometheus/prometheus/promql"
)

// grafana is the form of dashboards that Grafana 11 and 12 export, and that all versions import.
//
//lint:ignore SA1019 its successor can't be imported into Grafana 11
type grafana = dashboard.Dashboard

// readDashboard reads the dashboard. It fails if there is a field that the schema does not have, or one
// is missing that it needs.
func readDashboard(t *testing.T) *grafana {
	t.Helper()
	text, err := os.ReadFile("grafana/fwd.json")
	if err != nil {
		t.Fatal(err)
	}
	plugins.RegisterDefaultPlugins() // the schemas of queries and panels
	// The strict decoder says what is wrong, with an error that is not nil if nothing is, but it keeps no
	// panels.
	var wrong cog.BuildErrors
	if err := new(grafana).UnmarshalJSONStrict(text); !errors.As(err, &wrong) || len(wrong) > 0 {
		t.Fatal(err)
	}
	d := &grafana{}
	if err := json.Unmarshal(text, d); err != nil {
		t.Fatal(err)
	}
	if err := d.Validate(); err != nil {
		t.Fatal(err)
	}
	return d
}

// target is a query of a panel.
type target struct {
	panel, expr, legend string
	exemplars           bool
}

// targets returns the queries of all panels.
func targets(t *testing.T, d *grafana) []target {
	t.Helper()
	var all []target
	for _, p := range d.Panels {
		if p.Panel == nil {
			continue
		}
		for _, query := range p.Panel.Targets {
			q, ok := query.(*grafanaprometheus.Dataquery)
			if !ok {
				t.Fatalf("panel %q: a query is a %T", *p.Panel.Title, query)
			}
			all = append(all, target{*p.Panel.Title, q.Expr, *q.LegendFormat, q.Exemplar != nil && *q.Exemplar})
		}
	}
	return all
}

// TestDashboard: it has the schema of the library that Grafana generates from its own, whatever can be
// chosen is a variable, every panel has a description and a unit, and those with times have exemplars.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	for _, p := range d.Panels {
		if p.Panel == nil {
			continue
		}
		title := *p.Panel.Title
		unit := p.Panel.FieldConfig.Defaults.Unit
		if p.Panel.Description == nil || *p.Panel.Description == "" || unit == nil {
			t.Errorf("panel %q has no description or no unit", title)
		}
		if uid := p.Panel.Datasource.Uid; uid == nil || *uid != "${prometheus}" {
			t.Errorf("panel %q has a data source of its own", title)
		}
		for _, query := range p.Panel.Targets {
			if uid := query.(*grafanaprometheus.Dataquery).Datasource.Uid; uid == nil || *uid != "${prometheus}" {
				t.Errorf("panel %q has a query with a data source of its own", title)
			}
		}
	}
	for _, q := range targets(t, d) {
		if q.exemplars != strings.Contains(q.expr, "_bucket") {
			t.Errorf("panel %q: exemplars %v: %s", q.panel, q.exemplars, q.expr)
		}
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, fmt.Sprint(v.Type, " ", v.Name))
	}
	want := []string{"datasource prometheus", "datasource jaeger", "query job", "query name", "textbox service"}
	if diff := cmp.Diff(want, variables); diff != "" {
		t.Errorf("variables (-want +got):\n%s", diff)
	}
}

// TestLayout: panels lie in the 24 columns of the page, in their order, and leave no gap.
func TestLayout(t *testing.T) {
	type cell struct{ x, y int }
	taken := map[cell]string{}
	var places []dashboard.GridPos
	bottom := 0
	ids := map[uint32]bool{}
	for _, p := range readDashboard(t).Panels {
		var title string
		var place dashboard.GridPos
		var id uint32
		if p.RowPanel != nil {
			title, place, id = *p.RowPanel.Title, *p.RowPanel.GridPos, p.RowPanel.Id
		} else {
			title, place, id = *p.Panel.Title, *p.Panel.GridPos, *p.Panel.Id
		}
		if ids[id] {
			t.Errorf("panel %q has an id that another has", title)
		}
		ids[id] = true
		for x := int(place.X); x < int(place.X+place.W); x++ {
			for y := int(place.Y); y < int(place.Y+place.H); y++ {
				if other, ok := taken[cell{x, y}]; ok {
					t.Fatalf("panels %q and %q overlap", other, title)
				}
				if x >= 24 {
					t.Fatalf("panel %q ends at column %d", title, place.X+place.W)
				}
				taken[cell{x, y}] = title
				bottom = max(bottom, y+1)
			}
		}
		places = append(places, place)
	}
	if len(taken) != 24*bottom {
		t.Errorf("%d cells of 24 x %d are taken", len(taken), bottom)
	}
	inOrder := slices.IsSortedFunc(places, func(a, b dashboard.GridPos) int {
		return int(a.Y)*24 + int(a.X) - int(b.Y)*24 - int(b.X)
	})
	if !inOrder {
		t.Error("the panels are not in the order in which they are seen")
	}
}

// withVariables returns an expression as Grafana sends it if all jobs and names are chosen.
func withVariables(expr string) string {
	return strings.NewReplacer("$job", ".*", "$name", ".*", "$__rate_interval", "5m").Replace(expr)
}

var legendLabel = regexp.MustCompile(`{{(\w+)}}`)

// checkPanels checks that each query has a finite result in some minute of a run with faults, with the
// labels that its legend shows, and that what can be computed from the run is right.
func checkPanels(t *testing.T, r *recording) {
	t.Helper()
	all := targets(t, readDashboard(t))
	for _, q := range all {
		shown := 0
		for scrape := range r.scrapes.n {
			for _, s := range r.scrapes.vector(t, withVariables(q.expr), scrape) {
				if !math.IsNaN(s.F) && !math.IsInf(s.F, 0) && s.F > 0 {
					shown++
				}
				for _, label := range legendLabel.FindAllStringSubmatch(q.legend, -1) {
					if s.Metric.Get(label[1]) == "" {
						t.Fatalf("%s: the legend is %s, and the labels are %v", q.panel, q.legend, s.Metric)
					}
				}
			}
		}
		if shown == 0 {
			t.Errorf("%s: nothing is ever shown of %s", q.panel, q.expr)
		}
	}
	checkAnswers(t, r, all)
	checkLinks(t, r)
}

// checkAnswers compares panels with what the run was made of.
func checkAnswers(t *testing.T, r *recording, all []target) {
	t.Helper()
	const waits = longWait + passTook
	const shortPart = float64(shortWait) / float64(shortWait+passTook)
	const longPart = float64(longWait) / float64(waits)
	for _, test := range []struct {
		panel, legend string
		minute        int
		want          map[string]float64
	}{
		{"Pass time by graph mode", "{{fwd_graph_mode}} p50", slowTo, map[string]float64{
			"FULL": 0.01024 + 0.5*0.01024, // interpolated within the bucket that has 20 ms
		}},
		{"Wait share by rank", "rank {{fwd_dp_rank}}", missingAt - 1,
			map[string]float64{"0": shortPart, "1": shortPart, "2": shortPart}},
		{"Wait share by rank", "rank {{fwd_dp_rank}}", slowTo,
			map[string]float64{"0": longPart, "1": longPart, "2": longPart}},
		{"Who is waited for", "rank {{fwd_dp_peer_rank}}, {{fwd_wait_kind}}", slowTo,
			map[string]float64{"3 coordinate": stepsInMinute * longWait.Seconds() * (ranks - 1) / 60}},
		{"Padding by kind", "{{fwd_padding_kind}}", slowTo, map[string]float64{"graph": 3. / 16, "dp": 2. / 16}},
		{"Passes without a graph, by reason", "{{fwd_graph_reason}}", eagerTo,
			map[string]float64{"too_large": 0.5, "dp_rank": 0.5}},
		{"Graph events", "{{fwd_graph_event}}", slowTo,
			map[string]float64{"replay": stepsInMinute * ranks / 60.}},
		{"Failed exchanges by rank and error", "rank {{fwd_dp_rank}}, {{error_type}}", missingAt,
			map[string]float64{"0 rank_missing": 1, "1 rank_missing": 1, "2 rank_missing": 1}},
		{"Failed passes by rank and error", "rank {{fwd_dp_rank}}, {{error_type}}", failAt,
			map[string]float64{"2 not_a_number": 1}},
	} {
		at := slices.IndexFunc(all, func(q target) bool { return q.panel == test.panel && q.legend == test.legend })
		if at < 0 {
			t.Errorf("there is no panel %q with the legend %q", test.panel, test.legend)
			continue
		}
		var by []string
		for _, label := range legendLabel.FindAllStringSubmatch(test.legend, -1) {
			by = append(by, label[1])
		}
		got := valuesBy(r.scrapes.vector(t, withVariables(all[at].expr), test.minute), by...)
		maps.DeleteFunc(got, func(_ string, v float64) bool { return v == 0 }) // as of what was only in the warm-up
		if diff := cmp.Diff(test.want, got, approximately); diff != "" {
			t.Errorf("%s at minute %d (-want +got):\n%s", test.panel, test.minute, diff)
		}
	}
}

// checkQuietPanels checks that after a run without faults every query has an answer, and that those
// that show failures show none.
func checkQuietPanels(t *testing.T, r *recording) {
	t.Helper()
	for _, q := range targets(t, readDashboard(t)) {
		vector := r.scrapes.vector(t, withVariables(q.expr), r.scrapes.n-1)
		if strings.Contains(q.expr, `error_type!=""`) || strings.Contains(q.expr, `"NONE"`) {
			if !empty(vector) {
				t.Errorf("%s: a run without faults shows %v", q.panel, vector)
			}
			continue
		}
		if len(vector) == 0 {
			t.Errorf("%s: a run without faults does not show %s", q.panel, q.expr)
		}
	}
}

// empty reports whether a panel shows nothing, or only zeros.
func empty(vector promql.Vector) bool {
	return !slices.ContainsFunc(vector, func(s promql.Sample) bool { return s.F != 0 })
}

// searchLink is what a link tells Grafana's page Explore.
type searchLink struct {
	Steps struct {
		Datasource string
		Queries    []struct{ Service, Operation, Tags string }
	}
}

// checkLinks checks that the searches to which the links lead find traces in Jaeger.
func checkLinks(t *testing.T, r *recording) {
	t.Helper()
	d := readDashboard(t)
	urls := []string{*d.Links[0].Url}
	for _, p := range d.Panels {
		if p.Panel != nil {
			for _, link := range p.Panel.FieldConfig.Defaults.Links {
				urls = append(urls, *link.Url)
			}
		}
	}
	if len(urls) < 6 {
		t.Errorf("only %d links", len(urls))
	}
	replacer := strings.NewReplacer("${service}", r.spans.name, "${jaeger}", "jaeger-uid",
		"${__field.labels.fwd_graph_mode}", "FULL", "${__field.labels.fwd_dp_peer_rank}", "3",
		"${__field.labels.error_type}", "rank_missing", "${__from}", "1", "${__to}", "2")
	for _, link := range urls {
		parsed, err := url.Parse(replacer.Replace(link))
		if err != nil {
			t.Fatal(err)
		}
		var search searchLink
		if err := json.Unmarshal([]byte(parsed.Query().Get("panes")), &search); err != nil {
			t.Fatalf("%s: %v", link, err)
		}
		if parsed.Path != "/explore" || search.Steps.Datasource != "jaeger-uid" || len(search.Steps.Queries) != 1 {
			t.Fatalf("%s leads to %+v", link, search)
		}
		q := search.Steps.Queries[0]
		query := url.Values{"service": {q.Service}, "operation": {q.Operation}, "limit": {"20"}, "lookback": {"1h"}}
		if tag, value, ok := strings.Cut(q.Tags, "="); ok {
			query.Set("tags", fmt.Sprintf("{%q: %q}", tag, value))
		}
		var found struct{ Data []any }
		err = r.spans.query.get(t.Context(), "/api/traces?"+query.Encode(),
			func(d *json.Decoder) error { return d.Decode(&found) })
		if err != nil || len(found.Data) == 0 {
			t.Errorf("Jaeger finds %d traces with %v: %v", len(found.Data), query, err)
		}
	}
}
