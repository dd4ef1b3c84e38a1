"""The private and undocumented parts of libraries that dpo and launch use, each with the test that breaks first.

Libraries may change these in any version. test_private_parts.py holds this table to the source, the tests that it names
and the installed versions, in seconds: where a new version of a library breaks tests, its failures say what changed.
Whoever adds a use adds a row, or finds a documented way.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivatePart:
    """A part of a library that its documentation does not promise."""

    path: str
    """Where it is defined: MODULE.NAME, MODULE.CLASS.ATTRIBUTE, or MODULE.FUNCTION.ATTRIBUTE that the function uses."""
    files: tuple[str, ...]
    """Where it is used, below the root of the repository."""
    why: str
    test: str
    """The test that breaks first where it changes: FILE::NAME below tests."""
    instead: str = ""
    """The path in other versions of the tested range, of which either is there."""


COMPILED = "dpo/estimate/compiled.py"
DASHBOARD = "dpo/board/dashboard.py"
EVENT_FILES = "dpo/board/event_files.py"
HPARAMS = "dpo/board/hparams.py"
KERNELS = "dpo/model/kernels.py"
METADATA = "dpo/checkpoint/metadata.py"
REHEARSAL = "dpo/estimate/rehearsal.py"
PARAMETERS = "dpo/estimate/parameters.py"
INJECT = "dpo/adapters/inject.py"
STORE = "dpo/checkpoint/plans.py"
TIMELINE = "dpo/estimate/timeline.py"

PLANNER = "torch.distributed.checkpoint.DefaultSavePlanner"
FSDP = "torch.distributed.fsdp._fully_shard"
PROTO = "tensorboard.compat.proto"
PLUGINS = "tensorboard.plugins"

PLANS = "layouts/test_checkpoint_plans.py::test_a_run_plans_its_first_checkpoint_alone"
FORGOTTEN = "layouts/test_checkpoint_plans.py::test_groups_of_several_sizes_in_one_process_each_keep_their_own"
PARTITIONED = "estimate/test_estimate.py::test_a_compiled_layer_keeps_what_the_partitioner_says"
WEIGHTS = "estimate/test_estimate.py::test_weights_gradients_and_what_is_gathered"
ADAPTERS = "estimate/test_adapters.py::test_only_adapters_have_gradients_and_an_optimizer"
ENTRY = "board/test_dashboard.py::test_the_entry_has_the_config_and_the_figures_of_its_run"
ON_DISK = "board/test_dashboard.py::test_a_point_is_on_the_disk_at_once"

PRIVATE_PARTS = (
    # Python
    PrivatePart(
        "pathlib._local",
        (METADATA,),
        "Python 3.13 pickles the paths in a checkpoint's metadata under this name",
        "checkpoint/test_metadata.py::test_the_names_of_other_pythons_are_known",
        instead="pathlib.PosixPath",
    ),
    PrivatePart(
        "atexit._run_exitfuncs",
        ("dpo/distributed/program.py",),
        "a program ends by os._exit, past threads of torch that would abort it, and what is registered must run",
        "test_private_parts.py::test_it_is_there",
    ),
    PrivatePart(
        "argparse.ArgumentParser.format_usage._actions",
        ("dpo/front/completion.py",),
        "argparse has no public list of a parser's flags; shtab, which completes their values, reads the same",
        "front/test_completion.py::test_a_word_is_completed",
    ),
    PrivatePart(
        "argparse._ArgumentGroup",
        ("launch/flags.py",),
        "the type that add_argument_group returns has no other name",
        "launch/test_arguments.py::test_help_tells_every_flag",
    ),
    # torch: model and step
    PrivatePart(
        "torch._check",
        ("dpo/model/attention.py",),
        "tells torch.compile that rows are whole blocks, so that FlexAttention's kernel looks for no border",
        "model/test_attention.py::test_one_graph_serves_every_micro_batch",
    ),
    PrivatePart(
        "torch._foreach_mul_",
        ("dpo/step/optim.py",),
        "clips by one kernel; torch.nn.utils scales by a tensor, for which the norm would go back to the device",
        "step/test_optim.py::test_clipping_by_hand",
    ),
    PrivatePart(
        "torch.nn.Module._non_persistent_buffers_set",
        ("dpo/model/build.py",),
        "finds the buffers that no checkpoint stores (RoPE's frequencies)",
        "model/test_policy.py::test_families_are_exact",
    ),
    PrivatePart(
        "torch.nn.Module._compiled_call_impl",
        (KERNELS,),
        "Module.compile keeps the compiled call there; it is wrapped to count graphs",
        "model/test_kernels.py::test_graphs_are_told_by_kind",
    ),
    PrivatePart(
        "torch._dynamo.config",
        (KERNELS, REHEARSAL),
        "the limit of graphs per function; what a rehearsal traces must not count against it",
        "model/test_kernels.py::test_each_kind_of_layer_has_graphs_of_its_own",
    ),
    PrivatePart(
        "torch._dynamo.utils.counters",
        (KERNELS,),
        "the number of compiled graphs",
        "model/test_kernels.py::test_no_length_is_compiled_after_the_second",
    ),
    PrivatePart(
        "torch._inductor.list_options",
        (KERNELS,),
        "an option is set where this version of inductor has it",
        "model/test_kernels.py::test_each_kind_of_layer_has_graphs_of_its_own",
    ),
    PrivatePart(
        "torch._inductor.config.triton.mix_order_reduction",
        ("dpo/model/kernels.py",),
        "a fusion that guards on lengths, and would compile one more graph in the middle of a run",
        "model/test_kernels.py::test_no_length_is_compiled_after_the_second",
    ),
    PrivatePart(
        "torch._inductor.config.wrap_inductor_compiled_regions",
        ("dpo/model/attention.py",),
        "shows compiled attention to selective checkpointing as one operator",
        "model/test_recomputed.py::test_what_is_computed_again",
    ),
    PrivatePart(
        "torch._higher_order_ops.wrap.inductor_compiled_code",
        ("dpo/model/parallelize.py",),
        "the name of that operator",
        "model/test_recomputed.py::test_what_is_computed_again",
    ),
    PrivatePart(
        "torch._inductor.runtime.cache_dir_utils.default_cache_dir",
        (KERNELS,),
        "inductor sets its variable to this folder when it is imported: such a value is not the user's",
        "model/test_kernels.py::test_the_folder_that_inductor_sets_itself_is_not_the_users",
    ),
    PrivatePart(
        "torch._higher_order_ops.wrap.log",
        (KERNELS,),
        "its logger warns of in-place operations in checkpointed layers; that line is left out",
        "test_private_parts.py::test_it_is_there",
    ),
    # torch: checkpoints and profiles
    PrivatePart(
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        (METADATA,),
        "a name in the pickle of a checkpoint's metadata",
        "checkpoint/test_metadata.py::test_tensors_are_as_torch_reads_them",
    ),
    PrivatePart(
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        (METADATA,),
        "a name in the pickle of a checkpoint's metadata",
        "checkpoint/test_metadata.py::test_tensors_are_as_torch_reads_them",
    ),
    PrivatePart(
        "torch.serialization._get_layout",
        (METADATA,),
        "a name in the pickle of a checkpoint's metadata",
        "checkpoint/test_metadata.py::test_tensors_are_as_torch_reads_them",
    ),
    *(
        PrivatePart(f"{PLANNER}.{name}", (STORE,), why, test)
        for name, why, test in (
            ("_cached_plans_key", "one group's plans must not meet another's", PLANS),
            ("_cached_save_plan", "the plans of a run that ended are freed", FORGOTTEN),
            ("_cached_final_save_plan", "the plans of a run that ended are freed", FORGOTTEN),
            ("_cached_all_plans", "the plans of a run that ended are freed", FORGOTTEN),
            ("_cached_global_plan", "the plans of a run that ended are freed", FORGOTTEN),
            ("_cached_metadata", "the plans of a run that ended are freed", FORGOTTEN),
        )
    ),
    *(
        PrivatePart(
            f"torch.cuda.memory.{name}",
            ("dpo/train/profiling.py",),
            "the snapshot of a GPU's memory has no other way to be made",
            "train/test_profiling.py::test_on_cuda_the_memory_is_recorded_too",
        )
        for name in ("_record_memory_history", "_dump_snapshot")
    ),
    # torch: the rehearsal of dpo.estimate
    PrivatePart(
        "torch._dynamo.backends.common.aot_autograd",
        (COMPILED,),
        "makes a backend of torch.compile that divides a graph and makes no kernels",
        PARTITIONED,
    ),
    PrivatePart(
        "torch._functorch.partitioners.min_cut_rematerialization_partition",
        (COMPILED,),
        "decides what a compiled layer keeps for its backward pass",
        PARTITIONED,
    ),
    PrivatePart(
        "torch._functorch.partitioners.get_default_op_list",
        (COMPILED,),
        "which operations inductor fuses",
        "estimate/test_estimate.py::test_what_stays_in_a_kernel_is_no_memory",
    ),
    PrivatePart(
        "torch._inductor.decomposition.select_decomp_table",
        (COMPILED,),
        "the operations that inductor sees",
        PARTITIONED,
    ),
    PrivatePart(
        "torch._functorch._aot_autograd.utils.make_boxed_func._boxed_call",
        (COMPILED,),
        "a graph that takes a list and empties it frees its inputs as a compiled one does",
        PARTITIONED,
    ),
    PrivatePart(
        "torch._subclasses.fake_tensor.FakeTensorMode", (REHEARSAL, PARAMETERS), "tensors without memory", WEIGHTS
    ),
    PrivatePart(
        "torch._subclasses.fake_tensor.unset_fake_temporarily",
        (INJECT,),
        "peft can move new modules of a model of fake tensors",
        ADAPTERS,
    ),
    PrivatePart(
        "torch.testing._internal.distributed.fake_pg.FakeStore", (REHEARSAL,), "a group of ranks not there", WEIGHTS
    ),
    PrivatePart(
        "torch.utils._python_dispatch.TorchDispatchMode", (TIMELINE,), "sees every operation of a step", WEIGHTS
    ),
    PrivatePart("torch.utils._pytree.tree_leaves", (TIMELINE,), "the tensors in an operation's arguments", WEIGHTS),
    PrivatePart(
        "torch._ops.OpOverload._schema",
        (TIMELINE,),
        "the name of a collective, the same for all of its overloads",
        "estimate/test_estimate.py::test_gloo_copies_what_it_gathers_and_scatters",
    ),
    PrivatePart(
        "torch.distributed.tensor.DTensor._local_tensor",
        (TIMELINE,),
        "the storage of a gradient, without the operation that to_local would be",
        WEIGHTS,
    ),
    PrivatePart("torch.distributed.fsdp.FSDPModule._get_fsdp_state", (TIMELINE,), "the way to its groups", WEIGHTS),
    PrivatePart(
        f"{FSDP}._fsdp_state.FSDPState._fsdp_param_groups",
        (TIMELINE,),
        "what is gathered and reduced at once, since torch 2.12",
        WEIGHTS,
        instead=f"{FSDP}._fsdp_state.FSDPState._fsdp_param_group",
    ),
    PrivatePart(
        f"{FSDP}._fsdp_state.FSDPState._fsdp_param_group",
        (TIMELINE,),
        "what is gathered and reduced at once, until torch 2.11",
        WEIGHTS,
        instead=f"{FSDP}._fsdp_state.FSDPState._fsdp_param_groups",
    ),
    PrivatePart(
        f"{FSDP}._fsdp_param_group.FSDPParamGroup._all_reduce_state",
        (TIMELINE,),
        "what hybrid sharding has summed over copies and not let go yet",
        WEIGHTS,
    ),
    *(
        PrivatePart(
            f"{FSDP}.{path}", (TIMELINE,), "the kind of a tensor is known by the function that makes it", WEIGHTS
        )
        for path in (
            "_fsdp_collectives.foreach_all_gather",
            "_fsdp_collectives.foreach_all_gather_copy_out",
            "_fsdp_collectives.foreach_reduce",
            "_fsdp_param_group.FSDPParamGroup.wait_for_unshard",
            "_fsdp_param.FSDPParam.to_accumulated_grad_if_needed",
        )
    ),
    # transformers and datasets
    PrivatePart(
        "transformers.PreTrainedModel._supports_attention_backend",
        ("dpo/model/build.py",),
        "whether a model's attention can be replaced",
        "model/test_policy.py::test_models_that_would_not_be_exact_are_refused",
    ),
    PrivatePart(
        "transformers.PreTrainedModel._init_weights",
        ("dpo/model/build.py",),
        "computes the buffers that no checkpoint stores",
        "model/test_policy.py::test_families_are_exact",
    ),
    PrivatePart(
        "transformers.PreTrainedConfig._attn_implementation",
        ("dpo/model/generation.py",),
        "which attention to go back to after generation",
        "model/test_generation.py::test_the_model_is_ready_to_train_again",
    ),
    PrivatePart(
        "transformers.PreTrainedConfig._name_or_path",
        ("dpo/model/weights.py",),
        "a key of config.json that changes no value of the model",
        "model/test_weights.py::test_the_hash_does_not_depend_on_names_and_versions",
    ),
    *(
        PrivatePart(
            f"transformers.{path}",
            files,
            "names and shapes of weights on disk, where the model's own differ",
            "model/test_weights.py::test_every_family_is_read_as_plain_transformers_reads_it",
        )
        for path, files in (
            ("core_model_loading.revert_weight_conversion._weight_conversions", ("dpo/model/build.py",)),
            ("core_model_loading.revert_weight_conversion", ("dpo/model/build.py", "dpo/model/matching.py")),
            ("conversion_mapping.get_model_conversion_mapping", ("dpo/model/build.py",)),
        )
    ),
    PrivatePart(
        "transformers.PreTrainedModel._tied_weights_keys",
        ("dpo/model/matching.py",),
        "the head that a model whose files lack it may share with its embedding",
        "model/test_matching.py::test_an_untied_model_without_a_head_is_refused",
    ),
    PrivatePart(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
        ("dpo/model/matching.py",),
        "tensors in the files that a class leaves out on purpose",
        "model/test_matching.py::test_names_that_the_class_leaves_out_are_left_out_in_silence",
    ),
    PrivatePart(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        ("dpo/adapters/quantized.py", "dpo/model/parallelize.py"),
        "a model's decoder layers",
        "model/test_recomputed.py::test_what_is_computed_again",
    ),
    PrivatePart(
        "transformers.modeling_utils.PreTrainedModel.warn_if_padding_and_no_attention_mask",
        ("dpo/model/build.py",),
        "looks for padding at both ends of a row, for which the host would wait in every forward pass",
        "test_private_parts.py::test_it_is_there",
    ),
    PrivatePart(
        "datasets.Dataset._fingerprint",
        ("dpo/sources/source.py",),
        "the content of a hub's dataset, without reading it",
        "sources/test_sources.py::test_hub",
    ),
    PrivatePart(
        "datasets.Dataset.save_to_disk._data_files",
        ("dpo/sources/saved.py",),
        "the names of the files of a saved data set, in its state.json: none may lead out of the folder",
        "sources/test_sources.py::test_a_saved_set_names_files_of_its_own_folder",
    ),
    PrivatePart(
        "datasets.packaged_modules.cache.cache.Cache",
        ("dpo/sources/hub_sets.py",),
        "reads a hub's dataset from the cache; load_dataset asks the hub first, and waits where packets are dropped",
        "commands/test_prepare.py::test_a_data_set_is_the_same_online_and_from_the_cache",
    ),
    # peft
    PrivatePart(
        "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters",
        ("dpo/adapters/switch.py",),
        "runs a model without its adapters; enable_adapters would freeze their parameters too",
        "adapters/test_start.py::test_adapters_are_on_again_after_a_failure",
    ),
    # submitit
    *(
        PrivatePart(
            f"submitit.{path}",
            ("launch/executors.py",),
            "--dry-run prints the script without SLURM",
            "launch/test_submit.py::test_a_dry_run_prints_the_same_script_without_slurm",
        )
        for path in ("slurm.slurm._make_sbatch_string", "core._submit")
    ),
    *(
        PrivatePart(
            f"submitit.core.utils.{name}",
            (file,),
            "the exception of a job that sbatch refused, or whose task left no result",
            test,
        )
        for name, file, test in (
            ("FailedJobError", "launch/executors.py", "launch/test_submit.py::test_sbatchs_refusal_is_one_line"),
            ("FailedSubmissionError", "launch/executors.py", "launch/test_submit.py::test_sbatchs_refusal_is_one_line"),
            (
                "UncompletedJobError",
                "launch/slurm_job.py",
                "launch/test_node.py::test_too_many_timeouts_end_the_job_but_preemptions_do_not",
            ),
        )
    ),
    # TensorBoard, whose writers are torch's or TensorFlow's; a run must not import either
    PrivatePart(f"{PROTO}.event_pb2.Event", (DASHBOARD, EVENT_FILES, HPARAMS), "a line of an event file", ON_DISK),
    PrivatePart(f"{PROTO}.event_pb2.SessionLog", (EVENT_FILES,), "says which steps are given up", ON_DISK),
    PrivatePart(f"{PROTO}.summary_pb2.Summary", (DASHBOARD, HPARAMS), "a value of an event", ON_DISK),
    PrivatePart(
        "tensorboard.compat.tensorflow_stub.pywrap_tensorflow.masked_crc32c",
        (EVENT_FILES,),
        "finds where a cut event file ends",
        "board/test_dashboard.py::test_a_resumed_run_has_every_point_once",
    ),
    PrivatePart("tensorboard.summary.writer.record_writer.RecordWriter", (EVENT_FILES,), "writes the records", ON_DISK),
    *(
        PrivatePart(
            f"{PLUGINS}.custom_scalar.{name}",
            (DASHBOARD,),
            "the page of charts",
            "board/test_dashboard.py::test_the_custom_charts_have_two_or_three_lines_of_a_run",
        )
        for name in ("layout_pb2", "metadata.CONFIG_SUMMARY_TAG", "metadata.create_summary_metadata")
    ),
    PrivatePart(
        f"{PLUGINS}.histogram.metadata.create_summary_metadata",
        (DASHBOARD,),
        "a histogram",
        "board/test_dashboard.py::test_a_histogram_counts_every_value_where_it_lies",
    ),
    PrivatePart(
        f"{PLUGINS}.text.summary_v2.text_pb",
        (DASHBOARD,),
        "a text",
        "board/test_dashboard.py::test_any_text_is_shown_as_it_is",
    ),
    PrivatePart("tensorboard.util.tensor_util.make_tensor_proto", (DASHBOARD,), "a value of a summary", ON_DISK),
    *(
        PrivatePart(f"{PLUGINS}.hparams.{name}", (HPARAMS,), "the entry of a run in the HParams tab", ENTRY)
        for name in ("metadata", "api_pb2", "plugin_data_pb2.HParamsPluginData", "plugin_data_pb2.SessionStartInfo")
    ),
)


@dataclass(frozen=True)
class ForeignText:
    """A text of a library, whose form nobody promises and which is read for its meaning."""

    file: str
    name: str
    """The constant of `file` that has the text's form, or a part of the form itself."""
    what: str
    test: str
    """As in `PrivatePart`: it gets the text from the library itself, where this machine can make it write one."""


LAUNCH_FAILURES, RANK_FAILURES = "launch/failures.py", "dpo/watch/failures.py"
BLAME = "dpo/command/blame.py"
KILLED_RANK = "launch/test_node.py::test_a_killed_rank_is_named_and_does_not_restart_the_job_for_ever"
OTHER_NODE = "launch/test_node.py::test_the_true_exception_of_another_node_is_shown"
NO_MEMORY = "faults/test_no_memory.py::test_no_memory_is_one_line"

FOREIGN_TEXTS = (
    ForeignText(LAUNCH_FAILURES, "_TABLE_ROW", "torchrun's table of ranks that failed", KILLED_RANK),
    ForeignText(
        LAUNCH_FAILURES, "*/attempt_*/*/error.json", "where torchrun keeps the error file of a rank", OTHER_NODE
    ),
    ForeignText(BLAME, "extraInfo", "the error file that torchelastic writes", OTHER_NODE),
    ForeignText(BLAME, "_LOST_PEER", "messages of gloo, NCCL and torchelastic", OTHER_NODE),
    ForeignText(
        BLAME,
        "_BROKEN_MACHINE",
        "messages of NVIDIA's driver",
        "launch/test_decision.py::test_a_broken_machine_is_no_bug",
    ),
    ForeignText(RANK_FAILURES, "_NO_DEVICE_MEMORY", "messages of CUDA, NCCL and cuBLAS without memory", NO_MEMORY),
    ForeignText(RANK_FAILURES, "_NO_HOST_MEMORY", "the message of torch's CPU allocator", NO_MEMORY),
    ForeignText(
        RANK_FAILURES, "_LOST", "messages of gloo", "faults/test_one_rank_fails.py::test_a_fault_on_one_rank_ends_both"
    ),
    ForeignText(
        "launch/squeue.py",
        "ENDED",
        "squeue's names of states",
        "launch/test_follow.py::test_a_cancelled_job_ends_without_a_word_of_its_own",
    ),
)
