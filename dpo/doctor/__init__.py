"""`python -m dpo.doctor`: whether a run would work here, and how fast the machine is.

Each part of the examination is measured on all ranks and described by rank 0. A part that fails on one rank does not
block the others.

arguments.py   the command line; without torch
program.py    runs the parts in order and prints each finding at once
parts.py      a part: measured on every rank, described once; failures are gathered
host.py       devices, versions of libraries, driver and compiler
speed.py      matrix products; an all-gather along each axis of the mesh
storage.py    the disks of the run folder and of the reference cache
model.py      the memory and disk that the config's model takes
attention.py  compares attention with a plain implementation
rates.py      for a report: products in every precision, a layer's collectives, copies to the host
steps.py      for a report: five timed steps of the config
step_facts.py   the timed steps with their FLOPs and bytes
report.py     the measurements of all parts as one file
words.py      findings as one screen of text
"""
