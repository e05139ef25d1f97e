"""Negative samplers: one file each, one protocol (:mod:`cnsdiff_dist.samplers.protocol`)."""
