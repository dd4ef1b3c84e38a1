"""`python -m dpo.push`: a trained model -> the Hugging Face hub.

arguments.py  the command line; without torch
program.py    finds the model folder, and uploads it
"""
