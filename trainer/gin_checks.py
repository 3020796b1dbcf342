"""What gin lets pass in silence, found before anything expensive: see `check`.

Gin ignores a misspelt macro or scope, a binding for something that is never called, an unknown
parameter of a function with **kwargs, and wrong types. All of these are errors here. The
checks work on the bindings of `trainer.gin_files`; of gin's own they use two private names,
`gin.config._REGISTRY` and `_CONSTANTS`, which is why gin-config is pinned.
"""

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import gin

from trainer.errors import ConfigError, nearest
from trainer.gin_files import MACRO, Binding, Reference
from trainer.gin_types import arity, complaint, parameters

# Facts about a data set that its file states for whichever model wants them.
_FACTS = tuple((name, MACRO, 'value') for name in ('INPUT_SHAPE', 'NUM_CLASSES'))

Key = tuple[str, str, str]  # Scope, complete selector, parameter.
Call = tuple[tuple[str, ...], str]  # Scopes, complete selector.


def check(
    bindings: Sequence[Binding], roots: Mapping[str, Collection[str]], unused: Collection[str] = ()
) -> list[Key]:
    """Checks all bindings against the functions that this run will call.

    Args:
        bindings: in order; a later one overrides an earlier one of the same key.
        roots: selectors of the functions that the program calls, with the names of the
            parameters that it supplies itself.
        unused: those of them that this run does not call: their bindings are known, but nothing
            they need is missed.

    Returns:
        Keys of bindings that lost their effect when a later binding overrode the reference to
        what they configure, such as the parameters of a default optimizer. Forget them.

    Raises:
        ConfigError: a name is unknown, a macro missing, a binding without effect, a type wrong.
    """
    bindings = [_resolved(binding) for binding in bindings]
    graph = _Graph(bindings)
    supplied = {find(name).selector: names for name, names in roots.items()}
    called = {s: names for s, names in supplied.items() if s not in map(_selector, unused)}
    _check_macros(graph, graph.walk(called))
    dormant = _check_effects(bindings, graph, supplied)
    _check_calls(graph, called)
    return dormant


def find(selector: str, where: str = '') -> Any:
    """Returns gin's record of what `selector` names.

    Raises:
        ConfigError: nothing has this name, or several things have.
    """
    registry = gin.config._REGISTRY
    matches = registry.get_all_matches(selector)
    if len(matches) == 1:
        return matches[0]
    prefix = f'{where}: ' if where else ''
    if matches:
        names = ' or '.join(sorted(registry.minimal_selector(m.selector) for m in matches))
        raise ConfigError(f'{prefix}{selector!r} names several things. Write {names}.')
    known = {c.name: registry.minimal_selector(c.selector) for _, c in registry.items()}
    mend = nearest(selector.rpartition('.')[2], known)
    for name, shortest in known.items():
        mend = mend.replace(f"'{name}'", f"'{shortest}'")
    raise ConfigError(
        f'{prefix}there is no {selector!r}.{mend} A function or class of your own must be '
        'registered with @gin.register and its module imported in the .gin file.'
    )


def _selector(name: str) -> str:
    return find(name).selector


def _short(selector: str) -> str:
    return gin.config._REGISTRY.minimal_selector(selector)


def _left(binding: Binding) -> str:
    """The left side of a binding, as short as it can be written."""
    if binding.selector == MACRO:
        return binding.scope
    return f'{binding.scope}/{_short(binding.selector)}.{binding.parameter}'.lstrip('/')


def _resolved(binding: Binding) -> Binding:
    """The binding with complete selectors, all of its names checked."""
    found = find(binding.selector, binding.where)
    known = parameters(found.wrapped)
    name, where = binding.parameter, binding.where
    if name in (found.denylist or ()):
        raise ConfigError(f'{where}: the program itself sets {binding.name}. Remove the binding.')
    if found.allowlist and name not in found.allowlist:
        raise ConfigError(f'{where}: {binding.name} may not be set.')
    mend = nearest(name, known.names)
    # Behind the **kwargs of a user's function anything may be meant, unless it looks misspelt.
    if name not in known.names and (mend or not known.open):
        settable = [n for n in known.names if n not in (found.denylist or ())]
        raise ConfigError(
            f'{where}: {binding.selector!r} has no parameter {name!r}.{mend} It has '
            f'{", ".join(settable)}.'
        )
    for reference in _references(binding.value):
        find(reference.selector, where)
    return Binding(binding.scope, found.selector, name, binding.value, where)


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _constant(reference: Reference) -> str | None:
    """The name of the gin constant that `%NAME` stands for, if it does."""
    if reference.selector != MACRO:
        return None
    names = gin.config._CONSTANTS.matching_selectors('/'.join(reference.scopes))
    return names[0] if names else None


class _Graph:
    """Who refers to whom: bindings by (scope, selector), and what is called from where."""

    def __init__(self, bindings: Sequence[Binding] = ()):
        self.bound: dict[tuple[str, str], dict[str, Binding]] = {}
        for binding in bindings:
            self.add(binding)

    def add(self, binding: Binding) -> None:
        here = self.bound.setdefault((binding.scope, binding.selector), {})
        here[binding.parameter] = binding

    def of(self, call: Call) -> dict[str, Binding]:
        """The bindings that a call gets: those of inner scopes override those of outer ones."""
        scopes, selector = call
        merged = {}
        for depth in range(len(scopes) + 1):
            merged.update(self.bound.get(('/'.join(scopes[:depth]), selector), {}))
        return merged

    def walk(self, roots: Collection[str]) -> list[Call]:
        """Every call that gin can come to make, from the roots and from users' own code."""
        calls: list[Call] = [((), root) for root in roots]
        for scope, selector in self.bound:
            if _is_called_by_its_users(gin.config._REGISTRY[selector]):
                calls.append((tuple(scope.split('/')) if scope else (), selector))
        for call in calls:  # Which grows on the way.
            for binding in self.of(call).values():
                found = (target(r, call[0]) for r in _references(binding.value))
                calls += [c for c in dict.fromkeys(found) if c not in calls]
        return calls

    def keys(self, calls: Collection[Call]) -> set[Key]:
        """The bindings that are looked at in these calls, overridden defaults among them."""
        return {
            ('/'.join(scopes[:depth]), selector, parameter)
            for scopes, selector in calls
            for depth in range(len(scopes) + 1)
            for parameter in self.bound.get(('/'.join(scopes[:depth]), selector), ())
        }


def target(reference: Reference, scopes: tuple[str, ...]) -> Call:
    """The call that a reference inside `scopes` makes or, given uncalled, leads to.

    A scope of its own replaces the present one. What is given uncalled is called later, by the
    training loop or in a thread of TensorFlow's, where no scope holds.
    """
    selector = find(reference.selector).selector
    return reference.scopes or (scopes if reference.called else ()), selector


def _is_called_by_its_users(found: Any) -> bool:
    """Whether Python code that knows nothing of gin calls gin's version: @gin.configurable."""
    if inspect.isclass(found.wrapped):
        return found.wrapper is found.wrapped
    value = sys.modules.get(found.wrapped.__module__)
    for part in found.wrapped.__qualname__.split('.'):
        value = getattr(value, part, None)
    return value is found.wrapper or value is None


def _check_macros(graph: _Graph, calls: Collection[Call]) -> None:
    """Raises for macros that are used but not defined, or defined but still to be set."""
    macros = {scope for scope, selector in graph.bound if selector == MACRO}
    for call in calls:
        for binding in graph.of(call).values():
            for reference in _references(binding.value):
                name = '/'.join(reference.scopes)
                if reference.selector == MACRO and name not in macros and not _constant(reference):
                    raise ConfigError(
                        f'{binding.where}: %{name} is not defined.{nearest(name, macros)}'
                    )
    missing = [
        _left(binding)
        for call in calls
        for binding in graph.of(call).values()
        if isinstance(binding.value, Reference) and _constant(binding.value) == 'gin.REQUIRED'
    ]
    if missing:
        names = list(dict.fromkeys(b for b in map(_left, _all(graph)) if b in missing))
        flags = [
            '--model_dir=DIR' if name == 'MODEL_DIR' else f'--gin.{name}=VALUE' for name in names
        ]
        raise ConfigError(
            f'The configuration leaves {", ".join(names)} to you. Set '
            f'{"it" if len(names) == 1 else "them"} with {" ".join(flags)} or in a .gin file.'
        )


def _all(graph: _Graph) -> Iterator[Binding]:
    for bound in graph.bound.values():
        yield from bound.values()


def _check_effects(bindings: Sequence[Binding], graph: _Graph, roots: Collection[str]) -> list[Key]:
    """Raises for bindings without effect; returns those that lost it to a later override."""
    used = graph.keys(graph.walk(roots))
    idle = [b for b in _all(graph) if b.key not in used and b.key not in _FACTS]
    if not idle:
        return []
    # A binding in a file may have had its effect until the command line, say, chose another
    # optimizer. It is forgotten with what it configures, not wrong.
    had_effect: set[Key] = set()
    growing = _Graph()
    for binding in bindings:
        growing.add(binding)
        had_effect |= growing.keys(growing.walk(roots))
    for binding in idle:
        if binding.key not in had_effect or binding.on_command_line:
            raise ConfigError(_without_effect(binding, graph, roots))
    return [binding.key for binding in idle]


def _without_effect(binding: Binding, graph: _Graph, roots: Collection[str]) -> str:
    where, left = binding.where, _left(binding)
    if binding.selector == MACRO:
        used = {'/'.join(scopes) for scopes, s in graph.walk(roots) if s == MACRO}
        mend = nearest(left, used) or nearest(left.upper(), used)
        return f'{where}: {left} is set, but nothing uses %{left}.{mend}'
    short = _short(binding.selector)
    places = sorted(
        '/'.join((*scopes, short)) for scopes, s in graph.walk(roots) if s == binding.selector
    )
    if not places:
        return (
            f'{where}: {left} has no effect, because nothing refers to @{short}. Refer to it, or '
            'remove the binding.'
        )
    mend = nearest(f'{binding.scope}/{short}', places)
    return (
        f'{where}: {left} has no effect, because {short} is never called in the scope '
        f'{binding.scope!r}, only as {", ".join(places)}.{mend}'
    )


def _check_calls(graph: _Graph, roots: Mapping[str, Collection[str]]) -> None:
    """Raises for values of a wrong type and for parameters that nobody sets."""
    # The calls whose arguments all come from gin and the program: nobody else can add one.
    complete = {((), root): names for root, names in roots.items()}
    for call in graph.walk(roots):
        hints = parameters(find(call[1]).wrapped).hints
        for name, binding in graph.of(call).items():
            for reference in _references(binding.value):
                if reference.called and reference.selector != MACRO:
                    complete.setdefault(target(reference, call[0]), ())
            if call[1] == MACRO:
                continue
            hint = hints.get(name, Any)
            value, source = _literal(binding, graph)
            given = arity(hint)
            if isinstance(value, Reference) and not value.called and given is not None:
                later = target(value, call[0])
                complete.setdefault(later, parameters(find(later[1]).wrapped).names[:given])
            if wrong := complaint(value, hint, lambda r: find(r.selector).wrapped):
                parameter = '' if source is binding else f', for {_left(binding)},'
                raise ConfigError(f'{source.where}: {_left(source)} = {value!r}{parameter} {wrong}')
    for call, supplied in complete.items():
        bound = graph.of(call)
        for name in parameters(find(call[1]).wrapped).required:
            if name not in bound and name not in supplied:
                left = '/'.join((*call[0], f'{_short(call[1])}.{name}'))
                raise ConfigError(
                    f'{left} is not set and has no default. Set it in a .gin file or with '
                    f'--gin.{left}=VALUE.'
                )


def _literal(binding: Binding, graph: _Graph) -> tuple[Any, Binding]:
    """The value behind a binding's chain of macros, and the binding that states it."""
    value, names = binding.value, []
    while isinstance(value, Reference) and value.selector == MACRO:
        if constant := _constant(value):
            return gin.config._CONSTANTS[constant], binding
        name = '/'.join(value.scopes)
        if name in names:
            raise ConfigError(f'{binding.where}: {" = %".join((*names, name))} goes in a circle.')
        names.append(name)
        binding = graph.bound[name, MACRO]['value']
        value = binding.value
    return value, binding
