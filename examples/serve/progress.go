package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

// progress is how far a run has come, as -progress prints it.
type progress struct {
	What   string `json:"progress"` // serving or checking
	Done   int    `json:"done"`
	Of     int    `json:"of"`               // requests
	Tokens int    `json:"tokens,omitempty"` // generated
}

// screen is where messages go. If it is a terminal it has a progress bar below them.
type screen struct {
	lines io.Writer  // if not nil, progress goes there as lines of JSON, and there is no bar
	width func() int // of the terminal; nil: it is none

	mu     sync.Mutex
	to     io.Writer
	drawn  bool // the cursor is behind a bar
	midway bool // the last message has not ended its line
}

// newScreen returns the screen for messages to w.
func newScreen(w io.Writer) *screen {
	s := &screen{to: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		s.width = func() int {
			width, _, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 0
			}
			return width
		}
	}
	return s
}

// shows reports whether anybody sees how far a run has come.
func (s *screen) shows() bool { return s.lines != nil || s.width != nil }

// Write implements [io.Writer] for several goroutines. A message takes the place of the bar, which
// is drawn again below it.
func (s *screen) Write(text []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	if len(text) > 0 {
		s.midway = text[len(text)-1] != '\n'
	}
	return s.to.Write(text)
}

// clear makes room for what comes next.
func (s *screen) clear() {
	if s.drawn {
		fmt.Fprint(s.to, "\r\x1b[K")
		s.drawn = false
	}
}

// show draws the bar, as wide as the terminal is now, or prints a line of JSON.
func (s *screen) show(p progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lines != nil {
		_ = json.NewEncoder(s.lines).Encode(p) // whoever no longer reads it will not read the figures either
		return
	}
	if s.midway {
		return
	}
	if bar := p.bar(s.width()); bar == "" {
		s.clear()
	} else {
		fmt.Fprintf(s.to, "\r%s\x1b[K", bar)
		s.drawn = true
	}
}

// hide removes the bar.
func (s *screen) hide() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
}

// leastWidth is the width in columns below which a terminal has no bar. A bar is never wider than
// widestBar, so that a terminal which becomes smaller rarely has to break one that is there.
const leastWidth, widestBar = 20, 59

// bar returns a bar that fits a terminal, with as much beside it as there is room for. The last
// column stays free, since some terminals go to the next line when it is written.
func (p *progress) bar(width int) string {
	if width < leastWidth {
		return ""
	}
	const most, least = 30, 8 // of the bar itself
	room := min(width-1, widestBar)
	count := fmt.Sprintf("%d/%d", p.Done, p.Of)
	texts := []string{count + " requests", count}
	if p.Tokens > 0 {
		texts = append([]string{fmt.Sprintf("%s requests, %d tokens", count, p.Tokens)}, texts...)
	}
	for _, text := range texts {
		size := min(most, room-len(text)-len("checking [] "))
		if size < least {
			continue
		}
		full := 0
		if p.Of > 0 {
			full = size * p.Done / p.Of
		}
		return fmt.Sprintf("%-8s [%s%s] %s", p.What, strings.Repeat("#", full),
			strings.Repeat(".", size-full), text)
	}
	for _, text := range []string{p.What + " " + count, count} {
		if len(text) <= room {
			return text
		}
	}
	return ""
}

// bar shows how far something has come until it is stopped.
type bar struct {
	quit chan struct{}
	wg   sync.WaitGroup
}

// startBar shows progress on a screen, if anybody sees it there.
func startBar(s *screen, now func() progress) *bar {
	b := &bar{quit: make(chan struct{})}
	if !s.shows() {
		return b
	}
	b.wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			s.show(now())
			select {
			case <-tick.C:
			case <-b.quit:
				s.hide() // what comes next starts on a clean line
				return
			}
		}
	})
	return b
}

func (b *bar) stop() {
	close(b.quit)
	b.wg.Wait()
}

// counter counts from several goroutines.
type counter struct{ n atomic.Int64 }

func (c *counter) add()     { c.n.Add(1) }
func (c *counter) get() int { return int(c.n.Load()) }
