"""The activations of a gradient from rewards through the decoder and the last denoising steps.

All parts of the graph are alive at once: the steps, the VAE and the rewards. The pipeline makes the call
that :mod:`flowgrpo.policy.media_replay` makes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from flowgrpo.memory.backward import backward, roots_of
from flowgrpo.memory.links import enter
from flowgrpo.memory.tracer import Activations, Tracer, fake_buffers, fake_parameters
from flowgrpo.policy.placement import split_decode

Scores = Callable[[Tensor], Sequence[Tensor]]
"""Differentiable scores of media, ``(batch,)`` each; several if media are scored for several texts."""


class MediaTracer(Tracer):
    """A tracer whose training step ends with scores of decoded media."""

    _scores: Scores
    _rewards: Sequence[str] = ()

    def score_with(self, scores: Scores, models: Mapping[str, nn.Module]) -> None:
        """Set what is differentiated.

        Args:
            scores: Called with media on the device, under fake tensors.
            models: The models that it calls, by names of their own, with parameters on the meta device.
        """
        self._scores, self._rewards = scores, list(models)
        for name, model in models.items():
            self._parameters += fake_parameters(model, self._mode, self.device)
            self._buffers[name] = fake_buffers(model, self._mode, self.device)
            self._parameters += [fake for *_, fake in self._buffers[name]]

    def media_training(
        self, arguments: Mapping[str, Any], steps: int, batch: int = 1
    ) -> Activations:
        """Take the last steps with gradients, decode, score and backpropagate.

        From the second on, every step adds the same: its saved tensors. So two are traced at most.

        Args:
            arguments: Of the pipeline's call.
            steps: Steps at the end of the grid that are differentiated.
            batch: Samples in the batch.

        Returns:
            The activations without and with gradient checkpointing.
        """
        measure = functools.partial(self._media_pass, arguments)
        saved, peak = _extended(measure, steps)
        with self._recomputing() as is_possible:
            if not is_possible:
                return Activations(saved, peak - saved, None)
            whole = measure(1)[1]
            _, checkpointed = _extended(measure, steps, {1: (0, whole)})
        decoder = 0
        if batch > 1:
            with self._recomputing(decode_batch=1):
                # One sample's part less than the whole decoder, of which there are `batch`.
                decoder = round(max(0, whole - measure(1)[1]) * batch / (batch - 1))
        return Activations(saved, peak - saved, checkpointed, decoder)

    def _media_pass(self, arguments: Mapping[str, Any], steps: int) -> tuple[int, int]:
        """Bytes saved by the forward passes, and most bytes alive until the backward pass ends."""
        end = int(arguments["num_inference_steps"])
        self._training = counter = self._counter()
        self._linked = True
        try:
            # The counter is on between the models as well, for the pipeline's own arithmetic.
            with counter:
                output = self._run(arguments, "pt", range(end - steps, end + 1))
                roots = roots_of(self._scored(output[0]))
                del output
            saved = counter.live
            with ExitStack() as stack:
                names = [*(name for name, _ in self._outputs), *self._rewards]
                for name in dict.fromkeys(names):
                    stack.enter_context(self._fake(name, counter, autocast=False))
                backward(roots)
            return saved, counter.peak
        finally:
            self._training, self._linked = None, False
            self._outputs.clear()

    def _scored(self, media: Tensor) -> Sequence[Tensor]:
        assert self._training is not None
        with ExitStack() as stack:
            for name in self._rewards or [next(iter(self.denoisers))]:
                stack.enter_context(self._fake(name, self._training, autocast=False))
            # Rewards check the range of their input.
            self._values.guesses = True
            try:
                return self._scores(enter(media.float(), self.device))
            finally:
                self._values.guesses = False

    @contextmanager
    def _recomputing(self, decode_batch: int = 0) -> Iterator[bool]:
        """Inside, blocks are recomputed as with ``memory.gradient_checkpointing``; false if that is not possible.

        Args:
            decode_batch: Latents that are decoded at a time; 0 for all.
        """
        found = [
            m for m in self.denoisers.values() if getattr(m, "_supports_gradient_checkpointing", 0)
        ]
        for model in found:
            model.enable_gradient_checkpointing(self._checkpoint)
        vae: Any = self.models.get("vae")
        before = None if vae is None else self._recompute_decoder(vae, decode_batch)
        try:
            yield bool(found)
        finally:
            for model in found:
                model.disable_gradient_checkpointing()
            if vae is not None:
                vae.decode = before
                if getattr(vae, "_supports_gradient_checkpointing", False):
                    vae.disable_gradient_checkpointing()

    def _recompute_decoder(self, vae: Any, size: int) -> Callable[..., Any]:
        """Recompute each decode, and its blocks, as a policy does. Returns the method before."""
        if getattr(vae, "_supports_gradient_checkpointing", False):
            vae.enable_gradient_checkpointing(self._exactly_recomputed)
            vae.encoder.gradient_checkpointing = False
        before: Any = vae.decode
        inner = before.__wrapped__

        @functools.wraps(inner)
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return self._recomputed(nullcontext, inner, args, kwargs)

        vae.decode = self._wrap_method("vae", split_decode(recomputed, size) if size else recomputed)  # fmt: skip
        return before

    def _exactly_recomputed(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing of a block of the VAE, which computes without autocast."""
        return self._recomputed(nullcontext, module, args, kwargs)


def _extended(
    measure: Callable[[int], tuple[int, int]],
    steps: int,
    known: Mapping[int, tuple[int, int]] | None = None,
) -> tuple[int, int]:
    """Measurements for a number of steps, from those of one and of two.

    Args:
        measure: Measures a number of steps.
        steps: The number.
        known: Measurements by their number.
    """
    known = known or {}
    if steps <= 2:
        return known.get(steps) or measure(steps)
    one, two = (known.get(n) or measure(n) for n in (1, 2))
    saved, peak = (b + (steps - 2) * (b - a) for a, b in zip(one, two, strict=True))
    return saved, peak
