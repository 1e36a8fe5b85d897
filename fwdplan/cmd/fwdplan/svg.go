package main

import (
	"bytes"
	"fmt"
	"html"
	"math"

	"github.com/forwardctx/fwd/fwdplan"
)

// Measures of the picture, in pixels.
const (
	pictureWidth, pictureHeight = 900, 640
	left, right                 = 64, pictureWidth - 24
	histogramTop                = 84
	histogramBottom             = 270
	stepsBottom                 = 380
	curveTop, curveBottom       = 450, 600
)

const (
	ink       = "#1f2328"
	faint     = "#59636e"
	grid      = "#e4e8ec"
	decodeInk = "#00785a"
	mixedInk  = "#0b62a8"
	stepInk   = "#e8a317"
)

// drawing is an SVG that grows.
type drawing struct {
	bytes.Buffer
	largest float64 // size on the horizontal axis
}

// picture draws the histogram of sizes with the ladder over it, the padding that each step of the ladder
// costs, and what the number of graphs changes.
func picture(s fwdplan.Snapshot, r *result) []byte {
	d := &drawing{largest: 2}
	for _, step := range r.Plan.Steps {
		d.largest = max(d.largest, float64(step.Size))
	}
	fmt.Fprintf(d, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif">`+"\n",
		pictureWidth, pictureHeight)
	fmt.Fprintf(d, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", pictureWidth, pictureHeight)
	d.text(left, 28, 16, ink, "start",
		fmt.Sprintf("%d capture sizes for %s passes; padding: decode %s, mixed %s",
			len(r.Plan.Steps), grouped(r.Plan.Confidence.Passes), padding(r.Plan.Decode), padding(r.Plan.Mixed)))
	d.text(left, 56, 12, faint, "start",
		"Up: passes by size in tokens, height by square root. Lines: capture sizes. "+
			"Down: padded tokens of each.")
	d.swatch(right-130, 56, decodeInk, "decode")
	d.swatch(right-55, 56, mixedInk, "mixed")
	d.histogram(s, r)
	d.steps(r)
	d.curve(r)
	d.WriteString("</svg>\n")
	return d.Bytes()
}

// x returns where a size is: the axis is logarithmic.
func (d *drawing) x(size float64) float64 {
	return left + (right-left)*math.Log2(max(size, 0.5)+0.5)/math.Log2(d.largest+1)
}

// histogram draws the passes by size, one bar for each pixel at most.
func (d *drawing) histogram(s fwdplan.Snapshot, r *result) {
	type bar struct{ from, to, decode, mixed float64 }
	bars := map[int]*bar{}
	var most float64
	for _, row := range s.Rows {
		size := float64(row.Tokens)
		if size > d.largest {
			continue
		}
		from, to := d.x(size-0.5), d.x(size+0.5)
		b := bars[int(from)]
		if b == nil {
			b = &bar{from: from, to: to}
			bars[int(from)] = b
		}
		b.to = max(b.to, to)
		if row.Uniform {
			b.decode += float64(row.Passes + row.Dummies)
		} else {
			b.mixed += float64(row.Passes + row.Dummies)
		}
		most = max(most, b.decode+b.mixed)
	}
	for _, step := range r.Plan.Steps {
		x := d.x(float64(step.Size) + 0.5)
		d.line(x, histogramTop-8, x, stepsBottom, stepInk, 1)
	}
	height := func(passes float64) float64 {
		return (histogramBottom - histogramTop) * math.Sqrt(passes/max(most, 1))
	}
	for x := left - 1; x <= right+1; x++ { // in order, so that the same plan gives the same picture
		if b := bars[x]; b != nil {
			width := max(b.to-b.from-0.4, 2)
			all, decode := height(b.decode+b.mixed), height(b.decode)
			d.rect(b.from, histogramBottom-all, width, all-decode, mixedInk)
			d.rect(b.from, histogramBottom-decode, width, decode, decodeInk)
		}
	}
	d.text(left-6, histogramTop+10, 11, faint, "end", short(most))
	for size := 1.0; size <= d.largest; size *= 2 {
		d.text(min(d.x(size), right-12), stepsBottom+16, 11, faint, "middle", fmt.Sprintf("%.0f", size))
	}
	d.line(left, histogramBottom, right, histogramBottom, ink, 1)
}

// steps draws the padding of each step of the ladder, downwards from the histogram's foot.
func (d *drawing) steps(r *result) {
	var most uint64
	for _, step := range r.Plan.Steps {
		most = max(most, step.Padding)
	}
	last := 0.0
	for _, step := range r.Plan.Steps {
		size := float64(step.Size)
		if size <= last {
			last = 0 // the second list begins
		}
		height := float64(step.Padding) / float64(max(most, 1)) * (stepsBottom - histogramBottom - 24)
		d.rect(d.x(last+0.5), histogramBottom, d.x(size+0.5)-d.x(last+0.5), height, stepInk)
		last = size
	}
	d.text(left-6, histogramBottom+16, 11, faint, "end", short(float64(most)))
}

// curve draws the excess cost by graphs, on a logarithmic axis.
func (d *drawing) curve(r *result) {
	d.text(left, curveTop-14, 12, faint, "start",
		"cost above that of a graph for every size, by number of graphs; the dot is the plan")
	curve := r.Plan.Curve
	low, high := math.Inf(1), 0.0
	for _, p := range curve {
		if p.Excess > 0 {
			low, high = min(low, p.Excess), max(high, p.Excess)
		}
	}
	if high == 0 {
		d.text(left, curveTop+30, 12, ink, "start", "no ladder pads at all")
		return
	}
	low, high = math.Floor(math.Log10(max(low, 1e-4))), math.Ceil(math.Log10(high))
	high = max(high, low+1)
	first, last := float64(curve[0].Graphs), float64(curve[len(curve)-1].Graphs)
	x := func(graphs int) float64 { return left + (right-left)*(float64(graphs)-first)/max(last-first, 1) }
	y := func(excess float64) float64 {
		at := min(max(math.Log10(max(excess, 1e-9)), low), high)
		return curveBottom - (curveBottom-curveTop)*(at-low)/(high-low)
	}
	for e := low; e <= high; e++ {
		at := y(math.Pow(10, e))
		d.line(left, at, right, at, grid, 1)
		d.text(left-6, at+4, 11, faint, "end", fmt.Sprintf("%g %%", math.Pow(10, e)*100))
	}
	d.WriteString(`<polyline fill="none" stroke="` + ink + `" stroke-width="1.5" points="`)
	for _, p := range curve {
		fmt.Fprintf(d, "%.1f,%.1f ", x(p.Graphs), y(p.Excess))
	}
	d.WriteString("\"/>\n")
	step := max(1, len(curve)/12)
	for i := 0; i < len(curve); i += step {
		d.text(x(curve[i].Graphs), curveBottom+18, 11, faint, "middle", fmt.Sprint(curve[i].Graphs))
	}
	for _, p := range curve {
		if p.Graphs == r.Plan.Graphs {
			fmt.Fprintf(d, `<circle cx="%.1f" cy="%.1f" r="5" fill="%s"/>`+"\n", x(p.Graphs), y(p.Excess), stepInk)
		}
	}
}

func (d *drawing) text(x, y float64, size int, colour, anchor, text string) {
	fmt.Fprintf(d, `<text x="%.1f" y="%.1f" font-size="%d" fill="%s" text-anchor="%s">%s</text>`+"\n",
		x, y, size, colour, anchor, html.EscapeString(text))
}

func (d *drawing) swatch(x, y float64, colour, text string) {
	d.rect(x, y-10, 10, 10, colour)
	d.text(x+16, y, 12, ink, "start", text)
}

func (d *drawing) rect(x, y, width, height float64, colour string) {
	if height > 0 && width > 0 {
		fmt.Fprintf(d, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n", x, y, width, height,
			colour)
	}
}

func (d *drawing) line(x1, y1, x2, y2 float64, colour string, width float64) {
	fmt.Fprintf(d, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%g"/>`+"\n",
		x1, y1, x2, y2, colour, width)
}

// short returns a number in few characters.
func short(n float64) string {
	for _, unit := range []string{"", "k", "M", "G", "T"} {
		if n < 1000 {
			return fmt.Sprintf("%.3g%s", n, unit)
		}
		n /= 1000
	}
	return fmt.Sprintf("%.3gP", n)
}
