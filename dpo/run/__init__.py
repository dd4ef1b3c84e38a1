"""A run: its inputs, its folder, its loop, its reports.

files.py       the names of the files of a run folder, and its metrics; without torch
evaluations.py  the values of single pairs at each evaluation, as files; without torch
fallen.py      the warning that winners have fallen far below the reference; without torch
forecast.py    what a run needs of a cluster, as a file; without torch
folder.py      decides from a run folder how a run starts, and prepares the folder
advice.py      what is told after a stop; without torch
provenance.py  versions, git commit and data of a start
agreement.py   checks that models and tokenizer agree on the ids of the data
inputs.py      finds, checks and hashes all input
disk.py        the bytes of checkpoints and exported model
storage.py     checks that folders are shared, and that the run's files fit
home.py        tells that a cache lies in a small home folder
identity.py    the facts that must be the same at every start of a run
layout.py      the devices and settings by which the steps of a start are computed
answers.py     answers of policy and reference to a few evaluation prompts
setup.py       builds a run, ready for its next step
start.py       finds the checkpoint to resume from; checks a fresh run's first step
profiling.py   torch's profiler over a few steps
watch.py       progress bar, profiler and warnings around the steps
summary.py     the terminal output of a run, to its last step
closing.py     the terminal output at the end of a run
loop.py        all steps, with evaluations and checkpoints in between
card_facts.py  reads the facts of a model card
card.py        writes the model card of an exported model
outputs.py     opens the run folder, log, metrics and checkpoints; exports the model
"""
