"""Configuration as plain values: the experiment, its checks, models and norms, the paper's protocol, optional packages.

Imports no other package of this project, and neither JAX nor pandas.
"""
