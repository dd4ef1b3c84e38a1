"""The processes of a run: how they connect, decide together and end.

world.py        World (the ranks and lanes of a run), and the mesh that FSDP2 shards over
network.py      the network interface that leads to the other nodes
descriptors.py  the file descriptors that a rank needs, and its limit
timeouts.py     how long ranks wait for each other, by their number
startup.py      the process group: gloo while the input is read, then NCCL and gloo
collectives.py  rank 0 decides and all ranks follow; exchanges of Python objects
shards.py       the rows of a sharded tensor that this rank holds
shared.py       the nodes that do not see a folder
copies.py       one copy of a model reads its tensors, and broadcasts them to the other copies
preemption.py   SIGUSR2 asks a run to save and exit
program.py      how a program of several ranks ends: its exit code, its error in one line
"""
