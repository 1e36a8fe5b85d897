//go:build unix

package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
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

// start starts a program, which does not outlive the test.
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

// clear makes sure that a process has ended, with all in its group. A test that has not failed leaves none.
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

// report is what serve prints.
type report struct {
	Requests    int
	Finished    int
	Resumed     int
	Steps       int
	FailedSteps int `json:"failed_steps"`
	Check       struct{ Requests, Agreed int }
}

// report returns what a rank has printed, once it has ended well.
func (p *process) report() report {
	p.Helper()
	exit := p.wait()
	var r report
	if err := json.Unmarshal(p.stdout.Bytes(), &r); err != nil || exit != 0 || p.stderr.Len() > 0 {
		p.Fatalf("%s: exit %d, stderr %q, %v in stdout %q", p.name, exit, &p.stderr, err, &p.stdout)
	}
	return r
}

// failure returns what a rank says that has ended with an error, and how many requests it had finished by then.
func (p *process) failure() (text string, finished int) {
	p.Helper()
	exit := p.wait()
	text = p.stderr.String()
	if exit != 1 || p.stdout.Len() > 0 || strings.Count(text, "\n") != 1 {
		p.Errorf("%s: exit %d, stderr %q, stdout %q; want 1 and one line", p.name, exit, text, &p.stdout)
	}
	var steps, requests int
	progress := text[max(0, strings.LastIndexByte(text, '(')):]
	if _, err := fmt.Sscanf(progress, "(after %d steps, %d of %d requests finished)", &steps, &finished, &requests); err != nil {
		p.Errorf("%s does not say how far it got: %v in %q", p.name, err, text)
	}
	return text, finished
}
