"""From one command to a run: on this machine, on SLURM, many at once; and a table of what came of them.

`python -m launch.submit` validates a config, submits it and says how to follow it (`submit.py`, submitit). Each node
runs one torchrun, the same that a person would type (`node.py`). `--sweep` makes an array (`sweep.py`).
`python -m launch.compare RUN...` reads run folders (`compare.py`). Nothing here imports torch.
"""
