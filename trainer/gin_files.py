"""Reads .gin files and command-line bindings into statements that know where they stand.

Gin parses the same text again; this first reading is what lets every message name a file, a line
and a remedy, and lets `trainer.gin_checks` see all bindings, overridden ones too.
"""

import dataclasses
import io
import json
import os
import re
import shlex
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from trainer.errors import ConfigError, nearest

_COMMAND_LINE = 'the command line'
MACRO = 'gin.macro'  # gin's own name for the function behind `NAME = value`


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name`, `@scope/name()` or, as the function `gin.macro` in a scope, `%NAME`."""

    scopes: tuple[str, ...]
    selector: str
    called: bool

    def __repr__(self):
        if self.selector == MACRO:
            return '%' + '/'.join(self.scopes)
        return f'@{"/".join((*self.scopes, self.selector))}{"()" if self.called else ""}'


_REQUIRED = Reference(('gin.REQUIRED',), MACRO, True)


@dataclasses.dataclass(frozen=True)
class Binding:
    """`scope/selector.parameter = value`; a macro is the parameter 'value' of `gin.macro`."""

    scope: str
    selector: str
    parameter: str
    value: Any
    where: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later binding must be equal in to override this one."""
        return self.scope, self.selector, self.parameter

    @property
    def on_command_line(self) -> bool:
        """Whether it comes from a flag rather than from a file."""
        return self.where == _COMMAND_LINE

    @property
    def name(self) -> str:
        """The left side, as it is written."""
        if self.selector == MACRO:
            return self.scope
        return f'{self.scope}/{self.selector}.{self.parameter}'.lstrip('/')


@dataclasses.dataclass
class Script:
    """All that was read, in order.

    Attributes:
        bindings: every binding.
        imports: (module, where) of every import.
        parts: the texts between includes: of which file or flag, from which line on, and what.
    """

    bindings: list[Binding] = dataclasses.field(default_factory=list)
    imports: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    parts: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it as one text without includes, for `gin.parse_config`."""
        return ''.join(f'{text}\n' for _, _, text in self.parts)

    def save(self, path: Path) -> None:
        """Writes it down for `load`: another process may not see the files, or others by then."""
        path.write_text(self.saved, encoding='utf-8')

    @property
    def saved(self) -> str:
        """What `save` writes."""
        return json.dumps(self.parts)


def shipped_configs() -> Path:
    """Returns the directory of the shipped configs: inside an installed package or beside it."""
    package = Path(__file__).resolve().parent
    installed = package / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def read(files: Sequence[str], bindings: Sequence[str] = (), search_path=()) -> Script:
    """Reads files and then bindings.

    Args:
        files: names of .gin files. A name is looked up in the working directory, the search path
            and the shipped configs; an included one beside the including file first.
        bindings: lines of gin from the command line.
        search_path: further directories.

    Returns:
        What was read.

    Raises:
        ConfigError: a file is missing or includes itself; a line cannot be parsed.
    """
    script = Script()
    directories = ['', *map(os.path.expanduser, search_path), os.fspath(shipped_configs())]
    for file in files:
        _read_file(script, _find(file, directories), directories, ())
    for binding in bindings:
        _read_binding(script, binding)
    return script


def load(path: str, bindings: Sequence[str] = ()) -> Script:
    """Reads what another process has read and saved, and then bindings.

    Args:
        path: of a file that `Script.save` has written.
        bindings: as for `read`.

    Raises:
        ConfigError: it cannot be read.
    """
    script = Script()
    try:
        for label, first, text in json.loads(Path(path).read_text(encoding='utf-8')):
            for statement in _statements(text):
                is_flag = label == _COMMAND_LINE
                line = first + statement.location.line_num - 1
                _add(script, statement, label if is_flag else f'{label}:{line}')
            script.parts.append((label, first, text))
    except (OSError, ValueError, TypeError, _Unreadable) as error:
        raise ConfigError(
            f'--gin_script={path} cannot be read: {error}. It is written by `phalanx run`; give '
            '--gin_file instead.'
        ) from None
    for binding in bindings:
        _read_binding(script, binding)
    return script


def left_open(script: Script) -> list[str]:
    """Returns the macros that are `%gin.REQUIRED` to the end."""
    last = {each.scope: each.value for each in script.bindings if each.selector == MACRO}
    return [name for name, value in last.items() if value == _REQUIRED]


def _find(name: str, directories: Sequence[str], included_by: str = '') -> str:
    for directory in directories:
        path = os.path.join(directory, os.path.expanduser(name))
        if os.path.isfile(path):
            return path
    known = []
    for directory in filter(None, directories):
        known += [p.relative_to(directory).as_posix() for p in Path(directory).rglob('*.gin')]
    looked = ', '.join(directory or 'the working directory' for directory in directories)
    raise ConfigError(
        f'{included_by}There is no file {name!r}.{nearest(name, known)} Looked in: {looked}.'
    )


def _read_file(
    script: Script, path: str, directories: Sequence[str], including: tuple[str, ...]
) -> None:
    if path in including:
        raise ConfigError(f'{" includes ".join((*including, path))}: remove one of the includes.')
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path} cannot be read: {error}') from None
    label, start = _shown(path), 0
    try:
        statements = list(_statements(''.join(lines)))
    except _Unreadable as error:
        mend = f' {error.name} = {error.mend}' if error.mend else ''
        raise ConfigError(f'{label}:{error.line}: {error.content}\n{error}{mend}') from None
    for statement in statements:
        where = f'{label}:{statement.location.line_num}'
        if not isinstance(statement, config_parser.IncludeStatement):
            _add(script, statement, where)
            continue
        text = ''.join(lines[start : statement.location.line_num - 1])
        script.parts.append((label, start + 1, text))
        start = statement.location.line_num
        beside = [os.path.dirname(path), *directories]
        included = _find(statement.filename, beside, included_by=f'{where}: ')
        _read_file(script, included, directories, (*including, path))
    script.parts.append((label, start + 1, ''.join(lines[start:])))


def _read_binding(script: Script, text: str) -> None:
    try:
        statements = list(_statements(text))
    except _Unreadable as error:
        name, _, value = (part.strip() for part in text.partition('='))
        mend = f' --gin.{name}={shlex.quote(error.mend)}' if error.mend else ''
        raise ConfigError(f'--gin.{name}={value} cannot be read. {error}{mend}') from None
    for statement in statements:
        if isinstance(statement, config_parser.IncludeStatement):
            raise ConfigError(f'{text}: files are given as --gin_file={statement.filename}.')
        _add(script, statement, _COMMAND_LINE)
    script.parts.append((_COMMAND_LINE, 1, text))


def _add(script: Script, statement: Any, where: str) -> None:
    if isinstance(statement, config_parser.ImportStatement):
        if statement.module.startswith('__gin__.'):
            raise ConfigError(
                f'{where}: `{statement.format()}` is not supported. Import a module of your own '
                'that registers what you need with @gin.register.'
            )
        script.imports.append((statement.module, where))
    elif isinstance(statement, config_parser.BindingStatement):
        scope, selector, parameter, value, _ = statement
        if not parameter:
            scope, selector, parameter = f'{scope}/{selector}'.lstrip('/'), MACRO, 'value'
        script.bindings.append(Binding(scope, selector, parameter, value, where))


class _References(config_parser.ParserDelegate):
    """Lets gin's parser read references to what is not imported yet."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scopes, selector = scoped_configurable_name.split('/')
        return Reference(tuple(scopes), selector, evaluate)

    def macro(self, macro_name: str) -> Reference:
        return Reference(tuple(macro_name.split('/')), MACRO, True)


class _Unreadable(Exception):
    """A line that gin cannot parse: says why, and what to write if that can be guessed."""

    def __init__(self, line: int, content: str, reason: str):
        name, _, value = content.partition('=')
        self.line, self.name, self.content = line, name.strip(), content
        value = value.partition(' #')[0].strip()
        self.mend = _PYTHON_CONSTANTS.get(value)
        # A value that goes on into the next binding's name was not closed.
        if re.search(rf"EOF|Expected ','|token '{re.escape(self.name)}'", reason):
            reason = 'A bracket stays open, here or above.'
        elif self.mend:
            reason = 'Gin writes it as Python does:'
        elif not value:
            reason = 'It has no value.'
        elif re.fullmatch(r'[-+(. ]*\d[-+*/(). \d]*', value):
            reason = 'Gin does not calculate; write the result.'
        elif value.count('"') % 2 or value.count("'") % 2:
            reason = 'A quote stays open.'
        elif not re.search(r'[\'"\[\](){}@%,]', value):
            reason, self.mend = 'A text needs quotes:', f'"{value}"'
        else:
            reason = '' if 'malformed' in reason else f'{reason.splitlines()[0].rstrip(".")}. '
            reason = f'{reason}A value is a Python literal, an @reference or a %macro.'
        super().__init__(reason)


_PYTHON_CONSTANTS = {'true': 'True', 'false': 'False', 'none': 'None', 'null': 'None'}


def _statements(text: str) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _References())
    except tokenize.TokenError as error:
        line = text.rstrip().splitlines()[-1].strip()
        raise _Unreadable(error.args[1][0], line, error.args[0]) from None
    except SyntaxError as error:
        raise _Unreadable(error.lineno, (error.text or '').strip(), error.msg) from None


def _shown(path: str) -> str:
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative
