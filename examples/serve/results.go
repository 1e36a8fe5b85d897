package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"

	"github.com/forwardctx/fwd/examples/engine"
)

// resultsFile keeps what a rank has finished, one JSON object a line, so that a process which ends
// in whatever way has lost nothing of it: the one that is started in its place reads the file and
// serves the rest.
type resultsFile struct {
	file     *os.File
	requests map[int]*engine.Request
	earlier  map[int]engine.Result // finished before, by ID
}

// resultLine is a line of the file.
type resultLine struct {
	ID      int       `json:"id"`
	Request string    `json:"request"` // its fingerprint
	Tokens  []int     `json:"tokens"`
	Logits  []float64 `json:"logits"` // that the last token was sampled from; as text they come back bit for bit
}

// openResults reads the file at path and opens it to add to it; one that isn't there is made. No
// other process can have it open then. A last line without an end is of a process that was killed
// while it wrote, and is cut off. Anything else that is not a result of one of requests is an
// error, and the file stays as it is: it belongs to another run, or is no file of results at all.
func openResults(path string, requests []engine.Request) (_ *resultsFile, err error) {
	r := &resultsFile{requests: map[int]*engine.Request{}, earlier: map[int]engine.Result{}}
	for i := range requests {
		r.requests[requests[i].ID] = &requests[i]
	}
	// Opening a pipe would wait for its other end, and opening a device may do anything.
	if about, err := os.Stat(path); err == nil && !about.Mode().IsRegular() {
		return nil, fmt.Errorf("results %s: it is no regular file (%v)", path, about.Mode())
	}
	if r.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o666); err != nil {
		return nil, fmt.Errorf("results: %w", err)
	}
	if err = lockFile(r.file); err == nil {
		err = r.read()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("results %s: %w", path, err), r.close())
	}
	return r, nil
}

// errInUse is the error of a file that another process adds to.
var errInUse = errors.New("another rank has it open; each needs a file of its own")

func (r *resultsFile) read() error {
	in := bufio.NewReader(r.file)
	whole := int64(0)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			return r.cut(line, whole, n)
		}
		if err == nil {
			err = r.take(line)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		whole += int64(len(line))
	}
}

// cut cuts off the torn line that is left after so many bytes of whole lines.
func (r *resultsFile) cut(torn []byte, whole int64, n int) error {
	if len(torn) == 0 {
		return nil
	}
	if whole == 0 && !r.begins(torn) {
		return fmt.Errorf("line %d: no result: it begins with %.40q", n, torn)
	}
	return r.file.Truncate(whole)
}

// begins reports whether text is the beginning of a line of one of the requests.
func (r *resultsFile) begins(text []byte) bool {
	for _, request := range r.requests {
		start := fmt.Appendf(nil, `{"id":%d,"request":"%s","tokens":[`, request.ID, fingerprint(request))
		if bytes.HasPrefix(start, text) {
			return true
		}
		if bytes.HasPrefix(text, start) {
			err := json.NewDecoder(bytes.NewReader(text)).Decode(&resultLine{})
			return err == nil || errors.Is(err, io.ErrUnexpectedEOF)
		}
	}
	return false
}

// take takes a line.
func (r *resultsFile) take(text []byte) error {
	var line resultLine
	in := json.NewDecoder(bytes.NewReader(text))
	in.DisallowUnknownFields()
	if err := in.Decode(&line); err != nil {
		return fmt.Errorf("no result: %w", err)
	}
	if rest := bytes.TrimSpace(text[in.InputOffset():]); len(rest) > 0 {
		return fmt.Errorf("there is text after the result of request %d: %.40q", line.ID, rest)
	}
	request := r.requests[line.ID]
	if request == nil {
		return fmt.Errorf("request %d is none of the %d that this rank serves in this run", line.ID,
			len(r.requests))
	}
	if want := fingerprint(request); line.Request != want {
		return fmt.Errorf("request %d is another than in this run, its fingerprint is %q, not %q", line.ID,
			line.Request, want)
	}
	if len(line.Tokens) != request.MaxTokens {
		return fmt.Errorf("request %d has %d tokens, want %d", line.ID, len(line.Tokens), request.MaxTokens)
	}
	if _, twice := r.earlier[line.ID]; twice {
		return fmt.Errorf("request %d is there twice", line.ID)
	}
	r.earlier[line.ID] = engine.Result{ID: line.ID, Finished: true, Tokens: line.Tokens, Logits: line.Logits}
	return nil
}

// fingerprint tells a request from others with the same ID, such as those of another trace.
func fingerprint(r *engine.Request) string {
	h := fnv.New64a()
	fmt.Fprint(h, r.Adapter, r.MaxTokens, r.Prompt)
	return fmt.Sprintf("%016x", h.Sum64())
}

// add writes a result, in one piece.
func (r *resultsFile) add(result engine.Result) error {
	line, err := json.Marshal(
		resultLine{result.ID, fingerprint(r.requests[result.ID]), result.Tokens, result.Logits},
	)
	if err != nil {
		return fmt.Errorf("results: request %d: %w", result.ID, err)
	}
	if _, err := r.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("results: request %d: %w", result.ID, err)
	}
	return nil
}

func (r *resultsFile) close() error { return r.file.Close() }
