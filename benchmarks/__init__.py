"""Our training step and data path beside other libraries' on the same work: `python -m benchmarks`, or `make bench`.

Everything runs on one thread and is measured in CPU seconds, contestants taking turns within one process, because a
wall clock on a shared machine measures its other users. What counts is the ratio within a round of turns; its median
and its range over the rounds are reported.
"""
