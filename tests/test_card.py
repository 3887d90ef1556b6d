"""The model card of a run, line by line."""

import pytest

import flowgrpo
from flowgrpo.evaluation.card import model_card, newest_grid
from tests.test_report import evaluation

SETTINGS = [
    "model={path='stabilityai/stable-diffusion-3.5-medium', weights={kind='lora'}}",
    "rewards=[{model='jpeg_size', weight=0.5, options={goal='small'}}, {model='ocr', name='text', weight=0}]",
]


@pytest.fixture
def card(tmp_path):
    """Makes the lines of a card, from settings on top of a run's."""

    def make(*settings, evaluations=2, repo="me/darker", benchmarks=()):
        config = flowgrpo.load(
            "quickstart_flow_grpo", [*SETTINGS, *settings, f"run.folder={tmp_path}"]
        )
        flowgrpo.config.save(config, tmp_path / "config.toml")
        lines = [
            evaluation(0, graded=0.5),
            evaluation(4, graded=0.1),
            evaluation(8, images=300, graded=0.7),
        ]
        lines = lines if evaluations > 1 else lines[:1]
        (tmp_path / "evaluations.jsonl").write_text("".join(f"{flowgrpo.evaluation.records.json.dumps(x)}\n" for x in lines))  # fmt: skip
        return str(model_card(tmp_path, repo, benchmarks)).splitlines()

    return make


def test_the_card_of_an_adapter(card, tmp_path):
    (tmp_path / "export" / "transformer_2").mkdir(parents=True)
    (tmp_path / "export" / "comfyui").mkdir()
    (tmp_path / "export" / "comfyui" / "b.safetensors").touch()
    lines = card()
    head = lines[1 : lines.index("---", 1)]
    assert head == [
        "base_model: stabilityai/stable-diffusion-3.5-medium", "library_name: diffusers", "license: other",
        "license_name: stabilityai-ai-community", "pipeline_tag: text-to-image", "tags:", "- flowgrpo",
        "- reinforcement-learning", "- lora",
    ]  # fmt: skip
    assert "# darker" in lines
    assert "`stabilityai/stable-diffusion-3.5-medium`, fine-tuned with reinforcement learning by flowgrpo (flow_grpo, lora, 8 iterations)." in lines  # fmt: skip
    assert "Licence of the base model: stabilityai-ai-community. It also applies to these weights." in lines  # fmt: skip
    assert any("400 images before, 300 after" in line for line in lines)
    table = [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines if line.startswith("|")]
    assert table == [
        "| prompts | score | before | after | change | |",
        "|---|---|---|---|---|---|",
        "| all | graded (points) | 50.0 | 70.0 | +20.0 ± 3.6 | rose |",
        "| counting | graded (points) | 50.0 | 70.0 | +20.0 ± 5.1 | rose |",
        "| colors | graded (points) | 50.0 | 70.0 | +20.0 ± 5.1 | rose |",
    ]
    start = lines.index("```python")
    assert lines[start + 1 : lines.index("```", start)] == [
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")',
        'pipe.load_lora_weights("me/darker", weight_name="pytorch_lora_weights.safetensors")',
        'pipe.transformer_2.load_lora_adapter("me/darker", prefix=None, subfolder="transformer_2", weight_name="pytorch_lora_weights.safetensors")',
        "# For ComfyUI: comfyui/b.safetensors",
    ]  # fmt: skip
    assert "- training: 161 prompts (`shapes_train.jsonl`)" in lines
    assert "- jpeg_size: weight 0.5 (`jpeg_size`, with {'goal': 'small'})" in lines
    assert "- text: not trained on (`ocr`)" in lines
    assert not any("grid.png" in line or "Benchmarks" in line for line in lines)
    assert newest_grid(tmp_path) is None
    (tmp_path / "grids").mkdir()
    for name in ("000000.png", "000008.png", "base.png"):
        (tmp_path / "grids" / name).touch()
    assert newest_grid(tmp_path) == tmp_path / "grids" / "000008.png"
    assert "![Base and tuned model, same prompts and same noise](grid.png)" in card()
    with pytest.raises(
        ValueError, match="has 1 held-out evaluation; a model card needs one before"
    ):
        card(evaluations=1)


def test_the_card_of_other_weights_and_models(card, tmp_path):
    local = tmp_path / "model"
    local.mkdir()
    lines = card(
        f"model.path={local}", "model.weights={kind='full'}", "sampling.num_frames=9", "prompts.held_out=away.jsonl"
    )  # fmt: skip
    assert 'pipe = DiffusionPipeline.from_pretrained("me/darker")' in lines
    assert not any(line.startswith(("base_model", "license", "pipe.")) for line in lines)
    assert "pipeline_tag: text-to-video" in lines
    assert f"The licence of `{local}` is unknown to flowgrpo; it also applies to these weights." in lines  # fmt: skip
    assert "- held out: prompts of a file that no longer exists (`away.jsonl`)" in lines
    lines = card(
        "model.weights={kind='noise'}", "model.revision=abc", "model.variant=fp16",
        "model.adapters=[{path='some/style.safetensors', scale=0.5}]", repo="alone",
    )  # fmt: skip
    start = lines.index("```python")
    assert lines[start + 6 : lines.index("```", start)] == [
        'pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", revision="abc", variant="fp16")',
        'pipe.load_lora_weights("style.safetensors")',
        "pipe.fuse_lora(lora_scale=0.5)",
        "pipe.unload_lora_weights()",
        'noise = load_file(hf_hub_download("alone", "initial_noise.safetensors"))',
        'latents = noise["mean"] + noise["std"] * torch.randn(1, *noise["mean"].shape)',
        'pipe("...", latents=latents)',
    ]  # fmt: skip
    assert "# alone" in lines
    assert "license: apache-2.0" in card("model.path=shapes")
    file = tmp_path / "sdxl.safetensors"
    file.touch()
    lines = card(f"model.path={file}")
    assert 'pipe = PipelineClass.from_single_file("sdxl.safetensors")' in lines


def test_benchmarks_of_a_card(card):
    metrics = [
        {"name": "overall", "value": 0.51234, "low": 0.4, "high": 0.6, "headline": True},
        {"name": "exact", "value": 1.0, "low": None, "high": None, "headline": True},
        {"name": "absent", "value": None, "low": None, "high": None, "headline": True},
        {"name": "part", "value": 0.5, "low": 0.4, "high": 0.6, "headline": False},
    ]
    index = [{"name": "x", "results": [{"task": {"type": "text-to-image"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "overall", "value": 0.5}]}]}]  # fmt: skip
    result = {"title": "GenEval", "metrics": metrics, "counts": {"judged": 40}, "warnings": ["few images"], "model_index": index}  # fmt: skip
    lines = card(benchmarks=[result])
    start = lines.index("## Benchmarks")
    assert lines[start + 2 : start + 8] == [
        "| benchmark (judge) | result | value | 95 % interval | images |",
        "|---|---|---|---|---|",
        "| GenEval | overall | 0.5123 | 0.4 to 0.6 | 40 |",
        "| GenEval | exact | 1 | – | 40 |",
        "",
        "- GenEval: few images",
    ]
    assert "model-index:" in lines
    assert "- name: darker" in lines
