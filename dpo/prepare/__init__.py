"""`python -m dpo.prepare`: downloads and tokenizes all that a run reads, without GPUs.

arguments.py  the command line; without torch
program.py    downloads, checks and tokenizes; tells steps and disk
"""
