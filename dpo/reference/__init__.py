"""`python -m dpo.reference`: fills the cache of reference log-probabilities.

arguments.py  the command line; without torch
program.py    computes the rows that the cache lacks
"""
