package integration

import (
	"os/exec"
	"syscall"
)

// dieWithParent makes the kernel kill the process when this one dies, by a timeout of the tests for one.
func dieWithParent(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
