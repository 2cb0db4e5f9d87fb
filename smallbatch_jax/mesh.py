"""The mesh of devices that train together, of two axes.

Along "lane" each row of devices holds lanes of its own; along "data" the devices of a row share the examples of every batch,
and each holds the same state.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

LANE, DATA = "lane", "data"


def lane_mesh(devices: Sequence[Any] | None = None, data_devices: int = 1) -> Mesh:
    """All devices, `data_devices` consecutive ones of which share each batch; a divisor of their number."""
    return Mesh(np.array(jax.devices() if devices is None else devices).reshape(-1, data_devices), (LANE, DATA))
