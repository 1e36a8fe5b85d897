//go:build unix && !linux

// Stands for helpers that only Linux has.

package faults

import (
	"os/exec"
	"syscall"
)

// onItsOwn keeps the signals of a terminal away from a process.
func onItsOwn(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func removeStaleNamespaces() {} // there are none
