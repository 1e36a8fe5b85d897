//go:build unix

// What is seen on a terminal: the program runs in one, and its screen is read.

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/charmbracelet/x/vt"
	"github.com/creack/pty"
)

// terminal is a terminal in which serve runs.
type terminal struct {
	*testing.T
	cmd  *exec.Cmd
	file *os.File
	read chan struct{} // closed when there is nothing more to read

	mu     sync.Mutex
	width  int
	screen *vt.Emulator
	bars   []string // the last bars that were seen, at most maxBars
	broken []string // screens on which a bar was not alone in its line
}

const terminalHeight, maxBars = 200, 1000

// startTerminal runs serve in a terminal of a width.
func startTerminal(t *testing.T, width int, args ...string) *terminal {
	t.Helper()
	term := &terminal{
		T: t, cmd: exec.CommandContext(t.Context(), os.Args[0], args...), read: make(chan struct{}),
		width: width, screen: vt.NewEmulator(width, terminalHeight),
	}
	term.cmd.Env = append(os.Environ(), asProgram+"=1")
	var err error
	size := &pty.Winsize{Cols: uint16(width), Rows: terminalHeight}
	if term.file, err = pty.StartWithSize(term.cmd, size); err != nil {
		t.Fatal(err)
	}
	go term.watch()
	t.Cleanup(func() {
		_ = term.cmd.Process.Kill() // it has usually ended
		<-term.read
		term.file.Close()
	})
	return term
}

// watch reads what the program writes, and looks at the screen after each piece.
func (term *terminal) watch() {
	defer close(term.read)
	text := make([]byte, 4096)
	for {
		n, err := term.file.Read(text)
		term.mu.Lock()
		_, _ = term.screen.Write(text[:n])
		term.look()
		term.mu.Unlock()
		if err != nil { // the program has ended
			return
		}
	}
}

// look notes the bar, if there is one, and whether it is as it should be: one line, below all others.
func (term *terminal) look() {
	lines := term.lines()
	if len(lines) == 0 {
		return
	}
	last := lines[len(lines)-1]
	if strings.HasPrefix(last, "serving") || strings.HasPrefix(last, "checking") {
		term.bars = append(term.bars, last)
		term.bars = term.bars[max(0, len(term.bars)-maxBars):]
	}
	for i, line := range lines {
		bar := strings.Contains(line, "serving") || strings.Contains(line, "checking") ||
			strings.Contains(line, "###")
		if bar && (i < len(lines)-1 || len(line) >= term.width) && len(term.broken) < 3 {
			term.broken = append(term.broken, strings.Join(lines, "\n"))
		}
	}
}

// lines returns the lines of the screen that are not empty at the end.
func (term *terminal) lines() []string {
	lines := strings.Split(term.screen.String(), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " \r")
	}
	for len(lines) > 0 && lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// resize gives the terminal another width.
func (term *terminal) resize(width int) {
	term.Helper()
	term.mu.Lock()
	defer term.mu.Unlock()
	term.width, term.bars = width, nil
	term.screen.Resize(width, terminalHeight)
	if err := pty.Setsize(term.file, &pty.Winsize{Cols: uint16(width), Rows: terminalHeight}); err != nil {
		term.Fatal(err)
	}
}

// bar waits for a bar that shows some progress and returns it.
func (term *terminal) bar() (bar string) {
	term.Helper()
	eventually(term.T, "a bar", func() bool {
		term.mu.Lock()
		defer term.mu.Unlock()
		if n := len(term.bars); n > 0 {
			bar = term.bars[n-1]
		}
		return bar != "" && !strings.Contains(bar, " 0/")
	})
	return bar
}

// wait returns the last screen, and checks those before it.
func (term *terminal) wait() []string {
	term.Helper()
	if err := term.cmd.Wait(); err != nil {
		term.Error(err)
	}
	<-term.read
	for _, screen := range term.broken {
		term.Errorf("the bar is not alone in the last line:\n%s", screen)
	}
	return term.lines()
}

// TestScreen: a bar fits the terminal, whether the ranks are processes or not; a small terminal has
// none. Nothing of it is left in the end.
func TestScreen(t *testing.T) {
	for _, c := range []struct {
		width     int
		processes string
		want      string // in the bar
	}{
		{200, "", "] "}, {80, "", "] "}, {80, "-processes", "] "}, {60, "", "] "}, {20, "", "serving "},
		{15, "", ""}, {15, "-processes", ""},
	} {
		t.Run(fmt.Sprint(c.width, c.processes), func(t *testing.T) {
			t.Parallel()
			term := startTerminal(t, c.width, strings.Fields("-dp 2 -requests 30 -speed 5 -check "+c.processes)...)
			if c.want != "" {
				if bar := term.bar(); !strings.Contains(bar, c.want) || !strings.Contains(bar, "/30") {
					t.Errorf("the bar is %q, want one with %q", bar, c.want)
				}
			}
			lines := term.wait()
			if c.want == "" && len(term.bars) > 0 {
				t.Errorf("there are bars in %d columns: %q", c.width, term.bars)
			}
			all := strings.Join(strings.Fields(strings.Join(lines, "")), "")
			if !strings.HasPrefix(all, "requests30") ||
				!strings.HasSuffix(all, "check:30of30requestsagreewiththereference") {
				t.Errorf("the screen is\n%s", strings.Join(lines, "\n"))
			}
		})
	}
}

// TestScreenResize: the bar follows the terminal's width.
func TestScreenResize(t *testing.T) {
	t.Parallel()
	term := startTerminal(t, 80, "-dp", "2", "-requests", "60", "-speed", "2")
	for _, c := range []struct {
		width int
		want  string
	}{{200, " tokens"}, {60, " tokens"}, {30, "/60"}, {100, " tokens"}} {
		term.resize(c.width)
		if bar := term.bar(); !strings.HasPrefix(bar, "serving") || !strings.Contains(bar, c.want) {
			t.Errorf("in %d columns the bar is %q, want one with %q", c.width, bar, c.want)
		}
	}
	term.wait()
}

// TestScreenMessages: a message takes the place of the bar, which is drawn again below it, but not
// behind one that has not ended.
func TestScreenMessages(t *testing.T) {
	emulator := vt.NewEmulator(40, 5)
	s := &screen{to: emulator, width: func() int { return 40 }}
	words := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	seen := func() string { return words(emulator.String()) }
	p := progress{"serving", 1, 2, 0}
	s.show(p)
	bar := words(p.bar(40))
	if got := seen(); got != bar {
		t.Errorf("%q, want the bar", got)
	}
	io.WriteString(s, "a message\r\n")
	s.show(p)
	if got := seen(); got != "a message "+bar {
		t.Errorf("%q, want the message and the bar", got)
	}
	io.WriteString(s, "begun")
	s.show(p)
	if got := seen(); got != "a message begun" {
		t.Errorf("%q, want a message that has only begun", got)
	}
	s.hide()
}

// TestBar: a bar never reaches the last column, and says as much as there is room for.
func TestBar(t *testing.T) {
	p := progress{"checking", 12345, 12345, 1234567}
	for width := range 300 {
		got := p.bar(width)
		if len(got) >= max(width, 1) || len(got) > widestBar || (got == "") != (width < leastWidth) {
			t.Errorf("in %d columns %q", width, got)
		}
	}
	p = progress{"serving", 5, 10, 7}
	for width, want := range map[int]string{
		19:  "",
		20:  "serving 5/10",
		28:  "serving  [#####......] 5/10",
		37:  "serving  [#####......] 5/10 requests",
		200: "serving  [############............] 5/10 requests, 7 tokens",
	} {
		if got := p.bar(width); got != want {
			t.Errorf("in %d columns %q, want %q", width, got, want)
		}
	}
}
