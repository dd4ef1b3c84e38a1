"""`python -m dpo.sample`: answers of models side by side.

arguments.py  the command line; without torch
questions.py  the prompts of a file, and their token ids
program.py    generates the answers, and prints them
"""
