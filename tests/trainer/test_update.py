import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.groups import Group, GroupedOptimizer
from trainer.update import FEWEST_ELEMENTS, apply, prepare

Adam, SGD = keras.optimizers.Adam, keras.optimizers.SGD
LARGE = (FEWEST_ELEMENTS // 64, 64)


def after_steps(make, *, fused, shape=LARGE):
    """The variable and all of the optimizer's after some steps, and the kernels of a step."""
    optimizer, rng = make(), np.random.default_rng(0)
    variable = keras.Variable(rng.normal(size=shape).astype(np.float32))
    optimizer.build([variable])
    if fused:
        prepare(optimizer)

    @tf.function
    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    for _ in range(10):
        step(tf.constant(rng.normal(size=shape).astype(np.float32)))
    (graph,) = step._list_all_concrete_functions()
    kernels = {op.type for op in graph.graph.get_operations() if op.type.startswith('ResourceAp')}
    return [v.numpy() for v in [variable, *optimizer.variables]], kernels


@pytest.mark.parametrize(
    ('make', 'kernel'),
    [
        (Adam, 'ResourceApplyAdam'),
        (
            functools.partial(Adam, keras.optimizers.schedules.CosineDecay(0.1, 8)),
            'ResourceApplyAdam',
        ),
        (functools.partial(keras.optimizers.AdamW, weight_decay=0.1), 'ResourceApplyAdam'),
        (functools.partial(Adam, use_ema=True, global_clipnorm=1.0), 'ResourceApplyAdam'),
        (functools.partial(SGD, 0.1), 'ResourceApplyGradientDescent'),
        (functools.partial(SGD, 0.1, momentum=0.9), 'ResourceApplyKerasMomentum'),
        (functools.partial(SGD, 0.1, momentum=0.9, nesterov=True), 'ResourceApplyKerasMomentum'),
    ],
)
def test_a_kernel_updates_as_keras_does(make, kernel):
    values, kernels = after_steps(make, fused=True)
    assert kernels == {kernel}
    expected, kernels = after_steps(make, fused=False)
    assert not kernels
    for value, other in zip(values, expected, strict=True):
        # The kernel rounds 1 - beta in the variable's own precision.
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)


class Own(Adam):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, gradient)


@pytest.mark.parametrize(
    'make', [Own, functools.partial(Adam, amsgrad=True), keras.optimizers.Nadam]
)
def test_an_optimizer_without_a_kernel_is_left_as_it_is(make):
    values, kernels = after_steps(make, fused=True)
    assert not kernels
    for value, other in zip(values, after_steps(make, fused=False)[0], strict=True):
        np.testing.assert_array_equal(value, other)


def test_a_small_variable_is_left_to_keras():
    assert not after_steps(Adam, fused=True, shape=(8, 8))[1]


def values_in_groups(make, groups):
    """Two variables after some steps."""
    rng = np.random.default_rng(0)
    shapes = {'large': LARGE, 'small': (8, 8)}
    variables = [
        keras.Variable(rng.normal(size=shape).astype(np.float32), name=name)
        for name, shape in shapes.items()
    ]
    optimizer = GroupedOptimizer(
        make(), variables, {v.path: group for v, group in zip(variables, groups, strict=True)}, None
    )
    prepare(optimizer)

    @tf.function
    def step(*gradients):
        apply(optimizer, gradients, variables)

    for _ in range(3):
        step(*(tf.constant(rng.normal(size=shape).astype(np.float32)) for shape in shapes.values()))
    return [v.numpy() for v in variables]


@pytest.mark.parametrize(
    ('make', 'rate'),
    [
        (functools.partial(SGD, momentum=0.9, weight_decay=0.2), 0.1),
        (functools.partial(keras.optimizers.AdamW, weight_decay=0.2), 0.1),
        (functools.partial(keras.optimizers.Nadam, global_clipnorm=1.0), 0.1),
        (functools.partial(keras.optimizers.Lamb, weight_decay=0.2), 0.1),
        (functools.partial(keras.optimizers.Muon, weight_decay=0.2, adam_weight_decay=0.1), 0.1),
    ],
)
def test_the_rate_of_a_group_is_a_factor_on_that_of_any_optimizer(make, rate):
    groups = [Group('*', rate=0.25), Group('*')]
    large, small = values_in_groups(functools.partial(make, rate), groups)
    whole, quarter = Group('*'), functools.partial(make, rate / 4)
    expected, _ = values_in_groups(quarter, [whole, whole])
    np.testing.assert_allclose(large, expected, rtol=1e-4, atol=1e-5)
    _, expected = values_in_groups(functools.partial(make, rate), [whole, whole])
    np.testing.assert_array_equal(small, expected)
