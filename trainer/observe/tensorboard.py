"""Curves for TensorBoard that have every point once, however often the run was resumed."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging
from google.protobuf.message import DecodeError

# TensorBoard reads every file with 'tfevents' in its name, so neither of these may have it.
_REWRITING = 'rewriting.tmp'
_DAMAGED = 'damaged'


class TensorBoard:
    """Writes event files into one directory; for one process, and after the strategy is built.

    A killed run has left points beyond the checkpoint that the next attempt resumes from. Opening
    the directory takes them out again, since that attempt writes them anew. A point whose tag
    has one at this step or a later one already is left out, so that the steps of a tag always
    increase.

    A record that a killed writer left half written is dropped. A file that is damaged in another
    way keeps what TensorBoard could have read of it, and its original stays beside it with
    'damaged' in the place of 'tfevents' in its name.

    Call `flush` before a checkpoint is committed: a point that is still in memory when the process
    is killed will not be written again by a run that resumes after it.

    Args:
        directory: where the event files are; made when absent.
        resume_step: the step the run goes on from; points beyond it are taken out.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int):
        directory = pathlib.Path(directory)
        self._newest: dict[str, int] = {}
        for path in sorted(directory.glob('*tfevents*')):
            self._rewind(path, resume_step)
        self._writer = tf.summary.create_file_writer(str(directory))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a point of each curve.

        Args:
            step: steps taken.
            values: tag -> value.
        """
        self._write(tf.summary.scalar, step, values)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text, which TensorBoard shows as Markdown.

        Args:
            step: steps taken.
            name: its tag.
            markdown: the text.
        """
        self._write(tf.summary.text, step, {name: markdown})

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the distribution of each array's elements.

        Args:
            step: steps taken.
            values: tag -> array or tensor of numbers, of any shape.
        """
        self._write(tf.summary.histogram, step, values)

    def flush(self) -> None:
        """Returns when everything written so far is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file; nothing can be written afterwards."""
        self._writer.close()

    def _write(self, write, step: int, values: Mapping[str, Any]) -> None:
        with self._writer.as_default():
            for tag, value in values.items():
                if step > self._newest.get(tag, -1):
                    write(tag, value, step=step)
                    self._newest[tag] = step

    def _rewind(self, path: pathlib.Path, resume_step: int) -> None:
        kept, dropped, damage = 0, 0, []
        rewriting = path.with_name(_REWRITING)
        with tf.io.TFRecordWriter(str(rewriting)) as writer:
            for record, event in _read(path, damage):
                # Others, such as the file's version, are about the file and not a step.
                if event.HasField('summary') and event.step > resume_step:
                    dropped += 1
                    continue
                for value in event.summary.value:
                    newest = self._newest.get(value.tag, -1)
                    self._newest[value.tag] = max(newest, event.step)
                writer.write(record)
                kept += 1

        if damage and 'truncated' not in str(damage[0]):
            aside = path.with_name(path.name.replace('tfevents', _DAMAGED))
            while aside.exists():
                aside = aside.with_name(f'{aside.name}.again')
            path.rename(aside)
            logging.warning('Put %s aside, for it is damaged: %s', aside, damage[0])
        if kept and (dropped or damage):
            with open(rewriting, 'rb') as written:
                os.fsync(written.fileno())
            rewriting.replace(path)
        else:
            rewriting.unlink()


def _read(
    path: pathlib.Path, damage: list[Exception]
) -> Iterator[tuple[bytes, tf.compat.v1.Event]]:
    """Yields the records of a file and what they hold; what ends it early goes to `damage`."""
    try:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            yield record, tf.compat.v1.Event.FromString(record)
    except (tf.errors.OpError, DecodeError) as error:
        damage.append(error)
