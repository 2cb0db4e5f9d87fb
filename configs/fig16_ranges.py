"""Fig. 16: the range of base learning rates that converge reliably against the batch size, CIFAR-10 and CIFAR-100.

Run:    python experiments/figures.py --config=configs/fig16_ranges.py --out=runs/fig16
        after the configs of the figures named below; what is not there yet is left out and named
Expect: a drawing, no runs of its own, not yet of full runs; the paper: the range narrows as the batch grows (§4)
"""

from smallbatch_jax.config.experiment import default_config


def get_config():
    config = default_config()
    config.name = "fig16"
    without_bn, with_bn = ("fig01", "fig02", "fig03"), ("fig05", "fig06", "fig07", "fig08", "fig09", "fig10", "fig11")
    config.drawn_from = tuple(f"runs/{name}" for name in without_bn + with_bn)
    return config
