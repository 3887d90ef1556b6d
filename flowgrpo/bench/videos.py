"""Videos of a benchmark: MP4 files, and reward models as their judges."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from flowgrpo.bench.base import BenchError, Failure, Judged, Picture
from flowgrpo.bench.reward_judge import RewardJudge
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.videos import read_video, write_video


def encode_mp4(video: Float[Tensor, "frames 3 height width"], fps: int) -> bytes:
    """Encode a video in [0, 1] as MP4, as :func:`flowgrpo.data.videos.write_video` does.

    Raises:
        BenchError: If it cannot be encoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        try:
            write_video(path, video, float(fps))
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise BenchError(
                f"a video of {tuple(video.shape)} cannot be encoded: {error}"
            ) from error
        return path.read_bytes()


class VideoRewardJudge(RewardJudge):
    """The scores of video rewards, one video at a time, because lengths and sizes may differ."""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """The scores of each video."""
        for picture in pictures:
            try:
                video = read_video(picture.path)
            except (ImportError, ValueError) as error:
                yield picture, Failure(str(error))
                continue
            (outcome,) = self._scores(video[None], [picture])
            yield picture, outcome
