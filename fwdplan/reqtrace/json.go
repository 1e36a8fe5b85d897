package reqtrace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// maxJSON bounds a trace in JSON, which is held in memory.
const maxJSON = 1 << 30

// readJSON reads lines of objects, an object of lists, or a list of objects.
func (b *builder) readJSON(r io.Reader, first byte) error {
	data, err := io.ReadAll(io.LimitReader(r, maxJSON+1))
	if err != nil {
		return err
	}
	if len(data) > maxJSON {
		return fmt.Errorf("the trace has more than %d bytes of JSON", maxJSON)
	}
	p := &parser{data: data, in: json.NewDecoder(bytes.NewReader(data))}
	p.in.UseNumber()
	if first == '[' {
		b.Format = "inference-perf"
		return p.list(func() error { return b.lifecycle(p) })
	}
	for p.in.More() {
		if err := b.object(p); err != nil {
			return err
		}
		if b.Format == "vLLM" && p.in.More() {
			return p.errorf("more than one result of vLLM")
		}
	}
	return nil
}

// object reads a row of Mooncake, or a whole result of vLLM.
func (b *builder) object(p *parser) error {
	line := p.line()
	var row Row
	var start, context, generated, failures []entry
	missing := map[string]bool{"timestamp": true, "input_length": true, "output_length": true}
	err := p.fields(func(name string) error {
		delete(missing, name)
		switch name {
		case "timestamp":
			return p.number(&row, name, setMilliseconds)
		case "input_length":
			return p.number(&row, name, setContext)
		case "output_length":
			return p.number(&row, name, setGenerated)
		case "start_times":
			return p.entries(&start)
		case "input_lens":
			return p.entries(&context)
		case "output_lens":
			return p.entries(&generated)
		case "errors":
			return p.entries(&failures)
		}
		return p.skip()
	})
	switch {
	case err != nil:
		return err
	case len(missing) == 0 && b.Format != "vLLM":
		b.Format = "Mooncake"
		return b.add(row)
	case b.Format == "" && (start != nil || context != nil || generated != nil):
		b.Format = "vLLM"
		return b.result(line, start, context, generated, failures)
	case b.Format == "" && len(missing) == 3:
		return fmt.Errorf("line %d: an object of no known trace; %s", line, known)
	}
	for _, name := range []string{"timestamp", "input_length", "output_length"} {
		if missing[name] {
			return fmt.Errorf("line %d: no field %s; %s", line, name, known)
		}
	}
	return nil
}

// result adds the rows of a result of vLLM.
func (b *builder) result(line int, start, context, generated, failures []entry) error {
	if len(start) == 0 || len(start) != len(context) || len(start) != len(generated) ||
		len(failures) > 0 && len(failures) != len(start) {
		return fmt.Errorf("line %d: %d start_times, %d input_lens, %d output_lens and %d errors, "+
			"want as many of each (save with --save-detailed)",
			line, len(start), len(context), len(generated), len(failures))
	}
	for i := range start {
		if len(failures) > 0 && failures[i].text != "" {
			b.Failed++
			continue
		}
		var row Row
		for _, f := range []struct {
			name  string
			entry entry
			set   set
		}{
			{"start_times", start[i], setSeconds},
			{"input_lens", context[i], setContext},
			{"output_lens", generated[i], setGenerated},
		} {
			if err := f.set(&row, fmt.Sprintf("%s[%d]", f.name, i), f.entry.text); err != nil {
				return fmt.Errorf("line %d: %w", f.entry.line, err)
			}
		}
		if err := b.add(row); err != nil {
			return err
		}
	}
	return nil
}

// lifecycle adds a request of inference-perf. Its newer versions keep counts one level deeper.
func (b *builder) lifecycle(p *parser) error {
	line := p.line()
	var r struct {
		StartTime *json.Number    `json:"start_time"`
		Error     json.RawMessage `json:"error"`
		Info      *struct {
			InputTokens  *json.Number `json:"input_tokens"`
			OutputTokens *json.Number `json:"output_tokens"`
			Request      struct {
				Text struct {
					InputTokens *json.Number `json:"input_tokens"`
				} `json:"text"`
			} `json:"request_metrics"`
			Response struct {
				OutputTokens *json.Number `json:"output_tokens"`
			} `json:"response_metrics"`
		} `json:"info"`
	}
	if err := p.decode(&r); err != nil {
		return err
	}
	if len(r.Error) > 0 && string(r.Error) != "null" {
		b.Failed++
		return nil
	}
	if r.StartTime == nil || r.Info == nil {
		return fmt.Errorf("line %d: no field start_time or info; %s", line, known)
	}
	input, output := r.Info.InputTokens, r.Info.OutputTokens
	if input == nil {
		input = r.Info.Request.Text.InputTokens
	}
	if output == nil {
		output = r.Info.Response.OutputTokens
	}
	if input == nil || output == nil {
		return fmt.Errorf("line %d: no input_tokens or output_tokens in info; %s", line, known)
	}
	var row Row
	if err := errors.Join(setSeconds(&row, "start_time", r.StartTime.String()),
		setContext(&row, "input_tokens", input.String()),
		setGenerated(&row, "output_tokens", output.String())); err != nil {
		return fmt.Errorf("line %d: %w", line, err)
	}
	return b.add(row)
}

// parser reads JSON and knows at which line it is.
type parser struct {
	data       []byte
	in         *json.Decoder
	at, before int // an offset, and how many lines end before it
}

// line returns the line of what comes next.
func (p *parser) line() int {
	next := int(p.in.InputOffset())
	for next < len(p.data) && strings.IndexByte(" \t\r\n,:", p.data[next]) >= 0 {
		next++
	}
	return p.lineAt(next)
}

// lineAt counts on from where it was asked last, or from the start.
func (p *parser) lineAt(offset int) int {
	offset = min(offset, len(p.data))
	if offset < p.at {
		p.at, p.before = 0, 0
	}
	p.before += bytes.Count(p.data[p.at:offset], []byte("\n"))
	p.at = offset
	return p.before + 1
}

func (p *parser) errorf(format string, args ...any) error {
	return fmt.Errorf("line %d: %s", p.line(), fmt.Sprintf(format, args...))
}

// fail puts the line before an error of the decoder.
func (p *parser) fail(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("line %d: the trace ends in the middle", p.lineAt(len(bytes.TrimSpace(p.data))))
	}
	if typed := (*json.UnmarshalTypeError)(nil); errors.As(err, &typed) {
		return fmt.Errorf("line %d: found a JSON %s for %s", p.lineAt(int(p.in.InputOffset())), typed.Value,
			typed.Field)
	}
	return p.errorf("%v", err)
}

func (p *parser) decode(to any) error {
	if err := p.in.Decode(to); err != nil {
		return p.fail(err)
	}
	return nil
}

func (p *parser) skip() error { return p.decode(new(json.RawMessage)) }

// delim takes an opening or closing bracket.
func (p *parser) delim(want json.Delim) error {
	line := p.line()
	token, err := p.in.Token()
	if err != nil {
		return p.fail(err)
	}
	if token != want {
		return fmt.Errorf("line %d: found %.40v, want %v", line, token, want)
	}
	return nil
}

// fields calls each for every field of an object. each takes the value.
func (p *parser) fields(each func(name string) error) error {
	if err := p.delim('{'); err != nil {
		return err
	}
	for p.in.More() {
		token, err := p.in.Token()
		if err != nil {
			return p.fail(err)
		}
		if err := each(token.(string)); err != nil { // keys are strings, or there is an error
			return err
		}
	}
	return p.delim('}')
}

// list calls each for every value of a list. each takes the value.
func (p *parser) list(each func() error) error {
	if err := p.delim('['); err != nil {
		return err
	}
	for p.in.More() {
		if err := each(); err != nil {
			return err
		}
	}
	return p.delim(']')
}

// entry is a value of a list.
type entry struct {
	text string
	line int
}

// entries reads a list of numbers or texts.
func (p *parser) entries(to *[]entry) error {
	*to = []entry{}
	return p.list(func() error {
		line := p.line()
		text, err := p.scalar()
		*to = append(*to, entry{text, line})
		if len(*to) > MaxRows {
			return fmt.Errorf("line %d: more than %d entries", line, MaxRows)
		}
		return err
	})
}

// number reads a number into a field of a row.
func (p *parser) number(row *Row, name string, set set) error {
	line := p.line()
	text, err := p.scalar()
	if err != nil {
		return err
	}
	if err := set(row, name, text); err != nil {
		return fmt.Errorf("line %d: %w", line, err)
	}
	return nil
}

// scalar reads a number, a text or null, which is the empty text.
func (p *parser) scalar() (string, error) {
	line := p.line()
	var raw json.RawMessage
	if err := p.decode(&raw); err != nil {
		return "", err
	}
	text := string(raw)
	switch {
	case text == "null":
		return "", nil
	case text[0] == '"':
		err := json.Unmarshal(raw, &text)
		return text, err
	case text[0] == '{' || text[0] == '[':
		return "", fmt.Errorf("line %d: %.40s is neither a number nor a text", line, text)
	}
	return text, nil
}
