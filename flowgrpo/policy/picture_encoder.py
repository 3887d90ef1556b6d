"""Encodes pictures to final states of a pipeline's denoising loop, the inverse of its decoding.

Pipelines scale, shift, normalise and pack latents in ways of their own before their VAE decodes them, and
none has a method for the opposite direction. That part of a pipeline is observed in its own call: states
whose elements are 0, 1 and digits of their positions are decoded, and the VAE's input is recorded. It
must be a rearrangement of the state with a scale and a shift for each element, which can be inverted. A
pipeline where it is not is refused.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.loading import autoencoders

DIGIT = 16
"""Base of the digits in which positions are given: few enough to survive bfloat16."""
PROCESSORS = ("video_processor", "image_processor")
"""Where pipelines keep the object that prepares pictures for their VAE. In image-to-video pipelines
``image_processor`` can be that of an image encoder, which is of another class."""
TOLERANCE = 0.02
"""Largest relative difference between the VAE's input and its prediction; bfloat16 rounds by 0.004."""


@runtime_checkable
class Decoding(Protocol):
    """The part of a policy that encoding needs: its pipeline, and calls of it."""

    pipeline: DiffusionPipeline
    device: torch.device
    batch_size: int
    num_evaluations: int
    num_decodes: int
    sampling: Any
    last_grid: Any

    def run(
        self,
        prompts: Sequence[Prompt],
        noise: SampleNoise,
        *,
        nodes: Sequence[int],
        record: Sequence[int] = (),
        decode: bool,
    ) -> Iterator[Any]: ...

    def decode(
        self, prompts: Sequence[Prompt], x: Float[Tensor, "batch *latent"]
    ) -> Float[Tensor, "batch *media"]: ...


@dataclass(frozen=True)
class Layout:
    """How a pipeline makes the input of its VAE from the last state of its loop.

    Attributes:
        state: Shape of one sample's state.
        latent: Shape of one sample's input of the VAE.
        position: For each element of the VAE's input, its position in the flattened state.
        scale: Factor of each element; the VAE's input is ``scale * state[position] + shift``.
        shift: Summand of each element.
        height: Pixels of the decoded picture. Likewise ``width``.
    """

    state: torch.Size
    latent: torch.Size
    position: Tensor
    scale: Float[Tensor, " elements"]
    shift: Float[Tensor, " elements"]
    height: int
    width: int

    def states(self, latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *state"]:
        """The states that the pipeline decodes from these inputs of the VAE."""
        flat = latents.float().flatten(1)
        found = torch.empty_like(flat)
        device = flat.device
        scale, shift, position = (v.to(device) for v in (self.scale, self.shift, self.position))
        found[:, position] = (flat - shift) / scale
        return found.view(len(flat), *self.state)


class PictureEncoder:
    """Encodes pictures with the VAE of a policy's pipeline.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: Decoding):
        self.policy = policy
        self._layouts: dict[Hashable, Layout] = {}

    def encode(
        self, prompts: Sequence[Prompt], pictures: Sequence[Image.Image], streams: Sequence[Random]
    ) -> Float[Tensor, "batch *state"]:
        """The states of pictures, on the policy's device, in fp32.

        A picture is scaled and cropped at its centre to the size that the pipeline gives its prompt. Where
        the VAE has a posterior, a sample is drawn from it, as in pre-training.

        Args:
            prompts: The prompt of each picture; all of one size.
            pictures: As RGB.
            streams: A random stream for each posterior's sample.

        Raises:
            UnsupportedPipelineError: If it is not known how the pipeline's states follow from pictures.
        """
        layout, found = self.layout(prompts[0]), []
        size = self.policy.batch_size
        for start in range(0, len(pictures), size):
            part = slice(start, start + size)
            fitted = [fit(p, layout.height, layout.width) for p in pictures[part]]
            latents = self._latents(fitted, layout, streams[part])
            found.append(layout.states(latents).to(self.policy.device))
        self._use_own_grid(prompts[0])
        return torch.cat(found)

    def _use_own_grid(self, prompt: Prompt) -> None:
        """Set the scheduler's grid to that of the policy's own sampling at the size of a prompt.

        States are noised at nodes of this grid, and the last call may have been that of an evaluation with
        other steps. A call with an empty loop sets the grid.
        """
        policy = self.policy
        if policy.last_grid == (policy.sampling, prompt.size):
            return
        before = policy.num_evaluations
        noise = SampleNoise([Random(0).at("grid")])
        for _ in policy.run([prompt], noise, nodes=[0], decode=False):
            pass
        policy.num_evaluations = before

    def round_trip(self, prompt: Prompt, picture: Image.Image) -> float:
        """How well the pipeline decodes an encoded picture: the peak signal-to-noise ratio in dB."""
        layout = self.layout(prompt)
        fitted = fit(picture, layout.height, layout.width)
        state = self.encode([prompt], [fitted], [Random(0)])
        decoded = self.policy.decode([prompt], state).view(3, layout.height, layout.width)
        error = float((decoded - as_tensor(fitted)).square().mean())
        return -10 * torch.tensor(max(error, 1e-10)).log10().item()

    def layout(self, prompt: Prompt) -> Layout:
        """The layout of the states of a prompt's size; observed once for each size."""
        key = prompt.size, tuple(i.size for i in prompt.open_images())
        if key not in self._layouts:
            self._layouts[key] = self._observed(prompt)
        return self._layouts[key]

    def _observed(self, prompt: Prompt) -> Layout:
        policy, name = self.policy, type(self.policy.pipeline).__name__
        shape = self._state_shape(prompt)
        number = shape[1:].numel()
        media: list[Tensor] = []

        def seen(state: Tensor) -> Tensor:
            """The VAE's input, flattened, for a flattened state; fp32 on the CPU."""
            decoded, latents = spy.decoding(policy, prompt, state.view(shape).to(policy.device))
            media[:] = [decoded]
            return latents

        with _spied(policy.pipeline) as spy:
            shift = seen(torch.zeros(number)).flatten()
            if shift.numel() != number:
                raise UnsupportedPipelineError(
                    f"{name} cannot be trained on pictures: its VAE decodes {counted(shift.numel(), 'number')}, and the "
                    f"state of its loop has {number}"
                )
            scale = seen(torch.ones(number)).flatten() - shift
            if bool((scale == 0).any()):
                raise UnsupportedPipelineError(_not_invertible(name))
            position, place = torch.zeros(number, dtype=torch.long), 1
            while place < number:
                digits = (torch.arange(number) // place) % DIGIT
                read = ((seen(digits.float()).flatten() - shift) / scale).round().long()
                position += read * place
                place *= DIGIT
            if not torch.equal(position.sort().values, torch.arange(number)):
                raise UnsupportedPipelineError(_not_invertible(name))
            random = torch.randn(number, generator=torch.Generator().manual_seed(0))
            found = seen(random)
            expected = scale * random[position] + shift
        # The scale is known as exactly as the VAE's precision allows.
        error = (found.flatten() - expected).abs().max() / found.abs().max()
        if not error <= TOLERANCE:
            raise UnsupportedPipelineError(_not_invertible(name))
        return Layout(
            state=shape[1:],
            latent=found.shape[1:],
            position=position,
            scale=scale,
            shift=shift,
            **_size(media[0], name),
        )

    def _state_shape(self, prompt: Prompt) -> torch.Size:
        """The shape of the loop's state for one sample, from a step of the loop."""
        policy, before = self.policy, self.policy.num_evaluations
        noise = SampleNoise([Random(0)])
        (first,) = policy.run([prompt], noise, nodes=[0, 1], record=[0], decode=False)
        policy.num_evaluations = before
        return first.records[0].x.shape

    @torch.no_grad()
    def _latents(
        self, pictures: Sequence[Image.Image], layout: Layout, streams: Sequence[Random]
    ) -> Float[Tensor, "batch *latent"]:
        """The VAE's latents of pictures, before the pipeline's scaling and packing."""
        pipeline = self.policy.pipeline
        name = type(pipeline).__name__
        pixels = _pixels(pipeline, pictures).to(self.policy.device)
        if _decoder(pipeline) is None:
            return pixels.view(-1, *layout.latent)
        if len(layout.latent) == 4:
            pixels = pixels.unsqueeze(2)  # one frame
        vae = _decoder(pipeline)
        try:
            with _whole_precision(vae):
                output = vae.encode(pixels)
            latents = _sampled(output, streams)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedPipelineError(
                f"{name} cannot be trained on pictures: {type(vae).__name__} does not encode them ({error})"
            ) from error
        if latents.shape[1:] != layout.latent:
            raise UnsupportedPipelineError(
                f"{name} cannot be trained on pictures: {type(vae).__name__} encodes {layout.height} x "
                f"{layout.width} pixels to {tuple(latents.shape[1:])}, and decodes {tuple(layout.latent)}"
            )
        return latents.float()


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture of the given size: scaled until it covers it, then cropped at its centre."""
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def as_tensor(picture: Image.Image) -> Float[Tensor, "3 height width"]:
    """The pixels of a picture in [0, 1]."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


class _Spy:
    """Records the input of a VAE's ``decode``, which runs only the first time."""

    def __init__(self, decode: Callable[..., Any], name: str):
        self.decode, self.name = decode, name
        self.inputs: list[Tensor] = []
        self._output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else next(iter(kwargs.values()))
        self.inputs.append(latents.detach().float().cpu())
        if self._output is None:
            self._output = self.decode(*args, **kwargs)
        return self._output

    def decoding(self, policy: Decoding, prompt: Prompt, state: Tensor) -> tuple[Tensor, Tensor]:
        """The media and the VAE's input when a state is decoded."""
        self.inputs.clear()
        before = policy.num_decodes
        media = policy.decode([prompt], state)
        policy.num_decodes = before
        if len(self.inputs) != 1:
            raise UnsupportedPipelineError(
                f"{self.name} cannot be trained on pictures: it calls its VAE {len(self.inputs)} times for one "
                "picture"
            )
        return media, self.inputs[0]


class _NoDecoder(_Spy):
    """A pipeline without a VAE, whose state is the picture in [-1, 1]."""

    def decoding(self, policy: Decoding, prompt: Prompt, state: Tensor) -> tuple[Tensor, Tensor]:
        return policy.decode([prompt], state), state.detach().float().cpu()


@contextmanager
def _spied(pipeline: DiffusionPipeline) -> Iterator[_Spy]:
    """A pipeline whose VAE reports what it decodes."""
    name, vae = type(pipeline).__name__, _decoder(pipeline)
    if vae is None:
        yield _NoDecoder(lambda: None, name)
        return
    own = vae.__dict__.get("decode")
    spy = _Spy(vae.decode, name)

    # The parameters of the VAE's own method, which pipelines inspect.
    def decode(*args: Any, **kwargs: Any) -> Any:
        return spy(*args, **kwargs)

    decode.__signature__ = inspect.signature(vae.decode)  # type: ignore[attr-defined]
    vae.decode = decode
    try:
        yield spy
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own


def _decoder(pipeline: DiffusionPipeline) -> Any:
    """The model that decodes a pipeline's pictures; None in pixel space.

    Raises:
        UnsupportedPipelineError: If there are several, none of which is named ``vae``.
    """
    found = autoencoders(pipeline)
    if isinstance(named := getattr(pipeline, "vae", None), ModelMixin):
        return named
    if len(found) > 1:
        names = ", ".join(type(m).__name__ for m in found)
        raise UnsupportedPipelineError(
            f"{type(pipeline).__name__} cannot be trained on pictures: it has several decoders ({names})"
        )
    return found[0] if found else None


def _not_invertible(name: str) -> str:
    return (
        f"{name} cannot be trained on pictures: the input of its VAE is not a rearrangement of the last state "
        "with a scale and a shift, so it is not known which state belongs to a picture"
    )


def _size(media: Tensor, name: str) -> dict[str, int]:
    """The size of a decoded picture.

    Raises:
        UnsupportedPipelineError: If it is a video, or has other than three channels.
    """
    shape = media.shape[1:]
    if len(shape) == 4 and shape[0] > 1:
        raise UnsupportedPipelineError(
            f"{name} makes videos of {counted(shape[0], 'frame')}, and pictures have one: set sampling.num_frames = 1"
        )
    if shape[-3] != 3:
        raise UnsupportedPipelineError(
            f"{name} cannot be trained on pictures: it makes {shape[-3]} channels, and pictures have 3"
        )
    return {"height": shape[-2], "width": shape[-1]}


def _pixels(
    pipeline: DiffusionPipeline, pictures: Sequence[Image.Image]
) -> Float[Tensor, "batch 3 height width"]:
    """Pictures as the pipeline's own processor prepares them for its VAE.

    Raises:
        UnsupportedPipelineError: If the pipeline has none.
    """
    if _decoder(pipeline) is None:
        return torch.stack([as_tensor(p) for p in pictures]) * 2 - 1
    for name in PROCESSORS:
        processor = getattr(pipeline, name, None)
        if isinstance(processor, VaeImageProcessor):
            width, height = pictures[0].size
            prepared: Tensor = processor.preprocess(list(pictures), height=height, width=width)
            return prepared
    raise UnsupportedPipelineError(
        f"{type(pipeline).__name__} cannot be trained on pictures: it has no image processor, so it is not "
        "known which range of values its VAE takes"
    )


@contextmanager
def _whole_precision(vae: Any) -> Iterator[None]:
    """A VAE that overflows in half precision (``force_upcast``, as SDXL's) in fp32."""
    upcast = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def _sampled(output: Any, streams: Sequence[Random]) -> Tensor:
    """A sample of a VAE's posterior for each picture, or its latents if it has no posterior."""
    posterior = getattr(output, "latent_dist", None)
    if posterior is None:
        for name in ("latents", "latent"):
            if isinstance(latents := getattr(output, name, None), Tensor):
                return latents
        raise ValueError(f"it returns {type(output).__name__}")
    mean: Tensor = posterior.mean
    noise = [torch.randn(*mean.shape[1:], generator=s.generator("posterior")) for s in streams]
    spread: Tensor = posterior.std
    return mean.float() + spread.float() * torch.stack(noise).to(mean.device)
