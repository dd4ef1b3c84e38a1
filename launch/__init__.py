"""Starts runs on this machine or on SLURM, singly or as a sweep, and compares their results.

`python -m launch.submit` checks a config, submits it and prints how to follow it. Each node runs one torchrun, the same
command that a person would type. `python -m launch.compare RUN...` reads run folders. Nothing here imports torch; of
dpo the launcher imports what reads configs and run folders only (a contract in pyproject.toml).

    0  durations.py   SLURM's formats of a duration
    0  failures.py    collects the failures of a node's ranks
    0  output.py      the output of torchrun and its ranks, which is bounded
    0  squeue.py      asks SLURM for the state of a job
    0  supervise.py   torchrun as a child process: signals, time limits
    0  stops.py       records the signals that stop a job
    0  torchrun.py    the command line and environment of torchrun
    1  flags.py       the flags of the launcher, with their help texts
    1  site.py        asks SLURM what the nodes of a partition have
    2  compare.py     python -m launch.compare
    2  reports.py     the files in which a job reports its state
    2  sbatch.py      the options of sbatch that a command line asks for
    3  arguments.py   the command line of the launcher
    4  checks.py      checks before anything is queued
    4  containers.py  the folders that a container must see, and the command that enters it
    4  decision.py    decides how the job ended and whether it starts again: a pure function
    4  forecast.py    asks dpo.estimate, in a process of its own, what a run needs
    4  sweep.py       the runs of a command line
    5  follow.py      shows jobs until they end
    5  node.py        the program on each node of a job; read its table first
    5  resources.py   derives the time to save, memory, CPUs and restarts: pure functions
    6  executors.py   submitit's executor
    6  here.py        runs on this machine, one after another
    6  known.py       learns what a run needs and what the cluster gives
    6  slurm_job.py   the callable that submitit runs on SLURM and requeues
    7  submit.py      python -m launch.submit
"""
