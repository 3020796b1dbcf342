"""Variables that are trained in another way than the rest, on any number of replicas."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.training import (
    CLASSES,
    FEATURES,
    Training,
    assert_close,
    assert_equal,
    no_loss,
    sgd,
)
from trainer.errors import ConfigError
from trainer.groups import Group, layerwise_rates, no_decay
from trainer.state import build_state

layers = keras.layers
Adam, AdamW, SGD = keras.optimizers.Adam, keras.optimizers.AdamW, keras.optimizers.SGD
WIDE = 4096  # A kernel of so many columns is updated by a fused kernel.


def model():
    return keras.Sequential(
        [
            layers.Dense(8, activation='tanh', name='first'),
            layers.BatchNormalization(synchronized=True, name='norm'),
            layers.Dense(CLASSES, name='last'),
        ],
        name='net',
    )


def wide():
    return keras.Sequential(
        [layers.Dense(WIDE, activation='tanh', name='first'), layers.Dense(CLASSES, name='last')],
        name='net',
    )


def weights_after(strategy, groups, *, steps=5, model=model, optimizer=None, **options):
    training = Training(strategy, model, optimizer or sgd(0.1), groups=groups, **options)
    training.run(steps)
    return training.weights()


def moved(strategy, groups=(), *, optimizer, model=model, **options):
    """How far each variable moves in the first step, by its name."""
    training = Training(strategy, model, optimizer, groups=groups, **options)
    before = training.weights()
    training.run()
    return {path: after - before[path] for path, after in training.weights().items()}


# ---- Which group a variable is of.


def test_the_first_group_that_matches_decides(make_strategy):
    groups = [Group('*/kernel', rate=0.5), [Group('net/first/*', rate=0.25)]]
    plain = moved(make_strategy(2), optimizer=sgd(0.1))
    found = moved(make_strategy(2), groups, optimizer=sgd(0.1))
    rates = {path: np.median(found[path] / step) for path, step in plain.items() if step.all()}
    assert rates == {
        'net/first/kernel': pytest.approx(0.5),
        'net/first/bias': pytest.approx(0.25),
        'net/norm/gamma': pytest.approx(1),
        'net/norm/beta': pytest.approx(1),
        'net/last/kernel': pytest.approx(0.5),
        'net/last/bias': pytest.approx(1),
    }


@pytest.mark.parametrize(
    ('groups', 'message'),
    [
        ([Group('net/frist/*')], r"'net/frist/\*' of a group .*nearest paths are net/first/"),
        ([Group(['*/bias', '*/gama'])], r"'\*/gama' of a group .* net/norm/gamma"),
        ([Group('*/moving_mean', rate=0.5)], 'matches no variable that is trained'),
        ([Group('*'), Group('*/bias')], r"\['\*/bias'\] has no effect: groups before it match"),
        ([Group('*', weight_decay='*/kernels')], r"'\*/kernels'.* net/first/kernel"),
        ([Group('*', frozen=True)], 'nothing to train'),
        ([Group('*', optimizer=SGD)], 'take all variables'),
        ([Group], 'is no Group'),
    ],
)
def test_a_group_without_effect_is_a_mistake(make_strategy, groups, message):
    with pytest.raises(ConfigError, match=message):
        Training(make_strategy(1), model, groups=groups)


def test_the_optimizer_of_a_group_is_given_uncalled(make_strategy):
    with pytest.raises(ConfigError, match='uncalled'):
        Training(make_strategy(1), model, groups=[Group('*/bias', optimizer=SGD(0.1))])


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'paths': []}, 'paths is empty'),
        ({'paths': '*', 'rate': 0.0}, 'must be above 0'),
        ({'paths': '*', 'loss': 3}, 'must be a name'),
        ({'paths': '*', 'frozen': True, 'rate': 0.5}, 'has no effect'),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Group(**wrong)


def test_a_group_carries_the_name_of_its_loss_to_the_state(make_strategy):
    spec = tf.TensorSpec([None, FEATURES], tf.float32)
    groups = [Group('*/last/*', loss='head')]
    state = build_state(make_strategy(1), model, sgd(), spec, groups=groups)
    assert [group.loss for group in state.groups] == [None] * 4 + ['head'] * 2
    paths = [v.path for v in state.model.trainable_variables]
    assert paths[-2:] == ['net/last/kernel', 'net/last/bias']


# ---- Frozen.


def test_what_is_frozen_stays_and_has_no_slots_but_is_in_the_checkpoint(make_strategy):
    optimizer = functools.partial(AdamW, 0.1, weight_decay=0.1)
    groups = [Group('net/first/*', frozen=True)]
    training = Training(make_strategy(2), model, optimizer, groups=groups)
    before = training.variables()
    training.run(3)
    changed = {
        path for path, value in training.variables().items() if (value != before[path]).any()
    }
    assert {'net/first/kernel', 'net/first/bias'} <= set(before) - changed
    assert {'net/last/kernel', 'net/norm/gamma', 'net/norm/moving_mean'} <= changed
    assert not [path for path in before if '/net_first' in path]
    assert [path for path in before if '/net_last' in path]


def test_frozen_batch_normalisation_uses_and_keeps_its_statistics(make_strategy):
    training = Training(make_strategy(2), model, groups=[Group('*/norm/*', frozen=True)])
    before = training.variables()
    training.run(3)
    after = training.variables()
    frozen = [path for path in before if '/norm/' in path]
    assert len(frozen) == 4
    assert_equal({path: after[path] for path in frozen}, {path: before[path] for path in frozen})


def test_a_state_of_which_something_is_frozen_has_the_names_of_one_without(make_strategy):
    whole = set(Training(make_strategy(1), model).state.variables)
    frozen = Training(make_strategy(1), model, groups=[Group('*/first/*', frozen=True)]).state
    assert set(frozen.variables) == whole  # SGD has no slots.


# ---- Rates.


def test_rates_fall_from_the_output_down(make_strategy):
    groups = layerwise_rates(['net/last/*', 'net/norm/*', 'net/first/*'], 0.5)
    plain = moved(make_strategy(2), optimizer=sgd(0.1))
    found = moved(make_strategy(2), [groups], optimizer=sgd(0.1))
    for path, factor in [('last/kernel', 1), ('norm/beta', 0.5), ('first/kernel', 0.25)]:
        np.testing.assert_allclose(
            found[f'net/{path}'], factor * plain[f'net/{path}'], rtol=1e-3, atol=1e-7
        )


def test_a_factor_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r'factor is 75; it must lie between 0 and 1'):
        layerwise_rates(['*'], 75)


# ---- Weight decay.


@pytest.mark.parametrize(
    'groups',
    [
        [no_decay()],
        [Group('*', weight_decay='*/kernel')],
        [Group('*/kernel'), Group('*', weight_decay=False)],
    ],
)
def test_bias_and_norm_do_not_decay(make_strategy, groups):
    optimizer = functools.partial(AdamW, 0.1, weight_decay=0.5)
    training = Training(make_strategy(2), model, optimizer, groups=groups, loss=no_loss)
    before = training.weights()
    training.run()
    for path, after in training.weights().items():
        factor = 0.95 if path.endswith('kernel') else 1.0
        np.testing.assert_allclose(after, factor * before[path], rtol=1e-6)


def test_decay_follows_the_rate_of_a_group(make_strategy):
    optimizer = functools.partial(AdamW, 0.1, weight_decay=0.5)
    groups = [Group('net/first/*', rate=0.1), Group('net/last/*', rate=0.1, weight_decay=False)]
    training = Training(make_strategy(2), model, optimizer, groups=groups, loss=no_loss)
    before = training.weights()
    training.run()
    after = training.weights()
    for path, factor in [('first/kernel', 0.995), ('last/kernel', 1), ('norm/gamma', 0.95)]:
        np.testing.assert_allclose(after[f'net/{path}'], factor * before[f'net/{path}'], rtol=1e-6)


# ---- Optimizers of their own.


def two_optimizers():
    return [
        Group('net/last/*', optimizer=functools.partial(SGD, 0.2, momentum=0.9), rate=0.5),
        Group('*/bias', optimizer=functools.partial(Adam, 0.03)),
    ]


def test_each_optimizer_trains_its_own_and_has_its_own_slots_and_rate(make_strategy):
    training = Training(
        make_strategy(2), model, functools.partial(Adam, 0.01), groups=two_optimizers()
    )
    scalars = training.state.scalars()
    assert [scalars[f'learning_rate{name}'] for name in ('', '/sgd', '/adam_1')] == [
        pytest.approx(0.01),
        pytest.approx(0.2),
        pytest.approx(0.03),
    ]
    paths = set(training.state.variables)
    assert {'adam/iteration', 'sgd/iteration', 'adam_1/iteration'} <= paths
    assert 'sgd/net_last_kernel_momentum' in paths
    assert 'adam_1/net_first_bias_velocity' in paths
    assert 'adam/net_first_kernel_velocity' in paths
    assert not [path for path in paths if 'learning_rate' in path]


@pytest.mark.slow
def test_what_each_optimizer_does_is_what_it_does_alone(make_strategy):
    strategy = make_strategy(2)
    found = moved(strategy, two_optimizers(), optimizer=functools.partial(Adam, 0.01))
    alone = {
        '/kernel': moved(strategy, optimizer=functools.partial(Adam, 0.01)),
        '/bias': moved(strategy, optimizer=functools.partial(Adam, 0.03)),
        'last': moved(strategy, optimizer=sgd(0.1, momentum=0.9)),
    }
    for path, step in found.items():
        which = 'last' if 'last' in path else '/bias' if path.endswith('/bias') else '/kernel'
        np.testing.assert_allclose(step, alone[which][path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_the_norm_is_clipped_over_what_an_optimizer_trains(make_strategy):
    clipped = sgd(1.0, global_clipnorm=0.01)
    groups = [Group('net/last/*', optimizer=clipped)]
    found = moved(make_strategy(2), groups, optimizer=clipped)
    for share in (['net/last/kernel', 'net/last/bias'], [p for p in found if 'last' not in p]):
        squares = sum(np.sum(np.square(found[path])) for path in share)
        assert np.sqrt(squares) == pytest.approx(0.01, rel=1e-4)


# ---- Everywhere the same.


def test_one_device_and_two_replicas_agree(make_strategy):
    groups = [
        Group('net/first/bias', frozen=True),
        Group('net/first/*', rate=0.3, weight_decay=False),
        Group('*/bias', optimizer=functools.partial(SGD, 0.1, momentum=0.9)),
    ]
    optimizer = functools.partial(AdamW, 1e-3, weight_decay=0.1, epsilon=1e-3, global_clipnorm=0.5)
    one, two = (
        weights_after(make_strategy(n), groups, steps=20, model=wide, optimizer=optimizer)
        for n in (1, 2)
    )
    assert_close(two, one)


@pytest.mark.slow
def test_a_restored_state_goes_on_to_the_same_bits(make_strategy):
    def training():
        return Training(
            make_strategy(2),
            model,
            functools.partial(AdamW, 0.01),
            groups=[*two_optimizers(), Group('*/gamma', frozen=True)],
        )

    whole = training()
    whole.run(6)
    first, second = training(), training()
    first.run(3)
    second.state.restore(first.variables())
    second.start_at(3)
    second.run(3)
    assert second.sha256() == whole.sha256()


def test_without_groups_the_optimizer_is_kerass_own(make_strategy):
    assert type(Training(make_strategy(1), model).state.optimizer) is SGD


@pytest.mark.slow
def test_lamb_is_the_same_on_two_replicas_and_goes_on_to_the_same_bits(make_strategy):
    def training(replicas):
        optimizer = functools.partial(keras.optimizers.Lamb, 0.01, weight_decay=0.1)
        return Training(make_strategy(replicas), model, optimizer, groups=[no_decay()])

    one, two, again = training(1), training(2), training(2)
    one.run(8)
    two.run(4)
    again.state.restore(two.variables())
    again.start_at(4)
    for each in (two, again):
        each.run(4)
    assert again.sha256() == two.sha256()
    assert_close(two.weights(), one.weights(), rtol=1e-4)
