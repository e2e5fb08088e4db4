"""Configurations in files: recipes of the package, YAML, and ``a.b=c`` on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...checks import nearest, printable, shown
from ...errors import CheckpointNotFoundError, InputError
from ...optional import require
from .config import problems
from .configuration import Configuration

MOST_BYTES = 1_000_000


def recipes() -> dict[str, str]:
    """The recipes of the package by name, each with its first line, which describes it."""
    folder = resources.files("impasto.training") / "recipes"
    found = {}
    for path in sorted(folder.iterdir(), key=lambda each: each.name.removesuffix(".yaml")):
        if path.name.endswith(".yaml"):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            found[path.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def read(name: str, changes: Sequence[str] = ()) -> Configuration:
    """The configuration in a file, or of a recipe of the package, with changes such as "optimizer.rate=1e-5".

    Raises:
        CheckpointNotFoundError: there is no such file or recipe.
        InputError: it is no YAML, or has an unknown key or a value that cannot be used; the message names the key.
    """
    content = _parse(_text(name), name)
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a mapping of settings but {shown(content)}")
    for change in changes:
        _change(content, change)
    return checked(content, name)


def checked(content: Mapping[str, Any], name: str) -> Configuration:
    """A configuration from its values.

    Raises:
        InputError: an unknown key, or a value that cannot be used.
    """
    from pydantic import ValidationError

    try:
        return Configuration.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{name}: {problems(error)}") from error


def text_of(configuration: Configuration) -> str:
    """All settings as YAML, which ``read`` reads."""
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        yaml_implicit_resolvers = _loader().yaml_implicit_resolvers  # a text that would be read as a number is quoted

    content = configuration.model_dump(mode="json")
    written: str = yaml.dump(content, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)
    return written


def _text(name: str) -> str:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            if path.stat().st_size > MOST_BYTES:
                raise InputError(f"{name} has more than {MOST_BYTES} bytes: it is not a configuration")
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not a text file: {error}") from error
        except OSError as error:
            raise CheckpointNotFoundError(f"{name} cannot be read: {error.strerror}") from error
    known = recipes()
    if name not in known:
        raise CheckpointNotFoundError(
            f"there is no recipe {shown(name)}; give a .yaml file, or one of {', '.join(known)} (impasto train --list)"
            f"{nearest(name, known)}"
        )
    return (resources.files("impasto.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, name: str) -> Any:
    yaml = _yaml()
    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(printable(str(error)).split())
        raise InputError(f"{name} is not valid YAML: {reason[:300]}") from error


def _yaml() -> Any:
    return require("yaml", "a configuration", "impasto[train]")


def _loader() -> Any:
    """YAML 1.1's safe loader, except that 1e-5 is a number, a key that is there twice an error, and * and & refused."""
    import re

    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them expand to gigabytes
                raise yaml.YAMLError("aliases (*name) are not supported")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def _change(content: dict[str, Any], change: str) -> None:
    """Set one value, as in "data.sources.0.path=images"."""
    path, equals, value = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {shown(change)}: write it as a.b=value")
    inside: Any = content
    for key, following in zip(keys, [*keys[1:], None]):
        if isinstance(inside, list):
            if not key.isdigit() or int(key) >= len(inside):
                raise InputError(f"--set {path}: {shown(key)} is not one of the {len(inside)} entries, from 0 on")
            place: Any = int(key)
        elif isinstance(inside, dict):
            place = key
        else:
            raise InputError(f"--set {path}: there is a value, not a section, before {shown(key)}")
        if following is None:
            try:
                inside[place] = _parse(value, f"--set {path}")
            except InputError as error:
                raise InputError(f"{error}; put a text in double quotes: --set '{path}=\"...\"'") from error
            return
        if isinstance(inside, dict) and inside.get(place) is None:
            inside[place] = {}
        inside = inside[place]
