"""Downloads and prepares a dataset once, where the network is; training reads it for ever after without TensorFlow.

    pip install -e ".[prepare]" && python experiments/prepare_data.py --dataset=cifar10 [--data_dir=DIR]

TensorFlow Datasets does the work, which for these datasets needs TensorFlow; the files are array_record, which do not.
"""

import command
from absl import flags

from smallbatch_jax.experiment import InputError
from smallbatch_jax.fields import nearest

NEEDS = 'pip install -e ".[prepare]" brings what it needs.'

DATASET = flags.DEFINE_string("dataset", None, "cifar10 or cifar100.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to put it; $TFDS_DATA_DIR or ~/tensorflow_datasets by default.")


def main() -> int:
    from smallbatch_jax.data import prepared

    name = command.given(DATASET, "cifar10")
    if name not in prepared.LOADERS:
        known = list(prepared.LOADERS)
        raise InputError(f"--dataset: nothing to prepare for {name!r}{nearest(name, known)} Known: {', '.join(known)}.")
    import tensorflow_datasets as tfds

    folder = DATA_DIR.value or prepared.default_data_dir()
    try:
        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    except ImportError as error:
        raise InputError(f"--dataset: preparing {name} lacks a package ({error}); {NEEDS}") from error
    dataset = prepared.load_prepared(name, DATA_DIR.value)
    print(f"{name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images are ready")
    return 0


if __name__ == "__main__":
    command.run(main)
