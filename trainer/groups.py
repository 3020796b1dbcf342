"""Groups of variables, named by patterns of their paths, that are trained each in its own way.

One concept for what is otherwise several: freezing, rates of layers, exclusions from weight decay,
several optimizers in one step.
"""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras

from trainer.errors import ConfigError

# Of the layers of Keras: biases, and all that normalisation learns.
_NOT_DECAYED = ('*/bias', '*/gamma', '*/beta', '*/scale', '*norm*')


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """How variables whose paths match a pattern are trained.

    The first group with a pattern that matches decides alone; a variable that no group matches is
    trained as if there were none.

    Attributes:
        paths: glob patterns of variables' paths, such as '*/bias'; `*` matches `/` too.
        rate: factor on the learning rate, for the gradient and for weight decay alike.
        frozen: whether the variables stay as they are: not trained, not decayed, no optimizer
            slots, but in the checkpoint. A layer of which all variables are frozen, its
            statistics included, behaves as `trainable = False` in Keras: batch normalisation
            then uses and keeps its moving statistics.
        weight_decay: whether the optimizer's decay applies; or patterns: it applies to the
            variables of this group that match one.
        optimizer: an optimizer of the group's own, uncalled; None for that of the run. What an
            optimizer does over all its variables, such as `global_clipnorm`, it does over the
            group.
        loss: name of the loss that trains the group; None for the sum of all.
        may_be_empty: whether it is no mistake that a pattern matches nothing.

    Raises:
        ConfigError: a value is out of range, or contradicts `frozen`.
    """

    paths: str | Sequence[str]
    rate: float = 1.0
    frozen: bool = False
    weight_decay: bool | str | Sequence[str] = True
    optimizer: Callable[[], keras.optimizers.Optimizer] | None = None
    loss: str | None = None
    may_be_empty: bool = False

    def __post_init__(self):
        if not self.patterns:
            raise ConfigError("Group.paths is empty. Give it a pattern, such as '*/bias'.")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(
                f'Group.rate of {self._name} is {self.rate}; it must be above 0. Set frozen = True '
                'for what shall not be trained.'
            )
        if self.loss is not None and not isinstance(self.loss, str):
            raise ConfigError(f'Group.loss of {self._name} is {self.loss!r}; it must be a name.')
        if self.frozen and (self.rate != 1 or self.optimizer or self.loss):
            raise ConfigError(
                f'The group {self._name} is frozen, so a rate, optimizer or loss has no effect. '
                'Remove it, or frozen.'
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, also where one was given as a text."""
        return (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)

    @property
    def _name(self) -> str:
        return repr(self.paths if isinstance(self.paths, str) else list(self.paths))

    def matches(self, path: str) -> bool:
        """Tells whether a pattern matches a path."""
        return matches(path, self.patterns)

    def decays(self, path: str) -> bool:
        """Tells whether weight decay applies to a variable of this group."""
        if isinstance(self.weight_decay, bool):
            return self.weight_decay
        return matches(path, self.weight_decay)


REST = Group('*')


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Tells whether one of some glob patterns matches a path; `*` matches `/` too."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def nearest_paths(pattern: str, paths: Sequence[str]) -> str:
    """Returns a sentence with the paths that are most like a pattern that matches none."""
    plain = pattern.replace('*', '').strip('/')
    close = difflib.get_close_matches(plain, paths, n=3, cutoff=0.5)
    parts = [path for path in paths if plain and plain[:4] in path][:3]
    return f'The nearest paths are {", ".join(close or parts or paths[:3])}.'


def no_decay(paths: str | Sequence[str] = _NOT_DECAYED) -> Group:
    """Returns a group without weight decay: by default, biases and normalisation.

    Args:
        paths: patterns, which may match nothing.
    """
    return Group(paths, weight_decay=False, may_be_empty=True)


def layerwise_rates(
    paths: Sequence[str], factor: float, weight_decay: bool | str | Sequence[str] = True
) -> tuple[Group, ...]:
    """Returns groups whose rates fall from the output down to the input.

    Layer-wise decay of the rate for fine-tuning, as in ULMFiT (https://arxiv.org/abs/1801.06146).

    Args:
        paths: patterns, from the output down: the first keeps the rate, the n-th has it times
            factor ** (n - 1).
        factor: between 0 and 1, such as 0.75.
        weight_decay: as for `Group`.

    Raises:
        ConfigError: the factor is out of range.
    """
    if not 0 < factor <= 1:
        raise ConfigError(
            f'layerwise_rates.factor is {factor}; it must lie between 0 and 1, such as 0.75.'
        )
    return tuple(
        Group(path, rate=factor**depth, weight_decay=weight_decay)
        for depth, path in enumerate(paths)
    )


def flat(groups: Group | Sequence[Group | Sequence[Group]]) -> list[Group]:
    """Returns groups in order, out of the lists that functions such as `layerwise_rates` return.

    Raises:
        ConfigError: something else is among them.
    """
    if isinstance(groups, Group):
        return [groups]
    if not isinstance(groups, list | tuple):
        raise ConfigError(
            f'{groups!r} is no Group. Write train.groups = [@Group()], with the parentheses.'
        )
    return [group for each in groups for group in flat(each)]


def assign(groups: Sequence[Group], model: keras.Model) -> dict[str, Group]:
    """Finds the group of every variable of a model, and freezes those of frozen groups.

    Args:
        groups: in order; the first that matches wins.
        model: built; changed where something is frozen.

    Returns:
        Path -> group, `REST` for variables that none matches.

    Raises:
        ConfigError: a pattern matches nothing, or a group has no effect, or all is frozen.
    """
    variables = [v for v in model.variables if not v.path.endswith('seed_generator_state')]
    found = {v.path: next((g for g in groups if g.matches(v.path)), REST) for v in variables}
    trained = [v.path for v in model.trainable_variables]
    for group in groups:
        _check_effect(group, found, trained)
    for variable in variables:
        if found[variable.path].frozen:
            variable.trainable = False
    for layer in model._flatten_layers():
        # Those of a layer that has no name of its own yet are not in the table.
        own = [found[v.path] for v in layer.variables if v.path in found]
        if own and all(group.frozen for group in own):
            layer.trainable = False
    if not model.trainable_variables:
        raise ConfigError(
            'All variables of the model are frozen, so there is nothing to train. Leave some of '
            f'them to be trained: {", ".join(trained[-3:])} are the last.'
        )
    return found


def _check_effect(group: Group, found: Mapping[str, Group], trained: Sequence[str]) -> None:
    if group.may_be_empty:
        return
    # The statistics of a layer can be frozen; nothing else can be said of them.
    paths = list(found) if group.frozen else trained
    patterns = [(pattern, paths) for pattern in group.patterns]
    if not isinstance(group.weight_decay, bool):
        decays = group.weight_decay
        own = [path for path in paths if found[path] is group]
        patterns += [(p, own) for p in ((decays,) if isinstance(decays, str) else decays)]
    what = '' if group.frozen else ' that is trained'
    for pattern, among in patterns:
        if not fnmatch.filter(among, pattern):
            raise ConfigError(
                f'The pattern {pattern!r} of a group matches no variable{what}. '
                f'{nearest_paths(pattern, among)}'
            )
    if group not in found.values():
        raise ConfigError(
            f'The group {list(group.patterns)} has no effect: groups before it match all of its '
            'variables. Put it before them, or remove it.'
        )


@dataclasses.dataclass(frozen=True)
class Share:
    """What one optimizer trains.

    Attributes:
        optimizer: of Keras, built for `variables`.
        variables: what it trains.
        groups: the group of each.
    """

    optimizer: keras.optimizers.Optimizer
    variables: Sequence[keras.Variable]
    groups: Sequence[Group]


class GroupedOptimizer:
    """The optimizers of a run with groups, as one; see `trainer.update` for how they are applied.

    Attributes:
        shares: what each trains, that of the run itself first.

    Args:
        optimizer: of the run; not built.
        variables: all that are trained.
        groups: path -> group.
        make: calls what `Group.optimizer` holds.

    Raises:
        ConfigError: nothing is left for the optimizer of the run.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[keras.Variable],
        groups: Mapping[str, Group],
        make: Callable[[Callable], keras.optimizers.Optimizer],
    ):
        own = dict.fromkeys(groups[v.path] for v in variables if groups[v.path].optimizer)
        shares = [(optimizer, [g for g in groups.values() if not g.optimizer])]
        shares += [(make(group.optimizer), [group]) for group in own]
        self.shares = []
        for one, its_groups in shares:
            its = [v for v in variables if groups[v.path] in its_groups]
            if not its:
                raise ConfigError(
                    'Groups with optimizers of their own take all variables, so train.optimizer '
                    'has nothing to train. Leave the optimizer of one of these groups to it.'
                )
            one.build(its)
            self.shares.append(Share(one, its, [groups[v.path] for v in its]))

    @property
    def variables(self) -> list[keras.Variable]:
        """Those of all optimizers, rates that are constants among them."""
        return [v for share in self.shares for v in share.optimizer.variables]

    @property
    def learning_rate(self):
        """That of the run's own optimizer."""
        return self.shares[0].optimizer.learning_rate

    def split(
        self, gradients: Sequence, variables: Sequence[keras.Variable]
    ) -> Iterator[tuple[keras.optimizers.Optimizer, list, list]]:
        """Yields each optimizer with those of the gradients and variables that are its own."""
        given = {id(v): (g, v) for g, v in zip(gradients, variables, strict=True)}
        for share in self.shares:
            pairs = [given[id(v)] for v in share.variables if id(v) in given]
            if pairs:
                yield share.optimizer, *map(list, zip(*pairs, strict=True))
