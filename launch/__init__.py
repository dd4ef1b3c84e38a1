"""From one command to a run: on this machine, on SLURM, many at once; and a table of what came of them.

`python -m launch.submit` validates a config, submits it and says how to follow it. Each node runs one torchrun, the
same that a person would type. `python -m launch.compare RUN...` reads run folders. Nothing here
imports torch: of dpo only base, config, board.hparams and run.files.

    0  durations.py   SLURM's ways to write a duration
    0  failures.py    who failed first, of all ranks
    0  squeue.py      what SLURM says of its jobs
    0  supervise.py   torchrun as a child: signals, time limits
    0  torchrun.py    its command line and environment
    1  arguments.py   the command line of the launcher
    1  reports.py     the files by which a job tells how it stands
    2  checks.py      what is refused before anything is queued
    2  decision.py    how the job ended, and what becomes of it: a pure function
    2  sweep.py       the runs of a command line
    3  follow.py      a job until its end
    3  node.py        what runs on each node of a job; read its table first
    4  executors.py   submitit's executor
    4  here.py        runs on this machine, one after the other
    4  slurm_job.py   what submitit runs on SLURM, and requeues
    5  submit.py      python -m launch.submit
    1  compare.py     python -m launch.compare
"""
