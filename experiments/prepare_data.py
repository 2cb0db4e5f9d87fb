"""Downloads and prepares a dataset once, on a machine with a network; training reads it from then on without TensorFlow.

    pip install -e ".[prepare]" && python experiments/prepare_data.py --dataset=cifar10 [--data_dir=DIR]

TensorFlow Datasets does the work and needs TensorFlow for these datasets; reading its array_record files does not.

ImageNet takes 300 GB of disk while it is prepared and 150 GB afterwards; the command says which archives it needs, and where.
"""

import logging
import tarfile
from pathlib import Path

import command
from absl import flags

from smallbatch_jax.config import datasets, extras, fields
from smallbatch_jax.config.experiment import InputError

DATASETS = tuple(name for name, entry in datasets.DATASETS.items() if entry.prepared)
IMAGENET_ARCHIVES = {"ILSVRC2012_img_train.tar": "138 GB", "ILSVRC2012_img_val.tar": "6.3 GB"}

DATASET = flags.DEFINE_string("dataset", None, f"One of {', '.join(DATASETS)}.")
DATA_DIR = command.DEFINE_path("data_dir", "Where to put it; $TFDS_DATA_DIR or ~/tensorflow_datasets by default.")


def main() -> int:
    from smallbatch_jax.data import prepared

    name = fields.choice(DATASETS, "dataset to prepare")("--dataset", command.given(DATASET, "cifar10"))
    folder = Path(DATA_DIR.value or prepared.default_data_dir()).expanduser()
    if not prepared.versions(folder / name):
        if name == "imagenet2012":
            require_archives(folder)
        extras.require("prepare", f"--dataset={name}")
        prepare(name, folder)
    streamed = name == "imagenet2012"  # too large to be loaded
    dataset = prepared.stream_imagenet(folder, 224) if streamed else prepared.load_prepared(name, folder)
    print(f"{name}: {dataset.num_train:,} training and {dataset.num_test:,} test images are ready")
    return 0


def require_archives(folder: Path) -> None:
    """Raises InputError if any of ImageNet's archives is missing."""
    manual = folder / "downloads" / "manual"
    missing = [f"{name} ({size})" for name, size in IMAGENET_ARCHIVES.items() if not (manual / name).is_file()]
    if missing:
        raise InputError(
            f"--dataset: imagenet2012 cannot be downloaded by anyone, and {manual} lacks {' and '.join(missing)}. Register at "
            "https://image-net.org/download-images, download ILSVRC2012 from there, both the training images (task 1 & 2) and "
            f"the validation images (all tasks), put the archives into {manual} as they are, and repeat this command. It "
            "takes 300 GB of disk, the archives included, and 150 GB afterwards, once they are deleted."
        )


def prepare(name: str, folder: Path) -> None:
    """Downloads a dataset and prepares it with TensorFlow Datasets."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would report each attempt
    try:
        import requests
        import tensorflow_datasets as tfds

        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    except ImportError as error:
        raise extras.MissingPackage(f"--dataset={name}", error.name or f"a package ({error})", "prepare") from error
    except requests.RequestException as error:
        host = getattr(error.request, "url", None) or "its host"
        command.leave(f"{name} cannot be downloaded from {host}: no answer; prepare it where the network is.", 1)
    except tarfile.TarError as error:
        raise InputError(f"--dataset: an archive of {name} is damaged ({error}); download it again.") from error


if __name__ == "__main__":
    command.run(main)
