"""Trains grids: the public `sweep`, programs of a grid, runs to lanes, images to programs, plans, progress and signals.

May import every package but `cluster` and `study`.
"""
