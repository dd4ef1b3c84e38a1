"""python -m dpo.demo: a small policy learns a preference on two processes.

arguments.py  the command line; without torch
world.py      the demo's questions, answers and model
program.py    the four parts of the demo, in order
"""
