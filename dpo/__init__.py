"""Exact, sharded Direct Preference Optimization: `dpo train my.yaml --gpus 8`, or `torchrun -m dpo.train`.

From Python: `from dpo import load_config, run_training`, see front/api.py.

The floors of the house are the way of the data, which goes up it once: a row of a file -> `Example` -> token ids ->
the pairs of a step -> trees -> `StepPlan` -> `PackedBatch` -> `pi_logps` -> losses -> an update. A room imports from
lower floors only, and rooms of one floor do not know each other (`make check` holds them to it; the contracts are in
pyproject.toml). Each room's `__init__.py` has a line for each of its files.

    floor  room
    16     front/          dpo NAME: the programs below by their names, ranks that it starts itself; Python's way in
    15     replay/         python -m dpo.replay: steps of a run computed again, compared to the last bit
    14     train/          python -m dpo.train: checks the input, builds the run, trains, exports; the loop
           prepare/        python -m dpo.prepare: downloads and tokenizes all that a run reads, without GPUs
           reference/      python -m dpo.reference: fills the cache of reference log-probabilities
           score/          python -m dpo.score: margins and accuracy of any model on any pairs
           sample/         python -m dpo.sample: answers of models side by side
           export/         python -m dpo.export: a checkpoint -> a model folder
           push/           python -m dpo.push: a trained model -> the Hugging Face hub
           doctor/         python -m dpo.doctor: will it run here, and how fast
           demo/           python -m dpo.demo: a small policy learns a preference on two processes
    13     inspect/        python -m dpo.inspect: the data as the trainer will see it
           estimate/       python -m dpo.estimate: the memory and time of a step on devices that are not here
           report/         python -m dpo.report: a run, or several side by side, as one HTML page; without torch
    12     disk/           the disk that a run needs, and whether its folders have it
    11     run/            a run, apart from its steps: its inputs, folder, identity, answers, model card
    10     step/           one update: log-probabilities -> losses -> gradient -> weights; evaluation without gradient
           ref_logps/      the reference's log-probabilities: computed once, cached by content
           checkpoint/     weights and optimizer on disk: saved by a thread, verified, loaded on any ranks, exported
    9      model/          PackedBatch -> log-probabilities: built, sharded, loaded, run; generation
    8      batch/          (seed, step) -> pairs -> trees -> StepPlan -> PackedBatch
    7      pairs/          `Example`, encoded -> the numbered pairs of an epoch
    6      encode/         `Example` -> token ids
    5      sources/        a source of the config -> rows of its files -> `Example`
           distributed/    the processes: process group and mesh, collectives, how programs end
           board/          a run in TensorBoard and in trackers; without torch
           run_folder/     what launch and the report know of a run: its files, and words; without torch
    4      watch/          which rank failed or stopped, and why; a process per node that ends ranks that hang
    3      config/         every key, its bounds, YAML and command line; without torch
           machine/        a rank's machine: memory, driver, compiler, GPU
    2      command/        how a program begins and ends: command line, exit code, last line; without torch
    1      terminal/       what a program says: lines, bars, the log; without torch
           hub/            repositories of the hub, and the files of a model's folder; without torch
    0      base/           general tools: errors, files, arrays, processes; without torch

Where do I add ...

    a loss                 step/losses.py: a function and an entry in `LOSSES`; config/loss_facts.py: name, facts;
                           config/fields.py: its line in the help of loss.name
    a data format          sources/formats/: a reader, and an entry in `FORMATS` of examples.py; its name in config
    a set by its name      configs/data/: a file; rows of its shape in tests/sources/test_named_sets.py
    a key of the config    config/fields.py: a field with its docstring; its bounds in config/rules.py; its line in
                           config/effects.py: does it change the result?
    a metric               step/metrics.py; its words in board/words.py; a page of charts in board/charts.py; a curve
                           in report/one_run.py
    an optimizer           step/optim.py, and `optimizer_elements` there
    a model family         nothing where it uses transformers' attention interface; else model/, and an exactness test
    an adapter kind        model/, between build.py and parallelize.py
    a parallel axis        distributed/world.py (the mesh), batch/plan.py (lanes), model/attention.py
    a GPU                  machine/data_sheets.py: a line of the table
    a command              a folder beside prepare/ that holds nothing others need, with the same three files; its line
                           in front/names.py
    another tracker        board/sinks.py: an entry, beside a file with the methods of sink.py; its name in config
    another cluster        launch/, beside the files that talk to SLURM

Words of the code:

    completion   an answer to a prompt, with its EOS; a pair names two of them, winner and loser
    tree         a prompt with its completions and the pairs among them; the prompt is computed once
    row          the trees of a micro-batch, packed one after the other
    lane         the index of a rank among those that divide the trees of a step; each lane is one rank today
    spread       the deviation of a policy from its reference per completion; drift: over all tokens (step/deviation.py)
"""

from importlib import import_module
from typing import Any

DISTRIBUTION = "exact-dpo"
"""The name under which this package is installed: `dpo` belongs to another project on the package index."""

_API = ("load_config", "run_training")


def __getattr__(name: str) -> Any:
    """Returns a function of `dpo.front.api`, which is imported at its first use: `import dpo` takes no time."""
    if name in _API:
        return getattr(import_module("dpo.front.api"), name)
    raise AttributeError(f"module 'dpo' has no attribute {name!r}; valid: {', '.join(_API)}")
