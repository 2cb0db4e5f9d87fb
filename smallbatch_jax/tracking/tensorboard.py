"""TensorBoard as a tracker: an event file for each run in WORKDIR/tensorboard/RUN, by tensorboardX."""

# The protobuf message classes are created at import.
# pyright: reportAttributeAccessIssue=false

import os
import time
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment

DIVERGED = "final/diverged"  # 1 if the run diverged, else 0


class TensorBoardRun:
    """The event file of a run, rewritten from the stored rows by each process that trains the run.

    It replaces earlier files and begins with a START event, which makes an open TensorBoard discard what it has read.
    tensorboardX's `SummaryWriter` is not used: it writes from a thread, which dies silently on a full disk.
    """

    def __init__(self, experiment: Experiment, workdir: Path, name: str, hparams: dict[str, object]):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._epoch = event_pb2.Event, 0
        folder = workdir / "tensorboard" / name
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("*tfevents*"):
            os.truncate(earlier, 0)  # an open TensorBoard stops reading if the file is deleted
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._write(session_log={"status": "START"})
        columns, row, self._success = summary.hparams(hparams, dict.fromkeys((f"final/{experiment.metric.column}", DIVERGED)))
        self._write(summary=columns)
        self._write(summary=row)

    def show(self, points: dict[int, dict[str, float]]) -> None:
        """Adds points to the curves, by epoch; later calls add later epochs."""
        for epoch, scalars in points.items():
            self._epoch = epoch
            self._write(summary={"value": [{"tag": name, "simple_value": value} for name, value in scalars.items()]})
        self._writer.flush()

    def close(self, outcome: dict[str, float]) -> None:
        """Shows how the run ended; `outcome` is empty if another process is to continue it."""
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

        if outcome:
            self.show({self._epoch: outcome})
            if outcome[DIVERGED]:
                content = HParamsPluginData(session_end_info={"status": "STATUS_FAILURE"})
                self._success.value[0].metadata.plugin_data.content = content.SerializeToString()
            self._write(summary=self._success)
        self._writer.close()

    def _write(self, **content: object) -> None:
        self._writer.write_event(self._event(step=self._epoch, wall_time=time.time(), **content))
