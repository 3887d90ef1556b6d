"""flowgrpo from Python: load a model, draw, score, train, and use the result with diffusers alone."""

import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline

import flowgrpo
from flowgrpo import PipelinePolicy, Prompt, Random, SampleNoise, Sampling
from flowgrpo.shapes.rewards import Graded, Strict


def main(folder: Path) -> None:
    # A policy is a diffusers pipeline; "shapes" is the model in the package.
    sampling = Sampling(num_steps=8, guidance_scale=1.0)
    policy = PipelinePolicy.from_pretrained("shapes", sampling=sampling)

    # One random stream per image: the same images again whatever the batch size.
    triangle = {"tag": "colors", "include": [{"class": "triangle", "count": 1, "color": "red"}]}
    prompts = [Prompt("a photo of a red triangle", metadata=triangle)] * 4
    noise = SampleNoise([Random(seed=0).at("mine", i) for i in range(len(prompts))])
    images = policy.images(prompts, noise)
    print("images", tuple(images.shape), "in [0, 1]")

    # A reward is anything that takes media and prompts and returns one score per image.
    for reward in (Strict(), Graded()):
        print(type(reward).__name__, reward(images, prompts).tolist())

    # A configuration by name, with the settings that --set takes on the command line.
    config = flowgrpo.load(
        "quickstart",
        [
            "train.iterations=2",
            "train.groups=6",
            "algorithm.group_size=4",
            "evaluation.images=12",
            "evaluation.grid_prompts=2",
            f"run.folder={folder / 'run'}",
        ],
    )
    # A logger of your own gets every record of metrics.jsonl and evaluations.jsonl.
    result = flowgrpo.train(config, on_log=lambda name, record: print(name, record["reward"]))
    before, after = result.evaluations[0], result.evaluations[-1]
    print("held out before", before["scores"], "after", after["scores"])

    # One row per iteration, for instance for pandas.DataFrame, and one score per held-out image.
    print("rewards", [row["reward"] for row in result.metrics])
    print("held-out images", after["per_image"]["scores"]["graded"])

    # The export is a pipeline folder (or a LoRA adapter); nothing of flowgrpo is needed to use it.
    pipeline = DiffusionPipeline.from_pretrained(result.folder / "export")
    drawn = pipeline("a photo of a red triangle", num_inference_steps=8, guidance_scale=1.0)
    image = drawn.images[0]
    image.save(folder / "triangle.png")
    print("drawn with diffusers alone:", folder / "triangle.png", image.size)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
