import pytest

from launch.place import of_hosts, of_scheduler, ports
from trainer.errors import ConfigError

SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[2,10]',
    'SLURM_STEP_NUM_TASKS': '2',
    'SLURM_PROCID': '1',
}
RAY = {
    'PHALANX_RANK': '2',
    'PHALANX_HOSTS': '3',
    'PHALANX_LEADER': '10.0.0.1',
    'PHALANX_PORT': '2222',
}


def test_under_slurm_hosts_are_in_the_order_of_slurm():
    place = of_scheduler('slurm', SLURM)
    assert place.names == ('node2', 'node10')
    assert (place.rank, place.hosts, place.leader) == (1, 2, 'node2')
    assert place.name(1) == 'host 1 (node10)'
    assert not place.stays


def test_under_slurm_the_step_counts_and_not_the_job():
    place = of_scheduler('slurm', {**SLURM, 'SLURM_JOB_NODELIST': 'node[1-9]'})
    assert place.hosts == 2


def test_the_leader_listens_where_all_hosts_look_for_it():
    first = of_scheduler('slurm', SLURM)
    other = of_scheduler('slurm', {**SLURM, 'SLURM_PROCID': '0'})
    assert first.ports == other.ports
    assert len(set(first.ports)) == 3
    assert all(10_000 <= port < 30_000 for name in 'abcdefgh' for port in ports(name))


def test_ray_and_kubernetes_say_all_there_is_to_know():
    place = of_scheduler('ray', RAY)
    assert (place.rank, place.hosts, place.leader, place.ports) == (2, 3, '10.0.0.1', (2222,))
    pod = {**RAY, 'JOB_COMPLETION_INDEX': '1'}
    place = of_scheduler('kubernetes', pod)
    assert place.rank == 1
    assert place.stays


@pytest.mark.parametrize(
    ('scheduler', 'change', 'said'),
    [
        ('slurm', {'SLURM_PROCID': ''}, 'SLURM_PROCID is not set. A task is started by'),
        ('slurm', {'SLURM_PROCID': 'x'}, 'SLURM_PROCID=x is not a whole number'),
        ('slurm', {'SLURM_STEP_NUM_TASKS': '4'}, 'The step has 4 tasks on 2 hosts'),
        ('slurm', {'SLURM_STEP_NODELIST': 'node[2'}, 'node'),
        ('ray', {'PHALANX_RANK': '3'}, 'PHALANX_RANK=3, but there are 3 hosts'),
        ('kubernetes', {}, 'JOB_COMPLETION_INDEX is not set'),
    ],
)
def test_what_is_missing_or_wrong_is_named(scheduler, change, said):
    environ = {**(SLURM if scheduler == 'slurm' else RAY), **change}
    with pytest.raises(ConfigError) as error:
        of_scheduler(scheduler, environ)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ('hosts', 'rank', 'said'),
    [
        (['a', 'b'], 2, '--rank=2 is none of the 2 hosts, which are counted from 0: a,b.'),
        (['a', 'b', 'a'], 0, '--hosts names a twice.'),
        (['a', 'b', ''], 0, '--hosts=a,b, has a comma too many'),
    ],
)
def test_hosts_that_a_user_names_are_checked(hosts, rank, said):
    with pytest.raises(ConfigError) as error:
        of_hosts(hosts, rank, job='/shared/run')
    assert said in str(error.value)
