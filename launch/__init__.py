"""Starts runs on this machine or on SLURM, singly or as a sweep, and compares their results.

`python -m launch.submit` checks a config, submits it and prints how to follow it. Each node runs one torchrun, the same
command that a person would type. `python -m launch.compare RUN...` reads run folders. Nothing here imports torch; of
dpo the launcher imports base, config, board.hparams and run.files only.

    0  durations.py   SLURM's formats of a duration
    0  failures.py    finds the failure to blame among the failures of all ranks
    0  squeue.py      asks SLURM for the state of a job
    0  supervise.py   torchrun as a child process: signals, time limits
    0  torchrun.py    the command line and environment of torchrun
    1  arguments.py   the command line of the launcher
    1  compare.py     python -m launch.compare
    1  reports.py     the files in which a job reports its state
    2  checks.py      checks before anything is queued
    2  decision.py    decides how the job ended and whether it starts again: a pure function
    2  sweep.py       the runs of a command line
    3  follow.py      shows jobs until they end
    3  node.py        the program on each node of a job; read its table first
    4  executors.py   submitit's executor
    4  here.py        runs on this machine, one after another
    4  slurm_job.py   the callable that submitit runs on SLURM and requeues
    5  submit.py      python -m launch.submit
"""
