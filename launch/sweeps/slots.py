"""The host's cores and GPUs, divided among the trials that run at a time."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from launch.local import visible_gpus
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one trial.

    Attributes:
        cores: that it may use, by number.
        gpus: likewise, by CUDA's names; None where there are none.
    """

    cores: frozenset[int]
    gpus: tuple[str, ...] | None

    @contextlib.contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """Lets what is started in the block have the cores; gives its environment variables."""
        before = os.sched_getaffinity(0)
        # A child has the cores of its parent at its start; TensorFlow makes a thread for each.
        os.sched_setaffinity(0, self.cores)
        try:
            own = {} if self.gpus is None else {'CUDA_VISIBLE_DEVICES': ','.join(self.gpus)}
            yield {**os.environ, **own}
        finally:
            os.sched_setaffinity(0, before)


def slots(parallel: int | None, gpus_per_trial: int) -> list[Slot]:
    """Divides this host.

    Args:
        parallel: how many trials run at a time; None has as many as the GPUs suffice for, and one
            where there are none.
        gpus_per_trial: how many each needs at least, where there are any.

    Raises:
        ConfigError: there are too few GPUs.
    """
    gpus = visible_gpus()
    parallel = parallel or max(1, len(gpus) // gpus_per_trial)
    if gpus and parallel * gpus_per_trial > len(gpus):
        raise ConfigError(
            f'--parallel={parallel} trials need {gpus_per_trial} GPU(s) each, but there are '
            f'{len(gpus)}: {",".join(gpus)}. Use --parallel={max(1, len(gpus) // gpus_per_trial)}, '
            'or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU.'
        )
    cores = sorted(os.sched_getaffinity(0))
    each, share = max(1, len(cores) // parallel), len(gpus) // parallel
    found = []
    for index in range(parallel):
        first = index * each % len(cores)
        own = tuple(gpus[index * share : (index + 1) * share]) if gpus else None
        found.append(Slot(frozenset(cores[first : first + each]), own))
    return found
