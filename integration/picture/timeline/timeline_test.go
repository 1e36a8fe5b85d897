// Tests of pictures of steps that the engine does not take here: other spans, other shapes, and damaged traces.
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
)

// attrs are attributes of a span.
type attrs = map[string]any

// newSteps returns steps by name. Each has something that the others don't have.
func newSteps() map[string][]Span {
	steps := map[string][]Span{
		"one span": {{ID: "a", Name: "fwd.forward", Start: 5e5, End: 5e5 + 3}},
		"microbatches": {
			{ID: "c0", Name: Coordinate, Start: 100, End: 900, Attributes: attrs{Rank: 0, Step: 7}},
			{ID: "c1", Parent: "c0", Name: Coordinate, Start: 899, End: 901, Attributes: attrs{Rank: 1, Step: 7}},
		},
		"a root of no rank": {
			{ID: "root", Parent: "elsewhere", Name: "fwd.step PIECEWISE", Start: 0, End: 5200, Attributes: attrs{Step: 8}},
		},
	}
	for rank := range 2 {
		id, parent := fmt.Sprint("f", rank), attrs{Rank: rank, Mode: "FULL", Reason: "exact", Tokens: 8, Unpadded: 7, GraphPadding: 1}
		steps["microbatches"] = append(steps["microbatches"],
			Span{ID: id, Parent: "c0", Name: Forward, Start: 950, End: 4000, Attributes: parent},
			Span{ID: id + "u0", Parent: id, Name: UBatch, Start: 960, End: 3000, Attributes: attrs{UBatchIndex: 0, Tokens: 4}},
			Span{ID: id + "u1", Parent: id, Name: UBatch, Start: 3900, End: 3950, Attributes: attrs{UBatchIndex: 1, Tokens: 4}})
	}
	for rank := range 4 {
		id, from := fmt.Sprint(rank), float64(rank*150)
		pass := attrs{Rank: rank, Mode: "NONE", Reason: "too_large", Tokens: 128, Unpadded: 128, Dummy: false}
		steps["a root of no rank"] = append(steps["a root of no rank"],
			Span{ID: "c" + id, Parent: "root", Name: Coordinate, Start: from, End: 600, Attributes: attrs{Rank: rank}},
			Span{ID: "f" + id, Parent: "root", Name: Forward + " target NONE too_large", Start: 620, End: 5000 + from/4, Attributes: pass})
		for i := range 5 {
			at := 700 + float64(i)*800 + from/2
			steps["a root of no rank"] = append(steps["a root of no rank"],
				Span{ID: fmt.Sprint("w", id, i), Parent: "f" + id, Name: "fwd.wait <experts> of rank " + id, Start: at, End: at + 300})
		}
	}
	for rank := range 40 {
		steps["many ranks"] = append(steps["many ranks"], Span{ID: fmt.Sprint(rank), Name: Forward, Start: float64(rank * rank * 40), End: 70e3,
			Attributes: attrs{Rank: int64(rank), Mode: "A_MODE_OF_THE_FUTURE", Dummy: rank > 30}})
	}
	return steps
}

// mark is a text or a bar of a picture.
type mark struct {
	x, y, width float64
	text        string
}

// marks returns the texts of a picture, which must be XML.
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
		case xml.CharData:
			if current == nil {
				continue
			}
			anchor := current.text
			current.text = string(token)
			current.width = textWidth(current.text, int(current.width))
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

// TestLayout: in any picture there is a bar for every span, and no text leaves the picture or meets another one. With
// TIMELINE_OUT set to a directory, the pictures are kept there to be looked at.
func TestLayout(t *testing.T) {
	for name, spans := range newSteps() {
		t.Run(name, func(t *testing.T) {
			svg, err := SVG(spans)
			if err != nil {
				t.Fatal(err)
			}
			if dir := os.Getenv("TIMELINE_OUT"); dir != "" {
				if err := os.WriteFile(filepath.Join(dir, strings.ReplaceAll(name, " ", "_")+".svg"), svg, 0o644); err != nil {
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

// TestWords: names that XML has other uses for are written out, and the description says what the picture shows.
func TestWords(t *testing.T) {
	for name, want := range map[string][]string{
		"microbatches": {
			"<title id=\"title\">Step 7: 3.90 ms on 2 ranks</title>", "Rank 1 votes last; until then the others wait.",
			"Rank 0: waits 0.80 ms for votes (0.80 ms); FULL exact   7 tokens, 1 padding (3.05 ms); microbatch 0   4 tokens (2.04 ms)",
			">microbatch 1   4 tokens<",
		},
		"a root of no rank": {"Step 8: 5.20 ms on 4 ranks", "fwd.step PIECEWISE", "<title>fwd.wait &lt;experts&gt; of rank 0, 0.30 ms"},
		"many ranks":        {"A step: 70.0 ms on 40 ranks", "Rank 31 is idle", "dummy pass, A_MODE_OF_THE_FUTURE"},
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
		{[]Span{{ID: "a", Parent: "b", End: 1}, {ID: "b", Parent: "a", End: 1}, {ID: "c", End: 1}}, "2 of 3 spans are their own ancestors"},
	} {
		if _, err := SVG(c.spans); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.spans, err, c.want)
		}
	}
}
