"""What is asked of a store of objects, S3, Google Cloud Storage or an HTTP server: one try each.

Sessions, credentials and listings are those of fsspec's file systems, which find keys and endpoints
in the environment as the tools of each store do. The reads are not: theirs give the bytes alone,
without the version of the object that they are of, and repeat what fails each in its own way.
Everything here runs on fsspec's event loop; `remote` calls it and knows what to try again.
"""

import abc
import importlib
import os
import re

from trainer.data.files import Stat
from trainer.errors import ConfigError, nearest

# Requests of one process that are under way at a time; enough to hide 100 ms, and no attack.
AT_ONCE = 64
# Refusals that are none: too slow, too many.
_AGAIN = (408, 429)

# A character of a pattern taken literally, as by `glob.escape`.
_ESCAPED = r'\[[*?[]\]'

_CREDENTIALS = {
    's3': 'Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a bucket that is '
    'open to all, FSSPEC_S3_ANON=true.',
    'gs': 'Set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`.',
    'http': 'Is the URL still valid, and does it need a key?',
}


class Refused(Exception):
    """The store answered, and would answer the same again.

    Attributes:
        missing: whether there is no such object.
    """

    def __init__(self, reason: str, missing: bool = False):
        super().__init__(reason)
        self.missing = missing


class Store(abc.ABC):
    """A kind of store. What fails with `Refused` is final; anything else may be tried again.

    Attributes:
        magic: what is not taken literally in a pattern, as a regular expression.
    """

    magic = r'[*?[]'

    @abc.abstractmethod
    async def get(self, url: str, offset: int, length: int) -> tuple[bytes, str]:
        """Returns bytes of an object, fewer at its end only, and its version if the store tells."""

    @abc.abstractmethod
    async def stat(self, url: str) -> Stat:
        """Returns size and version of an object."""

    async def glob(self, pattern: str) -> dict[str, Stat | None]:
        """Returns the objects that match a pattern, with what the listing tells of them."""
        # Not by fsspec's own `glob`, which takes a listing that fails for one that is empty.
        from fsspec.utils import glob_translate

        scheme, _, place = pattern.partition('://')
        if '?' not in self.magic:
            place = place.replace('?', '[?]')
        matches = re.compile(glob_translate(place)).match
        folder = re.match(rf'({_ESCAPED}|[^*?[])*', place)[0].rpartition('/')[0]
        rest = place[len(folder) + 1 :]
        folder = f'{scheme}://{re.sub(_ESCAPED, lambda found: found[0][1], folder)}'
        found = await self._list(folder, deep='/' in rest or '**' in rest)
        return {url: stat for url, stat in found.items() if matches(url.partition('://')[2])}

    @abc.abstractmethod
    async def _list(self, folder: str, deep: bool) -> dict[str, Stat | None]:
        """Returns the objects in a folder and, if `deep`, in those below."""


def kind(url: str) -> str:
    """Returns 's3', 'gs' or 'http'.

    Raises:
        ConfigError: no such store is known, or the URL names nothing in it.
    """
    scheme, _, place = url.partition('://')
    if scheme not in _KINDS:
        raise ConfigError(
            f'There is no way to read {url!r}: files are read from {", ".join(_KINDS)} and '
            f'from local paths.{nearest(scheme, _KINDS)}'
        )
    if not re.match(r'[^/*?[]+/.', place):
        raise ConfigError(f'{url!r} names no file: a URL is {scheme}://{_PLACES[scheme[0]]}.')
    return _KINDS[scheme]


def open_store(url: str, *, silence: float) -> Store:
    """Returns the store of a URL; no request is made yet.

    Args:
        url: of any object in it.
        silence: seconds without a connection, or a byte, after which an attempt fails.

    Raises:
        ConfigError: it is of an unknown kind, or what it needs is not installed.
    """
    module, store, extra = {
        's3': ('s3fs', _S3, 's3'),
        'gs': ('gcsfs.core', _GCS, 'gcs'),
        'http': ('fsspec.implementations.http', _HTTP, 'http'),
    }[kind(url)]
    try:
        return store(importlib.import_module(module), silence)
    except ImportError as error:
        raise ConfigError(
            f'{url} cannot be read: {error.name or error} is not installed. Run: '
            f"pip install 'phalanx[{extra}]'"
        ) from None


class _HTTP(Store):
    """HTTP servers that serve parts of files."""

    _kind = 'http'
    magic = r'[*[]'  # A question mark begins the query.

    def __init__(self, module, silence: float):
        import aiohttp

        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        self._fs = self._file_system(module)

    def _file_system(self, module):
        return module.HTTPFileSystem(
            client_kwargs={'timeout': self._timeout, 'trust_env': True},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    async def _session(self):
        return await self._fs.set_session()

    def _request(self, url: str) -> tuple[str, dict[str, str]]:
        """Returns the address and the headers that get an object."""
        return url, {}

    async def get(self, url: str, offset: int, length: int) -> tuple[bytes, str]:
        if not length:
            return b'', ''
        session = await self._session()
        address, headers = self._request(url)
        headers = {
            **headers,
            'Range': f'bytes={offset}-{offset + length - 1}',
            'Accept-Encoding': 'identity',  # Parts are of what is stored.
        }
        async with session.get(address, headers=headers, timeout=self._timeout) as response:
            if response.status == 416:  # It begins beyond the end.
                return b'', self._version(response.headers)
            self._check(response)
            if response.status != 206:
                raise _without_parts(response)
            return await response.read(), self._version(response.headers)

    async def stat(self, url: str) -> Stat:
        # Not HEAD, which signed URLs do not allow and which does not tell whether parts are served.
        session = await self._session()
        address, headers = self._request(url)
        headers = {**headers, 'Range': 'bytes=0-0', 'Accept-Encoding': 'identity'}
        async with session.get(address, headers=headers, timeout=self._timeout) as response:
            if response.status != 416:  # Which an empty object gets.
                self._check(response)
            size = re.fullmatch(r'bytes .*/(\d+)', response.headers.get('Content-Range', ''))
            if size:
                return Stat(int(size[1]), self._version(response.headers))
            if response.status == 416 or response.headers.get('Content-Length') == '0':
                return Stat(0, self._version(response.headers))
            raise _without_parts(response)

    async def _list(self, folder: str, deep: bool) -> dict[str, Stat | None]:
        if deep:
            raise Refused('of a URL of the web, only what follows the last slash may be a pattern')
        import aiohttp

        try:  # The server must list its files, as links in a page.
            return dict.fromkeys(await self._fs._ls(f'{folder}/', detail=False))
        except FileNotFoundError:
            raise Refused('there is no such folder', missing=True) from None
        except aiohttp.ClientResponseError as error:
            self._check(error)
            raise

    def _check(self, answer) -> None:
        """Raises what a status other than success means; `answer` is a response or an error."""
        status, text = answer.status, getattr(answer, 'reason', None) or answer.message
        if status in (401, 403):
            raise Refused(f'access is denied ({status} {text}). {_CREDENTIALS[self._kind]}')
        if status in (404, 410):
            raise Refused('there is no such object', missing=True)
        if 400 <= status < 500 and status not in _AGAIN:
            raise Refused(f'its server answered {status} {text}')
        if status >= 400:
            raise OSError(f'{status} {text}')

    @staticmethod
    def _version(headers) -> str:
        return headers.get('ETag', headers.get('Last-Modified', '')).strip('"')


def _without_parts(response) -> Refused:
    return Refused(
        'its server does not serve parts of files with their size (it answered a request for some '
        f'bytes with {response.status}, not 206 and Content-Range)'
    )


class _GCS(_HTTP):
    """Google Cloud Storage, or what STORAGE_EMULATOR_HOST names."""

    _kind = 'gs'
    magic = Store.magic

    def _file_system(self, module):
        keys = os.environ.get('GOOGLE_APPLICATION_CREDENTIALS')
        if keys and not os.path.exists(keys):
            raise ConfigError(f'GOOGLE_APPLICATION_CREDENTIALS names {keys!r}, which is no file.')
        # An emulator takes no keys, and the search for some is a search on the network.
        emulated = bool(os.environ.get('STORAGE_EMULATOR_HOST'))
        return module.GCSFileSystem(
            access='read_only',
            token='anon' if emulated else None,
            requests_timeout=self._timeout,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    async def _session(self):
        await self._fs._set_session()
        return self._fs.session

    def _request(self, url: str) -> tuple[str, dict[str, str]]:
        return self._fs.url(self._fs._strip_protocol(url)), self._fs._get_headers({})

    @staticmethod
    def _version(headers) -> str:
        return headers.get('X-Goog-Generation', '')  # Tags change with what is said of an object.

    async def stat(self, url: str) -> Stat:
        session = await self._session()
        bucket, name, _ = self._fs.split_path(url)
        address = self._fs._format_path('b/{}/o/{}', (bucket, name))
        async with session.get(
            address, headers=self._fs._get_headers({}), timeout=self._timeout
        ) as response:
            self._check(response)
            told = await response.json()
            return Stat(int(told['size']), str(told['generation']))

    async def _list(self, folder: str, deep: bool) -> dict[str, Stat | None]:
        from gcsfs.retry import HttpError

        try:
            if deep:
                listed = (await self._fs._find(folder, detail=True)).values()
            else:
                listed = await self._fs._ls(folder, detail=True)
        except FileNotFoundError:
            raise Refused('there is no such folder', missing=True) from None
        except HttpError as error:
            if error.code in (401, 403):
                raise Refused(f'access is denied ({error}). {_CREDENTIALS["gs"]}') from None
            raise
        return {
            f'gs://{info["name"]}': Stat(info['size'], str(info['generation']))
            for info in listed
            if info['type'] == 'file'
        }


class _S3(Store):
    """S3, or what AWS_ENDPOINT_URL names."""

    def __init__(self, module, silence: float):
        self._fs = module.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                'max_pool_connections': AT_ONCE,
                'connect_timeout': silence,
                'read_timeout': silence,
                'retries': {'total_max_attempts': 1},
            },
        )
        self._fs.retries = 1

    async def get(self, url: str, offset: int, length: int) -> tuple[bytes, str]:
        if not length:
            return b'', ''
        answer = await self._call('get_object', url, Range=f'bytes={offset}-{offset + length - 1}')
        async with answer['Body'] as body:
            return await body.read(), answer['ETag'].strip('"')

    async def stat(self, url: str) -> Stat:
        answer = await self._call('head_object', url)
        return Stat(answer['ContentLength'], answer['ETag'].strip('"'))

    async def _list(self, folder: str, deep: bool) -> dict[str, Stat | None]:
        try:
            if deep:
                listed = (await self._fs._find(folder, detail=True)).values()
            else:
                listed = await self._fs._ls(folder, detail=True, refresh=True)
        except Exception as error:
            raise self._told(error) from error
        return {
            f's3://{info["name"]}': Stat(info['size'], info['ETag'].strip('"'))
            for info in listed
            if info['type'] == 'file'
        }

    async def _call(self, method: str, url: str, **arguments):
        bucket, key, _ = self._fs.split_path(url)
        try:
            return await self._fs._call_s3(method, Bucket=bucket, Key=key, **arguments)
        except Exception as error:
            raise self._told(error) from error

    @staticmethod
    def _told(error: Exception) -> Exception:
        """Returns `Refused` for what is no use to try again."""
        from botocore.exceptions import (
            ClientError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return Refused(f'there are no credentials ({error}). {_CREDENTIALS["s3"]}')
        if isinstance(error, ParamValidationError | ValueError):
            return Refused(str(error))
        cause = error if isinstance(error, ClientError) else error.__cause__
        if isinstance(error, FileNotFoundError) and cause is None:
            return Refused('there is no such folder', missing=True)
        if not isinstance(cause, ClientError):
            return error
        status = cause.response['ResponseMetadata'].get('HTTPStatusCode', 0)
        code = cause.response.get('Error', {}).get('Code', '')
        if status == 404:
            what = 'bucket' if code == 'NoSuchBucket' else 'object'
            return Refused(f'there is no such {what}', missing=True)
        if status in (401, 403):
            return Refused(f'access is denied ({code}). {_CREDENTIALS["s3"]}')
        if 300 <= status < 500 and status not in _AGAIN:
            return Refused(f'the store answered {status} {code}')
        return OSError(f'{status} {code}')


_PLACES = {'s': 'bucket/name', 'g': 'bucket/name', 'h': 'host/name'}
_KINDS = {'s3': 's3', 's3a': 's3', 'gs': 'gs', 'gcs': 'gs', 'http': 'http', 'https': 'http'}
