"""The buckets of a histogram."""

import numpy as np

NUM_BINS = 30
"""The maximum number of buckets; TensorBoard draws that many."""


def bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of values per bucket, and the edges of the buckets, one more, in ascending order.

    A bucket of integers, such as lengths, holds a whole number of successive integers, as many as every other one:
    buckets of any width hold n integers here and n + 1 there, or none, and are drawn as a comb.

    Args:
        values: an array of finite numbers, any shape, at least one.
    """
    values = np.asarray(values).ravel()
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.integer):
        width = -(-(int(high) - int(low) + 1) // NUM_BINS)
        num_bins = (int(high) - int(low)) // width + 1
        edges = int(low) - 0.5 + width * np.arange(num_bins + 1)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1) if low < high else np.array([low - 0.5, low + 0.5])
    counts, _ = np.histogram(values, edges)
    return counts, edges
