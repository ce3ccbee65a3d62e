from qwhisper.data.faults import grouped


def test_faults_that_differ_in_places_names_and_numbers_are_one_line_the_most_frequent_first():
    sentences = ["d/t.jsonl:1: no `messages` list"]
    sentences += [f"d/t.jsonl:{n}: message {n}, part 2: audio file 'a{n}.wav' does not exist" for n in range(2, 9)]
    sentences += [f"d/t.jsonl:{n}: /data/my clips/{n}.wav: silent (peak {n}.0e-05) from 0 s" for n in range(9, 19)]
    sentences += [f"d/t.jsonl:{n}: id 'word{n}' was used before, at d/t.jsonl:1" for n in range(20, 25)]
    assert grouped(sentences) == [
        "d/t.jsonl:9, 10, 11 and 7 more: /data/my clips/9.wav: silent (peak 9.0e-05) from 0 s",
        "d/t.jsonl:2, 3, 4 and 4 more: message 2, part 2: audio file 'a2.wav' does not exist",
        "d/t.jsonl:20, 21, 22 and 2 more: id 'word20' was used before, at d/t.jsonl:1",
        "d/t.jsonl:1: no `messages` list",
    ]


def test_faults_about_different_words_stay_apart():
    sentences = [f"t.jsonl:{n}: unknown key '{key}'" for key in ("weight", "loss") for n in range(4)]
    assert [line.split(": ")[1] for line in grouped(sentences)] == ["unknown key 'weight'", "unknown key 'loss'"]


def test_three_equal_faults_have_a_line_each():
    sentences = [f"t.jsonl:{n}: the dialogue is empty" for n in range(3)]
    assert grouped(sentences) == sentences
