// Package fwd carries the forward context of an inference engine: what code deep inside a model needs to know about the
// forward pass that it is part of. That is attention metadata by layer, the token counts of the data-parallel ranks, the
// graph mode and the key of the batch, and the microbatches. vLLM keeps it in a process-global slot, which is safe as long
// as one thread runs at a time. Here it is a value inside a [context.Context]: passes nest, run at once, and end by
// themselves.
//
//	runner, err := fwd.New(fwd.Config{Name: "target"})
//	...
//	err = runner.Run(ctx, fwd.Pass{
//		NumTokens:    len(tokens),
//		AttnMetadata: []map[string]any{{"": attn}},
//	}, model.Forward)
//
//	func (l *Attention) Forward(ctx context.Context, x *mat.Dense) (*mat.Dense, error) {
//		attn, err := fwd.AttnMetadata[*AttnMetadata](ctx, l.Name)
//		...
//	}
//
// # The life of a pass
//
// [Runner.Plan] turns what the scheduler decided into a [Pass]: it dispatches the batch to a captured graph, and agrees
// with the other data-parallel ranks on graph mode, microbatches and padding. The caller adds the metadata. [Runner.Run]
// checks the pass, opens its span, puts the [ForwardContext] into a new context and calls the middleware and the forward
// function with it. Inside, [FromContext] and the typed accessors read it; [RunUBatches] runs the microbatches, all at
// once; [Chunks] paces a mixture-of-experts layer; a [GraphCache] captures and replays. When the forward function
// returns, or panics, the device is synchronised and the span ended. [Runner.Start] is for passes that end elsewhere.
//
// Waiting for the other ranks comes before the pass: it is measured apart, as fwd.coordinate.
//
// # Data parallelism
//
// The ranks of a mixture-of-experts model run in lockstep, since their experts are spread over all of them. Once per step
// each gives a [Vote] and gets the votes of all, through its [Coordinator]; [Agree] computes the same [Agreement] from them
// on every rank. A rank without work plans a dummy pass. Steps are numbered: a rank that is missing is named in the error
// of all others when the first of them stops waiting (see [WithExchangeTimeout]), a Runner that begins anew
// costs one failed step, and neither leaves anything behind: once all ranks come again, the next step succeeds. [NewLocalGroup]
// connects ranks that are goroutines; the module github.com/forwardctx/fwd/natsdp connects processes, on any number of hosts; and
// github.com/forwardctx/fwd/fwdtest tests a [Coordinator] of your own.
//
// # Concurrency
//
// A forward context and everything derived from it is read-only, and stays valid for goroutines that outlive the pass.
// [Runner], [Dispatcher], [DPMetadata] and [GraphCache] may be used by any number of goroutines; a Runner exchanges votes
// one step at a time, and refuses a second exchange meanwhile.
//
// # Telemetry
//
// Instead of statistics printed at an interval there are OpenTelemetry spans and metrics. They go to the global providers
// or to those of [WithTracerProvider] and [WithMeterProvider]; without an SDK they cost next to nothing. [WithStepTrace]
// puts a step into one trace across all ranks.
//
//	span             what it covers                         attributes
//	fwd.forward      a pass                                 fwd.name, fwd.num_tokens, fwd.num_tokens_unpadded, fwd.num_reqs,
//	                                                        fwd.batch.num_reqs, fwd.batch.num_active_loras, fwd.batch.uniform,
//	                                                        fwd.virtual_engine, fwd.ubatches, fwd.step, fwd.dp.rank, fwd.dp.size,
//	                                                        fwd.dp.max_tokens, fwd.dp.max_tokens_rank, fwd.dp.lowest_mode_rank,
//	                                                        fwd.padding.graph, fwd.padding.dp, fwd.graph.mode, fwd.graph.reason,
//	                                                        fwd.dummy
//	fwd.coordinate   waiting for the votes of a step        fwd.step, fwd.dp.rank, fwd.dp.size, fwd.dp.max_tokens_rank,
//	                                                        fwd.dp.lowest_mode_rank
//	fwd.ubatch       a microbatch, inside its pass          fwd.ubatch.index, fwd.num_tokens
//
//	metric                   kind, unit           attributes
//	fwd.forward.duration     histogram, s         fwd.name, fwd.graph.mode, fwd.graph.reason, fwd.batch.bucket, fwd.dummy, error.type
//	fwd.forward.tokens       histogram, {token}   fwd.graph.mode, fwd.dummy
//	fwd.padding              counter, {token}     fwd.padding.kind: graph, dp
//	fwd.coordinate.duration  histogram, s         error.type
//	fwd.graph.events         counter, {event}     fwd.graph.event: capture, replay, eager
//
// Attributes that do not apply are left out. A span of what failed has status Error and error.type. fwd.graph.mode is what
// the batch was dispatched to: a pass that is split runs its microbatches without graphs. The event eager counts passes in
// mode NONE, once each; capture and replay count per cache, so several in a pass with piecewise caches. fwd.batch.bucket, by
// which durations answer how long a batch of some size takes, is the capture size of a pass that Plan dispatched to a
// graph, and else fwd.num_tokens rounded up to a power of two. Every attribute set is bounded.
//
// # Errors
//
// What data, configuration or other ranks can cause is an error, to be matched with errors.Is: [ErrInvalid],
// [ErrTokenMismatch], [ErrNoForwardContext], [ErrNoMetadata], [ErrLayer], [ErrNoDescriptor], [ErrCaptureClosed],
// [ErrLockstep] and [ErrRankMissing]. Each message names the values in conflict. [RankError], [UBatchError] and
// [UBatchPanic] hold the details, found with errors.As. What no data could excuse panics, with a text that begins with
// "fwd: ".
//
// # Cost
//
// Reading the forward context costs a type assertion, and in a context derived from the pass's what any context value
// costs there. A pass allocates twice with no-op providers, four times by default without an SDK, and five times with it. go
// test -bench . measures it beside baselines.
//
// # Coming from vLLM
//
//	vLLM                                     here                                what differs, and why
//	ForwardContext                           ForwardContext                      a value in ctx, not a slot of the process
//	  no_compile_layers                      NoCompileLayers, Layer              set once, in Config
//	  attn_metadata                          AttnMetadata, AttnMetadata()        always a list, one map per microbatch; "" serves all layers
//	  slot_mapping                           SlotMapping, SlotMapping()          the same
//	  virtual_engine                         VirtualEngine
//	  dp_metadata                            DP
//	  cudagraph_runtime_mode                 GraphMode                           a composite mode is refused
//	  batch_descriptor                       Batch                               without one, a graph pass gets its token count
//	  ubatch_slices                          UBatches                            checked: they must tile the pass
//	  skip_compiled                          SkipCompiled
//	  additional_kwargs                      context.WithValue                   ctx carries anything, with types
//	  remaining_moe_layers                   none                                layers know their names
//	BatchDescriptor                          BatchDescriptor                     NumReqs 0 is None
//	  relax_for_mixed_batch_cudagraphs       RelaxForMixedBatchGraphs
//	DPMetadata.make                          NewDPMetadata                       errors instead of assertions
//	  max_tokens_across_dp_cpu               MaxTokensAcrossDP
//	  num_tokens_across_dp_cpu               NumTokensAcrossDPTo, NumTokens      exact for all counts up to 2^31-1
//	  chunked_sizes                          WithChunkedSizes, Chunks            a derived context: no size is left behind
//	  sp_local_sizes                         WithSPLocalSizes                    the same
//	  get_chunk_sizes_across_dp_rank         LocalSizes                          absent outside, never stale
//	  cu_tokens_across_sp                    CuTokensAcrossSPTo
//	get_forward_context                      FromContext, MustFromContext
//	is_forward_context_available             FromContext                         its second result
//	create_forward_context                   Pass                                or a ForwardContext literal
//	override_forward_context                 NewContext                          the outer one is untouched
//	set_forward_context                      Runner.Run, Runner.Start            ends by itself, also by error and panic
//	CUDAGraphMode                            GraphMode                           for any graphs, not only CUDA's
//	  decode_mode, mixed_mode, max_..._mode  DecodeMode, MixedMode, MaxMode
//	  has_mode, separate_routine             HasMode, SeparateRoutine
//	  has_full_cudagraphs                    HasFullGraphs
//	  has_piecewise_cudagraphs,              HasPiecewiseGraphs                  the two are the same question
//	  requires_piecewise_compilation
//	  valid_runtime_modes                    ValidRuntime
//	CudagraphDispatcher                      Dispatcher                          also says why: Reason
//	CUDAGraphWrapper                         GraphCache                          never captures after warm-up; the first pass has its result too
//	coordinate_batch_across_dp               Plan: Coordinator, Agree            has a deadline, and names the missing rank
//	UBatchSlice, maybe_create_ubatch_slices  UBatchSlice, SplitUBatches          any number of microbatches; an empty one is an error
//	UBatchWrapper                            RunUBatches                         really at once; errors and panics come out
//	platform hook, its additional kwargs     Middleware, context.WithValue       wraps the pass instead of adding keys to it
//	VLLM_LOG_BATCHSIZE_INTERVAL              fwd.forward.duration                by batch size, mode and reason, without a log
package fwd
