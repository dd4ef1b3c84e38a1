"""Exact, sharded Direct Preference Optimization: `torchrun -m dpo.train --config FILE`.

The way of the data is one direction: a row of a file -> `Example` -> token ids -> the pairs of a step -> a plan of
trees -> `PackedBatch` -> `pi_logps` -> losses -> an update. The house, floor by floor; a room, a file or a package,
imports from lower floors only (`tests/test_structure.py` holds it to that):

    0  errors.py          what ends a program early, and with which exit code
    0  visible.py         texts that must not steer a terminal or turn a page
    0  files.py           files that are never seen half-written
    0  preemption.py      SIGUSR2 asks a run to save and leave
    0  network.py         which interface leads to the other nodes
    0  provenance.py      versions and git commit
    0  versions.py        the tested versions of torch, transformers and Python
    0  config_fields.py   every key with its default and its meaning
    0  keys.py            sixteen bytes that stand for token ids
    0  fields.py          fields of raw rows, typed
    0  disk_arrays.py     arrays in files, read where they are asked for
    0  plan.py            pairs -> trees -> balanced StepPlan
    0  losses.py          the losses on the paper's index signature
    0  block_mask.py      FlexAttention's mask of packed trees, made block by block
    0  data_sheets.py     what GPUs have by their makers' data sheets
    0  flex_options.py    FlexAttention's kernel options by architecture and head size
    0  log_probs.py       hidden states -> log-probabilities, the vocabulary in chunks
    0  prefetch.py        what comes next is built by a thread
    0  host_copies.py     a sharded state copied to host memory
    0  machine.py         what a rank's machine has: memory, driver, compiler, GPU
    1  toolchain.py       driver, compiler and GPU are what a run needs, looked at before weights are read
    1  costs.py           FLOPs of a step by formula; what devices can do
    1  order.py           (seed, step) -> pairs
    1  progress.py        what rank 0 tells while it works
    1  run_files.py       what lies in a run folder, by name; read without torch
    1  strict_yaml.py     YAML without surprises
    1  config_rules.py    bounds of keys, and keys that must fit each other
    1  json_rows.py       JSON and JSONL with line numbers
    1  records.py         raw row -> Example; one adapter a format
    1  attention.py       shared-prefix attention: a segment loop on a CPU, FlexAttention on CUDA
    1  deviation.py       how far a policy is from its reference at first, and how far it may be
    2  failures.py        what a rank tells where it failed of what the others need not meet
    2  profiling.py       torch's profiler over a few steps
    2  cache.py           the files of the reference cache
    2  config_io.py       YAML and command line against the fields
    2  tokens.py          Example -> TokenizedExample; templates, truncation
    2  packing.py         trees -> PackedBatch
    3  kernels.py         compiled layers counted, their kernels kept between starts
    3  ref_table.py       the rows of a run's data, sorted, in one file of that cache
    3  config.py          load_config, to_yaml
    4  board/             a run in TensorBoard: charts, histograms, texts, answers, HParams
    4  parallelize.py     checkpointing, compilation and sharding, composed onto a model
    4  distributed.py     process group, mesh; one decides, all follow
    4  traffic.py         bytes that the ranks send each other in a step, by formula
    4  objective.py       log-probabilities of a batch -> what is minimized
    4  optim.py           optimizers, lr_at(step), the norm of a sharded gradient
    4  sources.py         a source of the config -> its raw rows
    5  program.py         how a program ends: its exit code, its error in one line
    5  metrics.py         sums on the device -> one exchange a step -> metrics.jsonl, TensorBoard
    5  token_rows.py      the tokenized rows of a source, cached on disk
    5  weights.py         model folders: found, hashed, read and written a shard a rank
    5  checkpoint.py      saved, committed, verified, found, loaded
    6  pair_set.py        the kept pairs as files of places in token rows
    6  holdout.py         prompts that are kept from training
    6  report.py          what was read, dropped, cut: the counts
    6  policy.py          meta build, load, completion_logps
    6  saving.py          checkpoints are written by a thread while training goes on
    6  run_folder.py      what lies in a run folder decides how a run starts
    7  data.py            all sources -> training and evaluation pairs
    7  batches.py         trees of a step -> this rank's micro-batches
    7  generation.py      answers from a sharded policy
    7  export.py          final/, and python -m dpo.export
    8  warm_up.py         what steps run is compiled before the first of them
    8  inputs.py          all input found, checked, hashed
    8  reference_pass.py  rows that the cache lacks are computed
    8  evaluation.py      a pass without gradients over the evaluation set
    8  first_step.py      a fresh run's policy is its own reference, or the run ends
    9  reference.py       the log-probabilities of a run's pairs, and python -m dpo.reference
    9  answers.py         what policy and reference say to a few evaluation prompts
   10  setup.py           a run, ready for its next step
   11  summary.py         what the terminal shows of a run
   12  train.py           train_step, train, python -m dpo.train

Beside the trainer, on the same floors:

    9  inspect/           python -m dpo.inspect: what the trainer will really see of its data
   10  estimate/          python -m dpo.estimate: what a step needs on devices that are not here
   11  doctor/            python -m dpo.doctor: will it run here, and how fast
   10  score.py           python -m dpo.score: margins and accuracy of any model on any pairs
   10  sample.py          python -m dpo.sample: answers of models side by side
    6  demo_world.py      the demo's questions, answers and model
    7  demo.py            python -m dpo.demo
"""
