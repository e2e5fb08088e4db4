"""What the site has in addition to Sphinx: its tree, which is that of ``index.md``, and the commands of ``impasto``."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^():#]+\.md)\)")
#: A number whose range is checked: ``Annotated[int, Bounds(least=1, ...)]``.
CHECKED = re.compile(r"Annotated\[(\w+), \w+\([^()]*\)\]")


def tree_of(index: str) -> dict[str, list[str]]:
    """The pages that each section of a list of links names, by the section's heading. A page is in the first one."""
    pieces = HEADING.split(index)
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for heading, section in zip(pieces[1::2], pieces[2::2], strict=True):
        pages = [page for page in dict.fromkeys(LINK.findall(section)) if page not in seen]
        seen.update(pages)
        if pages:
            found[heading] = pages
    return found


def add_tree(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the tree to the first page. On a code host that page is a plain list of links."""
    if name != app.config.root_doc:
        return
    for heading, pages in tree_of(source[0]).items():
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```", ""])


class Commands(SphinxDirective):
    """All commands with their arguments and options."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Markdown of the command line's own help."""
        return self.parse_text_to_nodes(commands_in_markdown(), allow_section_headings=True)


def commands_in_markdown() -> str:
    """A section for each command."""
    import typer

    from impasto.cli import app

    lines = []
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        lines += [f"## impasto {name}", "", _paragraphs(command.help), ""]
        parameters = [each for each in command.params if not getattr(each, "hidden", False)]
        lines += [f"- {_names(each)}: {each.help}" for each in parameters if each.help]
        lines += [""]
    return "\n".join(lines)


def _paragraphs(help: str) -> str:
    return re.sub(r"[ \t]+", " ", help.replace("\b\n", "").strip())


def _names(parameter: Any) -> str:
    metavar = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "argument":
        return f"`{metavar}`"
    options = ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts])
    return options if parameter.is_flag else f"{options} `{metavar}`"


def plain_types(
    _: Sphinx, what: str, name: str, object: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A signature with ``int`` in place of an int with its bounds."""
    return signature and CHECKED.sub(r"\1", signature), returns and CHECKED.sub(r"\1", returns)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", add_tree)
    app.connect("autodoc-process-signature", plain_types)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
