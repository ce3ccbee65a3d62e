"""Assistant: answers messages with a checkpoint, for one conversation or many, at once or as a stream.

assistant = Assistant.from_pretrained("run")
messages = [{"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]}]
print(assistant.answer(messages).text)
"""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.messages import Message
from qwhisper.data.rows import Sample
from qwhisper.errors import DataError, UsageError
from qwhisper.infer.batches import answer_batches, naming_the_prompt
from qwhisper.infer.context import context_length, within_context
from qwhisper.infer.decoding import Answer, AnswerText, Chooser, Reader, Request, fetch_tokens, never_written
from qwhisper.infer.reuse import PromptTokens, Reading, ReadingCache
from qwhisper.memory import is_out_of_memory
from qwhisper.model.loading import options_as_trained
from qwhisper.model.processor import Qwen3AudioProcessor, encoder_of, load_processor
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration, load_trained
from qwhisper.versions import check_versions

CACHE_BYTES = 2**30  # 9000 tokens of Qwen3-1.7B in bf16
AT_ONCE = 256  # conversations; their audio is in memory together

Messages = Sequence[Message | dict]


class Assistant:
    """A model, and the encoder that makes its prompts as in training.

    It keeps the keys and values of the last conversations, so that a next turn computes only what is new. Meanwhile the
    weights must not change: call `forget` before and after you change them or switch the adapter off.

    Methods that answer take the fields of `Request` as keywords (max_new_tokens, temperature, top_p, stop, seed), and
    messages in the canonical form or in transformers': text, and audio as paths, bytes, base64 or arrays. They raise
    DataError for messages that can't be read, BadClipError for a clip that can't be used, UsageError for an invalid
    request, MemoryLimitError if one prompt does not fit into memory, NumericalError for logits that are no numbers.
    """

    def __init__(
        self, model: Qwen3AudioForConditionalGeneration, encoder: DialogueEncoder, *, cache_bytes: int = CACHE_BYTES
    ):
        """model: in evaluation mode. cache_bytes: device memory for past conversations; 0 keeps none."""
        self.model = model
        self.encoder = encoder
        self._cache = ReadingCache(cache_bytes)
        self._context = context_length(model.config)

    @classmethod
    def from_pretrained(
        cls,
        run_or_checkpoint: str | os.PathLike,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        *,
        audio_model: str | None = None,
        text_model: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "Assistant":
        """Load a checkpoint, or the best by evaluation of a run's folder, else its newest.

        device: "cpu", "cuda", "cuda:1" (None: the first GPU if there is one). dtype: "auto" is bf16 on a GPU and fp32
        on a CPU. A base that was in 4 bits in training is loaded in 4 bits. audio_model, text_model: present paths of
        the bases, if they are neither at their old paths nor beside the checkpoint. Raises UsageError for a folder
        without a checkpoint or a missing device, CheckpointError for a folder that is damaged or whose bases changed.
        """
        bases = {"audio_model": audio_model, "text_model": text_model}
        model, processor = read_checkpoint(
            run_or_checkpoint, lambda folder: load_chosen(folder, device, dtype, **bases)
        )
        return cls(model, encoder_of(processor), cache_bytes=cache_bytes)

    def answer(self, messages: Messages, **request: Any) -> Answer:
        """The whole answer to the last message; see `stream`."""
        stream = self.stream(messages, **request)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(self, messages: Messages, **request: Any) -> "AnswerStream":
        """The answer's text in pieces, as the model writes it; at the end the stream's `answer` is set.

        Reads the messages and decodes their clips before it returns.
        """
        wanted = Request(**request)
        prompt = self.encoder.encode_prompt(messages)
        wanted = within_context(prompt, wanted, self._context)
        return AnswerStream(self._tokens(prompt, wanted), AnswerText(self.encoder, prompt, wanted))

    def answer_all(self, conversations: Iterable[Messages], *, batch_size: int = 8, **request: Any) -> list[Answer]:
        """Answers in the order of the conversations, in batches of similar length; see `answer_batches`.

        conversations: a list, or a generator, of which 256 are read at a time. Keeps nothing for later turns. The
        answers differ from those of `answer` only by rounding. Errors name the conversation by its number, from 1.
        """
        wanted, numbered = Request(**request), enumerate(_conversations(conversations), 1)
        answers: list[Answer] = []
        while some := list(islice(numbered, AT_ONCE)):
            prompts = [self._encode_one_of_many(messages, number, wanted) for number, messages in some]
            answers += self.answer_prompts(prompts, batch_size=batch_size, **request)
        return answers

    def answer_prompts(self, prompts: Sequence[Sample], *, batch_size: int = 8, **request: Any) -> list[Answer]:
        """`answer_all` for encoded conversations, see `DialogueEncoder.encode_prompt`."""
        answers: dict[int, Answer] = {}
        with tqdm(total=len(prompts), unit="answer", disable=None, leave=False) as bar:
            for batch in answer_batches(self.model, self.encoder, prompts, Request(**request), batch_size):
                answers |= batch
                bar.update(len(batch))
        return [answers[position] for position in range(len(prompts))]

    def forget(self) -> bool:
        """Free the memory of past conversations. Returns whether there were any."""
        found = self._cache.clear()
        if found and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def _encode_one_of_many(self, messages: Messages, number: int, request: Request) -> Sample:
        try:
            prompt = self.encoder.encode_prompt(messages)
            within_context(prompt, request, self._context)
            return prompt
        except DataError as error:
            raise type(error)(f"conversation {number}: {error}") from error

    def _tokens(self, prompt: Sample, request: Request) -> Generator[int, None, None]:
        """The tokens that the model writes after a prompt, without end. Closing the generator keeps what was read."""
        chooser = Chooser(request, 1, never_written(self.model))
        with naming_the_prompt(prompt):
            reading, reader, logits = self._begin(PromptTokens(self.model, prompt))
            try:
                while True:
                    chosen = chooser.choose(logits)
                    (token,) = fetch_tokens(chosen, logits)
                    yield token
                    logits = reader.read_tokens(chosen)
                    reading.tokens.append(token)
            except GeneratorExit:  # between two tokens: all layers have read the same
                reading.past = reader.past
                self._cache.keep(reading)
                raise

    def _begin(self, prompt: PromptTokens) -> tuple[Reading, Reader, Tensor]:
        """`_read`; if memory runs out, free that of past conversations and try again."""
        try:
            return self._read(prompt)
        except Exception as error:
            if not is_out_of_memory(error) or not self.forget():
                raise
        return self._read(prompt)  # outside the handler: its traceback keeps the first attempt's tensors alive

    def _read(self, prompt: PromptTokens) -> tuple[Reading, Reader, Tensor]:
        """Read the part of the prompt that is not in the cache. Returns the reading, the reader and the next logits."""
        known = self._cache.take(prompt.tokens)
        reader = Reader(self.model, past=known.past)
        logits = reader.read(prompt.embed_rest(known))
        return Reading(list(prompt.tokens), heard=known.heard), reader, logits


class AnswerStream(Iterator[str]):
    """The text of one answer in pieces; joined, they are `answer.text`.

    answer: None until the iteration has ended. Close a stream that is not read to its end, by `close` or with `with`;
    its answer then has the text that was read, as after an error or Ctrl-C, which end it too.
    """

    def __init__(self, tokens: Generator[int, None, None], written: AnswerText):
        self.answer: Answer | None = None
        self._tokens = tokens
        self._written = written
        self._read = ""
        self._cancelled = Event()

    def __next__(self) -> str:
        piece = ""
        while self.answer is None and not piece:
            piece = self._advance()
        if not piece:
            raise StopIteration
        return piece

    def cancel(self) -> None:
        """End the answer after the current token. Any thread may call this at any time."""
        self._cancelled.set()

    def close(self) -> None:
        """End the answer now. Only the reading thread may call this, any number of times."""
        if self.answer is None:
            self._end(replace(self._written.answer(), text=self._read, finish_reason="cancelled"))

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> str:
        """Add one token. Returns the text that is certain now and was not before; may be empty."""
        if self._cancelled.is_set():
            self.close()
            return ""
        try:
            token = next(self._tokens)
        except BaseException:  # Ctrl-C too: no more tokens come, and the next read must not look like a whole answer
            self.close()
            raise
        self._written.add(token)
        certain = self._written.certain
        piece, self._read = certain[len(self._read) :], certain
        if self._written.finish_reason is not None:
            self._end(self._written.answer())
        return piece

    def _end(self, answer: Answer) -> None:
        self.answer = answer
        self._tokens.close()


def _conversations(given: Any) -> Iterator[Messages]:
    """Raises UsageError for what holds no conversations: one conversation, a path, nothing."""
    if isinstance(given, str | bytes | Mapping | Message) or not isinstance(given, Iterable):
        raise UsageError(
            f"answer_all takes a list of conversations, each a list of messages, not {type(given).__name__}; for one "
            "conversation use `answer`"
        )
    return iter(given)


def answer_prompts(
    model: Qwen3AudioForConditionalGeneration,
    encoder: DialogueEncoder,
    prompts: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[str]:
    """The text of a model's most probable answer to each prompt, see `Assistant.answer_prompts`."""
    answers = Assistant(model, encoder).answer_prompts(prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [answer.text for answer in answers]


def load_chosen(
    folder: Path,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """The model (in evaluation mode) and processor of a checkpoint that `read_checkpoint` has chosen and checked.

    The arguments are those of `Assistant.from_pretrained`.
    """
    options = options_as_trained(folder, {"dtype": dtype, "device_map": {"": device} if device else None})
    check_versions(quantized=options.load_in_4bit)
    model = load_trained(folder, options, audio_model=audio_model, text_model=text_model)
    return model.eval(), load_processor(folder)
