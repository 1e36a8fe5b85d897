package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/forwardctx/fwd/fwdplan"
)

// width is how wide the table may be: half a screen.
const width = 60

// table returns the result for people.
func table(s fwdplan.Snapshot, r *result, o *options) string {
	var b strings.Builder
	c := r.Plan.Confidence
	fmt.Fprintf(&b, "%s passes of %s sizes can use graphs", grouped(c.Passes), grouped(uint64(c.Sizes)))
	if s.Name != "" {
		fmt.Fprintf(&b, ", %s", s.Name)
	}
	fmt.Fprintf(&b, "\n\n")
	outcomes(&b, "", r.Compared, o)
	if len(r.Judged) > 0 {
		fmt.Fprintf(&b, "\n")
		outcomes(&b, "judged on "+o.judge, r.Judged, o)
	}
	fmt.Fprintf(&b, "\n")
	kind := ""
	if o.config.Separate {
		kind = " for decode"
	}
	wrap(&b, "capture sizes"+kind+": "+list(r.Plan.Sizes))
	if o.config.Separate {
		wrap(&b, "capture sizes for mixed: "+list(r.Plan.MixedSizes))
	}
	wrap(&b, neighbours(r.Plan))
	wrap(&b, confidence(c))
	wrap(&b, leftOut(s.LeftOut))
	if r.Plan.Adjusted > 0 {
		wrap(&b, fmt.Sprintf("The measured times of %d sizes fell with size, and were levelled.", r.Plan.Adjusted))
	}
	return b.String()
}

// outcomes writes one line for each ladder.
func outcomes(b *strings.Builder, title string, rows []compared, o *options) {
	unit := "cost, tok."
	if o.config.Measured {
		unit = "cost, s"
	}
	if title != "" {
		wrap(b, title)
	}
	fmt.Fprintf(b, "%-12s %5s %6s %7s %7s %6s\n", "", "", "", "decode", "mixed", "eager")
	fmt.Fprintf(b, "%-12s %5s %6s %7s %7s %6s %11s\n", "", "sizes", "graphs", "padding", "padding", "passes",
		unit)
	for _, row := range rows {
		name := []rune(row.Name)
		if len(name) > 12 {
			name = append(name[:11], '…')
		}
		fmt.Fprintf(b, "%-12s %5d %6d %7s %7s %6s %11s\n", string(name), len(row.Sizes)+extra(row.Ladder, o),
			row.Graphs,
			padding(row.Decode), padding(row.Mixed), percent(row.All().EagerRatio()), cost(row.Cost))
	}
}

// extra is how many sizes a ladder has for mixed batches alone.
func extra(l fwdplan.Ladder, o *options) int {
	if !o.config.Separate {
		return 0
	}
	return len(l.MixedSizes)
}

// neighbours says what one graph more or less would change.
func neighbours(p fwdplan.Plan) string {
	at := slices.IndexFunc(p.Curve, func(c fwdplan.Point) bool { return c.Graphs >= p.Graphs })
	if at < 0 {
		return ""
	}
	var parts []string
	now := p.Curve[at].Cost
	if at > 0 {
		less := p.Curve[at-1]
		parts = append(parts, fmt.Sprintf("With %d graphs these passes would cost %s more",
			less.Graphs, percent(less.Cost/now-1)))
	}
	if at+1 < len(p.Curve) {
		more := p.Curve[at+1]
		parts = append(parts, fmt.Sprintf("with %d, %s less", more.Graphs, percent(1-more.Cost/now)))
	} else {
		parts = append(parts, "more graphs would save nothing")
	}
	text := strings.Join(parts, "; ") + "."
	return strings.ToUpper(text[:1]) + text[1:]
}

// confidence says how much traffic stands behind the plan.
func confidence(c fwdplan.Confidence) string {
	text := ""
	for i, e := range c.Evidence {
		if i == 0 {
			text = fmt.Sprintf("%s of the passes have a size that was seen %d times or more", percent(e.Share),
				e.AtLeast)
		} else {
			text += fmt.Sprintf(", %s one seen %s times", percent(e.Share), grouped(e.AtLeast))
		}
	}
	return fmt.Sprintf("%s. %d of %d sizes were seen once.", text, c.SeenOnce, c.Sizes)
}

// leftOut says what the snapshot does not count as passes, or nothing.
func leftOut(l fwdplan.LeftOut) string {
	var parts []string
	for _, kind := range []struct {
		n    uint64
		what string
	}{
		{l.Failed, "failed"}, {l.NoBatch, "without a batch, as in warm-up"},
		{l.NoGraph, "that no graph could serve"}, {l.Other, "of other engines"},
		{l.Beyond, "beyond what is counted"},
	} {
		if kind.n > 0 {
			parts = append(parts, grouped(kind.n)+" "+kind.what)
		}
	}
	if parts == nil {
		return ""
	}
	return "Left out: " + strings.Join(parts, "; ") + "."
}

func list(sizes []int) string {
	if len(sizes) == 0 {
		return "none"
	}
	return strings.Trim(fmt.Sprint(sizes), "[]")
}

// padding is a dash for batches that no graph serves.
func padding(s fwdplan.Share) string {
	if s.Tokens == 0 {
		return "–"
	}
	return percent(s.PaddingRatio())
}

func percent(ratio float64) string {
	switch p := ratio * 100; {
	case math.IsNaN(p) || math.IsInf(p, 0):
		return "–"
	case math.Abs(p) < 0.005:
		return "0%"
	case math.Abs(p) < 0.1:
		return fmt.Sprintf("%.2f%%", p)
	default:
		return fmt.Sprintf("%.1f%%", p)
	}
}

func cost(c float64) string {
	if c < 1e6 {
		return fmt.Sprintf("%.6g", c)
	}
	if c < 1e9 {
		return grouped(uint64(math.Round(c)))
	}
	return fmt.Sprintf("%.5g", c)
}

// grouped returns a number with a comma for each thousand.
func grouped(n uint64) string {
	text := strconv.FormatUint(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// wrap writes a text in lines of the table's width.
func wrap(b *strings.Builder, text string) {
	used := 0
	for word := range strings.FieldsSeq(text) {
		n := len([]rune(word))
		switch {
		case used == 0:
		case used+1+n > width:
			b.WriteByte('\n')
			used = 0
		default:
			b.WriteByte(' ')
			used++
		}
		b.WriteString(word)
		used += n
	}
	if used > 0 {
		b.WriteByte('\n')
	}
}
