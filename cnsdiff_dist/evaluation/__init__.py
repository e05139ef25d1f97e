"""Full ranking of a split, and its metrics.

Read in this order: ``top_k`` makes the lists of recommended items, ``metrics`` turns lists into
sums and means, ``evaluator`` does both for a split, and ``adjustment`` fits how much popularity
counts in the score.
"""
