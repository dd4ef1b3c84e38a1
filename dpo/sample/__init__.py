"""`python -m dpo.sample`: answers of models side by side.

arguments.py  the command line; without torch
program.py    generates the answers, and prints them
"""
