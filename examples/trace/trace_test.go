// Reading traces, and the requests that come of them.

package trace

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

func TestRead(t *testing.T) {
	at := time.Date(2023, 11, 16, 18, 17, 3, 979960000, time.UTC)
	want := []Row{{at, 4808, 10}, {at.Add(52 * time.Millisecond), 110, 27}}
	for name, in := range map[string]string{
		"plain": header + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n",
		"CRLF, no end": "TIMESTAMP,ContextTokens,GeneratedTokens\r\n" +
			"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,110,27",
		"mark": "\ufeff" + header +
			"2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n",
		"other columns": "Model,GeneratedTokens,ContextTokens,TIMESTAMP\n" +
			"x,10,4808,2023-11-16 18:17:03.97996\ny,27,110,2023-11-16 18:17:04.03196\n",
		"not by time": header + "2023-11-16 18:17:04.0319600,110,27\n2023-11-16 18:17:03.9799600,4808,10\n",
		"empty lines": header +
			"\n2023-11-16 18:17:03.9799600, 4808 , 10\n\n2023-11-16 18:17:04.0319600,110,27\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Read(strings.NewReader(in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("rows (-want +got)\n%s", diff)
			}
		})
	}
}

func TestReadErrors(t *testing.T) {
	const row = "2023-11-16 18:17:03.9799600,4808,10\n"
	for _, c := range []struct{ in, want string }{
		{"", "line 1: the trace is empty"},
		{header, "line 1: the trace has a header and no rows"},
		{"TIMESTAMP,ContextTokens\n", `line 1: no column GeneratedTokens in ["TIMESTAMP" "ContextTokens"]`},
		{row, "line 1: no column TIMESTAMP"},
		{header + row + "yesterday,1,1\n", `line 3: TIMESTAMP "yesterday" is not of the form`},
		{header + row + "\n\n2023-11-16 18:17:04,x,1\n",
			`line 5: ContextTokens "x" is not a whole number from 1 to 1048576`},
		{header + "2023-11-16 18:17:04,0,1\n", `line 2: ContextTokens "0" is not`},
		{header + "2023-11-16 18:17:04,-3,1\n", `line 2: ContextTokens "-3" is not`},
		{header + "2023-11-16 18:17:04,1.5,1\n", `line 2: ContextTokens "1.5" is not`},
		{header + "2023-11-16 18:17:04,3,0\n", `line 2: GeneratedTokens "0" is not`},
		{header + "2023-11-16 18:17:04,3,\n", `line 2: GeneratedTokens "" is not`},
		{header + "2023-11-16 18:17:04,3,1048577\n", `line 2: GeneratedTokens "1048577" is not`},
		{header + "2023-11-16 18:17:04,99999999999999999999,1\n",
			`line 2: ContextTokens "99999999999999999999" is not`},
		{header + row + "2023-11-16 18:17:04,3\n", "line 3: wrong number of fields"},
		{header + row + "1623-11-16 18:17:04,3,1\n",
			"the trace begins at 1623-11-16 18:17:04 and ends at 2023-11-16 18:17:03, " +
				"want at most 2562047 hours between"},
		{header + row + "2023-11-16 18:17:04,\"3,1\n", `line 3: extraneous or missing " in quoted-field`},
	} {
		rows, err := Read(strings.NewReader(c.in))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Read(%q) = %v, %v, want an error with %q", c.in, rows, err, c.want)
		}
	}
}

func TestDefault(t *testing.T) {
	rows := Default()
	if len(rows) < 50 {
		t.Errorf("%d rows", len(rows))
	}
	all, clipped := Requests(rows, 0), Requests(rows, 20)
	for i, row := range rows {
		if len(all[i].Prompt) != row.ContextTokens || len(clipped[i].Prompt) != min(row.ContextTokens, 20) ||
			all[i].MaxTokens != row.GeneratedTokens {
			t.Errorf("request %d of row %v: prompt %d, clipped to 20: %d, %d to generate", i, row, len(all[i].Prompt),
				len(clipped[i].Prompt), all[i].MaxTokens)
		}
		if !cmp.Equal(clipped[i].Prompt, all[i].Prompt[:len(clipped[i].Prompt)]) {
			t.Errorf("request %d: clipping changed its prompt", i)
		}
	}
	if !cmp.Equal(all, Requests(rows, 0)) {
		t.Error("the same rows gave other requests")
	}
}
