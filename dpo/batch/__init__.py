"""(seed, step) -> pairs -> trees -> `StepPlan` -> `PackedBatch`.

order.py       (seed, step) -> ids of pairs
trees.py       pairs -> trees: each prompt once, with each of its completions once
costs.py       the FLOPs of trees, by formula
plan.py        trees -> balanced `StepPlan`
block_mask.py  FlexAttention's mask of a packed row, made block by block
layout.py      where the prompts and completions of a packed row begin and end
packing.py     trees -> `PackedBatch`; begins with a drawing of a packed row
packer.py      the trees of a step -> the micro-batches of this lane
"""
