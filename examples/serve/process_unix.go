//go:build unix && !linux

package main

import (
	"os/exec"
	"syscall"
)

// onItsOwn keeps the signals of a terminal away from a process, which is told by this one what they
// mean. It outlives this one until it misses its server.
func onItsOwn(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
