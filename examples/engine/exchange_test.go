// The exchanges of the experts' workers: what is refused, who is told, and where rows go.

package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/model"
	"gonum.org/v1/gonum/mat"
)

// meetAll lets every worker of a group do its part concurrently and returns their errors.
func meetAll(size int, part func(w *expertWorker) error) []error {
	group := newExpertGroup(size)
	errs := make([]error, size)
	var wg sync.WaitGroup
	for i := range size {
		wg.Go(func() { errs[i] = part(&expertWorker{group: group, worker: i}) })
	}
	wg.Wait()
	return errs
}

func routed(rows int) model.Routed {
	return model.Routed{Rows: mat.NewDense(rows, 4, nil), Experts: make([][model.TopK]int, rows)}
}

var here = model.Place{Layer: "layers.0.moe", Chunk: 1}

// TestExchangeRefused: whatever does not fit together is an error for every worker, that names what
// differs, and no worker hangs: under synctest that would be a deadlock.
func TestExchangeRefused(t *testing.T) {
	sizes := []int{3, 1, 2}
	dispatch := func(w *expertWorker, at model.Place, sizes []int, rows int) error {
		_, err := w.Dispatch(context.Background(), at, sizes, routed(rows))
		return err
	}
	for _, c := range []struct {
		name, want string
		part       func(w *expertWorker) error
	}{
		{"fewer rows", "worker 1 brought 2 rows and 2 choices of experts, its local size is 1",
			func(w *expertWorker) error {
				return dispatch(w, here, sizes, []int{3, 2, 2}[w.worker])
			}},
		{"other sizes", "worker 0 has sizes [3 1 2], worker 2 has [3 2 2]", func(w *expertWorker) error {
			return dispatch(w, here, [][]int{sizes, sizes, {3, 2, 2}}[w.worker], sizes[w.worker])
		}},
		{"too few sizes", "worker 1 has sizes [3 1] for 3 workers", func(w *expertWorker) error {
			return dispatch(w, here, [][]int{sizes, {3, 1}, sizes}[w.worker], sizes[w.worker])
		}},
		{"other chunk",
			"worker 0 is at dispatch at layers.0.moe chunk 1, worker 2 at dispatch at layers.0.moe chunk 2",
			func(w *expertWorker) error {
				return dispatch(w, model.Place{Layer: here.Layer, Chunk: 1 + w.worker/2}, sizes, sizes[w.worker])
			}},
		{"other phase",
			"worker 0 is at dispatch at layers.0.moe chunk 1, worker 1 at combine at layers.0.moe chunk 1",
			func(w *expertWorker) error {
				if w.worker == 1 {
					_, err := w.Combine(context.Background(), here, sizes, []*mat.Dense{})
					return err
				}
				return dispatch(w, here, sizes, sizes[w.worker])
			}},
		{"parts for too few", "worker 2 brought parts for 2 of 3 workers", func(w *expertWorker) error {
			parts := []*mat.Dense{mat.NewDense(6, 4, nil), mat.NewDense(2, 4, nil), mat.NewDense(4, 4, nil)}
			_, err := w.Combine(context.Background(), here, sizes, parts[:3-w.worker/2])
			return err
		}},
		{"parts of another size", "worker 0 brought 2 rows for worker 0, want 6", func(w *expertWorker) error {
			part := mat.NewDense(2, 4, nil)
			_, err := w.Combine(context.Background(), here, sizes, []*mat.Dense{part, part, part})
			return err
		}},
		{"ended its pass", "which worker 1 has ended", func(w *expertWorker) error {
			return rankWorkers{w}.inPass(func(ctx context.Context) error {
				if w.worker == 1 {
					return nil // as if it had had fewer chunks
				}
				return dispatch(w, here, sizes, sizes[w.worker])
			})(context.Background())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for w, err := range meetAll(3, c.part) {
					if c.name == "ended its pass" && w == 1 {
						continue // it learns with its next exchange
					}
					if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.want) {
						t.Errorf("worker %d: %v, want ErrRefused with %q", w, err, c.want)
					}
				}
			})
		})
	}
}

// TestExchangeLeft: a worker that fails, or whose ctx ends, is named to all who wait, immediately
// and from then on.
func TestExchangeLeft(t *testing.T) {
	cause := errors.New("out of memory")
	canceled, cancel := context.WithCancelCause(context.Background())
	cancel(cause)
	for name, leave := range map[string]func(w *expertWorker) error{
		"failed": func(w *expertWorker) error {
			return rankWorkers{w}.inPass(func(context.Context) error { return cause })(context.Background())
		},
		"canceled before": func(w *expertWorker) error {
			_, err := w.Dispatch(canceled, here, []int{1, 1, 1}, routed(1))
			return err
		},
		"canceled while waiting": func(w *expertWorker) error {
			ctx, cancel := context.WithCancelCause(context.Background())
			go func() { synctest.Wait(); cancel(cause) }()
			w.group.size++ // someone never comes
			_, err := w.Dispatch(ctx, here, []int{1, 1, 1}, routed(1))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				errs := meetAll(3, func(w *expertWorker) error {
					if w.worker == 2 {
						synctest.Wait() // the others wait by now
						return leave(w)
					}
					_, err := w.Dispatch(context.Background(), here, []int{1, 1, 1}, routed(1))
					if again, err2 := w.Dispatch(context.Background(), here, []int{1, 1, 1}, routed(1)); again != nil ||
						err2 != err {
						t.Errorf("worker %d: the broken group went on: %v, %v", w.worker, again, err2)
					}
					return err
				})
				for w, err := range errs {
					if !errors.Is(err, cause) || (w != 2 && !strings.Contains(err.Error(), "expert worker 2")) {
						t.Errorf("worker %d: %v, want %v of expert worker 2", w, err, cause)
					}
				}
			})
		})
	}
}

// TestExchangeRoutes: everyone has everyone's rows after a dispatch and its own after a combine,
// over many rounds.
func TestExchangeRoutes(t *testing.T) {
	const size, rounds = 4, 2000
	sizes := []int{1, 1, 1, 1}
	for w, err := range meetAll(size, func(w *expertWorker) error {
		for i := range rounds {
			at := model.Place{Layer: "l", Chunk: i}
			mine := routed(1)
			mine.Rows.Set(0, 0, float64(100*i+w.worker))
			all, err := w.Dispatch(context.Background(), at, sizes, mine)
			if err != nil {
				return err
			}
			parts := make([]*mat.Dense, size)
			for to := range parts {
				if got := all[to].Rows.At(0, 0); got != float64(100*i+to) {
					return fmt.Errorf("round %d: %v from worker %d", i, got, to)
				}
				parts[to] = mat.NewDense(model.TopK, 4, nil)
				parts[to].Set(0, 0, float64(10*w.worker+to))
			}
			back, err := w.Combine(context.Background(), at, sizes, parts)
			if err != nil {
				return err
			}
			for from, part := range back {
				if got := part.At(0, 0); got != float64(10*from+w.worker) {
					return fmt.Errorf("round %d: %v combined from worker %d", i, got, from)
				}
			}
		}
		return nil
	}) {
		if err != nil {
			t.Errorf("worker %d: %v", w, err)
		}
	}
}

// TestExchangeMicrobatches: what microbatches exchange at the same place never mixes, in whatever
// order each worker gets there.
func TestExchangeMicrobatches(t *testing.T) {
	const workers, ubatches = 2, 2
	split := &fwd.ForwardContext{NumTokens: ubatches}
	for i := range ubatches {
		one := fwd.Range{Start: i, Stop: i + 1}
		split.UBatches = append(split.UBatches, fwd.UBatchSlice{Requests: one, Tokens: one})
	}
	var gate [ubatches]chan struct{} // closed when worker 0 has left its message
	for i := range gate {
		gate[i] = make(chan struct{})
	}
	for w, err := range meetAll(workers, func(w *expertWorker) error {
		return fwd.RunUBatches(fwd.NewContext(t.Context(), split), func(ctx context.Context, i int) error {
			mine := routed(1)
			mine.Rows.Set(0, 0, float64(10*i+w.worker))
			if w.worker == 1 {
				<-gate[ubatches-1-i] // this worker's microbatch 0 comes after the other's microbatch 1, and the reverse
			} else {
				close(gate[i])
			}
			all, err := w.Dispatch(ctx, here, []int{1, 1}, mine)
			if err != nil {
				return err
			}
			for from, rows := range all {
				if got, want := rows.Rows.At(0, 0), float64(10*i+from); got != want {
					return fmt.Errorf("%v from worker %d, want %v", got, from, want)
				}
			}
			return nil
		})
	}) {
		if err != nil {
			t.Errorf("worker %d: %v", w, err)
		}
	}
}
