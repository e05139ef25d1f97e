"""Comparisons of methods under one budget.

``suite`` reads a suite and says which runs it makes; ``scheduler`` decides which of them are next
and hands them to the processes of ``workers``, where ``single_run`` does one. ``results`` reads
what finished, ``significance`` tests it, and ``result_tables``, ``report_pages`` and
``report_files`` report it. ``diagnostics`` explains a single run.
"""
