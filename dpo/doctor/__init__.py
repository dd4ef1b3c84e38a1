"""`python -m dpo.doctor`: will it run here, and how fast.

Every part of the examination is measured on all ranks and told by rank 0 (`parts` joins the two and keeps what fails on
one rank from holding up the others): versions, toolchain and devices (`machine`), matrix products and collectives
(`speed`), the disks of the run folder and of the cache (`storage`), the model's share of memory (`model`), attention
(`attention`). `program` reads the command line and lists the parts, `words` lays out what they found.
"""
