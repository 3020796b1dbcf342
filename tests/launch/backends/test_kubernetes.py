"""Manifests, and the flags that lead to them, without a cluster."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from launch.backends.kubernetes import Kubernetes, KubernetesOptions, define_flags, from_flags
from launch.backends.kubernetes_options import Volume, volume
from launch.job import Job, Policy, Resources
from launch.known import Submitted
from tests.cluster.pods import expand
from trainer.errors import ConfigError

yaml = pytest.importorskip('yaml', reason="pip install 'phalanx[kubernetes]'")
client = pytest.importorskip('kubernetes', reason="pip install 'phalanx[kubernetes]'").client

GOLDEN = Path(__file__).parent / 'golden'
HOSTILE = 'a b\'c"d`x`$(x);x\r\n- y: $(HOME) $$(HOME) $ $$ \\ #z\n\t% ü'

JOB = Job(
    name='digits',
    model_dir='/models/digits',
    config='[["digits.gin", 1, "STEPS = 600\\n"]]',
    flags=('--mode=train',),
    workers=3,
    min_workers=3,
    directory='/work',
    python='python3',
    environment={'PYTHONPATH': '/work'},
)
OPTIONS = KubernetesOptions(
    image='registry.example/phalanx:1', volumes=(Volume('training', '/models'),)
)
FULL = (
    dataclasses.replace(
        JOB,
        workers=8,
        min_workers=4,
        workers_per_host=2,
        resources=Resources(cpus=4, memory_mb=16_000, gpus=2),
        policy=Policy(max_restarts=5, grace_seconds=90.5, elastic=True),
        time_limit_seconds=3601,
    ),
    dataclasses.replace(
        OPTIONS,
        namespace='research',
        queue='team-a',
        volumes=(
            *OPTIONS.volumes,
            Volume('nfs://files.example/data', '/data', read_only=True),
            Volume('empty', '/scratch'),
        ),
        secrets=('object-store',),
        pull_secrets=('registry',),
        service_account='trainer',
        gpu_resource='amd.com/gpu',
        node_selector=(('pool', 'a100'),),
        tolerations=(('gpu', None, 'NoSchedule'), ('team', 'a', None)),
        labels=(('cost-centre', '17'),),
        annotations=(('kueue.x-k8s.io/podset-required-topology', 'rack'),),
        shm_mb=512,
        retries=3,
        tensorboard=True,
    ),
)


def _kind(kind, job=JOB, options=OPTIONS):
    return job, dataclasses.replace(options, kind=kind)


JOBS = {
    'jobset': _kind('jobset'),
    'job': _kind('job'),
    'trainjob': _kind('trainjob'),
    'auto': _kind('auto'),
    'jobset-full': _kind('jobset', *FULL),
    'job-full': _kind('job', *FULL),
    'trainjob-full': _kind('trainjob', *FULL),
    'hostile': (
        dataclasses.replace(
            JOB,
            config=f'[["a", 1, {json.dumps(HOSTILE)}]]',
            flags=(f'--gin_bindings=X={HOSTILE}',),
            model_dir='/models/it\'s "100%" #1;$(x)',
            environment={'VALUE': HOSTILE},
            directory='/srv/$(x) y',
        ),
        OPTIONS,
    ),
}


def _documents(name):
    job, options = JOBS[name]
    return list(yaml.safe_load_all(Kubernetes(options).plan(job)))


def _pod(documents):
    found = documents[-1]['spec']
    if documents[-1]['kind'] == 'TrainJob':
        found = documents[-2]['spec']['template']['spec']
    if 'replicatedJobs' in found:
        found = found['replicatedJobs'][0]['template']['spec']
    return found, found['template']['spec']


def _read(*argv):
    values = flags.FlagValues()
    define_flags(values)
    values(['phalanx', *argv])
    return from_flags(values)


@pytest.mark.parametrize('name', JOBS)
def test_the_plan_is_the_golden_one(name):
    job, options = JOBS[name]
    path = GOLDEN / f'kubernetes-{name}.yaml'
    assert Kubernetes(options).plan(job) == path.read_text(encoding='utf-8')


@pytest.mark.parametrize('name', JOBS)
def test_every_object_of_the_plan_is_one_for_the_official_client(name):
    for document in _documents(name):
        for kind, found in _with_core_kinds(document):
            _check_core(kind, found)


def _with_core_kinds(document):
    """A document if it is of Kubernetes itself, and else what it has of it."""
    kind = document['kind']
    if kind in ('JobSet', 'TrainingRuntime'):
        spec = document['spec']
        spec = spec if kind == 'JobSet' else spec['template']['spec']
        for each in spec['replicatedJobs']:
            yield 'JobTemplateSpec', each['template']
    elif kind != 'TrainJob':
        yield kind, document


def _check_core(kind, found):
    model = getattr(client, f'V1{kind}')
    if hasattr(model, 'model_validate'):  # From 37 on they refuse what they do not know.
        read = model.model_validate(found)
    else:
        response = type('Response', (), {'data': json.dumps(found)})
        read = client.ApiClient().deserialize(response, model.__name__)
    # Before, they leave it out.
    assert client.ApiClient().sanitize_for_serialization(read) == found


@pytest.mark.parametrize('name', ['claim', 'rbac'])
def test_the_manifests_beside_the_guide_are_some_for_the_official_client(name):
    path = Path(__file__).parents[3] / 'docs' / 'clusters' / 'kubernetes' / f'{name}.yaml'
    for document in yaml.safe_load_all(path.read_text()):
        _check_core(document['kind'], document)


def test_a_misspelt_field_is_none_for_the_official_client():
    job = _documents('job')[-1]
    job['spec']['backofLimit'] = 3
    with pytest.raises((AssertionError, ValueError)):
        _check_core('Job', job)


@pytest.mark.parametrize('name', JOBS)
def test_every_object_of_jobset_and_kubeflow_is_one_for_their_models(name):
    models = pytest.importorskip(
        'kubeflow_trainer_api.models', reason='pip install kubeflow-trainer-api'
    )
    known = {
        'JobSet': models.JobsetV1alpha2JobSet,
        'TrainJob': models.TrainerV1alpha1TrainJob,
        'TrainingRuntime': models.TrainerV1alpha1TrainingRuntime,
    }
    for document in _documents(name):
        if document['kind'] in known:
            # They leave out what they do not know.
            assert known[document['kind']].from_dict(document).to_dict() == document


@pytest.mark.parametrize('name', JOBS)
def test_a_pod_is_told_where_it_stands_and_finds_the_leader_by_the_name_of_its_pod(name):
    job, options = JOBS[name]
    spec, pod = _pod(_documents(name))
    told = {each['name']: each['value'] for each in pod['containers'][0]['env']}
    host, subdomain = told['PHALANX_LEADER'].split('.')
    assert spec['completionMode'] == 'Indexed'
    assert spec['completions'] == spec['parallelism'] == job.hosts == int(told['PHALANX_HOSTS'])
    assert subdomain == job.name
    names = {
        'job': 'digits-0',
        'trainjob': 'digits-node-0-0',
    }
    assert host == names.get(options.kind, 'digits-workers-0-0')


@pytest.mark.parametrize('name', JOBS)
def test_a_lost_pod_is_replaced_and_a_mistake_is_not(name):
    spec, pod = _pod(_documents(name))
    assert pod['restartPolicy'] == 'Never'  # What podFailurePolicy needs.
    ignore, fail = spec['podFailurePolicy']['rules']
    assert (ignore['action'], fail['action']) == ('Ignore', 'FailJob')
    assert fail['onExitCodes']['values'] == [1, 2]
    assert fail['onExitCodes']['containerName'] == pod['containers'][0]['name']


@pytest.mark.parametrize('name', JOBS)
def test_every_name_of_the_plan_and_of_its_pods_is_a_label_of_dns(name):
    job, _ = JOBS[name]
    documents = _documents(name)
    names = [each['metadata']['name'] for each in documents]
    names.append(f'{job.name}-workers-0-{job.hosts - 1}-abcde')
    for each in names:
        assert len(each) <= 63
        assert each.replace('-', '').isalnum()
        assert each[0].isalpha()


def test_hostile_values_arrive_as_they_were_where_kubernetes_expands_variables():
    job, _ = JOBS['hostile']
    documents = _documents('hostile')
    _, pod = _pod(documents)
    container = pod['containers'][0]
    variables = {'HOME': '/root', 'x': 'expanded'}
    command = [expand(each, variables) for each in container['command']]
    assert command == [*job.command('kubernetes', '/etc/phalanx/config.json'), '--tee']
    values = {each['name']: expand(each['value'], variables) for each in container['env']}
    assert values['VALUE'] == HOSTILE
    assert container['workingDir'] == job.directory
    assert documents[0]['data'] == {'config.json': job.config}


def test_a_plan_is_the_same_on_every_call():
    job, options = JOBS['jobset-full']
    assert Kubernetes(options).plan(job) == Kubernetes(options).plan(job)


def test_a_job_of_a_thousand_hosts_is_planned_in_less_than_a_second():
    job = dataclasses.replace(JOB, name='j' * 40, workers=8192, min_workers=8192)
    job = dataclasses.replace(job, workers_per_host=8, min_workers=8192)
    begin = time.perf_counter()
    text = Kubernetes(OPTIONS).plan(job)
    assert time.perf_counter() - begin < 1
    assert 'completions: 1024\n' in text


def test_the_back_end_is_imported_without_the_client():
    script = (
        'import sys, launch.backends.kubernetes\n'
        "assert not {'kubernetes', 'yaml', 'urllib3', 'tensorflow'} & set(sys.modules)"
    )
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, '-c', script], check=True, env=environment)


def test_without_the_client_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'yaml', None)
    with pytest.raises(ConfigError, match=r"pip install 'phalanx\[kubernetes\]'"):
        Kubernetes(OPTIONS).plan(JOB)


def _refused(job=JOB, **options):
    with pytest.raises(ConfigError) as refused:
        Kubernetes(dataclasses.replace(OPTIONS, **options)).plan(job)
    return refused.value.message


def test_no_image_is_a_mistake():
    assert 'Give --kube_image=IMAGE' in _refused(image='')


def test_a_name_that_begins_with_a_digit_is_a_mistake():
    assert '--name=job-3d' in _refused(dataclasses.replace(JOB, name='3d'))


def test_names_of_pods_that_would_be_too_long_are_a_mistake():
    # 40 characters of the job's, and as many workers as fit into no other limit.
    job = dataclasses.replace(JOB, name='j' * 40, workers=10**7, min_workers=10**7)
    assert 'too long by 1 characters' in _refused(job)


def test_a_model_dir_that_no_volume_holds_is_a_mistake():
    assert 'lies on none of the volumes (training:/models)' in _refused(
        dataclasses.replace(JOB, model_dir='/modelsother/digits')
    )


def test_a_model_dir_that_leaves_its_volume_by_dots_is_a_mistake():
    job = dataclasses.replace(JOB, model_dir='/models/../home')
    assert 'on none of the volumes' in _refused(job)


def test_a_model_dir_on_a_volume_that_ends_with_its_pod_is_a_mistake():
    volumes = (*OPTIONS.volumes, Volume('empty', '/models/digits'))
    assert 'ends with its pod' in _refused(volumes=volumes)


def test_a_model_dir_on_a_read_only_volume_is_a_mistake():
    assert 'is read-only' in _refused(volumes=(Volume('training', '/models', True),))


def test_a_configuration_too_large_for_a_config_map_is_a_mistake():
    job = dataclasses.replace(JOB, config='ü' * (1 << 19) + 'x')
    assert 'has 1,048,577 bytes, and a ConfigMap holds 1,048,576' in _refused(job)


def test_a_variable_of_phalanx_is_not_the_users():
    job = dataclasses.replace(JOB, environment={'PHALANX_PORT': '1'})
    assert '--env=PHALANX_PORT' in _refused(job)


def test_two_volumes_at_one_path_are_a_mistake():
    assert 'mounted at /models' in _refused(volumes=OPTIONS.volumes * 2)


def test_flags_are_read():
    assert _read(
        '--kube_image=image',
        '--kube_kind=job',
        '--kube_context=a/b:c',
        '--kube_namespace=n',
        '--kube_queue=q',
        '--kube_volume=claim:/models',
        '--kube_volume=nfs://files.example/a/b:/data:ro',
        '--kube_volume=empty:/scratch/',
        '--kube_secret=s',
        '--kube_secret=t',
        '--kube_pull_secret=p',
        '--kube_service_account=sa',
        '--kube_gpu_resource=amd.com/gpu',
        '--kube_node_selector=pool=a=b',
        '--kube_toleration=gpu',
        '--kube_toleration=team=a:NoExecute',
        '--kube_label=l=1',
        '--kube_annotation=a=2',
        '--kube_shm_mb=64',
        '--kube_retries=0',
        '--kube_tensorboard',
    ) == KubernetesOptions(
        image='image',
        kind='job',
        context='a/b:c',
        namespace='n',
        queue='q',
        volumes=(
            Volume('claim', '/models'),
            Volume('nfs://files.example/a/b', '/data', read_only=True),
            Volume('empty', '/scratch'),
        ),
        secrets=('s', 't'),
        pull_secrets=('p',),
        service_account='sa',
        gpu_resource='amd.com/gpu',
        node_selector=(('pool', 'a=b'),),
        tolerations=(('gpu', None, None), ('team', 'a', 'NoExecute')),
        labels=(('l', '1'),),
        annotations=(('a', '2'),),
        shm_mb=64,
        retries=0,
        tensorboard=True,
    )


def test_without_flags_the_options_are_the_defaults():
    assert _read() == KubernetesOptions()


def test_every_flag_has_a_help_text():
    values = flags.FlagValues()
    define_flags(values)
    assert all(values[name].help for name in values if name.startswith('kube_'))


@pytest.mark.parametrize(
    ('flag', 'told'),
    [
        ('--kube_kind=jobsets', "Did you mean 'jobset'?"),
        ('--kube_volume=/data:/data', 'Paths of the node are not mounted.'),
        ('--kube_volume=claim', 'SOURCE:/PATH'),
        ('--kube_volume=claim:/', 'SOURCE:/PATH'),
        ('--kube_volume=Claim:/models', 'no name of a PersistentVolumeClaim'),
        ('--kube_volume=nfs://server:/models', 'nfs://SERVER/EXPORT:/PATH'),
        ('--kube_volume=claim:/a:b', 'may not have a colon'),
        ('--kube_label=team', 'KEY=VALUE'),
        ('--kube_toleration=gpu:NoScheduel', "Did you mean 'NoSchedule'?"),
    ],
)
def test_a_flag_that_cannot_be_read_is_told_with_what_mends_it(flag, told):
    with pytest.raises(ConfigError) as refused:
        _read(flag)
    assert flag in refused.value.message
    assert told in refused.value.message


def test_a_volume_holds_what_lies_below_its_path():
    found = volume('claim:/models')
    assert found.holds('/models/a')
    assert found.holds('/models')
    assert not found.holds('/models2/a')


@pytest.mark.parametrize('handle', ['k8s://a/b/c', 'k8s://a/b/jobs/c', 'k8s://a/b/job/c/d'])
def test_a_handle_that_is_none_is_told_with_the_form_of_one(handle):
    with pytest.raises(ConfigError, match='k8s://CONTEXT/NAMESPACE/KIND/NAME'):
        Kubernetes(OPTIONS).status(Submitted(handle))


def test_a_context_that_the_kubeconfig_lacks_is_told_with_the_nearest(tmp_path, monkeypatch):
    config = {'clusters': [{'name': 'c', 'cluster': {}}], 'current-context': 'team'}
    config['users'] = [{'name': 'u', 'user': {}}]
    config['contexts'] = [{'name': 'team', 'context': {'cluster': 'c', 'user': 'u'}}]
    (tmp_path / 'config').write_text(json.dumps(config))
    monkeypatch.setenv('KUBECONFIG', str(tmp_path / 'config'))
    with pytest.raises(ConfigError, match=r"no context 'teem'. Did you mean 'team'\?"):
        Kubernetes(OPTIONS).status(Submitted('k8s://teem/n/job/x'))


def test_without_a_kubeconfig_it_is_told_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv('KUBECONFIG', str(tmp_path / 'none'))
    with pytest.raises(ConfigError, match='Set KUBECONFIG'):
        Kubernetes(OPTIONS).submit(JOB)
