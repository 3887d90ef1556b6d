"""Videos of a benchmark: MP4 files, and reward models as their judges."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from flowgrpo.bench.base import BenchError, Failure, Judged, Picture
from flowgrpo.bench.reward_judge import RewardJudge
from flowgrpo.core.tensors import Float, Tensor, torch

QUALITY = 12
"""Constant rate factor of x264: 0 is lossless, 18 is visually lossless."""


def _imageio() -> ModuleType:
    """The library that reads and writes MP4 files.

    Raises:
        BenchError: If it is not installed.
    """
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg  # noqa: F401  the plugin that imageio calls
    except ImportError as error:
        raise BenchError(
            f"MP4 files need imageio with FFmpeg ({error}): pip install 'flowgrpo[video]'"
        ) from error
    return imageio


def encode_mp4(video: Float[Tensor, "frames 3 height width"], fps: int) -> bytes:
    """Encode a video in [0, 1] as MP4 (H.264, yuv420p), which official scorers and browsers read.

    Raises:
        BenchError: If it cannot be encoded; H.264 needs an even height and width.
    """
    imageio = _imageio()
    frames = (video * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        try:
            imageio.imwrite(
                path,
                frames,
                plugin="FFMPEG",
                fps=fps,
                codec="libx264",
                pixelformat="yuv420p",
                macro_block_size=2,
                output_params=["-crf", str(QUALITY)],
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BenchError(
                f"a video of {tuple(video.shape)} cannot be encoded: {error}"
            ) from error
        return path.read_bytes()


def read_video(path: Path) -> Float[Tensor, "frames 3 height width"]:
    """All frames of a video file as RGB in [0, 1].

    Raises:
        BenchError: If it is missing, truncated or no video.
    """
    imageio = _imageio()
    try:
        frames = imageio.imread(path, plugin="FFMPEG")
    except (OSError, ValueError, RuntimeError, IndexError, StopIteration) as error:
        raise BenchError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float() / 255


class VideoRewardJudge(RewardJudge):
    """The scores of video rewards, one video at a time, because lengths and sizes may differ."""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """The scores of each video."""
        for picture in pictures:
            try:
                video = read_video(picture.path)
            except BenchError as error:
                yield picture, Failure(str(error))
                continue
            (outcome,) = self._scores(video[None], [picture])
            yield picture, outcome
