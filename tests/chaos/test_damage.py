"""A run whose newest checkpoint is damaged ends with the bits of one that never was."""

import json
import shutil

import pytest
import tensorflow as tf  # noqa: F401 (devices are fixed before the first test)

from tests import disks
from trainer.__main__ import main

pytestmark = pytest.mark.chaos

DATA, INDEX = 'state.data-00000-of-00001', 'state.index'
# Two replicas, dropout and batch normalisation; the checkpoints are those of 4, 8 and 12.
RUN = [
    '--gin_file=runs/digits.gin',
    '--mode=train',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
    '--gin.STEPS=12',
    '--gin.train.save_every=4',
]


def flip_bit(name, position):
    """Returns a function: it flips a bit of a file, at a part of its length."""

    def damage(checkpoint):
        data = bytearray((checkpoint / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        (checkpoint / name).write_bytes(data)

    return damage


def truncate(name, part):
    """Returns a function: it leaves only a part of a file."""

    def damage(checkpoint):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: int(part * len(data))])

    return damage


def remove(name):
    """Returns a function: it removes a file."""
    return lambda checkpoint: (checkpoint / name).unlink()


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def of_another_step(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name('step-00000004'), checkpoint)


def extra_tensors(checkpoint):
    """Puts the whole, valid content of another checkpoint beside this one's manifest."""
    other = checkpoint.with_name('step-00000004')
    for name in (DATA, INDEX):
        shutil.copy(other / name, checkpoint / name)


DAMAGE = {
    'bit in the data': flip_bit(DATA, 0.5),
    'first bit of the data': flip_bit(DATA, 0.0),
    'bit in the index': flip_bit(INDEX, 0.5),
    'last byte of the index': flip_bit(INDEX, 1.0),
    'bit in the manifest': flip_bit('manifest.json', 0.5),
    'data cut': truncate(DATA, 0.6),
    'data empty': truncate(DATA, 0),
    'index cut': truncate(INDEX, 0.6),
    'manifest cut': truncate('manifest.json', 0.6),
    'manifest empty': truncate('manifest.json', 0),
    'data missing': remove(DATA),
    'index missing': remove(INDEX),
    'manifest missing': remove('manifest.json'),
    'directory empty': empty,
    'of another step': of_another_step,
    "another step's files": extra_tensors,
}


def run(model_dir, *flags):
    return main([*RUN, f'--model_dir={model_dir}', *flags])


def final(model_dir):
    manifest = model_dir / 'checkpoints' / 'step-00000012' / 'manifest.json'
    return json.loads(manifest.read_text())['state_sha256']


@pytest.fixture(scope='module', autouse=True)
def no_cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('TF_CONFIG', raising=False)
        yield


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The state_sha256 of a run from the first step to the last."""
    model_dir = tmp_path_factory.mktemp('undisturbed')
    assert run(model_dir) == 0
    return final(model_dir)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """The directory of a run that ended at step 8."""
    model_dir = tmp_path_factory.mktemp('interrupted')
    assert run(model_dir, '--gin.train.max_steps=8') == 0
    return model_dir


@pytest.fixture
def copy(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / 'run')


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_the_run_goes_on_from_the_checkpoint_before(undisturbed, copy, caplog, damage):
    damage(copy / 'checkpoints' / 'step-00000008')
    assert run(copy) == 0
    assert final(copy) == undisturbed
    assert [p.name for p in (copy / 'checkpoints' / 'quarantine').iterdir()] == ['step-00000008']
    assert sorted(p.name for p in (copy / 'checkpoints').glob('step-*')) == [
        'step-00000004', 'step-00000008', 'step-00000012',
    ]  # fmt: skip
    assert 'The checkpoint of step 8 is damaged: ' in caplog.text
    assert 'Step 4 is the newest good checkpoint; step 8 was lost.' in caplog.text


def test_what_a_killed_save_left_is_no_checkpoint(undisturbed, copy):
    whole = copy / 'checkpoints' / 'step-00000008'
    for name in ('.tmp-step-00000012-4711', '.trash-step-00000001-4711'):
        shutil.copytree(whole, copy / 'checkpoints' / name)
    (copy / 'checkpoints' / '.tmp-step-00000012-4711' / 'manifest.json').unlink()
    assert run(copy) == 0
    assert final(copy) == undisturbed
    assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == [
        'step-00000004', 'step-00000008', 'step-00000012',
    ]  # fmt: skip


def test_where_every_checkpoint_is_damaged_one_message_says_so(copy, capsys):
    for step in (4, 8):
        flip_bit(DATA, 0.5)(copy / 'checkpoints' / f'step-{step:08d}')
    capsys.readouterr()
    assert run(copy) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: '{copy}/checkpoints' holds no checkpoint that can be used, only damaged ones "
        '(step-00000004, step-00000008), and a run that had come that far is not begun again at '
        'step 0 by accident. To begin again, use another model_dir or remove this folder.'
    )
    assert not list((copy / 'checkpoints').glob('step-*'))


@pytest.mark.parametrize('mode', ['evaluate', 'export'])
def test_evaluation_and_export_take_the_newest_good_checkpoint_and_move_nothing(copy, capsys, mode):
    flip_bit(DATA, 0.5)(copy / 'checkpoints' / 'step-00000008')
    capsys.readouterr()
    assert run(copy, f'--mode={mode}') == 0
    if mode == 'export':
        assert [p.name for p in (copy / 'export').iterdir()] == ['4']
    assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == [
        'step-00000004', 'step-00000008',
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KB."""
    with disks.small_disk(tmp_path / 'small', '200k') as mount:
        yield mount


def test_a_disk_that_fills_up_ends_the_run_with_one_message_and_what_was_saved_is_good(
    small_disk, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr('trainer.checkpoint.RETRY_SECONDS', (0.01, 0.01))
    flags = [
        '--gin.STEPS=120', '--gin.train.save_every=2', '--gin.train.log_every=2',
        '--gin.Keep.last=1000', '--gin.WARMUP=2',
    ]  # fmt: skip
    model_dir = small_disk / 'run'
    capsys.readouterr()
    assert run(model_dir, *flags) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('error: ')
    assert 'No space left on device' in message
    assert str(model_dir) in message
    kept = sorted(p.name for p in (model_dir / 'checkpoints').glob('step-*'))
    assert kept, 'nothing was saved before the disk was full'

    # On a larger disk it goes on from there and ends with the bits of an undisturbed run.
    larger, whole = shutil.copytree(model_dir, tmp_path / 'larger'), tmp_path / 'whole'
    assert run(larger, *flags) == run(whole, *flags) == 0
    assert not (larger / 'checkpoints' / 'quarantine').exists()
    manifests = [d / 'checkpoints' / 'step-00000120' / 'manifest.json' for d in (larger, whole)]
    first, second = (json.loads(path.read_text())['state_sha256'] for path in manifests)
    assert first == second


def test_a_disk_that_is_full_at_the_start_is_told_in_one_message(small_disk, capsys):
    (small_disk / 'ballast').write_bytes(bytes(196 << 10))
    capsys.readouterr()
    code = run(small_disk / 'run')
    (message,) = capsys.readouterr().err.splitlines()[-1:]
    assert code in (1, 2)
    assert message.startswith(f"error: model_dir = '{small_disk}/run' cannot be written: No space")
