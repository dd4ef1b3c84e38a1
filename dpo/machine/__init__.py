"""What a rank's machine has and can do.

facts.py        memory, driver, compiler and GPU, looked at without starting CUDA in this process
toolchain.py    whether they are what a run needs, asked before weights are read
data_sheets.py  GPUs by their makers' data sheets
peaks.py        FLOPs per second that a device can do at most
versions.py     the tested versions of torch, transformers and Python
"""
