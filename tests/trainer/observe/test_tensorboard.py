import collections
import logging

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.observe.tensorboard import TensorBoard


def steps(directory):
    """{tag: the steps of its points in the order TensorBoard reads them}."""
    found = collections.defaultdict(list)
    for path in sorted(directory.glob('*tfevents*')):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                found[value.tag].append(event.step)
    return dict(found)


def write(directory, first, last, *, resume_step, tags=('loss',)):
    board = TensorBoard(directory, resume_step=resume_step)
    for step in range(first, last + 1):
        board.scalars(step, dict.fromkeys(tags, float(step)))
    board.close()


def only_file(directory):
    (path,) = directory.glob('*tfevents*')
    return path


def test_tensorboard_reads_scalars_texts_and_histograms(tmp_path):
    board = TensorBoard(tmp_path / 'train', resume_step=0)
    board.scalars(1, {'loss': 0.5, 'accuracy': 0.25})
    board.text(1, 'config', '# Title\n    a = 1')
    board.histograms(1, {'kernel': np.arange(6.0).reshape(2, 3)})
    board.flush()
    reader = EventAccumulator(str(tmp_path / 'train'))
    reader.Reload()
    assert set(reader.Tags()['tensors']) == {'loss', 'accuracy', 'config', 'kernel'}
    assert tf.make_ndarray(reader.Tensors('loss')[0].tensor_proto) == 0.5
    assert tf.make_ndarray(reader.Tensors('config')[0].tensor_proto) == b'# Title\n    a = 1'
    buckets = tf.make_ndarray(reader.Tensors('kernel')[0].tensor_proto)
    assert buckets[:, 2].sum() == 6
    board.close()


def test_after_kills_and_resumes_the_steps_of_every_tag_increase(tmp_path):
    board = TensorBoard(tmp_path, resume_step=0)
    board.text(0, 'config', 'a')
    for step in range(1, 13):
        board.scalars(step, {'loss': 1.0})
        if step % 4 == 0:
            board.scalars(step, {'eval/loss': 1.0})
    board.flush()  # Killed here: never closed. The newest checkpoint is of step 8.
    write(tmp_path, 9, 10, resume_step=8)  # Killed again, before the next checkpoint.
    board = TensorBoard(tmp_path, resume_step=8)
    board.text(0, 'config', 'a')  # What a start writes is there already,
    board.scalars(8, {'eval/loss': 1.0})  # and so is an evaluation that is made again.
    for step in range(9, 13):
        board.scalars(step, {'loss': 1.0})
    board.scalars(12, {'eval/loss': 1.0})
    board.close()
    assert steps(tmp_path) == {
        'loss': list(range(1, 13)),
        'eval/loss': [4, 8, 12],
        'config': [0],
    }


def test_a_file_without_later_points_is_not_touched(tmp_path):
    write(tmp_path, 1, 5, resume_step=0)
    path = only_file(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    TensorBoard(tmp_path, resume_step=5).close()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_rewritten_file_keeps_its_version_and_leaves_no_litter(tmp_path):
    write(tmp_path, 1, 5, resume_step=0)
    path = only_file(tmp_path)
    TensorBoard(tmp_path, resume_step=2).close()
    first = next(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert tf.compat.v1.Event.FromString(first).file_version == 'brain.Event:2'
    assert all('tfevents' in each.name for each in tmp_path.iterdir())


@pytest.mark.parametrize('missing_bytes', [1, 20])
def test_a_record_cut_off_by_a_kill_is_dropped(tmp_path, missing_bytes):
    write(tmp_path, 1, 5, resume_step=0)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    write(tmp_path, 5, 6, resume_step=5)
    assert steps(tmp_path) == {'loss': [1, 2, 3, 4, 5, 6]}
    assert not list(tmp_path.glob('*damaged*'))


def test_a_damaged_file_keeps_what_is_readable_and_its_original_is_put_aside(tmp_path, caplog):
    caplog.set_level(logging.WARNING, 'absl')
    write(tmp_path, 1, 5, resume_step=0)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    TensorBoard(tmp_path, resume_step=5).close()
    readable = steps(tmp_path)['loss']
    assert readable == list(range(1, len(readable) + 1))
    assert 0 < len(readable) < 5
    (aside,) = tmp_path.glob('*damaged*')
    assert aside.read_bytes() == bytes(content)
    assert aside.name in caplog.text


def test_a_file_of_something_else_is_put_aside_whole(tmp_path):
    for _ in range(2):  # A second one with the same name does not overwrite the first.
        (tmp_path / 'events.out.tfevents.1').write_bytes(b'something else' * 10)
        write(tmp_path, 1, 2, resume_step=0)
    assert steps(tmp_path) == {'loss': [1, 2]}
    assert len(list(tmp_path.glob('*damaged*'))) == 2


def test_records_that_are_no_events_are_damage(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / 'events.out.tfevents.1')) as writer:
        writer.write(b'no event')
    write(tmp_path, 1, 2, resume_step=0)
    assert steps(tmp_path) == {'loss': [1, 2]}
    assert len(list(tmp_path.glob('*damaged*'))) == 1


def test_an_empty_file_is_left_alone(tmp_path):
    (tmp_path / 'events.out.tfevents.1').touch()
    write(tmp_path, 1, 2, resume_step=0)
    assert steps(tmp_path) == {'loss': [1, 2]}
