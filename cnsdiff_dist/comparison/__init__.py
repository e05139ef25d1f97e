"""Comparisons of methods under one budget: a suite of runs, its tables and its report."""
