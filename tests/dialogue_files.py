"""Files of dialogues for the check, beside a clip that is sound and one that is silent."""

import json
import shutil

import numpy as np
import pytest
import soundfile


def record(clip, reply="One.", text="Which digit?"):
    content = [{"type": "audio", "audio": clip}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def write(tmp_path, recordings):
    shutil.copy(recordings[1], tmp_path / "a.wav")
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)

    def write_records(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return path

    return write_records
