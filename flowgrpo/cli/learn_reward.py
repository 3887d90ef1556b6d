"""``flowgrpo learn-reward``."""

import argparse
from pathlib import Path
from typing import Any

from flowgrpo.cli.common import UsageError, parse_setting
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json

SUMMARY = "fit a reward to the votes of people, over frozen features of pictures"
EXAMPLE = """\
flowgrpo learn-reward votes --features dino --out head.safetensors
  in the configuration of a run:
    [[rewards]]
    model = "vote_head"
    options = { file = "head.safetensors" }"""
FEATURES = ("thumbnail", "embedded", "dino", "siglip", "clip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("votes", nargs="+", help="folders of 'flowgrpo vote'")
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="dino",
        help="what the head sees of a picture; embedded is the autoencoder of the embedded model (default: %(default)s)",
    )
    parser.add_argument(
        "--feature-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the features, such as model=FOLDER; can be given again",
    )
    parser.add_argument("--voter", action="append", default=[], metavar="NAME", help="only this voter's votes; can be given again")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="for the division into folds (default: 0)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="write a head that is no better than chance")  # fmt: skip
    parser.add_argument("--out", required=True, help="file for the head (.safetensors)")


def run(options: argparse.Namespace) -> int:
    """Fit the head, print its held-out accuracy, and write it."""
    import numpy as np
    import torch
    from PIL import Image

    from flowgrpo.core.imports import import_path
    from flowgrpo.data.files import replacing, save_tensors
    from flowgrpo.data.votes import read_votes
    from flowgrpo.rewards.loading import found
    from flowgrpo.rewards.vote_fit import fit_votes, pooled_pairs

    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, got {options.out!r}")
    if options.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {options.seed}")
    settings = dict(parse_setting(s, "--feature-option") for s in options.feature_option)
    read = [read_votes(Path(v)) for v in options.votes]
    voters = list(dict.fromkeys(v.voter for _, votes in read for v in votes))
    absent = [v for v in options.voter if v not in voters]
    if absent:
        raise UsageError(f"--voter {absent[0]!r} has no votes (voters: {', '.join(voters)})")
    chosen = options.voter or voters
    read = [(ballot, [v for v in votes if v.voter in chosen]) for ballot, votes in read]
    voted, files = pooled_pairs(read)
    found("vote_head")  # loads the package of rewards from its own folder
    features = import_path("reward_models.shared.frozen_features:FrozenFeatures")(
        options.features, settings
    )
    probe = import_path("reward_models.shared.frozen_features:probe")()
    places = {f: i for i, f in enumerate(dict.fromkeys(f for both in files for f in both))}
    embedded = features([_opened(Image, f) for f in places]).numpy().astype(np.float64)
    first, second = (embedded[[places[both[k]] for both in files]] for k in (0, 1))
    fit = fit_votes(first, second, voted, seed=options.seed)
    line = (
        f"held-out accuracy {100 * fit.accuracy:.1f} % (95 % interval {100 * fit.low:.1f} to {100 * fit.high:.1f}) "
        f"on {counted(fit.pairs, 'pair')}, by {counted(len(chosen), 'voter')}; L2 penalty {fit.penalty:.2g}"
    )
    print(line)
    if fit.low <= 0.5 and not options.force:
        raise ValueError(
            "the head is no better than chance (its interval contains 50 %), and nothing was written: collect "
            "more votes, choose other --features, or write it anyway with --force"
        )
    tensors = {"weight": torch.from_numpy(fit.weight).float(), "mean": torch.from_numpy(fit.mean).float(), "probe": features([probe])[0]}  # fmt: skip
    notes: dict[str, Any] = {
        "kind": "flowgrpo-vote-head", "format": 1, "features": options.features, "options": strict_json.dumps(settings),
        "accuracy": f"{fit.accuracy:.4f}", "low": f"{fit.low:.4f}", "high": f"{fit.high:.4f}", "pairs": fit.pairs,
        "penalty": f"{fit.penalty:g}", "ballots": " ".join(b.digest for b, _ in read),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        save_tensors(temporary, tensors, {k: str(v) for k, v in notes.items()})
    print(out)
    return 0


def _opened(image: Any, file: Path) -> Any:
    with image.open(file) as picture:
        return picture.convert("RGB")
