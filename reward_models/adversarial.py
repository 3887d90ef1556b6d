"""Adversarial reward: a head that learns to distinguish generated from reference images (arXiv:2511.20256)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from transformers import Dinov2Model

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import (
    Precision,
    from_pretrained,
    load_strictly,
    pick_device,
    pick_dtype,
)
from reward_models.shared.pictures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_media,
    check_references,
    finite_only,
    pictures,
    read_image,
    reference_paths,
)
from reward_models.shared.similarity import squashed

__all__ = ["Adversarial"]
WEIGHTS = ("model",)
PATHS = ("root", "references")

HIDDEN = 512


class Adversarial:
    """``share * head(c) + (1 - share) * mean head(p)``: the output of a trained discriminator head.

    ``c`` is the class token and ``p`` the patch tokens of a frozen DINOv2, each of length 1; the
    head is Linear-GELU-Linear, in fp32. During the run, :meth:`update` trains it towards at least 1
    for reference images and at most -1 for generated ones, by the hinge loss
    ``L(c) + patch_loss * L(p)`` with
    ``L = (mean relu(1 - head(real)) + mean relu(1 + head(generated))) / 2``. Scores have no fixed
    range (usually -2 to 2) and are comparable only within an iteration. Because the head keeps
    learning, it comes to penalise the artefacts that raise its score, which makes the reward hard
    to hack.

    Reference images are files: ``metadata["reference"]`` of each prompt, a path or a list from
    which one is drawn; or the folder ``references``, for all prompts.

    Differs from the released code: it trains on unnormalised tokens and scores normalised ones
    (here both are normalised); it scores 64 random patches (here all patches, so that scoring is
    deterministic); it resizes without antialiasing where it scores (``antialias = false``) and with
    it where it trains; it trains the head with Adam's betas 0.5 and 0.999 (``betas``); and it
    trains the head alone in iterations whose number, counted from 1, is no multiple of ``d_times``
    (10 or 20 in its configurations), and the policy alone in the others. ``policy_every = 10`` does
    the same. By default every iteration trains both, which needs a tenth of the images per update of
    the policy; ``steps`` gives the head several steps on the same images.

    ``layers`` names blocks of DINOv2, counted from 0, whose tokens each get a head of their own; the
    score is the mean over them, and ``top_share`` replaces the mean over patches by the mean over
    the patches with the highest outputs. Adv-GRPO's code has such a reward (blocks 2, 5, 8 and 11,
    or 8 alone, and a fifth of the patches). It adds a trained fusion of the layers and a sigmoid,
    neither of which is reproduced, because the code that trains them is not released.

    In each iteration the trainer scores all candidates with the head fixed, then calls
    ``update(media, prompts)`` once, on the scoring thread. It saves :meth:`state` in every
    checkpoint and passes it to :meth:`restore` on resume. With several processes all must make the
    same updates, so media and prompts are gathered first.

    Images are rounded to 8 bits and resized to ``side`` x ``side``, without keeping the aspect
    ratio, by Pillow's bicubic filter; one with NaN scores NaN and is left out of updates.
    """

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        key: str = "reference",
        root: str = "",
        references: str = "",
        side: int = 518,
        share: float = 0.7,
        patches: int = 64,
        patch_loss: float = 0.3,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999),
        antialias: bool = True,
        layers: Sequence[int] = (),
        top_share: float = 1.0,
        steps: int = 1,
        policy_every: int = 1,
        batch_size: int = 32,
        seed: int = 0,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model, key, root: As for the reward ``dino``.
            references: Folder of reference images for all prompts, instead of the metadata.
            side: Side of the model's input, a multiple of its patch size.
            share: Share of the class token in the score; the patches have the rest.
            patches: Patches drawn from each image in an update.
            patch_loss: Weight of the patches in the loss.
            lr, betas: Learning rate of the head, and Adam's decay rates of both moments.
            antialias: Whether images are resized with antialiasing, by Pillow's filter.
            layers: Blocks with a head each; empty for one head, after the final norm.
            top_share: Share of the patches, by their outputs, that count in the score.
            policy_every: Every so many iterations one trains the policy alone, and the others the
                head alone; 1 trains both in every iteration.
            steps, batch_size: Optimizer steps in an update; images in a pass of DINOv2.
            seed: Seed of the head's weights and of random draws.
            dtype, device: Of DINOv2; ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, there are no references, or weights are missing or
                left over.
            OSError: If there is no such model.
        """
        _check_options(
            patches, steps, policy_every, batch_size, lr, patch_loss, share, top_share, betas
        )
        self.key, self.root = key, Path(root)
        self.pool = _images_in(references) if references else []
        self.side, self.share, self.patches = side, share, patches
        self.patch_loss, self.steps, self.policy_every = patch_loss, steps, policy_every
        self.model = _dino(model, dtype, device)
        _check_model(side, layers, self.model.config)
        self.layers, self.top_share, self.antialias = list(layers), top_share, antialias
        self.batch_size = batch_size
        self.head = _new_heads(self.model.config.hidden_size, seed, len(layers))
        self.head.to(self.model.device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr, betas=(betas[0], betas[1]))
        self.random = torch.Generator().manual_seed(seed)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one names no reference, or one that is no file.
        """
        if not self.pool:
            check_references(prompts, self.key, self.root)

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        tokens = self._tokens(pictures(media))
        heads = self._outputs(tokens)
        patches = heads[..., 1:]
        if self.top_share < 1:
            number = max(1, int(patches.shape[-1] * self.top_share))
            patches = patches.topk(number, dim=-1).values
        scores = self.share * heads[..., 0] + (1 - self.share) * patches.mean(-1)
        return finite_only(scores.mean(1), media)

    def update(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> dict[str, float]:
        """Train the head on as many reference images as generated ones.

        Returns:
            ``loss`` and ``accuracy`` of the last step. The accuracy is the share of images that the
            sign at the class token classifies correctly, averaged over real and generated images.

        Raises:
            ValueError: If a prompt names no reference, or no image is finite.
            OSError: If a reference cannot be read.
        """
        check_media(media, prompts)
        rows = [i for i, finite in enumerate(media.isfinite().flatten(1).all(1).tolist()) if finite]
        if not rows:
            raise ValueError("an update needs images without NaN, got none")
        paths = [self._reference(prompts[i]) for i in rows]
        generated = self._tokens(pictures(media[rows]))
        real = self._tokens([read_image(path) for path in paths])
        measured = {}
        for _ in range(self.steps):
            said = [self._heads(tokens) for tokens in (real, generated)]
            loss = _hinge(said[0][..., 0], said[1][..., 0])
            loss = loss + self.patch_loss * _hinge(said[0][..., 1:], said[1][..., 1:])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            right = (said[0][..., 0] > 0).float().mean() + (said[1][..., 0] < 0).float().mean()
            measured = {"loss": loss.item(), "accuracy": right.item() / 2}
        return measured

    def trains(self, iteration: int) -> Literal["both", "reward", "policy"]:
        """What an iteration, counted from 0, trains: ``reward`` is the head."""
        if self.policy_every == 1:
            return "both"
        return "reward" if (iteration + 1) % self.policy_every else "policy"

    def state(self) -> dict[str, Tensor]:
        """Everything that updates change, copied to the CPU: head, optimizer, random state."""
        state = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        for number, kept in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{k}": v for k, v in kept.items()}
        state["random"] = self.random.get_state()
        return {k: v.detach().cpu().clone() for k, v in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the result of :meth:`state`.

        Raises:
            ValueError: If the state is of another head, or incomplete.
        """
        head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
        kept: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                kept.setdefault(int(number), {})[name] = tensor.clone()
        if "random" not in state or (kept and len(kept) != len(head)):
            raise ValueError("the state of the adversarial reward is incomplete")
        load_strictly(self.head, head, "the state", "adversarial head")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        self.random.set_state(state["random"].cpu())

    @torch.no_grad()
    def _tokens(self, images: Sequence[Image.Image]) -> Float[Tensor, "images layers tokens width"]:
        """The class token and the patches of each image, of length 1, in fp32."""
        size = (self.side, self.side)
        tokens = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            if self.antialias:
                seen = [TF.to_tensor(i.resize(size, Image.Resampling.BICUBIC)) for i in part]
                pixels = TF.normalize(torch.stack(seen), list(IMAGENET_MEAN), list(IMAGENET_STD))
            else:
                pixels = squashed(part, self.side, IMAGENET_MEAN, IMAGENET_STD, antialias=False)
            output = self.model(
                pixel_values=pixels.to(self.model.device, self.model.dtype),
                output_hidden_states=bool(self.layers),
            )
            # hidden_states[0] is the input of block 0.
            states = (
                [output.hidden_states[n + 1] for n in self.layers]
                if self.layers
                else [output.last_hidden_state]
            )
            tokens.append(F.normalize(torch.stack(states, 1).float(), dim=-1))
        return torch.cat(tokens)

    def _outputs(
        self, tokens: Float[Tensor, "images layers tokens width"]
    ) -> Float[Tensor, "images layers tokens"]:
        """The output of each layer's head for its tokens."""
        heads = self.head if isinstance(self.head, nn.ModuleList) else [self.head]
        return torch.stack([h(tokens[:, n]).squeeze(-1) for n, h in enumerate(heads)], 1)

    def _heads(
        self, tokens: Float[Tensor, "images layers tokens width"]
    ) -> Float[Tensor, "images layers class_and_patches"]:
        """Outputs of the heads for the class token and for random patches, the same in all layers."""
        images, layers, all_patches, width = tokens.shape
        all_patches -= 1
        number = min(self.patches, all_patches)
        drawn = torch.rand(images, all_patches, generator=self.random).argsort(1)[:, :number]
        places = drawn.to(tokens.device)[:, None, :, None].expand(-1, layers, -1, width)
        return self._outputs(torch.cat([tokens[:, :, :1], tokens[:, :, 1:].gather(2, places)], 2))

    def _reference(self, prompt: Prompt) -> Path:
        paths = self.pool or reference_paths(prompt, self.key, self.root)
        return paths[int(torch.randint(len(paths), (), generator=self.random))]


def _dino(model: str, dtype: Precision, device: str) -> Dinov2Model:
    """The frozen DINOv2."""
    unused = ("embeddings.mask_token",)
    loaded: Dinov2Model = from_pretrained(
        Dinov2Model, model, "DINOv2 model", pick_dtype(dtype), unused
    )
    return loaded.to(pick_device(device))


def _new_heads(width: int, seed: int, layers: int) -> nn.Module:
    """One head for the last block's tokens, or a list of one per layer."""
    if not layers:
        return _new_head(width, seed)
    return nn.ModuleList(_new_head(width, seed + n) for n in range(layers))


def _new_head(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def _hinge(real: Float[Tensor, "*any"], generated: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    return (F.relu(1 - real).mean() + F.relu(1 + generated).mean()) / 2


def _images_in(folder: str) -> list[Path]:
    """The images of a folder, in the order of their names."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise ValueError(f"references {folder!r} is no folder with images ({', '.join(kinds)})")
    return paths


def _check_options(
    patches: int,
    steps: int,
    policy_every: int,
    batch_size: int,
    lr: float,
    patch_loss: float,
    share: float,
    top_share: float,
    betas: Sequence[float],
) -> None:
    """Raise ValueError if one of these is out of range."""
    if min(patches, steps, policy_every, batch_size) < 1 or not (lr > 0 and patch_loss >= 0):
        raise ValueError(
            "patches, steps, policy_every and batch_size must be at least 1, lr positive and "
            f"patch_loss at least 0, got {patches}, {steps}, {policy_every}, {batch_size}, {lr}, "
            f"{patch_loss}"
        )
    if not 0 <= share <= 1 or not 0 < top_share <= 1:
        raise ValueError(
            f"share must be in [0, 1] and top_share in (0, 1], got {share}, {top_share}"
        )
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {[*betas]}")


def _check_model(side: int, layers: Sequence[int], config: Any) -> None:
    """Raise ValueError if the side or the layers do not fit the model."""
    if side % config.patch_size:
        raise ValueError(f"side must be a multiple of {config.patch_size}, got {side}")
    blocks = config.num_hidden_layers
    if len({*layers}) < len(layers) or any(not 0 <= n < blocks for n in layers):
        raise ValueError(
            f"layers must be different blocks of the model, 0 to {blocks - 1}, got {[*layers]}"
        )
