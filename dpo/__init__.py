"""Exact, sharded Direct Preference Optimization: `torchrun -m dpo.train --config FILE`."""
