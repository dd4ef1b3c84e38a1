"""`python -m dpo.train`: checks the input of a run, builds the run, trains, exports.

words.py    the command line; without torch
program.py  run_training: the run of one config
"""
