"""The study in ``docs/study.md``: every algorithm on the embedded model, and claims about credit.

``python -m benchmarks.study`` trains and compares (``entries`` lists the runs, ``results`` reads them,
``report`` and ``plots`` present them); ``python -m benchmarks.study.claims`` measures credit directly.
"""
