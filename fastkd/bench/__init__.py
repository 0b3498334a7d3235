"""The benchmark suite behind ``fastkd bench``: cases, peers, protocol, report and comparison.

Measuring needs torch alone; ``python -m fastkd.bench`` is the same command where nothing is installed.
"""
