"""Programs of grids as Ray tasks: who owns the workdirs (`launcher`), the tasks (`ray`), one program on a worker (`worker`).

May import every other package; only the commands import it.
"""
