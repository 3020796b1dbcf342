"""How a job stands, for every way in which a cluster may tell it."""

import pytest

from launch.backends import Task
from launch.backends.kubernetes_status import Seen, status

NOW = 1_800_000_000.0
LONG_AGO, JUST_NOW = '2027-01-15T07:00:00Z', '2027-01-15T07:59:59Z'


def _pod(rank=0, phase='Running', created=JUST_NOW, uid=None, going=False, spec=None, **status):
    meta = {
        'name': f'digits-{rank}',
        'uid': uid or f'pod-{rank}',
        'creationTimestamp': created,
        'annotations': {'batch.kubernetes.io/job-completion-index': str(rank)},
    }
    if going:
        meta['deletionTimestamp'] = JUST_NOW
    spec = {'nodeName': f'node{rank}'} if spec is None else spec
    return {'metadata': meta, 'spec': spec, 'status': {'phase': phase, **status}}


def _container(**state):
    return {'containerStatuses': [{'name': 'worker', 'state': state}]}


def _waiting(reason, message='', created=JUST_NOW, **more):
    state = {'waiting': {'reason': reason, 'message': message}}
    return _pod(phase='Pending', created=created, **_container(**state), **more)


def _terminated(code, rank=0, **more):
    phase = 'Failed' if code else 'Succeeded'
    return _pod(rank, phase, **_container(terminated={'exitCode': code, **more}))


def _condition(type_, reason='', message='', value='True'):
    return {'type': type_, 'status': value, 'reason': reason, 'message': message}


def _main(*conditions, going=False, labels=None, suspend=False, **more):
    meta = {'name': 'digits', 'uid': 'main', 'labels': labels or {}}
    if going:
        meta['deletionTimestamp'] = JUST_NOW
    spec = {'suspend': True} if suspend else {}
    return {'metadata': meta, 'spec': spec, 'status': {'conditions': list(conditions), **more}}


def _status(*pods, main=None, jobs=(), **more):
    return status(Seen(main or _main(), jobs, pods, now=NOW, **more))


def test_a_job_whose_pods_run_runs():
    found = _status(_pod(1), _pod(0))
    assert (found.state, found.reason, found.never) == ('running', '', False)
    assert found.tasks == (Task(0, 'running', 'node0'), Task(1, 'running', 'node1'))


def test_a_job_without_pods_is_pending():
    assert _status().state == 'pending'


@pytest.mark.parametrize('condition', ['Complete', 'Completed'])
def test_a_job_that_is_complete_is_finished(condition):
    found = _status(_terminated(0), main=_main(_condition(condition, 'AllJobsCompleted')))
    assert (found.state, found.tasks[0].state, found.tasks[0].code) == ('finished', 'finished', 0)


def test_the_reason_of_a_failure_is_that_of_the_job_and_not_of_its_set():
    jobs = [_main(_condition('Failed', 'PodFailurePolicy', 'Container failed with exit code 2'))]
    main = _main(_condition('Failed', 'FailedJobs', 'jobset failed'))
    found = _status(_terminated(2), main=main, jobs=jobs)
    assert found.state == 'failed'
    assert found.reason == 'PodFailurePolicy: Container failed with exit code 2'
    assert (found.tasks[0].state, found.tasks[0].code) == ('failed', 2)


def test_a_job_whose_time_has_passed_is_stopped():
    found = _status(main=_main(_condition('Failed', 'DeadlineExceeded', 'too long')))
    assert found.state == 'stopped'
    assert found.reason == 'its time limit has passed (DeadlineExceeded: too long)'


def test_a_job_whose_last_pods_have_saved_is_stopped():
    found = _status(_terminated(75), main=_main(_condition('Failed', 'MaxFailedIndexesExceeded')))
    assert (found.state, found.tasks[0].state) == ('stopped', 'stopped')


def test_a_job_that_is_being_deleted_is_cancelled():
    found = _status(_pod(going=True), main=_main(going=True))
    assert found.state == 'cancelled'
    assert found.tasks[0].reason == 'it is being deleted'


def test_a_pod_that_no_node_has_room_for_says_why_and_may_still_find_one():
    said = '0/5 nodes are available: 5 Insufficient nvidia.com/gpu.'
    condition = _condition('PodScheduled', 'Unschedulable', said, 'False')
    found = _status(_pod(phase='Pending', spec={}, conditions=[condition], created=LONG_AGO))
    assert (found.state, found.reason, found.never) == ('pending', f'Unschedulable: {said}', False)


def test_a_claim_that_is_not_there_will_not_come():
    said = '0/5 nodes are available: persistentvolumeclaim "models" not found.'
    condition = _condition('PodScheduled', 'Unschedulable', said, 'False')
    found = _status(_pod(phase='Pending', spec={}, conditions=[condition], created=LONG_AGO))
    assert found.never


def test_an_image_that_cannot_be_pulled_is_given_some_time():
    assert not _status(_waiting('ErrImagePull', 'not found')).never
    late = _status(_waiting('ImagePullBackOff', 'not found', created=LONG_AGO))
    assert late.never
    assert late.reason == 'ImagePullBackOff: not found'


def test_an_image_with_a_wrong_name_will_not_come():
    assert _status(_waiting('InvalidImageName')).never


def test_a_missing_secret_will_not_come():
    said = 'secret "object-store" not found'
    assert _status(_waiting('CreateContainerConfigError', said, created=LONG_AGO)).never


def test_a_container_that_waits_for_its_volume_is_explained_by_the_event():
    event = {'involvedObject': {'uid': 'pod-0'}, 'message': 'MountVolume.SetUp failed'}
    found = _status(_waiting('ContainerCreating'), warnings=[event])
    assert (found.reason, found.never) == ('ContainerCreating: MountVolume.SetUp failed', False)


def test_pods_that_may_not_be_made_are_told_by_the_event():
    said = 'Error creating: pods "digits-0" is forbidden: exceeded quota: gpus'
    event = {'involvedObject': {'uid': 'main'}, 'reason': 'FailedCreate', 'message': said}
    found = _status(warnings=[event])
    assert (found.state, found.reason, found.never) == ('pending', said, True)


def test_a_job_that_runs_without_one_of_its_pods_says_for_which_it_waits():
    condition = _condition('PodScheduled', 'Unschedulable', 'full', 'False')
    lost = _pod(1, 'Pending', spec={}, conditions=[condition])
    found = _status(_pod(0), lost)
    assert (found.state, found.reason) == ('running', 'waiting for rank 1: Unschedulable: full')


def test_only_the_newest_pod_of_a_rank_counts():
    old = _pod(0, 'Failed', LONG_AGO, 'old', **_container(terminated={'exitCode': 137}))
    found = _status(old, _pod(0))
    assert [each.state for each in found.tasks] == ['running']
    assert found.restarts == 1


def test_restarts_are_counted_where_the_pods_are_gone():
    jobs = [_main(failed=3)]
    assert _status(_pod(0), jobs=jobs).restarts == 3
    assert _status(_terminated(137), jobs=jobs).restarts == 2  # The last was not replaced.
    assert _status(_pod(0), main=_main(restarts=2), jobs=jobs).restarts == 5


def test_a_pod_that_used_too_much_memory_says_so():
    found = _status(_terminated(137, reason='OOMKilled')).tasks[0]
    assert (found.state, found.code, found.reason) == ('failed', 137, 'OOMKilled')


def test_a_pod_that_failed_says_its_last_line():
    found = _status(_terminated(2, reason='Error', message='a\nphalanx: Which image?\n'))
    assert found.tasks[0].reason == 'phalanx: Which image?'


def test_a_pod_that_is_evicted_says_by_whom():
    conditions = [_condition('DisruptionTarget', 'DeletionByTaintManager', 'NoExecute taint')]
    found = _status(_pod(going=True, conditions=conditions))
    assert found.tasks[0].reason == 'DeletionByTaintManager: NoExecute taint'


def _queued(**more):
    labels = {'kueue.x-k8s.io/queue-name': 'team-a'}
    return _status(main=_main(labels=labels, suspend=True), **more)


def test_a_job_that_waits_in_a_queue_says_what_kueue_says():
    said = "couldn't assign flavors: insufficient unused quota"
    conditions = [_condition('QuotaReserved', 'Pending', said, 'False')]
    found = _queued(workload={'status': {'conditions': conditions}})
    assert found.state == 'pending'
    assert found.reason == f'it waits in the queue team-a of Kueue: {said}'
    assert not found.never


def test_a_queue_that_is_not_there_will_not_admit_it():
    conditions = [_condition('QuotaReserved', 'Inadmissible', 'LocalQueue gone', 'False')]
    assert _queued(workload={'status': {'conditions': conditions}}).never


def test_without_kueue_a_queue_will_not_admit_it():
    found = _queued(no_queue=True)
    assert found.never
    assert 'which this cluster does not have' in found.reason


def test_a_suspended_job_without_a_queue_waits_for_somebody():
    found = _status(main=_main(suspend=True))
    assert (found.state, found.reason, found.never) == ('pending', 'suspended', True)


def test_a_long_reason_is_cut_to_one_line():
    found = _status(_waiting('ErrImagePull', 'x\n' * 500))
    assert len(found.reason) == 300
    assert '\n' not in found.reason
