package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats.go"
)

// kinds are the two ways to exchange that are measured.
var kinds = [...]string{"natsdp", "bare"}

// jobVariable is the environment variable that tells a process that it is a rank, and which.
const jobVariable = "FWD_BENCHMARK_JOB"

// job is the task of one process.
type job struct {
	Kind, URL, Group   string
	Rank, Size, Rounds int
}

// voteSize is the length of a vote of natsdp without a span context, in bytes. A message of bare
// has the same length.
const voteSize = 95

// work is a rank: it takes part in all rounds and writes what they took.
func work(ctx context.Context, text string, stdout io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	round, end, err := j.start(ctx)
	if err != nil {
		return err
	}
	defer end()
	warm := j.Rounds/10 + 1
	took := make([]float64, 0, j.Rounds)
	for step := 1; step <= warm+j.Rounds; step++ {
		began := time.Now()
		if err := round(ctx, uint64(step)); err != nil {
			return fmt.Errorf("rank %d, round %d: %w", j.Rank, step, err)
		}
		if step > warm {
			took = append(took, float64(time.Since(began).Nanoseconds())/1e3)
		}
	}
	slices.Sort(took)
	return json.NewEncoder(stdout).Encode(figures{P50: took[len(took)/2], P99: took[len(took)*99/100]})
}

// start connects a rank and waits for the others. It returns a function that takes one round.
func (j *job) start(ctx context.Context) (round func(context.Context, uint64) error, end func(), err error) {
	gather, close, err := j.bare(ctx)
	if err != nil {
		return nil, nil, err
	}
	c, err := natsdp.Join(ctx, natsdp.Config{Group: j.Group, Rank: j.Rank, Size: j.Size}, natsdp.WithURL(j.URL))
	if err != nil {
		close()
		return nil, nil, err
	}
	vote := fwd.Vote{
		NumTokens: 1 + j.Rank, NumTokensPadded: 8 + j.Rank, NumReqs: 1 + j.Rank, Uniform: true,
		GraphMode: fwd.GraphFull, Note: uint64(j.Rank), Config: 1,
	}
	exchange := func(ctx context.Context, step uint64) error {
		vote.Step = step
		_, err := c.Exchange(ctx, vote)
		return err
	}
	if j.Kind == "natsdp" {
		close()
		return exchange, func() { c.Close() }, nil
	}
	// No bare message is sent again, so all ranks must hear them from the first one on.
	err = exchange(ctx, 1)
	c.Close()
	return gather, close, err
}

// bare returns a function that takes one round of the bare all-gather: one message to all, and one
// from each.
func (j *job) bare(ctx context.Context) (round func(context.Context, uint64) error, close func(), err error) {
	conn, err := natsdp.Connect(ctx, j.URL, nats.NoEcho())
	if err != nil {
		return nil, nil, err
	}
	subject := "bare." + j.Group
	sub, err := conn.SubscribeSync(subject)
	if err == nil {
		err = conn.Flush()
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	row := make([]byte, voteSize)
	early := 0 // messages of the next round
	return func(ctx context.Context, step uint64) error {
		binary.BigEndian.PutUint64(row, step)
		if err := conn.Publish(subject, row); err != nil {
			return err
		}
		here := 1 + early
		for early = 0; here < j.Size; {
			msg, err := sub.NextMsgWithContext(ctx)
			if err != nil {
				return err
			}
			if binary.BigEndian.Uint64(msg.Data) == step {
				here++
			} else {
				early++
			}
		}
		return nil
	}, conn.Close, nil
}
