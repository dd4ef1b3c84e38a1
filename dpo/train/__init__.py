"""`python -m dpo.train`: checks the input of a run, builds the run, trains, exports.

__main__.py     reads the command line before torch is imported
words.py        the command line; without torch
program.py      run_training: the run of one config
"""
