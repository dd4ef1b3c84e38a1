"""What a program says: its lines and bars on a terminal, and its log; without torch.

console.py      log lines and progress bars; text made safe for a terminal
drawing.py      draws lines and a bar on a terminal with rich; plain lines elsewhere
log_file.py     the log of a run, a file
stalls.py       tells of a file system that does not answer
"""
