"""The context of a model, the most positions that a conversation may take: a prompt and its answer fit into it."""

from dataclasses import replace

from transformers import PreTrainedConfig

from qwhisper.data.rows import Sample
from qwhisper.errors import DataError
from qwhisper.infer.decoding import Request


class TooLongPromptError(DataError):
    """A conversation fills the context of the model, so no answer fits behind it."""


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions of a language model, or of the one in a joined model; None if its configuration has no bound.

    RoPE scaling raises the bound to factor × original positions (YaRN: Peng et al., 2023), for a configuration whose
    `max_position_embeddings` is still that of the base.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if positions is None or not factor or not original:
        return positions
    return max(positions, int(factor * original))


def within_context(prompt: Sample, request: Request, context: int | None) -> Request:
    """The request, for at most as many tokens as fit behind the prompt; its answer then ends with "length".

    Raises TooLongPromptError if none fits. context: see `context_length`.
    """
    if context is None:
        return request
    room = context - len(prompt.input_ids)
    if room < 1:
        raise TooLongPromptError(
            f"the conversation takes {len(prompt.input_ids)} tokens and the model's context has {context}, so no "
            "answer fits: leave out early turns, or use shorter clips (`/reset` in `qwhisper chat`)"
        )
    return replace(request, max_new_tokens=min(request.max_new_tokens, room))
