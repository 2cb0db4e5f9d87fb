"""Reads stored results: final accuracies and best cells, cost, the answer, figures, the paper's claims, the report.

May import `store` and `config`; knows neither the program nor the runner.
"""

from smallbatch_jax.study.study import Study as Study
from smallbatch_jax.study.study import choose_base_lrs as choose_base_lrs
from smallbatch_jax.study.study import describe as describe
from smallbatch_jax.study.study import load as load
from smallbatch_jax.study.study import load_all as load_all
