"""The objects of the stand-in for Kubernetes, and who watches them."""

import contextlib
import copy
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator


class Refused(Exception):
    """What the server answers instead: a code, a reason and a message."""


class Store:
    """All objects, by plural, namespace and name."""

    def __init__(self):
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str, str], dict] = {}
        self.version = 1
        self._watchers: list[queue.Queue] = []

    def all(self, plural: str, fits: Callable[[dict], bool] = lambda each: True) -> list[dict]:
        """Returns the objects of a kind that fit, in the order of their names."""
        with self.lock:
            found = sorted(item for item in self.objects.items() if item[0][0] == plural)
        return [each for _, each in found if fits(each)]

    def add(self, plural: str, found: dict) -> dict:
        meta = found['metadata']
        key = (plural, meta['namespace'], meta['name'])
        with self.lock:
            if key in self.objects:
                raise Refused(409, 'AlreadyExists', f'{plural} "{meta["name"]}" already exists')
            meta.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
            self.objects[key] = found
            self._tell('ADDED', plural, found)
        return found

    def changed(self, plural: str, found: dict) -> None:
        """Tells the watchers of what has been changed in place."""
        with self.lock:
            self._tell('MODIFIED', plural, found)

    def remove(self, plural: str, found: dict) -> None:
        with self.lock:
            meta = found['metadata']
            if self.objects.pop((plural, meta['namespace'], meta['name']), None):
                self._tell('DELETED', plural, found)

    @contextlib.contextmanager
    def watching(self) -> Iterator[queue.Queue]:
        events: queue.Queue = queue.Queue()
        with self.lock:
            self._watchers.append(events)
        try:
            yield events
        finally:
            self._watchers.remove(events)

    def _tell(self, change: str, plural: str, found: dict) -> None:
        self.version += 1
        found['metadata']['resourceVersion'] = str(self.version)
        for each in self._watchers:
            each.put((change, plural, copy.deepcopy(found)))


def now() -> str:
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
