"""`python -m dpo.estimate`: memory, traffic and time of a step on devices that are not here.

The lengths of a step come from the data or are assumed (`lengths`). A step of the same model with few layers then runs
without memory and without ranks (`rehearsal`, timed by `timeline`; for CUDA with attention by `stand_in` and layers by
`compiled`), and few layers are drawn out to many, the optimizer added (`memory`). Bytes and seconds are formulas
(`speed`) over what devices can do (`devices`). What would make it fit is found by trying (`changes`), and so is what
would make a step faster that is bound by traffic (`advice`). What `auto` stands for is decided by the same numbers
(`choice`), for a run at its start (`at_start`). `program` reads the command line, `words` says it.
"""
