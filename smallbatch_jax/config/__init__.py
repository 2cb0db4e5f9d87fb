"""What to train, as plain values: the experiment, how one field is checked, the paper's values, optional packages.

Imports no other package of this project, and neither JAX nor pandas.
"""
