"""The compiled steps: one optimizer update, or one evaluated batch, as a pure function.

A training step is a function of (state, batch, seed, step, replica). `State.call` makes the
forward pass pure; everything that goes wrong in silence when it happens once a replica
(loss scale, clipping, finite check, batch-norm statistics, random masks) happens here, once, on
quantities that were reduced over all replicas:

    each replica:   forward, backward                           -> sums over its examples
    all replicas:   one all-reduce of gradients, statistics, loss and metrics
    each replica:   if everything is finite: clip, update

Losses are summed, not averaged, on each replica, and divided by the weight of the global batch
after the reduction, so a replica with fewer or lighter examples counts for what it has.
"""

import functools
import re

import numpy as np
import tensorflow as tf

from trainer import canonical, update
from trainer.errors import ConfigError
from trainer.gradients import Gradients, compiled
from trainer.objective import Objective
from trainer.state import State
from trainer.step_clock import StepClock
from trainer.sums import Metrics, MetricSums, first_replica, hide

# Dynamic loss scaling as in Micikevicius et al., "Mixed Precision Training"
# (https://arxiv.org/abs/1710.03740): halve on overflow, double after a run of finite steps.
LOSS_SCALE_GROWTH_STEPS = 2000


class TrainStep:
    """Runs training steps on all replicas.

    Args:
        strategy: the strategy `state` was built under.
        state: what is trained; `run` updates it.
        objective: what is minimised.
        metrics: Keras metrics with variables that add up over batches and replicas (means,
            counts, confusion matrices); used as functions, their own variables stay zero. See
            `trainer.sums.MetricSums`.
        seed: of dropout masks and the like.
        accumulate: number of micro-batches each replica splits its batch into.
        canonical_shards: see `trainer.canonical`; None sums in whatever order is fastest.
        jit_compile: whether XLA compiles the forward and backward pass.
        log_ids: whether `run` reports the record numbers of every global batch.
        log_losses: whether it reports the loss of every step.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        state: State,
        objective: Objective,
        metrics: Metrics = (),
        *,
        seed: int = 0,
        accumulate: int = 1,
        canonical_shards: int | None = None,
        jit_compile: bool = False,
        log_ids: bool = False,
        log_losses: bool = False,
    ):
        self._strategy, self._state, self._objective = strategy, state, objective
        self._metrics = MetricSums(metrics)
        self._replicas = strategy.num_replicas_in_sync
        self._log_ids, self._log_losses = log_ids, log_losses
        self._scaled = state.scales_loss
        # Of one call of `run`: as variables of the loop, totals would cost each step more.
        self._named = len(objective.names) if len(objective.names) > 1 else 0
        self._sums = tf.Variable(tf.zeros(3 + self._named + sum(self._metrics.sizes), tf.float64))
        self._skipped: list[int] = []
        self._clock = StepClock()
        # How long a worker takes is worth knowing where others wait for it.
        self._times_work = self._replicas > len(strategy.extended.worker_devices)
        self._canonical, self._jit_compile = canonical_shards is not None, jit_compile
        shares = canonical_shards or self._replicas
        self._gradients = self._differentiate(
            state,
            objective,
            self._metrics,
            seed=seed,
            shares=shares,
            accumulate=accumulate,
            in_parts=self._canonical or jit_compile,
        )
        self._add = self._gradients.of_replica
        if canonical_shards:
            count = canonical_shards // self._replicas
            self._add = functools.partial(self._gradients.of_shards, count=count)
        if jit_compile:
            self._add = compiled(self._add)
        update.prepare(state.optimizer)

    def results(self, totals) -> dict[str, float]:
        """Turns what `run` returned, summed over calls on the host, into means and metrics."""
        steps = max(float(totals['finite_steps']), 1.0)
        return {
            'loss': float(totals['loss']) / steps,
            'gradient_norm': float(totals['gradient_norm']) / steps,
            **self._objective.results(totals['losses_by_name'] / steps),
            **self._metrics.results(totals['metrics']),
        }

    _differentiate = Gradients

    def run(self, iterator, num_steps: int) -> dict[str, np.ndarray]:
        """Takes steps, and comes back to Python only after the last.

        Args:
            iterator: distributed iterator over batches as `trainer.data.pipeline` makes them.
            num_steps: how many.

        Returns:
            Sums over the finite steps, equal on all workers: 'loss', 'gradient_norm', 'metrics',
            'losses_by_name' (if there are several), 'finite_steps' (float64); 'skipped_steps',
            those that were not finite (list of int); of this worker alone and estimated from some
            of the steps, 'input_seconds' (float), the time the replicas were idle for lack of a
            batch, and, if there are several workers, 'work_seconds' (float), from there to their
            gradients; with `log_ids`, 'ids' (int64 [num_steps, global batch]); with `log_losses`,
            'losses' (float32 [num_steps]).

        Raises:
            ConfigError: op determinism is on, and an operation of the model cannot obey it.
        """
        self._skipped.clear()
        try:
            totals = self._loop(iterator, tf.constant(num_steps, tf.int64))
        except tf.errors.UnimplementedError as error:
            raise _not_deterministic(error, self._jit_compile) or error from None
        totals = {name: value.numpy() for name, value in totals.items()}
        finite_steps, loss, norm, *_ = sums = totals.pop('sums')
        if self._skipped:
            self._state.skipped.assign_add(len(self._skipped))
        waited, worked = self._clock.take(num_steps)
        return {
            **totals,
            'finite_steps': finite_steps,
            'loss': loss,
            'gradient_norm': norm,
            'losses_by_name': sums[3 : 3 + self._named],
            'metrics': sums[3 + self._named :],
            'skipped_steps': list(self._skipped),
            'input_seconds': waited,
            'work_seconds': worked,
        }

    @tf.function(reduce_retracing=True)
    def _loop(self, iterator, num_steps):
        state, strategy = self._state, self._strategy
        self._sums.assign(tf.zeros_like(self._sums))
        first = state.step.read_value()
        end = first + num_steps
        ids = tf.TensorArray(tf.int64, size=0, dynamic_size=True) if self._log_ids else ()
        losses = (
            tf.TensorArray(tf.float32, size=tf.cast(num_steps, tf.int32))
            if self._log_losses
            else ()
        )
        for step in tf.range(first, end):
            batch = next(iterator)
            due = self._clock.is_due(end - step)
            if due:
                ids_there = first_replica(strategy, batch['ids'])
                due = self._clock.measure_wait(ids_there, after=self._sums)
            grads, moving, out = strategy.run(self._reduced, args=(batch, step, due))
            out = first_replica(strategy, out)
            if self._log_ids:
                ids = ids.write(ids.size(), out['ids'])
            if self._log_losses:
                losses = losses.write(tf.cast(step - first, tf.int32), out['sums'][1])
            if out['finite']:
                strategy.run(self._apply, args=(grads, moving))
                self._sums.assign_add(tf.cast(out['sums'], tf.float64))
            else:
                tf.numpy_function(self._skipped.append, [step], [])
            if self._scaled:
                self._adapt_loss_scale(out['finite'])
        state.step.assign(end)
        totals = {'sums': self._sums.read_value()}
        if self._log_ids:
            totals['ids'] = ids.stack()
        if self._log_losses:
            totals['losses'] = losses.stack()
        return totals

    def _reduced(self, batch, step, due):
        """One replica's part of a step up to the update; what it returns is equal everywhere."""
        context = tf.distribute.get_replica_context()
        scale = tf.identity(self._state.loss_scale) if self._scaled else 1.0
        state = self._state
        moving = [tf.convert_to_tensor(v.value) for v in state.moving]
        added = self._add(
            [tf.convert_to_tensor(v.value) for v in state.model.trainable_variables],
            moving,
            hide({key: value for key, value in batch.items() if key != 'ids'}),
            step,
            tf.cast(context.replica_id_in_sync_group, tf.int64),
            scale,
        )
        if self._times_work:
            self._clock.measure_work(due, [g for g in added.gradients if g is not None])
        added = added.filled(self._reduce(added.flat()))
        moving = self._gradients.updated(moving, added)
        grads, loss, losses = self._gradients.divided(added, scale if self._scaled else None)
        half_squares = [tf.nn.l2_loss(tf.cast(g, tf.float32)) for g in grads if g is not None]
        half_square = tf.add_n(half_squares)
        out = {
            # The update waits for this, so it takes the shortest way from the gradients.
            'finite': tf.math.is_finite(half_square + loss),
            'sums': tf.concat(
                [
                    tf.stack([1.0, loss, tf.sqrt(2 * half_square), *losses[: self._named]]),
                    *added.metrics,
                ],
                0,
            ),
        }
        if self._log_ids:
            mine = tf.one_hot(context.replica_id_in_sync_group, self._replicas, dtype=tf.int64)
            out['ids'] = context.all_reduce(
                tf.distribute.ReduceOp.SUM, tf.reshape(mine[:, None] * batch['ids'], [-1])
            )
        return grads, moving, out

    def _reduce(self, tensors):
        """Sums tensors over all replicas."""
        if self._canonical:
            return canonical.over_replicas(tensors, self._replicas)
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)

    def _apply(self, grads, moving):
        """One replica's update from reduced gradients; the optimizer clips what is reduced."""
        variables = self._state.model.trainable_variables
        pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
        update.apply(self._state.optimizer, *zip(*pairs, strict=True))
        for variable, value in zip(self._state.moving, moving, strict=True):
            variable.assign(value)

    def _adapt_loss_scale(self, finite):
        state = self._state
        good = tf.where(finite, state.good_steps + 1, 0)
        grow = good >= LOSS_SCALE_GROWTH_STEPS
        scale = state.loss_scale.read_value()
        state.loss_scale.assign(
            tf.where(finite, tf.where(grow, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0))
        )
        state.good_steps.assign(tf.where(grow, tf.zeros_like(good), good))


def _not_deterministic(error: tf.errors.OpError, jit_compile: bool) -> ConfigError | None:
    """What to do about an operation without a deterministic kernel; None if that is not it."""
    said = re.search(r'[^.:\n]*determinis[^.\n]*', error.message, re.IGNORECASE)
    if said is None:
        return None
    other = 'train.jit_compile = False, or ' if jit_compile else ''
    return ConfigError(
        f'TensorFlow says: "{said[0].strip()}." Set {other}strategy.deterministic = False, with '
        'which equal runs need not end with equal bits.'
    )
