"""Rows of bad steps: how they are found, and how a run goes on without the data around them."""

import json

import keras
import numpy as np
import pytest

from tests.trainer import tiny
from trainer.checkpoint import Checkpoints, Keep
from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.data.order import records
from trainer.divergence import BadSteps, Divergence
from trainer.errors import ConfigError, Diverged

NUM_EXAMPLES = 2000
SEED = 3  # tiny's
Z = Divergence(bad_steps=3, spike_z=10.0)


def ids_of_step(step):
    first = step * tiny.BATCH
    positions = np.arange(first, first + tiny.BATCH, dtype=np.int64)
    return records(positions, num_examples=NUM_EXAMPLES, seed=SEED).numpy()


def data(bad_steps=(), factor=np.nan):
    """Clean data but for the last record of the batches of some steps."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, tiny.CLASSES, NUM_EXAMPLES)
    images = rng.random((NUM_EXAMPLES, 4, 4, 1), np.float32) + labels[:, None, None, None]
    for step in bad_steps:
        images[ids_of_step(step)[-1]] *= factor
    return Data(Arrays({'image': images, 'label': labels}))


def sample_log(model_dir):
    """The ids of each step."""
    lines = (model_dir / 'samples.tsv').read_text().splitlines()
    rows = [line.split('\t') for line in lines]
    return {int(step): [int(i) for i in ids.split()] for step, ids in rows}


def linear():
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(tiny.CLASSES)])


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'bad_steps': 0}, 'Divergence.bad_steps = 0 must be an integer of at least 1.'),
        ({'max_rollbacks': -1}, 'Divergence.max_rollbacks = -1 must be an integer of at least 0.'),
        ({'spike_z': 0}, 'Divergence.spike_z = 0 must be a number above 0, such as 10, or None.'),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError) as raised:
        Divergence(**wrong)
    assert str(raised.value) == message


def test_a_row_of_bad_steps_is_found_across_calls_and_resumes():
    bad_steps = BadSteps(Divergence(bad_steps=4))
    assert bad_steps.look(0, 10, [2, 3, 4, 8, 9]) is None
    bad_steps = BadSteps(Divergence(bad_steps=4), json.loads(json.dumps(bad_steps.record())))
    assert bad_steps.look(10, 1, [10]) is None
    found = bad_steps.look(11, 5, [11, 12])
    assert (found.first_step, found.end_step) == (8, 12)


def test_a_good_step_ends_a_row():
    bad_steps = BadSteps(Divergence(bad_steps=2))
    assert bad_steps.look(0, 1, [0]) is None
    assert bad_steps.look(1, 1, []) is None
    assert bad_steps.look(2, 1, [2]) is None


def spiking(num_steps=300, spike=range(240, 243)):
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(num_steps) / 1000) * (1 + 0.1 * rng.standard_normal(num_steps))
    losses[list(spike)] *= 5
    return losses.astype(np.float32)


@pytest.mark.parametrize('call', [1, 7, 300])
def test_a_spike_is_found_at_the_same_step_whatever_the_calls(call):
    losses, bad_steps = spiking(), BadSteps(Z)
    for first in range(0, 300, call):
        steps = min(call, 300 - first)
        # Every call in a process of its own.
        bad_steps = BadSteps(Z, json.loads(json.dumps(bad_steps.record())))
        found = bad_steps.look(first, steps, [], losses[first : first + steps])
        if found:
            break
    assert (found.first_step, found.end_step) == (240, 243)


def test_noise_and_single_outliers_are_no_spike():
    assert BadSteps(Z).look(0, 300, [], spiking(spike=[100, 200, 201, 250])) is None


def test_losses_that_are_all_the_same_make_no_spike_of_rounding():
    losses = np.full(300, 0.5, np.float32)
    losses[200:] += 1e-6
    assert BadSteps(Z).look(0, 300, [], losses) is None


@pytest.mark.parametrize('replicas', [1, 2])
def test_the_data_around_a_poisoned_record_is_left_out(make_strategy, tmp_path, replicas):
    strategy = make_strategy(replicas)
    policy = Divergence(bad_steps=1)
    common = {'eval_data': None, 'sample_log': True, 'divergence': policy, 'seed': SEED}
    clean = tiny.run(strategy, tmp_path / 'clean', train_data=data(), **common)
    common['train_data'] = data([20])
    run = tiny.run(strategy, tmp_path / 'run', **common)

    # One step before the bad one goes with it; all that follow are nearer by two.
    expected = {s: list(ids_of_step(s if s < 19 else s + 2)) for s in range(tiny.STEPS)}
    assert sample_log(tmp_path / 'run') == expected
    tensors, manifest = Checkpoints(run.checkpoint.parent, writer=False).read(tiny.STEPS)
    assert all(np.isfinite(values).all() for values in tensors.values())
    window = [19 * tiny.BATCH, 21 * tiny.BATCH]
    assert manifest['left_out'] == {'windows': [window], 'rollbacks': 1}
    assert tensors['phalanx/skipped'] == 0
    for tag, points in tiny.points(tmp_path / 'run' / 'train').items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag

    # Neither where checkpoints lie nor a resume makes a difference.
    tiny.run(strategy, tmp_path / 'again', **{**common, 'save_every': 5}, max_steps=17)
    tiny.run(strategy, tmp_path / 'again', **{**common, 'save_every': 5}, max_steps=9)
    again = tiny.run(strategy, tmp_path / 'again', **{**common, 'save_every': 5})
    assert again.state_sha256 == run.state_sha256 != clean.state_sha256
    assert again.sample_sha256 == run.sample_sha256


def test_what_was_saved_beyond_the_step_gone_back_to_is_kept_aside(make_strategy, tmp_path):
    # The row ends at step 20, so the window begins at step 8, before the checkpoint of step 12.
    policy = Divergence(bad_steps=6)
    run = tiny.run(
        make_strategy(1), tmp_path, train_data=data(range(14, 20)), divergence=policy,
        save_every=4, sample_log=True,
    )  # fmt: skip
    aside = tmp_path / 'checkpoints' / 'quarantine'
    # Nothing is saved amid bad steps, as step 16 was.
    assert [path.name for path in aside.iterdir()] == ['step-00000012']
    assert run.step == tiny.STEPS
    assert sample_log(tmp_path)[8] == list(ids_of_step(20))


@pytest.mark.parametrize('save_every', [1, 2, 7])
def test_frequent_saves_do_not_push_out_what_there_is_to_go_back_to(
    make_strategy, tmp_path, save_every
):
    run = tiny.run(
        make_strategy(1), tmp_path, train_data=data(range(20, 24)), sample_log=True, eval_data=None,
        divergence=Divergence(bad_steps=4), save_every=save_every, keep=Keep(last=2),
    )  # fmt: skip
    # Where they lie makes no difference: the window is the four bad steps and four before.
    _, manifest = Checkpoints(run.checkpoint.parent, writer=False).read(tiny.STEPS)
    assert manifest['left_out']['windows'] == [[16 * tiny.BATCH, 24 * tiny.BATCH]]
    assert len(Checkpoints(run.checkpoint.parent, writer=False).steps()) <= 6


def test_a_run_that_may_not_go_back_once_more_ends(make_strategy, tmp_path):
    policy = Divergence(bad_steps=1, max_rollbacks=2)
    with pytest.raises(Diverged) as raised:
        tiny.run(make_strategy(1), tmp_path, train_data=data([14, 20, 30]), divergence=policy)
    # The third lies four steps nearer by then.
    assert (raised.value.first_step, raised.value.end_step) == (26, 27)
    assert 'Lower the learning rate' in str(raised.value)


def test_a_spike_of_the_loss_is_rolled_back(make_strategy, tmp_path):
    common = {
        'model': linear,
        'optimizer': lambda: keras.optimizers.SGD(0.05),
        'steps': 120,
        'eval_data': None,
        'sample_log': True,
    }
    spikes = data(range(80, 84), factor=-300.0)
    run = tiny.run(
        make_strategy(1), tmp_path, train_data=spikes,
        divergence=Divergence(bad_steps=2, spike_z=20.0), **common,
    )  # fmt: skip
    _, manifest = Checkpoints(run.checkpoint.parent, writer=False).read(120)
    # The first two bad steps, and two before; then those that are left of the four.
    assert manifest['left_out']['rollbacks'] == 2
    used = {i for ids in sample_log(tmp_path).values() for i in ids}
    assert not used & {ids_of_step(step)[-1] for step in range(80, 84)}
    assert run.metrics['train/loss'] < 1.5  # Of weights that were spoilt, it is above 100.
