"""What one replica adds to a step: the gradients of its share of a batch, and sums.

Losses are summed, not averaged, on each replica. All that is returned is to be summed over the
replicas, and then divided, once, by the weight of the global batch: so a replica with fewer or
lighter examples counts for what it has.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from trainer import canonical
from trainer.errors import ConfigError, nearest
from trainer.objective import Found, Objective, WholeStep
from trainer.replicas import in_parts as seen_in_parts
from trainer.state import State
from trainer.sums import MetricSums, weigh


@dataclasses.dataclass
class Added:
    """What a share of a batch adds, by what is done with it once it is summed.

    Attributes:
        gradients: a tensor for each variable of each part, see `Gradients`; None where nothing
            leads from its losses to the variable.
        losses: sums of weighted losses, in the order of the objective's names.
        weights: sums of weights: none if each element counts 1, one that all losses share, or one
            of each loss.
        penalties: the regularisation penalties times the share's part of the batch: none, or one.
        metrics: see `MetricSums.increments`.
        moving: of the statistics that the model updates, the share's part of their mean.
    """

    gradients: list[tf.Tensor | None]
    losses: list[tf.Tensor]
    weights: list[tf.Tensor]
    penalties: list[tf.Tensor]
    metrics: list[tf.Tensor]
    moving: list[tf.Tensor]

    def flat(self) -> list[tf.Tensor]:
        """Returns all tensors in a row."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [tensor for tensors in fields for tensor in tensors if tensor is not None]

    def filled(self, tensors: Sequence[tf.Tensor]) -> 'Added':
        """Returns the same with other tensors, in the order of `flat`."""
        rest = iter(tensors)
        return Added(
            *(
                [None if old is None else next(rest) for old in getattr(self, field.name)]
                for field in dataclasses.fields(self)
            )
        )


class _Part(NamedTuple):
    """Losses that are differentiated together, as one weight divides them all."""

    losses: list[int]
    variables: list[int]
    penalised: bool


class Gradients:
    """Differentiates the objective for a replica's share of a batch.

    Args:
        state: the model.
        objective: what is minimised; its names are known.
        metrics: what is measured.
        seed: of dropout masks and the like.
        shares: into how many a global batch is divided: the replicas, or the canonical shards.
        accumulate: number of micro-batches a share is split into.
        in_parts: whether the objective never sees the share of a replica as a whole.

    Raises:
        ConfigError: a variable is to be trained by a loss that there is not.
    """

    def __init__(
        self,
        state: State,
        objective: Objective,
        metrics: MetricSums,
        *,
        seed: int,
        shares: int,
        accumulate: int = 1,
        in_parts: bool = False,
    ):
        self._state, self._objective, self._metrics = state, objective, metrics
        self._seed, self._shares, self._accumulate = seed, shares, accumulate
        self._in_parts = in_parts or accumulate > 1
        for name in filter(None, state.trained_by):
            if isinstance(objective, WholeStep):
                raise ConfigError(
                    f'Group.loss = {name!r} does not go with train.train_step, which computes all '
                    'gradients itself. Remove it.'
                )
            if name not in objective.names:
                raise ConfigError(
                    f'Group.loss = {name!r} is none of the losses, which are '
                    f'{", ".join(map(repr, objective.names))}.{nearest(name, objective.names)}'
                )
        # Known once it has been traced.
        self._parts: list[_Part] = []
        self._moves: list[bool] = []

    def of_replica(self, trainable, moving, batch, step, replica, scale) -> Added:
        """Returns what a replica adds, whose share of the batch is one.

        Args:
            trainable, moving: values for `state.model.trainable_variables` and `state.moving`.
            batch: 'inputs', 'labels' and, if the examples have them, 'weights' of the replica.
            step, replica: int64 scalars.
            scale: by which the gradients come out too large.
        """
        return self._share(trainable, moving, batch, step, replica, scale)

    def of_shards(self, trainable, moving, batch, step, replica, scale, *, count: int) -> Added:
        """Returns what a replica adds that has `count` canonical shards; see `of_replica`."""
        shape: list[Added] = []

        def shard(index):
            added = self._share(
                trainable, moving, _piece(batch, index, count), step, replica * count + index, scale
            )
            shape[:] = [added]
            return added.flat()

        tensors = canonical.sum_of(shard, count)
        return shape[0].filled(tensors)

    def divided(self, added: Added, scale) -> tuple[list, tf.Tensor, list[tf.Tensor]]:
        """Returns gradients, loss and named losses of the global batch from what all have added.

        Args:
            added: the sum over all shares.
            scale: as for `of_replica`.

        Returns:
            A gradient for each trainable variable, or None; the total loss with the penalties; the
            losses by name.
        """
        factors = [tf.math.divide_no_nan(1.0, weight) for weight in added.weights]
        of_loss = factors * len(added.losses) if len(factors) == 1 else factors
        losses = [
            loss * of_loss[index] if of_loss else loss for index, loss in enumerate(added.losses)
        ]
        gradients: list = [None] * len(self._state.model.trainable_variables)
        rest = iter(added.gradients)
        for part in self._parts:
            for variable in part.variables:
                gradient = next(rest)
                if gradient is None:
                    continue
                if of_loss:
                    gradient *= tf.cast(of_loss[part.losses[0]], gradient.dtype)
                known = gradients[variable]
                gradients[variable] = gradient if known is None else known + gradient
        if scale is not None:
            gradients = [g if g is None else g / tf.cast(scale, g.dtype) for g in gradients]
        penalties = [p * of_loss[0] if of_loss else p for p in added.penalties]
        return gradients, tf.add_n([*losses, *penalties]), losses

    def updated(self, moving: Sequence[tf.Tensor], added: Added) -> list[tf.Tensor]:
        """Returns the new values of `state.moving` from the old and what all have added."""
        means = iter(added.moving)
        return [next(means) if m else old for m, old in zip(self._moves, moving, strict=True)]

    def _share(self, trainable, moving, batch, step, share, scale) -> Added:
        if self._accumulate == 1:
            return self._micro_batch(trainable, moving, batch, step, share, scale)
        return self._accumulated(trainable, moving, batch, step, share, scale)

    def _micro_batch(self, trainable, moving, batch, step, share, scale, micro_batch=None) -> Added:
        """What one share adds, or one micro-batch of it.

        What is differentiated is the sum of weighted losses plus the penalties times the sum of
        weights, over the global number of elements: divided by the global weight once it is
        summed, it becomes the weighted mean plus the penalties.
        """
        state = self._state
        seeds = self._random_state(
            step, share, tf.zeros([], tf.int64) if micro_batch is None else micro_batch
        )
        weights = batch.get('weights')
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as tape:
            tape.watch(trainable)
            (found, given), updated, penalties = state.call(
                functools.partial(self._found, batch), trainable, moving, seeds
            )
            losses, totals = [], []
            for values, mask in found.losses.values():
                elements = tf.cast(tf.size(values) * self._shares * self._accumulate, tf.float32)
                loss, total = (each / elements for each in weigh(values, weights, mask))
                losses.append(loss)
                totals.append(total)
            masked = len(losses) > 1 and any(mask is not None for _, mask in found.losses.values())
            penalty = None
            if penalties and given is None:
                penalty = tf.add_n([tf.cast(p, tf.float32) for p in penalties])
            self._parts = self._division(masked and given is None)
            targets = []
            for part in self._parts:
                target = tf.add_n([losses[index] for index in part.losses])
                if part.penalised and penalty is not None:
                    target += totals[part.losses[0]] * penalty
                targets.append(target * scale)
        if given is None:
            gradients = [
                gradient
                for part, target in zip(self._parts, targets, strict=True)
                for gradient in tape.gradient(target, [trainable[i] for i in part.variables])
            ]
        else:
            share = totals[0] * scale
            gradients = [g if g is None else g * tf.cast(share, g.dtype) for g in given]
        del tape
        weighted = weights is not None or any(m is not None for _, m in found.losses.values())
        self._moves = [
            new is not old and new.dtype.is_floating
            for new, old in zip(updated, moving, strict=True)
        ]
        means = [new for new, moves in zip(updated, self._moves, strict=True) if moves]
        return Added(
            [g if g is None else tf.convert_to_tensor(g) for g in gradients],
            losses,
            (totals if masked else totals[:1]) if weighted else [],
            [] if penalty is None else [totals[0] * penalty],
            self._metrics.increments(batch.get('labels'), found.outputs, weights),
            [mean / self._shares for mean in means],
        )

    def _accumulated(self, trainable, moving, batch, step, share, scale) -> Added:
        """The same for a share in micro-batches, one after the other to save memory."""
        count = self._accumulate

        def micro_batch(index, moving):
            added = self._micro_batch(
                trainable, moving, _piece(batch, index, count), step, share, scale, index
            )
            # Statistics go from one micro-batch to the next; only the last ones are added up.
            new = [mean * self._shares for mean in added.moving]
            return added, self.updated(moving, dataclasses.replace(added, moving=new))

        # The first by itself: what comes out of it is what the others are added to.
        first, moving = micro_batch(tf.zeros([], tf.int64), moving)

        def body(index, moving, sums):
            added, moving = micro_batch(index, moving)
            sums = [a + b for a, b in zip(sums, _summed(added).flat(), strict=True)]
            return index + 1, moving, sums

        _, moving, sums = tf.while_loop(
            lambda index, *_: index < count,
            body,
            (tf.ones([], tf.int64), moving, _summed(first).flat()),
            parallel_iterations=1,
        )
        means = [new / self._shares for new, m in zip(moving, self._moves, strict=True) if m]
        return dataclasses.replace(_summed(first).filled(sums), moving=means)

    def _found(self, batch) -> tuple[Found, list | None]:
        """The losses, and the gradients where the user computes these."""
        with seen_in_parts(self._in_parts):
            if isinstance(self._objective, WholeStep):
                return self._objective.with_gradients(self._state.model, batch)
            return self._objective(self._state.model, batch, training=True), None

    def _division(self, masked: bool) -> list[_Part]:
        """Which losses train which variables, and which of them are differentiated together.

        Where elements are masked each loss has a total weight of its own, which is only known once
        all replicas have added theirs.
        """
        names = self._objective.names
        variables: dict[str | None, list[int]] = {}
        for index, name in enumerate(self._state.trained_by):
            variables.setdefault(name, []).append(index)
        parts = []
        for name, trained in variables.items():
            losses = list(range(len(names))) if name is None else [names.index(name)]
            rows = [[index] for index in losses] if masked else [losses]
            parts += [_Part(row, trained, penalised=row is rows[0]) for row in rows]
        return parts

    def _random_state(self, step, share, micro_batch):
        """Seeds for the model's random generators: a function, so nothing has to be saved."""
        seeds = []
        for index, variable in enumerate(self._state.seeds):
            seed = tf.stack([tf.constant(self._seed, tf.int64), tf.constant(index, tf.int64)])
            for part in (step, share, micro_batch):
                seed = tf.random.experimental.stateless_fold_in(seed, part)
            seeds.append(tf.cast(seed, variable.dtype))
        return seeds


def compiled(add: Callable[..., Added]) -> Callable[..., Added]:
    """Returns a function that adds the same, compiled with XLA."""
    shape: list[Added] = []

    @functools.partial(tf.function, jit_compile=True, autograph=False)
    def flat(*args):
        shape[:] = [add(*args)]
        return shape[0].flat()

    def added(*args):
        tensors = flat(*args)
        return shape[0].filled(tensors)

    return added


def _summed(added: Added) -> Added:
    return dataclasses.replace(added, moving=[])


def _piece(batch: dict, index: tf.Tensor, count: int) -> dict:
    """Returns one of `count` equal parts of a batch."""

    def piece(tensor):
        parts = tf.reshape(tensor, tf.concat([[count, -1], tf.shape(tensor)[1:]], 0))
        size = None if tensor.shape[0] is None else tensor.shape[0] // count
        return tf.ensure_shape(parts[index], [size, *tensor.shape[1:]])

    return tf.nest.map_structure(piece, batch)
