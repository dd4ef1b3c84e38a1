"""python -m dpo.demo: a small policy learns a preference on two processes.

world.py    the demo's questions, answers and model
program.py  the four parts of the demo, in order
"""
