"""``flowgrpo export`` and ``flowgrpo push``."""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def export(options: argparse.Namespace) -> int:
    """``flowgrpo export``."""
    from flowgrpo.cli.commands import load_run, quiet
    from flowgrpo.policy import Full, InitialNoise
    from flowgrpo.policy import export as ways

    quiet()
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    policy, iteration = load_run(Path(options.run), options.weights)
    assert policy.trainable is not None
    pipeline, trainable = policy.stock_pipeline(), policy.trainable
    if isinstance(trainable, InitialNoise):
        if options.format not in (None, "diffusers"):
            raise ValueError(
                f"--format {options.format} is for weights; this run trained the initial noise, which "
                "is written without --format"
            )
        print(f"{trainable.export(out)} (noise, after {iteration} iterations)")
        return 0
    whole = isinstance(trainable.weights, Full)
    kind = options.format or ("merged" if whole else "diffusers")
    if kind == "kohya":
        place = ways.export_kohya(trainable, out)
    elif kind == "merged":
        place = ways.export_merged(pipeline, trainable, out)
    else:
        place = ways.export_diffusers(pipeline, trainable, out)
    print(f"{place} ({kind}, after {iteration} iterations)")
    return 0


def push(options: argparse.Namespace) -> int:
    """``flowgrpo push``."""
    from huggingface_hub import HfApi

    url = push_run(Path(options.run), options.repo_id, HfApi(), private=not options.public)
    print(url)
    return 0


def push_run(run: Path, repo_id: str, api: Any, private: bool = True) -> str:
    """Upload a finished run's export with a model card, its grid and its configuration.

    Args:
        run: The run directory.
        repo_id: ``user/name`` on the hub; made if it is not there.
        api: A ``huggingface_hub.HfApi``.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: If the run has no export, which it has when it is finished.
    """
    from flowgrpo.evaluation.card import GRID, model_card, newest_grid

    weights = run / "export"
    if not weights.is_dir() or not any(weights.iterdir()):
        raise FileNotFoundError(
            f"{run} has nothing to push: its export is written when it finishes"
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        shutil.copytree(weights, folder)
        shutil.copyfile(run / "config.toml", folder / "config.toml")
        grid = newest_grid(run)
        if grid is not None:
            shutil.copyfile(grid, folder / GRID)
        model_card(run, repo_id).save(folder / "README.md")
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), commit_message=f"{run.name}, by flowgrpo"
        )
    return str(address)
