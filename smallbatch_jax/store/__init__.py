"""Reads and writes workdirs: results, timings, checkpoints, parameters, owner and provenance.

May import `config` only.
"""
