"""Pre-trains the embedded model: an autoencoder, then a text-to-image flow on corrupted captions.

    python -m scripts.pretrain_shapes --out my-model

The script draws its own data and saves its state every few hundred steps; the same command resumes it.
A share of the words in the captions is replaced by wrong ones, so that the model draws well but follows
prompts badly, which leaves something for reinforcement learning to improve.
"""

import argparse
import copy
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import CogView4Pipeline
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrpo.core.imports import import_path
from flowgrpo.data import strict_json
from flowgrpo.shapes.architecture import CAPTION_TOKENS, build_pipeline, build_tokenizer
from flowgrpo.shapes.captions import TASKS, Record, all_records, corrupt, scene_for
from flowgrpo.shapes.world import BACKGROUND, IMAGE_SIZE, SHAPES, WORLD, World, draw, place
from flowgrpo.training.cpu import prepare_cpu

TASK_SHARES = (0.06, 0.18, 0.2, 0.12, 0.2, 0.24)
"""Share of scenes of each task. Two colours on two shapes take longest to learn."""

console = Console(quiet=int(os.environ.get("RANK", "0")) > 0)


@dataclass(frozen=True)
class Recipe:
    """All settings that change the result."""

    seed: int = 0
    latent_channels: int = 4
    autoencoder_steps: int = 3500
    autoencoder_batch: int = 32
    autoencoder_lr: float = 2e-3
    kl_weight: float = 1e-4
    scenes: int = 40_000
    denoiser_steps: int = 5000
    denoiser_batch: int = 128
    denoiser_lr: float = 1e-3
    caption_dropout: float = 0.1
    caption_noise: float = 0.2
    ema_decay: float = 0.999


class Stage:
    """Training of some modules: AdamW with a cosine schedule, a moving average, and a saved state."""

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        folder: Path,
        lr: float,
        steps: int,
        decay: float,
    ):
        self.name, self.modules, self.steps, self.decay, self.lr = name, modules, steps, decay, lr
        self.ema = {k: copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99)
        )
        self.file = folder / f"{name}.safetensors"
        self.step = self._restore()

    def update(self, loss: Tensor) -> None:
        """Take one optimizer step on a loss, and update the moving average."""
        warm = min(1.0, (self.step + 1) / 200)
        cosine = 0.5 * (1 + np.cos(np.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm * (0.02 + 0.98 * cosine)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, module in self.modules.items():
                for slow, fast in zip(
                    self.ema[name].parameters(), module.parameters(), strict=True
                ):
                    slow.lerp_(fast, weight)

    def save(self) -> None:
        """Save the state. The file is replaced atomically."""
        if not is_main():
            return
        tensors = {"step": torch.tensor(self.step)}
        for name, module in self.modules.items():
            tensors |= {f"live.{name}.{k}": v for k, v in module.state_dict().items()}
            tensors |= {f"ema.{name}.{k}": v for k, v in self.ema[name].state_dict().items()}
        for i, p in enumerate(self.parameters):
            tensors |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state[p].items()}
        temporary = self.file.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(self.file)

    def _restore(self) -> int:
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        for name, module in self.modules.items():
            for kind, target in (("live", module), ("ema", self.ema[name])):
                prefix = f"{kind}.{name}."
                target.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                )
        for i, p in enumerate(self.parameters):
            prefix = f"adam.{i}."
            self.optimizer.state[p] = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }
        return int(tensors["step"])


def is_main() -> bool:
    """Whether this process writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes of ``torchrun``, if there are any."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        parts = flat.div_(dist.get_world_size()).split(
            [p.numel() for p in parameters if p.grad is not None]
        )
        for parameter, part in zip(
            [p for p in parameters if p.grad is not None], parts, strict=True
        ):
            parameter.grad = part.view_as(parameter)


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Convert uint8 images ``(H, W, 3)`` to the autoencoder's input ``(B, 3, H, W)`` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def focus(pixels: Tensor) -> Tensor:
    """Loss weights ``(B, 1, H, W)``: 4 on the shapes and their edges, 1 on the background."""
    ground = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    shape = ((pixels - ground).abs().amax(1, keepdim=True) > 0.1).float()
    return 1 + 3 * F.max_pool2d(shape, 5, stride=1, padding=2)


def train_autoencoder(
    pipeline: CogView4Pipeline, recipe: Recipe, folder: Path, world: World
) -> None:
    """Fit the autoencoder to random scenes with an L1 loss, weighted towards the shapes."""
    vae = pipeline.vae.train().to(memory_format=torch.channels_last)
    stage = Stage(
        "autoencoder", {"vae": vae}, folder, recipe.autoencoder_lr, recipe.autoencoder_steps, 0.99
    )
    todo = range(stage.step, recipe.autoencoder_steps)
    for step in track(todo, "autoencoder", console=console):
        rng = np.random.default_rng((recipe.seed, 1, step))
        images = []
        for _ in range(recipe.autoencoder_batch):
            number = int(rng.integers(1, 5))
            images.append(
                draw(
                    place(
                        list(rng.choice(SHAPES, number)),
                        list(rng.choice(list(world.colors), number)),
                        rng,
                        world=world,
                    ),
                    world=world,
                )
            )
        pixels = to_pixels(images).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - pixels).abs()
        weighted = (error + error.square()) * focus(pixels)
        loss = weighted.mean() + recipe.kl_weight * posterior.kl().mean() / 64
        stage.update(loss)
        if stage.step % 250 == 0 or stage.step == recipe.autoencoder_steps:
            stage.save()
            console.print(
                f"autoencoder step {stage.step} loss {loss.item():.4f} l1 {error.mean().item():.4f}"
            )
    vae.load_state_dict(stage.ema["vae"].state_dict())
    vae.eval()


def encode_scenes(
    pipeline: CogView4Pipeline, recipe: Recipe, folder: Path, world: World
) -> tuple[Tensor, list[Record]]:
    """Latents ``(N, C, h, w)`` of captioned scenes, scaled to unit variance, and their records.

    The latents are stored in ``folder``, so that a resumed run does not encode them again.
    """
    rng = np.random.default_rng((recipe.seed, 2))
    tasks = {task: all_records(task, world) for task in TASKS}
    names = rng.choice(TASKS, recipe.scenes, p=TASK_SHARES)
    records = [tasks[str(name)][int(rng.integers(len(tasks[str(name)])))] for name in names]
    file = folder / "latents.safetensors"
    if not file.exists() and is_main():
        encoded = []
        for start in track(range(0, recipe.scenes, 250), "scenes", console=console):
            some = records[start : start + 250]
            images = [draw(scene_for(r, rng, world), world=world) for r in some]
            with torch.no_grad():
                encoded.append(pipeline.vae.encode(to_pixels(images)).latent_dist.mean.contiguous())
        save_file({"latents": torch.cat(encoded)}, file)
    if dist.is_initialized():
        dist.barrier()
    latents = load_file(file)["latents"]
    scale = round(float(1 / latents.std()), 4)
    pipeline.vae.register_to_config(scaling_factor=scale)
    return latents * scale, records


def caption_ids(pipeline: CogView4Pipeline, captions: list[str]) -> Tensor:
    """Token ids ``(B, 16)``, padded on the left as the pipeline does."""
    ids = pipeline.tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
    )
    return ids.input_ids


def adopt_words(pipeline: CogView4Pipeline, world: World) -> None:
    """Give a pipeline the words of another world.

    Known words keep their embeddings. A new colour has that of the known colour in its place until it is
    trained further, and other new words the mean of all.
    """
    known = pipeline.tokenizer.get_vocab()
    pipeline.tokenizer = build_tokenizer(world)
    former = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    old_colors = [c for c in WORLD.colors if c in known]
    stands_for = dict(zip(world.colors, old_colors, strict=False))
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for word, index in pipeline.tokenizer.get_vocab().items():
            source = known.get(word, known.get(stands_for.get(word, "")))
            weight[index] = former.mean(0) if source is None else former[source]


def train_denoiser(pipeline: CogView4Pipeline, recipe: Recipe, folder: Path, world: World) -> None:
    """Train the denoiser by rectified flow (arXiv:2209.03003) on scenes with corrupted captions."""
    latents, records = encode_scenes(pipeline, recipe, folder, world)
    modules = {
        "transformer": pipeline.transformer.train(),
        "text_encoder": pipeline.text_encoder.train(),
    }
    stage = Stage(
        "denoiser", modules, folder, recipe.denoiser_lr, recipe.denoiser_steps, recipe.ema_decay
    )
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch = recipe.denoiser_batch // ranks
    size = torch.full((batch, 2), float(IMAGE_SIZE))
    began = time.time()
    for step in track(range(stage.step, recipe.denoiser_steps), "denoiser", console=console):
        rng = np.random.default_rng((recipe.seed, 3, step, rank))
        rows = rng.integers(len(records), size=batch)
        captions = [corrupt(records[i]["prompt"], recipe.caption_noise, rng, world) for i in rows]
        captions = ["" if rng.random() < recipe.caption_dropout else c for c in captions]
        x0 = latents[torch.from_numpy(rows)]
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        # Times are stratified, because the loss depends on the time much more than on the scene.
        t = (torch.arange(batch) + torch.from_numpy(rng.random(batch, dtype=np.float32))) / batch
        mix = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = pipeline.text_encoder(
                caption_ids(pipeline, captions), output_hidden_states=True
            ).hidden_states[-2]
            velocity = pipeline.transformer(
                hidden_states=(1 - mix) * x0 + mix * noise,
                encoder_hidden_states=hidden,
                timestep=1000 * t,
                original_size=size,
                target_size=size,
                crop_coords=torch.zeros_like(size),
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - x0)
        stage.update(loss)
        if stage.step % 250 == 0 or stage.step == recipe.denoiser_steps:
            stage.save()
            console.print(
                f"denoiser step {stage.step} loss {loss.item():.4f} {time.time() - began:.0f} s"
            )
    for name, module in modules.items():
        module.load_state_dict(stage.ema[name].state_dict())
        module.eval()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pretrain_shapes", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pipeline and the training state"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads for torch (default: %(default)s)"
    )
    parser.add_argument(
        "--pipeline",
        help="pipeline to continue from; its autoencoder is kept unless --autoencoder-steps is given",
    )
    parser.add_argument(
        "--world",
        type=import_path,
        default="flowgrpo.shapes.world:WORLD",
        help="import path of what the pictures show (default: %(default)s)",
    )
    for name, value in asdict(Recipe()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=None if name == "autoencoder_steps" else value,
            help=f"default: {value}",
        )
    options = vars(parser.parse_args())
    out, threads, start, world = (
        options.pop(name) for name in ("out", "threads", "pipeline", "world")
    )
    if options["autoencoder_steps"] is None:
        options["autoencoder_steps"] = 0 if start else Recipe.autoencoder_steps
    prepare_cpu(threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    recipe = Recipe(**options)
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(strict_json.dumps(asdict(recipe), indent=2) + "\n")
    if start is None:
        pipeline = build_pipeline(recipe.latent_channels, recipe.seed, world)
    else:
        pipeline = CogView4Pipeline.from_pretrained(start)
        adopt_words(pipeline, world)
    if recipe.autoencoder_steps:
        train_autoencoder(pipeline, recipe, state, world)
    train_denoiser(pipeline, recipe, state, world)
    if is_main():
        pipeline.save_pretrained(out / "pipeline")
        console.print(f"saved {out / 'pipeline'}")


if __name__ == "__main__":
    main()
