// This file is about the requests that come of a trace.

package trace

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRequests(t *testing.T) {
	rows := Default()
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
