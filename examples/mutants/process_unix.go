//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// inGroup gives cmd a process group, so that stopping it stops what it has started too: a compiler, a
// test's own commands.
func inGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}
