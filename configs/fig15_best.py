"""Fig. 15: the best test accuracy on CIFAR-10 against the batch size, of every network of §3.

Run:    python experiments/figures.py --config=configs/fig15_best.py --out=runs/fig15
        after the configs of the figures named below; what is not there yet is left out and named
Expect: a drawing, no runs of its own, not yet of full runs;
        the paper: always best at m = 32 or smaller, without BN best at m = 2 (§4)
"""

from smallbatch_jax.config.experiment import default_config


def get_config():
    config = default_config()
    config.name = "fig15"
    config.drawn_from = tuple(
        f"runs/{name}" for name in ("fig01", "fig02", "fig03", "fig05", "fig06", "fig07", "fig08", "fig10")
    )
    return config
