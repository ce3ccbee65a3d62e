"""Sound in memory: arrays, base64 and data URLs become the bytes of an audio file, which the reader of files decodes.

So an array is resampled, mixed to mono and checked as a file with the same samples is. Knows no messages.
"""

import base64
import binascii
import hashlib
import io
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile

from qwhisper.data.audio import MAX_CHANNELS, SAMPLE_RATES

# Names of integer types are those of numpy; a file of these types is read at the same scale.
SUBTYPES = {"int16": "PCM_16", "int32": "PCM_32", "uint8": "PCM_16"}
MAX_ARRAY_BYTES = 2**32 - 2**16  # an AU file holds no more
URL_ALPHABET = str.maketrans("-_", "+/")  # base64's second alphabet, to the first
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*")
# How files begin: WAV, FLAC, Ogg, AIFF, AU, CAF, Matroska and WebM, MP3 with and without tags, AAC.
SIGNATURES: tuple[bytes, ...] = (
    b"RIFF",
    b"RF64",
    b"fLaC",
    b"OggS",
    b"FORM",
    b".snd",
    b"caff",
    b"\x1aE\xdf\xa3",
    b"ID3",
)
SIGNATURES += tuple(b"\xff" + bytes([second]) for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xF1, 0xF9))


@dataclass(frozen=True)
class Sound:
    """The bytes of an audio file in memory. Two are equal if their bytes are.

    name: its name in errors, as in "message 1, part 2, `audio`".
    """

    digest: str
    name: str = field(compare=False)
    data: bytes = field(compare=False, repr=False)


def sound_of_bytes(data: bytes | bytearray | memoryview, name: str) -> Sound:
    """data: a whole audio file. Raises ValueError if it is empty."""
    if not data:
        raise ValueError("is empty")
    data = bytes(data)
    return Sound(hashlib.blake2b(data, digest_size=16).hexdigest(), name, data)


def sound_of_base64(text: str, name: str) -> Sound:
    """text: a whole audio file in base64, of either alphabet, or a data URL of one. Raises ValueError otherwise."""
    if is_data_url(text):
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("is a data URL without `;base64,`; write data:audio/wav;base64,…")
    letters = "".join(text.split()).translate(URL_ALPHABET).rstrip("=")
    try:
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not the base64 of an audio file; encode it again") from None
    return sound_of_bytes(data, name)


def is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def is_base64(text: str) -> bool:
    """Whether a text that may be a path is the base64 of an audio file, which transformers takes without a prefix."""
    if not BASE64.fullmatch(text):
        return False
    letters = "".join(text[:64].split()).translate(URL_ALPHABET)[:16]
    head = base64.b64decode(letters[: len(letters) // 4 * 4])
    return head.startswith(SIGNATURES) or head[4:8] == b"ftyp"


def data_url(sound: Sound) -> str:
    """A data URL that `sound_of_base64` reads as the same sound."""
    return f"data:application/octet-stream;base64,{base64.b64encode(sound.data).decode()}"


def sound_of_array(samples: Any, rate: Any, name: str) -> Sound:
    """samples: a numpy array, a torch tensor, lists or tuples of numbers, or torchcodec's AudioDecoder (which has its
    own rate). rate: samples a second.

    Floats are taken as they are (full scale is 1), int16, int32 and uint8 at the scale that WAV files have them at.
    Of two dimensions the smaller one is the channels. Raises ValueError for other types and shapes. The values are not
    checked here: NaN and silence are found when the sound is read.
    """
    if hasattr(samples, "get_all_samples"):
        decoded = samples.get_all_samples()
        samples, rate = decoded.data, decoded.sample_rate
    array = _frames_and_channels(_as_numpy(samples))
    if array.shape[1] > MAX_CHANNELS:
        raise ValueError(f"has {array.shape[1]} channels (at most {MAX_CHANNELS})")
    subtype = SUBTYPES.get(array.dtype.name, "FLOAT")
    if array.dtype.name == "uint8":
        array = (array.astype(np.int16) - 128) << 8
    elif subtype == "FLOAT":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused as such
            array = array.astype(np.float32)
    if array.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"has {array.nbytes} bytes of samples; write it to a file and give its path")
    file = io.BytesIO()
    # As AU, since libsndfile writes the time into a WAV of floats: equal arrays would be different bytes.
    soundfile.write(file, array, whole_rate(rate), subtype=subtype, format="AU")
    return sound_of_bytes(file.getvalue(), name)


def whole_rate(rate: Any) -> int:
    """A sampling rate as an int. Raises ValueError for anything else."""
    low, high = SAMPLE_RATES
    rate = plain_scalar(rate)
    is_number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if not is_number or not low <= rate <= high or rate != int(rate):
        raise ValueError(f"has the sampling rate {str(rate)[:40]!s}; it must be a whole number of Hz, {low} to {high}")
    return int(rate)


def plain_scalar(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_array(value: object) -> bool:
    """Whether a value is samples rather than a name of a file or a dict: an array, a tensor, a list or a tuple."""
    if isinstance(value, list | tuple) or hasattr(value, "get_all_samples"):
        return True
    return hasattr(value, "__array__") and not _is_number(value)


def samples_and_rate(value: Any) -> tuple[Any, Any]:
    """(samples, rate or None) of samples, or of a pair of both in either order, as soundfile and Gradio give them."""
    if isinstance(value, list | tuple) and len(value) == 2:
        if is_array(value[0]) and _is_number(value[1]):
            return value[0], value[1]
        if _is_number(value[0]) and is_array(value[1]):
            return value[1], value[0]
    return value, None


def is_one_clip(value: list | tuple) -> bool:
    """Whether a list is one clip, samples or a pair of samples and rate, rather than several clips."""
    return bool(value) and (_is_number(value[0]) or samples_and_rate(value)[1] is not None)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0


def _as_numpy(samples: Any) -> np.ndarray:
    try:
        if hasattr(samples, "detach"):  # a tensor of torch, which may need a gradient, lie on a GPU or be bfloat16
            samples = samples.detach().cpu()
            samples = samples.float() if samples.is_floating_point() else samples
        array = np.asarray(samples)
    except ValueError:
        raise ValueError("is no array of numbers: its lists have different lengths or types") from None
    except Exception as error:  # of the library that the array comes from
        raise ValueError(f"is no array ({type(error).__name__}: {error})") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.float32)
    if array.dtype.kind != "f" and array.dtype.name not in SUBTYPES:
        known = "floats of full scale 1, int16, int32 or uint8"
        raise ValueError(f"has samples of type {array.dtype}, whose full scale is not known; give {known}")
    if array.dtype.name == "uint8" and array.ravel()[:4].tobytes() in SIGNATURES:
        raise ValueError("is an array of the bytes of a file, not of samples; give `bytes`")
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # soundfile ignores the byte order


def _frames_and_channels(array: np.ndarray) -> np.ndarray:
    """[samples] or two dimensions in either order as [samples, channels]."""
    if array.ndim == 1:
        return array[:, None]
    if array.ndim != 2 or array.shape[0] == array.shape[1]:
        raise ValueError(
            f"has the shape {list(array.shape)}; give [samples], [channels, samples] or [samples, channels]"
        )
    return array if array.shape[0] > array.shape[1] else array.T
