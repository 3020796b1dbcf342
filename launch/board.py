"""TensorBoard beside a job: started with it for this host's eyes only, and told how it went."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from launch import child
from launch.local import free_ports


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Runs TensorBoard on a directory until the block is left; gives its address.

    It listens on loopback alone: whoever reaches TensorBoard can read all that is in `logdir`.
    """
    (port,) = free_ports(1)
    arguments = (f'--logdir={logdir}', '--host=127.0.0.1', f'--port={port}')
    process = subprocess.Popen(
        child.command('tensorboard.main', *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f'http://127.0.0.1:{port}/'
    finally:
        process.kill()
        process.wait()


def write_text(directory: Path, step: int, name: str, markdown: str) -> None:
    """Adds a text to what TensorBoard shows.

    Args:
        directory: where event files go; made when absent.
        step: steps taken.
        name: its tag.
        markdown: the text.

    Raises:
        OSError: it cannot be written.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name='text')
    tensor = TensorProto(
        dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=TensorShapeProto()
    )
    value = Summary.Value(tag=name, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
    write_events(directory, step, value)


def write_events(directory: Path, step: int, value) -> None:
    """Adds a file with one value, without TensorFlow, which takes seconds to load.

    Args:
        directory: where event files go; made when absent.
        step: steps taken.
        value: a `Summary.Value` of TensorBoard.

    Raises:
        OSError: it cannot be written.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    events = [
        Event(wall_time=now, file_version='brain.Event:2'),
        Event(wall_time=now, step=step, summary=Summary(value=[value])),
    ]
    directory.mkdir(exist_ok=True)
    with open(directory / f'events.out.tfevents.{time.time_ns()}', 'xb') as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
