"""Trains grids: the public `sweep`, jobs and their scheduler, input pipelines, cost plans, searches, progress and signals.

May import every package but `cluster` and `study`.
"""
