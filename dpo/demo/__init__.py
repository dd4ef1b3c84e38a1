"""python -m dpo.demo: a small policy learns a preference on two processes.

world.py    the demo's questions, answers and model
program.py  its four parts, one after the other
"""
