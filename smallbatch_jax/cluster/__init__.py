"""Programs of grids as Ray tasks: the workdirs' owner (`launcher`), a program on a worker (`worker`).

May import every other package; only the commands import it.
"""
