"""Constructor arguments of classes, read from their source: importing the classes takes seconds, reading them does not.

Only what the source says beyond doubt counts. A class that cannot be followed (no source, a base elsewhere, open
`**kwargs`) has no known signature, and nothing is said of its arguments.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ClassSource:
    """A class in its source file.

    Attributes:
        module: dotted name of the module that defines the class.
        node: the class's syntax tree.
    """

    module: str
    node: ast.ClassDef


def arguments(class_path: str) -> dict[str, str | None] | None:
    """Arguments of a class's constructor, those that it forwards by `**kwargs` to its bases included.

    Args:
        class_path: dotted path, such as `rewards.ocr.OCRReward`.

    Returns:
        Name of each argument -> class path of its type where that is a class (for nested settings), else None. None if
        the signature is not known.
    """
    module, _, name = class_path.rpartition(".")
    source = _find_class(module, name) if module else None
    return None if source is None else _arguments(source)


def _arguments(source: ClassSource) -> dict[str, str | None] | None:
    if _is_dataclass(source.node):
        return _fields(source)
    init = next((n for n in source.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return _of_bases(source)
    given = [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]
    found = {one.arg: _annotated_class(source, one.annotation) for one in given if one.arg != "self"}
    if init.args.kwarg is None:
        return found
    forwarded = _forwarding_call(init, init.args.kwarg.arg)
    inherited = None if forwarded is None else _of_bases(source)
    if forwarded is None or inherited is None:
        return None
    positional = sum(not isinstance(one, ast.Starred) for one in forwarded.args)
    passed = {*list(inherited)[:positional], *(one.arg for one in forwarded.keywords)}
    # Its own come first: a subclass may pass them by their place.
    return found | {name: of for name, of in inherited.items() if name not in {*passed, *found}}


def _forwarding_call(init: ast.FunctionDef, kwargs: str) -> ast.Call | None:
    """Finds `super().__init__(..., **kwargs)`; open arguments that go elsewhere may be anything."""
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            if any(one.arg is None and ast.unparse(one.value) == kwargs for one in node.keywords):
                return node
    return None


def _of_bases(source: ClassSource) -> dict[str, str | None] | None:
    """Arguments of the base class; with several, `super()` depends on the order of all their bases."""
    paths = [_dotted(base.value if isinstance(base, ast.Subscript) else base) for base in source.node.bases]  # `B[T]`
    paths = [path for path in paths if path not in ("ABC", "Generic", "Protocol", "nn.Module", "object")]
    found = _resolve(source.module, paths[0]) if len(paths) == 1 and paths[0] is not None else None
    return None if found is None or found == source else _arguments(found)


def _fields(source: ClassSource) -> dict[str, str | None] | None:
    inherited = _of_bases(source) if source.node.bases else {}
    if inherited is None:
        return None
    own = [n for n in source.node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return inherited | {n.target.id: _annotated_class(source, n.annotation) for n in own}  # type: ignore[union-attr]


def _is_dataclass(node: ast.ClassDef) -> bool:
    decorators = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return any((_dotted(one) or "").rpartition(".")[2] == "dataclass" for one in decorators)


def _annotated_class(source: ClassSource, annotation: ast.expr | None) -> str | None:
    """Path of the dataclass that an annotation `X` or `X | None` names; other types are checked by their own path."""
    if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
        annotation = annotation.left
    name = None if annotation is None else _dotted(annotation)
    found = None if name is None else _resolve(source.module, name)
    return f"{found.module}.{found.node.name}" if found is not None and _is_dataclass(found.node) else None


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return None if value is None else f"{value}.{node.attr}"
    return None


def _resolve(module: str, name: str) -> ClassSource | None:
    """The class that a name stands for in a module, also where it is `alias.Class` of an imported module."""
    if "." not in name:
        return _find_class(module, name)
    alias, _, attribute = name.partition(".")
    for node in _imports(module):
        for one in node.names:
            if (one.asname or one.name) == alias:
                inside = one.name if isinstance(node, ast.Import) else f"{node.module}.{one.name}"
                return _find_class(inside, attribute)
    return None


@cache
def _find_class(module: str, name: str) -> ClassSource | None:
    tree = _parsed(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ClassSource(module, node)
    for node in _imports(module):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                if (one.asname or one.name) == name and (node.module, one.name) != (module, name):
                    return _find_class(node.module, one.name)
    return None


def _imports(module: str) -> Iterator[ast.Import | ast.ImportFrom]:
    tree = _parsed(module)
    return (n for n in (tree.body if tree else ()) if isinstance(n, ast.Import | ast.ImportFrom))


@cache
def _parsed(module: str) -> ast.Module | None:
    """A module's syntax tree; None if it has no source file that can be read. Imports nothing, not even the package."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    files = [Path(str(spec.origin))] if not below else []
    for root in map(Path, spec.submodule_search_locations or ()):
        path = root.joinpath(*below)
        files += [path.parent / f"{path.name}.py", path / "__init__.py"]
    try:
        file = next((one for one in files if one.suffix == ".py" and one.is_file()), None)
        return None if file is None else ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # the parser's import says where; a name may be too long for a file
        return None
