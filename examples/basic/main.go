// Basic is the smallest use of fwd: a layer that learns from its context which rows belong
// together, and a pass that says so.
//
//	go -C examples run ./basic
package main

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/forwardctx/fwd"
)

// pooling sums the rows of each sequence. Its input is a flat batch, which does not say where the
// sequences end.
type pooling struct{ name string }

func (p pooling) Forward(ctx context.Context, x []float64) ([]float64, error) {
	ends, err := fwd.AttnMetadata[[]int](ctx, p.name)
	if err != nil {
		return nil, err
	}
	var sums []float64
	start := 0
	for _, end := range ends {
		sum := 0.0
		for _, v := range x[start:end] {
			sum += v
		}
		sums, start = append(sums, sum), end
	}
	return sums, nil
}

func main() {
	ctx := context.Background()
	runner, err := fwd.New(fwd.Config{Name: "basic"})
	if err != nil {
		log.Fatal(err)
	}
	// Plan would pad the batch for graphs and for other ranks; this Runner has neither.
	pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: []int{3, 1, 2}})
	if err != nil {
		log.Fatal(err)
	}
	layer := pooling{"pool"}
	pass.AttnMetadata = []map[string]any{{layer.name: []int{3, 4, 6}}}

	err = runner.Run(ctx, pass, func(ctx context.Context) error {
		sums, err := layer.Forward(ctx, []float64{1, 2, 3, 10, 20, 30})
		fmt.Println(fwd.MustFromContext(ctx).NumTokens, "tokens, sums", sums)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	// Outside of a pass there is nothing to be found, and never anything stale.
	if _, err = layer.Forward(ctx, []float64{1}); !errors.Is(err, fwd.ErrNoForwardContext) {
		log.Fatal(err)
	}
	fmt.Println("outside of a pass the layer finds no metadata, as it should")
}
