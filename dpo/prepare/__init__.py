"""`python -m dpo.prepare`: downloads and tokenizes all that a run reads, without GPUs.

arguments.py  the command line; without torch
models.py     downloads and checks models, tokenizers and adapters
program.py    downloads, checks and tokenizes; tells steps and disk
"""
