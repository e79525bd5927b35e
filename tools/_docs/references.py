"""Docstrings and references: what autodoc reads, and what a name in a docstring stands for.

Sphinx is strict here (``-n``): a name that nothing stands for is an error. A name that exists, but is documented
elsewhere or nowhere (Python's own, numpy's, an inner one of ours), is printed as code. So nothing need be fetched.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

import vfiopy

__all__ = ["setup"]

_log = logging.getLogger(__name__)
_FIELDS = ("attribute", "data", "property")
_STYLE: Any = Config(napoleon_custom_sections=[("Attributes", "params_style")])
_LONGEST_VALUE = 100
_PACKAGE = Path(vfiopy.__file__).parent


def setup(app: Sphinx) -> dict[str, object]:
    """Hook in."""
    app.connect("builder-inited", _pass_comments_on)
    app.connect("autodoc-process-docstring", _google_style)
    app.connect("autodoc-process-signature", _readable_defaults)
    app.connect("autodoc-skip-member", _one_place_for_each)
    app.connect("missing-reference", _existing)
    app.connect("env-check-consistency", _complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _google_style(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    # Napoleon's own hook takes the words before the colon in "Where it is: ..." of a property for its type.
    kind: Any = "object" if what in _FIELDS else what
    lines[:] = GoogleDocstring(lines, _STYLE, app, kind, name, obj, options).lines()


def _pass_comments_on(_app: Sphinx) -> None:
    """Have autodoc find the string below a constant's definition where another module of ours exports it again."""
    names = [name for _, name, _ in pkgutil.walk_packages(vfiopy.__path__, "vfiopy.") if "__main__" not in name]
    analyzers = {name: ModuleAnalyzer.for_module(name) for name in ["vfiopy", *names] if _has_source(name)}
    comments: dict[str, list[tuple[object, list[str]]]] = {}
    for name, analyzer in analyzers.items():
        for (owner, constant), text in analyzer.find_attr_docs().items():
            if not owner:
                comments.setdefault(constant, []).append((getattr(sys.modules[name], constant, None), text))
    for name, analyzer in analyzers.items():
        for constant in getattr(sys.modules[name], "__all__", ()):
            for value, text in comments.get(constant, ()):
                if value is getattr(sys.modules[name], constant):
                    hide = ["", ":meta hide-value:"] if len(repr(value)) > _LONGEST_VALUE else []
                    analyzer.attr_docs["", constant] = [*text, *hide]


def _has_source(name: str) -> bool:
    return str(importlib.import_module(name).__file__).endswith(".py")


def _readable_defaults(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    # What no expression gives, as "<factory>", keeps Sphinx from parsing the rest.
    return (signature and re.sub(r"= <.*?>(?=[,)])", "= ...", signature)), returns


def _one_place_for_each(app: Sphinx, what: str, name: str, obj: object, _skip: bool, _options: object) -> bool | None:
    # What vfiopy itself exports is described there, and linked from elsewhere.
    module = app.env.current_document.autodoc_module
    return True if what == "module" and module != "vfiopy" and getattr(vfiopy, name, None) is obj else None


def _existing(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    found = _find(node["reftarget"], node.get("py:module"), node.get("py:class"))
    if found is None:
        return None
    target = _public_name(*found)
    if (entry := env.domains.python_domain.objects.get(target)) is None:
        return content
    page = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", content, internal=True, reftitle=target, refuri=f"{page}#{entry.node_id}")


def _complete(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of a name that a documented module exports, and that nothing documents."""
    objects = env.domains.python_domain.objects
    for name in sorted(env.domains.python_domain.modules):
        module = importlib.import_module(name)
        for member in module.__all__:
            known = {f"{name}.{member}", _public_name(getattr(module, member), [])}
            if not known & objects.keys():
                _log.warning("%s.%s: exported, but without docstring or not in docs/reference/api", name, member)


def _find(target: str, module: str | None, owner: str | None) -> tuple[object, list[str]] | None:
    """The nearest thing with a name of its own that a dotted name leads to, and the rest of the name."""
    places: list[str | None] = [f"{module}.{owner}" if owner else None, module, ""]
    places += sorted(name for name in sys.modules if name.startswith("vfiopy"))
    for place in places:
        if place is not None and (found := _walk(f"{place}.{target}".lstrip("."))) is not None:
            return found
    name = target.partition(".")[0]
    return (object, []) if name in _named_for_types() or hasattr(builtins, name) else None


@cache
def _walk(dotted: str) -> tuple[object, list[str]] | None:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except (ImportError, ValueError):
            continue
        return _follow(thing, parts[end:])
    return None


def _follow(thing: Any, parts: list[str]) -> tuple[object, list[str]] | None:
    """From a module to a class or function in it; what is a class's own has no name but the class's."""
    anchor, rest = thing, list[str]()
    for part in parts:
        if not hasattr(thing, part):
            field = inspect.isclass(thing) and any(part in inspect.get_annotations(base) for base in thing.__mro__)
            return (anchor, [*rest, part]) if field else None
        thing = getattr(thing, part)
        if inspect.isclass(thing) or inspect.ismodule(thing) or inspect.ismodule(anchor):
            anchor, rest = thing, []
        else:
            rest.append(part)
    return anchor, rest


def _public_name(thing: object, rest: list[str]) -> str:
    """Where a thing is documented: under the name that vfiopy exports, else under its own."""
    for name in vfiopy.__all__:
        if getattr(vfiopy, name) is thing:
            return ".".join(["vfiopy", name, *rest])
    if inspect.ismodule(thing):
        return ".".join([thing.__name__, *rest])
    return ".".join([getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", ""), *rest])


@cache
def _named_for_types() -> frozenset[str]:
    """Names that modules of ours import for the type checker only."""
    names: set[str] = set()
    for path in _PACKAGE.rglob("*.py"):
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING":
                for line in part.body:
                    if isinstance(line, ast.Import | ast.ImportFrom):
                        names |= {alias.asname or alias.name for alias in line.names}
    return frozenset(names)
