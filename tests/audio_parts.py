"""One sound in every form that a part of a message may have."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

RATE = 8000


def chirp(seconds: float) -> np.ndarray:
    """A rising tone, float32 [samples] at RATE, exact in 16 bits: no two stretches of it sound alike."""
    time = np.arange(round(seconds * RATE)) / RATE
    waveform = 0.5 * np.sin(2 * np.pi * (300 * time + 400 * time**2))
    return (np.round(waveform * 2**15) / 2**15).astype(np.float32)


def write_chirp(path: Path, seconds: float = 0.9) -> Path:
    soundfile.write(path, chirp(seconds), RATE, subtype="PCM_16")
    return path


def parts_of(path: Path) -> dict[str, Any]:
    """Name of a form to a part with the sound of `path`, a mono file of 16 bits."""
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    integers, rate = soundfile.read(path, dtype="int16")
    floats = soundfile.read(path, dtype="float32")[0]
    url, file_url = f"data:audio/wav;base64,{encoded}", path.as_uri()
    audio = {"type": "audio"}
    beside = audio | {"sampling_rate": rate}
    return {
        "transformers: audio": audio | {"audio": str(path)},
        "transformers: path": audio | {"path": str(path)},
        "transformers: url of a file": audio | {"url": file_url},
        "transformers: url with data": audio | {"url": url},
        "transformers: bare base64": audio | {"url": encoded},
        "transformers: base64": audio | {"base64": encoded},
        "transformers: array": beside | {"audio": floats},
        "pathlib": audio | {"audio": path},
        "OpenAI: input_audio": {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        "OpenAI: input_audio, no type": {"input_audio": {"data": encoded, "format": "wav"}},
        "Mistral: input_audio": {"type": "input_audio", "input_audio": encoded},
        "Qwen: input_audio with a data URL": {
            "type": "input_audio",
            "input_audio": {"data": f"data:;base64,{encoded}"},
        },
        "Qwen: input_audio with a path": {"type": "input_audio", "input_audio": str(path)},
        "Qwen2-Audio: audio_url": audio | {"audio_url": str(path)},
        "Qwen-Omni: data URL": audio | {"audio": url},
        "Qwen-Omni: file URL": audio | {"audio": f"file://{path}"},
        "DashScope: no type": {"audio": file_url},
        "vLLM: audio_url": {"type": "audio_url", "audio_url": {"url": url}},
        "vLLM: audio_url of a file": {"type": "audio_url", "audio_url": {"url": file_url}},
        "vLLM: audio_url, plain": {"type": "audio_url", "audio_url": url},
        "vLLM: pair": audio | {"audio": (floats, rate)},
        "Gradio: pair": audio | {"audio": (rate, integers)},
        "torchaudio: pair": audio | {"audio": (torch.from_numpy(floats)[None], rate)},
        "datasets: array": audio | {"audio": {"array": floats, "sampling_rate": rate, "path": "gone.wav"}},
        "datasets: list": audio | {"audio": {"array": floats.tolist(), "sampling_rate": rate}},
        "datasets: bytes": audio | {"audio": {"bytes": data, "path": "gone.wav"}},
        "datasets: path": audio | {"audio": {"bytes": None, "path": str(path)}},
        "datasets: None for what is not there": audio
        | {"audio": str(path), "text": None, "start": None, "channel": None},
        "pipeline: raw": audio | {"audio": {"raw": floats, "sampling_rate": rate}},
        "flat": beside | {"array": floats},
        "bytes": audio | {"audio": data},
        "BytesIO": audio | {"audio": io.BytesIO(data)},
        "int16": beside | {"audio": integers},
        "int32": beside | {"audio": integers.astype(np.int32) << 16},
        "float64": beside | {"audio": floats.astype(np.float64)},
        "list": beside | {"audio": floats.tolist()},
        "tuple": beside | {"audio": tuple(floats.tolist())},
        "tensor": beside | {"audio": torch.from_numpy(floats).requires_grad_()},
        "stereo": beside | {"audio": np.stack([floats, floats])},
        "column": beside | {"audio": floats[:, None]},
    }
