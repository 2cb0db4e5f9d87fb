"""The computations on devices: one training step, the segment of steps between two visits to the host, evaluation, lanes.

May import `optim`, `models`, `data`, `store` and `config`.
"""
