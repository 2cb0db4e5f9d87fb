"""TensorBoard's event files: the events of a training run, and the records that hold them.

An event is given its time as it is encoded, and loses it as it is read: so equal events compare equal. tensorboardX's own
writers are not used, as they write from a thread that dies silently where the disk is full, under names with a time in them.
"""

# The messages are made as their modules load.
# pyright: reportAttributeAccessIssue=false

import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams as hparams_summaries

FILE_VERSION = Event(file_version="brain.Event:2")  # opens every file


def scalars(step: int, values: Mapping[str, float]) -> Event:
    """Points of several charts at one step; TensorBoard keeps them in float32."""
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))


def session_start(hparams: Mapping[str, Any], metrics: Iterable[str]) -> Event:
    """A run's row in the table of hyperparameters, and the table's columns: these, and scalars by their names."""
    columns, row, _ = hparams_summaries(dict(hparams), dict.fromkeys(metrics))
    values = [*columns.value, *row.value]
    for value in values:  # maps, in an order that differs from process to process
        plugin = value.metadata.plugin_data
        plugin.content = HParamsPluginData.FromString(plugin.content).SerializeToString(deterministic=True)
    return Event(summary=Summary(value=values))


def session_end(success: bool) -> Event:
    """The status of a run in the table of hyperparameters, which is "running" before."""
    status = Status.Value("STATUS_SUCCESS" if success else "STATUS_FAILURE")
    content = HParamsPluginData(session_end_info=SessionEndInfo(status=status)).SerializeToString(deterministic=True)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=content))
    return Event(summary=Summary(value=[Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)]))


def encode(events: Iterable[Event]) -> bytes:
    """Events as records, at the time of now."""
    timed = Event(wall_time=time.time()).SerializeToString()
    return b"".join(_record(timed + event.SerializeToString()) for event in events)


def read(path: Path) -> tuple[list[Event], int]:
    """The events of a file up to the first record that is torn or damaged, and their bytes; none where there is no file."""
    content = path.read_bytes() if path.exists() else b""
    events, size = [], 0
    while len(content) - size > 16:
        (length,) = struct.unpack_from("<Q", content, size)
        end = size + 16 + length
        data = content[size + 12 : end - 4]
        if content[size:end] != _record(data):
            break
        event = Event.FromString(data)
        event.ClearField("wall_time")
        events.append(event)
        size = end
    return events, size


def _record(data: bytes) -> bytes:
    """Length, its checksum, the data, its checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))
