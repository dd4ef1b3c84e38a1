"""`python -m dpo.estimate`: the memory, traffic and time of a step on devices that are not here.

A step of the same model with few layers (3 and 4) runs on fake tensors under a fake process group. Its peak is
extrapolated to all layers; traffic and time follow from formulas. The same estimate decides the values of `auto` when a
run starts.

arguments.py  the command line; without torch
program.py    prints the estimate, the changes and the advice
at_start.py   decides `auto` when a run starts, on rank 0, for all ranks
choice.py     the fastest values of the keys on `auto` that fit
lengths.py    the trees of some steps, from the data or from assumed lengths
needs.py      a trial (config, number of ranks) -> plans, memory
few_layers.py  the same model with few layers, and the adapters of each
parameters.py  the groups of parameters, and what of them is trained
memory.py     the peak of few layers -> the peak of all layers, with the optimizer
rehearsal.py  one step of few layers on fake tensors
timeline.py   the bytes that live at once during a rehearsal, by kind
stand_in.py   an attention that keeps the tensors that FlexAttention keeps
compiled.py   the tensors that compiled layers keep, without a compiler
traffic.py    the bytes of a step's collectives
speed.py      the seconds of a step
devices.py    the memory and the links of a rank's device
report.py     the measurements that dpo.doctor writes to a file
report_file.py  writes, reads and checks this file
measured.py   the device of such a file
changes.py    changes that make a step fit
advice.py     changes that speed up a step that is bound by traffic
forecast.py   what a run needs of a cluster
words.py      an estimate as lines of text
"""
