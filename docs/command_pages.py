"""Pages of the commands, made from the very objects that print `--help`."""

import pathlib

import typer

from kvjax import cli


def commands() -> dict:
    """The commands by name, in the order of `kvjax --help`."""
    return dict(typer.main.get_command(cli.app).commands)


def write(folder: pathlib.Path) -> None:
    """Writes a page a command, and one that lists them."""
    found = commands()
    for name, command in found.items():
        (folder / f"{name}.md").write_text(page(name, command), "utf-8")
    (folder / "index.md").write_text(index(found), "utf-8")


def index(found: dict) -> str:
    """The list of the commands, each with its first sentence."""
    lines = ["# Commands", "", "| command | what it does |", "|---|---|"]
    for name, command in found.items():
        lines.append(f"| [`kvjax {name}`]({name}.md) | {_cell(command.help)} |")
    names = "\n".join(found)
    hidden = f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```"
    return "\n".join([*lines, "", hidden, ""])


def page(name: str, command) -> str:
    """One command: what it does, an example, its arguments and options."""
    lines = [f"# kvjax {name}", "", command.help, ""]
    example = (command.epilog or "").removeprefix("Example: ")
    if example:
        lines += ["```sh", example, "```", ""]
    context = command.make_context(name, [], resilient_parsing=True)
    for kind in ("argument", "option"):
        found = [p for p in command.params if p.param_type_name == kind]
        records = [p.get_help_record(context) for p in found]
        if any(records):
            lines += [f"| {kind} | what it means |", "|---|---|"]
            lines += [f"| `{_cell(r[0])}` | {_cell(r[1])} |" for r in records if r]
            lines.append("")
    return "\n".join(lines)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
