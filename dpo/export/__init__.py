"""`python -m dpo.export`: a checkpoint, or adapters and their base -> a model folder.

arguments.py  the command line; without torch
program.py    finds the checkpoint, loads it and writes the folder
adapters.py   adds a folder of adapters to the weights of their base
"""
