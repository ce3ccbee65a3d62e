"""Texts that chat templates are made of: our own, and what is replaced in Qwen3's."""

AUDIO_TOKEN = "<|audio_pad|>"

# Flattens lists of content parts to text, which most templates of text models crash on, and strips it.
PREAMBLE = (
    "{%- set flat = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- set flat.text = message.content if message.content is string else '' -%}"
    "{%- for part in ([] if message.content is string or not message.content else message.content) -%}"
    f"{{%- set flat.text = flat.text ~ ('{AUDIO_TOKEN}' if part.type == 'audio' else part.text) -%}}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text | trim)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# Qwen3's two conditions: which turns have a think block. Patched: all have, and the history's reasoning is dropped.
QWEN3_HISTORY = "{%- if loop.index0 > ns.last_query_index %}"
QWEN3_EVERY_TURN = (
    "{%- if loop.index0 <= ns.last_query_index %}{%- set reasoning_content = '' %}{%- endif %}{%- if true %}"
)
QWEN3_LAST_TURN = "{%- if loop.last or (not loop.last and reasoning_content) %}"
# For a model that never saw a chat; line breaks around the contents, because contents are tokenised apart.
PLAIN = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}"
    "{%- elif message.role == 'user' -%}{{- 'User:\\n' + message.content + '\\n' -}}"
    "{%- else -%}{{- 'Assistant:\\n' + message.content + eos_token + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)
