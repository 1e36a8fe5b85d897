package faults

import (
	"os/exec"
	"syscall"
)

// onItsOwn keeps the signals of a terminal away from a process, and makes the kernel kill it when this one dies, by a timeout of
// the tests for one.
func onItsOwn(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
