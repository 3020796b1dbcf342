import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone

import numpy as np
import pytest
import tensorflow as tf

from tests import disks
from trainer import checkpoint, proof
from trainer.checkpoint import (
    CheckpointDamaged,
    Checkpoints,
    CheckpointWriteError,
    Keep,
    state_sha256,
)
from trainer.errors import ConfigError

DATA, INDEX, MANIFEST = 'state.data-00000-of-00001', 'state.index', 'manifest.json'


@pytest.fixture(autouse=True)
def _quick_and_loud(monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, 'RETRY_SECONDS', (0.01, 0.01))
    caplog.set_level(logging.INFO, logger='absl')


def state(step, size=1000):
    """A small state in which every value tells the step."""
    return {
        'dense/kernel': tf.fill([size // 10, 10], tf.constant(step, tf.float32)),
        'dense/bias': tf.cast(tf.range(10), tf.bfloat16) * tf.cast(step, tf.bfloat16),
        'phalanx/step': np.int64(step),
    }


def save(checkpoints, *steps, **manifest):
    for step in steps:
        checkpoints.save(state(step), {'step': step, 'seed': 7, **manifest})
    checkpoints.wait()


def assert_is_state(tensors, step):
    assert state_sha256(tensors) == state_sha256(state(step))


def names(directory):
    return sorted(os.listdir(directory))


def flip_bit(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x10
    path.write_bytes(content)


def edit_manifest(directory, *, resigned=True, **changes):
    """Changes entries of the manifest, with its own checksum made right again or not."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest.update(changes)
    if resigned:
        manifest['manifest_sha256'] = proof._manifest_sha256(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


# ---- A checkpoint that nothing happened to.


def test_a_saved_state_comes_back_bit_by_bit_with_dtypes_and_shapes(tmp_path):
    tensors = {
        'b': tf.constant([1.0, -0.0, float('nan'), float('inf'), 1e-40], tf.bfloat16),
        'f16': np.array([[1, 2], [3, 65504]], np.float16),
        'f32': tf.random.normal([3, 4, 5], seed=1),
        'i64': np.int64(2**62 + 1),
        'u8': np.arange(256, dtype=np.uint8),
        'bool': np.array([True, False]),
        'empty': np.zeros((0, 3), np.float32),
        'a path/with:odd ~2 näme': np.float32(1.5),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(tensors, {'step': 1})
    checkpoints.wait()
    read, manifest = Checkpoints(tmp_path).read(1)
    assert list(read) == sorted(tensors)
    for path, tensor in tensors.items():
        expected = np.asarray(tensor)
        assert (read[path].dtype, read[path].shape) == (expected.dtype, expected.shape)
        assert read[path].tobytes() == expected.tobytes()
    assert manifest['state_sha256'] == state_sha256(tensors) == state_sha256(read)


def test_tensorflow_reads_the_files_by_variable_path(tmp_path):
    save(Checkpoints(tmp_path), 400)
    reader = tf.train.load_checkpoint(str(tmp_path / 'step-00000400' / 'state'))
    assert reader.get_variable_to_shape_map()['dense/kernel'] == [100, 10]
    assert reader.get_tensor('phalanx/step') == 400


def test_the_manifest_holds_the_record_and_what_proves_the_files(tmp_path):
    checkpoints = Checkpoints(tmp_path, clock=lambda: 1_800_000_000.5)
    save(checkpoints, 400, metrics={'eval/loss': np.float32(0.5), 'train/loss': float('nan')})
    _, manifest = checkpoints.read(400)
    assert manifest['seed'] == 7
    assert manifest['format'] == 1
    assert manifest['metrics'] == {'eval/loss': 0.5, 'train/loss': None}
    created = datetime.fromisoformat(manifest['created'])
    assert created == datetime.fromtimestamp(1_800_000_000.5, timezone.utc)
    assert sorted(manifest['files']) == [DATA, INDEX]
    for name, entry in manifest['files'].items():
        file = tmp_path / 'step-00000400' / name
        assert entry == {'size': file.stat().st_size, 'sha256': proof._file_sha256(file)}
    assert names(tmp_path) == ['step-00000400']


@pytest.mark.parametrize(
    'other',
    [
        {'x': np.float32([1, 2, 3])},
        {'y': np.float32([1, 2])},
        {'x': np.float32([[1, 2]])},
        {'x': np.float32([1, 2]).view(np.int32)},
        {'x': np.nextafter(np.float32([1, 2]), np.float32(9))},
        {'x': np.float32([1]), 'x2': np.float32([2])},
    ],
)
def test_state_sha256_tells_path_dtype_shape_and_bytes(other):
    assert state_sha256(other) != state_sha256({'x': np.float32([1, 2])})


def test_state_sha256_does_not_depend_on_order_kind_or_memory_layout():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.int64(3)
    expected = state_sha256({'a': a, 'b': b})
    assert state_sha256({'b': tf.constant(b), 'a': tf.constant(a)}) == expected
    assert state_sha256({'a': np.asfortranarray(a), 'b': b}) == expected


def test_a_fresh_directory_and_one_with_litter_begin_at_step_0(tmp_path):
    assert Checkpoints(tmp_path / 'missing').newest_good() is None
    (tmp_path / '.tmp-step-00000400-17').mkdir()
    (tmp_path / '.tmp-step-00000400-17' / DATA).write_bytes(b'half')
    (tmp_path / '.trash-step-00000100-17').mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_good() is None
    checkpoints.clean()
    assert names(tmp_path) == []


def test_clean_leaves_checkpoints_quarantine_and_strange_files(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (tmp_path / 'quarantine').mkdir()
    (tmp_path / 'notes.txt').write_text('mine')
    checkpoints.clean()
    assert names(tmp_path) == ['notes.txt', 'quarantine', 'step-00000001']


def test_litter_of_the_same_process_id_does_not_disturb_a_save(tmp_path):
    litter = tmp_path / f'.tmp-step-00000001-{os.getpid()}'
    litter.mkdir()
    (litter / 'junk').write_text('old')
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    assert checkpoints.newest_good() == 1
    assert sorted(checkpoints.read(1)[1]['files']) == [DATA, INDEX]


def test_steps_are_ascending_and_only_committed_ones(tmp_path):
    save(Checkpoints(tmp_path), 200, 100)
    for name in ('step-400', 'step-000000500', 'step-00000600.old', '.tmp-step-00000700-1'):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps() == [100, 200]


def test_newest_good_spares_the_following_read_the_work(tmp_path, monkeypatch):
    save(Checkpoints(tmp_path), 1)
    checkpoints, loads = Checkpoints(tmp_path), []
    load = proof.load
    monkeypatch.setattr(proof, 'load', lambda path: loads.append(path) or load(path))
    assert_is_state(checkpoints.read(checkpoints.newest_good())[0], 1)
    assert len(loads) == 1
    assert_is_state(checkpoints.read(1)[0], 1)
    assert len(loads) == 2


def test_an_existing_good_step_is_never_written_again(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    inode = (tmp_path / 'step-00000005' / DATA).stat().st_ino
    save(checkpoints, 5)
    assert 'Step 5 is saved already.' in caplog.text
    checkpoints.save(state(6), {'step': 5})
    checkpoints.close()
    assert 'saved already, with another state' in caplog.text
    assert (tmp_path / 'step-00000005' / DATA).stat().st_ino == inode
    assert_is_state(checkpoints.read(5)[0], 5)


def test_an_existing_damaged_step_is_set_aside_and_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    flip_bit(tmp_path / 'step-00000005' / DATA)
    save(checkpoints, 5)
    assert_is_state(checkpoints.read(5)[0], 5)
    assert names(tmp_path / 'quarantine') == ['step-00000005']


def test_save_returns_before_the_write_ends_and_wait_after_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    big = {'x': np.zeros(2**24, np.float32)}
    checkpoints.save(big, {'step': 1})
    assert checkpoints.steps() == []
    checkpoints.save(big, {'step': 2})
    assert 1 in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_a_synchronous_save_has_ended_when_it_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(state(1), {'step': 1})
    assert Checkpoints(tmp_path).newest_good() == 1


def test_a_mistake_in_the_manifest_is_raised_at_once_and_one_in_the_state_by_wait(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError):
        checkpoints.save(state(1), {'step': 1, 'model': object()})
    checkpoints.save({'x': np.array([object()])}, {'step': 1})
    with pytest.raises(TypeError):
        checkpoints.wait()
    assert names(tmp_path) == []


# ---- Damage to the newest of two.


def missing(directory):
    (directory / DATA).unlink()


def truncated(directory):
    os.truncate(directory / DATA, (directory / DATA).stat().st_size // 2)


def link_out(directory):
    (directory / DATA).rename(directory.parent / 'elsewhere')
    (directory / DATA).symlink_to(directory.parent / 'elsewhere')


def path_out(directory):
    shutil.copy(directory / DATA, directory.parent / 'elsewhere')
    files = json.loads((directory / MANIFEST).read_text())['files']
    edit_manifest(directory, files={'../elsewhere': files[DATA], INDEX: files[INDEX]})


def wrong_file_sha(directory):
    files = json.loads((directory / MANIFEST).read_text())['files']
    files[DATA]['sha256'] = '0' * 64
    edit_manifest(directory, files=files)


def no_index_in_manifest(directory):
    files = json.loads((directory / MANIFEST).read_text())['files']
    edit_manifest(directory, files={DATA: files[DATA]})
    (directory / INDEX).unlink()


def state_of_another_step(directory):
    for name in (DATA, INDEX, MANIFEST):
        shutil.copy(directory.parent / 'step-00000100' / name, directory / name)


def file_in_place_of_directory(directory):
    shutil.rmtree(directory)
    directory.write_text('?')


def fifo(directory):
    (directory / MANIFEST).unlink()
    os.mkfifo(directory / MANIFEST)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES = {
    'bit in data': (lambda d: flip_bit(d / DATA), f'sha256 of {DATA} is not'),
    'bit in index': (lambda d: flip_bit(d / INDEX), f'sha256 of {INDEX} is not'),
    'bit in manifest': (lambda d: flip_bit(d / MANIFEST), MANIFEST),
    'data truncated': (truncated, f'{DATA} has '),
    'index empty': (lambda d: (d / INDEX).write_bytes(b''), f'{INDEX} has 0 bytes'),
    'data missing': (missing, f'{DATA}: No such file'),
    'manifest missing': (lambda d: (d / MANIFEST).unlink(), f'{MANIFEST}: No such file'),
    'manifest empty': (lambda d: (d / MANIFEST).write_text(''), 'is no JSON'),
    'manifest not UTF-8': (lambda d: (d / MANIFEST).write_bytes(b'\xff\xfe{'), 'is no JSON'),
    'manifest too deep': (lambda d: (d / MANIFEST).write_text('[' * 10**5), 'is no JSON'),
    'manifest a list': (lambda d: (d / MANIFEST).write_text('[]'), 'own checksum'),
    'manifest half': (lambda d: os.truncate(d / MANIFEST, 200), 'is no JSON'),
    'seed changed': (lambda d: edit_manifest(d, resigned=False, seed=8), 'own checksum'),
    'no files': (lambda d: edit_manifest(d, files={}), 'incomplete'),
    'file without sha': (lambda d: edit_manifest(d, files={DATA: None}), 'incomplete'),
    'format unknown': (lambda d: edit_manifest(d, format='one'), 'incomplete'),
    'wrong file sha': (wrong_file_sha, f'sha256 of {DATA} is not'),
    'wrong state sha': (lambda d: edit_manifest(d, state_sha256='0' * 64), 'state_sha256'),
    'index not in manifest': (no_index_in_manifest, 'TensorFlow cannot read'),
    'another step': (state_of_another_step, 'is of step 100'),
    'name out of the directory': (path_out, 'outside the checkpoint'),
    'link': (link_out, f'{DATA} is no regular file'),
    'fifo': (fifo, f'{MANIFEST} is no regular file'),
    'empty directory': (empty, f'{MANIFEST}: No such file'),
    'file in place of directory': (file_in_place_of_directory, 'Not a directory'),
}


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp('two')
    save(Checkpoints(directory), 100, 200)
    return directory


@pytest.fixture
def two(two_saved, tmp_path):
    return shutil.copytree(two_saved, tmp_path / 'two')


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_to_the_newest_falls_back_to_the_one_before_and_says_so(two, damage, caplog):
    do, reason = DAMAGES[damage]
    do(two / 'step-00000200')

    reader = Checkpoints(two, writer=False)
    assert reader.newest_good() == 100
    assert names(two)[-2:] == ['step-00000100', 'step-00000200']  # A reader moves nothing.
    with pytest.raises(CheckpointDamaged, match='step-00000200') as error:
        reader.read(200)
    assert reason in str(error.value)

    caplog.clear()
    checkpoints = Checkpoints(two)
    assert checkpoints.newest_good() == 100
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert 'checkpoint of step 200 is damaged' in warnings[0]
    assert reason in warnings[0]
    assert 'Step 100 is the newest good checkpoint; step 200 was lost.' in warnings[-1]
    assert_is_state(checkpoints.read(100)[0], 100)
    assert names(two / 'quarantine') == ['step-00000200']
    assert checkpoints.steps() == [100]


def test_every_flipped_bit_is_found(two):
    newest = two / 'step-00000200'
    for name in (DATA, INDEX, MANIFEST):
        content = (newest / name).read_bytes()
        for position in np.linspace(0, 0.999, 20):
            flip_bit(newest / name, position)
            with pytest.raises(CheckpointDamaged):
                proof.load(newest)
            (newest / name).write_bytes(content)
    assert_is_state(proof.load(newest)[0], 200)


def test_quarantine_never_overwrites(two):
    checkpoints = Checkpoints(two)
    for _ in range(3):
        flip_bit(two / 'step-00000200' / DATA)
        assert checkpoints.newest_good() == 100
        save(checkpoints, 200)
    assert names(two / 'quarantine') == ['step-00000200', 'step-00000200-1', 'step-00000200-2']


def test_only_damaged_ones_end_with_one_message_now_and_the_next_time(two):
    for step in ('step-00000100', 'step-00000200'):
        flip_bit(two / step / DATA)
    with pytest.raises(ConfigError, match='only damaged ones') as reader_error:
        Checkpoints(two, writer=False).newest_good()
    for _ in range(2):
        with pytest.raises(ConfigError, match='another model_dir') as error:
            Checkpoints(two).newest_good()
        assert error.value.message == reader_error.value.message.replace(
            'step-00000200, step-00000100', 'step-00000100, step-00000200'
        )
    assert names(two / 'quarantine') == ['step-00000100', 'step-00000200']


def test_a_newer_format_ends_with_one_message_and_is_left_where_it_is(two):
    edit_manifest(two / 'step-00000200', format=2)
    with pytest.raises(ConfigError, match='written in format 2 by a newer Phalanx'):
        Checkpoints(two).newest_good()
    assert Checkpoints(two).steps() == [100, 200]


def test_reading_a_step_that_does_not_exist_names_those_that_do(two):
    with pytest.raises(ConfigError, match=r'no checkpoint of step 300 .*There are: 100, 200'):
        Checkpoints(two).read(300)


def test_going_back_looks_before_it_moves_anything(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=9))
    save(checkpoints, 100, 200, 300, 400)
    flip_bit(checkpoints.path(200) / DATA)
    assert checkpoints.go_back(50, at_most=90) is None
    assert checkpoints.steps() == [100, 200, 300, 400]
    # The good one before the damaged one, and else the first that will do.
    assert checkpoints.go_back(250, at_most=300) == 100
    assert checkpoints.steps() == [100]
    assert checkpoints.newest_good() == 100
    assert names(tmp_path / 'quarantine') == [f'step-00000{step}' for step in (200, 300, 400)]


def test_going_back_takes_a_later_one_where_there_is_no_earlier(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 100, 200)
    assert checkpoints.go_back(50, at_most=150) == 100
    assert checkpoints.steps() == [100]


def test_only_the_writer_may_save_and_clean(two):
    reader = Checkpoints(two, writer=False)
    with pytest.raises(AssertionError):
        reader.save(state(300), {'step': 300})
    with pytest.raises(AssertionError):
        reader.clean()


# ---- Which ones are kept.


def test_after_each_commit_the_rules_of_keep_are_applied(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=2, best=1, metric='loss'))
    for step, loss in enumerate([3.0, 1.0, float('nan'), 2.0, 1.5], 1):
        save(checkpoints, step, metrics={'loss': loss})
    assert checkpoints.steps() == [2, 4, 5]
    assert names(tmp_path) == ['step-00000002', 'step-00000004', 'step-00000005']


def test_age_is_judged_by_the_clock(tmp_path):
    now = [0.0]
    keep = Keep(last=2, older_than_hours=2)
    checkpoints = Checkpoints(tmp_path, keep=keep, clock=lambda: now[0])
    for hour in range(8):
        now[0] = 3600.0 * hour
        save(checkpoints, hour)
    # 5 is just old enough; 6 and 7 are the last two.
    assert checkpoints.steps() == [5, 6, 7]


def test_a_damaged_one_is_neither_counted_nor_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=2))
    save(checkpoints, 1, 2)
    os.truncate(tmp_path / 'step-00000002' / DATA, 5)
    save(checkpoints, 3)
    assert checkpoints.steps() == [1, 2, 3]
    save(checkpoints, 4)
    assert checkpoints.steps() == [2, 3, 4]


def test_a_deletion_that_fails_is_logged_and_training_goes_on(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=2))
    save(checkpoints, 1, 2)
    # A rename cannot replace a directory that holds something.
    (tmp_path / f'.trash-step-00000001-{os.getpid()}' / 'x').mkdir(parents=True)
    save(checkpoints, 3)
    assert 'Step 1 could not be deleted' in caplog.text
    checkpoints.clean()
    save(checkpoints, 4)
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]


# ---- Writes that fail.


def test_failed_saves_are_retried_reported_and_raised_only_after_max_failures(tmp_path, caplog):
    directory = tmp_path / 'checkpoints'
    checkpoints = Checkpoints(directory, max_failures=2)
    save(checkpoints, 1)
    directory.rename(tmp_path / 'away')
    directory.write_text('a file in the way')
    save(checkpoints, 2)
    assert caplog.text.count('Saving step 2 failed, next try in') == 2
    assert 'Step 2 was not saved' in caplog.text
    checkpoints.save(state(3), {'step': 3})
    with pytest.raises(CheckpointWriteError, match=r'row: 2, the last of step 3.* of step 1\.'):
        checkpoints.wait()
    with pytest.raises(CheckpointWriteError):
        checkpoints.save(state(4), {'step': 4})


def test_close_raises_when_the_last_save_failed(tmp_path):
    (tmp_path / 'checkpoints').write_text('a file in the way')
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    save(checkpoints, 1)
    with pytest.raises(CheckpointWriteError, match='no step'):
        checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    with disks.small_disk(tmp_path / 'small', '4m') as mount:
        yield mount


@pytest.mark.parametrize('size', [1_500_000, 800_000])  # 6 MB at once; 3.2 MB after 1.6 MB.
def test_a_full_disk_costs_no_checkpoint_and_no_litter_and_mends_itself(small_disk, size, caplog):
    checkpoints = Checkpoints(small_disk)
    save(checkpoints, 1)
    checkpoints.save(state(2, size=400_000), {'step': 2})
    checkpoints.save(state(3, size=size), {'step': 3})
    checkpoints.wait()
    assert 'Step 3 was not saved' in caplog.text
    assert 'No space left on device' in caplog.text
    assert names(small_disk) == ['step-00000001', 'step-00000002']
    assert Checkpoints(small_disk).newest_good() == 2
    save(checkpoints, 4)
    checkpoints.close()
    assert Checkpoints(small_disk).newest_good() == 4


def test_space_that_comes_back_in_time_saves_the_step(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, 'RETRY_SECONDS', (0.3, 5.0))
    (small_disk / 'ballast').write_bytes(bytes(3_900_000))
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(state(1, size=400_000), {'step': 1})
    while 'next try in 0.3 s' not in caplog.text:
        time.sleep(0.01)
    (small_disk / 'ballast').unlink()
    checkpoints.close()
    assert Checkpoints(small_disk).newest_good() == 1


# ---- Processes that die.

VICTIM = """
import os, signal, sys
import numpy as np
import tensorflow as tf
from trainer.checkpoint import Checkpoints, Keep

def state(step):
    return {'x': np.full(30 * 2**18, step, np.float32), 'step': np.int64(step)}

for command in sys.stdin:
    child = os.fork()  # TensorFlow is imported once and has not run an op yet.
    if child:
        os.waitpid(child, 0)
        print('gone', flush=True)
        continue
    checkpoints = Checkpoints(sys.argv[1], keep=Keep(last=2))
    checkpoints.clean()
    step = checkpoints.newest_good() or 0
    print(os.getpid(), flush=True)
    while True:
        step += 1
        checkpoints.save(state(step), {'step': step})
        if command == 'exit\\n':
            sys.exit()  # Without wait() or close().
"""


@pytest.mark.chaos
def test_sigkill_in_the_middle_of_saves_and_exit_without_close_lose_nothing(tmp_path):
    moments, littered, newest = random.Random(0), 0, 0
    victim = subprocess.Popen(
        [sys.executable, '-c', VICTIM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
    )
    checkpoints = Checkpoints(tmp_path)

    def assert_nothing_lost():
        step = checkpoints.newest_good()
        assert step is None or step >= newest
        if step is not None:
            tensors, _ = checkpoints.read(step)
            assert tensors['step'] == step
            assert (tensors['x'] == step).all()
        assert not (tmp_path / 'quarantine').exists()
        checkpoints.clean()
        assert all(name.startswith('step-') for name in names(tmp_path))
        return step or 0

    with victim:
        for _ in range(8):
            print('loop', file=victim.stdin, flush=True)
            pid = int(victim.stdout.readline())
            time.sleep(moments.uniform(0.1, 1.0))
            os.kill(pid, signal.SIGKILL)
            assert victim.stdout.readline() == 'gone\n'
            littered += any(name.startswith('.t') for name in names(tmp_path))
            newest = assert_nothing_lost()
        assert littered  # Some kills did hit a save.
        assert newest

        print('exit', file=victim.stdin, flush=True)
        victim.stdout.readline()
        assert victim.stdout.readline() == 'gone\n'
        assert assert_nothing_lost() == newest + 1
