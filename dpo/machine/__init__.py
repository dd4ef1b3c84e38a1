"""The hardware and software of a rank's machine.

facts.py        finds memory, driver, compiler and GPU, without starting CUDA in this process
driver.py       the driver, and GPUs that torch cannot use
toolchain.py    checks that they meet the needs of a run, before any parameters are read
data_sheets.py  a table of GPUs from the data sheets of their makers
job.py          what the environment says of the job: its GPUs, its tasks; without torch
peaks.py        maximum FLOPs per second of a device
versions.py     the tested versions of torch, transformers and Python
"""
