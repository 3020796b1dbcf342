"""A namespace of an API server, through the official client: plain objects, and its errors."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.backends import Unreachable
from launch.backends.kubernetes_plan import missing
from launch.backends.kubernetes_pod import Manifest
from trainer.errors import ConfigError, nearest

# In place of a context, for who asks from a pod.
IN_CLUSTER = 'in-cluster'
_OWN_NAMESPACE = Path('/var/run/secrets/kubernetes.io/serviceaccount/namespace')
# How each kind is called in an address: its version and its plural.
_ADDRESSES = {
    'Pod': ('v1', 'pod'),
    'ConfigMap': ('v1', 'config_map'),
    'Service': ('v1', 'service'),
    'Deployment': ('apps/v1', 'deployments'),
    'Job': ('batch/v1', 'jobs'),
    'JobSet': ('jobset.x-k8s.io/v1alpha2', 'jobsets'),
    'TrainJob': ('trainer.kubeflow.org/v1alpha1', 'trainjobs'),
    'TrainingRuntime': ('trainer.kubeflow.org/v1alpha1', 'trainingruntimes'),
}
# To connect, and between two pieces of an answer. A log that is silent for longer is asked for
# again.
_TIMEOUT_SECONDS = (10, 60)
# How far back it is asked for then, beyond what seems to be needed.
_OVERLAP_SECONDS = 10
_REFUSALS = (400, 401, 403, 409, 413, 422)


class Gone(Exception):
    """There is no such object, or the cluster does not know its kind."""


class Cluster:
    """One namespace. Every method raises ConfigError where the server refuses what it is asked, in
    its own words, and Unreachable where it does not answer."""

    def __init__(self, context: str | None, namespace: str | None):
        """Reads the kubeconfig; nothing is sent yet.

        Args:
            context: of the kubeconfig; None for its current one, or for the cluster that this
                process is in if there is no kubeconfig.
            namespace: None for that of the context.

        Raises:
            ConfigError: the client is not installed, there is no kubeconfig, or no such context.
        """
        try:
            import kubernetes
        except ImportError:
            raise missing() from None
        self._refused = kubernetes.client.ApiException
        self.context, own, configuration = _configuration(kubernetes, context)
        self.namespace = namespace or own
        # Who submits shall hear soon that nobody answers.
        configuration.retries = False
        api = kubernetes.client.ApiClient(configuration)
        self._core = kubernetes.client.CoreV1Api(api)
        self._custom = kubernetes.client.CustomObjectsApi(api)
        self._groups = kubernetes.client.ApisApi(api)

    def create(self, document: Manifest) -> Manifest:
        """Makes an object and returns it as it is then."""
        kind, name = document['kind'], document['metadata']['name']
        try:
            return self._call('create', kind, body=document)
        except Gone as gone:
            raise ConfigError(f'The cluster refuses {kind} {name}: {gone}.') from None

    def get(self, kind: str, name: str) -> Manifest:
        """Returns an object.

        Raises:
            Gone: there is none.
        """
        return self._call('get' if '/' in _ADDRESSES[kind][0] else 'read', kind, name)

    def delete(self, kind: str, name: str) -> None:
        """Has an object deleted, and all that it owns before it; does nothing if there is none."""
        with contextlib.suppress(Gone):
            self._call('delete', kind, name, propagation_policy='Foreground')

    def own(self, document: Manifest, owner: Manifest) -> None:
        """Lets an object go when another one goes."""
        reference = {
            **{key: owner[key] for key in ('apiVersion', 'kind')},
            **{key: owner['metadata'][key] for key in ('name', 'uid')},
        }
        patch = {'metadata': {'ownerReferences': [reference]}}
        self._call('patch', document['kind'], document['metadata']['name'], patch)

    def objects(self, kind: str, labels: dict[str, str]) -> list[Manifest]:
        """Returns the objects of a kind that have all of these labels; none of an unknown kind."""
        with contextlib.suppress(Gone):
            return self._call('list', kind, label_selector=_selector(labels))['items']
        return []

    def pods(self, labels: dict[str, str]) -> list[Manifest]:
        """Returns the pods that have all of these labels."""
        return self._ask(
            self._core.list_namespaced_pod, self.namespace, label_selector=_selector(labels)
        )['items']

    def warnings(self, uids: set[str]) -> list[Manifest]:
        """Returns the events that warn of something about objects, the oldest first."""
        found = self._ask(
            self._core.list_namespaced_event, self.namespace, field_selector='type=Warning'
        )['items']
        return sorted(
            (each for each in found if each.get('involvedObject', {}).get('uid') in uids),
            key=lambda each: each.get('lastTimestamp') or each.get('eventTime') or '',
        )

    def groups(self) -> dict[str, str]:
        """Returns the groups of kinds that the cluster knows, with the version that it prefers."""
        found = self._ask(self._groups.get_api_versions)['groups']
        return {each['name']: each['preferredVersion']['version'] for each in found}

    def knows(self, kind: str) -> bool:
        """Whether the cluster knows a kind's group."""
        return _ADDRESSES[kind][0].rpartition('/')[0] in self.groups()

    def workload(self, uid: str) -> Manifest | None:
        """Returns what Kueue knows of a job; None for nothing yet.

        Raises:
            Gone: there is no Kueue in this cluster.
        """
        version = self.groups().get('kueue.x-k8s.io')
        if version is None:
            raise Gone('the cluster has no Kueue')
        found = self._ask(
            self._custom.list_namespaced_custom_object,
            'kueue.x-k8s.io',
            version,
            self.namespace,
            'workloads',
            label_selector=_selector({'kueue.x-k8s.io/job-uid': uid}),
        )['items']
        return found[0] if found else None

    def log(self, pod: str, container: str) -> 'Log':
        """Returns the log of a container; nothing is read yet."""
        return Log(self, pod, container)

    def open_log(self, pod: str, container: str, **options: Any) -> Any:
        """Returns the response of the server to a request for a log."""
        return self._core.read_namespaced_pod_log(
            pod,
            self.namespace,
            container=container,
            timestamps=True,
            _preload_content=False,
            _request_timeout=_TIMEOUT_SECONDS,
            **options,
        )

    def _call(
        self,
        verb: str,
        kind: str,
        name: str | None = None,
        body: Manifest | None = None,
        **options: Any,
    ) -> Manifest:
        version, called = _ADDRESSES[kind]
        group, _, version = version.rpartition('/')
        names, bodies = [name] if name else [], [body] if body else []
        if group:
            method = getattr(self._custom, f'{verb}_namespaced_custom_object')
            where = [group, version, self.namespace, called, *names]
        else:
            method = getattr(self._core, f'{verb}_namespaced_{called}')
            where = [*names, self.namespace]
        return self._ask(method, *where, *bodies, **options)

    def _ask(self, method: Any, *arguments: Any, **options: Any) -> Manifest:
        with self.told():
            answer = method(
                *arguments, _preload_content=False, _request_timeout=_TIMEOUT_SECONDS, **options
            )
            return json.loads(answer.data)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Makes one of three errors of whatever a request raises."""
        # It comes with the client.
        from urllib3.exceptions import HTTPError

        try:
            yield
        except self._refused as error:
            said = _said(error)
            if error.status == 404:
                raise Gone(said) from None
            if error.status in _REFUSALS:
                raise ConfigError(f'The cluster {self.context} refuses it: {said}.') from None
            raise Unreachable(
                f'The cluster {self.context} cannot do it now ({error.status}): {said}.'
            ) from None
        except (HTTPError, OSError, ValueError) as error:
            raise Unreachable(f'The cluster {self.context} does not answer: {error}') from None


class Log:
    """What a container prints, each line once, however often the connection breaks off."""

    def __init__(self, cluster: Cluster, pod: str, container: str):
        self._cluster, self._pod, self._container = cluster, pod, container
        self._last, self._heard = '', 0.0

    def lines(self, follow: bool) -> Iterator[str]:
        """Yields the lines that are new since the last call; with `follow` also those to come,
        until the container has ended or the connection.

        Raises:
            Gone: the pod has been deleted.
        """
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        options: dict[str, Any] = {'follow': follow}
        before = self._last
        if before:
            options['since_seconds'] = int(time.monotonic() - self._heard) + _OVERLAP_SECONDS
        with self._cluster.told():
            answer = self._cluster.open_log(self._pod, self._container, **options)
            # Both mean that it has to be asked again: a long silence, and a server that went away.
            with contextlib.closing(answer), contextlib.suppress(ReadTimeoutError, HTTPError):
                for line in _lines(answer):
                    stamp, _, text = line.partition(' ')
                    if stamp <= before:
                        continue
                    self._last, self._heard = stamp, time.monotonic()
                    yield text


def _lines(answer: Any) -> Iterator[str]:
    rest = b''
    for piece in answer.stream():
        *lines, rest = (rest + piece).split(b'\n')
        for line in lines:
            yield line.decode(errors='replace') + '\n'
    if rest:
        yield rest.decode(errors='replace')


def _said(error: Any) -> str:
    """The words of the server."""
    try:
        said = json.loads(error.body)['message']
    except (ValueError, TypeError, KeyError):
        said = str(error.reason)
    return said.rstrip('.')


def _selector(labels: dict[str, str]) -> str:
    return ','.join(f'{key}={value}' for key, value in labels.items())


def _configuration(kubernetes: Any, context: str | None) -> tuple[str, str, Any]:
    """The context, its namespace and how it is reached."""
    config, found = kubernetes.config, kubernetes.client.Configuration()
    file = os.environ.get('KUBECONFIG') or os.path.expanduser('~/.kube/config')
    try:
        contexts, current = config.list_kube_config_contexts(config_file=file)
    except config.ConfigException as error:
        if context in (None, IN_CLUSTER):
            with contextlib.suppress(config.ConfigException, OSError):
                config.load_incluster_config(client_configuration=found)
                return IN_CLUSTER, _OWN_NAMESPACE.read_text().strip(), found
        raise ConfigError(
            f'There is no kubeconfig that can be read ({error}). Set KUBECONFIG to the file that '
            'your cluster gave you; `kubectl config get-contexts` shows what is in it.'
        ) from None
    by_name = {each['name']: each for each in contexts}
    chosen = current if context is None else by_name.get(context)
    if chosen is None:
        raise ConfigError(
            f'The kubeconfig {file} has no context {context!r}.'
            f'{nearest(context or "", by_name)} It has {", ".join(sorted(by_name)) or "none"}.'
        )
    try:
        config.load_kube_config(
            config_file=file, context=chosen['name'], client_configuration=found
        )
    except config.ConfigException as error:
        raise ConfigError(f'The kubeconfig {file} cannot be used: {error}.') from None
    return chosen['name'], chosen['context'].get('namespace') or 'default', found
