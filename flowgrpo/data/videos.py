"""Video files: writing and reading MP4, with sound, by imageio and its ffmpeg."""

import subprocess
import tempfile
import wave
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.data.audio import Audio

SUFFIXES = (".mp4",)
"""Suffixes of video files that are read."""
FPS = 16.0
"""Frames per second if the pipeline's call names none, as in Wan's examples in diffusers."""
RATES = ("frame_rate", "fps")
"""Arguments of pipelines' calls that name the frames per second (LTX: ``frame_rate``)."""
QUALITY = 8
"""imageio's scale from 0 to 10. At 10 files are twice as large, and at 5, its default, flat colours show
blocks."""


def require_video() -> None:
    """Check that videos can be written and read.

    Raises:
        ImportError: With the command that installs what is missing.
    """
    missing = [p for p in ("imageio", "imageio_ffmpeg") if find_spec(p) is None]
    if missing:
        names = " and ".join(m.replace("_", "-") for m in missing)
        raise ImportError(f"videos are written as MP4, which needs {names}: pip install 'flowgrpo[video]'")  # fmt: skip


def frames_per_second(call: Mapping[str, Any]) -> float:
    """The frame rate that the arguments of a pipeline's call name, else :data:`FPS`."""
    named = [call[k] for k in RATES if isinstance(call.get(k), int | float)]
    return float(named[0]) if named else FPS


def write_video(
    path: Path,
    media: Float[Tensor, "frames 3 height width"],
    fps: float = FPS,
    audio: Audio | None = None,
) -> None:
    """Write a video in [0, 1] as MP4 (H.264, yuv420p, which browsers and phones play).

    An odd height or width is scaled up by one pixel, because yuv420p needs even ones. The compression
    is lossy, also that of sound (AAC).

    Args:
        path: The file.
        media: The frames.
        fps: Frames per second.
        audio: The sound of this one video.

    Raises:
        ImportError: If imageio or its ffmpeg is not installed.
    """
    pixels = media.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    frames = (f.permute(1, 2, 0).cpu().numpy() for f in pixels)
    if audio is None:
        write_frames(path, frames, fps)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sound.wav"
        _write_wave(file, audio)
        write_frames(path, frames, fps, file)


def write_frames(
    path: Path, frames: Iterable[Any], fps: float = FPS, sound: Path | None = None
) -> None:
    """Write ``(height, width, 3)`` arrays of bytes as MP4; see :func:`write_video`. The file is replaced atomically.

    Args:
        path: The file.
        frames: The frames.
        fps: Frames per second.
        sound: A WAV file of the sound.

    Raises:
        ImportError: If imageio or its ffmpeg is not installed.
    """
    require_video()
    import imageio

    unfinished = path.with_name(f".{path.name}.unfinished.mp4")
    with_sound = {"audio_path": str(sound), "audio_codec": "aac"} if sound else {}
    with imageio.get_writer(
        unfinished,
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=QUALITY,
        macro_block_size=2,
        **with_sound,
    ) as writer:
        for frame in frames:
            writer.append_data(frame)
    unfinished.replace(path)


def read_audio(path: Path) -> Audio | None:
    """The sound of a video file, at its own rate; None if it has none.

    Raises:
        ImportError: If imageio or its ffmpeg is not installed.
        ValueError: If the sound cannot be read.
    """
    require_video()
    import imageio_ffmpeg

    if "audio_codec" not in next(imageio_ffmpeg.read_frames(str(path))):
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sound.wav"
        ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path.absolute())]
        done = subprocess.run(
            [*ffmpeg, "-vn", "-c:a", "pcm_s16le", str(file)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode or not file.exists():
            reason = done.stderr.strip().splitlines()
            raise ValueError(f"the sound of {path} cannot be read: {reason[-1] if reason else 'ffmpeg failed'}")  # fmt: skip
        return _read_wave(file)


def _write_wave(path: Path, audio: Audio) -> None:
    """Write the sound of one sample as a WAV file of 16 bits."""
    (waveform,) = audio.waveform.detach().float().cpu()
    levels = waveform.clamp(-1, 1).mul(2**15 - 1).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(levels))
        file.setsampwidth(2)
        file.setframerate(audio.rate)
        file.writeframes(levels.T.contiguous().numpy().astype("<i2").tobytes())


def _read_wave(path: Path) -> Audio:
    """Read a WAV file of 16 bits as the sound of one sample."""
    import numpy as np

    with wave.open(str(path), "rb") as file:
        levels = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        channels, rate = file.getnchannels(), file.getframerate()
    waveform = torch.from_numpy(levels.astype(np.float32)).view(-1, channels).T / (2**15 - 1)
    return Audio(waveform.contiguous()[None], rate)


def read_video(path: Path) -> Float[Tensor, "frames 3 height width"]:
    """All frames of a video in [0, 1].

    Raises:
        ImportError: If imageio or its ffmpeg is not installed.
        ValueError: If the file is not a video.
    """
    require_video()
    import imageio
    import numpy as np

    try:
        with imageio.get_reader(path, format="FFMPEG") as reader:
            frames = [np.asarray(f) for f in reader]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} is not a video that can be read: {reason[-1] if reason else type(error).__name__}"
        ) from error
    if not frames:
        raise ValueError(f"{path} is not a video that can be read: it has no frames")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
