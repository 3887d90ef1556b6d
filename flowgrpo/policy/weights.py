"""The trained parameters: adapters or weights of the denoiser, or the distribution of the initial noise.

Also the reference policy and the exponential moving average of the parameters.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowgrpo.core.text import counted
from flowgrpo.core.transitions import Gaussian, Prediction, Step
from flowgrpo.data.experience import INITIAL
from flowgrpo.data.files import reached, save_tensors
from flowgrpo.policy.adapters import LayerStart
from flowgrpo.policy.native import compute_adapters_in_input_precision
from flowgrpo.policy.settings import Full, LoRA, Noise, Weights
from flowgrpo.policy.sharding import Sharder, exchanged, local, parts_of
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.policy.teachers import Layers, digest, teacher_values
from flowgrpo.policy.whole_teachers import Whole, exchanged_for

ATTENTION_PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
"""Names of attention projections in the models of diffusers."""
ADAPTER = "default"
"""Name of the trained adapter."""
PATTERN = "re:"
"""Prefix of LoRA targets that are regular expressions."""
NOISE_FILE = "initial_noise.safetensors"
MEAN, LOG_STD = "initial_noise.mean", "initial_noise.log_std"


class Trainable:
    """The trained weights of one or more denoisers.

    Attributes:
        denoisers: The trained models, by their names in the pipeline.
        weights: The settings.
        parameters: The trained parameters, by qualified names such as ``transformer.proj_out.weight``.
        is_sharded: Whether the parameters are divided among processes.
        teacher_digests: The SHA-256 of the values of each teacher, by its path.
    """

    def __init__(
        self,
        denoisers: Mapping[str, ModelMixin],
        weights: Weights,
        *,
        seed: int,
        with_reference: bool,
        start: Mapping[str, Mapping[str, LayerStart]] | None = None,
        shard: Sharder | None = None,
        native: bool = False,
        teachers: Mapping[str, Layers] | None = None,
        whole_teachers: Mapping[str, Whole] | None = None,
    ):
        """Prepare the denoisers in place: add adapters, or unfreeze parameters.

        Args:
            denoisers: The pipeline's denoisers, by their names there.
            weights: What to train.
            seed: Seed of the adapters' initial weights.
            with_reference: Whether :meth:`reference` will be used. Full fine-tuning then keeps a copy of
                the initial weights in main memory.
            start: The earlier adapter from which LoRA starts, by denoiser and layer; also the reference
                policy, of which a copy is kept, unless ``weights.reference`` is ``model``.
            shard: Divides the denoisers among processes, once they have their adapters.
            native: Whether the denoisers compute without autocast, so that adapters cast their weights.
            teachers, whole_teachers: Adapters and whole models that teach, by their paths, in main memory.

        Raises:
            ValueError: If LoRA targets match no layer, patterns match no parameter, a named denoiser
                does not exist, or a teacher does not fit.
        """
        if unknown := [m for m in weights.models if m not in denoisers]:
            raise ValueError(
                f"model.weights.models: there is no denoiser {unknown[0]!r}; the pipeline has "
                f"{', '.join(denoisers)}"
            )
        chosen = {k: m for k, m in denoisers.items() if not weights.models or k in weights.models}
        self.denoisers, self._all, self.weights, self._whole = chosen, denoisers, weights, whole_teachers or {}  # fmt: skip
        for model in denoisers.values():
            model.requires_grad_(False)
        for name, model in chosen.items():
            if isinstance(weights, LoRA):
                _add_adapter(model, weights, seed)
                _start_from(model, weights, (start or {}).get(name, {}))
                if native:
                    compute_adapters_in_input_precision(model, ADAPTER)
            else:
                _unfreeze(model, weights)
        taught = self._taught(teachers or {})
        if shard is not None:
            shard(denoisers)
        self.is_sharded = shard is not None
        self.parameters = _trained(chosen)
        self._teachers = {k: parts_of(v, list(self.parameters.values())) for k, v in taught.items()}
        copies = with_reference if isinstance(weights, Full) else bool(start) and weights.reference == "init"  # fmt: skip
        # In main memory: it is used only a few times per iteration.
        self._reference = (
            [local(p).cpu().clone() for p in self.parameters.values()] if copies else None
        )

    @property
    def reference_is_at_hand(self) -> bool:
        """Whether :meth:`reference` moves no weights: it disables adapters."""
        return isinstance(self.weights, LoRA) and self._reference is None

    def _taught(self, teachers: Mapping[str, Layers]) -> dict[str, list[Tensor]]:
        """The values of whole parameters for each teacher; also notes their digests."""
        own = _trained(self.denoisers)
        found = {
            path: teacher_values(path, layers, own, self.denoisers, self.weights)
            for path, layers in teachers.items()
        }
        every = found | {path: list(values.values()) for path, values in self._whole.items()}
        self.teacher_digests = {path: digest(values) for path, values in every.items()}
        return found

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the initial weights of the denoisers inside the context.

        Raises:
            RuntimeError: In full fine-tuning without ``with_reference``.
        """
        if self.reference_is_at_hand:
            for model in self.denoisers.values():
                model.disable_adapters()
            try:
                yield
            finally:
                for model in self.denoisers.values():
                    model.enable_adapters()
        else:
            if self._reference is None:
                raise RuntimeError(
                    "the policy was created without a reference policy; set with_reference=True"
                )
            own = list(self.parameters.values())
            copies = self._reference
            if not self.is_sharded:
                copies = [r.to(p.device) for r, p in zip(copies, own, strict=True)]
            with swapped(own, copies):
                yield

    @contextmanager
    def teacher(self, path: str) -> Iterator[None]:
        """Use the weights of a teacher inside the context, by the path of its adapter or model."""
        if path in self._whole:
            adapted = self.denoisers.values() if isinstance(self.weights, LoRA) else ()
            for model in adapted:
                model.disable_adapters()
            try:
                with swapped(*exchanged_for(self._whole[path], self._all)):
                    yield
            finally:
                for model in adapted:
                    model.enable_adapters()
            return
        own, values = list(self.parameters.values()), self._teachers[path]
        if not self.is_sharded:
            values = [v.to(p.device) for v, p in zip(values, own, strict=True)]
        with swapped(own, values):
            yield

    def replace_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these values of the trained parameters the reference policy.

        Args:
            tensors: By name; of divided parameters, divided alike.

        Raises:
            ValueError: If names or shapes differ from :attr:`parameters`.
        """
        require_same(self.parameters, tensors)
        self._reference = [local(tensors[name]).cpu().clone() for name in self.parameters]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters.

        Args:
            tensors: By name; of divided parameters, divided alike.

        Raises:
            ValueError: If names or shapes differ from :attr:`parameters`.
        """
        require_same(self.parameters, tensors)
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(tensors[name]))

    def scale(self, factor: float) -> None:
        """Scale the effect of training: 0 gives the model before training, 1 changes nothing.

        An adapter is multiplied by the factor, the one from which it started included. Weights become
        ``base + factor * (weights - base)``.

        Raises:
            RuntimeError: In full fine-tuning without ``with_reference``.
        """
        if isinstance(self.weights, Full) and self._reference is None:
            raise RuntimeError(
                "the policy was created without a reference policy; set with_reference=True"
            )
        with torch.no_grad():
            if isinstance(self.weights, LoRA):
                for name, parameter in self.parameters.items():
                    if ".lora_B." in name:
                        parameter.mul_(factor)
                return
            for parameter, base in zip(
                self.parameters.values(), self._reference or (), strict=True
            ):
                before = base.to(parameter)
                parameter.copy_(before + factor * (parameter - before))


class InitialNoise:
    """A trained distribution of the initial noise: independent normals, one per latent element.

    Every sample's initial state is drawn from it, for all prompts alike; the paper trains it for a
    single prompt. It begins as the standard normal, with exactly the pipeline's own images. The shape
    of the latents is known after :meth:`fit`; before, there are no parameters.

    Differs from the released code in training the logarithm of the standard deviation, which cannot
    become negative; the code clamps the standard deviation at 1e-4.

    Source: FIND, arXiv:2407.19453.

    Attributes:
        weights: The settings.
        parameters: ``mean`` and ``log_std``, both ``(1, *latent)`` in fp32.
    """

    def __init__(self, weights: Noise) -> None:
        self.weights = weights
        self.parameters: dict[str, nn.Parameter] = {}
        self._is_reference = False

    @property
    def shape(self) -> torch.Size | None:
        """Shape of one sample's latents; None before :meth:`fit`."""
        return self.parameters[MEAN].shape[1:] if self.parameters else None

    def fit(self, shape: Sequence[int], device: torch.device) -> None:
        """Begin as the standard normal of latents of the given shape of one sample."""
        self.parameters = {
            name: nn.Parameter(torch.zeros(1, *shape, device=device)) for name in (MEAN, LOG_STD)
        }

    def gaussian(self, scale: float = 1.0) -> Gaussian:
        """The distribution of one sample's initial state, ``(1, *latent)``.

        Args:
            scale: Standard deviation of the pipeline's own initial noise.
        """
        mean: Tensor = self.parameters[MEAN]
        log_std: Tensor = self.parameters[LOG_STD]
        if self._is_reference:
            mean, log_std = torch.zeros_like(mean), torch.zeros_like(log_std)
        return Gaussian(scale * mean, scale * log_std.exp())

    def record(self, number: int, scale: float) -> StepRecord:
        """The draw of ``number`` initial states as a step with the index INITIAL.

        The step has no state before it (zeros), and its prediction is the mean.
        """
        one = self.gaussian(scale)
        mean = one.mean.expand(number, *one.mean.shape[1:])
        gaussian = Gaussian(mean, one.std)
        nothing, interval = torch.zeros_like(mean), Step.flow(1.0, 1.0)
        return StepRecord(INITIAL, interval, nothing, mean, Prediction(mean, mean, mean), gaussian)

    @property
    def reference_is_at_hand(self) -> bool:
        """True: the standard normal is no copy of weights."""
        return True

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the standard normal inside the context."""
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters.

        Raises:
            ValueError: If names or shapes differ from :attr:`parameters`.
        """
        if not self.parameters and MEAN in tensors:
            self.fit(tensors[MEAN].shape[1:], tensors[MEAN].device)
        require_same(self.parameters, tensors)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def export(self, folder: Path) -> Path:
        """Write ``mean`` and ``std``, each of one sample's shape, as ``initial_noise.safetensors``.

        The pipeline's call takes ``latents = mean + std * torch.randn(batch, *mean.shape)``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            gaussian = self.gaussian()
            assert isinstance(gaussian.std, Tensor)
            tensors = {"mean": gaussian.mean[0], "std": gaussian.std[0]}
        reached("write", folder / NOISE_FILE)
        save_tensors(folder / NOISE_FILE, tensors)
        return folder


class EMA:
    """An exponential moving average of the trained parameters, on their device.

    Attributes:
        parameters: The trained parameters.
        decay: Largest decay.
        every: Optimizer steps between two moves of the average.
        updates: Number of optimizer steps so far.
        average: The averaged tensors, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, every: int = 1):
        self.parameters, self.decay, self.every = list(parameters), decay, every
        self.updates = 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step, set ``average = d * average + (1 - d) * parameter``.

        After step ``n`` (from 1) the decay ``d`` is ``min(decay, (1 + n) / (10 + n))``, and the average
        moves only where ``n + 1`` is a multiple of ``every``, as in Flow-GRPO.
        """
        self.updates += 1
        if (self.updates + 1) % self.every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, trained = map(local, self.average), map(local, self.parameters)
        torch._foreach_lerp_(list(average), list(trained), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged parameters inside the context; nothing is copied."""
        with swapped(self.parameters, self.average):
            yield


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """Let the parameters hold other tensors inside the context, by exchanging pointers.

    Divided parameters get the others' values (:func:`flowgrpo.policy.sharding.exchanged`).
    """
    if any(isinstance(p, DTensor) for p in parameters):
        with exchanged(parameters, others):
            yield
        return
    own = [p.data for p in parameters]
    try:
        for parameter, other in zip(parameters, others, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


def require_same(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that saved tensors belong to the parameters.

    Raises:
        ValueError: If names or shapes differ.
    """
    missing = sorted(parameters.keys() - tensors.keys())
    extra = sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        raise ValueError(
            f"the saved weights belong to another model or LoRA setting: missing {missing[:3]}, "
            f"unexpected {extra[:3]} ({len(missing)} and {len(extra)} in total)"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"weight {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )


def _trained(denoisers: Mapping[str, ModelMixin]) -> dict[str, nn.Parameter]:
    """The trained parameters of denoisers, by their qualified names."""
    return {
        f"{name}.{key}": p
        for name, model in denoisers.items()
        for key, p in model.named_parameters()
        if p.requires_grad
    }


def _add_adapter(model: ModelMixin, lora: LoRA, seed: int) -> None:
    """Add an adapter in fp32 to the targeted linear and convolutional layers."""
    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"diffusers has no adapters for {type(model).__name__}; set model.weights.kind = 'full'"
        )
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wanted = lora.targets or _default_targets(layers)
    matches = {w: [n for n in layers if _is_target(n, w)] for w in wanted}
    found = sorted({n for names in matches.values() for n in names})
    unknown = [w for w, names in matches.items() if not names]
    if not found or (lora.targets and unknown):
        ends = sorted(
            {
                ".".join(p for p in n.split(".")[-2:] if not p.isdigit() or n.endswith(p))
                for n in layers
            }
        )
        raise ValueError(
            f"the LoRA targets {unknown} match no linear layer of {type(model).__name__}; its layer "
            f"names end in: {', '.join(ends[:40])}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=found, init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _start_from(model: ModelMixin, lora: LoRA, start: Mapping[str, LayerStart]) -> None:
    """Let a new adapter have the effect of an earlier one.

    The earlier matrices are the first rows and columns of the new ones, whose other columns of ``B`` are
    zero, so that ``(alpha / rank) B A`` is the earlier product.

    Raises:
        ValueError: If the earlier adapter has a larger rank or other layers.
    """
    adapted = {n: m for n, m in model.named_modules() if ADAPTER in getattr(m, "lora_A", {})}
    more = sorted(start.keys() - adapted.keys())
    if more:
        raise ValueError(
            f"model.weights.init has {len(more)} of its {counted(len(start), 'layer')} outside of model.weights.targets, "
            f"such as {more[0]}; add them to the targets"
        )
    rank = max((len(layer.down) for layer in start.values()), default=0)
    if rank > lora.rank:
        raise ValueError(
            f"model.weights.init has rank {rank}; set model.weights.rank to at least {rank}, not {lora.rank}"
        )
    with torch.no_grad():
        for name, layer in start.items():
            down, up = (m[ADAPTER].weight for m in (adapted[name].lora_A, adapted[name].lora_B))
            own = len(layer.down)
            down[:own] = layer.down.to(down)
            up[:, :own] = layer.up.to(up) * (lora.rank / lora.alpha)


def _is_target(layer: str, target: str) -> bool:
    """Whether a layer has the target as its name, as the end of its name, or matches its pattern."""
    if target.startswith(PATTERN):
        return re.fullmatch(target.removeprefix(PATTERN), layer) is not None
    return layer == target or layer.endswith(f".{target}")


def _default_targets(layers: Sequence[str]) -> Sequence[str]:
    """The attention projections by diffusers' names; without any, all layers of attention modules."""
    usual = [w for w in ATTENTION_PROJECTIONS if any(n == w or n.endswith(f".{w}") for n in layers)]
    return usual or [n for n in layers if "attn" in n.lower() or "attention" in n.lower()]


def _unfreeze(model: ModelMixin, weights: Full) -> None:
    """Make all parameters trainable, or those that match a pattern, in fp32."""
    if not weights.parameters:
        model.float().requires_grad_(True)
        return
    named = dict(model.named_parameters())
    for pattern in weights.parameters:
        names = [n for n in named if re.fullmatch(pattern, n)]
        if not names:
            raise ValueError(
                f"model.weights.parameters: {pattern!r} matches no parameter of "
                f"{type(model).__name__}; it has {', '.join(sorted(named)[:20])}, ..."
            )
        for name in names:
            named[name].data = named[name].data.float()
            named[name].requires_grad_(True)
