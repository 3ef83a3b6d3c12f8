r"""What Sphinx has to know to make these pages of the docstrings."""

import importlib
import inspect
from typing import Any

from docutils import nodes
from docutils.parsers.rst import roles
from sphinx.application import Sphinx


def skip(
    app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any
) -> bool | None:
    r"""Leaves out what Python says of the fields of named tuples: "Alias for field number 0"."""
    return True if type(thing).__name__ == "_tuplegetter" else None


#: The docstrings of attributes as they are written, by name.
written: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    r"""Keeps what is said of an attribute as it is written. Of "Whether there is a bound: no layer
    was refused." napoleon would take what stands before the colon for a type."""
    if what in ("attribute", "data", "property"):
        written[name] = list(lines)


def restore(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    r"""Puts back what :func:`keep` kept, once napoleon is done."""
    lines[:] = written.pop(name, lines)


def known(target: str) -> Any:
    r"""Returns what a dotted name of ours means, or :py:`None`."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                thing = getattr(thing, part)
        except (ImportError, AttributeError):
            continue
        return thing
    return None


def resolve(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    r"""Leads from any name of a thing to the one page that it is on: `flowguard.bounds.certify` and
    `flowguard.bounds.certificate.certify` are both `flowguard.certify`."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip("~.")
    module, cls = node.get("py:module"), node.get("py:class")
    domain = env.get_domain("py")
    for name in (target, f"{module}.{target}", f"{module}.{cls}.{target}"):
        thing = known(name) if name.startswith("flowguard.") else None
        for other in domain.objects if thing is not None else ():
            # The last word first: to look each of them up takes long.
            if other.rpartition(".")[2] == name.rpartition(".")[2]:
                if inspect.unwrap(known(other)) is inspect.unwrap(thing):
                    return domain.resolve_xref(
                        env, node["refdoc"], app.builder, "obj", other, node, content
                    )
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    r"""Registers the role `py`, for code in docstrings, and what is above."""
    roles.register_local_role(
        "py", roles.CustomRole("py", roles.code_role, {"language": "python"}, [])
    )
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", keep, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", restore, priority=600)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
