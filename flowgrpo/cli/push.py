"""``flowgrpo push``."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowgrpo.core.secrets import redact

SUMMARY = "upload a finished run's weights to the Hugging Face hub, with a model card"
EXAMPLE = "flowgrpo push runs/quickstart me/shapes-tuned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory")
    parser.add_argument("repo_id", help="repository, as USER/NAME; created if it does not exist")
    parser.add_argument(
        "--bench",
        action="append",
        default=[],
        metavar="FOLDER",
        help="results of 'flowgrpo bench' about this run, for the card and its metadata; can be given "
        "again. Those of the run's own last evaluation are taken without it",
    )
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public (default: private)"
    )


def run(options: argparse.Namespace) -> int:
    """Upload the run and print the address of the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        bench = [Path(folder) for folder in options.bench]
        print(push_run(Path(options.run), options.repo_id, api, not options.public, bench))
    # The hub's client raises errors of its HTTP library, whose kind differs between versions.
    except Exception as error:
        if not is_from_the_hub(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"{options.repo_id} was not uploaded to {api.endpoint}: {reason[0]}. Check the network and "
            "'hf auth login', and run the command again"
        ) from error
    return 0


def is_from_the_hub(error: BaseException) -> bool:
    """Whether the hub's client or its HTTP library raised an error: no network, no token, no such user."""
    rooms = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    return bool(rooms & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"})


def push_run(
    run: Path, repo_id: str, api: Any, private: bool = True, bench: Sequence[Path] = ()
) -> str:
    """Upload a finished run's export with a model card, its grid and its configuration.

    Args:
        run: The run directory.
        repo_id: ``user/name`` on the hub; created if it does not exist.
        api: A ``huggingface_hub.HfApi``.
        private: Whether a new repository is private.
        bench: Folders with results of ``flowgrpo bench`` about the run, in addition to those of its
            own last evaluation.

    Returns:
        The address of the repository.

    Raises:
        BenchError: If a folder has no results, or they are about other weights.
        FileNotFoundError: If the run has no export, because it is not finished.
    """
    from flowgrpo.evaluation.card import GRID, model_card, newest_grid

    weights = run / "export"
    if not weights.is_dir() or not any(weights.iterdir()):
        raise FileNotFoundError(
            f"{run} has nothing to push: its export is written when it finishes"
        )
    results = benchmarks_of(run, bench)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        shutil.copytree(weights, folder)
        text = (run / "config.toml").read_text(encoding="utf-8")
        (folder / "config.toml").write_text(redact(text), encoding="utf-8")
        grid = newest_grid(run)
        if grid is not None:
            shutil.copyfile(grid, folder / GRID)
        model_card(run, repo_id, results).save(folder / "README.md")
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), commit_message=f"{run.name}, by flowgrpo"
        )
    return str(address)


def benchmarks_of(run: Path, more: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of benchmarks about the exported weights of a run.

    Args:
        run: The run directory.
        more: Folders besides those of the run's last evaluation.

    Raises:
        BenchError: If a folder has no results, or they are about other weights.
    """
    from flowgrpo.bench.base import BenchError
    from flowgrpo.bench.report import FILE, read_result
    from flowgrpo.training import checkpoints

    newest = checkpoints.newest(run / "checkpoints")
    own = sorted((run / "bench").glob(f"*/{newest.name}/{FILE}")) if newest is not None else []
    found = [read_result(file.parent) for file in own]
    for folder in more:
        result = read_result(folder)
        settings = (result["generation"] or {}).get("settings", {})
        if not _is_about(settings, run, newest):
            measured = settings.get("model", "images made elsewhere")
            raise BenchError(
                f"{folder} is about other weights than {run / 'export'} ({measured}): measure the run with "
                f"'flowgrpo bench {result['benchmark']} --model {run}'"
            )
        found.append(result)
    return found


def _is_about(settings: Mapping[str, Any], run: Path, newest: Path | None) -> bool:
    """Whether images were made with the weights that a run's export holds.

    These are the last ones; of a run that was stopped early, the best ones.
    """
    from flowgrpo.bench.files import sha256
    from flowgrpo.bench.models import identify_adapter
    from flowgrpo.policy.settings import Adapter
    from flowgrpo.training import checkpoints
    from flowgrpo.training.run_folder import early_stop

    adapters, stopped = settings.get("adapters", []), early_stop(run)
    if stopped is not None and not adapters and "run" in settings:
        best = run / "checkpoints" / stopped["checkpoint"] / checkpoints.STATE
        return bool(settings.get("checkpoint_sha256") == sha256(best))
    if not adapters and settings.get("run") == run.resolve().name and newest is not None:
        if "iteration" in settings:
            return bool(settings["iteration"] == int(newest.name))
        return bool(settings.get("checkpoint_sha256") == sha256(newest / checkpoints.STATE))
    if len(adapters) != 1 or "run" in settings or adapters[0]["scale"] != 1:
        return False
    export = identify_adapter(Adapter(str(run / "export")))
    return bool(adapters[0].get("sha256") == export.get("sha256"))
