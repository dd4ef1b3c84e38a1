"""A run: its inputs, its folder, its loop, what it reports.

files.py       what lies in a run folder, by name; read without torch
folder.py      what lies in a run folder decides how a run starts
provenance.py  versions and git commit
inputs.py      all input found, checked and hashed
identity.py    what may not change between the parts of one run
layout.py      on which devices and how its steps are computed
answers.py     what policy and reference say to a few evaluation prompts
setup.py       a run, ready for its next step
start.py       where a run goes on from; the check of its first step
profiling.py   torch's profiler over a few steps
watch.py       what is shown and recorded while steps are taken
summary.py     what the terminal shows of a run
loop.py        every step, with evaluations and checkpoints in between
outputs.py     what a run writes while it trains, and the exported model
"""
