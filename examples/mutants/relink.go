package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/scanner"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Most faults change nothing that other packages are compiled against: then it is enough to compile the
// faulty package alone and to link it with what is there already, which takes a third of the time of a
// build. The linker compares the fingerprints of what packages were compiled against, and refuses if they
// differ; such a fault needs a whole build.

const fwdPath = "github.com/forwardctx/fwd"

// parts are what a detector is linked from, compiled without a fault.
type parts struct {
	files   []string // of the package
	dir     string   // where they are
	variant string   // tells apart the package with and without its internal test files
	lang    string
	imports string // importcfg of all packages but this one
	main    string // archive
}

// listed is a package as go list prints it.
type listed struct {
	ImportPath, Export, Dir string
	GoFiles                 []string
	Module                  *struct{ GoVersion string }
}

// findParts lets go list compile what the detector consists of.
func (d *detector) findParts(ctx context.Context) (*parts, error) {
	args := []string{"list", "-export", "-deps", "-json=ImportPath,Export,Dir,GoFiles,Module"}
	if d.build[0] == "test" {
		args = append(args, "-test")
	}
	args = append(args, d.build[len(d.build)-1])
	output, err := start(ctx, command{name: "go", args: args, dir: d.module, timeout: buildTimeout})
	if err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, output)
	}
	exports := map[string]string{}
	p := new(parts)
	for decoder := json.NewDecoder(strings.NewReader(output)); ; {
		var pkg listed
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		path, variant, isVariant := strings.Cut(pkg.ImportPath, " ")
		if isVariant || exports[path] == "" {
			exports[path] = pkg.Export
		}
		if path == fwdPath && (isVariant || p.variant == "") && pkg.Module != nil {
			p.files, p.dir, p.variant, p.lang = pkg.GoFiles, pkg.Dir, cmp.Or(variant, "plain"), pkg.Module.GoVersion
		}
		p.main = pkg.Export // the last one is what all others are for
	}
	delete(exports, fwdPath)
	var imports strings.Builder
	for path, export := range exports {
		if export != "" {
			fmt.Fprintf(&imports, "packagefile %s=%s\n", path, export)
		}
	}
	p.imports = imports.String()
	if p.main == "" || len(p.files) == 0 || strings.Count(p.lang, ".") < 1 {
		return nil, fmt.Errorf("go %s: nothing to link", strings.Join(args, " "))
	}
	p.lang = "go" + strings.Join(strings.SplitN(p.lang, ".", 3)[:2], ".")
	return p, nil
}

// relink compiles the package with a fault in dir, unless another detector has, and links the program.
func (p *parts) relink(ctx context.Context, f *fault, dir, program string) error {
	archive := filepath.Join(dir, strings.NewReplacer("/", "_", "[", "", "]", "").Replace(p.variant)+".a")
	config := program + ".importcfg"
	imports := p.imports + "packagefile " + fwdPath + "=" + archive + "\n"
	if err := os.WriteFile(config, []byte(imports), 0o600); err != nil {
		return err
	}
	if _, err := os.Stat(archive); err != nil {
		// The positions of what the package declares must stay what they were.
		faulty := filepath.Join(dir, f.file)
		args := []string{"tool", "compile", "-o", archive, "-p", fwdPath, "-lang=" + p.lang, "-complete", "-pack",
			"-nolocalimports", "-importcfg", config, "-trimpath", faulty + "=>" + filepath.Join(p.dir, f.file)}
		for _, name := range p.files {
			file := "./" + name
			if name == f.file {
				file = faulty
			}
			args = append(args, file)
		}
		if err := run1(ctx, command{name: "go", args: args, dir: p.dir, timeout: buildTimeout}); err != nil {
			return err
		}
	}
	args := []string{"tool", "link", "-o", program, "-importcfg", config, "-s", "-w", "-buildmode=exe", p.main}
	return run1(ctx, command{name: "go", args: args, dir: p.dir, timeout: buildTimeout})
}

// run1 runs a compiler, which prints nothing if all is well.
func run1(ctx context.Context, c command) error {
	c.env = append(c.env, "GOGC=400")
	output, err := start(ctx, c)
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", c.args[1], err, output)
	}
	return nil
}

// sameLines returns text with as many lines as old has, so that what follows stays where it was: blank
// lines are added, or all of it becomes one line.
func sameLines(old, text string) string {
	want := strings.Count(old, "\n")
	if strings.Count(text, "\n") > want {
		text = oneLine(text)
	}
	blank := strings.Repeat("\n", want-strings.Count(text, "\n"))
	if strings.HasSuffix(old, "\n") {
		return text + blank
	}
	return blank + text
}

// oneLine returns statements, which may go on after the text, in one line.
func oneLine(text string) string {
	var line strings.Builder
	file := token.NewFileSet().AddFile("", -1, len(text))
	var s scanner.Scanner
	s.Init(file, []byte(text), nil, 0)
	for {
		pos, tok, lit := s.Scan()
		switch {
		case tok == token.EOF:
			return line.String()
		case tok == token.SEMICOLON && file.Offset(pos) == len(text):
			// The scanner ends a statement at the end of the text, but it goes on in the file.
		case tok == token.SEMICOLON:
			line.WriteString("; ")
		case tok.IsLiteral():
			line.WriteString(lit + " ")
		default:
			line.WriteString(tok.String() + " ")
		}
	}
}
