package main

import (
	"os/exec"
	"syscall"
)

// onItsOwn keeps the signals of a terminal away from a process, which is told by this one what they
// mean, and makes the kernel kill it when this one dies.
func onItsOwn(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
