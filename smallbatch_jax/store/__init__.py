"""Everything that touches a workdir: results, timings, checkpoints, its owner and provenance, and the files they are in.

May import `config` only.
"""
