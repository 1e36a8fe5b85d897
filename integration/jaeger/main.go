// Command jaeger builds the Jaeger that this module pins, the program that users run, and prints
// where the binary is. It keeps the binary in a cache outside the tree, one for each Go version and
// go.sum. The first build takes minutes and about 4 GiB of memory, later ones nothing. If there are
// arguments, it runs the binary with them instead of printing where it is, and says where it answers,
// once it does:
//
//	go -C integration/jaeger run . --config ../jaeger.yaml
//
// FWD_JAEGER names a binary to use without building one. FWD_JAEGER_CACHE names the folder of the
// cache.
package main

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("jaeger: ")
	binary, err := build()
	if err != nil {
		log.Fatal(err)
	}
	if len(os.Args) == 1 {
		fmt.Println(binary)
		return
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	command := exec.Command(binary, os.Args[1:]...)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := command.Start(); err != nil {
		log.Fatal(err)
	}
	go func() { // Jaeger shuts down, and this program ends after it
		for s := range signals {
			_ = command.Process.Signal(s) // it may have ended
		}
	}()
	go sayReady()
	if err := command.Wait(); err != nil {
		log.Fatal(err)
	}
}

// sayReady waits until the query API of ../jaeger.yaml answers, and prints its address.
func sayReady() {
	about := " (the query API alone; JAEGER_UI_ASSETS gives it a page)"
	if os.Getenv("JAEGER_UI_ASSETS") != "" {
		about = ""
	}
	page := "http://" + net.JoinHostPort(env("JAEGER_LISTEN_HOST", "localhost"), env("QUERY_HTTP_PORT", "16686"))
	for range time.Tick(100 * time.Millisecond) {
		response, err := http.Get(page + "/api/services")
		if err != nil {
			continue
		}
		response.Body.Close()
		if response.StatusCode == http.StatusOK {
			log.Printf("ready: %s%s", page, about)
			return
		}
	}
}

func env(name, otherwise string) string { return cmp.Or(os.Getenv(name), otherwise) }

// build returns the binary, and builds it if there is none yet. It expects this module in the
// current directory.
func build() (string, error) {
	if binary := os.Getenv("FWD_JAEGER"); binary != "" {
		return binary, nil
	}
	cache := os.Getenv("FWD_JAEGER_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(user, "fwd-jaeger")
	}
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		return "", fmt.Errorf("the current directory is not this module's: %w", err)
	}
	version := strings.Fields(runtime.Version())[0]
	name := fmt.Sprintf("%s-%s-%s-%.8x", version, runtime.GOOS, runtime.GOARCH, sha256.Sum256(sums))
	folder := filepath.Join(cache, name)
	binary := filepath.Join(folder, "jaeger")
	if _, err := os.Stat(binary); !errors.Is(err, fs.ErrNotExist) {
		return binary, err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", err
	}

	// The file has another name until it is whole: a build may be interrupted, or two may run at a
	// time.
	part, err := os.CreateTemp(folder, "part-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(part.Name())
	if err := part.Close(); err != nil {
		return "", err
	}
	log.Printf("building Jaeger into %s, for some minutes", folder)
	command := exec.Command("go", "build", "-ldflags=-s -w", "-o", part.Name(),
		"github.com/jaegertracing/jaeger/cmd/jaeger")
	command.Stderr = os.Stderr
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("go build: %w", err)
	}
	return binary, os.Rename(part.Name(), binary)
}
