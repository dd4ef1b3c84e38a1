"""`python -m dpo.replay`: computes steps of a run again, and compares them with what the run recorded.

arguments.py   the command line; without torch
beginning.py   the checkpoint and the config from which the steps are computed again
comparison.py  recorded and replayed metrics: their differences, and the table; pure functions
program.py     computes the steps, compares, and tells
"""
