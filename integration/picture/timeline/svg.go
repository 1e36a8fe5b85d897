package timeline

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
	"unicode"
)

// Measures of the picture, in pixels.
const (
	width       = 900
	margin      = 16
	left, right = 180, width - margin // of the time axis
	nameAt      = 76                  // where the names of rows begin
	rowHeight   = 22
	barHeight   = 16
	thinHeight  = 12 // of a row of thin bars
	groupGap    = 9
	textSize    = 11
	lineHeight  = 17
)

// Colours tell apart waiting, the graph modes and the rest, to colour-blind people too.
const (
	ink          = "#1f2328"
	faintInk     = "#59636e"
	paper        = "#ffffff"
	grid         = "#e4e8ec"
	border       = "#d1d9e0"
	waitColour   = "#e8a317"
	rowsColour   = "#f5cf80"
	ubatchColour = "#a9c8e6"
	restColour   = "#8c959f"
)

var modeColours = map[string]string{
	"FULL":      "#00785a",
	"PIECEWISE": "#0b62a8",
	"NONE":      "#8a4a84",
}

// SVG draws a step from the spans of its trace, in any order. Spans of unknown kinds become thin
// bars with their names. It returns an error if there are no spans, if two spans have the same id,
// if a span ends before it starts or is its own ancestor, and if the whole step takes no time.
func SVG(spans []Span) ([]byte, error) {
	st, err := newStep(spans)
	if err != nil {
		return nil, err
	}
	p := &picture{step: st, scale: (right - left) / (st.end - st.start)}
	p.draw()
	return p.finish(), nil
}

// picture is an SVG that grows downwards.
type picture struct {
	*step
	scale  float64 // pixels of a microsecond
	y      float64 // where the next thing goes
	body   bytes.Buffer
	colour []colour // that the picture has, for its legend
}

// colour is what a kind of bar looks like.
type colour struct {
	name, fill, text string
	hatched          bool
}

func (p *picture) draw() {
	p.y = margin + 15
	p.text(margin, p.y, 15, ink, "start", "bold", p.title())
	p.y += 6
	for _, line := range wrap(p.explanation(), width-2*margin, textSize+1) {
		p.y += lineHeight
		p.text(margin, p.y, textSize+1, faintInk, "start", "", line)
	}
	p.y += 34
	top, rows := p.y, p.y
	// Lines lie behind the bars and end where those do, so the rows are laid out before anything is
	// drawn.
	for _, g := range p.groups {
		rows += g.height() + groupGap
	}
	p.axis(top, rows)
	for _, g := range p.groups {
		p.group(g)
	}
	p.voteLine(top, rows)
	p.y = rows + 46
	p.legend()
}

func (g *group) height() (height float64) {
	for _, r := range g.rows {
		height += r.height()
	}
	return height
}

func (r *row) height() float64 {
	if r.thin {
		return thinHeight
	}
	return rowHeight
}

// x returns where a time is.
func (p *picture) x(us float64) float64 { return left + (us-p.start)*p.scale }

// axis draws a line for each round number of milliseconds, and the numbers.
func (p *picture) axis(top, bottom float64) {
	span := (p.end - p.start) / 1000
	tick := math.Pow(10, math.Floor(math.Log10(span)))
	switch {
	case span < 2*tick:
		tick /= 5
	case span < 5*tick:
		tick /= 2
	}
	for i := 0; float64(i)*tick <= span; i++ {
		ms := float64(i) * tick
		x := p.x(p.start + ms*1000)
		p.line(x, top-4, x, bottom, grid, "")
		anchor := "middle"
		if x > right-20 {
			anchor = "end"
		}
		p.text(x, bottom+14, textSize-1, faintInk, anchor, "", fmt.Sprintf("%.4g ms", ms))
	}
	y := top
	for _, g := range p.groups[:len(p.groups)-1] {
		y += g.height() + groupGap
		p.line(margin, y-groupGap/2-0.5, right, y-groupGap/2-0.5, grid, "")
	}
}

// voteLine marks when the last rank came to the vote.
func (p *picture) voteLine(top, bottom float64) {
	last := p.lastVote()
	if last == nil {
		return
	}
	rank, _ := last.Int(Rank)
	x := p.x(last.Start)
	p.line(x, top-6, x, bottom, ink, "3 3")
	text := fmt.Sprintf("rank %d votes, the last one", rank)
	if x+textWidth(text, textSize) < right {
		p.text(x-1, top-10, textSize, ink, "start", "", text)
	} else {
		p.text(x+1, top-10, textSize, ink, "end", "", text)
	}
}

// group draws the rows of a rank.
func (p *picture) group(g group) {
	for i, r := range g.rows {
		height := r.height()
		baseline := p.y + height/2 + 4
		if i == 0 && g.rank != noRank {
			p.text(margin, baseline, textSize+1, ink, "start", "bold", fmt.Sprintf("rank %d", g.rank))
		}
		x, size := nameAt+12*float64(r.depth), textSize
		if g.rank == noRank {
			x = margin
		}
		if r.thin {
			size--
		}
		p.text(x, baseline, size, faintInk, "start", "", shorten(r.name(), left-8-x, size))
		for _, s := range r.spans {
			p.bar(s, r)
		}
		p.y += height
	}
	p.y += groupGap
}

// name returns what stands beside a row. The bar of a span of a known kind says itself what it is
// one of.
func (r *row) name() string {
	if r.thin {
		return r.spans[0].Name
	}
	return r.spans[0].Kind()
}

// bar draws a span, with its label in it or beside it.
func (p *picture) bar(s *Span, r row) {
	height := float64(barHeight)
	if r.thin {
		height = thinHeight - 6
	}
	x, y := p.x(s.Start), p.y+(r.height()-height)/2
	w := max(s.Duration()*p.scale, 1.5)
	c := p.colourOf(s)
	p.rect(x, y, w, height, c, s.Name+", "+milliseconds(s.Duration()))
	if r.thin {
		return
	}
	baseline := p.y + rowHeight/2 + 4
	for _, text := range labels(s) {
		const pad = 6
		needs := textWidth(text, textSize) + pad
		switch {
		case needs+pad <= w:
			p.text(x+pad, baseline, textSize, c.text, "start", "", text)
			if s.Kind() != Coordinate && s.Kind() != Wait {
				p.durationIn(s, x+w-pad, baseline, w-needs-4*pad, c)
			}
		case s.Kind() == Wait: // the next bar may be there
			continue
		case x+w+needs <= right:
			p.text(x+w+pad, baseline, textSize, ink, "start", "", text)
		case x-needs >= left:
			p.text(x-pad, baseline, textSize, ink, "end", "", text)
		default:
			continue
		}
		return
	}
}

// durationIn writes a span's duration at the end of its bar, with as much of it as there is room
// for.
func (p *picture) durationIn(s *Span, x, baseline, room float64, c colour) {
	for _, text := range durations(s) {
		if textWidth(text, textSize) <= room {
			p.text(x, baseline, textSize, c.text, "end", "", text)
			return
		}
	}
}

// colourOf returns the colour of a span and notes it for the legend.
func (p *picture) colourOf(s *Span) colour {
	c := colour{name: s.Kind(), fill: restColour, text: ink}
	switch s.Kind() {
	case Coordinate:
		c = colour{name: "waiting for votes", fill: waitColour, text: ink}
	case Forward:
		mode := s.Text(Mode)
		c = colour{name: strings.TrimSpace(mode + " pass"), fill: restColour, text: ink}
		if known, ok := modeColours[mode]; ok {
			c.fill, c.text = known, paper
		}
		if s.IsDummy() {
			c.name, c.text, c.hatched = "dummy pass, "+mode, ink, true
		}
	case UBatch:
		c = colour{name: "microbatch", fill: ubatchColour, text: ink}
	case Wait:
		c = colour{name: "waiting for another rank's rows", fill: rowsColour, text: ink}
	case Root:
		c.name = "step"
	}
	if !slices.Contains(p.colour, c) {
		p.colour = append(p.colour, c)
	}
	return c
}

// id returns the id of the pattern of a hatched colour.
func (c colour) id() string { return "h" + strings.TrimPrefix(c.fill, "#") }

// legend draws a sample of each colour.
func (p *picture) legend() {
	x := float64(left)
	for _, c := range p.colour {
		w := 24 + textWidth(c.name, textSize) + 18
		if x+w > width {
			x, p.y = left, p.y+lineHeight
		}
		p.rect(x, p.y-9, 18, 10, c, "")
		p.text(x+24, p.y, textSize, faintInk, "start", "", c.name)
		x += w
	}
	p.y += margin
}

// rect draws a rectangle. Browsers show its title to a pointer that rests on it.
func (p *picture) rect(x, y, w, h float64, c colour, title string) {
	fill, stroke := c.fill, ""
	if c.hatched {
		fill, stroke = "url(#"+c.id()+")", fmt.Sprintf(` stroke="%s"`, c.fill)
	}
	fmt.Fprintf(&p.body, `<rect x="%.1f" y="%.1f" width="%.1f" height="%g" rx="2.5"`, x, y, w, h)
	fmt.Fprintf(&p.body, ` fill="%s"%s`, fill, stroke)
	if title == "" {
		p.body.WriteString("/>\n")
	} else {
		fmt.Fprintf(&p.body, "><title>%s</title></rect>\n", html.EscapeString(title))
	}
}

func (p *picture) line(x1, y1, x2, y2 float64, stroke, dashes string) {
	fmt.Fprintf(&p.body, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"`, x1, y1, x2, y2, stroke)
	if dashes != "" {
		fmt.Fprintf(&p.body, ` stroke-dasharray="%s"`, dashes)
	}
	p.body.WriteString("/>\n")
}

func (p *picture) text(x, y float64, size int, fill, anchor, weight, text string) {
	fmt.Fprintf(&p.body, `<text x="%.1f" y="%.1f" font-size="%d" fill="%s"`, x, y, size, fill)
	if anchor != "start" {
		fmt.Fprintf(&p.body, ` text-anchor="%s"`, anchor)
	}
	if weight != "" {
		fmt.Fprintf(&p.body, ` font-weight="%s"`, weight)
	}
	fmt.Fprintf(&p.body, " xml:space=\"preserve\">%s</text>\n", html.EscapeString(text))
}

// finish puts the picture on paper of its own, so that it can be read on light and dark pages.
func (p *picture) finish() []byte {
	var out bytes.Buffer
	out.WriteString(`<svg xmlns="http://www.w3.org/2000/svg"`)
	fmt.Fprintf(&out, ` viewBox="0 0 %d %.0f" width="%[1]d" height="%.0[2]f"`, width, p.y)
	out.WriteString(` role="img" aria-labelledby="title desc"` +
		` font-family="system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif">` + "\n")
	fmt.Fprintf(&out, "<title id=\"title\">%s</title>\n", html.EscapeString(p.title()))
	fmt.Fprintf(&out, "<desc id=\"desc\">%s</desc>\n", html.EscapeString(p.description()))
	out.WriteString("<defs>\n")
	for _, c := range p.colour {
		if c.hatched {
			fmt.Fprintf(&out, `<pattern id="%s" width="6" height="6"`, c.id())
			out.WriteString(` patternUnits="userSpaceOnUse" patternTransform="rotate(45)">`)
			fmt.Fprintf(&out, `<rect width="6" height="6" fill="%s"/>`, paper)
			fmt.Fprintf(&out, `<rect width="2" height="6" fill="%s" fill-opacity="0.2"/>`, c.fill)
			out.WriteString("</pattern>\n")
		}
	}
	out.WriteString("</defs>\n")
	fmt.Fprintf(&out, `<rect x="0.5" y="0.5" width="%d" height="%.0f" rx="6"`, width-1, p.y-1)
	fmt.Fprintf(&out, ` fill="%s" stroke="%s"/>`+"\n", paper, border)
	out.Write(p.body.Bytes())
	out.WriteString("</svg>\n")
	return out.Bytes()
}

// wrap sets sentences in lines. A sentence is not broken.
func wrap(sentences []string, width float64, size int) (lines []string) {
	for _, s := range sentences {
		if n := len(lines); n > 0 && textWidth(lines[n-1]+" "+s, size) <= width {
			lines[n-1] += " " + s
		} else {
			lines = append(lines, s)
		}
	}
	return lines
}

// shorten cuts a text to a width.
func shorten(text string, width float64, size int) string {
	if textWidth(text, size) <= width {
		return text
	}
	runes := []rune(text)
	for len(runes) > 1 && textWidth(string(runes)+"…", size) > width {
		runes = runes[:len(runes)-1]
	}
	return string(runes) + "…"
}

// textWidth returns how wide a text is at most: in DejaVu Sans, the widest font that readers are
// likely to have.
func textWidth(text string, size int) float64 {
	var ems float64
	for _, r := range text {
		switch {
		case strings.ContainsRune(" .,:;iljtfI|()", r):
			ems += 0.38
		case strings.ContainsRune("mwMW", r):
			ems += 0.95
		case unicode.IsUpper(r):
			ems += 0.70
		default:
			ems += 0.63
		}
	}
	return ems * float64(size)
}
