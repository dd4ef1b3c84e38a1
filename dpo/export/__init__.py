"""`python -m dpo.export`: a checkpoint -> a model folder.

arguments.py  the command line; without torch
program.py    finds the checkpoint, loads it and writes the folder
"""
