"""Benchmarks of text-to-image models: generation, scoring, intervals and reports.

A benchmark is one file in ``flowgrpo/bench/benchmarks``, or a class of one's own by import path. What
all of them share lives here: ``base`` (what a benchmark is), ``generation`` (folders of images),
``scoring`` (judgements that survive being killed), ``statistics`` (intervals) and ``report``.
Importing this package imports nothing heavy.
"""
