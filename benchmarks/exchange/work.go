package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/natsdp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// jobVariable is the environment variable that tells a process that it has ranks, and which.
const jobVariable = "FWD_BENCHMARK_JOB"

// job is the task of one process, or of one goroutine that stands for it.
type job struct {
	Kind, Group  string
	URL, Monitor string // of the server
	Ranks        []int
	Size, Rounds int
	Began        time.Time // when all ranks were started
}

// These are the lengths of natsdp's messages in bytes: of a vote without a span context, of a header,
// and of what stands before each message in a bundle.
const (
	voteSize   = 95
	headerSize = 44
	lengthSize = 4
)

// messageSize returns the length of a message with the votes of so many ranks.
func messageSize(ranks int) int {
	if ranks == 1 {
		return voteSize
	}
	return headerSize + ranks*(lengthSize+voteSize)
}

// roundFunc takes part in a round: for one rank, or for a process in a baseline.
type roundFunc func(ctx context.Context, step uint64) error

func workAsProcess(ctx context.Context, text string, stdout io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	f, err := work(ctx, j)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(f)
}

// work joins, takes part in all rounds, and returns what they took.
func work(ctx context.Context, j job) (f figures, err error) {
	coordinators, err := j.join(ctx)
	if err != nil {
		return f, err
	}
	f.Joined = time.Since(j.Began).Seconds()
	leave := sync.OnceFunc(func() { leaveAll(coordinators) })
	defer leave()
	callers := voters(coordinators)
	if j.Kind != "natsdp" {
		b, err := j.newBaseline(ctx)
		if err != nil {
			return f, err
		}
		defer b.conn.Close()
		// No message of a baseline is sent again, so all must hear them from the first one on.
		all := func(ctx context.Context, _ int, round roundFunc) error { return round(ctx, 1) }
		if err := each(ctx, callers, all); err != nil {
			return f, err
		}
		leave()
		callers = []roundFunc{b.gather}
		if j.Kind == "bare" {
			callers[0] = b.allGather
		}
	}
	err = each(ctx, callers, func(ctx context.Context, i int, round roundFunc) error {
		took, messages, err := j.take(ctx, round, j.Ranks[i] == 0)
		if err == nil && j.Ranks[i] == 0 {
			f.P50, f.P99 = percentile(took, 50), percentile(took, 99)
			f.Deliveries = float64(messages) / float64(j.Size*j.Rounds)
		}
		return err
	})
	for _, c := range coordinators {
		f.Resent += c.Stats().Resent
	}
	return f, err
}

// each does something for all callers concurrently, until one fails.
func each(ctx context.Context, callers []roundFunc, do func(context.Context, int, roundFunc) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(callers))
	var wg sync.WaitGroup
	for i, round := range callers {
		wg.Go(func() {
			if errs[i] = do(ctx, i, round); errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// take takes part in all rounds, and returns in ascending order how many µs they took. If it counts,
// it also returns how many messages the server delivered meanwhile.
func (j *job) take(ctx context.Context, round roundFunc, counts bool) (
	took []float64, messages int64, err error,
) {
	warm := j.Rounds/10 + 1
	for i := range warm + j.Rounds {
		if i == warm && counts {
			if messages, err = delivered(ctx, j.Monitor); err != nil {
				return nil, 0, err
			}
		}
		began := time.Now()
		if err := round(ctx, uint64(2+i)); err != nil {
			return nil, 0, fmt.Errorf("round %d: %w", i, err)
		}
		if i >= warm {
			took = append(took, float64(time.Since(began).Nanoseconds())/1e3)
		}
	}
	slices.Sort(took)
	if !counts {
		return took, 0, nil
	}
	after, err := delivered(ctx, j.Monitor)
	return took, after - messages, err
}

// delivered asks a server how many messages it has delivered.
func delivered(ctx context.Context, monitor string) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, monitor+"/varz", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var v server.Varz
	err = json.NewDecoder(resp.Body).Decode(&v)
	return v.OutMsgs, err
}

func (j *job) join(ctx context.Context) ([]*natsdp.Coordinator, error) {
	cfg := natsdp.Config{Group: j.Group, Ranks: j.Ranks, Size: j.Size}
	return natsdp.JoinRanks(ctx, cfg, natsdp.WithURL(j.URL))
}

// voters returns the rounds of natsdp, one for each rank.
func voters(coordinators []*natsdp.Coordinator) []roundFunc {
	all := make([]roundFunc, len(coordinators))
	for i, c := range coordinators {
		n := c.Rank()
		vote := fwd.Vote{
			NumTokens: 1 + n, NumTokensPadded: 8 + n, NumReqs: 1 + n, Uniform: true,
			GraphMode: fwd.GraphFull, Note: uint64(n), Config: 1,
		}
		all[i] = func(ctx context.Context, step uint64) error {
			vote.Step = step
			_, err := c.Exchange(ctx, vote)
			return err
		}
	}
	return all
}

// leaveAll closes all coordinators concurrently, since each waits for the others.
func leaveAll(coordinators []*natsdp.Coordinator) {
	var wg sync.WaitGroup
	for _, c := range coordinators {
		wg.Go(func() { c.Close() })
	}
	wg.Wait()
}

// baseline exchanges messages for the ranks of a process, over core NATS.
type baseline struct {
	job       job
	conn      *nats.Conn
	all, one  string             // subjects: to all, and to the one that gathers
	fromAll   *nats.Subscription // to all
	toOne     *nats.Subscription // nil: another process gathers
	row       []byte             // from this process
	table     []byte             // from all
	processes int
	early     int // messages of the next round that have come
}

func (j *job) newBaseline(ctx context.Context) (*baseline, error) {
	conn, err := natsdp.Connect(ctx, j.URL, nats.NoEcho())
	if err != nil {
		return nil, err
	}
	b := &baseline{
		job: *j, conn: conn,
		all: "bare." + j.Group + ".all", one: "bare." + j.Group + ".one",
		row: make([]byte, messageSize(len(j.Ranks))), table: make([]byte, messageSize(j.Size)),
		processes: j.Size / len(j.Ranks),
	}
	b.fromAll, err = conn.SubscribeSync(b.all)
	if err == nil && j.Ranks[0] == 0 {
		b.toOne, err = conn.SubscribeSync(b.one)
	}
	if err == nil {
		err = conn.Flush()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return b, nil
}

// allGather sends a message to all, and takes one from each.
func (b *baseline) allGather(ctx context.Context, step uint64) error {
	binary.BigEndian.PutUint64(b.row, step)
	if err := b.conn.Publish(b.all, b.row); err != nil {
		return err
	}
	here := 1 + b.early
	for b.early = 0; here < b.processes; {
		msg, err := b.fromAll.NextMsgWithContext(ctx)
		if err != nil {
			return err
		}
		if binary.BigEndian.Uint64(msg.Data) == step {
			here++
		} else {
			b.early++
		}
	}
	return nil
}

// gather sends a message to one, which sends all in one message to all.
func (b *baseline) gather(ctx context.Context, _ uint64) error {
	if b.toOne == nil {
		if err := b.conn.Publish(b.one, b.row); err != nil {
			return err
		}
		_, err := b.fromAll.NextMsgWithContext(ctx)
		return err
	}
	at := len(b.row)
	for range b.processes - 1 {
		msg, err := b.toOne.NextMsgWithContext(ctx)
		if err != nil {
			return err
		}
		at += copy(b.table[min(at, len(b.table)):], msg.Data)
	}
	return b.conn.Publish(b.all, b.table)
}
