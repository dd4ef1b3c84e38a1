"""`python -m dpo.train`: checks the input of a run, builds the run, trains, exports.

words.py       the command line; without torch
program.py     run_training: the run of one config
hold.py        holds the run folder, so that no other start writes to it
setup.py       builds a run, ready for its next step
start.py       finds the checkpoint to resume from; checks a fresh run's first step
outputs.py     opens the run folder, log, metrics and checkpoints; exports the model
loop.py        all steps, with evaluations and checkpoints in between
nonfinite.py   names and writes the pairs of a step or an evaluation that is not finite
spikes.py      tells a loss that is far above those before it
watch.py       progress bar, profiler and warnings around the steps
phases.py      the seconds of a start, by phase
profiling.py   torch's profiler over a few steps
summary.py     the terminal output of a run, to its last step
closing.py     the terminal output at the end of a run
"""
