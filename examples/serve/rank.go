package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/forwardctx/fwd"
	"github.com/forwardctx/fwd/examples/engine"
	"github.com/forwardctx/fwd/examples/model"
	"github.com/forwardctx/fwd/natsdp"
)

// rankOptions are the flags of ranks that are processes.
type rankOptions struct {
	processes       bool
	nats            string
	rank            int
	ranks           rankList // of this process; it has that of -rank, too
	group           string
	results         string
	exchangeTimeout time.Duration
	rejoin          time.Duration
	joinTimeout     time.Duration
	natsCreds       string
	natsCA          string
	natsCert        string
	natsKey         string
	login           login
}

func (o *rankOptions) defineProcesses(flags *flag.FlagSet) {
	flags.BoolVar(&o.processes, "processes", false,
		"run each rank as a process of its own, connected by a NATS server\nin this one")
	flags.StringVar(&o.group, "group", "serve",
		"`name` of the run, the same for all its\nranks and no other run")
	flags.StringVar(&o.results, "results", "",
		"add each finished request to this `file`, and serve only what it\n"+
			"lacks; with -processes, rank R has file.R")
	flags.DurationVar(&o.exchangeTimeout, "exchange-timeout", 30*time.Second,
		"how long a rank waits in a step for the others")
	flags.DurationVar(&o.rejoin, "rejoin", 0,
		"how long the ranks try again after a failed step (0: it ends the run)")
	flags.DurationVar(&o.joinTimeout, "join-timeout", time.Minute,
		"how long a rank waits at the start for the others")
}

func (o *rankOptions) defineMachines(flags *flag.FlagSet) {
	flags.StringVar(&o.nats, "nats", "",
		"be one of several processes that are connected by the NATS\nserver at this `URL`; who the rank is "+
			"may be in the URL, or in the\nenvironment, where no process list shows it: in NATS_USER and\n"+
			"NATS_PASSWORD, or in NATS_TOKEN, or in NATS_CREDS as -nats-creds")
	flags.IntVar(&o.rank, "rank", 0,
		"be rank `R` of -dp, and serve every request i with i mod -dp = R")
	flags.Var(&o.ranks, "ranks",
		"be several ranks of -dp, a `list` 0-3 or 0,2,5, and serve all\nrequests of theirs; not with -rank")
	flags.StringVar(&o.natsCreds, "nats-creds", "",
		"`file` with the user's credentials, a JWT and its seed;\nit may be replaced at any time, "+
			"since the rank keeps trying while\nthe server refuses it")
	flags.StringVar(&o.natsCA, "nats-ca", "",
		"PEM `file` with the authorities that may vouch for the server")
	flags.StringVar(&o.natsCert, "nats-cert", "",
		"PEM `file` with the certificate of this process; it needs -nats-key")
	flags.StringVar(&o.natsKey, "nats-key", "",
		"PEM `file` with the key of the certificate; it needs -nats-cert")
}

// groupName is what NATS has as a part of a subject.
var groupName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// validate checks the flags, each by itself and against those that it needs or excludes. Values are
// given for the flags that are not left to their defaults.
func (o *rankOptions) validate(dp int, values map[string]string, bad func(format string, args ...any)) {
	given := func(name string) bool { _, ok := values[name]; return ok }
	for _, name := range []string{"group", "results", "exchange-timeout", "rejoin", "join-timeout"} {
		if given(name) && o.nats == "" && !o.processes {
			bad("-%s is %s: it needs -nats or -processes", name, values[name])
		}
	}
	for _, name := range []string{"rank", "ranks", "nats-creds", "nats-ca", "nats-cert", "nats-key"} {
		if given(name) && o.nats == "" {
			bad("-%s is %s: it needs -nats", name, values[name])
		}
	}
	if o.nats != "" && o.processes {
		bad("-nats is %s beside -processes, which starts a server of its own", withoutSecrets(o.nats))
	}
	o.findRanks(dp, given, bad)
	o.findLogin(bad)
	if (o.natsCert == "") != (o.natsKey == "") {
		bad("-nats-cert is %q and -nats-key %q: they need each other", o.natsCert, o.natsKey)
	}
	if !groupName.MatchString(o.group) {
		bad("-group is %q, want up to 64 letters, digits, - and _", o.group)
	}
	if o.exchangeTimeout <= 0 {
		bad("-exchange-timeout is %v, want more than 0", o.exchangeTimeout)
	}
	if o.rejoin < 0 {
		bad("-rejoin is %v, want at least 0", o.rejoin)
	}
	if o.joinTimeout <= 0 {
		bad("-join-timeout is %v, want more than 0", o.joinTimeout)
	}
}

// findRanks finds which ranks are in this process.
func (o *rankOptions) findRanks(dp int, given func(string) bool, bad func(format string, args ...any)) {
	switch {
	case o.nats == "":
		o.ranks = nil
		for rank := range min(dp, engine.MaxRanks) {
			o.ranks = append(o.ranks, rank)
		}
	case given("rank") && given("ranks"):
		bad("-rank is %d beside -ranks %v, want one of them", o.rank, o.ranks)
	case given("ranks"):
		if last := o.ranks[len(o.ranks)-1]; last >= dp {
			bad("-ranks is %v, want 0 to %d for -dp %d", o.ranks, dp-1, dp)
		}
	case !given("rank"):
		bad("-nats is %s without a -rank or -ranks, want 0 to %d for -dp %d", withoutSecrets(o.nats), dp-1, dp)
	case o.rank < 0 || o.rank >= dp:
		bad("-rank is %d, want 0 to %d for -dp %d", o.rank, dp-1, dp)
	default:
		o.ranks = rankList{o.rank}
	}
}

// same returns what all ranks must have been started with, beside the trace with this fingerprint. What
// else there is may differ: -overlap is nothing that the others notice.
func (o *options) same(trace string) []engine.Setting {
	same := []engine.Setting{{Name: "-trace", Value: trace}}
	for name, value := range map[string]any{
		"-requests": o.requests, "-max-context": o.maxContext, "-speed": o.speed,
		"-sp": o.sp, "-chunk": o.chunk, "-loras": o.loras, "-spec": o.spec, "-graph": o.graph,
		"-capture-sizes": o.capture.sizes, "-replan": o.replan,
		"-max-seqs": o.maxSeqs, "-batched-tokens": o.batchedTokens,
		"-ubatches": o.ubatches, "-decode-ubatch-threshold": o.decodeUB, "-prefill-ubatch-threshold": o.prefillUB,
	} {
		same = append(same, engine.Setting{Name: name, Value: fmt.Sprint(value)})
	}
	slices.SortFunc(same, func(a, b engine.Setting) int { return strings.Compare(a.Name, b.Name) })
	return same
}

// explainRanks adds to an error what to do about ranks that fwd finds configured differently.
func explainRanks(err error) error {
	if ranks := (*fwd.RankError)(nil); errors.As(err, &ranks) && errors.Is(err, fwd.ErrInvalid) {
		return fmt.Errorf("%w: compare their flags -graph, -loras, -spec, -capture-sizes, -max-seqs, -ubatches, "+
			"-decode-ubatch-threshold and -prefill-ubatch-threshold", err)
	}
	return err
}

// stopGrace is how long a rank may take to end its step when it is interrupted. The ranks stop
// together, some steps later.
const stopGrace = 5 * time.Second

// share returns the requests of some of the ranks.
func share(requests []engine.Request, own rankList, ranks int) (shared []engine.Request) {
	for i, r := range requests {
		if slices.Contains(own, i%ranks) {
			shared = append(shared, r)
		}
	}
	return shared
}

// serveRanks serves the requests of this process's ranks, together with the other ranks. What the results
// file has already is not served again.
func serveRanks(
	ctx context.Context,
	o *options,
	config engine.Config,
	weights *model.Weights,
	requests []engine.Request,
	stderr *screen,
) (out outcome, err error) {
	// The file comes first: ranks that have joined wait for each other.
	file := &resultsFile{earlier: map[int]engine.Result{}}
	if o.results != "" {
		if file, err = openResults(o.results, requests); err != nil {
			return outcome{requests: requests}, err
		}
		defer func() { err = errors.Join(err, file.close()) }()
		config.Finished = file.add
	}
	out = outcome{requests: requests, resumed: len(file.earlier), results: make([]engine.Result, len(requests))}
	results := file.earlier
	defer func() {
		for i, r := range requests {
			out.results[i] = results[r.ID]
		}
	}()
	groups, err := joinGroups(ctx, o, config.Logger)
	if err != nil {
		return out, err
	}
	defer groups.close()
	groups.process.Same = config.Process.Same
	config.Process = &groups.process
	config.ExchangeTimeout, config.StopGrace = o.exchangeTimeout, stopGrace
	rest := slices.DeleteFunc(slices.Clone(requests),
		func(r engine.Request) bool { return results[r.ID].Finished })
	served, stats, err := runEngine(ctx, config, weights, rest, stderr)
	out.stats = stats
	for _, r := range served {
		results[r.ID] = r
	}
	return out, err
}

// groups are what connects the ranks of this process with the others: a group for each model, each with a
// connection of its own.
type groups struct {
	process engine.Process
	joined  []*natsdp.Coordinator
}

// joinGroups returns when all ranks are there. Its error names those which are missing.
func joinGroups(ctx context.Context, o *options, logger *slog.Logger) (*groups, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.joinTimeout,
		fmt.Errorf("-join-timeout %v is over", o.joinTimeout))
	defer cancel()
	if err := o.login.check(); err != nil {
		return nil, err
	}
	g := &groups{process: engine.Process{Ranks: o.ranks, Rejoin: o.rejoin}}
	if err := g.join(ctx, cancel, o, logger); err != nil {
		g.close()
		return nil, fmt.Errorf("-nats %s: %w", withoutSecrets(o.nats), err)
	}
	return g, nil
}

// join joins all groups concurrently, since each waits for the others. The first error ends that.
func (g *groups) join(ctx context.Context, cancel context.CancelFunc, o *options, logger *slog.Logger) error {
	coordinators := map[string]*[]fwd.Coordinator{"target": &g.process.Target}
	if o.spec > 0 {
		coordinators["draft"] = &g.process.Draft
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failed error
	for name, to := range coordinators {
		wg.Go(func() {
			all, err := natsdp.JoinRanks(ctx, natsdp.Config{Group: o.group + "-" + name, Ranks: o.ranks, Size: o.dp},
				append(o.connection(), natsdp.WithLogger(logger))...)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				g.joined = append(g.joined, all...)
				for _, c := range all {
					*to = append(*to, c)
				}
				return
			}
			if failed == nil {
				failed = fmt.Errorf("group %s-%s: %w", o.group, name, err)
				if name == "draft" && errors.Is(err, fwd.ErrRankMissing) {
					failed = fmt.Errorf("%w (a rank without -spec does not join it)", failed)
				}
			}
			cancel()
		})
	}
	wg.Wait()
	return failed
}

// close takes the ranks out of their groups. Each stays, for a moment, until the others have its last
// vote.
func (g *groups) close() {
	var wg sync.WaitGroup
	for _, c := range g.joined {
		wg.Go(func() { _ = c.Close() }) // always nil
	}
	wg.Wait()
}
