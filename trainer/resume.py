"""Whether a run may continue from a checkpoint (no TensorFlow)."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from trainer.errors import ConfigError, nearest

# The batch of a step is a function of these and the step.
FIXED = ('seed', 'global_batch_size', 'num_examples', 'data_fingerprint')


def tell_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Logs how the topology differs from that of the checkpoint, on which the bits depend."""
    changed = [
        f'{name} was {then.get(name)!r}, is {now[name]!r}'
        for name in now
        if then.get(name) != now[name]
    ]
    if changed:
        logging.warning('The bits will be other ones than before: %s.', '; '.join(changed))


def check_unchanged(
    manifest: Mapping[str, Any], current: Mapping[str, Any], allow_changes: tuple[str, ...] = ()
) -> None:
    """Refuses to continue a run whose examples would be others, or come in another order.

    Args:
        manifest: of the checkpoint that is restored.
        current: this run's value of every name in `FIXED`.
        allow_changes: the names that may differ.

    Raises:
        ConfigError: another value differs, or a name in `allow_changes` is unknown.
    """
    # Gin hands over ('seed') as the string that it is.
    allowed = (allow_changes,) if isinstance(allow_changes, str) else tuple(allow_changes)
    for name in allowed:
        if name not in FIXED:
            raise ConfigError(
                f'train.allow_changes names {name!r}; possible are {", ".join(FIXED)}.'
                + nearest(str(name), FIXED)
            )
    changed = [name for name in FIXED if manifest.get(name) != current[name]]
    refused = [name for name in changed if name not in allowed]
    if refused:
        values = ', '.join(f'{n} = {manifest.get(n)!r} (now {current[n]!r})' for n in refused)
        every = tuple(name for name in FIXED if name in {*allowed, *refused})
        raise ConfigError(
            f'The checkpoint of step {manifest["step"]} was trained with {values}. To continue '
            'would show other examples than an undisturbed run. Restore what it was, use another '
            f'model_dir, or, if it is meant, set train.allow_changes = {every!r}.'
        )
    for name in changed:
        logging.warning('%s was %r and is now %r.', name, manifest.get(name), current[name])
