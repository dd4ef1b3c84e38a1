"""Which rank failed or stopped, and why, and the process that ends ranks which cannot end by themselves.

Each rank writes where it stands and a sign of life into its slot. The watcher, one small process per node, reads the
slots of its node; ranks of other nodes are seen through the store.

slots.py      where each rank of a node stands, and its last sign of life: a file per rank in memory
folders.py    the folder of those files; what killed runs left of theirs; without torch
beats.py      this rank's signs of life; `stand` tells its place; how it leaves the run
elsewhere.py  what is seen of the ranks of other nodes, through the store
causes.py     which rank the others wait for, and why
watcher.py    the process that ends the ranks of a node; without torch
arrival.py    each rank waits until all have started
failures.py   reports of a failure that one rank may meet alone
flight.py     PyTorch's Flight Recorder: the last collectives before a timeout
"""
