"""What a configured function accepts: the names, defaults and types of its parameters."""

import ast
import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import typeguard

from trainer.gin_files import Reference


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a function, or of the constructor of a class.

    Attributes:
        hints: name -> annotation; without one, what the default gives away, or Any.
        required: the names without a default.
        open: whether a function takes any other name too, by **kwargs. The constructor of a class
            that hands **kwargs on to its base class takes the base's names, and no others.
    """

    hints: dict[str, Any]
    required: tuple[str, ...]
    open: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the signature."""
        return tuple(self.hints)


@dataclasses.dataclass(frozen=True)
class _AnythingButText:
    """Stands for the annotation of a parameter that has none but is a number, or the like."""

    shown: str


@functools.cache
def parameters(target: Callable) -> Parameters:
    """Returns the parameters of a function or class."""
    functions = [target]
    if inspect.isclass(target):
        functions = [c.__dict__['__init__'] for c in target.__mro__ if '__init__' in c.__dict__]
        functions = [f for f in functions if f is not object.__init__] or [target]
    hints, required, is_open = {}, [], False
    for function in functions:
        try:
            signature = list(inspect.signature(function).parameters.values())
        except ValueError:  # Compiled code may tell nothing.
            return Parameters(hints, tuple(required), open=True)
        annotations = _annotations(function)
        if inspect.isclass(target) and function is not target:
            signature = signature[1:]
        for parameter in signature:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            if parameter.name not in hints and parameter.default is parameter.empty:
                required.append(parameter.name)
            hints.setdefault(parameter.name, _hint(parameter, annotations, function.__module__))
        is_open = any(p.kind is p.VAR_KEYWORD for p in signature)
        if not is_open:
            break
    return Parameters(hints, tuple(required), is_open and not inspect.isclass(target))


def _annotations(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # Names that exist only for type checkers; not a function.
        return {}


def _hint(parameter: inspect.Parameter, annotations: dict[str, Any], module: str) -> Any:
    if parameter.name in annotations:
        return annotations[parameter.name]
    if isinstance(parameter.default, bool | int | float):
        return _AnythingButText(type(parameter.default).__name__)
    # Keras annotates nothing, but what it requires of optimizers and the like is never text.
    if module.startswith('keras.') and parameter.default is parameter.empty:
        return _AnythingButText('a number')
    return Any


def arity(hint: Any) -> int | None:
    """Returns how many arguments a function that is wanted will be given; None if that is open."""
    found = {
        len(arguments) if isinstance(arguments := (*typing.get_args(m), None)[0], list) else None
        for m in _members(hint)
        if m is not type(None)
    }
    return found.pop() if len(found) == 1 else None


def complaint(value: Any, hint: Any, target: Callable[[Reference], Callable]) -> str:
    """Says what is wrong with giving `value` to a parameter, and how to mend it; '' if nothing.

    Args:
        value: a literal, a reference, or a container of both.
        hint: of `Parameters.hints`.
        target: gives the function or class behind a reference.
    """
    if isinstance(value, Reference):
        return _reference_complaint(value, hint, target(value))
    if _holds_references(value):
        elements = _element_hint(hint)
        found = (complaint(v, elements, target) for v in value if isinstance(v, Reference))
        return next(filter(None, found), '') if isinstance(value, list | tuple) else ''
    if _fits(value, hint):
        return ''
    given = 'None' if value is None else f'of type {type(value).__name__}'
    wanted = f'is {given}, but {_shown(hint)} is wanted.'
    if isinstance(value, str):
        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return wanted
        return f'{wanted} Write it without quotes: {value}' if _fits(literal, hint) else wanted
    for other in (repr(str(value)), repr(tuple(value)) if isinstance(value, list) else None):
        if other and _fits(ast.literal_eval(other), hint):
            return f'{wanted} Write {other}'
    return wanted


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _holds_references(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return isinstance(value, list | tuple) and any(
        isinstance(v, Reference) or _holds_references(v) for v in value
    )


def _element_hint(hint: Any) -> Any:
    for member in _members(hint):
        origin = typing.get_origin(member)
        if inspect.isclass(origin) and issubclass(origin, collections.abc.Sequence):
            return typing.get_args(member)[0]
    return Any


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, _AnythingButText):
        return not isinstance(value, str)
    members = _members(hint)
    if isinstance(value, bool) and bool not in members:  # To Python a bool is an int.
        members = tuple(m for m in members if m not in (int, float))
    for member in members:
        try:
            typeguard.check_type(
                value,
                member,
                forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
                collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
            )
        except typeguard.TypeCheckError:
            continue
        return True
    return False


def _reference_complaint(reference: Reference, hint: Any, target: Callable) -> str:
    members = [m for m in _members(hint) if m is not type(None)]
    classes = [typing.get_origin(m) or m for m in members]
    # Where instances of certain classes are wanted, and nothing that could be a function.
    instances = all(
        inspect.isclass(c) and c not in (Any, object, type, collections.abc.Callable)
        for c in classes
    )
    if not reference.called:
        if instances:
            return f'is given uncalled, but {_shown(hint)} is wanted. Write {reference!r}()'
        return ''
    made = target if inspect.isclass(target) else _annotations(target).get('return')
    if not inspect.isclass(made) or typing.get_origin(made):
        return ''
    if arity(hint) == 0:
        wanted = [typing.get_args(m)[1] for m in members]
        if any(inspect.isclass(w) and issubclass(made, w) for w in wanted):
            uncalled = repr(reference).removesuffix('()')
            return f"is called too early: it is built in the strategy's scope. Write {uncalled}"
    if instances and not any(issubclass(made, c) for c in classes):
        return f'gives {made.__name__}, but {_shown(hint)} is wanted.'
    return ''


def _shown(hint: Any) -> str:
    if isinstance(hint, _AnythingButText):
        return hint.shown
    return re.sub(r'\b(\w+\.)+(?=\w)', '', inspect.formatannotation(hint))
