"""How much silence around a clip Whisper's encoder wants at true length: the measurement behind the two defaults.

    python benchmarks/silence.py --audio_model DIR --data DIR

For each lead and tail silence: the cosine between the encoder's frames over the speech and those of the same clip
padded to 30 s, as Whisper was trained; and a linear probe (softmax regression on the mean of what the projector would
be given and of four equal parts of it). The probe is trained on all speakers but one and tested on that one, each left
out in turn. One JSON line a setting.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from common import append_result, recordings

from qwhisper.data.audio import load_audio
from qwhisper.data.windows import clip_windows
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic, encoder_frames
from qwhisper.model.audio_layout import encoder_layout
from qwhisper.model.loading import load_encoder
from qwhisper.model.mel import packed_log_mel

LEADS, TAILS = (0.0, 0.25, 0.5, 1.0), (0.0, 0.5, 1.0, 2.0, 4.0)
PARTS = 4


def encode(encoder, clips: list, lead: float, tail: float) -> list[torch.Tensor]:
    """The projector's input for each clip, [frames, d_model]."""
    frames = FrameArithmetic(lead_silence_s=lead, tail_silence_s=tail)
    spoken = []
    for start in range(0, len(clips), 25):
        windows = [clip_windows(clip, frames)[0] for clip in clips[start : start + 25]]
        waveforms = torch.cat([torch.from_numpy(window) for window in windows])
        mel, lengths = packed_log_mel(waveforms, [len(w) for w in windows], encoder.num_mel_bins)
        hidden = encoder(mel, encoder_layout(lengths)).last_hidden_state.split([encoder_frames(n) for n in lengths])
        spoken += [h[frames.kept_frames(len(h))] for h in hidden]
    return spoken


def pooled(frames: torch.Tensor) -> torch.Tensor:
    """Mean over all frames and over each of four equal parts, [5 * d_model]."""
    parts = torch.nn.functional.adaptive_avg_pool1d(frames.T[None], PARTS)[0].T
    return torch.cat([frames.mean(0), parts.flatten()])


def probe(features: torch.Tensor, labels: torch.Tensor, speakers: list[str]) -> dict[str, float]:
    """Accuracy on each speaker of a softmax regression that was trained on the others."""
    accuracy = {}
    for speaker in sorted(set(speakers)):
        held_out = torch.tensor([s == speaker for s in speakers])
        mean, std = features[~held_out].mean(0), features[~held_out].std(0) + 1e-5
        x = (features - mean) / std
        weight = softmax_regression(x[~held_out], labels[~held_out])
        accuracy[speaker] = float(((x[held_out] @ weight).argmax(1) == labels[held_out]).float().mean())
    return accuracy


def softmax_regression(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights [features, 10] that fit x [clips, features] to its labels, with a little weight decay."""
    weight = torch.zeros(x.shape[1], 10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight, labels) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio_model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--takes", type=int, default=10, help="recordings of each digit by each speaker")
    args = parser.parse_args()
    generator = random.Random(0)
    chosen = [
        (speaker, digit, path)
        for speaker, digits in recordings(args.data).items()
        for digit, files in digits.items()
        for path in generator.sample(files, args.takes)
    ]
    clips = [load_audio(path) for _, _, path in chosen]
    labels = torch.tensor([digit for _, digit, _ in chosen])
    encoder = load_encoder(args.audio_model, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        padded = encode(encoder, clips[::8], 0.0, 29.0 - max(len(c) for c in clips) / SAMPLE_RATE)
    for lead in LEADS:
        for tail in TAILS:
            began = time.perf_counter()
            with torch.no_grad():
                hidden = encode(encoder, clips, lead, tail)
            cosines = [torch.cosine_similarity(a, b[: len(a)]).mean() for a, b in zip(hidden[::8], padded, strict=True)]
            accuracy = probe(torch.stack([pooled(h) for h in hidden]), labels, [speaker for speaker, _, _ in chosen])
            scores = {"probe_mean": sum(accuracy.values()) / len(accuracy), "probe_worst": min(accuracy.values())}
            result = {"lead_s": lead, "tail_s": tail, "cosine_to_30_s": float(torch.stack(cosines).mean())} | scores
            rounded = {k: round(v, 4) for k, v in result.items()}
            which = {"audio_model": Path(args.audio_model).name, "clips": len(clips)}
            append_result("silence", rounded | which | {"seconds": round(time.perf_counter() - began, 1)})


if __name__ == "__main__":
    main()
