"""A stand-in for a Kubernetes cluster: an API server, and the controllers that a job needs.

Its pods are real processes in network namespaces (`tests.cluster.pods`). It is no Kubernetes: there
is no admission, no authentication, no kubelet, and one pod fits on a node. What it does it does as
the documentation says, so that real clients can be tried on it.
"""

import contextlib
import copy
import http.server
import json
import queue
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.cluster.controllers import Controllers
from tests.cluster.hosts import Hosts
from tests.cluster.pods import Pods
from tests.cluster.store import Refused, Store, now

KINDS = {
    ('v1', 'pods'): 'Pod',
    ('v1', 'services'): 'Service',
    ('v1', 'configmaps'): 'ConfigMap',
    ('v1', 'events'): 'Event',
    ('apps/v1', 'deployments'): 'Deployment',
    ('batch/v1', 'jobs'): 'Job',
    ('jobset.x-k8s.io/v1alpha2', 'jobsets'): 'JobSet',
    ('trainer.kubeflow.org/v1alpha1', 'trainjobs'): 'TrainJob',
    ('trainer.kubeflow.org/v1alpha1', 'trainingruntimes'): 'TrainingRuntime',
}


class StandIn:
    """A cluster, as long as its context lasts.

    Args:
        hosts: its nodes.
        directory: for all of its files.
        image: the environment of every container, as its image would have it.
        claims: a directory for each PersistentVolumeClaim.
        backoff_seconds: between a pod's failure and the next pod; 10, 20, 40... in Kubernetes.
        without: plurals of kinds that this cluster does not know.

    Attributes:
        kubeconfig: leads to it.
        refuse: a plural of which no object may be made or listed.
        break_logs: whether a log that is followed breaks off after each line.
    """

    refuse = ''
    break_logs = False

    def __init__(
        self,
        hosts: Hosts,
        directory: Path,
        *,
        image: Mapping[str, str] | None = None,
        claims: Mapping[str, Path] | None = None,
        backoff_seconds: float = 0.2,
        without: tuple[str, ...] = (),
    ):
        self.store = Store()
        self.pods = Pods(self.store, hosts, directory, dict(image or {}), dict(claims or {}))
        self._controllers = Controllers(self.store, self.pods, backoff_seconds)
        self.kinds = {k: kind for k, kind in KINDS.items() if k[1] not in without}
        handler = type('Handler', (_Handler,), {'cluster': self, 'store': self.store})
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self._over = threading.Event()
        self.kubeconfig = directory / 'kubeconfig'

    def __enter__(self) -> 'StandIn':
        address = f'http://127.0.0.1:{self._server.server_port}'
        self.kubeconfig.write_text(
            json.dumps(
                {
                    'apiVersion': 'v1',
                    'kind': 'Config',
                    'current-context': 'team/cluster:1',
                    'clusters': [{'name': 'stand-in', 'cluster': {'server': address}}],
                    'users': [{'name': 'nobody', 'user': {}}],
                    'contexts': [
                        {
                            'name': 'team/cluster:1',
                            'context': {
                                'cluster': 'stand-in',
                                'user': 'nobody',
                                'namespace': 'research',
                            },
                        }
                    ],
                }
            )
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self.pods.kill()

    def _work(self) -> None:
        while not self._over.wait(0.05):
            with self.store.lock:
                self._controllers.reconcile()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    cluster: StandIn
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        url = urllib.parse.urlparse(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        length = int(self.headers.get('Content-Length') or 0)
        self.body = json.loads(self.rfile.read(length) or 'null')
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                self._route([each for each in url.path.split('/') if each])
            except Refused as refused:
                code, reason, message = refused.args
                self._answer(
                    {
                        'kind': 'Status',
                        'apiVersion': 'v1',
                        'status': 'Failure',
                        'reason': reason,
                        'message': message,
                        'code': code,
                    },
                    code,
                )

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _route(self, path: list[str]) -> None:
        if path == ['version']:
            return self._answer({'major': '1', 'minor': '35', 'gitVersion': 'v1.35.0'})
        if path == ['api']:
            return self._answer({'kind': 'APIVersions', 'versions': ['v1']})
        if path == ['apis']:
            return self._answer(self._groups())
        where = 2 if path[0] == 'api' else 3
        if path[0] not in ('api', 'apis') or len(path) < where:
            raise Refused(404, 'NotFound', 'the server could not find the requested resource')
        version, rest = '/'.join(path[1:where]), path[where:]
        if not rest:
            return self._answer(self._resources(version))
        namespace = None
        if rest[0] == 'namespaces' and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, part = [*rest, None, None][:3]
        if (version, plural) not in self.cluster.kinds:
            raise Refused(404, 'NotFound', 'the server could not find the requested resource')
        if name is None:
            return self._collection(version, plural, namespace)
        with self.store.lock:
            found = self.store.objects.get((plural, namespace, name))
        if found is None:
            raise Refused(404, 'NotFound', f'{plural} "{name}" not found')
        if part == 'log':
            return self._log(found)
        if part == 'eviction':
            self.cluster.pods.disrupt(found, 'EvictionByEvictionAPI', 'Eviction API: evicting')
            return self._answer({'kind': 'Status', 'apiVersion': 'v1', 'status': 'Success'}, 201)
        return self._object(plural, found)

    def _groups(self) -> dict:
        groups = {}
        for version, _ in self.cluster.kinds:
            if '/' in version:
                one = {'groupVersion': version, 'version': version.split('/')[1]}
                name = version.split('/')[0]
                groups[name] = {'name': name, 'versions': [one], 'preferredVersion': one}
        return {'kind': 'APIGroupList', 'apiVersion': 'v1', 'groups': list(groups.values())}

    def _resources(self, version: str) -> dict:
        verbs = ['create', 'delete', 'get', 'list', 'patch', 'update', 'watch']
        found = [
            {
                'name': plural,
                'singularName': plural[:-1],
                'namespaced': True,
                'kind': kind,
                'verbs': verbs,
            }
            for (of, plural), kind in self.cluster.kinds.items()
            if of == version
        ]
        if not found:
            raise Refused(404, 'NotFound', 'the server could not find the requested resource')
        return {
            'kind': 'APIResourceList',
            'apiVersion': 'v1',
            'groupVersion': version,
            'resources': found,
        }

    def _collection(self, version: str, plural: str, namespace: str | None) -> None:
        kind = self.cluster.kinds[version, plural]
        if plural == self.cluster.refuse:
            raise Refused(403, 'Forbidden', f'{plural} is forbidden: User "nobody" cannot')
        if self.command == 'POST':
            self.body.update(apiVersion=version, kind=kind)
            self.body['metadata'].setdefault('namespace', namespace)
            if self.query.get('dryRun') == 'All':
                return self._answer(self.body, 201)
            return self._answer(self.store.add(plural, self.body), 201)
        if self._asks('watch'):
            if 'sendInitialEvents' in self.query:
                # Newer clients ask for it, and do without it when they hear this.
                raise Refused(422, 'Invalid', 'sendInitialEvents is not supported')
            return self._watch(plural, namespace)
        with self.store.lock:
            items = self.store.all(plural, self._selected(namespace))
            return self._answer(
                {
                    'kind': f'{kind}List',
                    'apiVersion': version,
                    'metadata': {'resourceVersion': str(self.store.version)},
                    'items': copy.deepcopy(items),
                }
            )

    def _selected(self, namespace: str | None) -> Callable[[dict], bool]:
        def pairs(selector: str) -> dict[str, str]:
            text = self.query.get(selector, '').replace('==', '=')
            return dict(each.split('=', 1) for each in text.split(',') if each)

        labels, fields = pairs('labelSelector'), pairs('fieldSelector')

        def fits(found: dict) -> bool:
            meta = found['metadata']
            have = meta.get('labels', {})
            known = {'metadata.name': meta['name'], 'type': found.get('type')}
            return (
                namespace in (None, meta['namespace'])
                and all(have.get(key) == value for key, value in labels.items())
                and all(known.get(key) == value for key, value in fields.items())
            )

        return fits

    def _object(self, plural: str, found: dict) -> None:
        with self.store.lock:
            if self.command == 'DELETE':
                options = {**(self.body or {}), **self.query}
                self._delete(plural, found, options)
            elif self.command in ('PATCH', 'PUT'):
                _merge(found, self.body)
                self.store.changed(plural, found)
            return self._answer(copy.deepcopy(found))

    def _delete(self, plural: str, found: dict, options: dict) -> None:
        meta = found['metadata']
        if plural == 'pods':
            grace = options.get('gracePeriodSeconds')
            self.cluster.pods.delete(found, None if grace is None else float(grace))
        elif options.get('propagationPolicy') == 'Foreground':
            meta.setdefault('deletionTimestamp', now())
            self.store.changed(plural, found)
        else:
            self.store.remove(plural, found)

    def _watch(self, plural: str, namespace: str | None) -> None:
        fits = self._selected(namespace)
        end = time.monotonic() + float(self.query.get('timeoutSeconds', 300))
        with self.store.watching() as events:
            self._stream('application/json')
            # What has changed since the client looked; without a version, all there is.
            since = int(self.query.get('resourceVersion') or 0)
            for each in self.store.all(plural, fits):
                if int(each['metadata']['resourceVersion']) > since:
                    change = 'MODIFIED' if since else 'ADDED'
                    self._piece(json.dumps({'type': change, 'object': each}).encode() + b'\n')
            while time.monotonic() < end:
                with contextlib.suppress(queue.Empty):
                    change, of, found = events.get(timeout=0.5)
                    if of == plural and fits(found):
                        line = json.dumps({'type': change, 'object': found})
                        self._piece(line.encode() + b'\n')
        self._piece(b'')

    def _log(self, pod: dict) -> None:
        if pod['status'].get('phase') == 'Pending':
            raise Refused(400, 'BadRequest', 'container is waiting to start: ContainerCreating')
        since = time.time() - float(self.query.get('sinceSeconds', 'inf'))
        self._stream('text/plain')
        follow = self._asks('follow')
        for at, line in self.cluster.pods.log(pod, follow):
            if at >= since:
                stamp = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at)) + f'{at % 1:.9f}Z'[1:]
                shown = self._asks('timestamps')
                self._piece((f'{stamp} '.encode() if shown else b'') + line)
                if follow and self.cluster.break_logs:
                    break
        self._piece(b'')

    def _asks(self, option: str) -> bool:
        """Whether an option is given, in one of the spellings that Go takes for true."""
        return self.query.get(option) in ('1', 't', 'T', 'true', 'True', 'TRUE')

    def _stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()

    def _piece(self, piece: bytes) -> None:
        self.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece))

    def _answer(self, found: dict, code: int = 200) -> None:
        body = json.dumps(found).encode()
        self.send_response(code)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _merge(found: dict, patch: dict) -> None:
    """A JSON merge patch (RFC 7386)."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            _merge(found[key], value)
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = value
