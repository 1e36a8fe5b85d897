package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

// bar is a progress bar on a terminal, and nothing anywhere else.
type bar struct {
	quit chan struct{}
	wg   sync.WaitGroup
}

// startBar shows how many of total are done, with a note, until stop.
func startBar(w io.Writer, what string, total int, progress func() (done int, note string)) *bar {
	b := &bar{quit: make(chan struct{})}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return b
	}
	b.wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			done, note := progress()
			fmt.Fprintf(w, "\r%s\x1b[K", line(what, done, total, note))
			select {
			case <-tick.C:
			case <-b.quit:
				fmt.Fprint(w, "\r\x1b[K") // what comes next starts on a clean line
				return
			}
		}
	})
	return b
}

func line(what string, done, total int, note string) string {
	const width = 30
	full := 0
	if total > 0 {
		full = width * done / total
	}
	s := fmt.Sprintf("%-8s [%s%s] %d/%d requests", what, strings.Repeat("#", full),
		strings.Repeat(".", width-full), done, total)
	if note != "" {
		s += ", " + note
	}
	return s
}

func (b *bar) stop() {
	close(b.quit)
	b.wg.Wait()
}

// counter counts from several goroutines.
type counter struct{ n atomic.Int64 }

func (c *counter) add()     { c.n.Add(1) }
func (c *counter) get() int { return int(c.n.Load()) }
