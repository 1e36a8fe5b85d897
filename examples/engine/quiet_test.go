// A run in which all goes well says nothing to its logger.

package engine

import (
	"bytes"
	"fmt"
	"log/slog"
	"testing"

	"github.com/forwardctx/fwd"
)

func TestQuiet(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		cfg      Config
		adapters int
	}{
		{Config{}, 0},
		{Config{DataParallelSize: 3, GraphMode: fwd.GraphFullAndPiecewise}, 2},
		{Config{DataParallelSize: 2, GraphMode: fwd.GraphFull, NumUBatches: 2, SequenceParallel: 2}, 0},
		{Config{DataParallelSize: 2, GraphMode: fwd.GraphFullDecodeOnly, NumSpeculativeTokens: 2}, 0},
	} {
		t.Run(fmt.Sprintf("dp=%d/graph=%v", max(c.cfg.DataParallelSize, 1), c.cfg.GraphMode), func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer // the handler takes turns
			c.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			requests := withAdapters(newRequests(9, 40, 6), c.adapters)
			if _, _, err := newEngineOf(t, newModel(t, c.adapters), c.cfg).Run(t.Context(), requests); err != nil {
				t.Fatal(err)
			}
			if log.Len() > 0 {
				t.Errorf("at Info and above:\n%s", &log)
			}
		})
	}
}
