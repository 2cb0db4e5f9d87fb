"""Trains the finished runs of stored studies once more in plain PyTorch: an independent check of results, not of speed.

    python benchmarks/torch_check.py --workdir=runs/pytorch/fig05 [--workdir=...]

A run sees the same images in the same order on the same schedule; PyTorch initialises it and draws its crops. The accuracies go
into WORKDIR/torch.csv as they come, and the same command resumes; a study that is complete needs neither images nor PyTorch.
Prints for each cell the mean accuracy over the seeds, ours and PyTorch's, and their difference in standard errors, from the
scatter of seeds within the cells of all studies together.
"""

import csv
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import command
import pandas as pd
from absl import flags
from torch_peer import PAD, build_model

from smallbatch_jax import data
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.grid import Run
from smallbatch_jax.config.protocol import LAST_EPOCHS
from smallbatch_jax.config.text import format_base_lr
from smallbatch_jax.data import Dataset, order
from smallbatch_jax.study import analysis, study

WORKDIRS = flags.DEFINE_multi_string("workdir", [], "Folder of a study, with several seeds in each cell.")

CELL = ["batch_size", "base_lr"]
KEY = [*CELL, "seed"]


def main() -> int:
    studies = [study.load(workdir) for workdir in WORKDIRS.value]
    if not studies:
        raise InputError("--workdir: got none; name the folder of a study.")
    tables = [compared(loaded) for loaded in studies]
    scatter = [table.groupby(CELL)[side].var() for table in tables for side in ("ours", "torch")]
    error = math.sqrt(pd.concat(scatter).mean())
    print("| study | m | base_lr | seeds | ours | PyTorch | difference | standard errors |")
    print("|---|---|---|---|---|---|---|---|")
    for loaded, table in zip(studies, tables, strict=True):
        for _, cell in table.reset_index().groupby(CELL):
            m, base_lr = cell[CELL].iloc[0]
            ours, theirs, seeds = 100 * cell["ours"].mean(), 100 * cell["torch"].mean(), len(cell)
            errors = (ours - theirs) / (100 * error * math.sqrt(2 / seeds))
            numbers = f"{ours:.2f} % | {theirs:.2f} % | {ours - theirs:+.2f} | {errors:+.1f} |"
            print(f"| {loaded.name} | {m:.0f} | {format_base_lr(base_lr)} | {seeds} | {numbers}")
    return 0


def compared(loaded: study.Study) -> pd.DataFrame:
    """Returns the finished runs of a study with their accuracies, "ours" and "torch"; trains missing ones in PyTorch."""
    chosen = loaded.experiment
    if chosen.schedule.warmup_fraction or chosen.schedule.batch_growth > 1 or chosen.optimizer.name != "sgd":
        raise InputError(
            f"--workdir: {loaded.workdir} has warm-up, growing batches or an optimizer, which PyTorch does not train here."
        )
    if not (loaded.rows["status"] == "finished").any():
        raise InputError(f"--workdir: {loaded.workdir} has no finished run to train again.")
    cells = [analysis.final_accuracy(rows).assign(seed=seed) for seed, rows in loaded.rows.groupby("seed")]
    ours = pd.concat(cells).dropna(subset="test_accuracy").set_index(KEY)["test_accuracy"]
    stored = loaded.workdir / "torch.csv"
    known = pd.read_csv(stored).set_index(KEY)["torch"] if stored.exists() else pd.Series(dtype=float)
    missing = [run for run in chosen.runs() if run_key(run) in ours.index and run_key(run) not in known.index]
    if missing:
        train_all(chosen, missing, stored)
    theirs = pd.read_csv(stored).set_index(KEY)["torch"]
    return pd.DataFrame({"ours": ours, "torch": theirs}).dropna()


def train_all(chosen: Experiment, runs: Sequence[Run], stored: Path) -> None:
    """Trains runs in PyTorch, one per core at a time, and appends the accuracy of each to a file as it ends."""
    images = data.load_section(chosen.dataset)
    if not isinstance(images, Dataset):
        raise InputError(f"--workdir: {stored.parent} has streamed images, which PyTorch does not train here.")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool, stored.open("a", newline="") as file:
        rows = csv.writer(file)
        if not file.tell():
            rows.writerow([*KEY, "torch"])
        waiting = {pool.submit(train, chosen, images, run): run for run in runs}
        for done in as_completed(waiting):
            rows.writerow([*run_key(waiting[done]), done.result()])
            file.flush()


def run_key(run: Run) -> tuple[int, float, int]:
    return run.batch_size, run.base_lr, run.seed


def train(chosen: Experiment, images: Dataset, run: Run) -> float:
    """Returns the median test accuracy over the last epochs of a run on one thread."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    network = build_model(chosen.model.name, chosen.model.norm, images.num_classes or 0, images.image_shape)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    network = network.to(memory_format=torch.channels_last)
    mean, deviation = images.channel_statistics()
    train_set, test_set = (
        torch.from_numpy(((x - mean) / deviation).transpose(0, 3, 1, 2)) for x in (images.train_images, images.test_images)
    )
    train_labels, test_labels = (torch.from_numpy(np.int64(x)) for x in (images.train_labels, images.test_labels))
    m, count = run.batch_size, images.num_train
    total = order.total_steps(chosen.epochs, count, m)
    optimizer = torch.optim.SGD(network.parameters(), run.base_lr * m, weight_decay=chosen.weight_decay)
    milestones = [math.ceil(boundary * total) for boundary in chosen.schedule.boundaries]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, chosen.schedule.factor)
    accuracies = []
    for epoch in range(chosen.epochs):
        network.train()
        for step in range(order.epoch_end(epoch, count, m), order.epoch_end(epoch + 1, count, m)):
            chosen_examples = order.stream(run.seed, step * m, m, count)
            batch = train_set[chosen_examples]
            if chosen.dataset.augment:
                batch = crop_and_flip(batch)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(batch), train_labels[chosen_examples]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            if chosen.model.bn_statistics == "precise":
                torch.optim.swa_utils.update_bn(train_set.split(m)[: count // m], network)
            network.eval()
            found = torch.cat([network(batch).argmax(1) for batch in test_set.split(500)])
        accuracies.append((found == test_labels).double().mean().item())
    return float(np.median(accuracies[-LAST_EPOCHS:]))


def crop_and_flip(batch):
    """Returns a random crop of each image [n, C, H, W], padded by zeros and flipped at random."""
    import torch  # pyright: ignore[reportMissingImports]

    n, _, height, width = batch.shape
    rows = torch.randint(0, 2 * PAD + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * PAD + 1, (n, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = torch.nn.functional.pad(batch, (PAD,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


if __name__ == "__main__":
    command.run(main)
