"""(seed, step) -> pairs -> trees -> `StepPlan` -> `PackedBatch`.

order.py       (seed, step) -> ids of pairs
trees.py       pairs -> trees: each prompt once, with each of its completions once
costs.py       FLOPs of trees, by formula
plan.py        trees -> balanced `StepPlan`
block_mask.py  FlexAttention's mask of packed trees, made block by block
layout.py      where prompts and completions stand in a packed row
packing.py     trees -> `PackedBatch`
packer.py      trees of a step -> this lane's micro-batches
"""
