"""The processes of a run: how they connect, decide together, stop and end.

world.py        World (the ranks and lanes of a run), and the mesh that FSDP2 shards over
network.py      the network interface that leads to the other nodes
descriptors.py  the file descriptors that a rank needs, and its limit
timeouts.py     how long ranks wait for each other, by their number
startup.py      the process group: gloo while the input is read, then NCCL and gloo
arrival.py      each rank waits until all have started
slots.py        where each rank of a node stands, and its last sign of life: a file per rank in memory
folders.py      the folder of those files; what killed runs left of theirs; without torch
beats.py        this rank's signs of life; `stand` tells its place; how it leaves the run
elsewhere.py    what is seen of the ranks of other nodes, through the store
causes.py       which rank the others wait for, and why
watcher.py      the process that ends the ranks of a node that cannot end by themselves; without torch
flight.py       PyTorch's Flight Recorder: the last collectives before a timeout
collectives.py  rank 0 decides and all ranks follow; exchanges of Python objects
shared.py       the nodes that do not see a folder
copies.py       one copy of a model reads its tensors, and broadcasts them to the other copies
preemption.py   SIGUSR2 asks a run to save and exit
failures.py     reports of a failure that one rank may meet alone
program.py      how a program of several ranks ends: its exit code, its error in one line
"""
