"""Measures the scores of a shapes model on held-out prompts, by task and sampling setting.

    python -m benchmarks.shapes_model --model shapes

The last setting, 50 steps with guidance 5, is the default of the pipeline's own call.
"""

import argparse

from benchmarks.training_runs import percent
from flowgrpo.cli.common import quiet
from flowgrpo.config import find
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation.held_out import evaluate, plan
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.shapes.captions import TASKS
from flowgrpo.shapes.rewards import Diversity
from scripts.page_tables import markdown_table

SETTINGS = [(8, 1.0), (8, 3.0), (28, 1.0), (28, 3.0), (50, 5.0)]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help="number of settings to measure"
    )
    options = parser.parse_args()
    quiet()
    prompts = PromptSet.load(find("prompts/shapes_held_out.jsonl"), "tag")
    scorer = RewardScorer(
        [
            Reward(name="strict", model="flowgrpo.shapes.rewards:Strict"),
            Reward(name="graded", model="flowgrpo.shapes.rewards:Graded"),
        ]
    )
    rows = []
    policy = PipelinePolicy.from_pretrained(options.model, sampling=Sampling(), batch_size=240)
    for steps, guidance in SETTINGS[: options.settings]:
        sampling = Sampling(num_steps=steps, guidance_scale=guidance)
        result = evaluate(
            policy,
            scorer,
            plan(prompts, options.images),
            seed=0,
            sampling=sampling,
            balance="tag",
            metrics=[Diversity()],
        )
        tasks = [f"{100 * result['by_class'][t]['strict']:.0f}" for t in TASKS]
        rows.append(
            [
                str(steps),
                f"{guidance:g}",
                percent(result["scores"]["strict"], result["images"]),
                *tasks,
                f"{result['scores']['graded']:.3f}",
                f"{result['metrics']['diversity/color']:.2f}",
            ]
        )
    print(
        markdown_table(["steps", "guidance", "strict, %", *TASKS, "graded", "colour entropy"], rows)
    )
    scorer.close()


if __name__ == "__main__":
    main()
