// Helpers for processes that only Linux has.

package faults

import (
	"os/exec"
	"syscall"
)

// onItsOwn keeps the signals of a terminal away from a process. It also makes the kernel kill the
// process when this one dies, for example by a timeout of the tests.
func onItsOwn(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
