// Tests of pictures of made-up steps: other spans and other shapes than the engine's, and damaged
// traces.
package timeline

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// attrs are attributes of a span.
type attrs = map[string]any

// newSteps returns steps by name. Each has something that the others don't have.
func newSteps() map[string][]Span {
	steps := map[string][]Span{
		"one span": {{ID: "a", Name: "fwd.forward", Start: 5e5, End: 5e5 + 3}},
		"microbatches": {
			{ID: "c0", Name: Coordinate, Start: 100, End: 900, Attributes: attrs{Rank: 0, Step: 7}},
			{ID: "c1", Name: Coordinate, Start: 899, End: 901, Attributes: attrs{Rank: 1}},
		},
		"waits": { // the clock of rank 1 is late, so its exchange seems to begin last
			{ID: "c0", Name: Coordinate, Start: 50, End: 100, Attributes: attrs{Rank: 0, LastRank: 0}},
			{ID: "c1", Name: Coordinate, Start: 90, End: 140, Attributes: attrs{Rank: 1, LastRank: 0}},
			{ID: "f0", Name: Forward, Start: 100, End: 900,
				Attributes: attrs{Rank: 0, Mode: "FULL", Reason: "exact", Tokens: 2, Unpadded: 2}},
			{ID: "f1", Name: Forward, Start: 140, End: 900,
				Attributes: attrs{Rank: 1, Mode: "FULL", Reason: "exact", Tokens: 2, Unpadded: 2, WaitTime: 0.0005}},
			{ID: "w0", Parent: "f1", Name: Wait, Start: 200, End: 600, Attributes: attrs{PeerRank: 0}},
			{ID: "w1", Parent: "f1", Name: Wait, Start: 700, End: 800, Attributes: attrs{PeerRank: 0}},
		},
		"a root of no rank": {
			{ID: "root", Parent: "elsewhere", Name: "fwd.step NONE", End: 5500, Attributes: attrs{Step: 8}},
		},
	}
	for rank := range 2 {
		id := fmt.Sprint("f", rank)
		pass := attrs{Rank: rank, Mode: "FULL", Reason: "exact", Tokens: 8, Unpadded: 7, GraphPadding: 1}
		first, second := attrs{UBatchIndex: 0, Tokens: 4}, attrs{UBatchIndex: 1, Tokens: 4}
		steps["microbatches"] = append(steps["microbatches"],
			Span{ID: id, Name: Forward, Start: 950, End: 4000, Attributes: pass},
			Span{ID: id + "u0", Parent: id, Name: UBatch, Start: 960, End: 3000, Attributes: first},
			Span{ID: id + "u1", Parent: id, Name: UBatch, Start: 3900, End: 3950, Attributes: second})
	}
	for rank := range 4 {
		vote, from := attrs{Rank: rank}, float64(rank*150)
		own, parent := fmt.Sprint("c", rank), fmt.Sprint("f", rank)
		const name = Forward + " NONE"
		pass := attrs{Rank: rank, Mode: "NONE", Reason: "too_large", Tokens: 128, Unpadded: 128, Dummy: false}
		steps["a root of no rank"] = append(steps["a root of no rank"],
			Span{ID: own, Parent: "root", Name: Coordinate, Start: from, End: 600, Attributes: vote},
			Span{ID: parent, Parent: "root", Name: name, Start: 620, End: 5e3, Attributes: pass})
		for i := range 5 {
			at := 700 + float64(i)*800 + from/2
			id := fmt.Sprintf("w%d%d", rank, i)
			steps["a root of no rank"] = append(steps["a root of no rank"],
				Span{ID: id, Parent: parent, Name: "fwd.wait <rows>", Start: at, End: at + 900})
		}
	}
	for rank := range 40 {
		pass := attrs{Rank: int64(rank), Mode: "A_MODE_OF_THE_FUTURE", Unpadded: 5, Dummy: rank > 30}
		start := float64(rank * rank * 40)
		steps["many ranks"] = append(steps["many ranks"],
			Span{ID: fmt.Sprint(rank), Name: Forward, Start: start, End: 70e3, Attributes: pass})
	}
	return steps
}

// mark is a text of a picture. While it is being read, width is the size of its font and text is
// its anchor.
type mark struct {
	x, y, width float64
	text        string
}

// marks returns the texts of a picture, and how many bars it has.
func marks(t *testing.T, svg []byte) (texts []mark, bars int) {
	t.Helper()
	decoder := xml.NewDecoder(strings.NewReader(string(svg)))
	var current *mark
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return texts, bars
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			values := map[string]string{}
			for _, a := range token.Attr {
				values[a.Name.Local] = a.Value
			}
			if token.Name.Local == "title" && values["id"] == "" {
				bars++
			}
			if token.Name.Local != "text" {
				continue
			}
			current = &mark{text: values["text-anchor"]}
			current.x, _ = strconv.ParseFloat(values["x"], 64)
			current.y, _ = strconv.ParseFloat(values["y"], 64)
			current.width, _ = strconv.ParseFloat(values["font-size"], 64)
			if values["font-weight"] == "bold" {
				current.width *= 1.1
			}
		case xml.CharData:
			if current == nil {
				continue
			}
			anchor := current.text
			current.text = string(token)
			current.width *= textWidth(current.text, 1)
			switch anchor {
			case "middle":
				current.x -= current.width / 2
			case "end":
				current.x -= current.width
			}
			texts = append(texts, *current)
			current = nil
		}
	}
}

// TestLayout: every picture has a bar for each span, and no text leaves the picture or overlaps
// another one. If TIMELINE_OUT is set to a directory, the pictures are kept there to be looked at.
func TestLayout(t *testing.T) {
	steps := newSteps()
	for _, us := range []float64{921, 1999, 2000, 49_999} {
		steps[fmt.Sprint(us, " µs")] = []Span{{ID: "a", Name: Forward, End: us, Attributes: attrs{Rank: 0}}}
	}
	for name, spans := range steps {
		t.Run(name, func(t *testing.T) {
			svg, err := SVG(spans)
			if err != nil {
				t.Fatal(err)
			}
			if dir := os.Getenv("TIMELINE_OUT"); dir != "" {
				if err := os.WriteFile(filepath.Join(dir, name+".svg"), svg, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			texts, bars := marks(t, svg)
			if bars != len(spans) {
				t.Errorf("%d bars for %d spans", bars, len(spans))
			}
			for i, a := range texts {
				if a.x < 0 || a.x+a.width > width {
					t.Errorf("%q is at %.0f to %.0f of %d", a.text, a.x, a.x+a.width, width)
				}
				for _, b := range texts[:i] {
					if max(a.x, b.x) < min(a.x+a.width, b.x+b.width) && max(a.y-b.y, b.y-a.y) < textSize-1 {
						t.Errorf("%q and %q meet", a.text, b.text)
					}
				}
			}
		})
	}
}

// TestWords: labels, title and description say what the picture shows, and names are escaped.
func TestWords(t *testing.T) {
	for name, want := range map[string][]string{
		"microbatches": {
			"<title id=\"title\">Step 7: 3.90 ms on 2 ranks</title>",
			"Rank 1 votes last, and the others wait for its vote.",
			"Rank 0: waits 0.80 ms for votes; FULL exact, 7 tokens, 1 padding, 3.05 ms; microbatch 0",
			">microbatch 0   4 tokens<",
		},
		"a root of no rank": {
			"Step 8: 5.50 ms on 4 ranks", ">fwd.step NONE<", "<title>fwd.wait &lt;rows&gt;, 0.90 ms",
		},
		"waits": {
			"Rank 0 votes last, and the others wait for its vote. Inside their passes ranks wait " +
				"for each other too, rank 1 longest: 0.50 ms for rank 0.",
			">for rank 0<",
			"Rank 1: waits 50 µs for votes; FULL exact, 2 tokens, 0.76 ms, 0.50 ms of it waiting for rows.",
			">0.76 ms, 0.50 ms of it waiting for rows<",
		},
		"many ranks": {
			"A step: 70.0 ms on 40 ranks", "9 ranks are idle", "dummy pass, A_MODE_OF_THE_FUTURE",
		},
	} {
		svg, err := SVG(newSteps()[name])
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range want {
			if !strings.Contains(string(svg), text) {
				t.Errorf("%s: %q is not in the picture", name, text)
			}
		}
	}
}

// TestDamaged: a trace that can't be drawn is an error that says what is wrong with it.
func TestDamaged(t *testing.T) {
	for _, c := range []struct {
		spans []Span
		want  string
	}{
		{nil, "no spans"},
		{[]Span{{ID: "a", Name: "x", Start: 2, End: 1}}, `span "a" (x) ends at 1, before it starts at 2`},
		{[]Span{{ID: "a", End: 1}, {ID: "a", End: 2}}, `two spans have the id "a"`},
		{[]Span{{ID: "a"}}, "the step takes no time"},
		{[]Span{{ID: "a", Parent: "b", End: 1}, {ID: "b", Parent: "a"}, {ID: "c"}}, "2 of 3 spans are their"},
	} {
		if _, err := SVG(c.spans); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.spans, err, c.want)
		}
	}
}

// TestRows: rows stand by rank, children are indented below their parents, and thin bars share a
// row as long as they have the same name and don't overlap.
func TestRows(t *testing.T) {
	got := map[string]string{}
	for name, spans := range map[string][]Span{
		"a root of no rank": newSteps()["a root of no rank"],
		"microbatches":      newSteps()["microbatches"],
		"other names": {
			{ID: "a", Name: Forward, End: 9, Attributes: attrs{Rank: 5}},
			{ID: "b", Parent: "a", Name: "copy", Start: 1, End: 2},
			{ID: "c", Parent: "a", Name: "wait", Start: 2, End: 3},
			{ID: "d", Parent: "a", Name: "copy", Start: 2, End: 5},
			{ID: "e", Parent: "a", Name: "copy", Start: 4, End: 6},
			{ID: "f", Parent: "e", Name: "copy", Start: 7, End: 8},
		},
	} {
		st, err := newStep(spans)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range st.groups {
			got[name] += fmt.Sprint(g.rank, ":")
			for _, r := range g.rows {
				got[name] += " " + strings.Repeat(">", r.depth)
				for _, s := range r.spans {
					got[name] += s.ID + ","
				}
			}
			got[name] += "\n"
		}
	}
	want := map[string]string{
		"a root of no rank": "-1: root,\n" +
			"0: c0, f0, >w00,w02,w04, >w01,w03,\n1: c1, f1, >w10,w12,w14, >w11,w13,\n" +
			"2: c2, f2, >w20,w22,w24, >w21,w23,\n3: c3, f3, >w30,w32,w34, >w31,w33,\n",
		"microbatches": "0: c0, f0, >f0u0, >f0u1,\n1: c1, f1, >f1u0, >f1u1,\n",
		"other names":  "5: a, >b,d, >c, >e, >>f,\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}
