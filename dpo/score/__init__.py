"""`python -m dpo.score`: margins and accuracy of any model on any pairs.

arguments.py  the command line; without torch
program.py    scores the pairs, and prints the metrics
"""
