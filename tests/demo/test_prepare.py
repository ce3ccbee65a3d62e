import json

import pytest

from qwhisper.data.dialogue import read_dialogues
from qwhisper.demo.prepare import DemoSize, prepare
from qwhisper.model.qwen3_audio import build_from_bases


@pytest.mark.slow
def test_all_that_the_demo_needs_is_made_in_one_folder(tmp_path):
    counts = {"train_clips": 48, "eval_clips": 20, "train_dialogues": 34, "eval_dialogues": 17, "unseen_texts": 20}
    paths = prepare(tmp_path, 0, DemoSize(**counts, encoder_steps=3, lm_steps=3))

    train, true, swapped = (read_dialogues(path) for path in (paths.train_file, paths.eval_file, paths.swapped_file))
    assert (len(train), len(true), len(swapped)) == (34, 17, 17)
    assert len(list((tmp_path / "clips").glob("train-*.wav"))) == 48
    assert len(list((tmp_path / "clips").glob("eval-*.wav"))) == 20
    model, _ = build_from_bases(str(paths.audio_model), str(paths.text_model))
    assert model.config.audio_config.num_mel_bins == 80
    assert json.loads((tmp_path / "bases.json").read_text()) == paths.report
    assert paths.report.keys() == {"audio_model", "text_model"}
