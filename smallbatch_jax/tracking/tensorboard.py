"""TensorBoard as a tracker: an event file for each run in WORKDIR/tensorboard/RUN, by tensorboardX."""

# The messages are made as their modules load.
# pyright: reportAttributeAccessIssue=false

import os
import time
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment, Run
from smallbatch_jax.store.results import Row
from smallbatch_jax.tracking.metrics import DIVERGED, FINAL_ACCURACY, hparams, name_of, scalars


class TensorBoardRun:
    """The event file of a run, rewritten from the stored rows by each process that trains the run.

    It replaces the file before it, and begins with a START event, at which an open TensorBoard drops what it has read.
    tensorboardX's `SummaryWriter` is not used: it writes from a thread, which dies silently on a full disk.
    """

    def __init__(self, experiment: Experiment, workdir: Path, run: Run):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self.shown, self._event = 0, event_pb2.Event
        folder = workdir / "tensorboard" / name_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("*tfevents*"):
            os.truncate(earlier, 0)  # an open TensorBoard reads no further if it is gone
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._write(0, session_log={"status": "START"})
        columns, row, self._success = summary.hparams(hparams(experiment, run), dict.fromkeys((FINAL_ACCURACY, DIVERGED)))
        self._write(0, summary=columns)
        self._write(0, summary=row)

    def show(self, rows: list[Row]) -> None:
        for row in rows:
            self._write_scalars(row.epoch, scalars(row))
        self._writer.flush()

    def end(self, epoch: int, outcome: dict[str, float]) -> None:
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

        self._write_scalars(epoch, outcome)
        if outcome[DIVERGED]:
            content = HParamsPluginData(session_end_info={"status": "STATUS_FAILURE"})
            self._success.value[0].metadata.plugin_data.content = content.SerializeToString()
        self._write(epoch, summary=self._success)
        self._writer.close()

    def close(self) -> None:
        self._writer.close()

    def _write_scalars(self, epoch: int, values: dict[str, float]) -> None:
        self._write(epoch, summary={"value": [{"tag": name, "simple_value": value} for name, value in values.items()]})

    def _write(self, step: int, **content: object) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))
