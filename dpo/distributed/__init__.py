"""The processes of a run: how they find each other, decide together, stop and end.

world.py        World, and the mesh that FSDP2 shards over
network.py      which interface leads to the other nodes
startup.py      the process group: over gloo while input is read, then over the devices
collectives.py  one rank decides, all follow
preemption.py   SIGUSR2 asks a run to save and leave
failures.py     what a rank reports of a failure that the others may not meet
program.py      how a program of several ranks ends: its exit code, its error in one line
"""
