//go:build unix

// Helpers: processes, what they print and how they end.

package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is a running program.
type process struct {
	*testing.T
	name           string
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	exited         chan struct{}
}

// start starts a program that must end before the test does.
func start(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{T: t, name: name, cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.stdout, &p.stderr
	cmd.WaitDelay = time.Second // it starts no others that could hold its output
	onItsOwn(cmd)
	started := make(chan error)
	go func() {
		// The kernel watches over the thread that started a process, so this one must stay.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in cmd.ProcessState
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.clear)
	return p
}

// clear ends a process and those in its group. If the test has not failed, there must be none left.
func (p *process) clear() {
	select {
	case <-p.exited:
		if err := syscall.Kill(-p.cmd.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
			p.Errorf("%s has left others in its process group %d: %v", p.name, p.cmd.Process.Pid, err)
		}
	default:
		if !p.Failed() {
			p.Errorf("%s is still there", p.name)
		}
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
		p.wait()
	}
	if p.Failed() {
		p.Logf("%s: exit %d, stderr %q", p.name, p.cmd.ProcessState.ExitCode(), &p.stderr)
	}
}

// wait returns the exit status; -1 of a program that was killed.
func (p *process) wait() int {
	p.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.Fatalf("%s has not ended after %v", p.name, patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) signal(s os.Signal) {
	p.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.Fatalf("%s: %v", p.name, err)
	}
}

// kill kills a process with SIGKILL.
func (p *process) kill() {
	p.Helper()
	p.signal(syscall.SIGKILL)
	if exit := p.wait(); exit != -1 {
		p.Fatalf("%s ended before it was killed: exit %d, stderr %q", p.name, exit, &p.stderr)
	}
}

// report is what serve prints, and what it warned of.
type report struct {
	Requests    int
	Finished    int
	Resumed     int
	Steps       int
	FailedSteps int `json:"failed_steps"`
	Check       struct{ Requests, Agreed int }

	warnings []string
}

// warned returns how many warnings have this message.
func (r *report) warned(message string) (n int) {
	for _, w := range r.warnings {
		if strings.Contains(w, "msg="+strconv.Quote(message)) {
			n++
		}
	}
	return n
}

// said returns what a process has written to stderr: what its log says of steps, and what is not in the
// log, which also says who is awaited and what becomes of the connection.
func (p *process) said() (warnings []string, rest string) {
	for line := range strings.Lines(p.stderr.String()) {
		switch {
		case !strings.HasPrefix(line, "time=") || !strings.Contains(line, " level="):
			rest += line
		case strings.Contains(line, " fwd.step="):
			warnings = append(warnings, line)
		}
	}
	return warnings, rest
}

// report returns what a rank has printed, once it has ended well.
func (p *process) report() report {
	p.Helper()
	exit := p.wait()
	warnings, rest := p.said()
	r := report{warnings: warnings}
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil || exit != 0 || rest != "" {
		p.Fatalf("%s: exit %d, stderr %q, %v in stdout %q", p.name, exit, &p.stderr, err, &p.stdout)
	}
	return r
}

// failure returns the error with which a rank has ended, and how many requests it had finished by
// then.
func (p *process) failure() (text string, finished int) {
	p.Helper()
	exit := p.wait()
	_, text = p.said()
	if exit != 1 || p.stdout.Len() > 0 || strings.Count(text, "\n") != 1 {
		p.Errorf("%s: exit %d, stderr %q, stdout %q; want 1 and one line", p.name, exit, text, &p.stdout)
	}
	var steps, requests int
	progress := text[max(0, strings.LastIndexByte(text, '(')):]
	const format = "(after %d steps, %d of %d requests finished)"
	if _, err := fmt.Sscanf(progress, format, &steps, &finished, &requests); err != nil {
		p.Errorf("%s does not say how far it got: %v in %q", p.name, err, text)
	}
	return text, finished
}
