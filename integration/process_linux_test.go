// Helpers for processes that only Linux has.

package integration

import (
	"os/exec"
	"syscall"
)

// dieWithParent makes the kernel kill the process when this one dies, for example by a timeout of
// the tests.
func dieWithParent(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
