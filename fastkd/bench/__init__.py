"""The benchmark suite behind ``fastkd bench``: cases, peers, protocol, report and comparison.

Measuring needs only torch; ``python -m fastkd.bench`` is the same command without an install.
"""
