"""The optimizer's update from reduced gradients: Keras's, without its detours.

Keras writes an update as single array operations, each with its own dispatch and its own pass over
memory. TensorFlow holds kernels of the very same formulas, for CPU and GPU: one operation a
variable instead of a dozen.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.groups import GroupedOptimizer, Share

# On a CPU a kernel's threads take longer to start than so few elements take to update.
FEWEST_ELEMENTS = 16_384


def prepare(optimizer: keras.optimizers.Optimizer | GroupedOptimizer) -> None:
    """Lets an optimizer take reduced gradients, and update large variables with fused kernels.

    The rates of groups, and whether weight decay applies to them, are put in force here.

    There is a kernel for Adam, AdamW (whose decay stays Keras's) and SGD, with or without
    momentum; not for a subclass with an `update_step` of its own.

    Args:
        optimizer: changed in place; its variables and its configuration stay what they are.
    """
    if isinstance(optimizer, GroupedOptimizer):
        for share in optimizer.shares:
            _prepare(share.optimizer)
            _tell_apart(share)
    else:
        _prepare(optimizer)


def _prepare(optimizer: keras.optimizers.Optimizer) -> None:
    # Its own reduction, which would follow its clipping, is made the identity.
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
    update_step, fused = optimizer.update_step, None
    if type(optimizer).update_step is keras.optimizers.Adam.update_step and not optimizer.amsgrad:
        fused = _adam
    elif type(optimizer).update_step is keras.optimizers.SGD.update_step:
        fused = _sgd
    if fused is None:
        return

    def update(gradient, variable, learning_rate):
        small = variable.shape.num_elements() < FEWEST_ELEMENTS
        if small and 'GPU' not in variable.device:
            return update_step(gradient, variable, learning_rate)
        dtype = variable.dtype
        return fused(optimizer, tf.cast(gradient, dtype), variable, tf.cast(learning_rate, dtype))

    optimizer.update_step = update


def _tell_apart(share: Share) -> None:
    """Makes an optimizer update and decay each variable as its group says."""
    optimizer, rates = share.optimizer, [group.rate for group in share.groups]
    update_step, decay = optimizer.update_step, optimizer._apply_weight_decay
    current_rate, factor = optimizer._get_current_learning_rate, 1.0
    decayed = [
        rate if group.decays(variable.path) else 0.0
        for rate, group, variable in zip(rates, share.groups, share.variables, strict=True)
    ]

    def update(gradient, variable, learning_rate):
        rate = rates[optimizer._get_variable_index(variable)]
        if rate != 1:
            learning_rate = learning_rate * tf.cast(rate, learning_rate.dtype)
        return update_step(gradient, variable, learning_rate)

    def apply_weight_decay(variables):
        nonlocal factor
        for factor in dict.fromkeys(decayed):
            alike = [v for v in variables if decayed[optimizer._get_variable_index(v)] == factor]
            if alike and factor:
                decay(alike)  # By a product with the rate, which it asks the optimizer for.
        factor = 1.0

    def learning_rate():
        return current_rate() if factor == 1 else keras.ops.multiply(current_rate(), factor)

    if set(rates) != {1.0}:
        optimizer.update_step = update
    if set(decayed) != {1.0}:
        optimizer._apply_weight_decay = apply_weight_decay
        optimizer._get_current_learning_rate = learning_rate


def apply(
    optimizer: keras.optimizers.Optimizer | GroupedOptimizer,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[keras.Variable],
) -> None:
    """Takes one step of the optimizer, in replica context, with gradients equal on all replicas."""
    if isinstance(optimizer, GroupedOptimizer):
        for one, its_gradients, its_variables in optimizer.split(gradients, variables):
            apply(one, its_gradients, its_variables)
        return
    # Optimizers read their counter and their rate anew for every variable. Given as tensors, what
    # follows from them (Adam's bias corrections) is computed once for all variables.
    scalars = [optimizer.iterations, optimizer.learning_rate]
    with _Given([(v, tf.convert_to_tensor(v.value)) for v in scalars if _is_variable(v)]):
        optimizer.apply(gradients, variables)


class _Given(keras.StatelessScope):
    """Gives tensors for variables, up to where they are assigned; assigns all as if it were not."""

    def add_update(self, update):
        variable, value = update
        self.state_mapping.pop(id(variable), None)
        variable.value.assign(value)


def _is_variable(value) -> bool:
    return isinstance(value, keras.Variable)


def _adam(optimizer, gradient, variable, learning_rate):
    """As `keras.optimizers.Adam.update_step`; Kingma and Ba, https://arxiv.org/abs/1412.6980."""
    dtype, index = variable.dtype, optimizer._get_variable_index(variable)
    step = tf.cast(tf.convert_to_tensor(optimizer.iterations.value) + 1, dtype)
    beta_1, beta_2 = (tf.constant(beta, dtype) for beta in (optimizer.beta_1, optimizer.beta_2))
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=optimizer._momentums[index].value.handle,
        v=optimizer._velocities[index].value.handle,
        beta1_power=beta_1**step,
        beta2_power=beta_2**step,
        lr=learning_rate,
        beta1=beta_1,
        beta2=beta_2,
        epsilon=tf.constant(optimizer.epsilon, dtype),
        grad=gradient,
    )


def _sgd(optimizer, gradient, variable, learning_rate):
    """As `keras.optimizers.SGD.update_step`."""
    if not optimizer.momentum:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=learning_rate, delta=gradient
        )
        return
    momentum = optimizer.momentums[optimizer._get_variable_index(variable)]
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=momentum.value.handle,
        lr=learning_rate,
        grad=gradient,
        momentum=tf.constant(optimizer.momentum, variable.dtype),
        use_nesterov=optimizer.nesterov,
    )
