"""Runs programs as Ray tasks: `launcher` owns the workdirs, `worker` trains one program.

May import every other package; only the commands import it.
"""
