"""Sharing a small network on the Hugging Face hub: its files, with a model card made from the run's figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from amc_env import files
from amc_env.errors import UserError, first_line
from search.output.export import FORMATS
from search.output.formatting import comparison
from search.output.run_result import RunResult

LIBRARY = "amc-netadapt"
CARD = "README.md"

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Pruned from `{{ network }}` with {{ library }}, on {{ data }}.

{{ figures }}

`load_pruned` downloads the files; for the other ways: `hf download {{ repository }} --local-dir {{ repository }}`.

{{ loading }}

The channels that each layer keeps are in `channels.json`, the pruning ratios in `strategy.json`, all figures in
`result.json`.

    {{ command }}
"""


def card_of(result: RunResult, repository: str) -> str:
    """The model card, as README.md holds it: figures before and after, how to load the network, the command."""
    ways = [FORMATS[export.format] for export in result.exports if not export.error]
    loading = "\n\n".join(
        f"{way.title}:\n\n```python\n{way.load_snippet.replace('RUN_FOLDER', repository)}\n```"
        for way in ways
    )
    card = ModelCard.from_template(
        ModelCardData(library_name=LIBRARY, tags=["pruning"], metrics=[result.metric]),
        template_str=_TEMPLATE,
        title=repository.rpartition("/")[2],
        repository=repository,
        network=result.model,
        library=LIBRARY,
        data=result.data,
        figures=_figures(result),
        loading=loading,
        command=result.command,
    )
    return str(card)


def _figures(result: RunResult) -> str:
    table = comparison(result)
    rows = [
        [title, *(f"{cell.text} {cell.relative}".strip() for cell in cells)]
        for title, cells in table.rows.items()
    ]
    lines = [["", *table.stages], ["---"] * (len(table.stages) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def upload(folder: Path, repository: str, *, private: bool, token: str | None) -> str:
    """Puts all files of a folder into a repository, which is made where it is missing.

    Returns:
        The address of the commit.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    with _hub(repository):
        api = HfApi(token=token, library_name=LIBRARY)
        made = api.create_repo(repository, private=private, exist_ok=True)
        return str(
            api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Pruned network")
        )


def download(repository: str) -> Path:
    """The folder of a repository's files, in the hub's cache.

    Raises:
        UserError: There is no such repository, or the hub cannot be reached.
    """
    with _hub(repository):
        return Path(snapshot_download(repository, library_name=LIBRARY))


def write_card(folder: Path, result: RunResult, repository: str) -> None:
    """Writes the card into a folder that is to be uploaded."""
    files.write(folder / CARD, card_of(result, repository))


@contextmanager
def _hub(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub's client, of its transport and of the file system
        raise UserError(
            f"{repository} on the hub: {first_line(error)}; the name is user/name, and private repositories and uploads need "
            "a token (hf auth login, or HF_TOKEN)",
            code="unreachable",
            field="repository",
        ) from error
