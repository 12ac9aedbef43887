"""What a run has left in TensorBoard's event files, read as TensorBoard reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def scalars(folder: Path) -> Mapping[str, Sequence[float]]:
    """Return the values of each tag."""
    events = _read(folder)
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def text(folder: Path, tag: str) -> str:
    """Return the text of a tag."""
    (event,) = _read(folder).Tensors(f"{tag}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def _read(folder: Path):
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    (file,) = [path for path in folder.rglob("events.out.tfevents.*") if path.parent.name != "hparams"][:1]
    events = module.EventAccumulator(str(file))
    events.Reload()
    return events


def hyperparameters(folder: Path) -> set[str]:
    """Return the names of those that TensorBoard shows of a run: of the first session that was started."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = _read(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    return set(data.session_start_info.hparams)
