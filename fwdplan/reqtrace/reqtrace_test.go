// This file is about reading traces: every format, and every way in which one can be wrong.

package reqtrace

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

// TestFiles reads one small file of each format. All tell of the same requests, and of failed ones.
func TestFiles(t *testing.T) {
	t.Parallel()
	for file, want := range map[string]Trace{
		"azure2023.csv":       {Format: "Azure", Failed: 1},
		"azure2024.csv":       {Format: "Azure", Failed: 1},
		"burstgpt.csv":        {Format: "BurstGPT", Failed: 2},
		"mooncake.jsonl":      {Format: "Mooncake", Failed: 1},
		"vllm.json":           {Format: "vLLM", Failed: 2},
		"inference-perf.json": {Format: "inference-perf", Failed: 2},
	} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			data, err := os.ReadFile(filepath.Join("testdata", file))
			if err != nil {
				t.Fatal(err)
			}
			got, err := Read(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			begin := got.Rows[0].Time
			want.Rows = []Row{{begin, 480, 10}, {begin.Add(50 * time.Millisecond), 31, 8},
				{begin.Add(2 * time.Second), 110, 27}}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v\nwant %+v", got, want)
			}
			var zipped bytes.Buffer
			zip := gzip.NewWriter(&zipped)
			zip.Write(data)
			zip.Close()
			if again, err := Read(&zipped); err != nil || !reflect.DeepEqual(again, got) {
				t.Errorf("zipped: %+v, %v", again, err)
			}
		})
	}
}

func TestReadCSV(t *testing.T) {
	t.Parallel()
	at := time.Date(2023, 11, 16, 18, 17, 3, 979960000, time.UTC)
	want := []Row{{at, 4808, 10}, {at.Add(52 * time.Millisecond), 110, 27}}
	for name, in := range map[string]string{
		"plain": azure + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n",
		"CRLF, no end": "TIMESTAMP,ContextTokens,GeneratedTokens\r\n" +
			"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,110,27",
		"mark": "\ufeff" + azure + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n",
		"other columns": "Model,GeneratedTokens,ContextTokens,TIMESTAMP\n" +
			"x,10,4808,2023-11-16 18:17:03.97996\ny,27,110,2023-11-16 18:17:04.03196\n",
		"not by time": azure + "2023-11-16 18:17:04.0319600,110,27\n2023-11-16 18:17:03.9799600,4808,10\n",
		"empty lines": "\n" + azure +
			"\n2023-11-16 18:17:03.9799600, 4808 , 10\n\n2023-11-16 18:17:04.0319600,110,27\n\n",
		"zones": azure + "2023-11-16T18:17:03.97996Z,4808,10\n2023-11-16 20:17:04.0319600+02:00,110,27\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Read(strings.NewReader(in))
			if err != nil {
				t.Fatal(err)
			}
			for i := range got.Rows {
				got.Rows[i].Time = got.Rows[i].Time.UTC()
			}
			if !reflect.DeepEqual(got.Rows, want) {
				t.Errorf("got %+v\nwant %+v", got.Rows, want)
			}
		})
	}
}

// wrong is an input, and a part of the error that it gets.
type wrong struct{ in, want string }

func checkErrors(t *testing.T, cases []wrong) {
	t.Helper()
	for _, c := range cases {
		got, err := Read(strings.NewReader(c.in))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Read(%q) = %v, %v, want an error with %q", c.in, got, err, c.want)
		}
	}
}

func TestReadCSVErrors(t *testing.T) {
	t.Parallel()
	const row = "2023-11-16 18:17:03.9799600,4808,10\n"
	const burst = "Timestamp,Model,Request tokens,Response tokens\n"
	checkErrors(t, []wrong{
		{"", "line 1: the trace is empty"},
		{" \n\n", "line 1: the trace is empty"},
		{azure, "line 1: the trace has a header and no rows"},
		{"TIMESTAMP,ContextTokens\n",
			`line 1: no column GeneratedTokens in ["TIMESTAMP" "ContextTokens"]; known are`},
		{"Timestamp,Request tokens\n", `line 1: no column Response tokens in`},
		{row, "line 1: no column TIMESTAMP"},
		{"a,b\n1,2\n", "lines of JSON as of Mooncake"},
		{azure + row + "yesterday,1,1\n", `line 3: TIMESTAMP "yesterday" is not of the form`},
		{azure + row + "\n\n2023-11-16 18:17:04,x,1\n",
			`line 5: ContextTokens "x" is not a whole number from 0 to 1048576`},
		{azure + "2023-11-16 18:17:04,-3,1\n", `line 2: ContextTokens "-3" is not`},
		{azure + "2023-11-16 18:17:04,1.5,1\n", `line 2: ContextTokens "1.5" is not`},
		{azure + "2023-11-16 18:17:04,3,\n", `line 2: GeneratedTokens "" is not`},
		{azure + "2023-11-16 18:17:04,3,1048577\n", `line 2: GeneratedTokens "1048577" is not`},
		{azure + "2023-11-16 18:17:04,0,1\n2023-11-16 18:17:04,1,0\n", "line 1: all 2 rows of the trace failed"},
		{azure + row + "2023-11-16 18:17:04,3\n", "line 3: wrong number of fields"},
		{azure + row + "1623-11-16 18:17:04,3,1\n", "the trace begins at 1623-11-16 18:17:04 and ends at"},
		{azure + row + "2023-11-16 18:17:04,\"3,1\n", `line 3: extraneous or missing " in quoted-field`},
		{burst + "-1,m,1,1\n", `line 2: Timestamp "-1" is not a number of seconds from 0 to`},
		{burst + "NaN,m,1,1\n", `line 2: Timestamp "NaN" is not a number of seconds`},
		{burst + "5,m,one,1\n", `line 2: Request tokens "one" is not`},
		{"\x1f\x8bno", "gzip: "},
	})
}

func TestReadJSONErrors(t *testing.T) {
	t.Parallel()
	const moon = `{"timestamp": 0, "input_length": 675, "output_length": 50, "hash_ids": [0, 1]}` + "\n"
	vllm := func(start, in, out, errs string) string {
		return fmt.Sprintf("{\"model\": \"m\",\n\"start_times\": %s,\n\"input_lens\": %s,\n"+
			"\"output_lens\": %s,\n\"errors\": %s}", start, in, out, errs)
	}
	checkErrors(t, []wrong{
		{moon + "\n" + `{"timestamp": 1, "input_length": 2}`, "line 3: no field output_length; known are"},
		{moon + `{"timestamp": -1, "input_length": 2, "output_length": 3}`,
			`line 2: timestamp "-1" is not a number of milli`},
		{moon + `{"timestamp": 1, "input_length": 2.5, "output_length": 3}`, `line 2: input_length "2.5" is not`},
		{moon + `{"timestamp": 1, "input_length": [2], "output_length": 3}`,
			`line 2: [2] is neither a number nor a text`},
		{moon + `{"timestamp": 1, "input_le`, "line 2: the trace ends in the middle"},
		{moon + `{"timestamp": 1 "input_length": 2}`, "line 2: "},
		{moon + "[]", "line 2: found [, want {"},
		{`{"a": 1}`, "line 1: an object of no known trace; known are"},
		{vllm("[1]", "[2, 3]", "[4]", "[]"), "line 1: 1 start_times, 2 input_lens, 1 output_lens and 0 errors"},
		{`{"input_lens": [1], "output_lens": [2]}`, "line 1: 0 start_times, 1 input_lens"},
		{vllm("[1]", "[2]", "[\n-4]", `[""]`), `line 5: output_lens[0] "-4" is not`},
		{vllm("[\"soon\"]", "[2]", "[4]", `[""]`), `line 2: start_times[0] "soon" is not a number of seconds`},
		{vllm("[1]", "[2]", "[4]", `["refused"]`), "line 1: all 1 rows of the trace failed"},
		{vllm("[1]", "[2]", "[4]", `[""]`) + "\n{}", "line 6: more than one result"},
		{vllm("1", "[2]", "[4]", "[]"), "line 2: found 1, want ["},
		{`[]`, "line 1: the trace has no rows"},
		{"[\n" + `{"start_time": 1}]`, "line 2: no field start_time or info; known are"},
		{"[\n" + `{"start_time": 1, "info": {"input_tokens": 3}}]`,
			"line 2: no input_tokens or output_tokens in info"},
		{"[\n" + `{"start_time": 1, "info": {"input_tokens": 3, "output_tokens": -2}}]`,
			`line 2: output_tokens "-2" is not`},
		{"[\n" + `{"start_time": true, "info": {}}]`, "line 2: found a JSON bool for start_time"},
		{"[\n" + `{"start_time": 1, "info": {"input_tokens": 3, "output_tokens": 2}}`,
			"line 2: the trace ends in the middle"},
	})
}

func TestDefault(t *testing.T) {
	t.Parallel()
	if rows := Default(); len(rows) < 50 {
		t.Errorf("%d rows", len(rows))
	}
}

func FuzzRead(f *testing.F) {
	files, err := filepath.Glob(filepath.Join("testdata", "*.*"))
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Read(bytes.NewReader(data))
		if err == nil && len(got.Rows) == 0 {
			t.Errorf("%q has no rows and no error", data)
		}
		for i, row := range got.Rows {
			if row.ContextTokens < 1 || row.GeneratedTokens < 1 || i > 0 && row.Time.Before(got.Rows[i-1].Time) {
				t.Errorf("row %d of %q is %+v", i, data, row)
			}
		}
	})
}
