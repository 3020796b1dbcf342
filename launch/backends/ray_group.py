"""Where the tasks of a Ray job are: a placement group, a bundle of resources on each host."""

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from launch.job import Job

_MIB = 2**20


def bundle_of(job: Job) -> dict[str, float]:
    """Returns what the task of one host reserves; without a number of cores, one a worker."""
    each = job.resources
    needs = {'CPU': each.cpus or 1, 'GPU': each.gpus, 'memory': (each.memory_mb or 0) * _MIB}
    return {name: float(job.workers_per_host * amount) for name, amount in needs.items() if amount}


class Groups:
    """The placement group of a job, or a smaller one in its place."""

    def __init__(self, job: Job):
        self._job, self._bundle = job, bundle_of(job)
        self._count, self._group = job.hosts, None

    def whole(self, waited: float) -> PlacementGroup | None:
        """Returns the group if all of its bundles have a host.

        Args:
            waited: for how many seconds it has been waited for.
        """
        job = self._job
        if self._group is None:
            # Ray places all bundles or none, and each on a host of its own.
            self._group = placement_group([self._bundle] * self._count, strategy='STRICT_SPREAD')
        if placement_group_table(self._group)['state'] == 'CREATED':
            return self._group
        fewer = min(len(self._fitting()), self._count - 1)
        if waited > job.policy.meeting_seconds and fewer >= job.min_hosts:
            self.remove()
            self._count = fewer
        return None

    def wants(self) -> tuple[str, bool]:
        """Returns what the group waits for, and whether the cluster as it is can never give it."""
        needs = ', '.join(
            f'{amount / _MIB:g} MiB of memory' if name == 'memory' else f'{amount:g} {name}'
            for name, amount in self._bundle.items()
        )
        alive, fitting = len(_alive()), len(self._fitting())
        wanted = f'{self._count} host(s) with {needs} each'
        if fitting < self._job.min_hosts:
            return (
                f'Ray can never place this job on the cluster as it is now: it needs {wanted}, and '
                f'{fitting} of the {alive} host(s) there have that much in all',
                True,
            )
        if fitting < self._count:
            return f'waiting for {wanted}; {fitting} of the {alive} host(s) have that much', False
        return f'waiting for {wanted}; other jobs hold a part of the cluster', False

    def remove(self) -> None:
        """Gives all hosts back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _fitting(self) -> list[dict]:
        """The hosts that have enough for a bundle, whoever holds it now."""
        return [
            node
            for node in _alive()
            if all(node['Resources'].get(k, 0) >= v for k, v in self._bundle.items())
        ]


def _alive() -> list[dict]:
    return [node for node in ray.nodes() if node['Alive']]
