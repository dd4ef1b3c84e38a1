"""`python -m dpo.inspect`: what the trainer will really see of its data, without a GPU and without weights.

From the pairs that are trained on to numbers (`lengths`, `statistics`, `step_tokens`) and examples (`shown_pairs`), all
in one value (`inspection`); from that value to sentences and rows of tables (`words`), and these on a terminal
(`terminal`) and on a page (`page`). `program` reads the command line.
"""
