// Package fwd carries the forward context of an inference engine: what code deep inside a model needs to
// know about the forward pass that it is part of. That is attention metadata by layer, the token counts
// of the data-parallel ranks, the graph mode and the key of the batch, and the microbatches. vLLM keeps
// it in a process-global slot, which is safe as long as one thread runs at a time. Here it is a value
// inside a [context.Context], so passes nest, run concurrently and end by themselves.
//
//	runner, err := fwd.New(fwd.Config{Name: "target"}, fwd.WithDispatcher(dispatcher))
//	...
//	pass, err := runner.Plan(ctx, fwd.Schedule{NumScheduledTokens: lengths})
//	...
//	for _, part := range pass.Parts() {
//		pass.AttnMetadata = append(pass.AttnMetadata, fwd.AllLayers(attention(part)))
//	}
//	err = runner.Run(ctx, pass, model.Forward)
//
//	func (l *Attention) Forward(ctx context.Context, x *mat.Dense) (*mat.Dense, error) {
//		attn, err := fwd.AttnMetadata[*AttnMetadata](ctx, l.Name)
//		if errors.Is(err, fwd.ErrNoMetadata) {
//			return x, nil // a dummy pass: warm-up, or an idle rank that keeps step
//		}
//		...
//	}
//
// # The life of a pass
//
// [Runner.Plan] turns what the scheduler decided into a [Pass]: it dispatches the batch to a captured
// graph, and agrees with the other data-parallel ranks on the graph mode, on microbatches and on
// padding. The caller adds metadata for each of [Pass.Parts]. [Runner.Run] checks the pass, opens its
// span, puts the [ForwardContext] into a new context, and calls the middleware and the forward function
// with it. Inside the pass, [FromContext] and the typed accessors read it; [RunUBatches] runs the
// microbatches concurrently; [Chunks] paces a mixture-of-experts layer; a [GraphCache] captures and
// replays graphs. When the forward function returns or panics, the device is synchronised and the span
// ended.
//
// Most programs need nothing else. [Runner.Start] is for passes that end elsewhere, [Runner.Begin] for
// event loops and pipelined engines, [Runner.Report] for simulators, and [NewContext] for tests. A nil
// *Runner runs passes too, without telemetry.
//
// Waiting for the other ranks' votes comes before the pass and is measured apart, as fwd.coordinate.
//
// # Data parallelism
//
// The ranks of a mixture-of-experts model run in lockstep, since their experts are spread over all of
// them. Once per step each rank gives a [Vote] and gets the votes of all, through its [Coordinator];
// [Agree] computes the same [Agreement] from them on every rank. A rank without work plans a dummy pass,
// which takes whatever shape the others agree on; if all are idle, nobody runs. Steps are numbered. If a
// rank is missing, the error of all others names it when the first of them stops waiting (see
// [WithExchangeTimeout]); a Runner that begins anew costs one failed step. Neither leaves anything
// behind: once all ranks come again, the next step succeeds. Ranks that are configured differently are
// refused by all, with their names.
//
// [Runner.WarmUp] captures all graphs together. A draft model plans its passes with Schedule.Reuse, from
// the votes of the target's step, and exchanges nothing. [NewLocalGroup] connects ranks that are
// goroutines; the module github.com/forwardctx/fwd/natsdp connects processes on any number of hosts; and
// github.com/forwardctx/fwd/fwdtest tests a [Coordinator] of your own.
//
// # Concurrency
//
// A forward context and everything derived from it are read-only, and stay valid for goroutines that
// outlive the pass. Any number of goroutines may use a [Runner], [Dispatcher], [DPMetadata] or
// [GraphCache]. A Runner exchanges votes one step at a time, and refuses a second exchange meanwhile.
//
// # Telemetry
//
// Instead of statistics printed at an interval there are OpenTelemetry spans and metrics. They go to the
// global providers or to those of [WithTracerProvider] and [WithMeterProvider]. Without an SDK nothing
// is emitted, and a pass costs next to nothing. [WithStepTrace] puts a step into one trace across all
// ranks. [WithObserver] gets a [Record] of each pass, and [WithLogger] logs what failed, both without any
// SDK.
//
// The spans are fwd.forward for a pass (F), fwd.coordinate for the wait for the votes of a step (C),
// fwd.ubatch for a microbatch inside its pass (U), fwd.wait for a wait for another rank inside a pass (W),
// and fwd.step for a whole step (S). What does not apply is left out:
//
//	attribute                      on spans      what it is
//	fwd.name                       S F           Config.Name
//	fwd.phase                      S F           what the pass is for: decode, mixed, warmup or the caller's;
//	                                             on a step, only warmup
//	fwd.step                       S F C         the step of the exchange
//	fwd.num_tokens                 F U           tokens, padding included
//	fwd.num_tokens_unpadded        F             tokens without padding
//	fwd.num_reqs                   F             scheduled requests
//	fwd.padding.graph, .dp         F             padding tokens for the graph, and for the other ranks
//	fwd.padding.ratio              F             the share of padding in all tokens
//	fwd.graph.mode                 S F           the graph mode; on a step, the one that the ranks agreed on
//	fwd.graph.reason               F             why it is that mode
//	fwd.batch.num_reqs, .uniform,  F             the key of the graph
//	    .num_active_loras
//	fwd.ubatches                   F             microbatches of a split pass
//	fwd.ubatch.index               U             of a microbatch
//	fwd.virtual_engine             F             index of the pipeline's engine
//	fwd.dummy                      F             a warm-up pass, or an idle rank that keeps step
//	fwd.wait_time                  F             seconds that the pass waited for other ranks, see Waited
//	fwd.dp.rank, .size             S F C         this rank, and how many there are
//	fwd.dp.max_tokens              F             the most tokens that a rank runs
//	fwd.dp.max_tokens_rank         F C           the rank that set the maximum
//	fwd.dp.lowest_mode_rank        F C           the rank that lowered the mode,
//	fwd.dp.lowest_mode_ranks       F             and the first 8 that did
//	fwd.idle_ranks                 S F C         how many ranks are idle; on S and C, only if all are
//	fwd.dp.last_rank               C             whose vote came last
//	fwd.dp.missing_ranks           C             who did not come
//	fwd.dp.peer_rank               W             the rank that is waited for
//	peer.service                   C W           its name, see WithPeerName; not on C if no other rank was last
//	error.type                     S F C U       a word for what failed
//
//	metric                   kind, unit                    attributes
//	fwd.forward.duration     histogram, s                  fwd.phase, fwd.graph.mode, fwd.graph.reason,
//	                                                       fwd.batch.bucket, fwd.dummy, error.type
//	fwd.forward.tokens       histogram, {token}            fwd.graph.mode, fwd.dummy
//	fwd.forward.active       up-down counter, {pass}
//	fwd.padding              counter, {token}              fwd.padding.kind (graph, dp), fwd.dummy
//	fwd.coordinate.duration  histogram, s                  error.type
//	fwd.wait.time            counter, s                    fwd.dp.peer_rank,
//	                                                       fwd.wait.kind (coordinate, forward)
//	fwd.graph.events         counter, {event}              fwd.graph.event (capture, replay, eager)
//
// All metrics have fwd.name, unless Config.Name is empty, and all but fwd.wait.time have fwd.dp.rank if
// there are several ranks. The event eager counts passes in mode NONE, once each; capture and replay
// count per cache, so several in a pass with piecewise caches. fwd.batch.bucket is the capture size of a
// pass that Plan dispatched to a graph, if there are at most 64 of them, and otherwise fwd.num_tokens
// rounded up to a power of two. So durations answer how long a batch of some size takes. Every attribute
// set is bounded. When passes overlap, their durations do too; [Queue] makes those of a pipelined engine
// add up.  # The trace of a step  With [WithStepTrace] on all ranks, a step is one tree of spans, which
// can be read without a click:  fwd.step FULL                  from rank 0's vote to the end of the last
// pass     fwd.coordinate             of each rank: its wait for the votes     fwd.forward target FULL
// of each rank: its pass         fwd.ubatch 0           a microbatch             fwd.wait           a
// wait for another rank, where the layer waited         fwd.forward draft FULL a pass that runs inside
// the pass  The name of a step ends with the mode that the ranks agreed on, or with IDLE if nobody runs
// a pass; it is fwd.step alone if the exchange failed. The name of a pass says Config.Name, its mode,
// and the reason for that mode unless it is exact, relaxed, disabled or unplanned, as in "fwd.forward
// target NONE dp_rank". Coordinate and wait spans are of kind client and name in peer.service whom they
// wait for, so pages that draw services show who waits for whom. A fwd.wait is what [Waited] tells, if
// it took 100 µs or more.  No span of a step ends after its root, as far as the ranks are those of one
// [NewLocalGroup]; the passes of ranks in other processes may. If rank 0 is late, the others start to
// wait before the root begins: a fwd.coordinate keeps its own start. If rank 0 never runs its pass, the
// step ends when that rank begins a pass of a later one. A rank that is alone has steps too, one for
// each pass that it plans outside any other pass. The spans of a pass planned with Schedule.Reuse stay
// under the caller's span, which is the target's pass if they are run in that.  The root is a child of
// the span that rank 0 plans in. If the loop of an engine runs inside one long span, all steps of a day
// are in one trace. With [WithStepRoot] each step is a trace of its own, with a link to that span.
// Without the step trace there is no fwd.step, and all spans are under their callers'.  With an SDK,
// each span that is recorded is also a task of runtime/trace while that is on. Take a trace with
// [runtime/trace.Start], or from /debug/pprof/trace of net/http/pprof, and open it with  go tool trace
// FILE  Its page "User-defined tasks" lists the tasks by name, with a histogram of their durations, and
// leads to what the scheduler did in each. A fwd.wait, and with the step trace a fwd.coordinate, is
// opened when the wait is over: as a task it takes no time.
//
// # Errors
//
// What data, configuration or other ranks can cause is an error, to be matched with errors.Is:
// [ErrInvalid], [ErrTokenMismatch], [ErrNoForwardContext], [ErrNoMetadata], [ErrLayer],
// [ErrNoDescriptor], [ErrCaptureClosed], [ErrLockstep] and [ErrRankMissing]. Each message names the
// values in conflict. [RankError], [UBatchError] and [UBatchPanic] hold the details, found with
// errors.As. Programming errors panic with a message that starts with "fwd: ".
//
// # Cost
//
// Reading the forward context costs a type assertion, and in a context derived from the pass's what any
// context value costs there. A pass allocates once if nobody listens and five times with the SDK.
// go test -bench . measures it beside baselines.
//
// # Coming from vLLM
//
// The names are those of December 2025. Names in brackets are what the newer model runner, the default
// since v0.29, calls the same thing.
//
//	vLLM                                  here                        what differs, and why
//	ForwardContext                        ForwardContext              a value in ctx, not a global slot
//	  no_compile_layers                   Layers, Layer               set once, in Config
//	  attn_metadata                       AttnMetadata                a map per microbatch; "" is for all
//	  slot_mapping                        SlotMapping                 the same
//	  virtual_engine                      VirtualEngine
//	  dp_metadata                         DP
//	  cudagraph_runtime_mode              GraphMode                   a composite mode is refused
//	  batch_descriptor                    Batch                       by default its token count
//	  ubatch_slices                       UBatches, Part              checked: they must tile the pass
//	  skip_compiled                       SkipCompiled
//	  additional_kwargs                   context.WithValue           ctx carries anything, with types
//	  remaining_moe_layers                none                        layers know their names
//	BatchDescriptor                       BatchDescriptor             NumReqs 0 is None
//	  [BatchExecutionDescriptor]          Pass                        mode, key and padding of a step
//	  relax_for_mixed_batch_cudagraphs    RelaxForMixedBatchGraphs
//	DPMetadata.make                       NewDPMetadata               errors instead of assertions
//	  max_tokens_across_dp_cpu            MaxTokensAcrossDP
//	  num_tokens_across_dp_cpu            NumTokensAcrossDPTo         exact for all counts up to 2^31-1
//	  chunked_sizes                       WithChunkedSizes, Chunks    a derived context: no size is left behind
//	  sp_local_sizes                      WithSPLocalSizes            the same
//	  get_chunk_sizes_across_dp_rank      LocalSizes                  absent outside, never stale
//	  cu_tokens_across_sp                 CuTokensAcrossSPTo
//	get_forward_context                   FromContext, MustFromContext
//	is_forward_context_available          FromContext                 its second result
//	create_forward_context                Pass                        or a ForwardContext literal
//	override_forward_context              NewContext                  the outer one is untouched
//	set_forward_context                   Runner.Run, Runner.Start    ends by itself, also by a panic
//	CUDAGraphMode                         GraphMode                   for any graphs, not only CUDA's
//	  decode_mode, mixed_mode             DecodeMode, MixedMode
//	  max_cudagraph_mode                  MaxMode
//	  has_mode, separate_routine          HasMode, SeparateRoutine
//	  has_full_cudagraphs                 HasFullGraphs
//	  has_piecewise_cudagraphs,           HasPiecewiseGraphs          the two are the same question
//	  requires_piecewise_compilation
//	  valid_runtime_modes                 ValidRuntime
//	CudagraphDispatcher                   Dispatcher                  also says why: Reason, Gaps
//	  [CudaGraphManager.dispatch]
//	CUDAGraphWrapper                      GraphCache                  never captures after warm-up
//	  [CudaGraphManager.run_fullgraph]
//	capture_model                         Runner.WarmUp               all ranks capture the same one
//	  [CudaGraphManager.capture]
//	coordinate_batch_across_dp            Runner.Plan, Agree          a deadline, and the missing rank's name
//	  [dispatch_cg_and_sync_dp]
//	  [DPSyncState]                       Agreement                   with all votes and who set what
//	  [dp_sync]                           Schedule.Reuse              a draft model exchanges nothing
//	execute_dummy_batch                   Plan of an idle rank        lowers nobody's mode
//	UBatchSlice                           UBatchSlice
//	maybe_create_ubatch_slices            SplitUBatches               any number of them
//	UBatchWrapper                         RunUBatches                 concurrent; errors come out
//	platform hook, its additional kwargs  Middleware                  wraps the pass
//	VLLM_LOG_BATCHSIZE_INTERVAL           fwd.forward.duration        by size, mode and reason
package fwd
