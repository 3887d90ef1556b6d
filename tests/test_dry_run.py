"""The dry run finds what the run would find: models, run directories, rewards, prompts, trackers."""

import importlib.util
import json
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import flowgrpo
from flowgrpo.cli import main
from flowgrpo.cli.train import _notes
from flowgrpo.config import ConfigError
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.memory.meta_pipeline import config_folder
from flowgrpo.policy import settings
from flowgrpo.policy.model_files import PUBLISHED, _answer, ask_hub, check_path, locate, require
from flowgrpo.rewards import loading
from flowgrpo.rewards.loading import check_installed, check_places
from flowgrpo.rewards.settings import Reward
from flowgrpo.training import run_folder, trackers
from flowgrpo.training.inputs import absent_weights, check_inputs, check_names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub and an empty cache."""
    _answer.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_plan_needs_no_optional_package(monkeypatch, capsys):
    """It names all that are not installed; a run refuses them before anything is loaded."""
    there, absent = importlib.util.find_spec, ("rapidocr", "bitsandbytes", "wandb")
    for module in (loading, settings, trackers):
        monkeypatch.setattr(module, "find_spec", lambda n: None if n in absent else there(n))
    monkeypatch.setattr("flowgrpo.memory.printing.print_estimate", lambda *_: None)
    given = [
        "--set=rewards=[{model='ocr'}]",
        "--set=train.optimizer=adamw8bit",
        "--set=run.trackers=['wandb']",
    ]
    assert main(["train", "quickstart_flow_grpo", "--dry-run", *given]) == 0
    said = capsys.readouterr().out
    assert "reward ocr  weight 1" in said
    (line,) = [n for n in said.split("\n") if n.startswith("before the run can start: ")]
    optimizer = "train.optimizer = 'adamw8bit' needs bitsandbytes: pip install 'flowgrpo[quant]'"
    assert line.removeprefix("before the run can start: ").split("; ") == [
        optimizer,
        "run.trackers[0]: 'wandb' is not installed: pip install 'flowgrpo[wandb]'",
        "rewards[0].model: reward 'ocr' needs rapidocr: pip install 'flowgrpo[ocr]'",
    ]
    assert main(["train", "quickstart_flow_grpo", *given]) == 1
    assert capsys.readouterr().err.startswith(f"flowgrpo: {optimizer}; run.trackers[0]: ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.path=./nowhere", "model.path: no such folder or file: ./nowhere"),
        ("model.path=a/b/c", "model.path: no such folder or file: a/b/c"),
        ("model.path=prompts", "model.path: prompts is not a diffusers pipeline: it has no model_"),
        ('run.trackers=["wandbb"]', "run.trackers[0]: unknown tracker 'wandbb'; did you mean 'wan"),
        ("rewards=[{model='no_such:R'}]", "rewards[0].model: 'no_such:R': there is no module 'no_"),
    ],
)
def test_what_is_missing_is_an_error_of_the_dry_run(setting, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["train", "quickstart_flow_grpo", "--dry-run", "--set", setting]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flowgrpo: {message}")
    assert len(error.splitlines()) == 1


def test_paths_and_ids_are_told_apart(tmp_path, offline):
    (tmp_path / "model_index.json").write_text("{}")
    assert check_path(str(tmp_path)) == tmp_path
    assert check_path("shapes") is None
    assert check_path("owner/name") is None
    assert locate(str(tmp_path)).is_here
    found = locate("owner/name")
    assert not found.is_here
    assert found.words.startswith("NOT HERE: it is not in the cache, and the hub cannot be asked (")
    assert "\n" not in found.words
    with pytest.raises(
        FileNotFoundError, match="a model is neither a file or folder here nor the id of a model"
    ):
        locate("a model")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has the model ``owner/name``, and fails for ``owner/busy``; an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].removeprefix("/api/models/")
            is_there = name == "owner/name"
            body = json.dumps({"id": "owner/name", "siblings": []} if is_there else {}).encode()
            self.send_response({"owner/name": 200, "owner/busy": 500}.get(name, 404))
            # The hub's answer for models that do not exist.
            self.send_header("X-Error-Code", "RepoNotFound" if "owner" not in name else "")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        _answer.cache_clear()
        yield
        _answer.cache_clear()
        server.shutdown()


def test_a_path_with_one_slash_is_not_taken_for_an_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    teacher = "loss={kind='distillation', teachers=[{path='%s', weights='model'}]}"
    for setting, key in (
        ("model.path=%s", "model.path"),
        ("model.weights={kind='lora', init='%s'}", "model.weights.init"),
        ("model.adapters=[{path='%s'}]", "model.adapters[0].path"),
        (teacher, "loss.teachers[0].path"),
    ):
        assert absent_weights(flowgrpo.load("quickstart_flow_grpo", [setting % "owner/name"])) == []
        config = flowgrpo.load("quickstart_flow_grpo", [setting % "runs/firt"])
        sentence = f"{key}: no such file or folder: runs/firt; did you mean 'runs/first'?; and on the hub there is no"
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            absent_weights(config)
    assert ask_hub("owner/busy") == "", "the download is tried, and says why it fails"
    reward = Reward(model="aesthetic", options={"head": "runs/firt"})
    check_installed("aesthetic")
    with pytest.raises(ValueError, match=r"r.head: no such file or folder: runs/firt; did"):
        check_places(reward, "r")
    check_places(replace(reward, options={"head": "owner/name"}), "r")
    for name, words in (("./head.pth", "no such file or folder"), ("~", "do not replace ~")):
        with pytest.raises(ValueError, match=rf"r.head: .*{words}"):
            check_places(replace(reward, options={"head": name}), "r")


def test_a_home_that_does_not_exist_is_an_error_about_its_key() -> None:
    config = flowgrpo.load("quickstart_flow_grpo", ["model.path=~nobody-of-this-name/model"])
    with pytest.raises(ConfigError, match=r"^model.path: Could not determine home directory"):
        check_inputs(config, 1)


def test_without_a_hub_a_name_may_be_an_id_also_beside_a_folder_of_its_owner(offline, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    reason = ask_hub("runs/firt")
    assert reason.startswith("it is not in the cache, and the hub cannot be asked (")
    assert reason.endswith("; did you mean 'runs/first'?")
    with pytest.raises(FileNotFoundError, match="r: runs/firt is no file or folder here; as an id"):
        require("runs/firt", "r")
    config = flowgrpo.load(
        "quickstart_flow_grpo", ["model.weights={kind='lora', init='owner/name-v1.5'}"]
    )
    (note,) = absent_weights(config)
    assert note.startswith("model.weights.init: owner/name-v1.5 is no file or folder here; as an id of the hub, it is not in the c")  # fmt: skip
    cached = tmp_path / "cache" / "models--owner--name-v1.5" / "snapshots" / "1" / "a.safetensors"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert absent_weights(config) == []
    assert locate("owner/name-v1.5").words.startswith("on the hub, or a part of it in the cache (")


FROM_HUB = {
    "Qwen/Qwen-Image-Edit", "Tongyi-MAI/Z-Image", "black-forest-labs/FLUX.2-klein-base-9B",
    "models/SkyReels-V1-Hunyuan-I2V",
}  # fmt: skip
"""Models of recipes whose sizes are not in the package; their memory is estimated with the hub."""


def test_every_model_of_the_recipes_has_its_sizes_in_the_package(offline):
    paths = {flowgrpo.load(str(f)).model.path for f in (ROOT / "configs").glob("*.toml")} - FROM_HUB
    for path in paths:
        folder = config_folder(path)
        index = json.loads((folder / "model_index.json").read_text())
        parts = [k for k, v in index.items() if isinstance(v, list) and v[0] and "token" not in k]
        assert all([*(folder / part).glob("*config.json")] for part in parts), path
    assert paths - {"shapes"} == {*PUBLISHED}


def test_the_run_directory_is_looked_at_and_left_alone(tmp_path):
    folder = tmp_path / "run"

    def config(*more):
        return flowgrpo.load("quickstart_flow_grpo", [f"run.folder={folder}", *more])

    assert run_folder.preview(config()) == "a new run"
    lock, _ = run_folder.claim(config(), 1, {})
    lock.release()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run_folder.preview(config("train.lr=1e-3")).startswith("starts again")
    (folder / "checkpoints" / "000003").mkdir(parents=True)
    (folder / "checkpoints" / "000003" / "state.json").write_text("{}")
    words = run_folder.preview(config("train.lr=1e-3"))
    assert words.startswith("resumes after 3 iterations, with train.lr ")
    assert words.endswith(" -> 0.001")
    with pytest.raises(
        ConfigError, match=r"belongs to another configuration: run\.seed is 0 there"
    ):
        run_folder.preview(config("run.seed=1"))
    run_folder.mark_finished(config())
    assert run_folder.preview(config()).startswith("finished: the run would do nothing")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in before} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty and not a run directory"):
        run_folder.preview(
            flowgrpo.load("quickstart_flow_grpo", [f"run.folder={tmp_path / 'other'}"])
        )


def test_prompts_are_looked_at(tiny, tmp_path):
    model = tiny("sd15")
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "a red cube " * 99, "negative_prompt": "blurry"}) + "\n"
    )
    prompts = PromptSet.load(tmp_path / "p.jsonl")
    settings = [f"model.path={model}", "sampling.guidance_scale=1.0"]
    notes = _notes(flowgrpo.load("quickstart_flow_grpo", settings), prompts, prompts)
    shared, training, held_out, cut, _ = notes
    assert "1 of 1 held-out prompt is a training prompt too" in shared
    assert training.startswith("WARNING: training prompts: 1 of 1 have a negative prompt, which")
    assert held_out.startswith("WARNING: held-out prompts: 1 of 1 have a negative prompt")
    assert "training prompts: 1 of 1 is longer than the " in cut
    # With guidance the negative prompt is used.
    guided = _notes(flowgrpo.load("quickstart_flow_grpo", [settings[0], "sampling.guidance_scale=4.0"]), prompts, prompts)  # fmt: skip
    assert len(guided) == 3


def test_a_video_needs_its_writer(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("flowgrpo.data.videos.find_spec", lambda n: None if n == "imageio" else there(n))  # fmt: skip
    config = flowgrpo.load("quickstart_flow_grpo", ["sampling.num_frames=5"])
    with pytest.raises(ConfigError, match=r"sampling.num_frames: videos are written as MP4, which"):
        check_names(config, 1)
