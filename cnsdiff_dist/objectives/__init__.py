"""Objectives: one file each, one protocol (:mod:`cnsdiff_dist.objectives.protocol`)."""
