"""Names in examples that are not run: that they exist, and take the arguments that they are given."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

import impasto

#: Methods that return an object of their class.
CONSTRUCTORS = ("from_pretrained", "from_pipe", "from_single_file", "from_config")
UNKNOWN = object()


class An:
    """An object of a class, for a variable."""

    def __init__(self, cls: type):
        self.cls = cls

    def attribute(self, name: str) -> Any:
        if name in ("transformer", "vae") and issubclass(self.cls, impasto.PixArtSigmaPipeline.__mro__[1]):
            return An(impasto.PixArtTransformer2DModel if name == "transformer" else impasto.AutoencoderKL)
        if hasattr(self.cls, name):
            return getattr(self.cls, name)
        own = [cls for cls in self.cls.__mro__ if cls.__module__.startswith("impasto")]
        if any(name in vars(cls).get("__annotations__", {}) or f"self.{name}" in inspect.getsource(cls) for cls in own):
            return UNKNOWN
        raise AttributeError(name)


class Checker(ast.NodeVisitor):
    """Follows the statements of the examples of one page, with the public names as if they were imported."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {name: getattr(impasto, name) for name in impasto.__all__}
        self.names["impasto"] = impasto
        self.problems: list[str] = []

    def check(self, code: str) -> list[str]:
        """What is wrong with an example."""
        self.problems = []
        self.visit(ast.parse(code))
        return self.problems

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            if each.name.split(".")[0] == "impasto":
                importlib.import_module(each.name)
            else:
                self.names.pop(each.asname or each.name.split(".")[0], None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        ours = node.module is not None and node.module.split(".")[0] == "impasto"
        module = importlib.import_module(str(node.module)) if ours else None
        for each in node.names:
            if module is not None and not hasattr(module, each.name):
                self.problems.append(f"{node.module} has no {each.name}")
            self.names[each.asname or each.name] = getattr(module, each.name, UNKNOWN) if ours else UNKNOWN

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names[target.id] = self.value(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self.value(node.func)
        if isinstance(function, An):
            function = getattr(function.cls, "__call__")  # noqa: B004, B009
        if not callable(function) or not str(getattr(function, "__module__", "")).startswith("impasto"):
            return
        problem = unfit(function, node)
        if problem:
            self.problems.append(f"line {node.lineno}: {ast.unparse(node.func)}: {problem}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.value(node)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, as far as that is known without running it."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value), node)
        if isinstance(node, ast.Call):
            made = self.value(node.func)
            if isinstance(made, type) and made.__module__.startswith("impasto"):
                return An(made)
            if isinstance(node.func, ast.Attribute) and node.func.attr in CONSTRUCTORS:
                cls = self.value(node.func.value)
                return An(cls) if isinstance(cls, type) else UNKNOWN
        return UNKNOWN

    def attribute(self, owner: Any, node: ast.Attribute) -> Any:
        known = isinstance(owner, An | type) or inspect.ismodule(owner)
        if not known or (isinstance(owner, type) and not owner.__module__.startswith("impasto")):
            return UNKNOWN
        try:
            if isinstance(owner, An):
                return owner.attribute(node.attr)
            if inspect.ismodule(owner) and not hasattr(owner, node.attr):
                return importlib.import_module(f"{owner.__name__}.{node.attr}")
            return getattr(owner, node.attr)
        except (AttributeError, ImportError):
            problem = f"line {node.lineno}: {ast.unparse(node)} does not exist"
            if problem not in self.problems:
                self.problems.append(problem)
            return UNKNOWN


def unfit(function: Any, call: ast.Call) -> str | None:
    """Why a call does not fit the signature, if it does not."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters) and function.__name__ != "__call__"
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    unknown = [each.arg for each in call.keywords if each.arg is not None and each.arg not in named]
    if unknown and not takes_any:
        return f"there is no argument {unknown[0]!r}"
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = [each for each in call.args if not (isinstance(each, ast.Constant) and each.value is ...)]
    if len(given) > len(places) and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return f"{len(given)} arguments by position, of at most {len(places)}"
    return None
