"""Makes the notebooks of their sources: `python colab/build.py [--execute] [NAME]`.

A source is a `.py` in the percent format, with a title in its first cell. Its notebook
begins with a badge and a cell that installs what is missing; both are written here, for
all of them. With `--execute` it also holds what its cells print and draw.
"""

import argparse
import os
import pathlib
import tomllib
from collections.abc import Mapping

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FIRST_CELL = FOLDER / "first_cell.py"


def sources() -> list[pathlib.Path]:
    """The sources, by name."""
    others = (FIRST_CELL.name, "build.py")
    return sorted(path for path in FOLDER.glob("*.py") if path.name not in others)


def repository() -> str:
    """The address in `pyproject.toml`, or nothing."""
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"].get("urls", {}).get("Repository", "")


def first_cell(address: str) -> str:
    """The source of the cell that installs, with the repository's address."""
    text = FIRST_CELL.read_text(encoding="utf-8").strip()
    code = text.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    return f"%matplotlib inline\n{code}"


def make(source: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs."""
    body = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    title, *cells = body.cells
    address, name = repository(), source.with_suffix(".ipynb").name
    link = name
    if address.startswith("https://github.com/"):
        place = address.removeprefix("https://github.com/").strip("/")
        link = (
            f"https://colab.research.google.com/github/{place}/blob/main/colab/{name}"
        )
    title.source += f"\n\n[![Open in Colab]({BADGE})]({link})"
    cells = [title, nbformat.v4.new_code_cell(first_cell(address)), *cells]
    for index, cell in enumerate(cells):
        cell["id"], cell["metadata"] = f"{source.stem}-{index:02}", {}
    cells[1]["metadata"] = {"cellView": "form"}  # Colab shows its title and its field
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    notebook.nbformat_minor = 5
    return notebook


def execute(
    notebook: nbformat.NotebookNode,
    *,
    env: Mapping[str, str] | None = None,
    timeout: int = 900,
) -> None:
    """Runs a notebook where it lies, in this Python; its outputs go into it.

    Args:
        env: variables of its kernel; None means this process's.
        timeout: seconds for a cell.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell does.
    """
    from nbclient import NotebookClient

    # The kernel named python3 is the Python that runs this, whatever else is installed.
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
    )
    language = dict(notebook.metadata.language_info)  # the kernel writes its version
    client.execute(env=dict(os.environ if env is None else env))
    notebook.metadata.language_info = language
    for cell in notebook.cells:
        cell.pop("execution_count", None)
        if cell.cell_type == "code":
            cell["execution_count"] = None
            # What libraries say of this machine is of no use to a reader.
            cell["outputs"] = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of sources; all if left out")
    parser.add_argument("--execute", action="store_true", help="keep outputs too")
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for source in sources():
        if given.names and source.stem not in given.names:
            continue
        notebook = make(source)
        if given.execute:
            execute(notebook)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
